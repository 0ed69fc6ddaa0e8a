"""Objects as verbs: listing them, blank disks, bringing files in, deleting.

Runs in: the broker. What a user sends is read by a job without rights; only sizes come back.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from ..errors import VmshellError
from ..launcher_messages import STORAGE
from ..messages import ALIVE, SHELF, DiskAdd, Drop, Objects, Put
from ..model.decide import Usage, fits
from ..names import MIB
from ..refusals import ObjectInUse, StorageFailed, TooManyRequests, UploadRefused, VmBusy, WrongState
from ..spawn import FIRST_FD
from . import defining, opening
from .journal import by_user
from .objects import Object, Store, mebibytes
from .opening import users_of

if TYPE_CHECKING:
    from .context import Context
    from .jobs import Done
    from .server import Call
    from .vms import Vm

ROWS_MAX = 200  # of a reply
UPLOADS_MAX = 1  # of one user: an upload may take all the room that is left, so two would take it twice
READ_ONLY = ("file", "rom")


def store_for(context: Context, call: Call, vm: Vm | None) -> Store:
    return context.registry.shelf(call.peer.uid, call.peer.user) if vm is None else vm.store


def handle_objects(context: Context, call: Call, request: Objects, vm: Vm | None = None) -> None:
    store = store_for(context, call, vm)
    uid = call.peer.uid if vm is None else vm.uid
    rows = [
        {
            "name": name,
            "format": made.format,
            "size": made.size,
            "base": made.base,
            "used": store.used(name),
            "users": users_of(context, uid, store, name, running=False)[:10],
        }
        for name, made in store
    ]
    library = opening.library_names(context) if vm is None else []
    call.reply({"where": store.where, "objects": rows[:ROWS_MAX], "more": len(rows) > ROWS_MAX, "library": library[:ROWS_MAX]})


def handle_disk_add(context: Context, call: Call, request: DiskAdd, vm: Vm | None = None) -> None:
    """A blank disk: of a VM, whose definition gets it, or on the shelf."""
    if vm is not None:
        defining.redefine(context, call, vm, defining.with_disk(vm, request))
        return
    uid, store = call.peer.uid, store_for(context, call, None)
    made = Object(request.format, max(request.size * MIB, defining.SMALLEST_DISK))
    limits = context.effective(call.peer.user)
    fits(f"{SHELF}.{request.object}", limits, Usage(disk=mebibytes(made.size)), context.registry.used(uid))

    def done(error: VmshellError | None) -> None:
        if error:
            call.fail(error)
        else:
            by_user(uid, "disk-add", object=request.object, size=made.size)
            call.reply({"name": SHELF, "object": request.object, "size": made.size})

    defining.make_objects(context, store, {request.object: made}, done)


def handle_put(context: Context, call: Call, request: Put, vm: Vm | None = None) -> None:
    """Start the job that reads the upload; it becomes an object once the job says that it is whole and it fits the limits."""
    fd = call.take_fd()
    uid = call.peer.uid if vm is None else vm.uid
    owner = call.peer.user if vm is None else vm.owner
    ref = f"{request.vm}.{request.object}"
    store = store_for(context, call, vm)
    effective = context.effective(owner)
    try:
        with socket.socket(fileno=os.dup(fd)) as stream:
            if stream.family != socket.AF_UNIX or stream.type != socket.SOCK_STREAM:
                raise UploadRefused(object=ref, problem="an upload comes on a stream socket")
        if vm is not None:
            defining.must_be_known(vm, "put")
            if vm.store.folder != f"{context.layout.vm_state(vm.uid, vm.name)}/disks":
                raise VmBusy(vm=vm.ref, state=vm.state)
        if uid in context.uploads:
            raise TooManyRequests(count=UPLOADS_MAX + 1, what="uploads", limit=UPLOADS_MAX)
        free = effective.limits.user_disk - context.registry.used(uid).disk
        room = min(free, effective.limits.disk_size_max)
        if room <= 0:
            fits(ref, effective, Usage(disk=1), context.registry.used(uid))
        path = store.begin(request.object, Object(request.format, 0))
        context.uploads.add(uid)
        try:
            _start(context, path, request, room, fd, lambda status, answer: ended(status, answer))
        except OSError as exc:
            context.uploads.discard(uid)
            store.give_up(request.object)
            raise StorageFailed(problem=exc.strerror or "the disk refused") from exc
    finally:
        os.close(fd)

    def ended(status: int, answer: dict[str, Any]) -> None:
        context.uploads.discard(uid)
        try:
            made = _made(request, ref, status, answer)
            gone = vm is not None and context.registry.get(vm.uid, vm.name) is not vm
            if gone:
                raise UploadRefused(object=ref, problem="its VM was deleted meanwhile")
            fits(ref, effective, Usage(disk=mebibytes(made.size)), context.registry.used(uid))
            store.finish(request.object, made)
        except VmshellError as exc:
            store.give_up(request.object)
            call.fail(exc)
        else:
            by_user(uid, "put", object=ref, size=made.size, format=made.format)
            call.reply({"name": request.vm, "object": request.object, "size": made.size, "format": made.format})


def _start(context: Context, path: str, request: Put, room: int, fd: int, ended: Done) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    file = context.host.create_file(path)
    try:
        if request.format in READ_ONLY:
            # QEMU opens these anew under its own uid; the folder above lets nobody else come near.
            os.fchmod(file, 0o444)
        words = ["put", request.format, str(room * MIB)]
        context.jobs.start(STORAGE, words, {FIRST_FD: file, FIRST_FD + 1: fd}, ended)
    finally:
        os.close(file)


def _made(request: Put, ref: str, status: int, answer: dict[str, Any]) -> Object:
    """What the job says it has made; raises what it refused for."""
    if status == 2:
        raise StorageFailed(problem="the disk is full")
    size, problem = answer.get("size"), answer.get("problem")
    if status or type(size) is not int or size <= 0:
        raise UploadRefused(object=ref, problem=problem if isinstance(problem, str) else f"the upload failed (status {status})")
    return Object(request.format, size)


def handle_drop(context: Context, call: Call, request: Drop, vm: Vm | None = None) -> None:
    """Delete an object that nothing running uses and no definition of this VM needs."""
    uid = call.peer.uid if vm is None else vm.uid
    store = store_for(context, call, vm)
    store.get(request.object)
    users = users_of(context, uid, store, request.object, running=False)
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
