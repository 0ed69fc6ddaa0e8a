"""A VM's network interfaces as tapnet, dnsmasq and people need them: on which segment, with which addresses, by which name.

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
    from ..policies import Policies
    from ..services.accounts import Accounts
    from ..vm.vm import Vm
    from .addresses import Addresses

WITH_TAP = ("private", "shared", "service", "bridged")  # kinds of networks that tapnet makes
ADDRESSED = ("private", "shared", "service")


@dataclass(frozen=True)
class Interface:
    """One network interface. *segment* is -1 where tapnet has no part in it; addresses are empty where they are not ours."""

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
        """Its name in definitions."""
        return f"net{self.index}"


# What is kept of a network for as long as a VM runs on it, whatever becomes of it in the policy.
KEPT = ("kind", "outside", "isolated", "bridge", "parent", "vlan")


def saved(interface: Interface) -> dict[str, object]:
    """Return an attached interface as it is written down for a broker that comes after us."""
    network = {name: getattr(interface.network, name) for name in KEPT}
    nic = {"network": interface.nic.network, "model": interface.nic.model, "mac": interface.nic.mac}
    own = {name: getattr(interface, name) for name in ("index", "mac", "segment", "address4", "address6", "provides")}
    return {**own, "nic": nic, "on": network}


def restored(row: dict[str, Any]) -> Interface:
    """Return what `saved` has written; raises KeyError or TypeError if it has not."""
    own = {name: row[name] for name in ("index", "mac", "segment", "address4", "address6", "provides")}
    return Interface(nic=Nic(**row["nic"]), network=Network(**row["on"]), **own)


class Interfaces:
    """The interfaces of VMs, by what the policy, the address table and the host's accounts say of them now.

    `attached` gives those that a VM runs with.
    """

    def __init__(
        self, *, policies: Policies, addresses: Addresses, accounts: Accounts, attached: Callable[[Vm], list[Interface]]
    ) -> None:
        self._policies = policies
        self._addresses = addresses
        self._accounts = accounts
        self._attached = attached

    def of(self, vm: Vm, definition: Definition, *, give: bool) -> list[Interface]:
        """Return every interface of *definition*. With *give* what has no segment and no address yet gets one.

        May raise NoAddress, NetworkFailed or BadValue.
        """
        nics = [device for device in definition.devices().values() if isinstance(device, Nic)]
        return [self._one(vm, index, nic, give=give) for index, nic in enumerate(nics)]

    def known(self, vm: Vm) -> list[Interface]:
        """Return those that *vm* runs with, or would boot with, as far as they are known: a network may be gone from the policy.

        What is attached is as it was when it was attached, whatever the policy and the definition say by now.
        """
        attached = {interface.index: interface for interface in self._attached(vm)}
        found = []
        for index, nic in enumerate((vm.booted or vm.definition).nics):
            with contextlib.suppress(VmshellError):
                found.append(attached.get(index) or self._one(vm, index, nic, give=False))
        return found

    def address(self, vm: Vm) -> str:
        """Return the address of *vm*'s first interface that has one, or an empty string."""
        return next((interface.address4 for interface in self.known(vm) if interface.address4), "")

    def _one(self, vm: Vm, index: int, nic: Nic, *, give: bool) -> Interface:
        network = self._policies.catalogues.networks.get(nic.network)
        if network is None:
            raise NetworkFailed(problem=f"this host has no network {nic.network} any more; `networks` lists those it has")
        mac = nic.mac or mac_address(vm.number, index)
        if network.kind not in WITH_TAP:
            return Interface(index, nic, network, mac)
        if give and mac.startswith("06:") and mac[6:8] == "00" and mac != mac_address(vm.number, index):
            # All of these follow from numbers: another VM has it, or will have it (E33).
            rule = "another VM's; one of your own has 01 to ff as its third octet"
            raise BadValue(field=f"net{index}.mac", value=mac, rule=rule)
        addresses, plan = self._addresses, self._addresses.plan
        owner = (vm.uid, vm.owner) if network.kind == "private" else None
        subnet = network.kind in ADDRESSED
        # A network may become another in the policy: who runs on one bridge of the host's is never moved to a second one.
        place = nic.network if subnet else f"#{network.bridge}#{network.parent}#{network.vlan}"
        segment = addresses.segment(place, owner, subnet=subnet) if give else addresses.known(place, owner, subnet=subnet)
        if segment is None or not subnet:
            return Interface(index, nic, network, mac, -1 if segment is None else segment)
        host = addresses.host(nic.network, segment, vm.number, index) if give else addresses.known_host(segment, vm.number, index)
        if host is None:
            return Interface(index, nic, network, mac, segment)
        # Of importance to what is attached only: nobody is asked about groups for the names of VMs that are off.
        provides = give and network.kind == "service" and names_user(network.providers, vm.owner, self._accounts.groups_of)
        return Interface(index, nic, network, mac, segment, plan.address4(segment, host), plan.address6(segment, host), provides)

    def segment_message(self, interface: Interface) -> Segment:
        """Return what tapnet is told of the interface's segment."""
        network, plan = interface.network, self._addresses.plan
        if network.kind == "bridged":
            return Segment(
                segment=interface.segment, kind="bridged", bridge=network.bridge, parent=network.parent, vlan=network.vlan
            )
        return Segment(
            segment=interface.segment,
            kind=network.kind,
            gateway4=plan.gateway4(interface.segment),
            gateway6=plan.gateway6(interface.segment),
            outside=network.outside,
        )

    def port_message(self, vm: Vm, interface: Interface, *, create: bool) -> Port:
        """Return what tapnet is told of the interface itself."""
        consumer = interface.network.kind == "service" and not interface.provides
        return Port(
            number=vm.number,
            nic=interface.index,
            segment=interface.segment,
            mac=interface.mac,
            address4=interface.address4,
            address6=interface.address6,
            isolated=consumer or interface.network.isolated,
            rate=self._policies.effective(vm.owner).limits.net_rate,
            # Whoever has the uid of an account that is gone has none of its VMs (D22).
            owner=vm.uid if self._accounts.user_of(vm.uid) == vm.owner else 0,
            create=create,
        )

    def domain_of(self, owner: str, uid: int) -> str:
        """Return `alice.vm`; where the account was made anew, the VMs of the old one are in `u1001.vm` (D22)."""
        known = owner if self._accounts.uid_of(owner) in (None, uid) else ""
        return f"{label(known, uid)}.{self._policies.host.dns_domain}"


def names_user(people: tuple[str, ...], user: str, groups_of: Callable[[str], frozenset[str]]) -> bool:
    """Say whether *user*, or a group of *user*'s, is among *people* (accounts and `@group`s)."""
    if user in people:
        return True
    groups = [name[1:] for name in people if name.startswith("@")]
    return bool(groups) and not groups_of(user).isdisjoint(groups)


def tap_of(vm: Vm, interface: Interface) -> str:
    """Return the name of the interface's tap, or an empty string if tapnet has no part in it."""
    return tap_name(vm.number, interface.index) if interface.segment >= 0 else ""


def dns_name(domain: str, vm: Vm, interfaces: list[Interface], interface: Interface) -> str:
    """Return `web1.alice.vm` for a VM's first interface with an address, `net1.web1.alice.vm` for its others.

    *domain* is what `Interfaces.domain_of` says.
    """
    if not interface.address4:
        return ""
    first = next(other for other in interfaces if other.address4)
    name = f"{vm.name}.{domain}"
    return name if interface is first else f"{interface.name}.{name}"
