"""The life of VMs as the verbs and the relay's words see it. One state machine per VM, each state written before the act.

    off/failed → queued → starting → running ⇄ paused → (stopping) → off, or failed with the reason
    creating → off          off/failed → gone

`boots.py` is the way up, `endings.py` the way down, `fleet.py` what exists in between. A request that must wait (for its turn,
for the guest, for a job) keeps its `Call` there; the state machine itself never depends on anybody waiting.
Runs in: the broker.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import ALIVE, FAILED, OFF, PAUSED, QUEUED, RUNNING, STARTING, STOPPING, Attach, Event, Forget
from ...refusals import RelayDown, VmBusy, VmStopped, WrongState
from ..host.processes import same_process
from ..runtime.log import note
from . import launch_plan as starter
from . import orphans
from .boot import Boots
from .runs import Fleet, Live
from .stop import Endings

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm

Attached = Callable[[VmshellError | None], None]

PAUSES = {
    "internal-error": "internal-error: this host cannot run the guest",
    "io-error": "io-error: storage refused a write",
}


class Machines:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._fleet = Fleet(context)
        self._endings = Endings(context, self._fleet, lambda vm, waiting: self._boots.again(vm, waiting))
        self._boots = Boots(context, self._fleet, self._endings, self._attach_at_boot)
        self.boot = self._boots.boot
        self.shutdown = self._endings.shutdown
        self.reboot = self._endings.reboot
        self.kill = self._endings.kill
        self.watch_all = self._fleet.watch_all
        self.must_be_bootable = self._boots.must_be_bootable
        self.for_this_run = self._boots.for_this_run
        self.must_live = self._fleet.must_live
        self.order = self._fleet.order

    def qemu_pid(self, vm: Vm) -> int:
        """The pid of *vm*'s QEMU for figures in /proc, 0 while there is none."""
        live = self._fleet.get(vm.number)
        return live.qemu.pid if live and live.qemu else 0

    def live(self, vm: Vm) -> Live | None:
        """*vm*'s present run, if it has one."""
        return self._fleet.get(vm.number)

    def busy(self) -> bool:
        return len(self._fleet) > 0

    def reset(self, call: Call, vm: Vm) -> None:
        """The reset button: the guest starts from scratch; QEMU, console and disks stay."""
        live = self._fleet.must_live(vm, "reset")
        if vm.state not in (RUNNING, PAUSED):
            raise VmBusy(vm=vm.ref, state=vm.state)

        def done(error: VmshellError | None) -> None:
            if vm.state not in (RUNNING, PAUSED):
                call.fail(VmStopped(vm=vm.ref, problem=live.why_it_ends()))
            elif error:
                call.fail(error)
            else:
                call.reply({"name": vm.ref, "state": vm.state})

        self._fleet.order(live, "reset", done)

    # --- what the relay says ------------------------------------------------------------------------------------------

    def heard(self, event: Event) -> None:
        """Act on one word about one VM; words about VMs that do not run mean nothing."""
        live = self._fleet.get(event.number)
        if live is None:
            return
        vm, word = live.vm, event.word
        if word in ("guest-shutdown", "guest-panic"):
            live.guest_ended = True  # also when QEMU's end was seen first: the relay reads its last words only then
        elif live.ending:
            return
        elif word == "ready" and vm.state == STARTING:
            self._boots.ready(live)
        elif word == "running" and vm.state in (STARTING, PAUSED):
            vm.note = ""
            self._boots.runs(live)
        elif word == "paused" and vm.state == RUNNING:
            self._context.registry.set_state(vm, PAUSED)
        elif word in PAUSES:
            vm.note = PAUSES[word]
        elif word == "output":
            vm.seen_output = True
        elif word == "viewers":
            vm.viewers = event.count

    # --- consoles -----------------------------------------------------------------------------------------------------

    def console(self, call: Call, vm: Vm, *, readonly: bool, replay: bool) -> None:
        """Reply with a viewer's ends of a console's two pipes; the relay holds the others."""
        if vm.state in (QUEUED, STARTING):
            raise VmBusy(vm=vm.ref, state=vm.state)
        if vm.state not in (RUNNING, PAUSED):
            raise WrongState(vm=vm.ref, state=vm.state, verb="console", needed="running")

        def done(error: VmshellError | None) -> None:
            if error:
                call.fail(error)
            else:
                call.reply({"name": vm.ref, "state": vm.state})

        self._attach(call, vm, done, readonly=readonly, replay=replay)

    def display(self, call: Call, vm: Vm) -> None:
        """Reply with one end of a stream; QEMU gets the other and speaks RFB on it. No port is opened anywhere."""
        live = self._fleet.must_live(vm, "display")
        if vm.state not in (RUNNING, PAUSED):
            raise VmBusy(vm=vm.ref, state=vm.state)
        if (vm.booted or vm.definition).display != "vnc":
            raise WrongState(vm=vm.ref, state="without a screen", verb="display", needed="booted with display.type = vnc")
        viewer, qemu = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

        def answered(error: VmshellError | None) -> None:
            with viewer:
                if error:
                    call.fail(error)
                else:
                    call.reply({"name": vm.ref, "state": vm.state}, (viewer.fileno(),))

        with qemu:
            self._fleet.order(live, "display", answered, fd=qemu.fileno())

    def _attach_at_boot(self, call: Call, vm: Vm) -> None:
        """Keep a console for the reply of *call*'s boot; without one it is a boot all the same."""
        self._attach(call, vm, lambda error: None, readonly=False, replay=True)

    def _attach(self, call: Call, vm: Vm, done: Attached, *, readonly: bool, replay: bool) -> None:
        """Make two pipes; the relay gets an end of each, *call* keeps the others for its reply, and `done(error)` is called.

        From here on the broker is out of the path: no guest byte ever enters it.
        """
        with ExitStack() as relays, ExitStack() as viewers:
            try:
                keys, typed = _pipe(relays, viewers)
                shown, output = _pipe(viewers, relays)
            except OSError as exc:
                note("no-console", number=vm.number, problem=exc)
                done(RelayDown())
                return
            theirs = viewers.pop_all()

            def answered(error: VmshellError | None) -> None:
                if error:
                    theirs.close()
                else:
                    theirs.pop_all()
                    call.keep_fds((shown, typed))
                done(error)

            peer = call.peer
            message = Attach(number=vm.number, uid=peer.uid, label=peer.label, readonly=readonly, replay=replay)
            self._context.relay.send(message, answered, (keys, output))

    # --- after our own restart ----------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Find the VMs that went on while there was no broker, and boot those that were still waiting for their turn."""
        ended = []
        for vm in self._context.registry:
            saved = self._context.registry.saved_run(vm.number)
            if saved.get("state") == QUEUED:
                self._boots.enter(self._fleet.begin(vm, self._context.registry.saved_booted(vm)))
            elif not saved:
                starter.clean(self._context.layout, vm.number)
            elif not self._adopt_one(vm, saved):
                ended.append(vm.number)
            if vm.once and vm.state in (OFF, FAILED):
                self._context.remove(vm)
        # Only now: the first word to the relay also names every VM that was found.
        for number in ended:
            self._context.relay.send(Forget(number=number, reason="the VM has ended"), lambda error: None)

    def autostart(self) -> None:
        """Once after the host's boot: start the VMs that are to start with it, if the policy still grants it."""
        marker = f"{self._context.layout.broker_run}/autostarted"
        if os.path.exists(marker):
            return
        for vm in self._context.registry:
            if vm.definition.autostart and vm.state == OFF and not vm.once:
                try:
                    self._boots.enter(self._boots.start(vm))
                except VmshellError as exc:
                    note("autostart-refused", number=vm.number, owner=vm.owner, vm=vm.name, problem=exc)
        with open(marker, "w", encoding="ascii"):
            pass

    def _adopt_one(self, vm: Vm, saved: dict[str, object]) -> bool:
        """Go on with *vm* where its last broker left it; False if it has ended."""
        live = Live(vm)
        outer = same_process(saved.get("pid"), saved.get("ticks"))
        qemu = same_process(saved.get("qemu_pid"), saved.get("qemu_ticks"))
        if outer is None and qemu is None:
            # A jail that was started and not written down yet waits at a barrier that nobody opens any more.
            if self._context.layout.embedded:
                orphans.end_waiting(self._context.layout.vm_run(vm.number))
            else:
                self._context.launcher.kill(vm.number)
            vm.last_error = {
                "code": "vm-stopped",
                "text": "it ended while the service was down",
                "hint": "",
                "at": int(time.time()),
            }
            self._context.registry.set_state(vm, OFF)
            return False
        vm.accel = str(saved.get("accel", ""))
        vm.booted = self._context.registry.saved_booted(vm)
        balloon = saved.get("balloon")
        vm.balloon = balloon if type(balloon) is int else 0
        added = saved.get("added")
        vm.added = {index for index in added if type(index) is int} if isinstance(added, list) else set()
        started = saved.get("started")
        vm.started = float(started) if isinstance(started, (int, float)) else time.time()
        self._fleet.add(live)
        self._context.networks.adopt(vm, saved.get("cables"))
        if outer is not None:
            self._fleet.hold_outer(live, outer)
        if qemu is not None:
            self._fleet.hold_qemu(live, qemu)
        else:
            self._fleet.find_qemu(live)
        state = saved.get("state")
        self._context.registry.set_state(vm, state if isinstance(state, str) and state in ALIVE else RUNNING)
        if vm.state == STARTING:
            self._boots.bound(live)
        elif vm.state == STOPPING:
            self._endings.resume(live)
        return True


def _pipe(reads: ExitStack, writes: ExitStack) -> tuple[int, int]:
    """Return the two ends of a new pipe, which these stacks close."""
    out, into = os.pipe2(os.O_CLOEXEC)
    reads.callback(os.close, out)
    writes.callback(os.close, into)
    return out, into
