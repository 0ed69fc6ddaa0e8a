"""From `boot` to a running guest: limits, turn, host, images, launch, `ready`, `running`; or the reason why not.

Runs in: the broker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import AlreadyRunning, NoQemu, StartFailed, VmBusy, VmshellError
from ..messages import CREATING, FAILED, OFF, QUEUED, RUNNING, STARTING, STOPPING
from . import start as starter
from .journal import by_user, unexpected
from .policy import decide

if TYPE_CHECKING:
    from .catalogue import Image
    from .context import Context
    from .endings import Endings
    from .fleet import Fleet, Live
    from .server import Call
    from .vms import Vm

START_TIMEOUT = 60.0  # seconds from the jail's start to a running guest CPU; hosts that emulate can be very busy
BOOTABLE = (OFF, FAILED)


class Boots:
    """`attach` gives a waiting caller its console, once the relay has the VM."""

    def __init__(self, context: Context, fleet: Fleet, endings: Endings, attach: Callable[[Call, Vm], None]) -> None:
        self._context = context
        self._fleet = fleet
        self._endings = endings
        self._attach = attach

    def boot(self, call: Call, vm: Vm, *, console: bool) -> None:
        if vm.state in (CREATING, STOPPING):
            raise VmBusy(vm=vm.ref, state=vm.state)
        if vm.state not in BOOTABLE:
            raise AlreadyRunning(vm=vm.ref, state=vm.state)
        if vm.unreadable:
            raise StartFailed(vm=vm.ref, problem=vm.note)
        used = self._context.registry.used(vm.uid, without=vm)
        decide(vm.ref, self._context.policy.defaults, vm.share(running=True), used)
        live = self._fleet.begin(vm)
        live.boots.append((call, console))
        self.enter(live)
        if vm.state == QUEUED:
            ahead = self._context.admission.ahead(vm)
            call.progress(f"waiting for its turn: {ahead} boots ahead" if ahead else "looking at what this host can do")

    def enter(self, live: Live) -> None:
        """Queue *live* for its turn to boot."""
        self._context.admission.enter(live.vm, lambda: self._context.facts.when_known(lambda: self._step(live, self._prepare)))

    def _step(self, live: Live, step: Callable[[Live], None]) -> None:
        """Run a step of a boot; whatever it raises is the boot's failure."""
        if not self._fleet.is_current(live) or live.vm.state not in (QUEUED, STARTING):
            return  # killed while it waited
        try:
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
        definition = live.vm.definition
        names = sorted({name for name in (definition.kernel, *(disk.base for disk in definition.disks)) if name})
        images = {name: self._context.images.get(name) for name in names}

        def verified(error: VmshellError | None) -> None:
            if error:
                self._fail(live, error)
            else:
                self._step(live, lambda live: self._launch(live, images))

        self._context.images.when_verified([images[name] for name in names], verified)

    def _launch(self, live: Live, images: dict[str, Image]) -> None:
        vm, context = live.vm, self._context
        vm.accel = context.facts.accel
        vm.started = time.time()
        context.registry.set_state(vm, STARTING)
        started = starter.start(context.host, context.layout, vm, vm.accel, images)
        try:
            self._fleet.hold_outer(live, started.process)
            context.registry.set_state(vm, STARTING)  # again, with the pid: a new broker finds QEMU by it
            os.write(started.gate, b"g")
            self._fleet.watch(live, started.errors)
        finally:
            os.close(started.errors)
            os.close(started.gate)
        self.bound(live)

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
