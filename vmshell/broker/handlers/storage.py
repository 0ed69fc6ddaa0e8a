"""Objects as verbs: listing them, blank disks, bringing files in, deleting.

Runs in: the broker.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

from ...errors import VmshellError
from ...messages import ALIVE, SHELF, DiskAdd, Done, Drop, Objects, Put
from ...model.decide import Usage, fits
from ...names import MIB
from ...refusals import ObjectInUse, VmBusy, WrongState
from ..lifecycle import define
from ..runtime.log import by_user
from ..storage import resources
from ..storage.resources import users_of
from ..vm.objects import Object, Store, mebibytes

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm

T = TypeVar("T")
ROWS_MAX = 200  # of a reply
USERS_SHOWN = 10  # VMs that use an object
OBJECTS_SHARE, LIBRARY_SHARE = 44 << 10, 16 << 10  # bytes of a reply, which has 64 KiB


def store_for(context: Context, call: Call, vm: Vm | None) -> Store:
    return context.registry.shelf(call.peer.uid, call.peer.user) if vm is None else vm.store


def handle_objects(context: Context, call: Call, request: Objects, vm: Vm | None = None) -> None:
    store = store_for(context, call, vm)
    uid = call.peer.uid if vm is None else vm.uid
    users = users_of(context, uid, store, running=False)
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
    library = fitting(resources.library_names(context)[:ROWS_MAX] if vm is None else [], LIBRARY_SHARE)
    call.reply({"where": store.where, "objects": shown, "more": len(objects) > len(shown), "library": library})


def fitting(rows: list[T], room: int) -> list[T]:
    """The first of *rows*, as many as take no more than *room* bytes of a packet."""
    shown = []
    for row in rows:
        room -= len(json.dumps(row)) + 1
        if room < 0:
            break
        shown.append(row)
    return shown


def handle_disk_add(context: Context, call: Call, request: DiskAdd, vm: Vm | None = None) -> None:
    """A blank disk: of a VM, whose definition gets it, or on the shelf."""
    if vm is not None:
        define.redefine(context, call, vm, define.with_disk(vm, request))
        return
    uid, store = call.peer.uid, store_for(context, call, None)
    made = Object(request.format, max(request.size * MIB, define.SMALLEST_DISK))
    limits = context.effective(call.peer.user)
    fits(f"{SHELF}.{request.object}", limits, Usage(disk=mebibytes(made.size)), context.registry.used(uid))

    def done(error: VmshellError | None) -> None:
        if error:
            call.fail(error)
        else:
            by_user(uid, "disk-add", object=request.object, size=made.size)
            call.reply({"name": SHELF, "object": request.object, "size": made.size})

    define.make_objects(context, store, {request.object: made}, done)


def handle_put(context: Context, call: Call, request: Put, vm: Vm | None = None) -> None:
    """Begin an upload; see `uploads.py`."""
    if vm is not None:
        define.must_be_known(vm, "put")
        if vm.store.folder != f"{context.layout.vm_state(vm.uid, vm.name)}/disks":
            raise VmBusy(vm=vm.ref, state=vm.state)
    context.uploads.begin(call, request, vm, store_for(context, call, vm))


def handle_done(context: Context, call: Call, request: Done) -> None:
    context.uploads.done(call, request)


def handle_drop(context: Context, call: Call, request: Drop, vm: Vm | None = None) -> None:
    """Delete an object that nothing running uses and no definition of this VM needs."""
    uid = call.peer.uid if vm is None else vm.uid
    store = store_for(context, call, vm)
    store.get(request.object)
    users = users_of(context, uid, store, running=False).get(request.object, [])
    if users:
        running = [name for name in users if (other := context.registry.get(uid, name)) and other.state in ALIVE]
        advice = "shut it down first" if running else f"take it out of the definition first, with `unset {users[0]} DEVICE`"
        raise ObjectInUse(object=f"{request.vm}.{request.object}", user=", ".join(users[:5]), advice=advice)
    if vm is not None and vm.defining:
        raise VmBusy(vm=vm.ref, state="being changed")
    if vm is not None and vm.snapshots:
        raise WrongState(vm=vm.ref, state="saved in snapshots", verb="rm of its objects", needed="without them")
    store.remove(request.object)
    by_user(uid, "drop", object=f"{request.vm}.{request.object}")
    call.reply({"name": request.vm, "object": request.object, "state": "removed"})
