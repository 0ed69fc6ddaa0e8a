"""What a snapshot and a restore need of a VM's disks and hardware.

Runs in: the broker.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...model import definition as definitions
from ...refusals import CannotRestore, CannotSnapshot, NoSuchSnapshot

if TYPE_CHECKING:
    from ..storage.resolve import Resolved
    from ..vm.vm import Snapshot, Vm

# What may differ between the VM that was saved and the one that goes on: nothing a guest would notice.
NOT_HARDWARE = ("description", "autostart", "image", "boot.order", "boot.restore", "console.log", "machine.on_reboot")


def writable_disks(resolved: Resolved) -> int:
    """Return a bit for each disk a snapshot goes into; raises CannotSnapshot where a writable one cannot hold it."""
    vm, definition, mask = resolved.vm, resolved.definition, 0
    problem = "the variables of UEFI cannot be saved with it" if definition.firmware != "bios" else ""
    for index, (name, disk) in enumerate(zip(definition.devices(), definition.disks, strict=False)):  # interfaces come after
        if disk.snapshot:
            problem = f"what {name} writes is thrown away (snapshot = true)"
        elif disk.writable and disk.path:
            if resolved.object(disk.path).format != "qcow2":
                problem = f"{name} is raw, and only qcow2 disks can hold a snapshot"
            mask |= 1 << index
    if problem or not mask:
        raise CannotSnapshot(vm=vm.ref, problem=problem or "it has no qcow2 disk that could hold it")
    return mask


def must_have(vm: Vm, tag: str) -> Snapshot:
    found = vm.snapshots.get(tag)
    if found is None:
        there = ", ".join(vm.snapshots) or "none; `snapshot NAME TAG` makes one while it runs"
        raise NoSuchSnapshot(vm=vm.ref, tag=tag, advice=f"there are: {there}")
    return found


def check_restore(resolved: Resolved) -> None:
    """Raise CannotRestore unless the VM can go on from `boot.restore`: a saved state fits only the hardware it was saved on."""
    vm, definition = resolved.vm, resolved.definition
    if not definition.restore:
        return
    saved = must_have(vm, definition.restore)
    was, _ = definitions.read_stored(saved.text, vm.name)
    keys = [key for key in definitions.differences(was, replace(definition, restore="")) if key not in NOT_HARDWARE]
    if keys:
        raise CannotRestore(vm=vm.ref, tag=saved.tag, problem=f"these keys have changed since: {', '.join(keys[:10])}")
    try:
        writable_disks(resolved)
    except CannotSnapshot as exc:
        raise CannotRestore(vm=vm.ref, tag=saved.tag, problem=exc.fields["problem"]) from exc
