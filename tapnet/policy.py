"""What of the broker's words concerns the host, and is judged by root's policy: on its bridges, with its addresses, by its ports.

The broker has no rights and is not believed. Whom a VM belongs to and whom it may reach is the broker's to say; these are not:

    settings   pool4, pool6            the policy's ipv4_pool and ipv6_pool
               confined                with ssh_forwarding, and no uid of root's or of services
    segment    bridge, parent, vlan    those of a network of kind bridged
               gateway4, gateway6      of this segment, by the pools; none at all is nobody's harm
               outside                 no further than some network leads
    port       address4, address6      in the segment's subnet, and not the gateway's
    open       host_port               in some section's forward_ports

VMs that run go on when the policy has become another: what it no longer has is kept if the kernel has it exactly so already
(`standing.py`), for a segment and for the ports on it. Nothing new is made there: a port that is to be made is judged by the
policy alone, and so is what is opened.
Runs in: tapnet. Pure: each function returns what is wrong, beginning with the field's name, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address, ip_interface

from vmshell.messages import Opening, Port, Segment, Settings
from vmshell.model.addressing import Plan
from vmshell.model.catalogues import NETWORK_KINDS, OUTSIDE
from vmshell.model.limitkinds import FIRST_CONFINED, port_range
from vmshell.model.policy import HostPolicy, Policy
from vmshell.refusals import NetworkFailed

# [host] takes effect in the broker when it starts, and here at once.
STALE = "if that has become another, `systemctl restart vmshell-broker`"


class NotInPolicy(NetworkFailed):
    """the policy of this host does not have it: {problem}"""


def pools_problem(policy: Policy, settings: Settings) -> str:
    host = policy.host
    for field, said, key, pool in (
        ("pool4", settings.pool4, "ipv4_pool", host.ipv4_pool),
        ("pool6", settings.pool6, "ipv6_pool", host.ipv6_pool),
    ):
        if said != pool:
            return f"{field}: {said or 'none'} is not {key}, which is {pool or 'none'}; {STALE}"
    return ""


def confined_problem(policy: Policy, uids: Iterable[int]) -> str:
    least = min(uids, default=None)
    if least is None:
        return ""
    if not policy.host.ssh_forwarding:
        return f"confined: nobody is while ssh_forwarding is off; {STALE}"
    return f"confined: {least} is below {FIRST_CONFINED}, no uid of a user's" if least < FIRST_CONFINED else ""


def segment_problem(policy: Policy, segment: Segment) -> str:
    if segment.kind == "bridged":
        return _place_problem(policy, segment)
    plan = _plan(policy.host)
    for field, said, gateway in (
        ("gateway4", segment.gateway4, plan.gateway4),
        ("gateway6", segment.gateway6, plan.gateway6),
    ):
        if said and (segment.segment >= plan.segments or said != gateway(segment.segment)):
            return f"{field}: {said} is not the gateway of segment {segment.segment}, by ipv4_pool and ipv6_pool; {STALE}"
    if OUTSIDE.index(segment.outside) > _widest(policy):
        return f"outside: no network leads as far as {segment.outside}"
    return ""


def port_problem(policy: Policy, port: Port, segment: Segment) -> str:
    """What is wrong with *port*, or with *segment*, which it is on."""
    return segment_problem(policy, segment) or _address_problem(policy, port, segment)


def openings_problem(policy: Policy, openings: Iterable[Opening]) -> str:
    granted: list[range] = []
    for opening in openings:
        granted = granted or ([port_range(text) for text in _forward_ports(policy)] if opening.host_port else [])
        if opening.host_port and not any(opening.host_port in ports for ports in granted):
            return f"host_port: no section has {opening.host_port} in forward_ports"
    return ""


def _place_problem(policy: Policy, segment: Segment) -> str:
    place = segment.bridge, segment.parent, segment.vlan
    networks = [network for network in policy.catalogues.networks.values() if network.kind == "bridged"]
    if any((network.bridge, network.parent, network.vlan) == place for network in networks):
        return ""
    if segment.bridge:
        return f"bridge: no network is on the bridge {segment.bridge}"
    field = "vlan" if any(network.parent == segment.parent for network in networks) else "parent"
    return f"{field}: no network is VLAN {segment.vlan} of {segment.parent}"


def _address_problem(policy: Policy, port: Port, segment: Segment) -> str:
    said = (("address4", port.address4), ("address6", port.address6))
    if segment.kind == "bridged" or not (port.address4 or port.address6):
        return next((f"{field}: the addresses of a bridged network are not ours to give" for field, text in said if text), "")
    plan, number = _plan(policy.host), segment.segment
    if number >= plan.segments:
        return f"segment: {number} has no subnet in ipv4_pool and ipv6_pool; {STALE}"
    gateways = plan.gateway4(number), plan.gateway6(number)
    for (field, text), gateway in zip(said, gateways, strict=True):
        subnet = ip_interface(gateway).network if gateway else None
        if text and (subnet is None or ip_address(text) not in subnet or ip_address(text) == ip_interface(gateway).ip):
            return f"{field}: {text} is no guest's of segment {number}, whose subnet is {subnet or 'none'}; {STALE}"
    return ""


def _plan(host: HostPolicy) -> Plan:
    return Plan(host.ipv4_pool, host.ipv6_pool, host.segment_prefix)


def _widest(policy: Policy) -> int:
    """How far guests of some network get, as a place in OUTSIDE."""
    networks = policy.catalogues.networks.values()
    return max((OUTSIDE.index(network.outside) for network in networks if "outside" in NETWORK_KINDS[network.kind]), default=0)


def _forward_ports(policy: Policy) -> Iterator[str]:
    yield policy.defaults.forward_ports
    for sections in (policy.groups, policy.users):
        for said in sections.values():
            yield str(said.get("forward_ports", ""))
