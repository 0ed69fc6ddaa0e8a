"""A VM's network cards as tapnet, dnsmasq and people need them: on which segment, with which addresses, by which name.

Runs in: the broker.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import BadValue, VmshellError
from ...messages import Port, Segment
from ...model.addressing import label
from ...model.catalogues import Network
from ...model.definition import Nic
from ...numbering import mac_address, tap_name
from ...refusals import NetworkFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...model.definition import Definition
    from ..context import Context
    from ..vm.registry import Vm

WITH_TAP = ("private", "shared", "service", "bridged")  # kinds of networks that tapnet makes
ADDRESSED = ("private", "shared", "service")


@dataclass(frozen=True)
class Card:
    """One network card. *segment* is -1 where tapnet has no part in it; addresses are empty where they are not ours."""

    index: int
    nic: Nic
    network: Network
    mac: str
    segment: int = -1
    address4: str = ""
    address6: str = ""
    provides: bool = False  # on a service network: does its owner offer ports there?

    @property
    def name(self) -> str:
        return f"net{self.index}"


# What is kept of a network for as long as a VM runs on it, whatever becomes of it in the policy.
KEPT = ("kind", "outside", "isolated", "bridge", "parent", "vlan")


def saved(card: Card) -> dict[str, object]:
    """A card that is plugged in, for a broker that comes after us."""
    network = {name: getattr(card.network, name) for name in KEPT}
    nic = {"network": card.nic.network, "model": card.nic.model, "mac": card.nic.mac}
    own = {name: getattr(card, name) for name in ("index", "mac", "segment", "address4", "address6", "provides")}
    return {**own, "nic": nic, "on": network}


def restored(row: dict[str, Any]) -> Card:
    """What `saved` has written; raises KeyError or TypeError if it has not."""
    own = {name: row[name] for name in ("index", "mac", "segment", "address4", "address6", "provides")}
    return Card(nic=Nic(**row["nic"]), network=Network(**row["on"]), **own)


def cards_of(context: Context, vm: Vm, definition: Definition, *, give: bool) -> list[Card]:
    """Every card of *definition*. With *give* what has no segment and no address yet gets one; may raise NoAddress."""
    nics = [device for device in definition.devices().values() if isinstance(device, Nic)]
    return [_card(context, vm, index, nic, give=give) for index, nic in enumerate(nics)]


def known_cards(context: Context, vm: Vm) -> list[Card]:
    """The cards that *vm* runs with, or would boot with, as far as they are known: a network may be gone from the policy.

    What is plugged in is as it was when it was, whatever the policy and the definition say by now.
    """
    plugged = {card.index: card for card in context.networks.plugged(vm)}
    found = []
    for index, nic in enumerate((vm.booted or vm.definition).nics):
        with contextlib.suppress(VmshellError):
            found.append(plugged.get(index) or _card(context, vm, index, nic, give=False))
    return found


def _card(context: Context, vm: Vm, index: int, nic: Nic, *, give: bool) -> Card:
    network = context.policy.catalogues.networks.get(nic.network)
    if network is None:
        raise NetworkFailed(problem=f"this host has no network {nic.network} any more; `networks` lists those it has")
    mac = nic.mac or mac_address(vm.number, index)
    if network.kind not in WITH_TAP:
        return Card(index, nic, network, mac)
    if give and mac.startswith("06:") and mac[6:8] == "00" and mac != mac_address(vm.number, index):
        # All of these follow from numbers: another VM has it, or will have it (E33).
        raise BadValue(field=f"net{index}.mac", value=mac, rule="another VM's; one of your own has 01 to ff as its third octet")
    addresses, plan = context.addresses, context.addresses.plan
    owner = (vm.uid, vm.owner) if network.kind == "private" else None
    subnet = network.kind in ADDRESSED
    # A network may become another in the policy: who runs on one bridge of the host's is never moved to a second one.
    place = nic.network if subnet else f"#{network.bridge}#{network.parent}#{network.vlan}"
    segment = addresses.segment(place, owner, subnet=subnet) if give else addresses.known(place, owner, subnet=subnet)
    if segment is None or not subnet:
        return Card(index, nic, network, mac, -1 if segment is None else segment)
    host = addresses.host(nic.network, segment, vm.number, index) if give else addresses.known_host(segment, vm.number, index)
    if host is None:
        return Card(index, nic, network, mac, segment)
    # Of importance to what is plugged in only: nobody is asked about groups for the names of VMs that are off.
    provides = give and network.kind == "service" and names_user(network.providers, vm.owner, context.accounts.groups_of)
    return Card(index, nic, network, mac, segment, plan.address4(segment, host), plan.address6(segment, host), provides)


def names_user(people: tuple[str, ...], user: str, groups_of: Callable[[str], frozenset[str]]) -> bool:
    """Is *user*, or a group of *user*'s, among *people* (accounts and `@group`s)?"""
    if user in people:
        return True
    groups = [name[1:] for name in people if name.startswith("@")]
    return bool(groups) and not groups_of(user).isdisjoint(groups)


def segment_message(context: Context, card: Card) -> Segment:
    network, plan = card.network, context.addresses.plan
    if network.kind == "bridged":
        return Segment(segment=card.segment, kind="bridged", bridge=network.bridge, parent=network.parent, vlan=network.vlan)
    return Segment(
        segment=card.segment,
        kind=network.kind,
        gateway4=plan.gateway4(card.segment),
        gateway6=plan.gateway6(card.segment),
        outside=network.outside,
    )


def port_message(context: Context, vm: Vm, card: Card, *, create: bool) -> Port:
    consumer = card.network.kind == "service" and not card.provides
    return Port(
        number=vm.number,
        nic=card.index,
        segment=card.segment,
        mac=card.mac,
        address4=card.address4,
        address6=card.address6,
        isolated=consumer or card.network.isolated,
        rate=context.effective(vm.owner).limits.net_rate,
        # Whoever has the uid of an account that is gone has none of its VMs (D22).
        owner=vm.uid if context.accounts.user_of(vm.uid) == vm.owner else 0,
        create=create,
    )


def tap_of(vm: Vm, card: Card) -> str:
    return tap_name(vm.number, card.index) if card.segment >= 0 else ""


def dns_name(domain: str, vm: Vm, cards: list[Card], card: Card) -> str:
    """`web1.alice.vm` for a VM's first card with an address, `net1.web1.alice.vm` for its others; *domain*: see `domain_of`."""
    if not card.address4:
        return ""
    first = next(other for other in cards if other.address4)
    name = f"{vm.name}.{domain}"
    return name if card is first else f"{card.name}.{name}"


def domain_of(context: Context, owner: str, uid: int) -> str:
    """`alice.vm`; where the account was made anew, the VMs of the old one are in `u1001.vm` (D22). Asks about the account."""
    known = owner if context.accounts.uid_of(owner) in (None, uid) else ""
    return f"{label(known, uid)}.{context.policy.host.dns_domain}"
