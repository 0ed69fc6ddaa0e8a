"""B20: a session's guest writes raw frames to what leads to passt; nothing that listens on the host's loopback hears of them.

As the broker starts it, sieve and passt of this machine, in a network of the test's own: a host with a way to a machine outside.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import select
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.frames import (
    BROADCAST,
    SYN,
    arp,
    dhcp,
    echo4,
    ethernet,
    icmp6,
    ip4,
    ip6,
    mac_bytes,
    neighbour,
    tagged,
    tcp,
    udp,
    udp6,
)
from tests.process.networld import inside
from tests.process.tapnets import Namespace, unable
from vmshell.broker.host.processes import Host, Process
from vmshell.broker.network import passt
from vmshell.broker.network.interfaces import Interface
from vmshell.broker.runtime.loop import Loop
from vmshell.layout import Layout
from vmshell.model.catalogues import Network
from vmshell.model.definition import Nic

missing = unable() or ("" if passt.available() else "passt is not installed")
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(missing), reason=missing or "-")]

GUEST, ROUTER = "06:00:00:00:00:01", "52:54:00:00:00:99"
HOST, OUTSIDE, HOST6, OUTSIDE6 = "192.0.2.2", "192.0.2.1", "2001:db8::2", "2001:db8::1"
STREAMS, DATAGRAMS = 8888, 9999
HERE = ("127.0.0.1", "127.1.2.3", "127.0.0.53", "0.0.0.0", "0.0.0.1", "255.255.255.255", "224.0.0.1")
HERE6 = ("::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::127.0.0.1", "::ffff:0:127.0.0.1", "ff01::1", "ff02::1")
PORTS = itertools.count(20000)  # a guest's own; each once, or passt takes two connections for one


class Listeners:
    """A stream and a datagram service on each of some addresses."""

    def __init__(self, space: Namespace, *addresses: str) -> None:
        self._socks: dict[str, socket.socket] = {}
        for address in addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            for kind, port in ((socket.SOCK_STREAM, STREAMS), (socket.SOCK_DGRAM, DATAGRAMS)):
                sock = inside(space, functools.partial(socket.socket, family, kind))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((address, port))
                self._socks[f"{kind.name} {address}"] = sock
        for sock in self._socks.values():
            sock.setblocking(False)
            if sock.type == socket.SOCK_STREAM:
                sock.listen(100)

    def heard(self, seconds: float, until: int = 1000) -> list[str]:
        """What they get within *seconds* of silence, or *until* there are so many."""
        found: list[str] = []
        while len(found) < until and (ready := select.select(self._socks.values(), [], [], seconds)[0]):
            for name, sock in self._socks.items():
                if sock in ready:
                    with contextlib.suppress(BlockingIOError):
                        if sock.type == socket.SOCK_STREAM:
                            sock.accept()[0].close()
                        else:
                            sock.recv(100)
                        found.append(name)
        return found

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()


class Recorder(Host):
    """Remembers what it started."""

    def spawn(self, argv: Sequence[str], fds: Mapping[int, int], **more: int) -> Process:
        process = super().spawn(argv, fds, **more)
        self.started: list[Process] = [*getattr(self, "started", ()), process]
        return process


class Guest:
    """What QEMU would hold: the stream, with frames to send and those that came."""

    def __init__(self, space: Namespace, layout: Layout) -> None:
        self.host = Recorder(embedded=True)
        way_out = passt.Passt(host=self.host, loop=Loop(lambda exc: pytest.fail(str(exc))))
        interface = Interface(0, Nic(), Network(kind="user"), GUEST)
        self.sock = inside(space, lambda: socket.socket(fileno=way_out.start_all([interface])[0]))
        self.sock.settimeout(60)
        self._stream = b""

    def send(self, *frames: bytes) -> None:
        for frame in frames:
            self.sock.sendall(len(frame).to_bytes(4, "big") + frame)

    def received(self, seconds: float) -> Iterator[bytes]:
        """The frames that come within *seconds* of silence."""
        while select.select([self.sock], [], [], seconds)[0]:
            self._stream += self.sock.recv(1 << 16)
            while len(self._stream) >= 4 and len(self._stream) >= (end := 4 + int.from_bytes(self._stream[:4], "big")):
                frame, self._stream = self._stream[4:end], self._stream[end:]
                yield frame

    def close(self) -> None:
        """As where QEMU ends: nobody is left."""
        self.sock.close()
        self.all_end()

    def all_end(self) -> None:
        for process in self.host.started:
            assert select.select([process.pidfd], [], [], 60)[0]


@pytest.fixture(scope="module")
def networks() -> Iterator[tuple[Namespace, Namespace]]:
    """The host's, and behind its way out a machine's outside."""
    space, far = Namespace(), Namespace()
    try:
        space.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", far.name)
        for where, link, address, address6 in ((space, "up0", HOST, HOST6), (far, "eth0", OUTSIDE, OUTSIDE6)):
            where.run("ip", "addr", "add", f"{address}/24", "dev", link)
            where.run("ip", "-6", "addr", "add", f"{address6}/64", "dev", link, "nodad")
            where.run("ip", "link", "set", link, "up")
        space.run("ip", "route", "add", "default", "via", OUTSIDE)
        space.run("ip", "-6", "route", "add", "default", "via", OUTSIDE6)
        end = time.monotonic() + 60
        while "tentative" in space.run("ip", "-6", "addr", "show", "dev", "up0"):
            assert time.monotonic() < end
            time.sleep(0.05)
        yield space, far
    finally:
        far.close()
        space.close()


@pytest.fixture
def host(networks: tuple[Namespace, Namespace]) -> Namespace:
    return networks[0]


@pytest.fixture
def listeners(host: Namespace) -> Iterator[Listeners]:
    """What the guest is after."""
    with contextlib.closing(Listeners(host, "127.0.0.1", "::1")) as made:
        yield made


@pytest.fixture
def outside(networks: tuple[Namespace, Namespace]) -> Iterator[Listeners]:
    with contextlib.closing(Listeners(networks[1], OUTSIDE, OUTSIDE6)) as made:
        yield made


@pytest.fixture
def guest(host: Namespace, layout: Layout) -> Iterator[Guest]:
    with contextlib.closing(Guest(host, layout)) as made:
        yield made


def frames_to(target: str, source: str = "") -> list[bytes]:
    """A stream's first frame and a datagram."""
    if ":" in target:
        source = source or HOST6
        both = [(6, tcp(next(PORTS), STREAMS, SYN)), (17, udp6(source, target, DATAGRAMS))]
        return [ethernet(ROUTER, GUEST, 0x86DD, ip6(source, target, header, payload)) for header, payload in both]
    both = [(6, tcp(next(PORTS), STREAMS, SYN)), (17, udp(next(PORTS), DATAGRAMS))]
    return [ethernet(ROUTER, GUEST, 0x0800, ip4(source or HOST, target, proto, payload)) for proto, payload in both]


def test_the_host_s_loopback_is_out_of_reach(guest: Guest, listeners: Listeners, outside: Listeners) -> None:
    guest.send(arp(BROADCAST, GUEST, 1, (GUEST, HOST), ("00:00:00:00:00:00", OUTSIDE)))
    for target in HERE + HERE6:
        guest.send(*frames_to(target))
    for target, source in ((OUTSIDE, "127.0.0.1"), (OUTSIDE, "0.0.0.0"), (OUTSIDE6, "::1"), (OUTSIDE6, "::")):
        guest.send(*frames_to(target, source))
    for frame in frames_to("127.0.0.1"):
        guest.send(*(tagged(frame, kind) for kind in (0x8100, 0x88A8)), frame[:33], frame + bytes(20))
    for header in (0, 60, 43):
        guest.send(ethernet(ROUTER, GUEST, 0x86DD, ip6(HOST6, "::1", header, extension(header))))
    datagram = udp(next(PORTS), DATAGRAMS, bytes(100))
    guest.send(
        ethernet(ROUTER, GUEST, 0x0800, ip4(HOST, "127.0.0.1", 17, datagram[:64], 0x2000)),
        ethernet(ROUTER, GUEST, 0x0800, ip4(HOST, "127.0.0.1", 17, datagram[64:], 8)),
        ethernet(ROUTER, GUEST, 0x0800, ip4(HOST, "127.0.0.1", 1, echo4())),
    )
    # What is allowed comes through, after all that: so all that has been judged by now.
    guest.send(*frames_to(OUTSIDE), *frames_to(OUTSIDE6))
    came = outside.heard(30, 4)
    assert listeners.heard(1) == []
    assert sorted([*came, *outside.heard(0.1)]) == sorted(
        f"{kind} {address}" for kind in ("SOCK_STREAM", "SOCK_DGRAM") for address in (OUTSIDE, OUTSIDE6)
    )
    # And nothing of it was answered as if by somebody there.
    answers = [
        frame for frame in guest.received(0.5) if frame[12:14] == b"\x08\x00" and frame[26:30] != socket.inet_aton(OUTSIDE)
    ]
    assert answers == []


def extension(header: int) -> bytes:
    """A TCP SYN behind an extension header of eight bytes (*header*: 0, 60: options; 43: a route by `::1`)."""
    return bytes([6, 0, 0 if header == 43 else 1, 0 if header == 43 else 4]) + bytes(4) + tcp(next(PORTS), STREAMS, SYN)


def test_no_frame_is_found_inside_of_another(guest: Guest, listeners: Listeners, outside: Listeners) -> None:
    """passt of 2023 takes the middle of a frame for a beginning where it was not given all of one at once."""
    inner = b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames_to("127.0.0.1") + frames_to("::1"))
    chosen = random.Random(2)
    for _ in range(3000):
        payload = bytes(chosen.randrange(60)) + inner * chosen.choice((1, 4, 20, 150))
        guest.send(ethernet(ROUTER, GUEST, 0x0800, ip4(HOST, OUTSIDE, 253, payload[:65000])))
    guest.send(*frames_to(OUTSIDE))
    assert len(outside.heard(30, 2)) == 2
    assert listeners.heard(1) == []


def test_no_answer_is_written_over_a_frame(guest: Guest, listeners: Listeners, outside: Listeners) -> None:
    """passt of 2023 writes what it answers by DHCP over the frames behind the question, by then judged: a target may become 0."""
    wishes = bytes([55, 255]) + bytes([6, 119, 51, 1, 3] * 51)  # the same options over and over: some kilobytes
    for options in (b"", wishes):
        asks = ethernet(BROADCAST, GUEST, 0x0800, ip4("0.0.0.0", "255.255.255.255", 17, dhcp(GUEST, 1, options)))
        others = [frame for _ in range(10) for frame in frames_to(OUTSIDE)]
        guest.sock.sendall(b"".join(len(frame).to_bytes(4, "big") + frame for frame in (asks, *others)))
        assert len(outside.heard(10, 20)) == 20
    assert listeners.heard(0.5) == []


def test_a_guest_is_still_told_where_it_is(
    host: Namespace, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ARP, DHCP and neighbour discovery; with the name servers that systemd-resolved asks, where the host asks itself."""
    for name, text in (
        ("RESOLV_CONF", "nameserver 127.0.0.53\n"),
        ("RESOLVED", "nameserver 192.0.2.53\nnameserver 192.0.2.54\n"),
    ):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(passt, name, str(tmp_path / name))
    link = "fe80::400:ff:fe00:1"
    with contextlib.closing(Guest(host, layout)) as guest:
        guest.send(
            ethernet(BROADCAST, GUEST, 0x0800, ip4("0.0.0.0", "255.255.255.255", 17, dhcp(GUEST, 1))),
            arp(BROADCAST, GUEST, 1, (GUEST, "0.0.0.0"), ("00:00:00:00:00:00", OUTSIDE)),
            ethernet("33:33:00:00:00:02", GUEST, 0x86DD, ip6(link, "ff02::2", 58, icmp6(133, bytes(4)))),
            ethernet("33:33:ff:00:00:01", GUEST, 0x86DD, ip6(link, "ff02::1:ff00:1", 58, neighbour(135, OUTSIDE6, 1, GUEST))),
        )
        frames = list(guest.received(2))
    (offer,) = [frame for frame in frames if frame[12:14] == b"\x08\x00" and frame[34:38] == b"\x00\x43\x00\x44"]
    assert offer[58:62] == socket.inet_aton(HOST)
    assert bytes([6, 8]) + socket.inet_aton("192.0.2.53") + socket.inet_aton("192.0.2.54") in offer
    assert any(frame[12:14] == b"\x08\x06" and frame[28:32] == socket.inet_aton(OUTSIDE) for frame in frames)
    assert {134, 136} <= {frame[54] for frame in frames if frame[12:14] == b"\x86\xdd" and frame[20] == 58}
    assert all(frame[:6] == mac_bytes(GUEST) for frame in frames)


@pytest.mark.parametrize("killed", [0, 1])
def test_passt_and_sieve_end_with_each_other(guest: Guest, outside: Listeners, killed: int) -> None:
    """And QEMU sees the end of its stream, which is all that becomes of it."""
    guest.send(*frames_to(OUTSIDE))
    assert len(outside.heard(30, 2)) == 2
    guest.host.started[killed].signal(signal.SIGKILL)
    guest.all_end()
    with contextlib.suppress(ConnectionResetError):
        while guest.sock.recv(1 << 16):
            pass
