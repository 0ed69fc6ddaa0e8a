"""From what a definition names to descriptors: the VM's own objects, the shelf's, the administrator's library, firmware.

Every path opened here was made by the broker or written by the administrator; a name that a user chose is only ever looked up
in a store, or is one file name of closed characters below a library folder (R1). Opened first, judged after (R2).
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from typing import TYPE_CHECKING

from ...messages import ALIVE, QUEUED, SHELF
from ...model.values import split_ref
from ...names import is_object_name
from ...refusals import NoSuchObject, ObjectInUse, StorageFailed, WrongFormat
from ..runtime.files import storage
from ..vm.objects import FILE, NVRAM, Object, Store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ...model.definition import Definition, Disk
    from ..context import Context
    from ..vm.registry import Vm

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FLOPPY_SIZES = tuple(kib << 10 for kib in (160, 180, 320, 360, 720, 1200, 1440, 2880))
ROM = "rom"


def store_of(context: Context, vm: Vm, ref: str) -> tuple[Store, str]:
    """Which store the object *ref* is in, and its name there (not for the library's)."""
    origin, name = split_ref(ref)
    return (context.registry.shelf(vm.uid, vm.owner) if origin == "shelf" else vm.store), name


def facts_of(context: Context, vm: Vm, ref: str) -> Object:
    """What *ref* was made as; raises NoSuchObject."""
    origin, name = split_ref(ref)
    if origin == "library":
        fd = open_library(context, name)
        try:
            return Object(FILE, os.fstat(fd).st_size)
        finally:
            os.close(fd)
    store, name = store_of(context, vm, ref)
    return store.get(name)


def open_library(context: Context, name: str) -> int:
    """Open a file of the administrator's library read-only."""
    for folder in context.policy.library:
        try:
            fd = os.open(f"{folder}/{name}", READ)
        except OSError:
            continue  # not here, or a link: nothing that is offered
        if _is_offered(fd):
            return fd
        os.close(fd)
    raise NoSuchObject(where="the library", object=name, advice="ask the administrator, or bring it in with `put`")


def _is_offered(fd: int) -> bool:
    """QEMU opens kernels anew by /proc/self/fd, under another uid: what others may not read is no offer."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and bool(status.st_mode & stat.S_IROTH)


def library_names(context: Context) -> list[str]:
    """What the library's folders hold, by names that a definition may use."""
    found: set[str] = set()
    for folder in context.policy.library:
        with contextlib.suppress(OSError):
            found.update(name for name in os.listdir(folder) if is_object_name(name))
    return sorted(found)


def open_object(context: Context, vm: Vm, ref: str, *, writable: bool = False) -> int:
    """A fresh descriptor of what *ref* names; raises NoSuchObject or StorageFailed."""
    origin, name = split_ref(ref)
    if origin == "library":
        return open_library(context, name)
    store, name = store_of(context, vm, ref)
    store.get(name)
    return context.host.open_disk(store.path(name), writable=writable)


def check_disk(disk: Disk, name: str, made: Object) -> None:
    """Is the object what the definition takes it for? Raises WrongFormat."""
    takes = {"disk": ("raw", "qcow2"), "cdrom": (FILE, "raw"), "floppy": ("raw",)}[disk.type]
    readonly_file = disk.type == "disk" and made.format == FILE and not disk.writable
    if made.format not in takes and not readonly_file:
        raise WrongFormat(object=disk.path, format=made.format, use=f"{name} takes {' or '.join(takes)}")
    if disk.format and made.format != FILE and disk.format != made.format:
        raise WrongFormat(object=disk.path, format=made.format, use=f"{name}.format says {disk.format}")
    if disk.type == "floppy" and made.size not in FLOPPY_SIZES:
        sizes = ", ".join(f"{size >> 10}K" for size in FLOPPY_SIZES)
        raise WrongFormat(object=disk.path, format=f"{made.size} bytes", use=f"a floppy has one of {sizes}")


def check_objects(context: Context, vm: Vm, definition: Definition) -> None:
    """Everything that *definition* names is there, is what it is taken for, and is written to by this VM alone (R16, D18)."""
    for name, device in definition.devices().items():
        path = getattr(device, "path", "")
        if path:
            check_disk(device, name, facts_of(context, vm, path))  # type: ignore[arg-type]
    for ref in definition.option_roms:
        made = facts_of(context, vm, ref)
        if made.format != ROM:
            raise WrongFormat(object=ref, format=made.format, use="boot.option_rom takes what was put as rom")
    for ref in (definition.kernel, definition.initrd):
        if ref and split_ref(ref)[0] != "image" and (made := facts_of(context, vm, ref)).format != FILE:
            raise WrongFormat(object=ref, format=made.format, use="kernels and initial RAM disks are put as file")
    must_not_clash(context, vm, [disk for disk in definition.disks if split_ref(disk.path)[0] == SHELF])


def must_not_clash(context: Context, vm: Vm, disks: Iterable[Disk]) -> None:
    """Two VMs may share an object of the shelf only while neither writes to it."""
    mine = {disk.path: disk for disk in disks}
    if not mine:
        return
    for other in context.registry.of(vm.uid):
        if other is not vm and other.state in (*ALIVE, QUEUED):
            for each in (other.booted or other.definition).disks:
                disk = mine.get(each.path)
                if disk and (each.writable or disk.writable):
                    advice = "it can be shared with readonly = true or snapshot = true in both"
                    raise ObjectInUse(object=disk.path, user=other.name, advice=advice)


def users_of(context: Context, uid: int, store: Store, *, running: bool = True) -> dict[str, list[str]]:
    """By object, the VMs that have it in use; without *running* also those that only name it."""
    on_shelf = store.where == SHELF
    found: dict[str, list[str]] = {}
    for vm in context.registry.of(uid):
        definition = vm.booted or (vm.definition if not running or vm.state in (*ALIVE, QUEUED) else None)
        if definition and (on_shelf or vm.store is store):
            for ref in definition.objects():
                origin, name = split_ref(ref)
                if origin == (SHELF if on_shelf else ""):
                    found.setdefault(name, []).append(vm.name)
    return found


def open_firmware(context: Context, vm: Vm, definition: Definition) -> tuple[int, int] | None:
    """UEFI's code, read-only, and this VM's own variables, made from the template at its first boot; None for the BIOS."""
    firmware = context.policy.catalogues.firmware[definition.firmware]
    if not firmware.code:
        return None
    path = f"{vm.store.folder}/{NVRAM}"
    with storage():
        if not os.path.exists(path):
            shutil.copyfile(firmware.vars, path + ".new")
            os.chmod(path + ".new", 0o600)
            os.rename(path + ".new", path)
    try:
        code = os.open(firmware.code, READ)
    except OSError as exc:
        raise StorageFailed(problem=f"the firmware {definition.firmware} cannot be opened ({exc.strerror})") from exc
    try:
        return code, context.host.open_disk(path, writable=True)
    except BaseException:
        os.close(code)
        raise
