"""The broker's connection to root: four requests in, an answer to each and the ends of what was started out.

One broker at a time: a second connection takes the first one's place. A request is answered before the next is read. What is
wrong with one is said by its field, to the broker and in the journal, and harms nothing else.
Runs in: the launcher. Holds a pidfd of every process it started, or found at its start.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from collections.abc import Callable
from functools import partial

from .. import packets
from ..errors import Internal, LaunchRefused, ProtocolError, VmshellError, safe
from ..fields import request_id
from ..launcher_messages import LENT_MAX, Ended, Job, Launch, RestartNames, Signal, parse_to_launcher
from ..spawn import spawn
from .jobs import Jobs
from .runs import Runs

RESTART_NAMES = ("systemctl", "--no-block", "restart", "vmshell-names.service")


class Server:
    """It listens in system mode; in session mode one connection is all there is, and its end is ours."""

    def __init__(self, *, runs: Runs, jobs: Jobs, broker_uid: int) -> None:
        self._runs = runs
        self._jobs = jobs
        self._broker_uid = broker_uid
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._selector = selectors.DefaultSelector()  # what is called when there is something to read: each one's `data`

    def listen(self, listener: socket.socket) -> None:
        """Let the broker connect at *listener*."""
        listener.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def serve(self, connection: socket.socket) -> None:
        """Let the broker ask by *connection*, and by no earlier one."""
        self._hang_up()
        connection.set_inheritable(False)
        connection.setblocking(False)  # whoever does not read is hung up on, see `_send`
        self._connection = connection
        self._selector.register(connection, selectors.EVENT_READ, partial(self._requested, connection))

    def run(self) -> None:
        """Serve until there is nobody left who could ask."""
        while self._listener is not None or self._connection is not None:
            for key, _ in self._selector.select():
                # The one before it may have ended it.
                if key.fd in self._selector.get_map():
                    self._call(key.data)

    def _call(self, call: Callable[[], None]) -> None:
        """What fails for one process or connection (no memory to fork with, say) is said, and the others go on."""
        try:
            call()
        except (OSError, VmshellError) as exc:
            report(f"an event was not dealt with to its end: {exc}")

    def watch_process(self, pid: int, ended: Callable[[], None], *, run: int = 0) -> int:
        """Call *ended* when *pid* has ended, and say so to who asked for it as *run*; return its pidfd, which stays ours."""
        pidfd = os.pidfd_open(pid)
        asker = self._connection

        def over() -> None:
            self._selector.unregister(pidfd)
            status = _exit_status(pidfd)
            os.close(pidfd)
            ended()
            if run and status is not None and asker is not None and asker is self._connection:
                self._send(Ended(run=run, status=status).to_body())

        self._selector.register(pidfd, selectors.EVENT_READ, over)
        return pidfd

    # --- the connection -----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        if packets.peer_uid(sock) != self._broker_uid:
            report(f"refused a connection of uid {packets.peer_uid(sock)}")
            sock.close()
            return
        self.serve(sock)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._selector.unregister(self._connection)
            self._connection.close()
            self._connection = None

    def _requested(self, connection: socket.socket) -> None:
        try:
            packet = packets.recv(connection, fds_allowed=LENT_MAX)
        except (OSError, ProtocolError) as exc:
            report(f"the connection ends: {exc}")
            packet = None
        if packet is None:
            self._hang_up()
            return
        ident = 0
        try:
            ident = request_id(packet.body)
            self._answer(ident, packet)
        except VmshellError as exc:
            report(f"{safe(packet.body.get('verb'), 20)} {safe(packet.body.get('number', ''), 20)} refused: {exc}")
            self._send({"id": ident, "error": exc.to_wire()})
        except Exception as exc:
            reference = os.urandom(4).hex()
            report(f"{reference}: {type(exc).__name__}: {exc}")
            self._send({"id": ident, "error": Internal(reference=reference).to_wire()})
        finally:
            packet.close()

    def _answer(self, ident: int, packet: packets.Packet) -> None:
        """Carry out one request and answer it; raises what it is refused with."""
        message = parse_to_launcher(packet.body)
        if packet.fds and not isinstance(message, Launch | Job):
            raise LaunchRefused(problem="descriptors: this request brings none")
        try:
            if isinstance(message, Signal):
                self._runs.signal(message)
                self._send({"id": ident, "ok": {}})
            elif isinstance(message, Launch):
                pid, ended = self._runs.launch(message, packet.fds, self._connection)
                self._started(ident, pid, ended)
                if self._connection is None:
                    self._runs.kill_child(pid)  # nobody could be told of it: its barrier never opens
            elif isinstance(message, Job):
                self._started(ident, *self._jobs.start(message, packet.fds))
            elif isinstance(message, RestartNames):
                self._started(ident, spawn(RESTART_NAMES, {}, stderr=2), lambda: None)
        except OSError as exc:
            raise LaunchRefused(problem=f"a program it needs cannot be started ({exc.strerror})") from exc

    def _started(self, ident: int, pid: int, ended: Callable[[], None]) -> None:
        pidfd = self.watch_process(pid, ended, run=ident)
        self._send({"id": ident, "ok": {"pid": pid}}, (pidfd,))

    def _send(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Send, or hang up on a broker that does not read: it learns everything anew when it comes back."""
        if self._connection is None:
            return
        try:
            packets.send(self._connection, body, fds)
        except OSError as exc:
            report(f"the broker does not take its answers: {exc}")
            self._hang_up()


def _exit_status(pidfd: int) -> int | None:
    """The exit status of a child that has ended, 128 and the signal's number if one ended it; None for somebody else's child."""
    try:
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status


def report(text: str) -> None:
    """Write one escaped line to the journal."""
    try:
        print(f"launcher: {safe(text, 1000)}", file=sys.stderr, flush=True)
    except OSError:
        pass  # the journal is gone; nothing here depends on it
