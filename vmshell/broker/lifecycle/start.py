"""One start: everything is opened, handed to the launcher, and closed again.

A straight list under one ExitStack; whatever step raises, all that was opened is closed again and nothing is left behind.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import VmshellError
from ...refusals import LauncherDown, StartFailed
from . import orphans, serial_port
from .launch_plan import SOCKETS, Descriptors

if TYPE_CHECKING:
    from ...layout import Layout
    from ..host.processes import Host, Process
    from ..network.taps import Taps
    from ..runtime.loop import Loop
    from ..services.launcher import Launcher
    from ..storage.resolve import Resolved
    from .launch_plan import LaunchPlans
    from .runs import Run

LAUNCHER_TIMEOUT, LAUNCHER_AGAIN = 30.0, 0.2  # seconds for which a launcher that is away is asked again, and between two tries


@dataclass(frozen=True)
class Started:
    """The jail's outer process, the reading end of QEMU's standard error, and the start barrier: QEMU waits for a byte there.

    The two descriptors close after the call. A broker that is killed before it has written down the process leaves a barrier that
    never opens, so no QEMU ever runs of which nobody knows.
    """

    process: Process
    errors: int
    barrier: int


Answered = Callable[["Run", VmshellError | None, Started | None], None]


@dataclass(frozen=True)
class Opened:
    """What is open for one start: *fds* for the launcher, and our own ends. *stack* closes all of it."""

    stack: contextlib.ExitStack
    fds: tuple[int, ...]
    errors: int
    barrier: int


class Starter:
    """Starts runs by the launcher."""

    def __init__(self, *, loop: Loop, host: Host, layout: Layout, launcher: Launcher, plans: LaunchPlans) -> None:
        self._loop = loop
        self._host = host
        self._layout = layout
        self._launcher = launcher
        self._plans = plans

    def start(self, run: Run, resolved: Resolved, overlays: Mapping[int, int], taps: Taps, answered: Answered) -> None:
        """Open everything and ask the launcher; raises a VmshellError, and then nothing is left of it."""
        folder = self._layout.vm_run(run.vm.number)
        with contextlib.ExitStack() as stack:
            self._host.share_with_relay(folder, 0o750)
            fds = Descriptors(stack)
            sockets = {
                name: stack.enter_context(self._host.listen_for_qemu(f"{folder}/{name}.sock")).fileno() for name in SOCKETS
            }
            barrier = stack.enter_context(_barrier(f"{folder}/{orphans.BARRIER}"))
            console = serial_port.make(folder, stack)
            plan = self._plans.build(resolved, overlays, taps, fds, sockets=sockets, barrier=barrier)
            errors, write_end = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, errors)
            stack.callback(os.close, write_end)
            os.set_blocking(errors, False)
            opened = Opened(stack.pop_all(), (*fds.lent, *console, write_end), errors, barrier)
        start = _Start(
            run,
            answered,
            loop=self._loop,
            launcher=self._launcher,
            folder=folder,
            embedded=self._layout.embedded,
            plan=plan,
            opened=opened,
        )
        start.ask()


class _Start:
    """One start asks the launcher, and closes all that was opened for it whatever the launcher answers.

    `answered(run, error, started)` is called once. A launcher that went away before it answered is asked again: what it may have
    started waits at a barrier that nobody opens. In a session it is ended at once, on a host by the next launch of that number.
    """

    def __init__(
        self,
        run: Run,
        answered: Answered,
        *,
        loop: Loop,
        launcher: Launcher,
        folder: str,
        embedded: bool,
        plan: dict[str, Any],
        opened: Opened,
    ) -> None:
        self._run = run
        self._answered = answered
        self._loop = loop
        self._launcher = launcher
        self._folder = folder
        self._embedded = embedded
        self._plan = plan
        self._opened = opened
        self._tries_end = time.monotonic() + LAUNCHER_TIMEOUT

    def ask(self) -> None:
        """Ask the launcher; raises a VmshellError, and then nothing is left of what was opened."""
        if self._run.asked == "kill" or self._run.error:
            self._heard(StartFailed(vm=self._run.vm.ref, problem="it was killed meanwhile"), None)
            return
        try:
            self._launcher.launch(self._run.vm.number, self._plan, self._opened.fds, self._heard, self._run.has_status)
        except BaseException:
            self._opened.stack.close()
            raise

    def _heard(self, error: VmshellError | None, process: Process | None) -> None:
        if isinstance(error, LauncherDown) and self._embedded:
            orphans.end_waiting(self._folder)
        if isinstance(error, LauncherDown) and time.monotonic() < self._tries_end:
            self._loop.after(LAUNCHER_AGAIN, self.ask)
            return
        if isinstance(error, LauncherDown):
            self._launcher.kill(self._run.vm.number)  # it may have been started all the same
        with self._opened.stack:
            self._answered(self._run, error, Started(process, self._opened.errors, self._opened.barrier) if process else None)


def clean(layout: Layout, number: int) -> None:
    """Remove what a start left in the run directory."""
    shutil.rmtree(layout.vm_run(number), ignore_errors=True)


@contextlib.contextmanager
def _barrier(path: str) -> Iterator[int]:
    """A pipe as one descriptor: whoever reads it also holds it open for writing, so that nobody's end is the end of the wait."""
    os.mkfifo(path, 0o600)
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.unlink(path)
        yield fd
    finally:
        os.close(fd)
