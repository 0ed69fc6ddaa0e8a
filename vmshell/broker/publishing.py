"""What a VM's owner lets others reach: the grants, and the ways through the filter that follow from them.

Runs in: the broker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadValue, NoPortToReach, PortTaken, TooOften
from ..model.decide import Verdict, refuse
from ..model.limitkinds import port_range
from ..names import bridge_name, tap_name
from .disk import kept
from .journal import BURST, by_user, has_share

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..errors import VmshellError
    from ..messages import Publish
    from .cards import Card
    from .context import Context
    from .server import Call
    from .vms import Vm

    GroupsOf = Callable[[str], frozenset[str]]

WORLD = "world"
Running = list[tuple["Vm", "list[Card]"]]


@dataclass(frozen=True)
class Published:
    """A port of a VM, for a user, a `@group` or the `world`; for the world by *host_port* of the host."""

    port: int
    proto: str
    to: str
    host_port: int = 0


# --- the verb ---------------------------------------------------------------------------------------------------------


def handle_publish(context: Context, call: Call, request: Publish, vm: Vm) -> None:
    what = "unpublish" if request.remove else "publish"
    if not has_share(call.peer.uid, what):
        raise TooOften(what=what, limit=BURST)
    with kept(vm, "published"):
        vm.published = _without(vm, request) if request.remove else _with(context, vm, request)
        context.registry.save(vm)
    said = {"port": request.port, "proto": request.proto, "to": request.to, "host_port": request.host_port}
    by_user(call.peer.uid, what, number=vm.number, owner=vm.owner, vm=vm.name, **said)

    def told(error: VmshellError | None) -> None:
        call.reply({"name": vm.ref, **said, "pending": error.sentence() if error else ""})

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
    _must_exist(context, request.to)
    host_port = (request.host_port or request.port) if request.to == WORLD else 0
    new = Published(request.port, request.proto, request.to, host_port)
    others = [item for item in vm.published if (item.port, item.proto, item.to) != (new.port, new.proto, new.to)]
    refuse(_verdicts(context, vm, new, others), vm.ref)
    published = [item for other in context.registry for item in (others if other is vm else other.published)]
    led_elsewhere = any((item.host_port, item.proto) == (host_port, new.proto) for item in published)
    if host_port and (led_elsewhere or context.host.listens(host_port, new.proto)):
        raise PortTaken(port=host_port)
    return [*others, new]


def _must_exist(context: Context, to: str) -> None:
    if to == WORLD:
        return
    known = context.host.is_group(to[1:]) if to.startswith("@") else context.host.uid_of(to) is not None
    if not known:
        raise BadValue(field="to", value=to, rule="a user of this host, @GROUP, or world")


def _verdicts(context: Context, vm: Vm, new: Published, others: list[Published]) -> list[Verdict]:
    effective = context.effective(vm.owner)
    count = sum(len(other.published) for other in context.registry.of(vm.uid) if other is not vm) + len(others)
    most, ports = effective.limits.published_max, effective.limits.forward_ports
    section = effective.section("published_max")
    found = [
        Verdict(
            *("published_max", section, "published ports in all", "1", str(count), str(most), str(max(0, most - count))),
            ok=count < most,
            vm=vm.ref,
        )
    ]
    if new.to == WORLD:
        nearest = f"a port from {ports}" if ports else "@GROUP or a user"
        section = effective.section("forward_ports")
        what = f"port {new.host_port} of the host"
        found.append(Verdict("forward_ports", section, what, "", "", "", nearest, new.host_port in port_range(ports), vm.ref))
    return found


# --- what follows from it ---------------------------------------------------------------------------------------------


def granted(context: Context, vm: Vm, item: Published) -> bool:
    """Does the policy still let its owner publish this? It may have changed since; then the first go on the longest."""
    limits = context.effective(vm.owner).limits
    if item.to == WORLD and item.host_port not in port_range(limits.forward_ports):
        return False
    before = sum(len(other.published) for other in context.registry.of(vm.uid) if other.number < vm.number)
    return before + vm.published.index(item) < limits.published_max


def openings(context: Context, vm: Vm, card: Card, running: Running, groups_of: GroupsOf) -> list[dict[str, object]]:
    """Every way to *card* that its VM's grants make, given who runs."""
    found: dict[tuple[str, str, int, int], dict[str, object]] = {}
    for item in vm.published:
        service = card.network.kind == "service"
        if (service and not card.provides) or not granted(context, vm, item):
            continue
        if service:
            sources = [(tap, 0) for tap in _consumers(item.to, vm, card, running, groups_of)]
        elif item.to == WORLD:
            sources = [("", item.host_port)]
        else:
            segments = _segments(context, item.to, groups_of)
            sources = [(bridge_name(segment), 0) for segment in segments if segment != card.segment]
        for source, host_port in sources:
            key = (source, item.proto, item.port, host_port)
            found[key] = {"source": source, "proto": item.proto, "port": item.port, "host_port": host_port}
    return list(found.values())


def _consumers(to: str, vm: Vm, card: Card, running: Running, groups_of: GroupsOf) -> list[str]:
    """The taps of others on *card*'s segment, of those whom *to* means."""
    return [
        tap_name(other.number, each.index)
        for other, cards in running
        for each in cards
        if each.segment == card.segment and other is not vm and _means(to, other.owner, groups_of)
    ]


def _segments(context: Context, to: str, groups_of: GroupsOf) -> list[int]:
    """The private segments of those whom *to* means."""
    return [
        segment
        for (uid, user), segments in context.addresses.private().items()
        if _means(to, user, groups_of) and context.host.user_of(uid) == user
        for segment in segments
    ]


def _means(to: str, user: str, groups_of: GroupsOf) -> bool:
    if to.startswith("@"):
        return to[1:] in groups_of(user)
    return to in (WORLD, user)
