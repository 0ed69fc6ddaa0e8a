"""What this kernel can: tried out once, on a bridge and a tap of our own that are gone again afterwards.

What isolates is a need, and a problem if it is missing; the rest is used where it is there and named where it is not.
Runs in: tapnet. Touches two interfaces of its own for a moment, and asks nftables without changing it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from pyroute2 import NetlinkError

from vmshell.errors import VmshellError
from vmshell.messages import Port, Segment, Settings
from vmshell.numbering import NUMBER_MAX, mac_address

from . import rules, taps
from .links import Links, held_to
from .nft import Nft
from .state import State, tap
from .sysctl import has_ipv6, read

# A number that no VM has: the broker counts from 1 and would need years to get here.
_NUMBER = NUMBER_MAX
_SAMPLE = Port(number=_NUMBER, nic=15, segment=_NUMBER, mac=mac_address(_NUMBER, 15), isolated=True, rate=1000)


class Features:
    """`found`: every optional feature by name. `problems`: a sentence for each need that is not met."""

    def __init__(self) -> None:
        self.found: dict[str, bool] = {}
        self.problems: list[str] = []

    def probe(self, links: Links, nft: Nft) -> None:
        """Look again at everything."""
        self.found, self.problems = {}, []
        self._probe_nft(nft)
        self._probe_links(links)
        self.found["ipv6"] = has_ipv6()
        # Then what VMs of one network say to each other passes the host's own IP filters too.
        self.found["bridge-nf-call-iptables"] = read("bridge/bridge-nf-call-iptables") == "1"

    def _need(self, error: VmshellError) -> None:
        self.problems.append(str(error.fields.get("problem", error)))

    def _probe_nft(self, nft: Nft) -> None:
        segment = Segment(segment=_NUMBER, gateway4="10.255.255.1/24", gateway6="fd00:ff:ff:ff::1/64", outside="internet")
        port = Port(**{**vars(_SAMPLE), "address4": "10.255.255.2", "address6": "fd00:ff:ff:ff::2"})
        settings = Settings(pool4="10.255.0.0/16", pool6="fd00:ff:ff::/48")
        state = State(settings, segments={_NUMBER: segment}, ports={(_NUMBER, 15): port})
        try:
            nft.run(rules.everything(state, counts=False), check=True)
        except VmshellError as error:
            self._need(error)

    def _probe_links(self, links: Links) -> None:
        segment = Segment(segment=_NUMBER)
        name, fd = tap(_SAMPLE), -1
        try:
            fd = taps.create(name)
            links.make_bridge(segment)
            self._probe_limits(links, segment)
            link = links.link(name)
            if link is None or link.held != held_to(_SAMPLE):
                self.problems.append("this kernel's bridges cannot isolate a port; Linux 4.18 and later can")
            self.found["vlan"] = _works(links.try_vlan, segment)
        except VmshellError as error:
            self._need(error)
        finally:
            if fd >= 0:
                os.close(fd)
            links.remove_bridge(segment)

    def _probe_limits(self, links: Links, segment: Segment) -> None:
        """Plug the sample with all that limits it, and if that fails with less."""
        for limits, fair in ((True, True), (True, False), (False, False)):
            links.limits, links.fair = limits, fair
            try:
                links.plug([_SAMPLE], {_NUMBER: segment})
                break
            except VmshellError:
                if not limits:
                    raise
        self.found["tc-tbf"] = links.limits
        if links.limits:
            self.found["tc-fq_codel"] = links.fair


def _works(attempt: Callable[[Segment], None], segment: Segment) -> bool:
    try:
        attempt(segment)
    except NetlinkError:
        return False
    return True
