"""Hostile peers on the broker's socket, each with the broker's real process. Threat rows D01-D13, D26, D27, D30.

The broker's pid stays the same, its descriptors and memory stay flat, and other clients are served meanwhile.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import time
from pathlib import Path

import pytest

from tests.session import Session, descriptors_steady
from vmshell import wire
from vmshell.errors import VmshellError
from vmshell.messages import List, New, Version, Whoami

FRAMES = 100_000


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def answer(sock: wire.Socket) -> dict[str, object]:
    packet = wire.recv(sock, fds_allowed=1)
    assert packet is not None
    packet.close()  # the pipe of an upload that nobody goes on with
    return packet.body


def raw(session: Session) -> wire.Socket:
    return wire.connect(session.layout.broker_socket, 20)


def error_code(body: dict[str, object]) -> object:
    error = body["error"]
    assert isinstance(error, dict)
    return error["code"]


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b'{"id":1,"verb":"list"', id="D02-cut-short"),
        pytest.param(b"[" * 60_000, id="D03-deep"),
        pytest.param(b'{"id":1,"verb":"list","verb":"rm"}', id="D05-twice"),
        pytest.param(b'{"id":1,"verb":"list","after":"\\udfff"}', id="D06-surrogate"),
        pytest.param(b"\x00" * 1000, id="zeros"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="another-protocol"),
    ],
)
def test_what_is_no_packet_gets_an_error_and_the_door(session: Session, frame: bytes) -> None:
    with raw(session) as sock:
        sock.send(frame)
        assert error_code(answer(sock)) == "protocol"
        assert wire.recv(sock) is None
    assert session.ask(List())["vms"] == []


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b'{"id":1,"verb":"list","uid":0}', "bad-value"),  # D12
        (b'{"id":1,"verb":"list","after":5}', "bad-value"),
        (b'{"id":true,"verb":"list"}', "bad-value"),  # D04
        (b'{"id":1,"verb":"shutdown","vm":"a","timeout":1e3}', "protocol"),
        (b'{"id":1,"verb":"event","number":1,"word":"ready"}', "unknown-verb"),  # the relay's words are not for users
        (b'{"id":1,"verb":"watch","number":1}', "unknown-verb"),  # D29
        (b'{"id":1,"verb":"boot","vm":"-x"}', "bad-name"),
        (b'{"id":1,"verb":"boot","vm":"a/../b"}', "bad-name"),
        (b'{"id":1,"verb":"boot","vm":"none"}', "no-such-vm"),
        (b'{"id":1,"verb":"list","all":true}', "not-allowed"),
        (b'{"id":1,"verb":"owned","uids":[0]}', "not-allowed"),
        (b'{"id":1,"verb":"image-users","images":["demo"]}', "not-allowed"),
        (b"{}", "unknown-verb"),
    ],
)
def test_a_packet_with_a_wrong_request_is_refused_by_name(session: Session, frame: bytes, code: str) -> None:
    with raw(session) as sock:
        sock.send(frame)
        assert error_code(answer(sock)) == code


def test_an_oversized_frame_is_not_kept(session: Session) -> None:
    """D01: cut by the kernel at our buffer's size, refused, memory flat."""
    assert session.broker is not None
    before = resident(session.broker.pid)
    for _ in range(20):
        with raw(session) as sock:
            sock.send(b'{"id":1,"verb":"' + b"x" * 190_000 + b'"}')
            assert error_code(answer(sock)) == "protocol"
    assert resident(session.broker.pid) - before < 4 << 20


def test_descriptors_nobody_asked_for_are_closed(session: Session) -> None:
    """D07, N2: 3,000 of them, one and 200 at a time."""
    assert session.broker is not None
    with open(os.devnull, "rb") as file, descriptors_steady(session.broker.pid):
        for count in (1, 200) * 15:
            with raw(session) as sock:
                rights = array.array("i", [file.fileno()] * count)
                sock.sendmsg([b'{"id":1,"verb":"list"}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                assert error_code(answer(sock)) == ("upgraded" if count == 1 else "protocol")


@pytest.mark.slow
def test_one_hundred_thousand_fuzzed_frames(session: Session) -> None:
    """D26: random bytes, cut, doubled and bit-flipped requests; each is answered or closed on, and the process stays."""
    assert session.broker is not None
    rng = random.Random(20261122)
    good = [b'{"id":1,"verb":"list","after":"","all":false}', b'{"id":2,"verb":"boot","vm":"web1"}', b'{"id":3,"verb":"whoami"}']
    good += [
        b'{"id":4,"verb":"new","vm":"w","image":"demo","cpus":1,"memory":64}',
        b'{"id":5,"verb":"shutdown","vm":"a","force":true}',
    ]
    answered = closed = 0
    with descriptors_steady(session.broker.pid):
        sock = raw(session)
        while answered + closed < FRAMES:
            sock.send(mutate(rng, rng.choice(good)))
            answered += 1
            if error_code_or_none(answer(sock)) == "protocol":
                assert wire.recv(sock) is None
                sock.close()
                closed, answered = closed + 1, answered - 1
                sock = raw(session)
        sock.close()
    assert min(answered, closed) > FRAMES / 20, "both kinds were tried"
    assert session.broker.poll() is None
    assert session.ask(Whoami())["uid"] == os.geteuid()
    assert "unexpected" not in session.errors()


def error_code_or_none(body: dict[str, object]) -> object:
    return error_code(body) if "error" in body else None


def mutate(rng: random.Random, frame: bytes) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(rng.randrange(1, 200))
    if kind == 1:
        return frame[: rng.randrange(1, len(frame))]
    if kind == 2:
        return frame + frame
    data = bytearray(frame)
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.choice(b'{}[]",:\\\x00\xff0123456789truefalsn ') if kind < 5 else rng.randrange(256)
    return bytes(data)


def test_too_many_connections_hurt_only_their_owner(session: Session) -> None:
    """D09: beyond the limit the refusal says the number; closing one makes room again."""
    limit = 256
    held = [raw(session) for _ in range(limit)]
    try:
        # Identified at accept, so wait until the last of them is.
        wire.send(held[-1], {"id": 1, "verb": "whoami"})
        assert "ok" in answer(held[-1])
        with raw(session) as sock:
            assert error_code(answer(sock)) == "too-many"
            assert wire.recv(sock) is None
        held.pop().close()
        session.wait_for(lambda: accepted(session), "room for one more", 60)
    finally:
        for sock in held:
            sock.close()


def accepted(session: Session) -> bool:
    try:
        session.ask(Whoami())
    except (VmshellError, OSError, AssertionError):
        return False
    return True


def test_idle_connections_cost_little(session: Session) -> None:
    """D30: under 64 KiB each."""
    assert session.broker is not None
    before = resident(session.broker.pid)
    held = [raw(session) for _ in range(200)]
    wire.send(held[-1], {"id": 1, "verb": "whoami"})
    answer(held[-1])
    grown = resident(session.broker.pid) - before
    for sock in held:
        sock.close()
    assert grown < 200 * 64 * 1024


def test_a_peer_that_never_reads_is_closed_and_nobody_waits(session: Session) -> None:
    assert session.broker is not None
    with raw(session) as sock, descriptors_steady(session.broker.pid):
        sock.settimeout(0.5)
        with contextlib.suppress(OSError):
            for number in range(20_000):
                wire.send(sock, {"id": number, "verb": "whoami"})
        began = time.monotonic()
        session.ask(Whoami())
        assert time.monotonic() - began < 2


def test_closing_right_after_asking(session: Session) -> None:
    """D27: an answer that nobody takes kills nothing."""
    assert session.broker is not None
    with descriptors_steady(session.broker.pid):
        for _ in range(300):
            with raw(session) as sock:
                wire.send(sock, {"id": 1, "verb": "list"})
    assert session.ask(List())["vms"] == []


def test_too_many_calls_at_once_on_one_connection(session: Session) -> None:
    with session.client() as client:
        for _ in range(40):
            client.send(Version())
        for _ in range(40):
            with contextlib.suppress(VmshellError):
                client.receive()
        assert client.ask(Whoami())["user"]


def test_an_unknown_image_is_named_and_nothing_is_made(session: Session) -> None:
    with pytest.raises(VmshellError) as caught:
        session.ask(New(vm="web1", image="none"))
    assert caught.value.code == "no-such-image"
    assert session.ask(List())["vms"] == []
    assert not list(Path(session.layout.vms).glob("*/*"))


# Each alone and with descriptors beside it, which no request brings (N2): a file, a directory, a socket, two at once.
HOSTILE: list[dict[str, object]] = [
    {"verb": "put", "vm": "shelf", "object": "x", "format": "raw"},
    {"verb": "put", "vm": "none", "object": "x", "format": "raw"},
    {"verb": "put", "vm": "shelf", "object": "../x", "format": "raw"},
    {"verb": "put", "vm": "shelf", "object": "x", "format": "nonsense"},
    {"verb": "put"},
    {"verb": "whoami"},
    {"verb": "console", "vm": "none"},
    {"verb": "display", "vm": "none"},
    {"verb": "boot", "vm": "none", "console": True},
    {"verb": "define", "vm": "x", "text": "a." * 8000 + "a = 1", "once": True},
    {"verb": "define", "vm": "x", "text": "a = " + "[" * 8000, "once": True},
    {"verb": "define", "vm": "x", "text": "[cpu]\ncount = " + "9" * 8000},
    {"verb": "define", "vm": "x", "text": "[cpu]\ncount = 0x" + "f" * 8000},
    {"verb": "set", "vm": "none", "set": {"k" * 8000: "v"}},
    {"verb": "explain", "request": {"verb": "explain", "request": {}}},
    {"verb": "nonsense"},
    {},
]


def test_ten_thousand_hostile_requests_of_every_kind_leave_nothing_open(session: Session, short_tmp: Path) -> None:
    """D07: each answered or closed on, none of them as a mistake of ours, and the descriptors are as many as before."""
    assert session.broker is not None
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short_tmp / "s.sock"))
    kinds = [
        [os.open(os.devnull, os.O_RDWR)],
        [os.open("/", os.O_RDONLY)],
        [os.open(short_tmp / "s.sock", os.O_PATH)],
        [socket.socket(socket.AF_INET).detach()],
        [listener.fileno()],
        [os.memfd_create("x")],
        [],
    ]
    kinds.append([kinds[0][0], kinds[1][0]])
    sent = 0
    with descriptors_steady(session.broker.pid):
        sock = raw(session)
        while sent < 10_000:
            for body in HOSTILE:
                for fds in kinds:
                    wire.send(sock, {"id": 1, **body}, tuple(fds))
                    code = error_code_or_none(answer(sock))
                    sent += 1
                    if fds:
                        assert code == "upgraded" and wire.recv(sock) is None, body
                        sock.close()
                        sock = raw(session)
                    else:
                        assert code != "internal", body
        sock.close()
    for fd in {fd for fds in kinds for fd in fds} - {listener.fileno()}:
        os.close(fd)
    listener.close()
    assert session.ask(Whoami())["uid"] == os.geteuid()
    assert "unexpected" not in session.errors()
