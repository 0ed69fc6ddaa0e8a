"""What root's own tools ask: who stands on an image, what an account owns, what a boot would run; and have the policy read again.

Root opens none of the broker's files, so it has to be told what is in them. What cannot be read is said to be there, never left
out, and each answer fits into a packet however much there is: counts, and the names of the first few.
Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import safe
from ...messages import SHOWN_MAX, ImageUsers, LaunchLine, Owned, Reload, Unreadable
from ...refusals import NoQemu, NotAllowed, StorageFailed
from ..vm.registry import images_of

if TYPE_CHECKING:
    from ..lifecycle.launch_plan import LaunchPlans
    from ..network.addresses import Addresses
    from ..policies import Policies
    from ..runtime.call import Call
    from ..services.capabilities import Capabilities
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers

NAME_SHOWN = 50  # characters


class AdminHandlers:
    """Answers root, and in a session its owner."""

    def __init__(
        self,
        *,
        embedded: bool,
        policies: Policies,
        registry: Registry,
        addresses: Addresses,
        capabilities: Capabilities,
        plans: LaunchPlans,
    ) -> None:
        self._embedded = embedded
        self._policies = policies
        self._registry = registry
        self._addresses = addresses
        self._capabilities = capabilities
        self._plans = plans

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {
            ImageUsers: self._image_users,
            Owned: self._owned,
            Unreadable: self._unreadable,
            LaunchLine: self._launch_line,
            Reload: self._reload,
        }

    def _image_users(self, call: Call, request: ImageUsers) -> None:
        if not call.peer.admin:
            raise NotAllowed(what="who uses an image", who="administrators")
        users: dict[str, list[str]] = {image: [] for image in request.images}
        unreadable = self._registry.unreadable()
        for vm in self._registry:
            name, images = f"{vm.owner}/{vm.name}", images_of(vm)
            if images is None:
                unreadable.append(name)
            for image in images or ():
                if image in users:
                    users[image].append(name)
        call.reply({"images": [_counted(users[image]) for image in request.images], "unreadable": _counted(unreadable)})

    def _owned(self, call: Call, request: Owned) -> None:
        if not call.peer.admin:
            raise NotAllowed(what="what others own", who="administrators")
        call.reply({"owned": [self._owned_by(uid) for uid in request.uids]})

    def _owned_by(self, uid: int) -> dict[str, object]:
        """What is there on the disk, with or without a record; `problem` says why that is not all."""
        vms: list[str] = []
        shelf: list[str] = []
        problem = ""
        try:
            vms = self._registry.folders(uid)
            shelf = self._registry.on_shelf(uid)
        except StorageFailed as exc:
            problem = safe(exc.sentence(), NAME_SHOWN * SHOWN_MAX)
        return {"vms": len(vms), **_counted([*vms, *shelf]), "problem": problem}

    def _unreadable(self, call: Call, request: Unreadable) -> None:
        """Everything is looked at, also the shelves that nobody has used since the broker started."""
        if not call.peer.admin and not self._embedded:
            raise NotAllowed(what="whose records are damaged", who="administrators")
        registry = self._registry
        vms = [*registry.unreadable(), *(f"{vm.owner}/{vm.name}" for vm in registry if vm.unreadable)]
        addresses = safe(self._addresses.damaged, NAME_SHOWN * SHOWN_MAX)
        call.reply({"vms": _counted(vms), "shelves": _counted(registry.unreadable_shelves()), "addresses": addresses})

    def _launch_line(self, call: Call, request: LaunchLine, vm: Vm) -> None:
        """The command that a boot would run now, for the administrator to look at."""
        if not call.peer.admin and not self._embedded:
            raise NotAllowed(what="the launch line", who="administrators")

        def known() -> None:
            if self._capabilities.problem:
                raise NoQemu(problem=self._capabilities.problem)
            call.reply({"name": vm.ref, "argv": self._plans.launch_line(vm)})

        self._capabilities.when_known(lambda: call.guard(known))

    def _reload(self, call: Call, request: Reload) -> None:
        """Take the policy file as it is now; one that is not valid is refused, and the old one stays."""
        if not call.peer.admin and not self._embedded:
            raise NotAllowed(what="reloading the policy", who="administrators")
        call.reply({"later": self._policies.reload()})


def _counted(names: list[str]) -> dict[str, object]:
    return {"count": len(names), "first": [safe(name, NAME_SHOWN) for name in names[:SHOWN_MAX]]}
