"""What others may reach of a VM: the openings in the filter that follow from what its owner has published.

Runs in: the broker.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Generic, TypeVar

from ...model.limitkinds import port_range
from ...numbering import bridge_name, tap_name
from .interfaces import names_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ...model.policy import Policy
    from ..services.accounts import Accounts
    from ..vm.registry import Registry
    from ..vm.vm import Published, Vm
    from .addresses import Addresses, Owner
    from .attached import Running
    from .interfaces import Interface

T = TypeVar("T")
WORLD = "world"
LOOKED_AT_MAX = 1024  # of one interface; tapnet takes OPENINGS_MAX of them


class Openings:
    """What the grants open, given who runs. Made for one look: however many they are, it asks about every account once.

    A directory may be silent for a while. Whom nobody knows stays the provider or consumer that he was when his interface was
    attached, and what is for everybody or for him by name goes on, until his uid or his name is another's; but he is in no group.
    """

    def __init__(self, running: Running, *, policy: Policy, accounts: Accounts, registry: Registry, addresses: Addresses) -> None:
        known = accounts
        self._running, self._networks, self._vms_of = running, policy.catalogues.networks, cache(registry.of)
        self._user_of, self._uid_of, self._groups_of = cache(known.user_of), cache(known.uid_of), cache(known.groups_of)
        self._effective = cache(lambda user: policy.effective(user, self._groups_of(user) if policy.has_groups else ()))
        self._private, self._bridges = cache(addresses.private), cache(self._all_bridges)
        self._earlier, self._on, self._consumers = cache(self._earlier_of), cache(self._running_on), cache(self._consumers_on)

    def granted(self, vm: Vm) -> list[Published]:
        """What the policy still lets its owner publish. It may have changed since; then the first go on the longest."""
        limits = self._effective(vm.owner).limits
        ports = port_range(limits.forward_ports)
        left = vm.published[: max(0, limits.published_max - self._earlier(vm.uid).get(vm.number, 0))]
        return [item for item in left if item.to != WORLD or item.host_port in ports]

    def to(self, vm: Vm, interface: Interface) -> list[dict[str, object]]:
        """Return the openings to *interface*, single users' first: there may be more than tapnet takes, or are looked at."""
        if not vm.published:
            return []
        service, now = interface.network.kind == "service", self._networks.get(interface.nic.network)
        asked = now if service and now and now.kind == "service" else None  # gone from the policy: it goes on as it was
        ended = asked and self._user_of(vm.uid) and not names_user(asked.providers, vm.owner, self._groups_of)
        if ended or (service and not interface.provides):
            return []
        found: dict[tuple[str, str, int, int], dict[str, object]] = {}
        for item, source in islice(self._sources(vm, interface, service, interface.nic.network if asked else ""), LOOKED_AT_MAX):
            host_port = 0 if service else item.host_port
            key = (source, item.proto, item.port, host_port)
            found[key] = {"source": source, "proto": item.proto, "port": item.port, "host_port": host_port}
        own = bridge_name(interface.segment)
        return [opening for opening in found.values() if opening["source"] != own]

    def _sources(self, vm: Vm, interface: Interface, service: bool, network: str) -> Iterator[tuple[Published, str]]:
        """What is granted, with each interface from which it may be used."""
        # On a service network the world is one more group: all who run on it.
        for item in sorted(self.granted(vm), key=lambda item: item.to.startswith("@") or (service and item.to == WORLD)):
            if service:
                yield from ((item, tap) for other, tap in self._consumers(interface.segment, network).of(item) if other is not vm)
            elif item.to == WORLD:
                yield item, ""
            else:
                yield from ((item, bridge) for bridge in self._bridges().of(item))

    def _earlier_of(self, uid: int) -> dict[int, int]:
        """By the numbers of *uid*'s VMs, how much those with lower numbers have published."""
        vms = sorted(self._vms_of(uid), key=lambda vm: vm.number)
        before = accumulate((len(vm.published) for vm in vms), initial=0)
        return {vm.number: count for vm, count in zip(vms, before, strict=False)}

    def _running_on(self) -> dict[int, list[tuple[Vm, str]]]:
        """By segment, who runs there and with which tap."""
        found: dict[int, list[tuple[Vm, str]]] = {}
        for vm, interfaces in self._running:
            for interface in interfaces:
                found.setdefault(interface.segment, []).append((vm, tap_name(vm.number, interface.index)))
        return found

    def _consumers_on(self, segment: int, network: str) -> _Meant[tuple[Vm, str]]:
        """Those on *segment*, who may still use *network*, if it is named."""
        people: dict[Owner, list[tuple[Vm, str]]] = {}
        for vm, tap in self._on().get(segment, ()):
            if not network or not self._user_of(vm.uid) or network in self._effective(vm.owner).names("networks"):
                people.setdefault((vm.uid, vm.owner), []).append((vm, tap))
        return self._meant(people)

    def _all_bridges(self) -> _Meant[str]:
        """Whose private segments have which bridges."""
        return self._meant({owner: [bridge_name(number) for number in own] for owner, own in self._private().items()})

    def _meant(self, people: dict[Owner, list[T]]) -> _Meant[T]:
        return _Meant({owner: things for owner, things in people.items() if self._is_still(*owner)}, self._groups_of)

    def _is_still(self, uid: int, user: str) -> bool:
        """Is this account what it was? Not if its uid or its name is another's by now (D22)."""
        known = self._user_of(uid)
        return known == user or not (known or self._uid_of(user) not in (None, uid))


class _Meant(Generic[T]):
    """What accounts have, found by whom a grant is for, without a look at everybody else's."""

    def __init__(self, people: dict[Owner, list[T]], groups_of: Callable[[str], frozenset[str]]) -> None:
        self._people = people
        self._names: dict[str, list[Owner]] = {}
        for uid, user in people:
            self._names.setdefault(user, []).append((uid, user))
        self._groups = cache(lambda: self._by_group(groups_of))

    def _by_group(self, groups_of: Callable[[str], frozenset[str]]) -> dict[str, list[Owner]]:
        found: dict[str, list[Owner]] = {}
        for owner in self._people:
            for group in groups_of(owner[1]):
                found.setdefault(group, []).append(owner)
        return found

    def of(self, item: Published) -> Iterator[T]:
        """What those have whom *item* is for."""
        owners: Iterable[Owner]
        if item.to == WORLD:
            owners = self._people
        elif item.to.startswith("@"):
            owners = self._groups().get(item.to[1:], ())
        else:
            owners = [owner for owner in self._names.get(item.to, ()) if item.uid in (0, owner[0])]
        for owner in owners:
            yield from self._people[owner]
