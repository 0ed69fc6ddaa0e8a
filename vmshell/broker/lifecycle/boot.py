"""From `boot` to a running guest: limits, turn, host, images, launch, `ready`, `running`; or the reason why not.

Runs in: the broker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BadValue, VmshellError
from ...messages import CREATING, FAILED, OFF, QUEUED, RUNNING, STARTING, STOPPING
from ...model.decide import apply_fixed, refuse
from ...refusals import AlreadyRunning, NoQemu, RelayDown, StartFailed, VmBusy
from ..handlers import snapshots
from ..network.attachments import close
from ..runtime.log import by_user, unexpected
from ..storage import overlays, resources
from . import define
from . import launch_plan as starter
from .live_update import order_all

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..api.server import Call
    from ..context import Context
    from ..network.attachments import Cables
    from ..storage.image_catalogue import Image
    from ..vm.registry import Vm
    from .runs import Fleet, Live
    from .stop import Endings

START_TIMEOUT = 60.0  # seconds from the jail's start to a running guest CPU; hosts that emulate can be very busy
BOOTABLE = (OFF, FAILED)


class Boots:
    """`attach` gives a waiting caller its console, once the relay has the VM."""

    def __init__(self, context: Context, fleet: Fleet, endings: Endings, attach: Callable[[Call, Vm], None]) -> None:
        self._context = context
        self._fleet = fleet
        self._endings = endings
        self._attach = attach

    def boot(self, call: Call, vm: Vm, *, console: bool, restore: str = "", scratch: bool = False) -> None:
        """Boot *vm* for *call*; for this run only from the snapshot *restore*, or with what it writes thrown away (*scratch*)."""
        live = self.start(vm, restore, scratch=scratch)
        live.boots.append((call, console))
        self.enter(live)
        if vm.state == QUEUED:
            ahead = self._context.admission.ahead(vm)
            call.progress(f"waiting for its turn: {ahead} boots ahead" if ahead else "looking at what this host can do")

    def start(self, vm: Vm, restore: str = "", *, scratch: bool = False) -> Live:
        """Begin a run if nothing stands against it; it is still to `enter` the queue."""
        self.must_be_bootable(vm)
        wanted = self.for_this_run(vm, restore, scratch=scratch)
        self._allow(vm, wanted)
        return self._fleet.begin(vm, wanted)

    def must_be_bootable(self, vm: Vm) -> None:
        if vm.state in (CREATING, STOPPING) or vm.defining:
            raise VmBusy(vm=vm.ref, state="being changed" if vm.defining else vm.state)
        if vm.unreadable:
            raise StartFailed(vm=vm.ref, problem=vm.unreadable)
        if vm.state not in BOOTABLE:
            raise AlreadyRunning(vm=vm.ref, state=vm.state)

    def again(self, vm: Vm, waiting: list[tuple[Call, bool]]) -> None:
        """Boot *vm* for those who asked for a reboot: as it is defined and allowed now."""
        try:
            wanted = self.for_this_run(vm, "", scratch=False)
            self._allow(vm, wanted)
            live = self._fleet.begin(vm, wanted)
        except VmshellError as exc:
            for call, _ in waiting:
                call.fail(exc)
            return
        live.boots = waiting
        self.enter(live)

    def for_this_run(self, vm: Vm, restore: str, *, scratch: bool) -> Definition:
        """What *vm* boots with: its definition, what the policy fixes, and what was asked for this once."""
        wanted = apply_fixed(vm.definition, self._context.effective(vm.owner).limits)
        if restore:
            wanted = replace(wanted, restore=restore)
        if scratch:
            wanted = replace(wanted, disks=tuple(replace(disk, snapshot=disk.writable or disk.snapshot) for disk in wanted.disks))
        return wanted

    def _allow(self, vm: Vm, wanted: Definition) -> None:
        """Everything that may stand against this boot; raises the first of it."""
        context = self._context
        refuse(define.verdicts(context, vm, wanted, {}, running=True), vm.ref)
        resources.check_objects(context, vm, wanted)
        snapshots.check_restore(context, vm, wanted)

    def enter(self, live: Live) -> None:
        """Queue *live* for its turn to boot."""
        self._context.admission.enter(live.vm, lambda: self._context.facts.when_known(lambda: self._step(live, self._prepare)))

    def _step(self, live: Live, step: Callable[[Live], None], error: VmshellError | None = None) -> None:
        """Run a step of a boot; what it raises, or the *error* of what it waited for, is the boot's failure."""
        if not self._fleet.is_current(live) or live.vm.state not in (QUEUED, STARTING):
            return  # killed while it waited, and perhaps booted again: that run has nothing to do with this one's failure
        try:
            if error:
                raise error
            step(live)
        except VmshellError as exc:
            self._fail(live, exc)
        except Exception as exc:
            self._fail(live, StartFailed(vm=live.vm.ref, problem=f"an internal error, reference {unexpected(exc)}"))

    def _prepare(self, live: Live) -> None:
        """The host is known: see that the images are whole, then launch."""
        facts = self._context.facts
        if facts.problem:
            raise NoQemu(problem=facts.problem)
        definition = self._booted(live)
        if facts.versions and definition.machine not in ("q35", "pc") and definition.machine not in facts.versions:
            rule = f"this host's QEMU has no such machine; nearest is {facts.machines.get(definition.family, definition.family)}"
            raise BadValue(field="machine.type", value=definition.machine, rule=rule)
        images = starter.images_of(self._context, live.vm, definition)

        def verified(error: VmshellError | None) -> None:
            self._step(live, lambda live: self._make_scratch(live, images), error)

        self._context.images.when_verified(list(images.values()), verified)

    def _booted(self, live: Live) -> Definition:
        return live.vm.booted or live.vm.definition

    def _make_scratch(self, live: Live, images: dict[str, Image]) -> None:
        def made(error: VmshellError | None, overlays: dict[int, int]) -> None:
            self._step(live, lambda live: self._plug(live, images, overlays), error)

        overlays.make(self._context, live.vm, self._booted(live), made)

    def _plug(self, live: Live, images: dict[str, Image], overlays: dict[int, int]) -> None:
        """The cables take a while; the overlays are only lent to us for as long as this call."""
        held: dict[int, int] = {}

        def plugged(error: VmshellError | None, cables: Cables) -> None:
            try:
                self._step(live, lambda live: self._launch(live, images, held, cables), error)
            finally:
                close(cables)
                close(held)
                held.clear()

        try:
            for index, fd in overlays.items():
                held[index] = os.dup(fd)
            self._context.networks.plug(live.vm, plugged)
        except BaseException:
            close(held)
            raise

    def _launch(self, live: Live, images: dict[str, Image], overlays: dict[int, int], cables: Cables) -> None:
        vm, context = live.vm, self._context
        vm.accel = context.facts.accel
        vm.started = time.time()
        context.registry.set_state(vm, STARTING)
        # Looked at again: a turn may be long in coming, and much can change meanwhile.
        resources.check_objects(context, vm, self._booted(live))
        live.launching = True
        try:
            starter.Start(context, live, self._booted(live), images, overlays, cables, self._launched)
        except BaseException:
            live.launching = False
            raise
        self.bound(live)

    def _launched(self, live: Live, error: VmshellError | None, started: starter.Started | None) -> None:
        """The launcher has answered. Whoever killed the VM meanwhile waits for what was started to end."""
        live.launching = False
        if started is None:
            if live.asked == "kill" or live.error:
                self._endings.end_now(live)
            else:
                self._step(live, lambda live: None, error)
            return
        live.launched = True
        self._fleet.hold_outer(live, started.process)
        if live.vm.state != STARTING or live.asked == "kill" or live.error:
            self._endings.end_now(live)
            return
        self._step(live, lambda live: self._begin(live, started))

    def _begin(self, live: Live, started: starter.Started) -> None:
        self._context.registry.set_state(live.vm, STARTING)  # again, with the pid: a new broker finds QEMU by it
        os.write(started.barrier, b"g")
        self._fleet.watch(live, started.errors)

    def bound(self, live: Live) -> None:
        """Give a start its time, and no more."""
        self._context.loop.after(START_TIMEOUT, lambda: self._too_long(live))

    def _too_long(self, live: Live) -> None:
        if self._fleet.is_current(live) and live.vm.state == STARTING:
            self._fail(live, StartFailed(vm=live.vm.ref, problem=f"QEMU did not answer within {START_TIMEOUT:.0f} s"))

    def ready(self, live: Live) -> None:
        """The relay has console and QMP: attach those who asked for it before the first instruction, then let the CPUs run."""
        self._fleet.find_qemu(live)
        for call, console in live.boots:
            if console:
                self._attach(call, live.vm)
        order_all(self._context, live, lambda error: self._ordered(live, error))

    def _ordered(self, live: Live, error: VmshellError | None) -> None:
        """It is as it was defined, or it does not run. A relay that went away says `ready` anew, and all of it is repeated."""
        if not self._fleet.is_current(live) or live.ending or live.vm.state != STARTING or isinstance(error, RelayDown):
            return
        if error:
            self._fail(live, StartFailed(vm=live.vm.ref, problem="the cable of a card with link = down could not be pulled"))
        else:
            self._fleet.order(live, "cont")

    def runs(self, live: Live) -> None:
        vm = live.vm
        self._fleet.find_qemu(live)
        self._context.registry.set_state(vm, RUNNING)
        by_user(vm.uid, "running", number=vm.number, owner=vm.owner, vm=vm.name, accel=vm.accel)
        for call, _ in live.boots:
            call.reply({"name": vm.ref, "state": vm.state, "accel": vm.accel})
        live.boots.clear()

    def _fail(self, live: Live, error: VmshellError) -> None:
        """The boot has failed: end whatever was started; those who wait hear why once nothing of it is left."""
        vm = live.vm
        live.error = error
        by_user(vm.uid, "boot-failed", number=vm.number, owner=vm.owner, vm=vm.name, code=error.code, problem=error)
        self._endings.end_now(live)
