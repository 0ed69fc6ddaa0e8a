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
    from ..network.taps import Network
    from ..runtime.call import Call
    from ..runtime.loop import Loop
    from ..services.relay import Relay
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .boot_queue import BootQueue
    from .removal import Removal
    from .runs import Run, Runs

QUIT_TIMEOUT = 5.0  # seconds a QEMU gets to write its disks' last tables before it is killed
DRAIN_TIMEOUT = 2.0  # seconds the relay gets to deliver a guest's last bytes
POWERDOWN_AGAIN = 10.0  # seconds; a guest that is still booting does not hear the power button
REBOOT_TIMEOUT = 60  # seconds a guest gets to go down
WAITERS_MAX = 64  # who may wait for one VM's end; those who have hung up count until their time is over


class Stops:
    """`boot_again` is called with the VM, and with who waits for it, when a guest has gone down to be booted again."""

    def __init__(
        self,
        *,
        loop: Loop,
        registry: Registry,
        relay: Relay,
        runs: Runs,
        queue: BootQueue,
        network: Network,
        removal: Removal,
        boot_again: Callable[[Vm, list[tuple[Call, bool]]], None],
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._relay = relay
        self._runs = runs
        self._queue = queue
        self._network = network
        self._removal = removal
        self._boot_again = boot_again
        runs.on_end = self._qemu_is_gone

    def shutdown(self, call: Call, vm: Vm, *, force: bool, timeout: int) -> None:
        """Ask the guest; reply when it is off. After *timeout* seconds refuse, or with *force* pull the plug."""
        run = self._runs.must_live(vm, "shutdown")
        if vm.state == QUEUED:
            self._leave_queue(run, call)
            return

        def too_long() -> None:
            if call not in run.stops or run.ending:
                return
            if force:
                self._pull_plug(run)
                return
            run.stops.remove(call)
            self._one_less(run)
            call.fail(TimedOut(vm=vm.ref, what="switch itself off; it is still running", seconds=timeout))

        self._wait(run, timeout, too_long)
        run.stops.append(call)
        run.asked = run.asked if run.asked == "kill" else "shutdown"
        self._press_power(run)
        call.progress(f"waiting for {vm.ref} to switch itself off")

    def reboot(self, call: Call, vm: Vm) -> None:
        """Ask the guest to switch itself off, then boot it again; reply when it runs."""
        run = self._runs.must_live(vm, "reboot")
        if vm.state not in (RUNNING, PAUSED):
            raise VmBusy(vm=vm.ref, state=vm.state)
        waiting = (call, False)

        def too_long() -> None:
            if waiting in run.boots and not run.ending:
                run.boots.remove(waiting)
                self._one_less(run)
                what = "go down; it is still running, and `reset` restarts it the hard way"
                call.fail(TimedOut(vm=vm.ref, what=what, seconds=REBOOT_TIMEOUT))

        self._wait(run, REBOOT_TIMEOUT, too_long)
        run.boots.append(waiting)
        run.asked = "reboot"
        self._press_power(run)
        call.progress(f"waiting for {vm.ref} to go down")

    def kill(self, call: Call, vm: Vm) -> None:
        """Pull the plug; reply when QEMU is gone. Disks are kept, and closed properly if QEMU still can."""
        run = self._runs.must_live(vm, "kill")
        if vm.state == QUEUED:
            self._leave_queue(run, call)
            return
        run.stops.append(call)
        self._pull_plug(run)

    def end_now(self, run: Run) -> None:
        """End whatever exists of *run*, without asking anybody."""
        if run.outer is None and run.qemu is None and not run.launching:
            self._finish(run)
        else:
            self._kill(run)

    def resume(self, run: Run) -> None:
        """Our predecessor was killed while it ended this VM: go on with it."""
        self._pull_plug(run)

    def _leave_queue(self, run: Run, call: Call) -> None:
        run.asked = "kill"
        run.stops.append(call)
        for waiting, _ in run.boots:
            waiting.fail(VmStopped(vm=run.vm.ref, problem="it was taken out of the queue"))
        run.boots.clear()
        self._finish(run)

    def _wait(self, run: Run, seconds: float, too_long: Callable[[], None]) -> None:
        """Give somebody's patience its time. A limited number of them: a client may ask, hang up and ask again for ever."""
        waiting = len(run.stops) + len(run.boots)
        if waiting >= WAITERS_MAX:
            raise TooManyRequests(count=waiting, what=f"requests for the end of {run.vm.ref}", limit=WAITERS_MAX)
        run.patience.append(self._loop.after(seconds, too_long))

    def _one_less(self, run: Run) -> None:
        """Somebody's patience has ended; what the others asked for still stands."""
        if run.asked != "kill":
            rebooting = run.boots and run.vm.state in (RUNNING, PAUSED)
            run.asked = "shutdown" if run.stops else "reboot" if rebooting else ""

    def _press_power(self, run: Run) -> None:
        """Press the button, and again from time to time, once for all who wait."""
        if run.button is not None:
            run.button.cancel()
        if self._runs.is_current(run) and run.asked in ("shutdown", "reboot") and not run.ending:
            self._runs.order(run, "powerdown")
            run.button = self._loop.after(POWERDOWN_AGAIN, lambda: self._press_power(run))

    def _pull_plug(self, run: Run) -> None:
        """SIGTERM, which lets QEMU flush its disks; SIGKILL when that takes too long."""
        run.asked = "kill"
        self._stopping(run)
        if run.qemu is None:
            self._kill(run)
            return
        self._runs.end(run, kill=False)
        self._loop.after(QUIT_TIMEOUT, lambda: None if run.ending else self._kill(run))

    def _kill(self, run: Run) -> None:
        """Kill QEMU and its jail. What is only just being started is killed once there is something to kill."""
        if run.vm.state in ALIVE:
            self._stopping(run)
        if not run.launching:
            self._runs.end(run, kill=True)

    def _stopping(self, run: Run) -> None:
        """Written before the act; but no full disk keeps a plug in (the journal has its reason)."""
        try:
            self._registry.set_state(run.vm, STOPPING)
        except VmshellError:
            run.vm.state = STOPPING

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def _qemu_is_gone(self, run: Run) -> None:
        """The relay first delivers what the guest said last, the launcher says the exit status; then all who wait hear it."""
        waiting = {"relay", *(["launcher"] if run.launched and run.status is None else [])}

        def heard(who: str) -> None:
            waiting.discard(who)
            if not waiting:
                self._finish(run)

        run.on_status = lambda: heard("launcher")
        self._loop.after(DRAIN_TIMEOUT, lambda: self._finish(run))
        self._relay.send(Drain(number=run.vm.number), lambda error: heard("relay"))

    def _finish(self, run: Run) -> None:
        """Once for each run: whatever comes after that finds the VM off, or in its next run."""
        vm = run.vm
        if not self._runs.is_current(run):
            return
        self._runs.drop(run)
        for timer in (*run.patience, *([run.button] if run.button else [])):
            timer.cancel()
        self._queue.leave(vm)
        self._network.ended(vm)
        again = run.asked == "reboot" and run.error is None
        error = None if again else self._failure(run)
        failed = error is not None and not run.asked
        if error is not None:
            vm.last_error = {**error.to_wire(), "at": int(time.time())}
        vm.note = error.sentence() if error is not None and failed else ""
        vm.booted = None
        self._registry.set_state(vm, FAILED if failed else OFF)
        # Only now: who reads at a console that the VM has ended finds it off.
        self._relay.send(Forget(number=vm.number, reason=run.why_it_ends()), lambda error: None)
        by_user(vm.uid, "ended", number=vm.number, owner=vm.owner, vm=vm.name, state=vm.state, why=run.why_it_ends())
        if error is not None:
            for call, _ in run.boots:
                call.fail(error)
        for call in run.stops:
            call.reply({"name": vm.ref, "state": vm.state})
        with contextlib.suppress(VmshellError):
            self._registry.save(vm)
        if again:
            self._boot_again(vm, run.boots)
        elif vm.once:
            self._removal.remove(vm)

    def _failure(self, run: Run) -> VmshellError | None:
        """What to tell those who waited for it to run, or to remember when nobody asked for its end."""
        if run.error is not None:
            return run.error
        if run.boots:
            problem = run.why_it_ends() if run.asked else f"QEMU ended before the guest ran{run.exit_status()}"
            return StartFailed(vm=run.vm.ref, problem=problem)
        if run.asked or run.guest_ended:
            return None
        return VmStopped(vm=run.vm.ref, problem=f"QEMU ended unexpectedly{run.exit_status()}")
