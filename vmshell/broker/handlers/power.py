"""The verbs of the power buttons and the way to the guest: boot, shutdown, kill, reset, reboot, console, display.

Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...messages import PAUSED, RUNNING, Boot, Console, Display, Kill, Reboot, Reset, Shutdown
from ...refusals import VmBusy, VmStopped

if TYPE_CHECKING:
    from ...errors import VmshellError
    from ..lifecycle.boot import Boots
    from ..lifecycle.consoles import Consoles
    from ..lifecycle.runs import Runs
    from ..lifecycle.stop import Stops
    from ..runtime.call import Call
    from ..vm.vm import Vm
    from .table import Handlers


class PowerHandlers:
    """Hands requests for a start, an end or a console on."""

    def __init__(self, *, runs: Runs, boots: Boots, stops: Stops, consoles: Consoles) -> None:
        self._runs = runs
        self._boots = boots
        self._stops = stops
        self._consoles = consoles

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {
            Boot: self._boot,
            Shutdown: self._shutdown,
            Kill: self._kill,
            Reset: self._reset,
            Reboot: self._reboot,
            Console: self._console,
            Display: self._display,
        }

    def _boot(self, call: Call, request: Boot, vm: Vm) -> None:
        self._boots.boot(call, vm, console=request.console, restore=request.restore, scratch=request.scratch)

    def _shutdown(self, call: Call, request: Shutdown, vm: Vm) -> None:
        self._stops.shutdown(call, vm, force=request.force, timeout=request.timeout)

    def _kill(self, call: Call, request: Kill, vm: Vm) -> None:
        self._stops.kill(call, vm)

    def _reset(self, call: Call, request: Reset, vm: Vm) -> None:
        """Press the reset button: the guest starts from scratch; QEMU, console and disks stay."""
        run = self._runs.must_live(vm, "reset")
        if vm.state not in (RUNNING, PAUSED):
            raise VmBusy(vm=vm.ref, state=vm.state)

        def done(error: VmshellError | None) -> None:
            if vm.state not in (RUNNING, PAUSED):
                call.fail(VmStopped(vm=vm.ref, problem=run.why_it_ends()))
            elif error:
                call.fail(error)
            else:
                call.reply({"name": vm.ref, "state": vm.state})

        self._runs.order(run, "reset", done)

    def _reboot(self, call: Call, request: Reboot, vm: Vm) -> None:
        self._stops.reboot(call, vm)

    def _console(self, call: Call, request: Console, vm: Vm) -> None:
        self._consoles.console(call, vm, readonly=request.readonly, replay=request.replay)

    def _display(self, call: Call, request: Display, vm: Vm) -> None:
        self._consoles.display(call, vm)
