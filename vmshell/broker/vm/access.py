"""Who may do what: one function, asked before anything else is done for a request (R13).

"Not yours" and "does not exist" are one answer, made in one place, on one path.
Runs in: the broker. Pure: looks at the registry, touches nothing.
"""

from __future__ import annotations

from ...messages import SHELF, List, Request, StoreRequest, VmRequest
from ...refusals import BadName, NoSuchVm, NotAllowed
from ..runtime.call import Peer
from .registry import Registry
from .vm import Vm


def authorise(peer: Peer, request: Request, registry: Registry) -> Vm | None:
    """Return the VM that *request* is about (None for requests about no VM), or raise NoSuchVm, NotAllowed or BadName.

    A VM is its owner's; an administrator (root, on an installed host) may name anybody's as `owner/name` or `uid/name`.
    """
    if isinstance(request, List) and request.all and not peer.admin:
        raise NotAllowed(what="`list --all`", who="administrators")
    if not isinstance(request, VmRequest):
        return None
    if isinstance(request, StoreRequest) and request.vm == SHELF:
        return None  # everybody's own, by uid
    owner, slash, name = request.vm.rpartition("/")
    if not slash or owner == peer.user:
        vm = registry.get(peer.uid, name)
        if vm is not None and owns(peer, vm):
            return vm
    elif peer.admin and (vm := _named(registry, owner, name)):
        return vm
    raise NoSuchVm(vm=request.vm)


def owns(peer: Peer, vm: Vm) -> bool:
    """By uid *and* name: a uid that was given to a new account does not bring the old one's VMs along (D22)."""
    return vm.uid == peer.uid and vm.owner == peer.user


def visible(peer: Peer, registry: Registry, *, everyone: bool) -> list[Vm]:
    """The VMs in *peer*'s list, in its order."""
    if everyone:
        return sorted(registry, key=lambda vm: (vm.owner, vm.name))
    return [vm for vm in registry.of(peer.uid) if owns(peer, vm)]


def _named(registry: Registry, owner: str, name: str) -> Vm | None:
    """The VM that an administrator means; raises BadName where the account was made anew, and both have such a VM (D22)."""
    found = [vm for vm in registry if vm.name == name and owner in (vm.owner, str(vm.uid))]
    if len(found) > 1:
        names = " or ".join(f"{vm.uid}/{name}" for vm in found)
        raise BadName(what="VM", value=f"{owner}/{name}", rule=f"several accounts were called {owner}; say whose by uid, {names}")
    return found[0] if found else None
