"""What can be known of a message, and of what stands in the kernel, without touching anything.

Runs in: tapnet. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from vmshell.errors import ProtocolError
from vmshell.messages import Port, Segment, Settings
from vmshell.refusals import NetworkFailed

from .links import Link, bridge_mac
from .policy import NotInPolicy
from .state import State, bridge, tap, uplink


def check_settings(settings: Settings) -> None:
    _check(settings.pool4, IPv4Network)
    _check(settings.pool6, IPv6Network)


def check_segment(segment: Segment) -> None:
    _check(segment.gateway4, IPv4Interface)
    _check(segment.gateway6, IPv6Interface)
    hosts = bool(segment.bridge), bool(segment.parent), bool(segment.vlan)
    if segment.kind == "bridged":
        if hosts not in ((True, False, False), (False, True, True)):
            raise NetworkFailed(problem="a bridged network needs a bridge of the host, or an interface and a VLAN")
        if segment.gateway4 or segment.gateway6 or segment.outside != "none":
            raise NotInPolicy(problem="gateway4, gateway6, outside: a bridged network has its own")
    elif any(hosts):
        raise NotInPolicy(problem=f"bridge, parent, vlan: a network of kind {segment.kind} has a bridge of ours")


def check_port(port: Port, state: State) -> None:
    """Raise VmshellError for a port that no rule could be made of."""
    if port.segment not in state.segments:
        raise ProtocolError(problem=f"port {tap(port)} is on segment {port.segment}, which was not named")
    if not port.mac:
        raise ProtocolError(problem=f"port {tap(port)} has no MAC")
    _check(port.address4, IPv4Address)
    _check(port.address6, IPv6Address)


def _check(text: str, kind: Callable[[str], object]) -> None:
    """Raise NetworkFailed unless *text* is nothing, or what *kind* reads."""
    try:
        if text:
            kind(text)
    except ValueError as error:
        raise NetworkFailed(problem=str(error)) from error


def orphans(found: dict[str, Link], wanted: State) -> list[str]:
    """What we or one before us made and nobody wants: taps of root's with a name of ours, bridges, VLANs of segments not used."""
    named = {tap(port) for port in wanted.ports.values()} | wanted.refused
    kept = {name for number in wanted.used() for name in (bridge(wanted.segments[number]), uplink(wanted.segments[number]))}
    gone = []
    for name, link in found.items():
        if name not in named and name not in kept and _is_ours(link):
            gone.append(name)
    return gone


def _is_ours(link: Link) -> bool:
    """Is this of our making, by its name and by what only we make so?"""
    if link.name.startswith("vmshell") and _hex(link.name[7:], 6):
        return link.kind == "vlan"
    if link.name.startswith("vtb") and _hex(link.name[3:], 6):
        return link.kind == "bridge" and link.mac == bridge_mac(int(link.name[3:], 16))
    return is_our_tap(link)


def is_our_tap(link: Link) -> bool:
    name = link.name
    return link.root_only and name.startswith("vt") and _hex(name[2:8], 6) and name[8:9] == "n" and _hex(name[9:], 1)


def _hex(text: str, length: int) -> bool:
    return len(text) == length and not text.strip("0123456789abcdef")
