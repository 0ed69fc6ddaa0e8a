"""How users' connections come to the broker from the front: lost and found again, counted, refused, and nothing stays open."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.costs import Bench
from vmshell import wire
from vmshell.broker.main import make_server
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services.front import Front
from vmshell.layout import Layout
from vmshell.messages import Arrived

PATIENCE = 60


def turn(loop: Loop, done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end
        loop.after(0.01, loop.stop)
        loop.run()


def descriptors() -> int:
    gc.collect()  # those that tests before this one left to it
    return len(os.listdir("/proc/self/fd"))


# --- the connection to the front --------------------------------------------------------------------------------------


class Link:
    """A broker's link to a front that the test plays; who came is in `came`, what the loop was told of in `errors`."""

    def __init__(self, folder: Path) -> None:
        self.layout = Layout(etc=f"{folder}", state=f"{folder}", run=f"{folder}", log=f"{folder}", embedded=False)
        self.errors: list[BaseException] = []
        self.came: list[tuple[int, socket.socket]] = []
        self.loop = Loop(self.errors.append)
        self.link = Front(self.loop, self.layout, lambda uid, sock: self.came.append((uid, sock)))

    def accept(self, listener: socket.socket) -> socket.socket:
        """The broker's connection."""
        found: list[socket.socket] = []
        listener.setblocking(False)

        def accepted() -> bool:
            with contextlib.suppress(BlockingIOError):
                found.append(listener.accept()[0])
            return bool(found)

        turn(self.loop, accepted)
        return found[0]

    def user(self, front: socket.socket, uid: int) -> socket.socket:
        """A user has come: the child's end of the connection."""
        inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with outer:
            wire.send(front, Arrived(uid=uid).to_body(), (outer.fileno(),))
        return inner


@pytest.fixture
def link(short_tmp: Path) -> Iterator[Link]:
    made = Link(short_tmp)
    yield made
    made.link.close()
    for _, sock in made.came:
        sock.close()


def test_the_broker_finds_the_front_whenever_it_comes_and_comes_again(link: Link) -> None:
    link.link.connect()  # there is none so far
    for number in range(3):
        with wire.listen(link.layout.front_socket, 0o600) as listener, link.accept(listener) as front:
            user = link.user(front, 1000 + number)
            turn(link.loop, lambda number=number: len(link.came) > number)  # type: ignore[misc]
            uid, sock = link.came[-1]
            sock.send(b"through")
            assert (uid, user.recv(9)) == (1000 + number, b"through")
            user.close()
    assert not link.errors


def test_who_came_before_the_front_ended_is_served_on(link: Link) -> None:
    link.link.connect()
    with wire.listen(link.layout.front_socket, 0o600) as listener:
        front = link.accept(listener)
        user = link.user(front, 1000)
        front.close()
        with link.accept(listener):
            turn(link.loop, lambda: len(link.came) == 1)
            user.send(b"still here")
            assert link.came[0][1].recv(99) == b"still here"
        user.close()


NONSENSE: dict[str, dict[str, Any]] = {
    "no uid": {"verb": "arrived"},
    "a uid that there is not": {"verb": "arrived", "uid": 1 << 32},
    "a uid below root's": {"verb": "arrived", "uid": -1},
    "more than it may say": {"verb": "arrived", "uid": 1000, "admin": True},
}


@pytest.mark.parametrize("what", [*NONSENSE, "no descriptor", "two descriptors", "a pipe", "a file"])
def test_a_front_that_was_taken_over_leaves_no_descriptor_in_the_broker(link: Link, what: str) -> None:
    link.link.connect()
    with wire.listen(link.layout.front_socket, 0o600) as listener, link.accept(listener) as front:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader, writer = os.pipe()
        file = os.open(os.devnull, os.O_RDONLY)
        fds = {"no descriptor": (), "two descriptors": (theirs.fileno(),) * 2, "a pipe": (reader,), "a file": (file,)}
        with ours, theirs:
            before = descriptors()
            wire.send(front, NONSENSE.get(what, {"verb": "arrived", "uid": 1000}), fds.get(what, (theirs.fileno(),)))
            turn(link.loop, lambda: bool(link.errors) or link.link._sock is None)
            assert not link.came
            assert descriptors() == before - (link.link._sock is None)
        for fd in (reader, writer, file):
            os.close(fd)


# --- who is admitted --------------------------------------------------------------------------------------------------


class FrontBench(Bench):
    """A broker whose users come from the test."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        people: Any = self.parts.accounts
        people.when_peer_known = lambda uid, done: done()
        self.server = make_server(self.parts)

    def come(self, uid: int) -> socket.socket:
        """A user's connection: the child's end."""
        inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        inner.settimeout(PATIENCE)
        self.server.admit(uid, outer)
        return inner

    def ask(self, sock: socket.socket) -> dict[str, Any]:  # type: ignore[override]
        """The answer to `whoami`."""
        wire.send(sock, {"id": 1, "verb": "whoami"})
        return self.next(sock)

    def next(self, sock: socket.socket) -> dict[str, Any]:
        turn(self.parts.loop, lambda: bool(select.select([sock], [], [], 0)[0]))
        packet = wire.recv(sock)
        assert packet is not None
        return packet.body


@pytest.fixture
def broker(short_tmp: Path) -> Iterator[FrontBench]:
    made = FrontBench(short_tmp)
    yield made
    made.close()


def test_who_has_come_is_who_the_front_says(broker: FrontBench) -> None:
    with broker.come(1000) as alice, broker.come(2001) as other, broker.come(0) as root:
        assert broker.ask(alice)["ok"]["user"] == "alice"
        assert broker.ask(other)["ok"]["user"] == "u2001"
        assert broker.ask(root)["ok"]["admin"] is True
        assert broker.server.connected() == 3


def test_connections_beyond_the_limit_are_refused_and_room_comes_back(broker: FrontBench) -> None:
    """D09."""
    limit = broker.parts.policies.policy.host.connections_max
    held = [broker.come(1000) for _ in range(limit)]
    before = descriptors()
    for _ in range(3):
        with broker.come(1000) as refused:
            assert broker.next(refused)["error"]["code"] == "too-many"
            assert refused.recv(9) == b""
    assert descriptors() == before
    with broker.come(2001) as other:
        assert "ok" in broker.ask(other)
    assert broker.server.connected() == limit + 1
    held.pop().close()
    turn(broker.parts.loop, lambda: broker.server.connected() == limit - 1)
    held.append(broker.come(1000))
    assert "ok" in broker.ask(held[-1])
    for sock in held:
        sock.close()
    turn(broker.parts.loop, lambda: broker.server.connected() == 0)


def test_who_is_no_member_is_told_so_and_does_not_stay(broker: FrontBench) -> None:
    people: Any = broker.parts.accounts
    people.groups_of = lambda user: frozenset()
    with broker.come(1000) as sock:
        assert broker.next(sock)["error"]["code"] == "not-allowed"
        assert sock.recv(9) == b""
    assert broker.server.connected() == 0


def test_the_broker_takes_no_descriptor_from_a_child(broker: FrontBench) -> None:
    """N2: a child that was taken over may send them; none stays."""
    with broker.come(1000) as sock, open(os.devnull, "rb") as file:
        before = descriptors()
        wire.send(sock, {"id": 1, "verb": "whoami"}, (file.fileno(),))
        assert broker.next(sock)["error"]["code"] == "upgraded"
        assert sock.recv(9) == b""
        assert descriptors() == before - 1
