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
from ...refusals import NoSuchObject, StorageFailed
from ..runtime.files import storage
from ..vm.objects import FILE, NVRAM, Object, Store

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..host.processes import Host
    from ..policies import Policies
    from ..vm.registry import Registry
    from ..vm.vm import Vm

READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Resources:
    """What definitions name, found and opened."""

    def __init__(self, *, host: Host, registry: Registry, policies: Policies) -> None:
        self._host = host
        self._registry = registry
        self._policies = policies

    def store_of(self, vm: Vm, ref: str) -> tuple[Store, str]:
        """Which store the object *ref* is in, and its name there (not for the library's)."""
        origin, name = split_ref(ref)
        return (self._registry.shelf(vm.uid, vm.owner) if origin == "shelf" else vm.store), name

    def facts_of(self, vm: Vm, ref: str) -> Object:
        """What *ref* was made as; raises NoSuchObject."""
        origin, name = split_ref(ref)
        if origin == "library":
            fd = self.open_library(name)
            try:
                return Object(FILE, os.fstat(fd).st_size)
            finally:
                os.close(fd)
        store, name = self.store_of(vm, ref)
        return store.get(name)

    def open_library(self, name: str) -> int:
        """Open a file of the administrator's library read-only."""
        for folder in self._policies.policy.library:
            try:
                fd = os.open(f"{folder}/{name}", READ)
            except OSError:
                continue  # not here, or a link: nothing that is offered
            if _is_offered(fd):
                return fd
            os.close(fd)
        raise NoSuchObject(where="the library", object=name, advice="ask the administrator, or bring it in with `put`")

    def library_names(self) -> list[str]:
        """What the library's folders hold, by names that a definition may use."""
        found: set[str] = set()
        for folder in self._policies.policy.library:
            with contextlib.suppress(OSError):
                found.update(name for name in os.listdir(folder) if is_object_name(name))
        return sorted(found)

    def open_object(self, vm: Vm, ref: str, *, writable: bool = False) -> int:
        """A fresh descriptor of what *ref* names; raises NoSuchObject or StorageFailed."""
        origin, name = split_ref(ref)
        if origin == "library":
            return self.open_library(name)
        store, name = self.store_of(vm, ref)
        store.get(name)
        return self._host.open_disk(store.path(name), writable=writable)

    def users_of(self, uid: int, store: Store, *, running: bool = True) -> dict[str, list[str]]:
        """By object, the VMs that have it in use; without *running* also those that only name it."""
        on_shelf = store.where == SHELF
        found: dict[str, list[str]] = {}
        for vm in self._registry.of(uid):
            definition = vm.booted or (vm.definition if not running or vm.state in (*ALIVE, QUEUED) else None)
            if definition and (on_shelf or vm.store is store):
                for ref in definition.objects():
                    origin, name = split_ref(ref)
                    if origin == (SHELF if on_shelf else ""):
                        found.setdefault(name, []).append(vm.name)
        return found

    def open_firmware(self, vm: Vm, definition: Definition) -> tuple[int, int] | None:
        """UEFI's code, read-only, and this VM's own variables, made from the template at its first boot; None for the BIOS."""
        firmware = self._policies.catalogues.firmware[definition.firmware]
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
            return code, self._host.open_disk(path, writable=True)
        except BaseException:
            os.close(code)
            raise


def _is_offered(fd: int) -> bool:
    """QEMU opens kernels anew by /proc/self/fd, under another uid: what others may not read is no offer."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and bool(status.st_mode & stat.S_IROTH)
