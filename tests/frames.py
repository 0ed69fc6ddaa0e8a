"""Frames as a hostile guest writes them, byte for byte; addresses are text, checksums are left out where nobody looks at them."""

from __future__ import annotations

import ipaddress
import struct

BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "33:33:00:00:00:01"


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def ethernet(target: str, source: str, kind: int, payload: bytes) -> bytes:
    return mac_bytes(target) + mac_bytes(source) + struct.pack("!H", kind) + payload


def arp(target: str, source: str, operation: int, sender: tuple[str, str], about: tuple[str, str], htype: int = 1) -> bytes:
    """*sender* and *about* are (MAC, IPv4)."""
    body = struct.pack("!HHBBH", htype, 0x0800, 6, 4, operation)
    for mac, address in (sender, about):
        body += mac_bytes(mac) + ipaddress.IPv4Address(address).packed
    return ethernet(target, source, 0x0806, body)


def udp(sport: int, dport: int, payload: bytes = b"payload") -> bytes:
    return struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload


def dhcp(hardware: str, kind: int, options: bytes = b"", own: str = "0.0.0.0") -> bytes:
    """A client's DHCP message, in a datagram: of type *kind*, in the name of the MAC *hardware*, which has the address *own*."""
    head = struct.pack("!BBBBII", 1, 1, 6, 0, 7, 0) + ipaddress.IPv4Address(own).packed
    head = head.ljust(28, b"\0") + mac_bytes(hardware)
    return udp(68, 67, head.ljust(236, b"\0") + b"\x63\x82\x53\x63" + bytes([53, 1, kind]) + options + b"\xff")


def udp6(source: str, target: str, dport: int, payload: bytes = b"payload") -> bytes:
    """From port 40000, with a right checksum: IPv6 has none of its own, and a router's connection tracking looks."""
    datagram = udp(40000, dport, payload)
    pseudo = ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(target).packed + struct.pack("!II", len(datagram), 17)
    return datagram[:6] + struct.pack("!H", checksum(pseudo + datagram)) + datagram[8:]


def tcp(sport: int, dport: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 1, 1 if flags & 0x10 else 0, 0x50, flags, 1024, 0, 0)


SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10


def ip4(source: str, target: str, proto: int, payload: bytes, fragment: int = 0) -> bytes:
    """With a right checksum of the payload too, where it is UDP, TCP or ICMP: the host's own stack looks."""
    addresses = ipaddress.IPv4Address(source).packed + ipaddress.IPv4Address(target).packed
    place = {6: 16, 1: 2}.get(proto)
    if place is not None and not fragment:
        pseudo = addresses + struct.pack("!BBH", 0, proto, len(payload)) if proto == 6 else b""
        payload = payload[:place] + struct.pack("!H", checksum(pseudo + payload)) + payload[place + 2 :]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, proto, 0) + addresses
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo4() -> bytes:
    return struct.pack("!BBHHH", 8, 0, 0, 7, 1) + b"ping"


def ip6(source: str, target: str, header: int, payload: bytes) -> bytes:
    head = struct.pack("!IHBB", 6 << 28, len(payload), header, 255)
    return head + ipaddress.IPv6Address(source).packed + ipaddress.IPv6Address(target).packed + payload


def icmp6(kind: int, body: bytes) -> bytes:
    return struct.pack("!BBH", kind, 0, 0) + body


def neighbour(kind: int, about: str, option: int = 0, mac: str = "") -> bytes:
    """A solicitation (135) or advertisement (136) about an address, with one link-layer option."""
    more = struct.pack("!BB", option, 1) + mac_bytes(mac) if option else b""
    return icmp6(kind, (b"\x60\0\0\0" if kind == 136 else b"\0\0\0\0") + ipaddress.IPv6Address(about).packed + more)


def router_advertisement() -> bytes:
    prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + ipaddress.IPv6Address("2001:db8:bad::").packed
    return icmp6(134, struct.pack("!BBHII", 64, 0, 1800, 0, 0) + prefix)


def behind(header: int, payload: bytes) -> bytes:
    """*payload*, an ICMPv6 message, behind an extension header of eight bytes."""
    return (struct.pack("!BBHI", 58, 0, 0, 0x1234) if header == 44 else struct.pack("!BBBBI", 58, 0, 1, 4, 0)) + payload


def tagged(frame: bytes, kind: int, vlan: int = 7) -> bytes:
    return frame[:12] + struct.pack("!HH", kind, vlan) + frame[12:]
