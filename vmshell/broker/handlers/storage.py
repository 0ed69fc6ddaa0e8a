"""Objects as verbs: listing them, blank disks, bringing files in, deleting.

Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import ALIVE, SHELF, DiskAdd, Done, Drop, Objects, Put
from ...model.decide import Usage, fits
from ...names import MIB
from ...refusals import ObjectInUse, VmBusy, WrongState
from ..lifecycle.validate import must_be_known, with_disk
from ..runtime.log import by_user
from ..storage.create import SMALLEST_DISK
from ..vm.objects import Object, Store, mebibytes
from .pages import fitting

if TYPE_CHECKING:
    from ...layout import Layout
    from ..lifecycle.define import Define
    from ..policies import Policies
    from ..runtime.call import Call
    from ..storage.create import NewDisks
    from ..storage.resources import Resources
    from ..storage.uploads import Uploads
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers

ROWS_MAX = 200  # of a reply
USERS_SHOWN = 10  # VMs that use an object
OBJECTS_SHARE, LIBRARY_SHARE = 44 << 10, 16 << 10  # bytes of a reply, which has 64 KiB


class StorageHandlers:
    """Lists, makes, takes in and deletes objects."""

    def __init__(
        self,
        *,
        layout: Layout,
        registry: Registry,
        policies: Policies,
        resources: Resources,
        disks: NewDisks,
        uploads: Uploads,
        define: Define,
    ) -> None:
        self._layout = layout
        self._registry = registry
        self._policies = policies
        self._resources = resources
        self._disks = disks
        self._uploads = uploads
        self._define = define

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {Objects: self._objects, DiskAdd: self._disk_add, Put: self._put, Done: self._done, Drop: self._drop}

    def _objects(self, call: Call, request: Objects, vm: Vm | None = None) -> None:
        store = self._store_for(call, vm)
        uid = call.peer.uid if vm is None else vm.uid
        users = self._resources.users_of(uid, store, running=False)
        objects = list(store)
        rows = [
            {
                "name": name,
                "format": made.format,
                "size": made.size,
                "base": made.base,
                "used": store.used(name),
                "users": users.get(name, [])[:USERS_SHOWN],
            }
            for name, made in objects[:ROWS_MAX]
        ]
        shown = fitting(rows, OBJECTS_SHARE)
        library = fitting(self._resources.library_names()[:ROWS_MAX] if vm is None else [], LIBRARY_SHARE)
        call.reply({"where": store.where, "objects": shown, "more": len(objects) > len(shown), "library": library})

    def _disk_add(self, call: Call, request: DiskAdd, vm: Vm | None = None) -> None:
        """A blank disk: of a VM, whose definition gets it, or on the shelf."""
        if vm is not None:
            self._define.redefine(call, vm, with_disk(vm, request))
            return
        uid, store = call.peer.uid, self._store_for(call, None)
        made = Object(request.format, max(request.size * MIB, SMALLEST_DISK))
        limits = self._policies.effective(call.peer.user)
        fits(f"{SHELF}.{request.object}", limits, Usage(disk=mebibytes(made.size)), self._registry.used(uid))

        def done(error: VmshellError | None) -> None:
            if error:
                call.fail(error)
            else:
                by_user(uid, "disk-add", object=request.object, size=made.size)
                call.reply({"name": SHELF, "object": request.object, "size": made.size})

        self._disks.make(store, {request.object: made}, done)

    def _put(self, call: Call, request: Put, vm: Vm | None = None) -> None:
        """Begin an upload; see `storage/uploads.py`."""
        if vm is not None:
            must_be_known(vm, "put")
            if vm.store.folder != f"{self._layout.vm_state(vm.uid, vm.name)}/disks":
                raise VmBusy(vm=vm.ref, state=vm.state)
        self._uploads.begin(call, request, vm, self._store_for(call, vm))

    def _done(self, call: Call, request: Done) -> None:
        self._uploads.done(call, request)

    def _drop(self, call: Call, request: Drop, vm: Vm | None = None) -> None:
        """Delete an object that nothing running uses and no definition of this VM needs."""
        uid = call.peer.uid if vm is None else vm.uid
        store = self._store_for(call, vm)
        store.get(request.object)
        users = self._resources.users_of(uid, store, running=False).get(request.object, [])
        if users:
            running = [name for name in users if (other := self._registry.get(uid, name)) and other.state in ALIVE]
            advice = "shut it down first" if running else f"take it out of the definition first, with `unset {users[0]} DEVICE`"
            raise ObjectInUse(object=f"{request.vm}.{request.object}", user=", ".join(users[:5]), advice=advice)
        if vm is not None and vm.defining:
            raise VmBusy(vm=vm.ref, state="being changed")
        if vm is not None and vm.snapshots:
            raise WrongState(vm=vm.ref, state="saved in snapshots", verb="rm of its objects", needed="without them")
        store.remove(request.object)
        by_user(uid, "drop", object=f"{request.vm}.{request.object}")
        call.reply({"name": request.vm, "object": request.object, "state": "removed"})

    def _store_for(self, call: Call, vm: Vm | None) -> Store:
        return self._registry.shelf(call.peer.uid, call.peer.user) if vm is None else vm.store
