"""Snapshots: memory and disks of a running VM, kept in its own qcow2 disks under numbers of ours (R5); what a restore needs.

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
from ...refusals import CannotRestore, CannotSnapshot, NoSuchSnapshot, VmBusy
from ..runtime.log import by_user
from ..storage import resources
from ..vm import registry

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm

# What may differ between the VM that was saved and the one that goes on: nothing a guest would notice.
NOT_HARDWARE = ("description", "autostart", "image", "boot.order", "boot.restore", "console.log", "machine.on_reboot")


def handle_snapshot(context: Context, call: Call, request: Snapshot, vm: Vm) -> None:
    live = context.machines.must_live(vm, "snapshot")
    if vm.state not in (RUNNING, PAUSED) or vm.defining:
        raise VmBusy(vm=vm.ref, state=vm.state if not vm.defining else "being changed")
    vm.must_be_recorded("snapshot")
    tag = Tag().check(request.tag, "TAG")
    running = vm.booted or vm.definition
    mask = writable_disks(context, vm, running)
    if request.delete:
        saved = must_have(vm, tag)
        what, number = "snapshot-delete", saved.number
    else:
        if not tag or tag in vm.snapshots:
            raise BadValue(field="TAG", value=tag, rule="a name that this VM has no snapshot of yet")
        if vm.added:  # the next boot would put its cards into other PCI places, where QEMU does not find their state
            raise CannotSnapshot(vm=vm.ref, problem="cards came or went since it was booted; boot it anew first")
        context.registry.must_have_room(vm, definitions.to_toml(running))
        share = vm.share(running=False)
        more = replace(share, snapshots=share.snapshots + 1, disk=share.disk + running.memory)
        fits(vm.ref, context.effective(vm.owner), more, context.registry.used(vm.uid, without=vm))
        vm.snapshot_number += 1
        context.registry.save(vm)
        what, number = "snapshot-save", vm.snapshot_number

    def done(error: VmshellError | None) -> None:
        vm.defining = False
        if error:
            if not request.delete:
                # Whatever QEMU may still make of it would only take room.
                context.machines.order(live, "snapshot-delete", lambda error: None, value=number, disks=mask)
            call.fail(CannotSnapshot(vm=vm.ref, problem="QEMU could not do it; the VM and its disks are as before"))
            return
        if request.delete:
            del vm.snapshots[tag]
        else:
            text = definitions.to_toml(running)
            vm.snapshots[tag] = registry.Snapshot(tag, number, int(time.time()), running.memory, text)
        context.registry.save(vm)
        by_user(vm.uid, what, number=vm.number, owner=vm.owner, vm=vm.name, tag=tag)
        call.reply({"name": vm.ref, "state": vm.state, "tag": tag, "deleted": request.delete})

    vm.defining = True  # no change of its disks meanwhile
    call.progress(f"{'deleting' if request.delete else 'saving'} {vm.ref}'s memory and disks")
    context.machines.order(live, what, lambda error: call.guard(lambda: done(error)), value=number, disks=mask)


def writable_disks(context: Context, vm: Vm, definition: Definition) -> int:
    """A bit for each disk a snapshot goes into; raises CannotSnapshot where a writable one cannot hold it."""
    mask = 0
    problem = "the variables of UEFI cannot be saved with it" if definition.firmware != "bios" else ""
    for index, (name, disk) in enumerate(zip(definition.devices(), definition.disks, strict=False)):  # cards come after disks
        if disk.snapshot:
            problem = f"what {name} writes is thrown away (snapshot = true)"
        elif disk.writable and disk.path:
            if resources.facts_of(context, vm, disk.path).format != "qcow2":
                problem = f"{name} is raw, and only qcow2 disks can hold a snapshot"
            mask |= 1 << index
    if problem or not mask:
        raise CannotSnapshot(vm=vm.ref, problem=problem or "it has no qcow2 disk that could hold it")
    return mask


def must_have(vm: Vm, tag: str) -> registry.Snapshot:
    found = vm.snapshots.get(tag)
    if found is None:
        there = ", ".join(vm.snapshots) or "none; `snapshot NAME TAG` makes one while it runs"
        raise NoSuchSnapshot(vm=vm.ref, tag=tag, advice=f"there are: {there}")
    return found


def check_restore(context: Context, vm: Vm, definition: Definition) -> None:
    """May *vm* go on from `boot.restore` as it is defined now? A saved state fits only the hardware it was saved on."""
    if not definition.restore:
        return
    saved = must_have(vm, definition.restore)
    was, _ = definitions.read_stored(saved.text, vm.name)
    keys = [key for key in definitions.differences(was, replace(definition, restore="")) if key not in NOT_HARDWARE]
    if keys:
        raise CannotRestore(vm=vm.ref, tag=saved.tag, problem=f"these keys have changed since: {', '.join(keys[:10])}")
    try:
        writable_disks(context, vm, definition)
    except CannotSnapshot as exc:
        raise CannotRestore(vm=vm.ref, tag=saved.tag, problem=exc.fields["problem"]) from exc
