"""What root's own tools ask before they take something away: who stands on an image, what an account owns.

Root opens none of the broker's files, so it has to be told what is in them. What cannot be read is said to be there, never left
out, and each answer fits into a packet however much there is: counts, and the names of the first few.
Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import safe
from ...messages import SHOWN_MAX, ImageUsers, Owned, Unreadable
from ...refusals import NotAllowed, StorageFailed
from ..vm.registry import images_of

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context

NAME_SHOWN = 50  # characters


def handle_image_users(context: Context, call: Call, request: ImageUsers) -> None:
    if not call.peer.admin:
        raise NotAllowed(what="who uses an image", who="administrators")
    users: dict[str, list[str]] = {image: [] for image in request.images}
    unreadable = context.registry.unreadable()
    for vm in context.registry:
        name, images = f"{vm.owner}/{vm.name}", images_of(vm)
        if images is None:
            unreadable.append(name)
        for image in images or ():
            if image in users:
                users[image].append(name)
    call.reply({"images": [_counted(users[image]) for image in request.images], "unreadable": _counted(unreadable)})


def handle_owned(context: Context, call: Call, request: Owned) -> None:
    if not call.peer.admin:
        raise NotAllowed(what="what others own", who="administrators")
    call.reply({"owned": [_owned(context, uid) for uid in request.uids]})


def handle_unreadable(context: Context, call: Call, request: Unreadable) -> None:
    """Everything is looked at, also the shelves that nobody has used since the broker started."""
    if not call.peer.admin and not context.layout.embedded:
        raise NotAllowed(what="whose records are damaged", who="administrators")
    registry = context.registry
    vms = [*registry.unreadable(), *(f"{vm.owner}/{vm.name}" for vm in registry if vm.unreadable)]
    addresses = safe(context.addresses.damaged, NAME_SHOWN * SHOWN_MAX)
    call.reply({"vms": _counted(vms), "shelves": _counted(registry.unreadable_shelves()), "addresses": addresses})


def _owned(context: Context, uid: int) -> dict[str, object]:
    """What is there on the disk, with or without a record; `problem` says why that is not all."""
    vms: list[str] = []
    shelf: list[str] = []
    problem = ""
    try:
        vms = context.registry.folders(uid)
        shelf = context.registry.on_shelf(uid)
    except StorageFailed as exc:
        problem = safe(exc.sentence(), NAME_SHOWN * SHOWN_MAX)
    return {"vms": len(vms), **_counted([*vms, *shelf]), "problem": problem}


def _counted(names: list[str]) -> dict[str, object]:
    return {"count": len(names), "first": [safe(name, NAME_SHOWN) for name in names[:SHOWN_MAX]]}
