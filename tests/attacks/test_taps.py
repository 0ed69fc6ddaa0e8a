"""E12, E18, E20, E25 to E33: what can be done with taps, names, MACs and descriptors rather than with frames for a neighbour."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frames import BROADCAST, SYN, arp, ethernet, ip4, tagged, tcp, udp
from tests.process.networld import EVIL, GATEWAY, HERS, HIS, VICTIM, World, frames_from, heard, inside, outside, sniffer, world
from tests.process.tapnets import PATIENCE, SETTINGS, Namespace, Tapnet, Thief, mac, namespace, passes, port, segment, unable
from vmshell import wire
from vmshell.messages import Health, Segment, Settle, Unplug
from vmshell.numbering import bridge_name, tap_name

__all__ = ["namespace", "outside", "world"]
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(unable()), reason=unable() or "-")]

TUNSETIFF, TUNGETIFF, TUNSETPERSIST = 0x400454CA, 0x800454D2, 0x400454CB
OFFLOADING = 0x4000  # IFF_VNET_HDR
RESERVED = ("01:80:c2:00:00:00", "01:80:c2:00:00:02", "01:80:c2:00:00:03", "01:80:c2:00:00:0e", "01:80:c2:00:00:0f")


@pytest.fixture
def tapnet(namespace: Namespace, tmp_path: Path) -> Iterator[Tapnet]:
    with Tapnet(namespace, tmp_path / "t") as running:
        running.settle(segment())
        yield running


def services(world: World) -> socket.socket:
    """A service of the host's that listens everywhere, and routes that let it answer."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("0.0.0.0", 5353))
        sock.setblocking(False)
        return sock

    world.space.run("ip", "addr", "replace", "192.0.2.77/32", "dev", "lo")
    for name in ("all", "default", bridge_name(1), tap_name(1, 0)):
        world.space.set(f"ipv4/conf/{name}/rp_filter", "0")
    return inside(world.space, make)


def frames_for_the_host(target: str) -> list[bytes]:
    """All sorts, from one's own address and from others', to every address that the host has."""
    frames = [
        ethernet(target, EVIL, 0x0800, ip4(source, to, 17, udp(40000, 5353)))
        for source in (HIS, HERS, "0.0.0.0", "203.0.113.9")
        for to in (GATEWAY, "10.77.2.1", "192.0.2.77", "255.255.255.255")
    ]
    frames += [ethernet(target, EVIL, 0x0800, ip4(HIS, to, 6, tcp(40000, 22, SYN))) for to in (GATEWAY, "192.0.2.77")]
    frames += [arp(target, EVIL, 1, (EVIL, source), (BROADCAST, "192.0.2.77")) for source in (HIS, "0.0.0.0")]
    return frames


def test_e18_what_bridges_keep_for_themselves_is_no_way_past_the_filter(world: World) -> None:
    """Frames to 01:80:c2:00:00:0x are not bridged: the host's own stack would get them from the tap, unjudged."""
    with services(world) as service:
        for target in RESERVED:
            world.send(1, *frames_for_the_host(target))
        time.sleep(0.2)
        with pytest.raises(BlockingIOError):
            service.recv(100)
        assert world.received(1) == [] and world.received(2) == []


def test_e20_a_tap_without_its_bridge_is_no_way_into_the_host(world: World) -> None:
    """tapnet would put it back at once, so it is held."""
    world.tapnet.process.send_signal(signal.SIGSTOP)
    try:
        world.space.run("ip", "link", "set", tap_name(1, 0), "nomaster")
        own = world.space.run("cat", f"/sys/class/net/{tap_name(1, 0)}/address").strip()
        with services(world) as service:
            for target in (own, BROADCAST):
                world.send(1, *frames_for_the_host(target))
            time.sleep(0.2)
            with pytest.raises(BlockingIOError):
                service.recv(100)
            assert world.received(1) == []
    finally:
        world.tapnet.process.send_signal(signal.SIGCONT)
    end = time.monotonic() + 60
    while "master" not in world.space.detail(tap_name(1, 0)):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_e17_a_guest_on_a_vlan_is_on_no_other(tapnet: Tapnet, namespace: Namespace) -> None:
    if not tapnet.ask(Health())[0]["ok"]["features"]["vlan"]:
        pytest.skip("this kernel has no VLANs (8021q)")
    namespace.run("ip", "link", "add", "wire0", "up", "type", "veth", "peer", "name", "wire1")
    namespace.run("ip", "link", "set", "wire1", "up")
    for far in ("12", "13"):
        namespace.run("ip", "link", "add", "link", "wire1", "name", f"far{far}", "up", "type", "vlan", "id", far)
    tapnet.tell(Segment(segment=2, kind="bridged", parent="wire0", vlan=12))
    guest = tapnet.plug(port(1, segment=2, address4=""))
    os.set_blocking(guest, False)
    mark = os.urandom(8)
    outwards = ethernet(BROADCAST, mac(1), 0x0800, ip4(HIS, HERS, 17, udp(40000, 7777, mark)))
    inwards = ethernet(mac(1), VICTIM, 0x0800, ip4(HERS, HIS, 17, udp(40000, 7777, mark)))
    with sniffer(namespace, "far12") as right, sniffer(namespace, "far13") as wrong, sniffer(namespace, "wire1") as wire1:
        os.write(guest, outwards)
        assert outwards in heard(right) and outwards not in heard(wrong)
        heard(wire1)
        for kind in (0x8100, 0x88A8):
            for vlan in (0, 12, 13):
                os.write(guest, tagged(outwards, kind, vlan))
        assert not any(mark in frame for frame in heard(wire1))
        for ear, comes in ((right, True), (wrong, False), (wire1, False)):
            ear.send(inwards)
            assert (inwards in got(guest)) is comes
    os.close(guest)


@pytest.fixture
def bridged(tapnet: Tapnet, namespace: Namespace) -> Iterator[dict[int, int]]:
    """Taps by VM: 1 and 2 on a network of ours, 5 on the host's own, `host0`, of which wire1 is another machine."""
    namespace.run("ip", "link", "add", "host0", "up", "type", "bridge")
    namespace.run("ip", "link", "add", "wire0", "master", "host0", "up", "type", "veth", "peer", "name", "wire1")
    namespace.run("ip", "link", "set", "wire1", "up")
    tapnet.tell(Segment(segment=2, kind="bridged", bridge="host0"))
    taps = {number: tapnet.plug(port(number)) for number in (1, 2)}
    taps[5] = tapnet.plug(port(5, segment=2, address4=""))
    for tap in taps.values():
        os.set_blocking(tap, False)
    yield taps
    for tap in taps.values():
        os.close(tap)


def got(tap: int, seconds: float = 0.2) -> list[bytes]:
    return list(frames_from(lambda: os.read(tap, 1 << 16), tap, seconds))


def test_e14_fragments_of_two_networks_are_not_put_together(bridged: dict[int, int], namespace: Namespace) -> None:
    """Where br_netfilter is at work. Who is on the host's own network names any source: with the other half of a datagram of
    somebody else's he would read it, or write into it."""
    datagram = udp(40000, 7777, b"S" * 600)
    head, tail = (
        ethernet(mac(2), mac(1), 0x0800, ip4(HIS, HERS, 17, part, fragment=place))
        for part, place in ((datagram[:304], 0x2000), (datagram[304:], 304 // 8))
    )
    evil = ethernet(BROADCAST, mac(5), 0x0800, b"")
    with sniffer(namespace, "wire1") as wire1:
        os.write(bridged[5], evil + ip4(HIS, HERS, 17, b"E" * 304, fragment=304 // 8))
        os.write(bridged[1], head)
        assert [frame[14:] for frame in got(bridged[2]) if b"SSS" in frame] in ([], [head[14:]]), "he wrote into it"
        assert not any(b"SSS" in frame for frame in heard(wire1))
        os.write(bridged[5], evil + ip4(HIS, HERS, 17, udp(40000, 7777, b"E" * 600)[:304], fragment=0x2000))
        for frame in (head, tail):
            os.write(bridged[1], frame)
        assert not any(b"SSS" in frame for frame in heard(wire1, 0.3)), "he read it"
        arrived = b"".join(frame[34:] for frame in got(bridged[2]))
        assert arrived.count(b"S") == 600 and b"E" not in arrived


def test_f08_a_bridged_guest_does_not_fill_the_table_of_connections(bridged: dict[int, int], namespace: Namespace) -> None:
    """Nor does it by frames to MACs like those of our gateways, which the host judges."""
    for number in range(3000):
        frame = ip4("192.0.2.77", "192.0.2.9", 17, udp(10000 + number, 9))
        os.write(bridged[5], ethernet("06:ff:00:12:34:56", mac(5), 0x0800, frame))
    assert int(namespace.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count")) < 100


@pytest.mark.parametrize("called", ["0", "1"])
def test_e22_the_taps_own_end_is_no_way_out(world: World, outside: Namespace, called: str) -> None:
    """With br_netfilter (*called*) what went there was routed as nobody's connection: outside it had the guest's own address."""
    switch = "bridge/bridge-nf-call-iptables"
    if os.path.exists(f"/proc/sys/net/{switch}"):
        world.space.set(switch, called)
    packet = ip4(HIS, "198.51.100.2", 17, udp(3333, 9, b"outwards"))
    with sniffer(outside, "eth0") as wire:
        for target in ("fe" + EVIL[2:], world.gateway_mac(1)):
            world.send(1, ethernet(target, EVIL, 0x0800, packet))
        datagrams = [frame[26:30] for frame in heard(wire, 0.3) if frame[12:14] == b"\x08\x00" and frame[23] == 17]
    assert list(map(socket.inet_ntoa, datagrams)) == ["198.51.100.1"]


@pytest.mark.parametrize("flags", [0x1002, 0x1002 | OFFLOADING, 0x1002 | 0x0100])
def test_e12_no_frame_is_changed_after_it_was_judged(world: World, flags: int) -> None:
    """With offloading a guest names the place of a checksum, and the kernel writes it there behind the filter's back: an ARP
    sender, a port, an ICMPv6 type. The tap has none, and whoever holds it cannot get it."""
    got, has = struct.unpack("16sH22x", fcntl.ioctl(world.taps[1], TUNGETIFF, bytes(40)))
    assert got.rstrip(b"\0").decode() == tap_name(1, 0) and not has & OFFLOADING
    with pytest.raises(OSError):
        fcntl.ioctl(world.taps[1], TUNSETIFF, struct.pack("16sH22x", got, flags))
    header = struct.pack("<BBHHHH", 1, 0, 0, 0, 34, 6)  # NEEDS_CSUM, from byte 34 on, into byte 40
    forged = ethernet(VICTIM, EVIL, 0x0800, ip4(HIS, HERS, 17, udp(40000, 7777)))
    with sniffer(world.space, bridge_name(1)) as host:
        world.send(1, header + forged)
        assert world.received(2, 0.1) == [] and heard(host, 0.05) == []


def test_e25_names_follow_from_numbers(tapnet: Tapnet, namespace: Namespace) -> None:
    """VMs whose names share twenty letters have nothing in common here; what the kernel would cut or fill in is refused."""
    numbers = (0x100001, 0x100002, 0xAFFFFF)
    fds = [tapnet.plug(port(number, address4=f"10.77.1.{last}")) for last, number in enumerate(numbers, 2)]
    assert {tap_name(number, 0) for number in numbers} <= set(namespace.links())
    for name in ("vm-alice-webserver-01", "br%d", "-x", "br\x1b", "brü"):
        body = {"id": 9, "verb": "segment", "segment": 2, "kind": "bridged", "bridge": name}
        wire.send(tapnet.broker, body)
        assert "error" in tapnet.receive()[1], name
    beyond = {"id": 9, "verb": "port", "number": 0xB00000, "nic": 0, "segment": 1, "mac": mac(1), "create": True}
    wire.send(tapnet.broker, beyond)
    assert "error" in tapnet.receive()[1], "its tap would be called like a bridge"
    for fd in fds:
        os.close(fd)


def test_e26_nobody_else_gets_a_tap(tapnet: Tapnet, namespace: Namespace, short_tmp: Path) -> None:
    """Held by its QEMU: attaching is refused, to root as busy, to others at all, though everybody may open the device."""
    fd = tapnet.plug(port(1))
    node = short_tmp / "tun"
    os.mknod(node, 0o020666, os.stat("/dev/net/tun").st_rdev)
    node.chmod(0o666)

    def attach(uid: int, flags: int = 0x1002) -> str:
        code = (
            f"import fcntl, os, struct; os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n"
            f"fd = os.open({str(node)!r}, os.O_RDWR); name = {tap_name(1, 0)!r}.encode()\n"
            f"fcntl.ioctl(fd, {TUNSETIFF}, struct.pack('16sH22x', name, {flags})); print('attached')"
        )
        done = subprocess.run(namespace.command(sys.executable, "-c", code), capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "Device or resource busy" in attach(0) and "Invalid argument" in attach(0, 0x1102)
    assert "Operation not permitted" in attach(4002) and "Invalid argument" in attach(4002, 0x1102)
    details = namespace.detail(tap_name(1, 0))
    assert "persist off" in details and "user root" in details
    os.close(fd)
    assert tap_name(1, 0) not in namespace.links()


def test_e28_a_tap_that_its_holder_made_to_stay_is_removed(tapnet: Tapnet, namespace: Namespace) -> None:
    """QEMU's seccomp filter refuses it (tests/vm/test_jail.py); should it ever not, the tap goes with its VM all the same."""
    fd, other = tapnet.plug(port(1)), tapnet.plug(port(2))
    for each in (fd, other):
        fcntl.ioctl(each, TUNSETPERSIST, 1)
        os.close(each)
    assert {tap_name(1, 0), tap_name(2, 0)} <= set(namespace.links())
    tapnet.tell(Unplug(number=1, nic=0))
    assert tap_name(1, 0) not in namespace.links()
    tapnet.kill()  # and with nobody to say that it has ended
    tapnet.start()
    tapnet.settle(segment())
    assert namespace.links() == {}


def test_e30_a_storm_of_kills_leaves_nothing(namespace: Namespace, tmp_path: Path) -> None:
    chance = random.Random(30)
    tapnet = Tapnet(namespace, tmp_path / "t")
    fds: list[int] = []
    try:
        for turn in range(12):
            tapnet.settle(segment(), segment(2))
            for number in range(1, 30):
                tapnet.send(port(number, segment=1 + number % 2, rate=1000 * (number % 3)))
            for _ in range(chance.randrange(29)):
                _, body, fd = tapnet.receive()
                assert "ok" in body, (turn, body)
                fds.append(fd)
            tapnet.kill()
            while fds:
                os.close(fds.pop())
            tapnet.start()
        tapnet.settle()
        assert namespace.links() == {} and '"vt000' not in namespace.filter()
        assert tapnet.ask(Health())[0]["ok"]["problems"] == []
    finally:
        tapnet.close()


def test_e31_without_rules_there_is_no_tap(namespace: Namespace, tmp_path: Path) -> None:
    """nftables refuses: no port is made. And a tap that no rule knows is mute, whoever put it into the bridge."""
    with Tapnet(namespace, tmp_path / "t") as tapnet:
        tapnet.settle(segment())
        one = tapnet.plug(port(1))
        namespace.run("ip", "tuntap", "add", "vt00ffffn0", "mode", "tap")
        namespace.run("ip", "link", "set", "vt00ffffn0", "master", bridge_name(1), "up")
        unknown = subprocess.Popen(
            namespace.command(sys.executable, "-c", TALK, "vt00ffffn0", ethernet(mac(1), mac(9), 0x0806, bytes(28)).hex()),
        )
        assert unknown.wait(PATIENCE) == 0
        os.set_blocking(one, False)
        with pytest.raises(BlockingIOError):
            while True:
                assert os.read(one, 2000)[6:12] != bytes.fromhex(mac(9).replace(":", ""))
        namespace.run("ip", "link", "del", "vt00ffffn0")
        thief = Thief(namespace)
        assert "nftables refused the filter" in tapnet.refused(port(2)) and tap_name(2, 0) not in namespace.links()
        thief.leave()
        os.close(one)


TALK = """
import fcntl, os, struct, sys, time
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))
for _ in range(5):
    os.write(fd, bytes.fromhex(sys.argv[2]))
time.sleep(0.2)
"""


def test_e32_tiny_frames_hurt_nobody(world: World) -> None:
    for size in (0, 1, 13, 14, 15, 20):
        with contextlib.suppress(OSError):
            world.send(1, *[ethernet(VICTIM, EVIL, 0x0800, bytes(6))[:size]] * 500)
    world.received(2, 0.05)
    world.send(1, ethernet(VICTIM, EVIL, 0x0800, ip4(HIS, HERS, 17, udp(1, 2))))
    assert len(world.received(2, 0.1)) == 1


def test_e32_a_rate_holds_for_what_a_guest_sends(tapnet: Tapnet) -> None:
    """800 kbit/s: what went beyond a second's worth and a burst at the beginning is that much in each further second."""
    fd, other = tapnet.plug(port(1, rate=800)), tapnet.plug(port(2))
    for each in (fd, other):
        os.set_blocking(each, False)
    frame = ethernet(mac(2), mac(1), 0x0800, ip4("10.77.1.2", "10.77.1.3", 17, udp(1, 2, bytes(1000))))
    got, seconds = [], 4
    for _ in range(seconds):
        count, end = 0, time.monotonic() + 1
        while time.monotonic() < end:
            os.write(fd, frame)
            with contextlib.suppress(BlockingIOError):
                while True:
                    count += len(os.read(other, 2000))
        got.append(count)
    assert all(70_000 < count < 130_000 for count in got[1:]), got
    os.close(fd)
    os.close(other)


def test_e33_two_cards_with_one_mac(tapnet: Tapnet, namespace: Namespace) -> None:
    """In one batch, one after the other, and by two segments that are one bridge of the host's."""
    namespace.run("ip", "link", "add", "host0", "type", "bridge")
    tapnet.tell(*(Segment(segment=number, kind="bridged", bridge="host0") for number in (2, 3)))
    wanted = [port(1), port(2, mac=mac(1)), port(3, segment=2, address4=""), port(4, segment=3, address4="", mac=mac(3))]
    idents = [tapnet.send(one) for one in wanted]
    answers = [tapnet.receive() for _ in idents]
    assert ["ok" in body for _, body, _ in answers] == [True, False, True, False], answers
    assert "another card on this network has the MAC" in answers[1][1]["error"]["text"]
    assert "another card on this network has the MAC" in tapnet.refused(port(5, mac=mac(1)))
    elsewhere = tapnet.plug(port(6, segment=2, address4="", mac=mac(1)))  # where it is nobody's
    for fd in (answers[0][2], answers[2][2], elsewhere):
        os.close(fd)


def test_e33_a_mac_is_free_again_with_its_card(tapnet: Tapnet) -> None:
    tapnet.tell(SETTINGS, Settle())
    os.close(tapnet.plug(port(1)))
    tapnet.tell(Unplug(number=1, nic=0))
    one, two = tapnet.plug(port(2, mac=mac(1))), tapnet.plug(port(3))
    assert not passes(one, two, 2, 3, 0.3), "but it speaks for its own address only"
    os.close(one)
    os.close(two)
