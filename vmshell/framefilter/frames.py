"""What a session's guest may say to passt: one pure function on a frame.

passt connects the guest's streams and sends its datagrams by sockets of the host's, and an older one (Debian 12's) whatever the
address is: one that means "this machine" leads to what listens on the host's loopback (B20). The host's other addresses are not
kept from the guest: there it finds what every program of the host finds that does not ask by the loopback.
Runs in: the frame filter. Touches nothing.
"""

from __future__ import annotations

HEAD = 14 + 40 + 4  # bytes of a frame that are looked at: Ethernet, IPv6, two ports

_IP4, _ARP, _IP6 = b"\x08\x00", b"\x08\x06", b"\x86\xdd"
_UDP, _ICMP6 = 17, 58
_DHCP_PORT, _DHCP6_PORT = (67).to_bytes(2, "big"), (547).to_bytes(2, "big")
# RFC 1122: "this network" with 0.0.0.0 in it, which Linux connects to itself, and the loopback's. Above, no host has an address.
_NO_HOST4 = frozenset((0, 127, *range(224, 256)))
_BROADCAST = b"\xff" * 4
_UNSPECIFIED = bytes(16)
_DHCP6_SERVERS = bytes.fromhex("ff02 0000 0000 0000 0000 0000 0001 0002")
_SOLICITATIONS = (b"\x85", b"\x87")  # for a router (133), for a neighbour (135)


def passes(frame: bytes) -> bool:
    """May *frame* go to passt? Its first HEAD bytes are enough."""
    kind = frame[12:14]
    if kind == _IP4:
        return len(frame) >= 34 and frame[14] == 0x45 and _passes4(frame)  # without options, so ports have their place
    if kind == _IP6:
        return len(frame) >= 54 and frame[14] >> 4 == 6 and _passes6(frame)
    return kind == _ARP and len(frame) >= 42


def asks_for_address(frame: bytes) -> bool:
    """Is *frame*, which passes, for passt's DHCP server?"""
    return frame[36:38] == _DHCP_PORT and frame[23] == _UDP and frame[12:14] == _IP4


def _passes4(frame: bytes) -> bool:
    if frame[26] not in _NO_HOST4 and frame[30] not in _NO_HOST4:
        return True
    # A guest that asks for an address has none yet, or has lost sight of who gave it one.
    own = frame[26:30] == _UNSPECIFIED[:4] or frame[26] not in _NO_HOST4
    return own and frame[30:34] == _BROADCAST and asks_for_address(frame)


def _passes6(frame: bytes) -> bool:
    source, target = frame[22:38], frame[38:54]
    if _of_a_host(target):
        return _of_a_host(source)
    if frame[20] == _ICMP6:
        return target[:2] == b"\xff\x02" and frame[54:55] in _SOLICITATIONS and (source == _UNSPECIFIED or _of_a_host(source))
    return target == _DHCP6_SERVERS and frame[20] == _UDP and frame[56:58] == _DHCP6_PORT and _of_a_host(source)


def _of_a_host(address: bytes) -> bool:
    """Neither multicast nor in 0::/16, where `::`, `::1` and every way to write an IPv4 address as an IPv6 one are."""
    return address[0] != 0xFF and address[:2] != b"\0\0"
