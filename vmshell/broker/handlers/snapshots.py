"""Snapshots: memory and disks of a running VM, kept in its own qcow2 disks under numbers of ours (R5).

Runs in: the broker. QEMU does the work; the relay asks it to.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BadValue, VmshellError
from ...messages import PAUSED, RUNNING, Snapshot
from ...model import definition as definitions
from ...model.decide import fits
from ...model.values import Tag
from ...refusals import CannotSnapshot, VmBusy
from ..lifecycle.restore import must_have, writable_disks
from ..runtime.log import by_user
from ..vm.vm import Snapshot as SavedSnapshot

if TYPE_CHECKING:
    from ..lifecycle.runs import Runs
    from ..lifecycle.validate import Validation
    from ..policies import Policies
    from ..runtime.call import Call
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers


class SnapshotHandlers:
    """Saves and deletes snapshots."""

    def __init__(self, *, registry: Registry, policies: Policies, validation: Validation, runs: Runs) -> None:
        self._registry = registry
        self._policies = policies
        self._validation = validation
        self._runs = runs

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {Snapshot: self._snapshot}

    def _snapshot(self, call: Call, request: Snapshot, vm: Vm) -> None:
        run = self._runs.must_live(vm, "snapshot")
        if vm.state not in (RUNNING, PAUSED) or vm.defining:
            raise VmBusy(vm=vm.ref, state=vm.state if not vm.defining else "being changed")
        vm.must_be_recorded("snapshot")
        tag = Tag().check(request.tag, "TAG")
        running = vm.booted or vm.definition
        mask = writable_disks(self._validation.resolve(vm, running))
        if request.delete:
            saved = must_have(vm, tag)
            what, number = "snapshot-delete", saved.number
        else:
            if not tag or tag in vm.snapshots:
                raise BadValue(field="TAG", value=tag, rule="a name that this VM has no snapshot of yet")
            if vm.added:  # the next boot would put its interfaces into other PCI places, where QEMU does not find their state
                raise CannotSnapshot(vm=vm.ref, problem="interfaces came or went since it was booted; boot it anew first")
            self._registry.must_have_room(vm, definitions.to_toml(running))
            share = vm.share(running=False)
            more = replace(share, snapshots=share.snapshots + 1, disk=share.disk + running.memory)
            fits(vm.ref, self._policies.effective(vm.owner), more, self._registry.used(vm.uid, without=vm))
            vm.snapshot_number += 1
            self._registry.save(vm)
            what, number = "snapshot-save", vm.snapshot_number

        def done(error: VmshellError | None) -> None:
            vm.defining = False
            if error:
                if not request.delete:
                    # Whatever QEMU may still make of it would only take room.
                    self._runs.order(run, "snapshot-delete", lambda error: None, value=number, disks=mask)
                call.fail(CannotSnapshot(vm=vm.ref, problem="QEMU could not do it; the VM and its disks are as before"))
                return
            if request.delete:
                del vm.snapshots[tag]
            else:
                text = definitions.to_toml(running)
                vm.snapshots[tag] = SavedSnapshot(tag, number, int(time.time()), running.memory, text)
            self._registry.save(vm)
            by_user(vm.uid, what, number=vm.number, owner=vm.owner, vm=vm.name, tag=tag)
            call.reply({"name": vm.ref, "state": vm.state, "tag": tag, "deleted": request.delete})

        vm.defining = True  # no change of its disks meanwhile
        call.progress(f"{'deleting' if request.delete else 'saving'} {vm.ref}'s memory and disks")
        self._runs.order(run, what, lambda error: call.guard(lambda: done(error)), value=number, disks=mask)
