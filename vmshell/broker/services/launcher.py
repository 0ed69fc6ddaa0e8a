"""The broker's connection to the launcher, which alone may start something under another uid than ours, or end it.

In session mode the launcher is our own child, and its VMs are signalled by pidfd (see `lifecycle/runs.py`).
Runs in: the broker.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...errors import ProtocolError, VmshellError
from ...launcher_messages import KILL, TERM, Ended, Job, Launch, RestartNames, Signal
from ...refusals import LauncherDown
from ...spawn import FIRST_FD, python
from ..host.processes import Process
from ..runtime.log import note
from .connection import Connection, start_service

if TYPE_CHECKING:
    from ...layout import Layout
    from ..host.processes import Host
    from ..runtime.loop import Loop

STARTER = "launcher/__main__.py"
Started = Callable[[VmshellError | None, Process | None], None]


class Launcher(Connection):
    """What it starts is not our child: its end shows on its pidfd, its exit status is the launcher's to say."""

    name = "launcher"
    down = LauncherDown
    fds_allowed = 1

    def __init__(self, loop: Loop, host: Host, layout: Layout) -> None:
        super().__init__(loop, layout.launcher_socket, self._connected)
        self._host = host
        self._layout = layout
        self._statuses: dict[int, Callable[[int], None]] = {}
        self._to_kill: set[int] = set()  # VMs of which nothing may be left, until the launcher has said yes

    def launch(
        self, number: int, plan: dict[str, object], fds: tuple[int, ...], started: Started, ended: Callable[[int], None]
    ) -> None:
        """Start VM *number*'s QEMU; `started(error, process)` is called once, `ended(status)` perhaps later."""
        self._to_kill.discard(number)  # a launch ends what is left by itself

        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if error:
                self._statuses.pop(run, None)
                started(error, None)
            else:
                started(None, _process(packet))

        run = 0
        run = self.request(Launch(number=number, plan=plan), answered, fds)
        self._statuses[run] = ended

    def job(self, kind: str, words: list[str], fds: tuple[int, ...], answered: Callable[[VmshellError | None], None]) -> None:
        """Start a job; the last of *fds* is where its answer goes. `answered` is called once."""

        def started(error: VmshellError | None, packet: wire.Packet) -> None:
            packet.close()
            answered(error)

        self.request(Job(kind=kind, words=tuple(words)), started, fds)

    def terminate(self, number: int) -> None:
        """Ask every process of the VM to end."""
        self.request(Signal(number=number, signal=TERM), self._noted)

    def kill(self, number: int) -> None:
        """Kill every process of the VM; asked again for as long as there is no launcher."""
        self._to_kill.add(number)

        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if not isinstance(error, LauncherDown):
                self._to_kill.discard(number)
                self._noted(error, packet)

        self.request(Signal(number=number, signal=KILL), answered)

    def restart_names(self) -> None:
        """Have the names service started anew."""

        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            packet.close()
            self._noted(error, packet)

        self.request(RestartNames(), answered)

    def _noted(self, error: VmshellError | None, packet: wire.Packet) -> None:
        if error:
            note("launcher-refused", problem=error)

    def _heard(self, packet: wire.Packet) -> bool:
        if packet.body.get("verb") != Ended.verb:
            return False
        message = Ended.from_body(packet.body)
        ended = self._statuses.pop(message.run, None)
        if ended is not None:
            ended(message.status)
        return True

    def _connected(self) -> None:
        # What the last launcher would have said of its children, nobody will: whoever waits for that waits no longer.
        statuses, self._statuses = self._statuses, {}
        for ended in statuses.values():
            ended(0)
        for number in sorted(self._to_kill):
            self.kill(number)

    def _open(self) -> wire.Socket:
        if not self._layout.embedded:
            return super()._open()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            command = python(self._layout.policy, str(FIRST_FD), starter=STARTER)
            start_service(self._loop, self._host, self._layout, self.name, command, theirs.fileno())
        return wire.Socket(fileno=ours.detach())


def _process(packet: wire.Packet) -> Process:
    """The process that an answer of the launcher's names and brings."""
    answer = packet.body.get("ok")
    pid = answer.get("pid") if isinstance(answer, dict) else None
    if type(pid) is not int:
        raise ProtocolError(problem="the launcher's answer names no process")
    return Process(pid, child=False, pidfd=packet.take_fd())
