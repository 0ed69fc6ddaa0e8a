"""E10 to E24, E29, E32, A06, A07: frames from a hostile guest's tap, looked for at the victim's, at the host and outside.

Two guests share a segment whose ports are not isolated: whatever is stopped there is stopped by the filter alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
import time

import pytest

from tests.frames import (
    ACK,
    ALL_NODES,
    BROADCAST,
    SYN,
    SYN_ACK,
    arp,
    behind,
    dhcp,
    echo4,
    ethernet,
    icmp6,
    ip4,
    ip6,
    neighbour,
    router_advertisement,
    tagged,
    tcp,
    udp,
    udp6,
)
from tests.process.networld import (
    EVIL,
    GATEWAY,
    HER_LINK,
    HERS,
    HERS6,
    HIS,
    HIS6,
    HIS_LINK,
    OTHER,
    VICTIM,
    World,
    connects,
    heard,
    inside,
    outside,
    sends,
    sniffer,
    world,
)
from tests.process.tapnets import SETTINGS, Namespace, mac, unable
from vmshell.messages import Health, Open, Settings
from vmshell.numbering import bridge_name, tap_name

__all__ = ["outside", "world"]
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(unable()), reason=unable() or "-")]

@pytest.fixture(autouse=True)
def _silence(world: World) -> None:
    """What the test before has caused is nobody's news."""
    for number in world.taps:
        world.received(number, 0.0)


# --- forged -----------------------------------------------------------------------------------------------------------


def from_evil(payload: bytes, kind: int = 0x0800, target: str = VICTIM) -> bytes:
    return ethernet(target, EVIL, kind, payload)


def six(payload: bytes, header: int = 58, source: str = HIS_LINK, target: str = "ff02::1") -> bytes:
    return from_evil(ip6(source, target, header, payload), 0x86DD, ALL_NODES)


HONEST = ip4(HIS, HERS, 17, udp(40000, 7777))
RA = router_advertisement()
FORGED: dict[str, bytes] = {
    "E10-mac": ethernet(VICTIM, OTHER, 0x0800, HONEST),
    "E10-mac-of-the-victim": ethernet(BROADCAST, VICTIM, 0x0800, HONEST),
    "E10-mac-and-all": ethernet(BROADCAST, OTHER, 0x0806, arp(BROADCAST, OTHER, 1, (OTHER, HIS), (BROADCAST, HERS))[14:]),
    "E11-gateway": arp(BROADCAST, EVIL, 2, (EVIL, GATEWAY), (VICTIM, HERS)),
    "E11-neighbour": arp(BROADCAST, EVIL, 2, (EVIL, HERS), (BROADCAST, HERS)),
    "E11-sender-mac": arp(VICTIM, EVIL, 2, (OTHER, HIS), (VICTIM, HERS)),
    "E11-request-with-a-false-sender": arp(BROADCAST, EVIL, 1, (EVIL, GATEWAY), (BROADCAST, HERS)),
    "E11-reply-from-nobody": arp(VICTIM, EVIL, 2, (EVIL, "0.0.0.0"), (VICTIM, HERS)),
    "E11-probes-for-the-neighbours-address": arp(BROADCAST, EVIL, 1, (EVIL, "0.0.0.0"), (BROADCAST, HERS)),
    "E11-another-hardware": arp(BROADCAST, EVIL, 2, (EVIL, HIS), (VICTIM, HERS), htype=6),
    "E11-reverse-arp": arp(BROADCAST, EVIL, 4, (EVIL, HIS), (VICTIM, HERS)),
    "E12-source": from_evil(ip4("10.77.1.9", HERS, 17, udp(1, 2))),
    "E12-the-gateways": from_evil(ip4(GATEWAY, HERS, 17, udp(53, 4000))),
    "E12-the-victims": from_evil(ip4(HERS, HERS, 17, udp(1, 2))),
    "E12-from-nowhere": from_evil(ip4("0.0.0.0", HERS, 17, udp(68, 67))),
    "E13-dhcp-server": from_evil(ip4(HIS, "255.255.255.255", 17, udp(67, 68)), target=BROADCAST),
    "E13-dhcp-server-to-one": from_evil(ip4(HIS, HERS, 17, udp(67, 68))),
    # In the victim's name: what it was given would be declined, and nobody else gets it then.
    "E13-declines-for-another": from_evil(ip4("0.0.0.0", "255.255.255.255", 17, dhcp(VICTIM, 4)), target=BROADCAST),
    "E13-gives-back-for-another": from_evil(ip4(HIS, GATEWAY, 17, dhcp(VICTIM, 7))),
    "E13-a-hidden-name": from_evil(ip4(HIS, GATEWAY, 17, dhcp(VICTIM, 4)[:8], fragment=0x2000)),
    "E13-dhcpv6-server": six(udp(547, 546), 17),
    "E14-router-advertisement": six(RA),
    "E14-from-a-global-address": six(RA, source=HIS6),
    "E14-redirect": six(icmp6(137, bytes(36))),
    "E15-behind-hop-by-hop": six(behind(0, RA), 0),
    "E15-behind-routing": six(behind(43, RA), 43),
    "E15-in-a-fragment": six(behind(44, RA), 44),
    "E15-behind-destination-options": six(behind(60, RA), 60),
    "E15-behind-two": six(struct.pack("!BBBBI", 44, 0, 1, 4, 0) + behind(44, RA), 60),
    "E15-ipv4-in-ipv6": six(HONEST, 4),
    "E16-advertises-the-gateway": six(neighbour(136, "fd77:0:0:1::1", 2, EVIL)),
    "E16-advertises-the-router": six(neighbour(136, "fe80::1", 2, EVIL)),
    "E16-advertises-the-neighbour": six(neighbour(136, HERS6, 2, EVIL)),
    "E16-another-mac": six(neighbour(136, HIS6, 2, OTHER)),
    "E16-another-option": six(neighbour(136, HIS6, 1, OTHER)),
    "E16-asks-with-another-mac": six(neighbour(135, HERS6, 1, OTHER)),
    "E16-asks-as-another": six(neighbour(135, HIS6, 1, EVIL), source=HERS6),
    "E16-two-options": six(neighbour(136, HIS6, 2, EVIL) + b"\x02\x01" + bytes(6)),
    "E16-ipv6-source": six(udp(1, 2), 17, source=HERS6),
    "E16-link-local-source": six(udp(1, 2), 17, source=HER_LINK),
    "E16-solicits-routers-as-another-mac": six(icmp6(133, b"\0\0\0\0\x01\x01" + bytes.fromhex(OTHER.replace(":", "")))),
    "E17-vlan": tagged(from_evil(HONEST), 0x8100),
    "E17-priority-tag": tagged(from_evil(HONEST), 0x8100, 0),
    "E17-qinq": tagged(tagged(from_evil(HONEST), 0x8100), 0x88A8),
    "E18-spanning-tree": ethernet("01:80:c2:00:00:00", EVIL, 38, b"\x42\x42\x03" + bytes(35)),
    "E18-lldp": ethernet("01:80:c2:00:00:0e", EVIL, 0x88CC, bytes(40)),
    "E18-pause": ethernet("01:80:c2:00:00:01", EVIL, 0x8808, b"\0\x01\xff\xff"),
    "E18-pppoe": from_evil(bytes(40), 0x8864),
    "E18-wake-on-lan": from_evil(b"\xff" * 6, 0x0842),
    "E18-length-instead-of-type": from_evil(bytes(40), 40),
    "E11-truncated": from_evil(b"\x66\x66\x66"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_frame_gets_nowhere(world: World, name: str) -> None:
    with sniffer(world.space, bridge_name(1)) as host:
        world.send(1, FORGED[name])
        honest = from_evil(ip4(HIS, HERS, 17, udp(40000, 7777, os.urandom(8))))
        world.send(1, honest)
        at_victim = world.received(2, 0.05)
        at_host = heard(host, 0.02)
    assert [frame[12:] for frame in at_victim if frame[6:12] == honest[6:12]] == [honest[12:]], name
    assert not [frame for frame in (*at_victim, *at_host) if FORGED[name][6:40] in frame], name


LEGAL: dict[str, bytes] = {
    "arp-request": arp(BROADCAST, EVIL, 1, (EVIL, HIS), ("00:00:00:00:00:00", HERS)),
    "arp-reply": arp(VICTIM, EVIL, 2, (EVIL, HIS), (VICTIM, HERS)),
    "arp-probe": arp(BROADCAST, EVIL, 1, (EVIL, "0.0.0.0"), ("00:00:00:00:00:00", HIS)),
    "dhcp-discover": from_evil(ip4("0.0.0.0", "255.255.255.255", 17, dhcp(EVIL, 1)), target=BROADCAST),
    "tcp": from_evil(ip4(HIS, HERS, 6, tcp(40000, 22, SYN))),
    "ping": from_evil(ip4(HIS, HERS, 1, echo4())),
    "broadcast": from_evil(ip4(HIS, "10.77.1.255", 17, udp(137, 137)), target=BROADCAST),
    "duplicate-address": six(neighbour(135, HIS6), source="::"),
    "duplicate-address-with-nonce": six(neighbour(135, HIS_LINK, 14, OTHER), source="::"),
    "solicitation": six(neighbour(135, HERS6, 1, EVIL), source=HIS6),
    "advertisement": six(neighbour(136, HIS6, 2, EVIL), source=HIS6),
    "advertisement-of-the-link": six(neighbour(136, HIS_LINK, 2, EVIL)),
    "router-solicitation": six(icmp6(133, b"\0\0\0\0\x01\x01" + bytes.fromhex(EVIL.replace(":", "")))),
    "udp-by-ipv6": six(udp(1, 2), 17, source=HIS6),
    "tcp-by-ipv6": six(tcp(40000, 22, SYN), 6, source=HIS6),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_an_honest_guest_sends_arrives(world: World, name: str) -> None:
    world.send(1, LEGAL[name])
    assert LEGAL[name] in world.received(2, 0.1), name


def test_fragments_arrive_together(world: World) -> None:
    whole = udp(40000, 7777, bytes(range(200)))
    parts = [ip4(HIS, HERS, 17, whole[:64], fragment=0x2000), ip4(HIS, HERS, 17, whole[64:], fragment=8)]
    world.send(1, *map(from_evil, parts))
    got = b"".join(frame[34:] for frame in world.received(2, 0.2))
    assert got.startswith(whole[:6]) and bytes(range(200)) in got
    # The DHCP server's port is in the first of them, which is all that is looked at, and all that anybody can put together.
    whole = udp(67, 68, bytes(200))
    parts = [ip4(HIS, HERS, 17, whole[:64], fragment=0x2000), ip4(HIS, HERS, 17, whole[64:], fragment=8)]
    world.send(1, *map(from_evil, parts))
    assert not any(frame[34:38] == whole[:4] for frame in world.received(2, 0.2))


# --- the host ---------------------------------------------------------------------------------------------------------


def test_e14_e21_the_host_learns_nothing(world: World) -> None:
    before = world.space.run("ip", "-6", "route"), world.space.run("ip", "-6", "addr")
    world.send(1, six(RA), six(behind(44, RA), 44))
    time.sleep(0.2)
    assert (world.space.run("ip", "-6", "route"), world.space.run("ip", "-6", "addr")) == before
    # E21: the only addresses there are those we gave; a segment without IPv6 has none.
    assert "fe80::1/64" in before[1] and before[1].count("fe80::") == 2
    assert "inet6" not in world.space.run("ip", "-6", "addr", "show", "dev", bridge_name(2))
    assert "inet6" not in world.space.run("ip", "-6", "addr", "show", "dev", tap_name(1, 0))


def test_e19_e20_no_service_of_the_host_answers(world: World) -> None:
    world.space.run("ip", "addr", "replace", "192.0.2.77/32", "dev", "lo")
    listener = inside(world.space, lambda: socket.create_server(("0.0.0.0", 2222)))
    gateway = world.gateway_mac(1)
    with listener:
        for target in (GATEWAY, "10.77.2.1", "192.0.2.77", "127.0.0.1"):
            world.send(1, ethernet(gateway, EVIL, 0x0800, ip4(HIS, target, 6, tcp(40001, 2222, SYN))))
            # E20: and nobody tells where the host's other addresses are.
            if target != GATEWAY:
                world.send(1, arp(BROADCAST, EVIL, 1, (EVIL, HIS), ("00:00:00:00:00:00", target)))
        assert world.received(1) == []
        world.send(1, ethernet(gateway, EVIL, 0x0800, ip4(HIS, GATEWAY, 1, echo4())))
        (pong,) = world.received(1)
        assert pong[23] == 1 and pong[34] == 0
        world.send(1, arp(BROADCAST, EVIL, 1, (EVIL, HIS), ("00:00:00:00:00:00", GATEWAY)))
        assert [frame[12:14] for frame in world.received(1)] == [b"\x08\x06"]


@pytest.mark.parametrize(("port", "reached"), [(53, True), (5353, False), (22, False)])
def test_e19_names_are_all_that_the_gateway_has(world: World, port: int, reached: bool) -> None:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("10.77.1.1", port))
        sock.settimeout(0.3)
        return sock

    with inside(world.space, make) as server:
        world.send(1, ethernet(world.gateway_mac(1), EVIL, 0x0800, ip4(HIS, GATEWAY, 17, udp(40000, port, b"question"))))
        try:
            found = server.recv(100) == b"question"
        except TimeoutError:
            found = False
    assert found is reached


def test_e32_of_dnsmasq_everybody_has_a_share(world: World) -> None:
    """Questions of one guest's are bounded, also those that belong to a connection that stands; its neighbours' are not."""

    def ask(number: int, source: str) -> bytes:
        packet = ip4(source, GATEWAY, 17, udp(40000, 53, source.encode()))
        return ethernet(world.gateway_mac(1), mac(number), 0x0800, packet)

    def make() -> socket.socket:
        sock = socket.socket(type=socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((GATEWAY, 53))
        sock.setblocking(False)
        return sock

    with inside(world.space, make) as server:
        world.send(1, ask(1, HIS))
        assert heard(server) == [HIS.encode()]
        server.sendto(b"answer", (HIS, 40000))
        began = time.monotonic()
        world.send(1, *[ask(1, HIS)] * 2000)
        world.send(2, ask(2, HERS))
        questions, lasted = heard(server), time.monotonic() - began
    assert 100 < questions.count(HIS.encode()) < 250 + 50 * lasted and questions.count(HERS.encode()) == 1
    world.received(1)


def test_e32_of_dhcp_everybody_has_a_share(world: World) -> None:
    """Whether by broadcast or to the gateway, and by IPv6; and so has nobody the journal for himself (F14)."""

    def frames(number: int, source: str) -> list[bytes]:
        to, own = world.gateway_mac(1), mac(number)
        found = [ethernet(BROADCAST, own, 0x0800, ip4("0.0.0.0", "255.255.255.255", 17, dhcp(own, 1)))]
        found += [ethernet(to, own, 0x0800, ip4(source, GATEWAY, 17, dhcp(own, 8, own=source)))]
        link = {1: HIS_LINK, 2: HER_LINK}[number]
        found += [ethernet("33:33:00:01:00:02", own, 0x86DD, ip6(link, "ff02::1:2", 17, udp(546, 547)))]
        solicit = icmp6(133, b"\0\0\0\0\x01\x01" + bytes.fromhex(own.replace(":", "")))
        return [*found, ethernet("33:33:00:00:00:02", own, 0x86DD, ip6(link, "ff02::2", 58, solicit))]

    time.sleep(5)  # what the tests before have asked is forgotten
    with sniffer(world.space, bridge_name(1)) as host:
        evils, hers, began = frames(1, HIS), frames(2, HERS), time.monotonic()
        for _ in range(200):
            world.send(1, *evils)
        world.send(2, *hers)
        got, lasted = [frame[6:12] for frame in heard(host)], time.monotonic() - began
    evil, victim = (bytes.fromhex(own.replace(":", "")) for own in (EVIL, VICTIM))
    assert 10 < got.count(evil) < 30 + 5 * lasted and got.count(victim) == 4


def test_e32_pings_of_one_conversation_are_bounded_too(world: World) -> None:
    ping = ethernet(world.gateway_mac(1), EVIL, 0x0800, ip4(HIS, GATEWAY, 1, echo4()))
    began = time.monotonic()
    world.send(1, *[ping] * 1000)
    answers = [frame for frame in world.received(1) if frame[12:14] == b"\x08\x00" and frame[23] == 1]
    assert 1 < len(answers) < 20 + 50 * (time.monotonic() - began)


def test_f08_nobody_has_all_the_resolvers_connections(world: World) -> None:
    """dnsmasq serves so many at a time and no more, whether anything is asked or not."""
    if not world.tapnet.ask(Health())[0]["ok"]["features"]["ct-count"]:
        pytest.skip("this kernel counts no connections")

    def answered(number: int, source: str, count: int) -> int:
        to, own = world.gateway_mac(1), mac(number)
        world.send(number, *(ethernet(to, own, 0x0800, ip4(source, GATEWAY, 6, tcp(41000 + n, 53, SYN))) for n in range(count)))
        frames = [frame for frame in world.received(number, 0.3) if frame[12:14] == b"\x08\x00" and frame[23] == 6]
        return len({frame[36:38] for frame in frames if frame[47] == SYN_ACK})

    with inside(world.space, lambda: socket.create_server((GATEWAY, 53))):
        assert answered(1, HIS, 20) == 3
        assert answered(2, HERS, 1) == 1


def test_e24_no_table_is_flooded(world: World) -> None:
    def entries() -> int:
        return len(world.space.run("bridge", "fdb", "show").splitlines())

    before = entries()
    world.send(1, *(ethernet(BROADCAST, f"06:{n >> 8 & 255:02x}:77:00:00:{n & 255:02x}", 0x0800, HONEST) for n in range(3000)))
    assert entries() == before


def test_e29_the_bridge_keeps_its_mac(world: World) -> None:
    before = world.gateway_mac(1)
    request = struct.pack("16sH14s", b"", 1, bytes.fromhex("000000000001"))
    fcntl.ioctl(world.taps[1], 0x8924, request)  # SIOCSIFHWADDR on the tap's own descriptor: QEMU's seccomp filter refuses it
    try:
        assert world.gateway_mac(1) == before
        world.send(1, ethernet(VICTIM, "00:00:00:00:00:01", 0x0800, HONEST))
        assert not [frame for frame in world.received(2, 0.05) if frame[6:12] == bytes.fromhex("000000000001")]
    finally:
        fcntl.ioctl(world.taps[1], 0x8924, struct.pack("16sH14s", b"", 1, bytes.fromhex(EVIL.replace(":", ""))))


def test_e32_a_storm_is_bounded(world: World) -> None:
    time.sleep(1)  # what the tests before have sent to all is forgotten
    start = time.monotonic()
    question = arp(BROADCAST, EVIL, 1, (EVIL, HIS), ("00:00:00:00:00:00", "10.77.1.99"))
    world.send(1, *[question] * 5000)
    got = sum(frame[:6] == b"\xff" * 6 for frame in world.received(2, 0.2))
    assert 100 < got < 400 + 250 * (time.monotonic() - start) + 100
    # What is for one alone goes on.
    world.send(1, from_evil(HONEST))
    assert world.received(2, 0.1)
    time.sleep(2.5)  # the bucket fills again for those who come after


# --- between segments, outside ----------------------------------------------------------------------------------------


def test_e23_another_segment_is_another_world(world: World) -> None:
    """By its MAC, by all, by way of the gateway or of the tap's other end, and after it was published."""
    packet = ip4(HIS, "10.77.2.2", 17, udp(40000, 80))
    other_end = world.space.run("cat", f"/sys/class/net/{tap_name(1, 0)}/address").strip()
    attempts = [from_evil(packet, target=target) for target in (mac(3), BROADCAST, other_end, world.gateway_mac(1))]
    world.send(1, *attempts)
    assert world.received(3) == []
    world.tapnet.tell(Open(number=3, nic=0, openings=[{"source": bridge_name(1), "proto": "udp", "port": 80}]))
    world.send(1, *attempts, from_evil(ip4(HIS, "10.77.2.2", 17, udp(40000, 81)), target=world.gateway_mac(1)))
    frame = world.received(3)[-1]
    assert frame[36:38] == (80).to_bytes(2, "big")
    back = ethernet(world.gateway_mac(2), mac(3), 0x0800, ip4("10.77.2.2", HIS, 17, udp(80, 40000, b"answer")))
    world.send(3, back)
    assert [frame[42:48] for frame in world.received(1)] == [b"answer"]
    world.send(3, ethernet(world.gateway_mac(2), mac(3), 0x0800, ip4("10.77.2.2", HIS, 17, udp(80, 40009))))
    assert world.received(1) == [], "the other way is not open"
    world.tapnet.tell(Open(number=3, nic=0, openings=[]))
    world.send(1, *attempts)
    world.send(3, back)
    assert world.received(3) == [] and world.received(1) == [], "what is closed is closed for flows that stand, too"


def test_e23_an_opening_is_no_way_for_errors(world: World) -> None:
    """An ICMP error about a flow through an opening would carry bytes of its sender's choice past the opening."""
    world.tapnet.tell(Open(number=3, nic=0, openings=[{"source": bridge_name(1), "proto": "udp", "port": 80}]))
    asked = ip4(HIS, "10.77.2.2", 17, udp(40000, 80))
    world.send(1, from_evil(asked, target=world.gateway_mac(1)))
    assert len(world.received(3)) == 1
    error = struct.pack("!BBHI", 3, 4, 0, 0) + ip4("10.77.2.2", HIS, 17, udp(80, 40000))[:28] + b"smuggled"
    world.send(1, from_evil(ip4(HIS, "10.77.2.2", 1, error), target=world.gateway_mac(1)))
    assert not [frame for frame in world.received(3) if b"smuggled" in frame]
    world.tapnet.tell(Open(number=3, nic=0, openings=[]))


def test_e23_by_ipv6(world: World) -> None:
    def ask(port: int, source: str = HIS6) -> bytes:
        return ethernet(world.gateway_mac(1), EVIL, 0x86DD, ip6(source, "fd77:0:0:4::2", 17, udp6(source, "fd77:0:0:4::2", port)))

    world.space.run("ip", "-6", "neigh", "replace", "fd77:0:0:4::2", "lladdr", mac(7), "dev", bridge_name(4))
    world.send(1, ask(80))
    assert world.received(7) == []
    world.tapnet.tell(Open(number=7, nic=0, openings=[{"source": bridge_name(1), "proto": "udp", "port": 80}]))
    world.send(1, ask(81), ask(80))
    (frame,) = world.received(7)
    assert frame[12:14] == b"\x86\xdd" and frame[56:58] == (80).to_bytes(2, "big")
    world.tapnet.tell(Open(number=7, nic=0, openings=[]))
    world.send(1, ask(80))
    assert world.received(7) == []


def test_e23_isolated_neighbours_do_not_meet(world: World) -> None:
    frame = ethernet(mac(9), mac(8), 0x0800, ip4("10.77.5.2", "10.77.5.3", 17, udp(1, 2)))
    ask = arp(BROADCAST, mac(8), 1, (mac(8), "10.77.5.2"), ("00:00:00:00:00:00", "10.77.5.3"))
    by_gateway = ethernet(world.gateway_mac(5), mac(8), 0x0800, ip4("10.77.5.2", "10.77.5.3", 17, udp(1, 2)))
    world.send(8, frame, ask, by_gateway)
    assert world.received(9) == []


@pytest.mark.parametrize(
    ("number", "segment", "allowed"),
    [(1, 1, {"198.51.100.2"}), (7, 4, {"198.51.100.2", "192.168.5.2"}), (8, 5, set())],
    ids=["internet", "all", "none"],
)
def test_e22_outside_is_where_the_segment_says(
    world: World, outside: Namespace, number: int, segment: int, allowed: set[str]
) -> None:
    own = HIS if number == 1 else f"10.77.{segment}.2"
    reached: dict[str, str] = {}
    with sniffer(outside, "eth0") as wire:
        for target in ("198.51.100.2", "192.168.5.2", "169.254.169.254"):
            packet = ip4(own, target, 17, udp(40000, 9, b"outwards"))
            world.send(number, ethernet(world.gateway_mac(segment), mac(number), 0x0800, packet))
        for frame in heard(wire, 0.3):
            if b"outwards" in frame and frame[23] == 17:
                reached[socket.inet_ntoa(frame[30:34])] = socket.inet_ntoa(frame[26:30])
    assert set(reached) == allowed
    assert all(source.endswith(".1") for source in reached.values()), "the host's own address is on it"
    world.received(number, 0.05)


def test_e22_from_outside_only_what_is_published(world: World, outside: Namespace) -> None:
    gateway = world.space.run("cat", "/sys/class/net/up0/address").strip()
    source = outside.run("cat", "/sys/class/net/eth0/address").strip()

    def knock(target: str, port: int) -> None:
        with sniffer(outside, "eth0") as wire:
            wire.send(ethernet(gateway, source, 0x0800, ip4("198.51.100.2", target, 6, tcp(50000, port, SYN))))

    knock(HERS, 80)
    knock("198.51.100.1", 8080)
    assert world.received(2) == []
    world.tapnet.tell(Open(number=2, nic=0, openings=[{"proto": "tcp", "port": 80, "host_port": 8080}]))
    knock(HERS, 80)
    knock("198.51.100.1", 8081)
    assert world.received(2) == []
    knock("198.51.100.1", 8080)
    frames = world.received(2)
    assert frames and all(frame[36:38] == (80).to_bytes(2, "big") for frame in frames)

    def answers() -> bool:
        with sniffer(outside, "eth0") as wire:
            packet = ip4(HERS, "198.51.100.2", 6, tcp(80, 50000, SYN_ACK))
            world.send(2, ethernet(world.gateway_mac(1), VICTIM, 0x0800, packet))
            return any(frame[34:36] == (8080).to_bytes(2, "big") for frame in heard(wire, 0.2))

    assert answers()
    world.received(2)  # the other machine knows of no such connection, and says so
    world.tapnet.tell(Open(number=2, nic=0, openings=[]))
    assert not answers()
    knock("198.51.100.1", 8080)
    assert world.received(2) == [], "what is closed is closed for connections that stand, too"


@pytest.mark.parametrize(
    ("number", "segment", "own", "allowed"),
    [(1, 1, HIS6, {"2001:db8:5::2"}), (7, 4, "fd77:0:0:4::2", {"2001:db8:5::2", "fd99::2"})],
    ids=["internet", "all"],
)
def test_e22_outside_by_ipv6(world: World, outside: Namespace, number: int, segment: int, own: str, allowed: set[str]) -> None:
    reached: dict[str, str] = {}
    with sniffer(outside, "eth0") as wire:
        for target in ("2001:db8:5::2", "fd99::2", "fd00:ec2::254"):
            packet = ip6(own, target, 17, udp6(own, target, 9, b"outwards"))
            world.send(number, ethernet(world.gateway_mac(segment), mac(number), 0x86DD, packet))
        for frame in heard(wire, 0.3):
            if b"outwards" in frame and frame[20] == 17:
                source, target = (socket.inet_ntop(socket.AF_INET6, frame[at : at + 16]) for at in (22, 38))
                reached[target] = source
    assert set(reached) == allowed
    assert not any(source.startswith("fd77") for source in reached.values()), "the host's own address is on it"


@pytest.mark.parametrize("way", ["its own name server", "an opening"])
def test_f08_nor_by_other_ways(world: World, way: str) -> None:
    gateway, target, port = world.gateway_mac(1), GATEWAY, 53
    if way == "an opening":
        target, port = "10.77.4.2", 80
        world.tapnet.tell(Open(number=7, nic=0, openings=[{"source": bridge_name(1), "proto": "udp", "port": port}]))
    for proto in (udp, lambda own, port: tcp(own, port, SYN)):
        number = 17 if proto is udp else 6
        packets = [ip4(HIS, target, number, proto(20000 + n, port)) for n in range(6000)]
        world.send(1, *(from_evil(packet, target=gateway) for packet in packets))
    assert int(world.space.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count")) < 4200
    world.tapnet.tell(Open(number=7, nic=0, openings=[]))
    for number in (1, 7):
        world.received(number)


def test_f08_one_guest_does_not_fill_the_table_of_connections(world: World, outside: Namespace) -> None:
    gateway = world.gateway_mac(1)
    packets = [ip4(HIS, "198.51.100.2", 17, udp(20000 + n, 9)) for n in range(6000)]
    world.send(1, *(from_evil(packet, target=gateway) for packet in packets))
    count = int(world.space.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count"))
    assert 3000 < count < 4200
    with sniffer(outside, "eth0") as wire:
        packet = ip4(HERS, "198.51.100.2", 17, udp(40000, 9, b"somebody else"))
        world.send(2, ethernet(gateway, VICTIM, 0x0800, packet))
        assert any(b"somebody else" in frame for frame in heard(wire, 0.3))


def test_a_service_network_lets_consumers_to_what_is_published(world: World) -> None:
    consumer, neighbour_, provider = mac(4), mac(5), mac(6)

    def ask(port: int, proto: int = 6) -> bytes:
        body = tcp(40000, port, SYN) if proto == 6 else udp(40000, port)
        return ethernet(provider, consumer, 0x0800, ip4("10.77.3.2", "10.77.3.4", proto, body))

    world.send(4, ask(5432), ask(22))
    assert world.received(6) == []
    world.tapnet.tell(Open(number=6, nic=0, openings=[{"source": tap_name(4, 0), "proto": "tcp", "port": 5432}]))
    world.send(4, ask(22), ask(5432, 17), ask(5432))
    world.send(5, ethernet(provider, neighbour_, 0x0800, ip4("10.77.3.3", "10.77.3.4", 6, tcp(40000, 5432, SYN))))
    (frame,) = world.received(6)
    assert frame == ask(5432)

    def answer(flags: int, sport: int = 5432) -> bytes:
        return ethernet(consumer, provider, 0x0800, ip4("10.77.3.4", "10.77.3.2", 6, tcp(sport, 40000, flags)))

    world.send(6, answer(SYN_ACK), answer(SYN), answer(ACK, 22), answer(ACK))
    assert world.received(4) == [answer(SYN_ACK), answer(ACK)]
    world.send(4, ethernet(neighbour_, consumer, 0x0800, ip4("10.77.3.2", "10.77.3.3", 6, tcp(1, 5432, SYN))))
    assert world.received(5) == []
    # Another provider is a stranger, too.
    other = ethernet(provider, mac(10), 0x0800, ip4("10.77.3.5", "10.77.3.4", 6, tcp(40000, 5432, SYN)))
    world.send(10, other)
    assert world.received(6) == []
    world.tapnet.tell(Open(number=6, nic=0, openings=[{"source": tap_name(10, 0), "proto": "tcp", "port": 5432}]))
    world.send(10, other, ethernet(provider, mac(10), 0x0800, ip4("10.77.3.5", "10.77.3.4", 6, tcp(40000, 22, SYN))))
    assert world.received(6) == [other]
    world.tapnet.tell(Open(number=6, nic=0, openings=[]))


@pytest.mark.parametrize("called", ["0", "1"])
def test_what_is_published_on_a_service_network_may_come_in_fragments(world: World, called: str) -> None:
    """Of those only the first has a port. Where the host puts them together (*called*) it makes no difference."""
    if os.path.exists("/proc/sys/net/bridge/bridge-nf-call-iptables"):
        world.space.set("bridge/bridge-nf-call-iptables", called)
    whole = udp(40000, 5433, bytes(600))
    parts = ((whole[:304], 0x2000), (whole[304:], 304 // 8))
    frames = [ethernet(mac(6), mac(4), 0x0800, ip4("10.77.3.2", "10.77.3.4", 17, part, fragment=at)) for part, at in parts]
    world.send(4, *frames)
    assert not any(frame[34:42] == whole[:8] for frame in world.received(6))
    world.tapnet.tell(Open(number=6, nic=0, openings=[{"source": tap_name(4, 0), "proto": "udp", "port": 5433}]))
    world.send(4, *frames)
    assert b"".join(frame[34:] for frame in world.received(6)) == whole
    world.tapnet.tell(Open(number=6, nic=0, openings=[]))


# --- from the host's own users ----------------------------------------------------------------------------------------


def test_a06_a07_a_users_sockets_reach_own_vms_only(world: World) -> None:
    assert connects(world, 4001, HIS, 22) == "waits"
    assert any(frame[36:38] == (22).to_bytes(2, "big") for frame in world.received(1))
    assert connects(world, 4001, HERS, 22) == "refused"
    assert not [frame for frame in world.received(2) if frame[12:14] == b"\x08\x00"]
    assert connects(world, 0, HERS, 22) == "waits"
    world.received(2)


def test_answers_of_dhcp_reach_a_guest_by_its_address(world: World) -> None:
    """One that asks whether it may keep its address asks everybody, and is answered alone. Port 67 is no user's."""
    world.space.set("ipv4/ip_unprivileged_port_start", "67")
    assert sends(world, 4999, 67, HIS, 68) == "sent waits"
    assert sends(world, 4999, 68, HIS, 68) == "refused"
    world.received(1)


def test_a06_a07_confined_users_reach_nothing_else(world: World) -> None:
    with inside(world.space, lambda: socket.create_server(("0.0.0.0", 2300))):
        assert connects(world, 4001, "127.0.0.1", 2300) == "connected"
        world.tapnet.tell(Settings(pool4=SETTINGS.pool4, pool6=SETTINGS.pool6, confined=[4001]))
        assert connects(world, 4001, "127.0.0.1", 2300) == "refused"
        assert connects(world, 4001, "192.0.2.77", 2300) == "refused"
        assert connects(world, 4001, HERS, 22) == "refused"
        assert connects(world, 4001, HIS, 22) == "waits"
        assert connects(world, 4002, "127.0.0.1", 2300) == "connected", "who is not confined is not"
        world.tapnet.tell(SETTINGS)
    world.received(1)


def test_a07_what_is_remembered_of_anothers_datagrams_opens_nothing(world: World) -> None:
    """Who takes over the port of a socket that is closed is asked who he is, though the host still knows the connection."""
    gateway = world.gateway_mac(1)

    def answers() -> None:
        while True:
            for frame in world.received(1, 0.05):
                if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == b"\x00\x35":
                    back = ip4(HIS, socket.inet_ntoa(frame[26:30]), 17, udp(53, int.from_bytes(frame[34:36], "big"), b"answer"))
                    world.send(1, from_evil(back, target=gateway))
                    return

    assert sends(world, 4002, 5555, HIS, 53) == "refused"
    guest = threading.Thread(target=answers)
    guest.start()
    assert sends(world, 4001, 5555, HIS, 53) == "sent answer"
    guest.join()
    assert sends(world, 4002, 5555, HIS, 53) == "refused"
    assert sends(world, 0, 5555, HIS, 53) == "sent waits"
    world.received(1)


def test_a06_nor_does_it_to_who_is_confined(world: World) -> None:
    with inside(world.space, lambda: socket.socket(type=socket.SOCK_DGRAM)) as service:
        service.bind(("127.0.0.1", 9000))
        world.tapnet.tell(Settings(pool4=SETTINGS.pool4, pool6=SETTINGS.pool6, confined=[4001]))
        assert sends(world, 4001, 6666, "127.0.0.1", 9000) == "refused"
        assert sends(world, 4005, 6666, "127.0.0.1", 9000) == "sent waits"
        service.sendto(b"answer", service.recvfrom(99)[1])  # and now it is a connection of two sides
        assert sends(world, 4001, 6666, "127.0.0.1", 9000) == "refused"
        world.tapnet.tell(SETTINGS)


def test_a07_a_tcp_connection_that_is_remembered_has_no_heir(world: World) -> None:
    """Its guest is gone in the middle of it and does not confirm the end; then it, or another with its address, is back."""
    gateway = world.gateway_mac(1)
    world.space.set("ipv4/tcp_orphan_retries", "1")
    stop = threading.Event()

    def guest() -> None:
        while not stop.is_set():
            for frame in world.received(1, 0.05):
                if frame[12:14] == b"\x08\x00" and frame[23] == 6 and frame[47] & 0x12 == SYN:
                    sequence = int.from_bytes(frame[38:42], "big") + 1
                    back = int.from_bytes(frame[34:36], "big")
                    segment = struct.pack("!HHIIBBHHH", 22, back, 1000, sequence, 0x50, SYN_ACK, 1024, 0, 0)
                    world.send(1, from_evil(ip4(HIS, socket.inet_ntoa(frame[26:30]), 6, segment), target=gateway))

    answering = threading.Thread(target=guest)
    answering.start()
    try:
        assert connects(world, 4001, HIS, 22, own=5555) == "connected"
        until = time.monotonic() + 60
        while f":{5555:04X}" in world.space.run("cat", "/proc/net/tcp"):
            assert time.monotonic() < until
            time.sleep(0.2)
        assert connects(world, 4002, HIS, 22, own=5555) == "refused"
        assert connects(world, 4001, HIS, 22, own=5556) == "connected"
    finally:
        stop.set()
        answering.join()
