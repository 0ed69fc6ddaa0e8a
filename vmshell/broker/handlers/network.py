"""The verbs about networks: which there are, a VM's cards with their figures, where a guest's port is, the key its sshd showed.

Runs in: the broker.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...errors import BadValue, VmshellError
from ...messages import CREATING, RUNNING, Connect, HostKey, Net, NetHealth, Networks
from ...model.definition import Nic
from ...refusals import NotAllowed, NotConnected, VmBusy, WrongState
from ..host.accounts_helper import Question
from ..network import passt
from ..network.interfaces import ADDRESSED, dns_name, domain_of, known_cards, names_user, tap_of
from ..network.openings import Ways
from ..runtime.files import kept
from ..runtime.log import by_user

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context
    from ..network.interfaces import Card
    from ..vm.registry import Vm

FIGURES = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
HOST_KEY_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=-@. ")
HOST_KEYS_MAX, HOST_KEY_MAX = 8, 1200  # characters: RSA with 8,192 bits has 1,100


def handle_networks(context: Context, call: Call, request: Networks) -> None:
    """The networks that the peer may use, and how many of its cards are on each."""
    peer, host = call.peer, context.policy.host
    cards = [device for vm in context.registry.of(peer.uid) for device in vm.definition.devices().values()]
    used = Counter(card.network for card in cards if isinstance(card, Nic))
    rows = []
    for name in context.policy.networks_for(peer.user, context.accounts.groups_of(peer.user)):
        network = context.policy.catalogues.networks[name]
        addressed = network.kind in ADDRESSED
        segment = context.addresses.known(name, (peer.uid, peer.user) if network.kind == "private" else None, subnet=addressed)
        subnet = context.addresses.plan.subnet4(segment) if segment is not None and addressed else ""
        six = context.addresses.plan.gateway6(segment) if subnet and segment is not None else ""
        role = "member"
        if network.kind == "service":
            role = "provider" if names_user(network.providers, peer.user, context.accounts.groups_of) else "consumer"
        facts = {"name": name, "kind": network.kind, "subnet": str(subnet), "subnet6": six.replace("::1/", "::/")}
        outside = network.outside if network.kind in ADDRESSED else "none" if network.kind == "none" else "all"
        rows.append({**facts, "outside": outside, "isolated": network.isolated, "role": role, "cards": used[name]})
    call.reply({"networks": rows, "domain": host.dns_domain})


def handle_net(context: Context, call: Call, request: Net, vm: Vm) -> None:
    cards, domain = known_cards(context, vm), domain_of(context, vm.owner, vm.uid)
    granted = set(Ways(context, []).granted(vm))
    call.reply(
        {
            "name": vm.ref,
            "state": vm.state,
            "domain": context.policy.host.dns_domain,
            "cards": [_row(context, vm, cards, card, domain) for card in cards],
            "published": [{**vars(item), "open": item in granted} for item in vm.published],
        }
    )


def address_of(context: Context, vm: Vm) -> str:
    """The address of its first card that has one."""
    return next((card.address4 for card in known_cards(context, vm) if card.address4), "")


def _row(context: Context, vm: Vm, cards: list[Card], card: Card, domain: str) -> dict[str, object]:
    tap = tap_of(vm, card)
    return {
        "name": card.name,
        "network": card.nic.network,
        "kind": card.network.kind,
        "model": card.nic.model,
        "mac": card.mac,
        "address": card.address4,
        "address6": card.address6,
        "link": card.nic.link,
        "tap": tap,
        "dns": dns_name(domain, vm, cards, card),
        "forward": [str(forward) for forward in card.nic.forward],
        "rate": context.networks.upkeep.rate(vm, card) if tap else 0,
        **{name: _figure(tap, name) for name in FIGURES},
    }


def _figure(tap: str, name: str) -> int:
    """A counter of the kernel's. What the guest receives is what the host sends into its tap."""
    other = name.replace("rx", "TX").replace("tx", "rx").replace("TX", "tx")
    try:
        with open(f"/sys/class/net/{tap}/statistics/{other}", encoding="ascii") as file:
            return int(file.read(32)) if tap else 0
    except (OSError, ValueError):
        return 0


def handle_net_health(context: Context, call: Call, request: NetHealth) -> None:
    """What tapnet says of the kernel and of itself; of how many accounts the sockets are confined."""
    if not call.peer.admin:
        raise NotAllowed(what="the state of the host's network", who="administrators")

    def answered(error: VmshellError | None, health: dict[str, object]) -> None:
        if error:
            call.fail(error)
        else:
            call.reply({**health, "confined": context.networks.upkeep.confined()})

    host = context.policy.host
    # Whoever has just made somebody a member, or no longer one, asks for this: what was known a moment ago does not do (A06).
    context.accounts.look()
    members = [Question("members", host.group)] if host.ssh_forwarding else []
    context.accounts.when_known(members, lambda: call.guard(lambda: context.networks.health(request.repair, answered)))


# --- connections ------------------------------------------------------------------------------------------------------


def handle_connect(context: Context, call: Call, request: Connect, vm: Vm) -> None:
    """Say where the guest's port is. The peer connects by itself: what it may reach is decided by whose socket it is."""
    if vm.state != RUNNING:
        raise WrongState(vm=vm.ref, state=vm.state, verb="connect", needed="running")
    if context.layout.embedded:
        address, port = "127.0.0.1", _forwarded(vm, request.port)
    else:
        address, port = address_of(context, vm), request.port
    if not address:
        raise NotConnected(vm=vm.ref, problem="it has no card on a network with addresses")
    by_user(call.peer.uid, "connect", number=vm.number, owner=vm.owner, vm=vm.name, port=request.port)
    call.reply({"name": vm.ref, "address": address, "port": port})


def _forwarded(vm: Vm, port: int) -> int:
    """In session mode a guest is reached by the ports of ours that lead to it; which of them leads to *port*?"""
    nics = (vm.booted or vm.definition).nics
    forward = next((item for nic in nics for item in nic.forward if (item.proto, item.guest) == ("tcp", port)), None)
    if forward is None:
        free = port if port >= 10_000 else port + 10_000
        problem = f"no port leads there: set {vm.name} net0.forward=tcp:{free}:{port}, then boot it again"
        raise NotConnected(vm=vm.ref, problem=problem)
    if not passt.leads(forward):
        cure = "boot it again" if passt.available() else "apt-get install passt, then boot it again"
        raise NotConnected(vm=vm.ref, problem=f"no passt leads to it: {cure}")
    return forward.host


# --- host keys --------------------------------------------------------------------------------------------------------


def handle_host_key(context: Context, call: Call, request: HostKey, vm: Vm) -> None:
    """Remember the keys of the guest's first answer: later ones are compared with them, until they are to be forgotten."""
    if vm.state == CREATING:
        raise VmBusy(vm=vm.ref, state=vm.state)
    vm.must_be_recorded("host-key")
    keys = vm.host_keys
    if request.forget:
        keys = []
    elif request.keys and not vm.host_keys:
        bad = [key for key in request.keys if not HOST_KEY_CHARS.issuperset(key) or len(key) > HOST_KEY_MAX or key.count(" ") < 1]
        if bad or len(request.keys) > HOST_KEYS_MAX:
            rule = f"at most {HOST_KEYS_MAX} lines like: ssh-ed25519 AAAA…"
            raise BadValue(field="keys", value=(bad or [""])[0][:40], rule=rule)
        keys = list(request.keys)
    if keys != vm.host_keys:
        with kept(vm, "host_keys"):
            vm.host_keys = keys
            context.registry.save(vm)
        by_user(call.peer.uid, "host-key", number=vm.number, owner=vm.owner, vm=vm.name, forget=request.forget)
    call.reply({"name": vm.ref, "keys": vm.host_keys})
