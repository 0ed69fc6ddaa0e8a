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
    from ...model.definition import Definition
    from ..api.server import Call
    from ..context import Context
    from ..network.interfaces import Card
    from ..runtime.loop import Timer
    from ..services.relay import Done
    from ..vm.registry import Vm


class Live:
    """What exists only from the moment a VM is asked to boot until it has ended."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
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


class Fleet:
    """`on_end` is set by `endings.py`: called once, when a VM's QEMU is gone."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._lives: dict[int, Live] = {}
        self.on_end: Callable[[Live], None]

    def __iter__(self) -> Iterator[Live]:
        return iter(list(self._lives.values()))

    def __len__(self) -> int:
        return len(self._lives)

    def get(self, number: int) -> Live | None:
        return self._lives.get(number)

    def is_current(self, live: Live) -> bool:
        """Is this still the VM's present run? Timers and answers may come after its end."""
        return self._lives.get(live.vm.number) is live

    def begin(self, vm: Vm, wanted: Definition) -> Live:
        """A new run of *vm* with *wanted* as what it is booted with, waiting for its turn: written first."""
        vm.started_again()
        vm.booted = wanted
        self._context.registry.set_state(vm, QUEUED)
        return self.add(Live(vm))

    def add(self, live: Live) -> Live:
        self._lives[live.vm.number] = live
        return live

    def drop(self, live: Live) -> None:
        self._lives.pop(live.vm.number, None)

    def must_live(self, vm: Vm, verb: str) -> Live:
        """The run of a VM that *verb* needs to be alive; raises VmBusy or WrongState."""
        live = self._lives.get(vm.number)
        if live is None:
            if vm.state == CREATING:
                raise VmBusy(vm=vm.ref, state=vm.state)
            raise WrongState(vm=vm.ref, state=vm.state, verb=verb, needed="running")
        return live

    def end(self, live: Live, *, kill: bool) -> None:
        """Ask a run's processes to end, which lets QEMU flush its disks, or *kill* them."""
        context, number = self._context, live.vm.number
        if not context.layout.embedded:
            (context.launcher.kill if kill else context.launcher.terminate)(number)
        elif kill:
            self._kill(live)
        elif live.qemu is not None:
            live.qemu.signal(signal.SIGTERM)

    def _kill(self, live: Live) -> None:
        """Kill what a session holds. The outer process is stopped first, so that it cannot start QEMU behind our back."""
        if live.qemu is None and live.outer is not None:
            live.outer.signal(signal.SIGSTOP)
            self.find_qemu(live)
        for process in (live.qemu, live.outer):
            if process is not None:
                process.signal(signal.SIGKILL)

    # --- its processes ------------------------------------------------------------------------------------------------

    def hold_outer(self, live: Live, process: Process) -> None:
        live.outer = process
        live.vm.pid, live.vm.pid_ticks = process.pid, process.ticks
        self._context.loop.watch(process.pidfd, lambda: self._outer_ended(live))

    def hold_qemu(self, live: Live, process: Process) -> None:
        live.qemu = process
        live.vm.qemu_pid, live.vm.qemu_ticks = process.pid, process.ticks
        self._context.loop.watch(process.pidfd, lambda: self._qemu_ended(live))

    def find_qemu(self, live: Live) -> None:
        """Take hold of QEMU itself: the only child of the jail's outer process."""
        if live.qemu is None and live.outer is not None:
            for pid in children(live.outer.pid):
                # It may end between the two looks; then its jail ends too, and that is heard.
                with contextlib.suppress(ProcessLookupError):
                    self.hold_qemu(live, Process(pid, child=False))
                break

    def _outer_ended(self, live: Live) -> None:
        """The jail's outer process is gone: with QEMU (it passes on its status), before it (a failed start), or killed alone."""
        if live.outer is None:
            return
        self._context.loop.unwatch(live.outer.pidfd)
        live.outer.reap()
        live.outer = None
        if live.qemu is None:
            self._ended(live)

    def _qemu_ended(self, live: Live) -> None:
        if live.qemu is None:
            return
        self._context.loop.unwatch(live.qemu.pidfd)
        live.qemu.reap()
        live.qemu = None
        self._ended(live)

    def _ended(self, live: Live) -> None:
        if not live.ending:
            live.ending = True
            self.on_end(live)

    # --- by way of the relay ------------------------------------------------------------------------------------------

    def order(
        self,
        live: Live,
        what: str,
        done: Done | None = None,
        *,
        value: int = 0,
        disks: int = 0,
        fd: int = -1,
        card: Card | None = None,
    ) -> None:
        """Have the relay tell QEMU *what*, one of messages.ORDERS, with its numbers, a card and the descriptor beside it."""

        def failed(error: VmshellError | None) -> None:
            if error:
                by_user(live.vm.uid, "order-failed", number=live.vm.number, what=what, problem=error)

        message = Order(number=live.vm.number, what=what, value=value, disks=disks)
        if card:
            ported = (live.vm.booted or live.vm.definition).family == "q35"
            message = Order(number=live.vm.number, what=what, value=value, mac=card.mac, model=card.nic.model, port=ported)
        self._context.relay.send(message, done or failed, (fd,) if fd >= 0 else ())

    def watch(self, live: Live, errors: int = -1) -> None:
        """Put the VM into the relay's care; *errors* is QEMU's error pipe. A failed start's time-out bounds the wait for it."""

        def failed(error: VmshellError | None) -> None:
            if error:
                by_user(live.vm.uid, "watch-failed", number=live.vm.number, problem=error)

        log = (live.vm.booted or live.vm.definition).log
        message = Watch(number=live.vm.number, log_max=self._context.policy.host.log_size_max, log=log)
        with contextlib.ExitStack() as stack:
            console = serial_port.open_both(self._context.layout.vm_run(live.vm.number), stack)
            self._context.relay.send(message, failed, (*console, *((errors,) if errors >= 0 else ())))

    def watch_all(self) -> None:
        """A new relay connection: name every VM that has a QEMU."""
        for live in self:
            if live.outer is not None or live.qemu is not None:
                self.watch(live)
