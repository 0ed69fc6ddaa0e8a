"""Whether objects are what a definition takes them for, and whether two VMs would write to the same one.

Runs in: the broker. Pure but for the look at which VMs run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...messages import ALIVE, QUEUED, SHELF
from ...model.values import split_ref
from ...refusals import ObjectInUse, WrongFormat
from ..vm.objects import FILE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.definition import Disk
    from ..vm.objects import Object
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .resolve import Resolved

FLOPPY_SIZES = tuple(kib << 10 for kib in (160, 180, 320, 360, 720, 1200, 1440, 2880))
ROM = "rom"


def check_disk(disk: Disk, name: str, made: Object) -> None:
    """Raise WrongFormat unless the object is what the definition takes it for."""
    takes = {"disk": ("raw", "qcow2"), "cdrom": (FILE, "raw"), "floppy": ("raw",)}[disk.type]
    readonly_file = disk.type == "disk" and made.format == FILE and not disk.writable
    if made.format not in takes and not readonly_file:
        raise WrongFormat(object=disk.path, format=made.format, use=f"{name} takes {' or '.join(takes)}")
    if disk.format and made.format != FILE and disk.format != made.format:
        raise WrongFormat(object=disk.path, format=made.format, use=f"{name}.format says {disk.format}")
    if disk.type == "floppy" and made.size not in FLOPPY_SIZES:
        sizes = ", ".join(f"{size >> 10}K" for size in FLOPPY_SIZES)
        raise WrongFormat(object=disk.path, format=f"{made.size} bytes", use=f"a floppy has one of {sizes}")


def check_objects(registry: Registry, resolved: Resolved) -> None:
    """Check that everything named is there, is what it is taken for, and is written to by this VM alone (R16, D18)."""
    definition = resolved.definition
    for name, device in definition.devices().items():
        path = getattr(device, "path", "")
        if path:
            check_disk(device, name, resolved.object(path))  # type: ignore[arg-type]
    for ref in definition.option_roms:
        made = resolved.object(ref)
        if made.format != ROM:
            raise WrongFormat(object=ref, format=made.format, use="boot.option_rom takes what was put as rom")
    for ref in (definition.kernel, definition.initrd):
        if ref and split_ref(ref)[0] != "image" and (made := resolved.object(ref)).format != FILE:
            raise WrongFormat(object=ref, format=made.format, use="kernels and initial RAM disks are put as file")
    must_not_clash(registry, resolved.vm, [disk for disk in definition.disks if split_ref(disk.path)[0] == SHELF])


def must_not_clash(registry: Registry, vm: Vm, disks: Iterable[Disk]) -> None:
    """Two VMs may share an object of the shelf only while neither writes to it."""
    mine = {disk.path: disk for disk in disks}
    if not mine:
        return
    for other in registry.of(vm.uid):
        if other is not vm and other.state in (*ALIVE, QUEUED):
            for each in (other.booted or other.definition).disks:
                disk = mine.get(each.path)
                if disk and (each.writable or disk.writable):
                    advice = "it can be shared with readonly = true or snapshot = true in both"
                    raise ObjectInUse(object=disk.path, user=other.name, advice=advice)
