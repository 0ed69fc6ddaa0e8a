"""The VMs that have a QEMU or are about to: who waits for them, which processes they are, and how they are spoken to.

Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import CREATING, QUEUED, Order, Watch
from ...refusals import VmBusy, WrongState
from ..host.processes import Process, children
from ..runtime.log import by_user
from . import serial_port

if TYPE_CHECKING:
    from ...layout import Layout
    from ...model.definition import Definition
    from ..network.interfaces import Interface
    from ..runtime.call import Call
    from ..runtime.loop import Loop, Timer
    from ..services.launcher import Launcher
    from ..services.relay import Done, Relay
    from ..storage.resolve import Resolved
    from ..vm.registry import Registry
    from ..vm.vm import Vm


class Run:
    """What exists only from the moment a VM is asked to boot until it has ended."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.resolved: Resolved | None = None  # what it boots with, once that was looked up
        self.outer: Process | None = None  # the jail's outer process, which leads to QEMU
        self.qemu: Process | None = None
        self.boots: list[tuple[Call, bool]] = []  # who waits for it to run; with a console?
        self.stops: list[Call] = []  # who waits for it to end
        self.asked = ""  # "shutdown", "kill" or "reboot", once somebody asked for the end
        self.guest_ended = False
        self.error: VmshellError | None = None  # why its boot failed
        self.launched = False  # by a launcher that will say its exit status
        self.status: int | None = None  # its jail's exit status, once the launcher has said it
        self.on_status: Callable[[], None] | None = None
        self.launching = False  # the launcher was asked for it and has not answered
        self.ending = False
        self.button: Timer | None = None  # when its power button is pressed again
        self.patience: list[Timer] = []  # of those who wait for its end

    def has_status(self, status: int) -> None:
        """The launcher says how its jail has ended."""
        self.status = status
        if self.on_status:
            self.on_status()

    def why_it_ends(self) -> str:
        if self.guest_ended:
            return "the guest switched itself off"
        return {"kill": "its plug was pulled", "": "QEMU ended by itself"}.get(self.asked, "it was shut down")

    def exit_status(self) -> str:
        return f" (exit status {self.status})" if self.status else ""


class Runs:
    """The table of runs, by the VM's number. `on_end` is set by `stop.py`: called once, when a VM's QEMU is gone."""

    def __init__(self, *, loop: Loop, layout: Layout, registry: Registry, launcher: Launcher, relay: Relay, log_max: int) -> None:
        self._loop = loop
        self._layout = layout
        self._registry = registry
        self._launcher = launcher
        self._relay = relay
        self._log_max = log_max
        self._runs: dict[int, Run] = {}
        self.on_end: Callable[[Run], None]

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, number: int) -> Run | None:
        return self._runs.get(number)

    def qemu_pid(self, vm: Vm) -> int:
        """Return the pid of *vm*'s QEMU for figures in /proc, 0 while there is none."""
        run = self._runs.get(vm.number)
        return run.qemu.pid if run and run.qemu else 0

    def is_current(self, run: Run) -> bool:
        """Is this still the VM's present run? Timers and answers may come after its end."""
        return self._runs.get(run.vm.number) is run

    def begin(self, vm: Vm, wanted: Definition) -> Run:
        """A new run of *vm* with *wanted* as what it is booted with, waiting for its turn: written first."""
        vm.started_again()
        vm.booted = wanted
        self._registry.set_state(vm, QUEUED)
        return self.add(Run(vm))

    def add(self, run: Run) -> Run:
        self._runs[run.vm.number] = run
        return run

    def drop(self, run: Run) -> None:
        self._runs.pop(run.vm.number, None)

    def must_live(self, vm: Vm, verb: str) -> Run:
        """The run of a VM that *verb* needs to be alive; raises VmBusy or WrongState."""
        run = self._runs.get(vm.number)
        if run is None:
            if vm.state == CREATING:
                raise VmBusy(vm=vm.ref, state=vm.state)
            raise WrongState(vm=vm.ref, state=vm.state, verb=verb, needed="running")
        return run

    def end(self, run: Run, *, kill: bool) -> None:
        """Ask a run's processes to end, which lets QEMU flush its disks, or *kill* them."""
        if not self._layout.embedded:
            (self._launcher.kill if kill else self._launcher.terminate)(run.vm.number)
        elif kill:
            self._kill(run)
        elif run.qemu is not None:
            run.qemu.signal(signal.SIGTERM)

    def _kill(self, run: Run) -> None:
        """Kill what a session holds. The outer process is stopped first, so that it cannot start QEMU behind our back."""
        if run.qemu is None and run.outer is not None:
            run.outer.signal(signal.SIGSTOP)
            self.find_qemu(run)
        for process in (run.qemu, run.outer):
            if process is not None:
                process.signal(signal.SIGKILL)

    # --- its processes ------------------------------------------------------------------------------------------------

    def hold_outer(self, run: Run, process: Process) -> None:
        run.outer = process
        run.vm.pid, run.vm.pid_ticks = process.pid, process.ticks
        self._loop.watch(process.pidfd, lambda: self._outer_ended(run))

    def hold_qemu(self, run: Run, process: Process) -> None:
        run.qemu = process
        run.vm.qemu_pid, run.vm.qemu_ticks = process.pid, process.ticks
        self._loop.watch(process.pidfd, lambda: self._qemu_ended(run))

    def find_qemu(self, run: Run) -> None:
        """Take hold of QEMU itself: the only child of the jail's outer process."""
        if run.qemu is None and run.outer is not None:
            for pid in children(run.outer.pid):
                # It may end between the two looks; then its jail ends too, and that is heard.
                with contextlib.suppress(ProcessLookupError):
                    self.hold_qemu(run, Process(pid, child=False))
                break

    def _outer_ended(self, run: Run) -> None:
        """The jail's outer process is gone: with QEMU (it passes on its status), before it (a failed start), or killed alone."""
        if run.outer is None:
            return
        self._loop.unwatch(run.outer.pidfd)
        run.outer.reap()
        run.outer = None
        if run.qemu is None:
            self._ended(run)

    def _qemu_ended(self, run: Run) -> None:
        if run.qemu is None:
            return
        self._loop.unwatch(run.qemu.pidfd)
        run.qemu.reap()
        run.qemu = None
        self._ended(run)

    def _ended(self, run: Run) -> None:
        if not run.ending:
            run.ending = True
            self.on_end(run)

    # --- by way of the relay ------------------------------------------------------------------------------------------

    def order(
        self,
        run: Run,
        what: str,
        done: Done | None = None,
        *,
        value: int = 0,
        disks: int = 0,
        fd: int = -1,
        interface: Interface | None = None,
    ) -> None:
        """Have the relay tell QEMU *what*, one of messages.ORDERS, with its numbers, an interface and a descriptor."""

        def failed(error: VmshellError | None) -> None:
            if error:
                by_user(run.vm.uid, "order-failed", number=run.vm.number, what=what, problem=error)

        message = Order(number=run.vm.number, what=what, value=value, disks=disks)
        if interface:
            ported = (run.vm.booted or run.vm.definition).family == "q35"
            message = Order(
                number=run.vm.number, what=what, value=value, mac=interface.mac, model=interface.nic.model, port=ported
            )
        self._relay.send(message, done or failed, (fd,) if fd >= 0 else ())

    def watch(self, run: Run, errors: int = -1) -> None:
        """Put the VM into the relay's care; *errors* is QEMU's error pipe. A failed start's time-out bounds the wait for it."""

        def failed(error: VmshellError | None) -> None:
            if error:
                by_user(run.vm.uid, "watch-failed", number=run.vm.number, problem=error)

        log = (run.vm.booted or run.vm.definition).log
        message = Watch(number=run.vm.number, log_max=self._log_max, log=log)
        with contextlib.ExitStack() as stack:
            console = serial_port.open_both(self._layout.vm_run(run.vm.number), stack)
            self._relay.send(message, failed, (*console, *((errors,) if errors >= 0 else ())))

    def watch_all(self) -> None:
        """A new relay connection: name every VM that has a QEMU."""
        for run in self:
            if run.outer is not None or run.qemu is not None:
                self.watch(run)
