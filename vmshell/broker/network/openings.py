"""What a VM's owner lets others reach: the grants, and the ways through the filter that follow from them.

Runs in: the broker.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Generic, TypeVar

from ... import encoding
from ...errors import BadValue
from ...messages import CREATING
from ...model.decide import Verdict, refuse
from ...model.limitkinds import port_range
from ...numbering import bridge_name, tap_name
from ...refusals import NoPortToReach, NoSuchVm, PortTaken, TooOften, VmBusy
from ..host.accounts_helper import Question
from ..runtime.files import kept
from ..runtime.log import BURST, by_user, has_share
from .interfaces import names_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ...errors import VmshellError
    from ...messages import Publish
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm
    from .addresses import Owner
    from .interfaces import Card

T = TypeVar("T")
WORLD = "world"
WAYS_MAX = 1024  # of one card that are looked at; tapnet takes OPENINGS_MAX of them
Running = list[tuple["Vm", "list[Card]"]]


@dataclass(frozen=True)
class Published:
    """A port of a VM, for a user, a `@group` or the `world`; for the world by *host_port* of the host.

    *uid* is the user's: another account that gets the name later is not meant (D22). Old records have 0, which is anybody's.
    """

    port: int
    proto: str
    to: str
    host_port: int = 0
    uid: int = 0


# --- the verb ---------------------------------------------------------------------------------------------------------


def handle_publish(context: Context, call: Call, request: Publish, vm: Vm) -> None:
    if vm.state == CREATING:
        raise VmBusy(vm=vm.ref, state=vm.state)
    vm.must_be_recorded("publish")
    what = "unpublish" if request.remove else "publish"
    if not has_share(call.peer.uid, what):
        raise TooOften(what=what, limit=BURST)
    named = [] if request.remove else _named(request.to)
    context.accounts.when_known(named, lambda: call.guard(lambda: _publish(context, call, request, vm)))


def _publish(context: Context, call: Call, request: Publish, vm: Vm) -> None:
    what = "unpublish" if request.remove else "publish"
    if context.registry.get(vm.uid, vm.name) is not vm:
        raise NoSuchVm(vm=vm.ref)  # deleted meanwhile
    with kept(vm, "published"):
        vm.published = _without(vm, request) if request.remove else _with(context, vm, request)
        context.registry.save(vm)
    said = {"port": request.port, "proto": request.proto, "to": request.to, "host_port": request.host_port}
    by_user(call.peer.uid, what, number=vm.number, owner=vm.owner, vm=vm.name, **said)

    def told(error: VmshellError | None) -> None:
        waits = "" if request.remove else context.networks.upkeep.waits(vm)
        call.reply({"name": vm.ref, **said, "pending": error.sentence() if error else waits})

    context.networks.upkeep.open_ports(told)


def _without(vm: Vm, request: Publish) -> list[Published]:
    def meant(item: Published) -> bool:
        return (item.port, item.proto) == (request.port, request.proto) and request.to in ("", item.to)

    if not any(meant(item) for item in vm.published):
        raise NoPortToReach(vm=vm.ref, port=f"{request.port}/{request.proto}" + (f" to {request.to}" if request.to else ""))
    return [item for item in vm.published if not meant(item)]


def _with(context: Context, vm: Vm, request: Publish) -> list[Published]:
    if context.layout.embedded:
        rule = "in session mode the ports that lead to a guest stand in its definition: set NAME net0.forward=tcp:8080:80"
        raise BadValue(field="publish", value=request.port, rule=rule)
    uid = _uid_of(context, request.to)
    host_port = (request.host_port or request.port) if request.to == WORLD else 0
    new = Published(request.port, request.proto, request.to, host_port, uid)
    others = [item for item in vm.published if (item.port, item.proto, item.to) != (new.port, new.proto, new.to)]
    refuse(_verdicts(context, vm, new, others), vm.ref)
    # `net` and `info` say it in one message.
    if len(json.dumps([vars(item) for item in (*others, new)])) > encoding.FRAME_MAX // 2:
        rule = f"{vm.ref} has published {len(others)} ports, and its list is full: unpublish some, or publish to a group"
        raise BadValue(field="publish", value=request.port, rule=rule)
    if host_port and (_leads_elsewhere(context, vm, new, others) or context.host.listens(host_port, new.proto)):
        raise PortTaken(port=host_port)
    return [*others, new]


def _named(to: str) -> list[Question]:
    """What must be known of the user or group whom *to* names."""
    if to == WORLD:
        return []
    return [Question("group", to[1:]) if to.startswith("@") else Question("user", to)]


def _leads_elsewhere(context: Context, vm: Vm, new: Published, others: list[Published]) -> bool:
    """Does the host's port lead to another port already, of this VM or of another?"""
    return any(
        (item.host_port, item.proto) == (new.host_port, new.proto)
        for other in context.registry
        for item in (others if other is vm else other.published)
    )


def _uid_of(context: Context, to: str) -> int:
    """The uid of the user whom *to* names, else 0; raises BadValue if there is nobody of that name."""
    context.accounts.must_know(*_named(to))
    if to.startswith("@"):
        uid = 0 if context.accounts.is_group(to[1:]) else None
    else:
        uid = 0 if to == WORLD else context.accounts.uid_of(to)
    if uid is None:
        raise BadValue(field="to", value=to, rule="a user of this host, @GROUP, or world")
    return uid


def _verdicts(context: Context, vm: Vm, new: Published, others: list[Published]) -> list[Verdict]:
    effective = context.effective(vm.owner)
    count = sum(len(other.published) for other in context.registry.of(vm.uid) if other is not vm) + len(others)
    most, ports = effective.limits.published_max, effective.limits.forward_ports
    said = ("published ports in all", "1", str(count), str(most), str(max(0, most - count)))
    found = [Verdict("published_max", effective.section("published_max"), *said, count < most, vm.ref)]
    if new.to == WORLD:
        nearest = f"a port from {ports}" if ports else "@GROUP or a user"
        section = effective.section("forward_ports")
        what = f"port {new.host_port} of the host"
        found.append(Verdict("forward_ports", section, what, "", "", "", nearest, new.host_port in port_range(ports), vm.ref))
    return found


# --- what follows from it ---------------------------------------------------------------------------------------------


class Ways:
    """What the grants open, given who runs. Made for one look: however many they are, it asks about every account once.

    A directory may be silent for a while. Whom nobody knows stays the provider or consumer that he was when his card was plugged
    in, and what is for everybody or for him by name goes on, until his uid or his name is another's; but he is in no group.
    """

    def __init__(self, context: Context, running: Running) -> None:
        known, policy = context.accounts, context.policy
        self._running, self._networks, self._vms_of = running, policy.catalogues.networks, cache(context.registry.of)
        self._user_of, self._uid_of, self._groups_of = cache(known.user_of), cache(known.uid_of), cache(known.groups_of)
        self._effective = cache(lambda user: policy.effective(user, self._groups_of(user) if policy.has_groups else ()))
        self._private, self._bridges = cache(context.addresses.private), cache(self._all_bridges)
        self._earlier, self._on, self._consumers = cache(self._earlier_of), cache(self._running_on), cache(self._consumers_on)

    def granted(self, vm: Vm) -> list[Published]:
        """What the policy still lets its owner publish. It may have changed since; then the first go on the longest."""
        limits = self._effective(vm.owner).limits
        ports = port_range(limits.forward_ports)
        left = vm.published[: max(0, limits.published_max - self._earlier(vm.uid).get(vm.number, 0))]
        return [item for item in left if item.to != WORLD or item.host_port in ports]

    def to(self, vm: Vm, card: Card) -> list[dict[str, object]]:
        """Ways to *card*, those of single users first: there may be more of them than tapnet takes, and than are looked at."""
        if not vm.published:
            return []
        service, now = card.network.kind == "service", self._networks.get(card.nic.network)
        asked = now if service and now and now.kind == "service" else None  # gone from the policy: it goes on as it was
        ended = asked and self._user_of(vm.uid) and not names_user(asked.providers, vm.owner, self._groups_of)
        if ended or (service and not card.provides):
            return []
        found: dict[tuple[str, str, int, int], dict[str, object]] = {}
        for item, source in islice(self._sources(vm, card, service, card.nic.network if asked else ""), WAYS_MAX):
            host_port = 0 if service else item.host_port
            key = (source, item.proto, item.port, host_port)
            found[key] = {"source": source, "proto": item.proto, "port": item.port, "host_port": host_port}
        own = bridge_name(card.segment)
        return [way for way in found.values() if way["source"] != own]

    def _sources(self, vm: Vm, card: Card, service: bool, network: str) -> Iterator[tuple[Published, str]]:
        """What is granted, with each interface from which it may be used."""
        # On a service network the world is one more group: all who run on it.
        for item in sorted(self.granted(vm), key=lambda item: item.to.startswith("@") or (service and item.to == WORLD)):
            if service:
                yield from ((item, tap) for other, tap in self._consumers(card.segment, network).of(item) if other is not vm)
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
        for vm, cards in self._running:
            for card in cards:
                found.setdefault(card.segment, []).append((vm, tap_name(vm.number, card.index)))
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
