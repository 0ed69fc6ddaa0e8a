"""From the numbers of a segment and of a card in it to addresses and back: arithmetic on the administrator's pools.

A segment is one broadcast domain. Its number is its subnet's place in the pool; 1 is the gateway, cards follow.
Used by: broker, tapnet, dnsmasq. Pure.
"""

from __future__ import annotations

import ipaddress

from ..names import LOWER, NAME_CHARS

FIRST_HOST = 2
LABEL_MAX = 63  # characters, RFC 1035
PREFIX6 = 64  # of every segment: what SLAAC and neighbours expect


class Plan:
    """*pool4* and *pool6* (or "") as the policy has them, already checked; *prefix* is the length of a segment's IPv4 prefix."""

    def __init__(self, pool4: str, pool6: str, prefix: int) -> None:
        self._pool4 = ipaddress.IPv4Network(pool4)
        self._pool6 = ipaddress.IPv6Network(pool6) if pool6 else None
        self._prefix = prefix
        size4 = 1 << (prefix - self._pool4.prefixlen)
        size6 = 1 << (PREFIX6 - self._pool6.prefixlen) if self._pool6 else size4
        self.segments = min(size4, size6)  # how many there can be
        self.hosts = (1 << (32 - prefix)) - 3  # cards of one segment: less network, gateway and broadcast

    def subnet4(self, segment: int) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network((int(self._pool4.network_address) + (segment << (32 - self._prefix)), self._prefix))

    def subnet6(self, segment: int) -> ipaddress.IPv6Network | None:
        if self._pool6 is None:
            return None
        return ipaddress.IPv6Network((int(self._pool6.network_address) + (segment << (128 - PREFIX6)), PREFIX6))

    def gateway4(self, segment: int) -> str:
        """With the prefix: `10.77.3.1/24`."""
        subnet = self.subnet4(segment)
        return f"{subnet.network_address + 1}/{self._prefix}"

    def gateway6(self, segment: int) -> str:
        subnet = self.subnet6(segment)
        return f"{subnet.network_address + 1}/{PREFIX6}" if subnet else ""

    def address4(self, segment: int, host: int) -> str:
        return str(self.subnet4(segment).network_address + host)

    def address6(self, segment: int, host: int) -> str:
        subnet = self.subnet6(segment)
        return str(subnet.network_address + host) if subnet else ""


def label(owner: str, uid: int) -> str:
    """An account as one part of a DNS name: its name if that is one, else `u` and the uid. No two accounts have the same."""
    good = 0 < len(owner) <= LABEL_MAX and NAME_CHARS.issuperset(owner) and owner[0] in LOWER and not owner.endswith("-")
    # A name that looks like the other form could be somebody else's.
    alike = owner[:1] == "u" and owner[1:].isdecimal()
    return owner if good and not alike else f"u{uid}"
