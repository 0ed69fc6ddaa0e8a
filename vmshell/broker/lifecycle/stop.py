"""The ways a VM ends: asked to, its plug pulled, by itself; and what is written and said then.

Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import ALIVE, FAILED, OFF, PAUSED, QUEUED, RUNNING, STOPPING, Drain, Forget
from ...refusals import StartFailed, TimedOut, TooManyRequests, VmBusy, VmStopped
from ..runtime.log import by_user

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm
    from .runs import Fleet, Live

QUIT_TIMEOUT = 5.0  # seconds a QEMU gets to write its disks' last tables before it is killed
DRAIN_TIMEOUT = 2.0  # seconds the relay gets to deliver a guest's last bytes
POWERDOWN_AGAIN = 10.0  # seconds; a guest that is still booting does not hear the power button
REBOOT_TIMEOUT = 60  # seconds a guest gets to go down
WAITERS_MAX = 64  # who may wait for one VM's end; those who have hung up count until their time is over


class Endings:
    """`boot_again` is called with the VM, and with who waits for it, when a guest has gone down to be booted again."""

    def __init__(self, context: Context, fleet: Fleet, boot_again: Callable[[Vm, list[tuple[Call, bool]]], None]) -> None:
        self._context = context
        self._fleet = fleet
        self._boot_again = boot_again
        fleet.on_end = self._qemu_is_gone

    def shutdown(self, call: Call, vm: Vm, *, force: bool, timeout: int) -> None:
        """Ask the guest; reply when it is off. After *timeout* seconds refuse, or with *force* pull the plug."""
        live = self._fleet.must_live(vm, "shutdown")
        if vm.state == QUEUED:
            self._leave_queue(live, call)
            return

        def too_long() -> None:
            if call not in live.stops or live.ending:
                return
            if force:
                self._pull_plug(live)
                return
            live.stops.remove(call)
            self._one_less(live)
            call.fail(TimedOut(vm=vm.ref, what="switch itself off; it is still running", seconds=timeout))

        self._wait(live, timeout, too_long)
        live.stops.append(call)
        live.asked = live.asked if live.asked == "kill" else "shutdown"
        self._press_power(live)
        call.progress(f"waiting for {vm.ref} to switch itself off")

    def reboot(self, call: Call, vm: Vm) -> None:
        """Ask the guest to switch itself off, then boot it again; reply when it runs."""
        live = self._fleet.must_live(vm, "reboot")
        if vm.state not in (RUNNING, PAUSED):
            raise VmBusy(vm=vm.ref, state=vm.state)
        waiting = (call, False)

        def too_long() -> None:
            if waiting in live.boots and not live.ending:
                live.boots.remove(waiting)
                self._one_less(live)
                what = "go down; it is still running, and `reset` restarts it the hard way"
                call.fail(TimedOut(vm=vm.ref, what=what, seconds=REBOOT_TIMEOUT))

        self._wait(live, REBOOT_TIMEOUT, too_long)
        live.boots.append(waiting)
        live.asked = "reboot"
        self._press_power(live)
        call.progress(f"waiting for {vm.ref} to go down")

    def kill(self, call: Call, vm: Vm) -> None:
        """Pull the plug; reply when QEMU is gone. Disks are kept, and closed properly if QEMU still can."""
        live = self._fleet.must_live(vm, "kill")
        if vm.state == QUEUED:
            self._leave_queue(live, call)
            return
        live.stops.append(call)
        self._pull_plug(live)

    def end_now(self, live: Live) -> None:
        """End whatever exists of *live*, without asking anybody."""
        if live.outer is None and live.qemu is None and not live.launching:
            self._finish(live)
        else:
            self._kill(live)

    def resume(self, live: Live) -> None:
        """Our predecessor was killed while it ended this VM: go on with it."""
        self._pull_plug(live)

    def _leave_queue(self, live: Live, call: Call) -> None:
        live.asked = "kill"
        live.stops.append(call)
        for waiting, _ in live.boots:
            waiting.fail(VmStopped(vm=live.vm.ref, problem="it was taken out of the queue"))
        live.boots.clear()
        self._finish(live)

    def _wait(self, live: Live, seconds: float, too_long: Callable[[], None]) -> None:
        """Give somebody's patience its time. A limited number of them: a client may ask, hang up and ask again for ever."""
        waiting = len(live.stops) + len(live.boots)
        if waiting >= WAITERS_MAX:
            raise TooManyRequests(count=waiting, what=f"requests for the end of {live.vm.ref}", limit=WAITERS_MAX)
        live.patience.append(self._context.loop.after(seconds, too_long))

    def _one_less(self, live: Live) -> None:
        """Somebody's patience has ended; what the others asked for still stands."""
        if live.asked != "kill":
            rebooting = live.boots and live.vm.state in (RUNNING, PAUSED)
            live.asked = "shutdown" if live.stops else "reboot" if rebooting else ""

    def _press_power(self, live: Live) -> None:
        """Press the button, and again from time to time, once for all who wait."""
        if live.button is not None:
            live.button.cancel()
        if self._fleet.is_current(live) and live.asked in ("shutdown", "reboot") and not live.ending:
            self._fleet.order(live, "powerdown")
            live.button = self._context.loop.after(POWERDOWN_AGAIN, lambda: self._press_power(live))

    def _pull_plug(self, live: Live) -> None:
        """SIGTERM, which lets QEMU flush its disks; SIGKILL when that takes too long."""
        live.asked = "kill"
        self._stopping(live)
        if live.qemu is None:
            self._kill(live)
            return
        self._fleet.end(live, kill=False)
        self._context.loop.after(QUIT_TIMEOUT, lambda: None if live.ending else self._kill(live))

    def _kill(self, live: Live) -> None:
        """Kill QEMU and its jail. What is only just being started is killed once there is something to kill."""
        if live.vm.state in ALIVE:
            self._stopping(live)
        if not live.launching:
            self._fleet.end(live, kill=True)

    def _stopping(self, live: Live) -> None:
        """Written before the act; but no full disk keeps a plug in (the journal has its reason)."""
        try:
            self._context.registry.set_state(live.vm, STOPPING)
        except VmshellError:
            live.vm.state = STOPPING

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def _qemu_is_gone(self, live: Live) -> None:
        """The relay first delivers what the guest said last, the launcher says the exit status; then all who wait hear it."""
        waiting = {"relay", *(["launcher"] if live.launched and live.status is None else [])}

        def heard(who: str) -> None:
            waiting.discard(who)
            if not waiting:
                self._finish(live)

        live.on_status = lambda: heard("launcher")
        self._context.loop.after(DRAIN_TIMEOUT, lambda: self._finish(live))
        self._context.relay.send(Drain(number=live.vm.number), lambda error: heard("relay"))

    def _finish(self, live: Live) -> None:
        """Once for each run: whatever comes after that finds the VM off, or in its next run."""
        vm = live.vm
        if not self._fleet.is_current(live):
            return
        self._fleet.drop(live)
        for timer in (*live.patience, *([live.button] if live.button else [])):
            timer.cancel()
        self._context.admission.leave(vm)
        self._context.networks.ended(vm)
        again = live.asked == "reboot" and live.error is None
        error = None if again else self._failure(live)
        failed = error is not None and not live.asked
        if error is not None:
            vm.last_error = {**error.to_wire(), "at": int(time.time())}
        vm.note = error.sentence() if error is not None and failed else ""
        vm.booted = None
        self._context.registry.set_state(vm, FAILED if failed else OFF)
        # Only now: who reads at a console that the VM has ended finds it off.
        self._context.relay.send(Forget(number=vm.number, reason=live.why_it_ends()), lambda error: None)
        by_user(vm.uid, "ended", number=vm.number, owner=vm.owner, vm=vm.name, state=vm.state, why=live.why_it_ends())
        if error is not None:
            for call, _ in live.boots:
                call.fail(error)
        for call in live.stops:
            call.reply({"name": vm.ref, "state": vm.state})
        with contextlib.suppress(VmshellError):
            self._context.registry.save(vm)
        if again:
            self._boot_again(vm, live.boots)
        elif vm.once:
            self._context.remove(vm)

    def _failure(self, live: Live) -> VmshellError | None:
        """What to tell those who waited for it to run, or to remember when nobody asked for its end."""
        if live.error is not None:
            return live.error
        if live.boots:
            problem = live.why_it_ends() if live.asked else f"QEMU ended before the guest ran{live.exit_status()}"
            return StartFailed(vm=live.vm.ref, problem=problem)
        if live.asked or live.guest_ended:
            return None
        return VmStopped(vm=live.vm.ref, problem=f"QEMU ended unexpectedly{live.exit_status()}")
