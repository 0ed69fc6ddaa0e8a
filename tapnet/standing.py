"""What the kernel has already, exactly as the broker names it: whatever root's policy says by now, VMs may run on it.

Only root and we can have made it so. It is asked about only where the policy does not have it.
Runs in: tapnet. Looks at interfaces and at our tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_interface

from vmshell.messages import Port, Segment, Settings

from . import rules
from .checks import is_our_tap
from .links import Links, is_our_bridge
from .nft import Nft
from .state import bridge, tap, uplink


class Standing:
    def __init__(self, links: Links, nft: Nft) -> None:
        self._links = links
        self._nft = nft

    def has_pools(self, settings: Settings) -> bool:
        """Do our tables have these pools and no others?"""
        shown = map(str.strip, self._nft.show(f"list chain {rules.INET} masked").splitlines())
        return [line for line in shown if line.endswith("masquerade")] == list(rules.masquerading(settings))

    def has_confined(self, uids: Iterable[int]) -> bool:
        return self._has_elements(rules.INET, {"confined": [str(int(uid)) for uid in uids]})

    def has_segment(self, segment: Segment) -> bool:
        """Is there its bridge: with its gateways and no less narrow; with its VLAN; or, of the host's, with a tap of ours?"""
        if segment.bridge:
            return self._has_tap_in(segment)
        found = self._links.link(bridge(segment))
        if found is None or not is_our_bridge(found, segment):
            return False
        if segment.kind == "bridged":
            return self._has_vlan(segment, found.index)
        there = self._links.addresses(found.index)
        wanted = {str(ip_interface(text)) for text in (segment.gateway4, segment.gateway6) if text}
        outside = {} if segment.outside == "none" else {f"outside_{segment.outside}": [f'"{bridge(segment)}"']}
        return wanted <= there and self._has_elements(rules.INET, outside)

    def has_port(self, port: Port, segment: Segment) -> bool:
        """Is its tap in the segment's bridge, with these addresses?"""
        own, master = self._links.link(tap(port)), self._links.link(bridge(segment))
        if own is None or master is None or not is_our_tap(own) or own.master != master.index:
            return False
        return self._has_elements(rules.BRIDGE, rules.addresses(port))

    def _has_tap_in(self, segment: Segment) -> bool:
        found = self._links.survey()
        there = found.get(segment.bridge)
        return there is not None and any(is_our_tap(link) and link.master == there.index for link in found.values())

    def _has_vlan(self, segment: Segment, index: int) -> bool:
        own, parent = self._links.link(uplink(segment)), self._links.link(segment.parent)
        if own is None or parent is None:
            return False
        return (own.kind, own.parent, own.vlan, own.master) == ("vlan", parent.index, segment.vlan, index)

    def _has_elements(self, table: str, elements: rules.Elements) -> bool:
        return all(
            self._nft.show(f"get element {table} {name} {{ {', '.join(values)} }}") for name, values in elements.items() if values
        )
