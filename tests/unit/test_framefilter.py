"""The sieve between a session's guest and passt: which frames pass, and how they are copied (B20)."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frames import BROADCAST, SYN, arp, behind, dhcp, echo4, ethernet, icmp6, ip4, ip6, neighbour, tagged, tcp, udp, udp6
from vmshell.broker.host.processes import Host
from vmshell.broker.network import passt
from vmshell.broker.network.interfaces import Interface
from vmshell.framefilter.frames import HEAD, passes
from vmshell.framefilter.main import CHUNK, RUN, SENT_MAX, SPACER, SPACERS, Strainer
from vmshell.model.catalogues import Network
from vmshell.model.definition import Nic
from vmshell.spawn import python

GUEST, ROUTER = "06:00:00:00:00:01", "52:54:00:00:00:99"
OWN, OUTSIDE = "192.0.2.2", "198.51.100.7"
OWN6, OUTSIDE6, LINK = "2001:db8::2", "2001:db8:1::7", "fe80::1234"

HERE = ("127.0.0.1", "127.0.0.53", "127.1.2.3", "127.255.255.255", "0.0.0.0", "0.1.2.3")
HERE6 = ("::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0", "::127.0.0.1", "::ffff:0:127.0.0.1", "::ffff:192.0.2.2")
MANY = ("224.0.0.1", "224.0.0.251", "239.255.255.250", "240.0.0.1", "255.255.255.255")
MANY6 = ("ff02::1", "ff01::1", "ff02::fb", "ff05::2", "ff0e::1", "ff02::1:2")


def to4(target: str, source: str = OWN, proto: int = 6, payload: bytes = tcp(40000, 8888, SYN)) -> bytes:
    return ethernet(ROUTER, GUEST, 0x0800, ip4(source, target, proto, payload))


def to6(target: str, source: str = OWN6, header: int = 6, payload: bytes = tcp(40000, 8888, SYN)) -> bytes:
    return ethernet(ROUTER, GUEST, 0x86DD, ip6(source, target, header, payload))


ASKS = ethernet(BROADCAST, GUEST, 0x0800, ip4("0.0.0.0", "255.255.255.255", 17, dhcp(GUEST, 1)))
# A client's DHCPv6, from its own port to the servers'.
ASKS6 = to6("ff02::1:2", LINK, 17, udp(546, 547))

GOOD = [
    to4(OUTSIDE),
    to4(OUTSIDE, proto=17, payload=udp(40000, 53)),
    to4(OUTSIDE, proto=1, payload=echo4()),
    to4("10.0.0.1"),
    to4("192.0.2.1", proto=17, payload=dhcp(GUEST, 3)),
    to6(OUTSIDE6),
    to6(OUTSIDE6, OWN6, 17, udp6(OWN6, OUTSIDE6, 53)),
    to6("64:ff9b::198.51.100.7"),
    to6("fe80::1", LINK, 58, neighbour(136, LINK)),
    ASKS,
    ethernet(BROADCAST, GUEST, 0x0800, ip4(OWN, "255.255.255.255", 17, dhcp(GUEST, 3))),
    ASKS6,
    to6("ff02::2", LINK, 58, icmp6(133, bytes(4))),
    to6("ff02::1:ff00:1", LINK, 58, neighbour(135, "fe80::1", 1, GUEST)),
    to6("ff02::1:ff00:2", "::", 58, neighbour(135, OWN6)),
    arp(BROADCAST, GUEST, 1, (GUEST, OWN), ("00:00:00:00:00:00", "192.0.2.1")),
]
BAD = [
    *(to4(target) for target in HERE + MANY),
    *(to4(target, proto=17, payload=udp(40000, 9999)) for target in HERE + MANY),
    *(to4(target, proto=1, payload=echo4()) for target in HERE),
    *(to4(target, "0.0.0.0", 17, dhcp(GUEST, 1)) for target in HERE + MANY[:-1]),
    *(to4(OUTSIDE, source) for source in HERE + MANY),
    *(to6(target) for target in HERE6 + MANY6),
    *(to6(target, OWN6, 17, udp(40000, 9999)) for target in HERE6 + MANY6),
    *(to6(target, LINK, 17, udp(546, 547)) for target in HERE6 + MANY6[:-1]),
    *(to6(target, LINK, 58, neighbour(135, "::1")) for target in HERE6 + ("ff0e::1", "ff01::1")),
    *(to6(OUTSIDE6, source) for source in HERE6 + MANY6),
    to6("ff02::1", LINK, 58, icmp6(128, b"ping")),
    to6("ff02::2", "::1", 58, icmp6(133, bytes(4))),
    to6("ff02::1:2", "::1", 17, udp(546, 547)),
    to6("ff02::1", LINK, 0, behind(0, neighbour(135, "fe80::1"))),
    ethernet(ROUTER, GUEST, 0x0800, ip4(OWN, "127.0.0.1", 17, udp(1, 2), 0x2000)),
    ethernet(ROUTER, GUEST, 0x0800, ip4(OWN, "127.0.0.1", 17, udp(1, 2), 100)),
    ethernet(BROADCAST, GUEST, 0x0800, ip4("127.0.0.1", "255.255.255.255", 17, dhcp(GUEST, 1))),
    ethernet(ROUTER, GUEST, 0x86DD, ip4(OWN, OUTSIDE, 17, udp(1, 2, bytes(99)))),
    ethernet(ROUTER, GUEST, 0x0800, ip6(OWN6, OUTSIDE6, 17, udp(1, 2))),
    *(tagged(to4(OUTSIDE), kind) for kind in (0x8100, 0x88A8, 0x9100)),
    *(ethernet(ROUTER, GUEST, kind, ip4(OWN, OUTSIDE, 6, tcp(1, 2, SYN))) for kind in (0, 46, 0x8847, 0x8864, 0x88CC, 0xFFFF)),
]


def test_what_passes() -> None:
    assert [frame.hex() for frame in GOOD if not passes(frame)] == []
    assert [frame.hex() for frame in GOOD if not passes(frame[:HEAD])] == []


def test_what_does_not() -> None:
    """B20: no address that means this host itself, for no protocol; nothing that has no such address at all."""
    assert [frame.hex() for frame in BAD if passes(frame)] == []
    for frame, least in ((to4(OUTSIDE), 34), (to6(OUTSIDE6), 54), (GOOD[-1], 42), (ASKS, 38), (ASKS6, 58), (GOOD[12], 55)):
        assert passes(frame[:least])
        assert not any(passes(frame[:length]) for length in range(least))


@given(st.binary(max_size=80), st.sampled_from([b"\x08\x00\x45", b"\x86\xdd\x60", b"\x08\x06\0"]))
def test_whatever_is_in_it(rest: bytes, kind: bytes) -> None:
    """What passes leads to no loopback, and to several hosts only where passt itself is one of them."""
    frame = bytes(12) + kind + rest
    if not passes(frame):
        return
    if kind[0] == 0x86:
        target = IPv6Address(frame[38:54])
        assert target not in IPv6Network("::/16")
        assert not target.is_multicast or (target.packed[1] == 2 and (frame[20], frame[54]) in ((58, 133), (58, 135), (17, 0)))
    elif kind[1] == 0:
        source, target4 = IPv4Address(frame[26:30]), IPv4Address(frame[30:34])
        assert not source.is_loopback and not target4.is_loopback and not target4.is_multicast and target4.packed[0]
        assert not target4.is_reserved or frame[36:38] == b"\0\x43"


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16), st.integers(0, 255), st.binary(max_size=9))
def test_any_address(source: bytes, target: bytes, proto: int, rest: bytes) -> None:
    """Hosts' addresses pass whatever is said to them; the rest hardly ever."""
    frame = bytes(12) + b"\x86\xdd\x60" + bytes(5) + bytes([proto, 64]) + source + target + rest
    hosts = all(address[:2] != bytes(2) and address[0] != 255 for address in (source, target))
    assert passes(frame) == hosts or (target[:2] == b"\xff\x02" and proto in (17, 58))
    assert not any(
        passes(bytes(12) + b"\x08\x00" + bytes([first]) + bytes(11) + b"\xc0\0\2\1" * 2) for first in (0x44, 0x46, 0x4F, 0x65)
    )
    frame = bytes(12) + b"\x08\x00\x45" + bytes(8) + bytes([proto, 0, 0]) + source[:4] + target[:4] + rest
    hosts = all(0 < address[0] < 224 and address[0] != 127 for address in (source, target))
    assert passes(frame) == hosts or (target[:4] == b"\xff\xff\xff\xff" and proto == 17)


# --- the stream -------------------------------------------------------------------------------------------------------


def packed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "big") + frame for frame in frames)


def unpacked(stream: bytes) -> list[bytes]:
    """The frames in *stream*, which ends with one."""
    frames = []
    while stream:
        length = int.from_bytes(stream[:4], "big")
        assert len(stream) >= 4 + length
        frames.append(stream[4 : 4 + length])
        stream = stream[4 + length :]
    return frames


def kept(frames: list[bytes]) -> list[bytes]:
    """What is to come of *frames*: behind each question by DHCP there is room for the answer."""
    found = []
    for frame in frames:
        if len(frame) < 65536 and passes(frame):
            found.append(frame)
            if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == b"\0\x43":
                found += [frame[:12] + bytes(SPACER - 12)] * SPACERS
    return found


LONG = to4(OUTSIDE, payload=bytes(65000))
SENT = st.lists(
    st.sampled_from([*GOOD, *BAD, b"", b"x", LONG, to4("127.0.0.1", payload=bytes(65000)), LONG + bytes(4000)]), max_size=30
)


@given(SENT, st.lists(st.integers(0, 1 << 18), max_size=9))
def test_however_the_stream_is_cut(frames: list[bytes], cuts: list[int]) -> None:
    """What passes comes out once, whole and in order, in pieces that the kernel hands over at once."""
    stream, strain, pieces = packed(*frames), Strainer(), []
    begin = 0
    for end in [*sorted(cut for cut in cuts if cut < len(stream)), len(stream)]:
        pieces += [bytes(piece) for piece in strain(stream[begin:end])]
        begin = end
    assert [frame for piece in pieces for frame in unpacked(piece)] == kept(frames)
    assert all(pieces) and all(len(piece) <= RUN or len(unpacked(piece)) == 1 for piece in pieces)


def test_a_length_that_no_qemu_sends_is_the_end() -> None:
    assert Strainer()(packed(bytes(SENT_MAX))) == []
    for length in (SENT_MAX + 1, 1 << 31, (1 << 32) - 1):
        with pytest.raises(ValueError, match=str(length)):
            Strainer()(packed(GOOD[0]) + length.to_bytes(4, "big"))


# --- the process ------------------------------------------------------------------------------------------------------


class Sieve:
    """The process, as the broker starts it, and both its ends."""

    def __init__(self) -> None:
        self.qemu, above = socket.socketpair()
        self.passt, below = socket.socketpair()
        self.errors, errors = os.pipe()
        host = Host(embedded=True)
        with above, below:
            fds = {3: above.fileno(), 4: below.fileno()}
            self.process = host.spawn(python("framefilter"), fds, stderr=errors)
        os.close(errors)
        for sock in (self.qemu, self.passt):
            sock.settimeout(60)

    def frames(self, last: bytes) -> list[bytes]:
        """What comes to passt, up to *last*; every read ends with a frame, as passt needs it."""
        found: list[bytes] = []
        while last not in found:
            found += unpacked(self.passt.recv(8 << 20))
        return found

    def __enter__(self) -> Sieve:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.signal(signal.SIGKILL)
        os.close(self.errors)
        self.qemu.close()
        self.passt.close()

    def ended(self) -> int | None:
        """Its exit status, once it has ended without a word."""
        assert select.select([self.process.pidfd], [], [], 60)[0]
        assert os.read(self.errors, 1000) == b""
        return os.waitstatus_to_exitcode(os.waitpid(self.process.pid, 0)[1])


@pytest.fixture
def sieve() -> Iterator[Sieve]:
    with Sieve() as running:
        yield running


def test_both_ways(sieve: Sieve) -> None:
    sieve.qemu.sendall(packed(*BAD, *GOOD[:-1], *BAD, GOOD[-1]))
    assert sieve.frames(GOOD[-1]) == kept(GOOD)
    data = os.urandom(100_000)
    sieve.passt.sendall(data)
    assert sieve.qemu.recv(len(data), socket.MSG_WAITALL) == data


def test_passt_never_has_a_part_of_a_frame(sieve: Sieve) -> None:
    """passt of 2023 loses its place in the stream by one, and reads what the guest put in the middle of a frame as a frame."""
    chosen = random.Random(1)
    frames = [to4(OUTSIDE, proto=253, payload=bytes(chosen.choice((0, 7, 500, 1480, 9000, 30000)))) for _ in range(4000)]
    last = to4("198.51.100.99")
    if os.fork() == 0:
        with contextlib.suppress(OSError):
            sieve.qemu.sendall(packed(*frames, last))
        os._exit(0)
    assert sieve.frames(last) == [*frames, last]
    os.wait()


def test_a_side_that_does_not_read_stops_its_own_direction_only(sieve: Sieve) -> None:
    """And nothing grows, and nobody waits in a circle."""
    sieve.qemu.setblocking(False)
    sent = 0
    frame = packed(to4(OUTSIDE, proto=253, payload=bytes(1480)))
    quiet = time.monotonic() + 1
    while time.monotonic() < quiet:
        with contextlib.suppress(BlockingIOError):
            sent += sieve.qemu.send(frame)
            quiet = time.monotonic() + 1
    assert sent < CHUNK + 4 * (256 << 10)
    before = used(sieve)
    time.sleep(1)
    assert used(sieve) - before < 0.2
    sieve.qemu.settimeout(60)
    sieve.passt.sendall(b"still this way")
    assert sieve.qemu.recv(100) == b"still this way"
    got = 0
    while got < sent - len(frame):
        got += len(sieve.passt.recv(8 << 20))


def used(sieve: Sieve) -> float:
    """Its CPU time, in seconds."""
    fields = Path(f"/proc/{sieve.process.pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("how", ["qemu", "passt", "killed", "stuck", "length"])
def test_all_end_together(sieve: Sieve, how: str) -> None:
    sieve.qemu.sendall(packed(GOOD[0]))
    assert sieve.frames(GOOD[0])
    if how == "stuck":  # it holds what nobody takes any more
        sieve.qemu.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sieve.qemu.send(packed(GOOD[0]))
    ends: dict[str, Callable[[], object]] = {
        "qemu": sieve.qemu.close,
        "passt": sieve.passt.close,
        "killed": lambda: sieve.process.signal(signal.SIGKILL),
        "stuck": sieve.qemu.close,
        "length": lambda: sieve.qemu.sendall(b"\xff" * 4),
    }
    ends[how]()
    assert sieve.ended() == (-9 if how == "killed" else 0)
    for sock in (sieve.qemu, sieve.passt):
        if sock.fileno() >= 0:
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1 << 20):
                    pass


def test_it_can_do_nothing_else(sieve: Sieve) -> None:
    sieve.qemu.sendall(packed(GOOD[0]))
    assert sieve.frames(GOOD[0])
    pid = sieve.process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name, value in (("Max open files", "5"), ("Max processes", "0"), ("Max file size", "0"), ("Max core file size", "0")):
        assert limits.partition(name)[2].split()[:2] == [value, value], name
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0 and status["NoNewPrivs"] == "1"
    assert "0" not in status["Uid"].split() and "0" not in status["Gid"].split() and "0" not in status["Groups"].split()


# --- whom a guest asks for names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "resolved", "given"),
    [
        (
            "nameserver 127.0.0.53\noptions edns0\n",
            "# comment\nnameserver 192.0.2.53\nnameserver fe80::53%eth0\n",
            "192.0.2.53 fe80::53",
        ),
        (
            "nameserver ::1\n",
            "nameserver 127.0.0.1\nnameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\nnameserver 4.4.4.4",
            "1.1.1.1 2.2.2.2 3.3.3.3",
        ),
        ("nameserver 127.0.0.1\nnameserver 192.0.2.1\n", "nameserver 192.0.2.53\n", ""),
        ("nameserver 127.0.0.53\n", None, ""),
        ("nameserver 127.0.0.53\n", "nameserver\nnameserver x\nsearch nameserver\n", ""),
        (None, "nameserver 192.0.2.53\n", "192.0.2.53"),
    ],
)
def test_name_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None, resolved: str | None, given: str) -> None:
    """With systemd-resolved the host asks itself, by an address that leads a guest nowhere."""
    for name, text in (("RESOLV_CONF", own), ("RESOLVED", resolved)):
        monkeypatch.setattr(passt, name, str(tmp_path / name))
        if text is not None:
            (tmp_path / name).write_text(text)
    words = passt.command(Interface(0, Nic(), Network(kind="user"), GUEST))
    assert [word for option, word in zip(words, words[1:], strict=False) if option == "--dns"] == given.split()
