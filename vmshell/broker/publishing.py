"""What a VM's owner lets others reach: the grants, and the ways through the filter that follow from them.

Runs in: the broker.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from .. import encoding
from ..errors import BadValue
from ..messages import CREATING
from ..model.decide import Verdict, refuse
from ..model.limitkinds import port_range
from ..numbering import bridge_name, tap_name
from ..refusals import NoPortToReach, NoSuchVm, PortTaken, TooOften, VmBusy
from .accountslink import Question
from .cards import names_user
from .disk import kept
from .journal import BURST, by_user, has_share

if TYPE_CHECKING:
    from ..errors import VmshellError
    from ..messages import Publish
    from .cards import Card
    from .context import Context
    from .server import Call
    from .vms import Vm

WORLD = "world"
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
    published = [item for other in context.registry for item in (others if other is vm else other.published)]
    led_elsewhere = any((item.host_port, item.proto) == (host_port, new.proto) for item in published)
    if host_port and (led_elsewhere or context.host.listens(host_port, new.proto)):
        raise PortTaken(port=host_port)
    return [*others, new]


def _named(to: str) -> list[Question]:
    """What must be known of the user or group whom *to* names."""
    if to == WORLD:
        return []
    return [Question("group", to[1:]) if to.startswith("@") else Question("user", to)]


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
        self._private, self._bridges = cache(context.addresses.private), cache(self._bridges_of)

    def granted(self, vm: Vm) -> list[Published]:
        """What the policy still lets its owner publish. It may have changed since; then the first go on the longest."""
        limits = self._effective(vm.owner).limits
        ports = port_range(limits.forward_ports)
        before = sum(len(other.published) for other in self._vms_of(vm.uid) if other.number < vm.number)
        left = vm.published[: max(0, limits.published_max - before)]
        return [item for item in left if item.to != WORLD or item.host_port in ports]

    def to(self, vm: Vm, card: Card) -> list[dict[str, object]]:
        """Every way to *card*, those of single users first: there may be more of them than tapnet takes."""
        service, now = card.network.kind == "service", self._networks.get(card.nic.network)
        asked = now if service and now and now.kind == "service" else None  # gone from the policy: it goes on as it was
        ended = asked and self._user_of(vm.uid) and not names_user(asked.providers, vm.owner, self._groups_of)
        if ended or (service and not card.provides):
            return []
        found: dict[tuple[str, str, int, int], dict[str, object]] = {}
        # On a service network the world is one more group: all who run on it.
        for item in sorted(self.granted(vm), key=lambda item: item.to.startswith("@") or (service and item.to == WORLD)):
            host_port = 0 if service else item.host_port
            if service:
                sources = self._consumers(item, vm, card, card.nic.network if asked else "")
            else:
                sources = [""] if item.to == WORLD else self._bridges(item.to, item.uid)
            for source in sources:
                key = (source, item.proto, item.port, host_port)
                found[key] = {"source": source, "proto": item.proto, "port": item.port, "host_port": host_port}
        own = bridge_name(card.segment)
        return [way for way in found.values() if way["source"] != own]

    def _consumers(self, item: Published, vm: Vm, card: Card, network: str) -> list[str]:
        """The taps of others on *card*'s segment, of those whom *item* means and who may still use *network*, if it is named."""
        return [
            tap_name(other.number, each.index)
            for other, cards in self._running
            for each in cards
            if each.segment == card.segment and other is not vm and self._means(item.to, item.uid, other.uid, other.owner)
            if not network or not self._user_of(other.uid) or network in self._effective(other.owner).names("networks")
        ]

    def _bridges_of(self, to: str, whose: int) -> list[str]:
        """The bridges of the private segments of those whom *to* means."""
        return [
            bridge_name(segment)
            for (uid, user), segments in self._private().items()
            if self._means(to, whose, uid, user)
            for segment in segments
        ]

    def _means(self, to: str, whose: int, uid: int, user: str) -> bool:
        """Is it for this account? For none whose uid or whose name is another's by now (D22)."""
        known = self._user_of(uid)
        if known != user and (known or self._uid_of(user) not in (None, uid)):
            return False
        if to.startswith("@"):
            return to[1:] in self._groups_of(user)
        return to == WORLD or (to == user and whose in (0, uid))
