"""A host in a network namespace with a real tapnet and taps of guests who may be hostile, and a machine beyond it.

What the tests of attacks on networks share; a test file imports `world` and `outside`, which are fixtures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.process.tapnets import Namespace, Tapnet, mac
from vmshell.messages import Port, Segment
from vmshell.numbering import bridge_name

EVIL, VICTIM = mac(1), mac(2)
HIS, HERS, GATEWAY = "10.77.1.2", "10.77.1.3", "10.77.1.1"
HIS6, HERS6 = "fd77:0:0:1::2", "fd77:0:0:1::3"
HIS_LINK, HER_LINK = "fe80::400:ff:fe00:1", "fe80::400:ff:fe00:2"
OTHER = "06:77:77:77:77:77"


class World:
    """A host in a namespace, its tapnet, and taps by the VM's number."""

    def __init__(self, folder: Any) -> None:
        self.space = Namespace()
        self.tapnet = Tapnet(self.space, folder)
        self.taps: dict[int, int] = {}

    def plug(self, number: int, segment: int, last: int, **more: Any) -> None:
        own: dict[str, Any] = {"address4": f"10.77.{segment}.{last}"}
        port = Port(number=number, nic=0, segment=segment, mac=mac(number), create=True, **{**own, **more})
        self.taps[number] = self.tapnet.plug(port)
        os.set_blocking(self.taps[number], False)

    def knows(self, number: int, address: str, segment: int) -> None:
        """The host has the guest's MAC already: nobody answers its questions here."""
        self.space.run("ip", "neigh", "replace", address, "lladdr", mac(number), "dev", bridge_name(segment))

    def send(self, number: int, *frames: bytes) -> None:
        for frame in frames:
            os.write(self.taps[number], frame)

    def received(self, number: int, seconds: float = 0.15) -> list[bytes]:
        return list(frames_from(lambda: os.read(self.taps[number], 1 << 16), self.taps[number], seconds))

    def gateway_mac(self, segment: int) -> str:
        return self.space.run("cat", f"/sys/class/net/{bridge_name(segment)}/address").strip()

    def close(self) -> None:
        for fd in self.taps.values():
            os.close(fd)
        self.tapnet.close()
        self.space.close()


def frames_from(read: Callable[[], bytes], fd: int, seconds: float) -> Iterator[bytes]:
    """What comes within *seconds* of silence."""
    while select.select([fd], [], [], seconds)[0]:
        with contextlib.suppress(BlockingIOError):
            yield read()


Made = TypeVar("Made")


def inside(space: Namespace, make: Callable[[], Made]) -> Made:
    """What *make* makes, of that network: a socket, a tap. It is called by a thread that enters it."""
    found: list[Made] = []

    def enter() -> None:
        with open(f"/run/netns/{space.name}") as file:
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0
        found.append(make())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return found[0]


def sniffer(space: Namespace, interface: str) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.bind((interface, 0))
        sock.setblocking(False)
        return sock

    return inside(space, make)


def heard(sock: socket.socket, seconds: float = 0.1) -> list[bytes]:
    return list(frames_from(lambda: sock.recv(1 << 16), sock.fileno(), seconds))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Guests by their VM's number: 1 and 2 share a segment, 3 and 7 have one each, 4, 5, 6 and 10 are on a service network
    (6 and 10 provide), 8 and 9 are isolated neighbours."""
    made = World(tmp_path_factory.mktemp("net"))
    try:
        made.tapnet.settle(
            Segment(segment=1, kind="shared", gateway4="10.77.1.1/24", gateway6="fd77:0:0:1::1/64", outside="internet"),
            Segment(segment=2, gateway4="10.77.2.1/24", kind="private", outside="internet"),
            Segment(segment=3, gateway4="10.77.3.1/24", kind="service", outside="none"),
            Segment(segment=4, gateway4="10.77.4.1/24", gateway6="fd77:0:0:4::1/64", kind="private", outside="all"),
            Segment(segment=5, gateway4="10.77.5.1/24", kind="shared", outside="none"),
        )
        made.plug(1, 1, 2, address6=HIS6, owner=4001)
        made.plug(2, 1, 3, address6=HERS6, owner=4002)
        made.plug(3, 2, 2, owner=4003)
        made.plug(4, 3, 2, owner=4001, isolated=True)  # two consumers and a provider
        made.plug(5, 3, 3, owner=4002, isolated=True)
        made.plug(6, 3, 4, owner=4003)
        made.plug(7, 4, 2, address6="fd77:0:0:4::2", owner=4001)
        made.plug(8, 5, 2, isolated=True)
        made.plug(9, 5, 3, isolated=True)
        made.plug(10, 3, 5, owner=4004)  # another provider
        own = ((1, HIS, 1), (2, HERS, 1), (3, "10.77.2.2", 2), (7, "10.77.4.2", 4), (8, "10.77.5.2", 5))
        for number, address, segment in own:
            made.knows(number, address, segment)
        for number in made.taps:
            made.received(number, 0.05)
        yield made
    finally:
        made.close()


@pytest.fixture
def outside(world: World) -> Iterator[Namespace]:
    """Another machine beyond the host, with addresses of every sort."""
    other = Namespace()
    world.space.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", other.name)
    for address in ("198.51.100.1/24", "192.168.5.1/24", "169.254.169.1/24"):
        world.space.run("ip", "addr", "add", address, "dev", "up0")
    for address in ("2001:db8:5::1/64", "fd99::1/64", "fd00:ec2::1/64"):
        world.space.run("ip", "addr", "add", address, "dev", "up0", "nodad")
    world.space.run("ip", "link", "set", "up0", "up")
    other.run("ip", "link", "set", "eth0", "up")
    for address in ("198.51.100.2/24", "192.168.5.2/24", "169.254.169.254/24"):
        other.run("ip", "addr", "add", address, "dev", "eth0")
    for address in ("2001:db8:5::2/64", "fd99::2/64", "fd00:ec2::254/64"):
        other.run("ip", "addr", "add", address, "dev", "eth0", "nodad")
    other.run("ip", "route", "add", "10.77.0.0/16", "via", "198.51.100.1")
    yield other
    world.space.run("ip", "link", "del", "up0")
    other.close()


def connects(world: World, uid: int, address: str, port: int, own: int = 0) -> str:
    """What becomes of a connection by *uid*: `refused` at once, or `waits` because the packet went out."""
    made = f"s = socket.socket(); s.bind(('', {own})); s.settimeout(1.5)"
    return _as_user(world, uid, f"{made}; s.connect(('{address}', {port})); print('connected')")


def sends(world: World, uid: int, own: int, address: str, port: int) -> str:
    """What becomes of a datagram of *uid*'s from port *own*: `refused` at once, `sent` because it went out, and any answer."""
    datagram = f"s.bind(('', {own})); s.settimeout(2); s.sendto(b'question', ('{address}', {port})); print('sent', flush=True)"
    return _as_user(world, uid, f"s = socket.socket(type=socket.SOCK_DGRAM); {datagram}; print(s.recv(99).decode())")


def _as_user(world: World, uid: int, code: str) -> str:
    whole = (
        "import os, socket; os.setgroups([]); os.setresgid(4999, 4999, 4999);"
        f"os.setresuid({uid}, {uid}, {uid})\ntry: {code}\n"
        "except TimeoutError: print('waits')\n"
        "except OSError: print('refused')"
    )
    done = subprocess.run(world.space.command(sys.executable, "-c", whole), capture_output=True, text=True)
    return " ".join(done.stdout.split()) or done.stderr
