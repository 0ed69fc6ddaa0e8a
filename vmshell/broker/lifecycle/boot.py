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
from ..network.taps import close
from ..runtime.log import by_user, unexpected
from ..storage.checks import check_objects
from .restore import check_restore

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..network.taps import Network, Taps
    from ..policies import Policies
    from ..runtime.call import Call
    from ..runtime.loop import Loop
    from ..services.capabilities import Capabilities
    from ..storage.images import Images
    from ..storage.overlays import Overlays
    from ..storage.resolve import Resolved
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .boot_queue import BootQueue
    from .live_update import LiveUpdate
    from .runs import Run, Runs
    from .start import Started, Starter
    from .validate import Validation

START_TIMEOUT = 60.0  # seconds from the jail's start to a running guest CPU; hosts that emulate can be very busy
BOOTABLE = (OFF, FAILED)


class Boots:
    """`attach` gives a waiting caller its console, once the relay has the VM."""

    def __init__(
        self,
        *,
        loop: Loop,
        registry: Registry,
        policies: Policies,
        capabilities: Capabilities,
        images: Images,
        overlays: Overlays,
        network: Network,
        validation: Validation,
        queue: BootQueue,
        starter: Starter,
        live: LiveUpdate,
        runs: Runs,
        end_now: Callable[[Run], None],
        attach: Callable[[Call, Vm], None],
    ) -> None:
        self._loop = loop
        self._registry = registry
        self._policies = policies
        self._capabilities = capabilities
        self._images = images
        self._overlays = overlays
        self._network = network
        self._validation = validation
        self._queue = queue
        self._starter = starter
        self._live = live
        self._runs = runs
        self._end_now = end_now
        self._attach = attach

    def boot(self, call: Call, vm: Vm, *, console: bool, restore: str = "", scratch: bool = False) -> None:
        """Boot *vm* for *call*; for this run only from the snapshot *restore*, or with what it writes thrown away (*scratch*)."""
        run = self.start(vm, restore, scratch=scratch)
        run.boots.append((call, console))
        self.enter(run)
        if vm.state == QUEUED:
            ahead = self._queue.ahead(vm)
            call.progress(f"waiting for its turn: {ahead} boots ahead" if ahead else "looking at what this host can do")

    def start(self, vm: Vm, restore: str = "", *, scratch: bool = False) -> Run:
        """Begin a run if nothing stands against it; it is still to `enter` the queue."""
        self.must_be_bootable(vm)
        return self._begin_run(vm, self.for_this_run(vm, restore, scratch=scratch))

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
            run = self._begin_run(vm, self.for_this_run(vm, "", scratch=False))
        except VmshellError as exc:
            for call, _ in waiting:
                call.fail(exc)
            return
        run.boots = waiting
        self.enter(run)

    def for_this_run(self, vm: Vm, restore: str, *, scratch: bool) -> Definition:
        """What *vm* boots with: its definition, what the policy fixes, and what was asked for this once."""
        wanted = apply_fixed(vm.definition, self._policies.effective(vm.owner).limits)
        if restore:
            wanted = replace(wanted, restore=restore)
        if scratch:
            wanted = replace(wanted, disks=tuple(replace(disk, snapshot=disk.writable or disk.snapshot) for disk in wanted.disks))
        return wanted

    def _begin_run(self, vm: Vm, wanted: Definition) -> Run:
        """Begin a run with what *wanted* names, or raise the first thing that stands against this boot."""
        resolved = self._validation.resolve(vm, wanted)
        refuse(self._validation.verdicts(resolved, {}, running=True), vm.ref)
        check_objects(self._registry, resolved)
        check_restore(resolved)
        run = self._runs.begin(vm, wanted)
        run.resolved = resolved
        return run

    def enter(self, run: Run) -> None:
        """Queue *run* for its turn to boot."""
        self._queue.enter(run.vm, lambda: self._capabilities.when_known(lambda: self._step(run, self._prepare)))

    def _step(self, run: Run, step: Callable[[Run], None], error: VmshellError | None = None) -> None:
        """Run a step of a boot; what it raises, or the *error* of what it waited for, is the boot's failure."""
        if not self._runs.is_current(run) or run.vm.state not in (QUEUED, STARTING):
            return  # killed while it waited, and perhaps booted again: that run has nothing to do with this one's failure
        try:
            if error:
                raise error
            step(run)
        except VmshellError as exc:
            self._fail(run, exc)
        except Exception as exc:
            self._fail(run, StartFailed(vm=run.vm.ref, problem=f"an internal error, reference {unexpected(exc)}"))

    def _prepare(self, run: Run) -> None:
        """The host is known: see that the images are whole, then launch."""
        host = self._capabilities
        if host.problem:
            raise NoQemu(problem=host.problem)
        resolved = self._resolved(run)
        definition = resolved.definition
        if host.versions and definition.machine not in ("q35", "pc") and definition.machine not in host.versions:
            rule = f"this host's QEMU has no such machine; nearest is {host.machines.get(definition.family, definition.family)}"
            raise BadValue(field="machine.type", value=definition.machine, rule=rule)
        images = list(resolved.images().values())

        def verified(error: VmshellError | None) -> None:
            self._step(run, self._make_overlays, error)

        self._images.when_verified(images, verified)

    def _resolved(self, run: Run) -> Resolved:
        """Return what the run boots with; of one that waited for its turn already before our start it is looked up now."""
        if run.resolved is None:
            run.resolved = self._validation.resolve(run.vm, run.vm.booted or run.vm.definition)
        return run.resolved

    def _make_overlays(self, run: Run) -> None:
        def made(error: VmshellError | None, overlays: dict[int, int]) -> None:
            self._step(run, lambda run: self._attach_network(run, overlays), error)

        self._overlays.make(self._resolved(run), made)

    def _attach_network(self, run: Run, overlays: dict[int, int]) -> None:
        """Have the taps made, which takes a while; the overlays are only lent to us for as long as this call."""
        held: dict[int, int] = {}

        def attached(error: VmshellError | None, taps: Taps) -> None:
            try:
                self._step(run, lambda run: self._launch(run, held, taps), error)
            finally:
                close(taps)
                close(held)
                held.clear()

        try:
            for index, fd in overlays.items():
                held[index] = os.dup(fd)
            self._network.attach(run.vm, attached)
        except BaseException:
            close(held)
            raise

    def _launch(self, run: Run, overlays: dict[int, int], taps: Taps) -> None:
        vm, resolved = run.vm, self._resolved(run)
        vm.accel = self._capabilities.accel
        vm.started = time.time()
        self._registry.set_state(vm, STARTING)
        # Looked at again: a turn may be long in coming, and other VMs' uses of what it shares can change meanwhile.
        check_objects(self._registry, resolved)
        run.launching = True
        try:
            self._starter.start(run, resolved, overlays, taps, self._launched)
        except BaseException:
            run.launching = False
            raise
        self.bound(run)

    def _launched(self, run: Run, error: VmshellError | None, started: Started | None) -> None:
        """The launcher has answered. Whoever killed the VM meanwhile waits for what was started to end."""
        run.launching = False
        if started is None:
            if run.asked == "kill" or run.error:
                self._end_now(run)
            else:
                self._step(run, lambda run: None, error)
            return
        run.launched = True
        self._runs.hold_outer(run, started.process)
        if run.vm.state != STARTING or run.asked == "kill" or run.error:
            self._end_now(run)
            return
        self._step(run, lambda run: self._begin(run, started))

    def _begin(self, run: Run, started: Started) -> None:
        self._registry.set_state(run.vm, STARTING)  # again, with the pid: a new broker finds QEMU by it
        os.write(started.barrier, b"g")
        self._runs.watch(run, started.errors)

    def bound(self, run: Run) -> None:
        """Give a start its time, and no more."""
        self._loop.after(START_TIMEOUT, lambda: self._too_long(run))

    def _too_long(self, run: Run) -> None:
        if self._runs.is_current(run) and run.vm.state == STARTING:
            self._fail(run, StartFailed(vm=run.vm.ref, problem=f"QEMU did not answer within {START_TIMEOUT:.0f} s"))

    def ready(self, run: Run) -> None:
        """The relay has console and QMP: attach those who asked for it before the first instruction, then let the CPUs run."""
        self._runs.find_qemu(run)
        for call, console in run.boots:
            if console:
                self._attach(call, run.vm)
        self._live.order_all(run, lambda error: self._ordered(run, error))

    def _ordered(self, run: Run, error: VmshellError | None) -> None:
        """It is as it was defined, or it does not run. A relay that went away says `ready` anew, and all of it is repeated."""
        if not self._runs.is_current(run) or run.ending or run.vm.state != STARTING or isinstance(error, RelayDown):
            return
        if error:
            self._fail(run, StartFailed(vm=run.vm.ref, problem="an interface with link = down could not be taken down"))
        else:
            self._runs.order(run, "cont")

    def runs(self, run: Run) -> None:
        vm = run.vm
        self._runs.find_qemu(run)
        self._registry.set_state(vm, RUNNING)
        by_user(vm.uid, "running", number=vm.number, owner=vm.owner, vm=vm.name, accel=vm.accel)
        for call, _ in run.boots:
            call.reply({"name": vm.ref, "state": vm.state, "accel": vm.accel})
        run.boots.clear()

    def _fail(self, run: Run, error: VmshellError) -> None:
        """The boot has failed: end whatever was started; those who wait hear why once nothing of it is left."""
        vm = run.vm
        run.error = error
        by_user(vm.uid, "boot-failed", number=vm.number, owner=vm.owner, vm=vm.name, code=error.code, problem=error)
        self._end_now(run)
