"""A real front with users of several uids and a broker made by the test: what goes through, what is refused, who pays for it.

Rows D01-D09, D26, D27, N1-N5 of the architecture.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import random
import select
import signal
import socket
import stat
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.test_broker_socket import mutate
from tests.fakes.hostile import Lingering
from tests.process.fronts import (
    ALICE,
    BOB,
    BROKER,
    CAROL,
    Body,
    Front,
    Served,
    ask,
    ended,
    kill,
    receive,
    refusal,
    send_raw,
    stopped,
)
from tests.process.launchers import status
from tests.process.relays import PATIENCE, until
from tests.unit.test_costs import plain
from tests.unit.test_front_costs import everything
from vmshell import wire
from vmshell.encoding import FRAME_MAX, encode
from vmshell.front import cage
from vmshell.front.child import CONNECTIONS_MAX
from vmshell.messages import PIPES, REQUESTS, parse_request
from vmshell.model import definition as definitions

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to connect as several users")]

WHOAMI: Body = {"id": 1, "verb": "whoami"}
PUT: Body = {"verb": "put", "vm": "shelf", "object": "cd.iso", "format": "file"}
BOOT: Body = {"verb": "boot", "vm": "web1", "console": True, "consoles": PIPES}
ODD = 'description = "é"\n\n[memory]\nsize = "1G"\n[cpu]\ncount=1   # one\n'

Line = tuple[wire.Socket, Served]


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with tempfile.TemporaryDirectory(prefix="vms-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        with Front(Path(folder)) as running:
            yield running
            running.said("")
            # D26: no exception that nobody thought of; what a broker said that was nonsense is a ProtocolError.
            assert "Error:" not in running.journal.replace("ProtocolError:", ""), running.journal


@pytest.fixture
def line(front: Front) -> Iterator[Line]:
    """alice's connection: her end and the broker's."""
    with front.serving() as both:
        yield both


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def send(user: wire.Socket, *bodies: Body) -> None:
    for ident, body in enumerate(bodies, 1):
        wire.send(user, {"id": ident, **body})


def unread(user: wire.Socket) -> int:
    """Bytes that lie there for *user*, unread."""
    count = array.array("i", [0])
    fcntl.ioctl(user.fileno(), termios.FIONREAD, count)
    return count[0]


def taken(served: Served) -> None:
    """Wait until the child has taken what the broker's end sent."""
    until(lambda: fcntl.ioctl(served.sock.fileno(), cage.SIOCOUTQ, bytes(4)) == bytes(4), "the child to take an answer")


# --- identity ---------------------------------------------------------------------------------------------------------


def test_who_has_come_is_the_kernels_to_say(front: Front) -> None:
    """N5, D12."""
    with front.broker() as broker:
        for uid in (ALICE, 0, BOB, ALICE):
            with front.connect(uid) as user, broker.take() as served:
                assert served.uid == uid
                assert ask(user, served, {"id": 7, "verb": "whoami"}).body == {"id": 7, "ok": {"user": "alice"}}


# --- requests and answers ---------------------------------------------------------------------------------------------


def test_a_request_goes_through_with_its_number_and_progress_and_answer_come_back(line: Line) -> None:
    user, served = line
    wire.send(user, {"id": 9007199254740992, "verb": "boot", "vm": "web1"})
    assert served.request() == {"id": 9007199254740992, "verb": "boot", "vm": "web1"}
    served.answer({"id": 9007199254740992, "progress": "waiting for 2 other boots"})
    served.answer({"id": 9007199254740992, "ok": {"name": "web1"}})
    assert receive(user).body == {"id": 9007199254740992, "progress": "waiting for 2 other boots"}
    assert receive(user).body == {"id": 9007199254740992, "ok": {"name": "web1"}}


def test_many_requests_are_under_way_at_once_and_answered_in_any_order(line: Line) -> None:
    user, served = line
    send(user, *[{"verb": "whoami"}] * 10)
    idents = [served.request()["id"] for _ in range(10)]
    assert idents == list(range(1, 11))
    for ident in reversed(idents):
        served.answer({"id": ident, "error": {"code": "no-such-vm", "text": "there is none", "hint": ""}})
    assert [receive(user).body["id"] for _ in idents] == idents[::-1]


def test_defaults_are_left_out_and_the_broker_sees_nothing_it_does_not_know(line: Line) -> None:
    user, served = line
    user.send(b' {"verb" : "list","id":3,\n"all":false ,"after":""}\n')
    assert served.request() == {"id": 3, "verb": "list"}


def test_a_definition_comes_in_its_canonical_form_also_one_to_be_explained(line: Line) -> None:
    user, served = line
    canonical = definitions.to_toml(definitions.parse(ODD, "web1"))
    assert canonical != ODD
    wire.send(user, {"id": 1, "verb": "define", "vm": "web1", "text": ODD})
    assert served.request() == {"id": 1, "verb": "define", "vm": "web1", "text": canonical}
    wire.send(user, {"id": 2, "verb": "explain", "request": {"verb": "define", "vm": "web1", "text": ODD}, "user": "bob"})
    inner = {"verb": "define", "vm": "web1", "text": canonical}
    assert served.request() == {"id": 2, "verb": "explain", "request": inner, "user": "bob"}


def test_what_cannot_be_explained_is_the_brokers_to_say(line: Line) -> None:
    user, served = line
    for request in ({"verb": "none"}, {"verb": "define", "vm": "web1", "text": "["}, {}, {"verb": "explain", "request": {}}):
        wire.send(user, {"id": 1, "verb": "explain", "request": request})
        assert served.request() == {"id": 1, "verb": "explain", "request": request}


def test_descriptors_come_beside_their_answer(line: Line, pipe: tuple[int, int]) -> None:
    user, served = line
    wire.send(user, {"id": 4, **BOOT})
    assert served.request() == {"id": 4, **BOOT}
    served.answer({"id": 4, "progress": "starting"})
    served.answer({"id": 4, "ok": {"name": "web1"}}, *pipe)
    assert receive(user).body == {"id": 4, "progress": "starting"}
    packet = receive(user)
    assert packet.body == {"id": 4, "ok": {"name": "web1"}}
    reader, writer = wire.take_fds(packet)
    os.write(writer, b"through")
    assert os.read(pipe[0], 7) == b"through"
    assert stat.S_ISFIFO(os.fstat(reader).st_mode)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("packet", "code"),
    [
        (b'{"id":5,"verb":"list","uid":0}', "bad-value"),
        (b'{"id":5,"verb":"arrived","uid":0}', "unknown-verb"),
        (b'{"id":5,"verb":["list"]}', "unknown-verb"),
        (b'{"id":5,"verb":"boot","vm":"a/../b"}', "bad-name"),
        (b'{"id":5,"verb":"define","vm":"a","text":"[cpu]\\ncount = "}', "bad-value"),
        (b'{"id":5,"verb":"console","vm":"web1"}', "upgraded"),
        (b"{}", "unknown-verb"),
        (b'{"id":true,"verb":"list"}', "bad-value"),
        (b'{"id":-1,"verb":"list"}', "bad-value"),
    ],
)
def test_a_bad_request_is_answered_before_the_broker_and_the_connection_goes_on(line: Line, packet: bytes, code: str) -> None:
    user, served = line
    user.send(packet)
    answer: Any = receive(user).body
    assert answer["error"]["code"] == code and answer["error"]["text"]
    assert answer["id"] == (5 if b'"id":5' in packet else 0)
    ask(user, served)  # what the broker sees next is this


NO_PACKETS = [
    pytest.param(b'{"id":1,"verb":"list"', id="D02-cut-short"),
    pytest.param(b"[" * 60_000, id="D03-deep"),
    pytest.param(b'{"id":1,"verb":"list","verb":"rm"}', id="D05-twice"),
    pytest.param(b'{"id":1,"verb":"list","after":"\\udfff"}', id="D06-surrogate"),
    pytest.param(b"\x00" * 1000, id="zeros"),
    pytest.param(b"\xff\xfe", id="not-UTF-8"),
    pytest.param(b"[]", id="no-object"),
    pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="another-protocol"),
    pytest.param(b'{"id":1,"verb":"list","after":"' + b"x" * FRAME_MAX + b'"}', id="D01-oversized"),
]


@pytest.mark.parametrize("packet", NO_PACKETS)
def test_what_is_no_packet_ends_the_connection_after_one_sentence(line: Line, packet: bytes) -> None:
    user, served = line
    wire.send(user, WHOAMI)
    served.request()
    user.send(packet)
    assert refusal(user)["code"] == "protocol"
    assert ended(user) and served.ended()


@pytest.mark.parametrize("count", [1, 2, 200])
@pytest.mark.parametrize("packet", [encode({"id": 1, **PUT}), b"x", b"\0"])
def test_a_descriptor_beside_a_request_is_refused_and_goes_no_further(line: Line, packet: bytes, count: int) -> None:
    """N2, D07: nor does the request."""
    user, served = line
    with open(os.devnull, "rb") as file:
        send_raw(user, packet, (file.fileno(),) * count)
    assert refusal(user)["code"] == "upgraded"
    assert ended(user) and served.ended()


def test_an_answer_that_is_too_large_for_the_user_is_said_to_be(line: Line, pipe: tuple[int, int]) -> None:
    """A broker of another version may write what ours would not; what came beside it is not kept."""
    user, served = line
    wire.send(user, {"id": 6, **BOOT})
    served.request()
    raw = json.dumps({"id": 6, "ok": {"text": "é" * 20_000}}, ensure_ascii=False).encode()
    socket.send_fds(served.sock, [raw], pipe[1:])
    packet = receive(user)
    assert packet.body["error"]["code"] == "answer-too-large"  # type: ignore[index]
    assert packet.body["id"] == 6 and not packet.fds
    ask(user, served)


def test_a_request_that_grows_too_large_by_being_checked_is_refused_and_the_connection_goes_on(line: Line) -> None:
    user, served = line
    body = {"id": 8, "verb": "define", "vm": "web1", "text": 'description = "' + "é" * 12_000 + '"\n'}
    user.send(json.dumps(body, ensure_ascii=False).encode())
    answer: Any = receive(user).body
    assert answer["id"] == 8 and answer["error"]["code"] in ("protocol", "bad-value")
    ask(user, served)


@pytest.mark.parametrize("packet", [b"[", b"x" * 100_000, b"", b"[]"])
def test_a_broker_that_says_nonsense_ends_that_connection_alone(front: Front, packet: bytes) -> None:
    with front.serving_two() as (user, served, bob, bobs):
        served.sock.send(packet)
        assert ended(user)
        ask(bob, bobs)


def test_closing_right_after_asking_loses_no_request(front: Front, line: Line) -> None:
    """D27: also with an answer unread, of which the kernel tells first."""
    user, served = line
    wire.send(user, WHOAMI)
    served.request()
    served.answer({"id": 1, "ok": {}})
    taken(served)
    until(lambda: unread(user), "the answer")
    with stopped(front.child()):
        wire.send(user, {"id": 2, "verb": "shutdown", "vm": "web1"})
        user.close()
    assert served.request() == {"id": 2, "verb": "shutdown", "vm": "web1"}
    assert served.ended()


# --- what a user may hold in flight (N3) ------------------------------------------------------------------------------


def test_nothing_more_is_asked_until_a_request_that_brings_descriptors_is_answered(line: Line, pipe: tuple[int, int]) -> None:
    user, served = line
    send(user, PUT, PUT, {"verb": "whoami"})
    assert served.request()["id"] == 1
    served.answer({"id": 1, "progress": "another one first"})
    receive(user)  # the child has been at it again since
    assert not served.has_request()
    served.answer({"id": 1, "ok": {}}, pipe[1])
    receive(user).close()
    assert served.request() == {"id": 2, **PUT}
    served.answer({"id": 2, "error": {"code": "no-such-vm", "text": "none", "hint": ""}})
    assert served.request() == {"id": 3, "verb": "whoami"}
    assert refusal(user)["code"] == "no-such-vm"


@pytest.mark.parametrize("peeks", [False, True])
def test_nothing_is_read_until_descriptors_that_were_given_are_taken(line: Line, pipe: tuple[int, int], peeks: bool) -> None:
    """N3: looked at is not taken."""
    user, served = line
    send(user, PUT, PUT)
    served.request()
    served.answer({"id": 1, "ok": {}}, pipe[1])
    taken(served)
    if peeks:
        assert user.recv(FRAME_MAX, socket.MSG_PEEK) == encode({"id": 1, "ok": {}})
    with pytest.raises(AssertionError):
        until(served.has_request, "a request that comes too early", 0.1)
    packet = receive(user)
    assert packet.body["id"] == 1 and len(packet.fds) == 1
    packet.close()
    assert served.request() == {"id": 2, **PUT}


def test_a_request_that_brings_descriptors_has_a_number_of_its_own(line: Line) -> None:
    """N3: or the answer to another of that number would be taken for its own."""
    user, served = line
    wire.send(user, {"id": 1, "verb": "whoami"})
    assert served.request() == {"id": 1, "verb": "whoami"}
    wire.send(user, {"id": 1, **PUT})
    assert refusal(user)["code"] == "bad-value"
    served.answer({"id": 1, "ok": {}})
    receive(user)
    wire.send(user, {"id": 1, **PUT})
    assert served.request() == {"id": 1, **PUT}


def test_who_lets_answers_pile_up_loses_the_connection(front: Front) -> None:
    with front.serving_two() as (user, served, bob, bobs):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                served.answer({"id": 1, "progress": "x" * 60_000})
        assert served.ended()
        ask(bob, bobs)
        assert receive(user).body["progress"]  # what was sent can be read


# --- the child --------------------------------------------------------------------------------------------------------


def test_a_child_holds_its_connection_and_nothing_else(front: Front) -> None:
    """N1, N5: neither listening socket, nor the control connection, nor another's connection."""
    with front.serving_two() as (user, served, bob, bobs):
        ask(user, served)
        ask(bob, bobs)
        mine, his = front.children(caged=True)
        links = {pid: descriptors_of(pid) for pid in (mine, his, front.zygote(), front.spare(), front.process.pid)}
        sockets = {pid: {link for link in found.values() if link.startswith("socket:")} for pid, found in links.items()}
        for pid in (mine, his):
            others = set(links[pid].values()) - sockets[pid]
            assert others == {os.devnull, *journal_of(links[pid]), str(Path(wire.__file__).parents[1])}
            assert len(sockets[pid]) == 3  # from the server, the user's, to the broker
            assert not sockets[pid] & sockets[front.process.pid]
        assert not sockets[mine] & sockets[his]
        assert [len(sockets[pid]) for pid in (front.zygote(), front.spare())] == [1, 1]
        assert not sockets[front.zygote()] & (sockets[front.spare()] | sockets[front.process.pid])


def descriptors_of(pid: int) -> dict[int, str]:
    return {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}


def journal_of(links: dict[int, str]) -> set[str]:
    return {links[1], links[2]}


def test_a_child_is_caged_hidden_and_without_rights(front: Front, line: Line) -> None:
    user, served = line
    ask(user, served)
    pid = front.child()
    assert status(pid, "Uid") == status(pid, "Gid") == [front.uid] * 4 and status(pid, "Groups") == []
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert status(pid, name, 16) == [0], name
    assert status(pid, "NoNewPrivs") == [1] and status(pid, "Seccomp") == [2] and status(pid, "Threads") == [1]
    assert os.stat(f"/proc/{pid}/mem").st_uid == 0  # not dumpable: nobody of its uid may look into it
    for name in ("file size", "processes", "core file size"):
        assert limits(pid, name) == ["0", "0"], name
    for value in limits(pid, "address space"):
        assert 0 < int(value) - cage.MEMORY_MAX < 128 << 20  # beside what it began with
    assert os.getpriority(os.PRIO_PROCESS, pid) == cage.NICE


def limits(pid: int, name: str) -> list[str]:
    """The soft and the hard limit *name* in /proc/PID/limits."""
    text = Path(f"/proc/{pid}/limits").read_text()
    return next(line for line in text.splitlines() if line.startswith(f"Max {name} ")).removeprefix(f"Max {name}").split()[:2]


def test_between_requests_no_limit_of_time_is_left(front: Front, line: Line) -> None:
    """N4: what is calculated for answers adds up to nothing."""
    user, served = line
    ask(user, served)
    assert limits(front.child(), "cpu time") == ["unlimited"] * 2


def test_two_thousand_requests_on_one_connection_cost_it_nothing_that_stays(front: Front, line: Line) -> None:
    user, served = line
    ask(user, served)
    pid = front.child()
    before = descriptors_of(pid)
    with contextlib.ExitStack() as stack:
        ends = os.pipe()
        for fd in ends:
            stack.callback(os.close, fd)
        for number in range(1000):
            ask(user, served, {"id": number, **PUT}, {}, ends[1]).close()
            user.send(b'{"id":1,"verb":"none"}')
            assert refusal(user)["code"] == "unknown-verb"
    assert descriptors_of(pid) == before


# In a child nothing can be imported any more.


def goes_through(user: wire.Socket, served: Served, body: Body) -> None:
    """The request is refused, or handed on and answered; either way the child goes on."""
    try:
        wire.send(user, {**body, "id": 1})
        request = next_request(user, served)
        if request is None:
            assert "error" in receive(user).body
        else:
            parse_request(request)  # as the broker does
            served.answer({"id": 1, "ok": {}})
            receive(user)
    except (AssertionError, OSError) as exc:
        raise AssertionError(f"no answer to {str(body)[:300]}") from exc


def next_request(user: wire.Socket, served: Served) -> Body | None:
    """What the broker is asked; None where the user is answered."""
    assert select.select([served.sock, user], [], [], PATIENCE)[0]
    return served.request() if served.has_request() else None


@pytest.mark.slow
def test_no_request_makes_a_child_want_what_its_cage_does_not_have(line: Line) -> None:
    """Least of all a module that nobody has needed before."""
    for _, make in everything():
        for size in (200, 1):
            goes_through(*line, make(size))


def test_a_sample_of_it(line: Line) -> None:
    for kind in REQUESTS.values():
        goes_through(*line, plain(kind))
        goes_through(*line, {"verb": "explain", "request": plain(kind)})
    for _, make in [*everything()][::97]:
        goes_through(*line, make(60))


@pytest.mark.slow
def test_three_thousand_fuzzed_packets(short_tmp: Path) -> None:
    """D26: each is handed on as a request, answered, or ended on."""
    rng = random.Random(20261129)
    good = [encode(plain(kind)) for kind in REQUESTS.values()]
    handed_on = refused = 0
    with Front(short_tmp, "server.IN_A_ROW=10000") as front, front.broker() as broker:
        while handed_on + refused < 3000:
            with front.connect() as user, broker.take() as served:
                while noise(user, served, mutate(rng, rng.choice(good))):
                    handed_on += 1
                refused += 1
    assert min(handed_on, refused) > 300, "both kinds were tried"


def noise(user: wire.Socket, served: Served, packet: bytes) -> bool:
    """Send *packet*; False if the connection ends on it, with a word."""
    user.send(packet)
    assert select.select([user, served.sock], [], [], PATIENCE)[0]
    if not unread(user):
        request = served.request()
        parse_request(request)
        served.answer({"id": request["id"], "ok": {}})
    answer: Any = receive(user).body
    if "error" not in answer or answer["error"]["code"] != "protocol":
        return True
    assert ended(user) and served.ended()
    return False


# --- who comes, waits and is refused ----------------------------------------------------------------------------------


def test_without_a_broker_users_wait_and_are_served_when_it_comes(short_tmp: Path) -> None:
    with Front(short_tmp) as front:
        users = [front.connect(uid) for uid in (ALICE, BOB, ALICE)]
        for user in users:
            wire.send(user, WHOAMI)
        with front.broker() as broker:
            for user, uid in zip(users, (ALICE, BOB, ALICE), strict=True):
                with broker.take() as served:
                    assert served.uid == uid
                    served.answer({"id": served.request()["id"], "ok": {}})
                    assert receive(user).body == {"id": 1, "ok": {}}


def test_a_broker_that_stays_away_is_said_to_and_a_new_one_is_taken(short_tmp: Path) -> None:
    with Front(short_tmp, "server.BROKER_PATIENCE=0.3") as front:
        users = [front.connect(uid) for uid in (ALICE, BOB, ALICE)]
        for user in users:
            assert refusal(user)["code"] == "broker-down"
            assert ended(user)
        with front.broker() as broker, front.connect() as user, broker.take() as served:
            ask(user, served)
        with front.connect() as user:  # the patience begins anew
            error = refusal(user)
            assert error["code"] == "broker-down" and "not running" in error["text"] and error["hint"]


def test_a_second_broker_takes_the_place_of_the_first(front: Front) -> None:
    with front.broker() as first, front.connect() as user, first.take() as served, front.broker() as second:
        assert wire.recv(first.sock) is None
        with front.connect(BOB) as bob, second.take() as bobs:
            ask(bob, bobs)
        ask(user, served)  # as long as the first one lives


def test_nobody_else_is_taken_for_the_broker(front: Front, line: Line) -> None:
    """N5: also where the socket's permissions would let them."""
    os.chmod(front.layout.front_socket, 0o666)
    for uid in {ALICE, front.uid, 0} - {BROKER}:
        with front.broker(uid) as broker, contextlib.suppress(ConnectionResetError):
            assert wire.recv(broker.sock) is None
        assert until(lambda uid=uid: front.said(f"refused a connection of uid {uid}\n"), "a word about it")  # type: ignore[misc]
    ask(*line)


def test_the_end_of_the_broker_ends_its_connections_and_the_next_one_gets_the_next_users(front: Front) -> None:
    with front.connect() as user:
        with front.broker() as broker, broker.take() as served:
            ask(user, served)
        assert ended(user)
    with front.serving() as (user, served):
        ask(user, served)


def test_too_many_connections_are_refused_in_words_and_room_comes_back(short_tmp: Path) -> None:
    """D09: one user's, root never."""
    with Front(short_tmp, "server.CONNECTIONS_MAX=3") as front, front.broker() as broker, contextlib.ExitStack() as stack:
        held = [(stack.enter_context(front.connect()), stack.enter_context(broker.take())) for _ in range(3)]
        for user in [front.connect() for _ in range(200)]:
            error = refusal(user)
            assert error["code"] == "too-many" and "connections" in error["text"]
            assert ended(user)
            user.close()
        for uid in (BOB, *[0] * 5):
            stack.enter_context(front.connect(uid))
            assert stack.enter_context(broker.take()).uid == uid
        before = front.descriptors()
        for _ in range(3):
            user, served = held.pop()
            user.close()
            assert served.ended()
            held.append(until(lambda: served_or_refused(front, broker), "room for one more"))
            ask(*held[-1])
        until(lambda: front.descriptors() <= before, "its descriptors to be as many as before")


def served_or_refused(front: Front, broker: Any) -> Line | None:
    """A new connection of alice's; None if she is refused."""
    user = front.connect()
    wire.send(user, WHOAMI)
    packet = until(lambda: unread(user) or is_readable(broker.sock), "an answer")
    assert packet
    if unread(user):
        user.close()
        return None
    served = broker.take()
    served.answer({"id": served.request()["id"], "ok": {}})
    receive(user)
    return user, served


def is_readable(sock: socket.socket | wire.Socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


# --- who is killed ----------------------------------------------------------------------------------------------------


def test_a_child_that_is_killed_ends_its_own_connection(front: Front) -> None:
    with front.broker() as broker, front.connect() as user, broker.take() as served:
        ask(user, served)
        victim = front.child()
        with front.connect(BOB) as bob, broker.take() as bobs:
            ask(bob, bobs)
            kill(victim)
            assert ended(user) and served.ended()
            ask(bob, bobs)


def test_the_child_that_waits_may_be_killed(front: Front) -> None:
    with front.broker() as broker:
        for _ in range(3):
            kill(front.spare())
            with front.connect() as user:
                wire.send(user, WHOAMI)
                with broker.take() as dead:
                    assert dead.ended()
                with broker.take() as served:
                    served.answer({"id": served.request()["id"], "ok": {}})
                    receive(user)


def test_a_front_without_its_zygote_ends_and_is_started_anew(short_tmp: Path) -> None:
    """At once, not when the next user comes; connections that wait are not closed by hand (N1)."""
    with Front(short_tmp) as front, Lingering() as lingering:
        with front.serving() as (user, served):
            ask(user, served)
            kill(front.zygote())
            assert front.process.wait(60) == 1
            assert ended(user) and served.ended()
        assert front.said("the zygote has ended")
        front.start()
        for _ in range(3):
            poisoned(front, lingering)
        until(lambda: front.descriptors() >= 9, "connections that wait")
        kill(front.zygote())
        assert front.process.wait(60) == 1
        front.start()
        with front.serving(BOB) as (user, served):
            ask(user, served)


def test_who_waits_when_the_front_is_killed_is_served_by_the_next(short_tmp: Path) -> None:
    with Front(short_tmp) as front:
        with front.serving() as (user, served):
            ask(user, served)
            front.kill()
            assert ended(user) and served.ended()
        user = front.connect()
        front.start()
        with front.broker() as broker, broker.take() as served:
            ask(user, served)


def test_where_no_process_can_be_started_users_wait(short_tmp: Path) -> None:
    """Four at most: server, zygote, one at work, one that waits for work."""
    with Front(short_tmp, "server.PACE=0.1", limits=("--nproc=4",)) as front, front.broker() as broker:
        first, second = front.connect(), front.connect(BOB)
        with broker.take() as served, broker.take() as seconds:
            third = front.connect(BOB)
            wire.send(third, WHOAMI)
            until(lambda: front.said("this host allows no more processes"), "a word about it")
            ask(first, served)
            ask(second, seconds)
            first.close()
            with broker.take() as thirds:
                thirds.answer({"id": thirds.request()["id"], "ok": {}})
                receive(third)


# --- poison: to drop it takes as long as its sender likes -------------------------------------------------------------


def poisoned(front: Front, lingering: Lingering, uid: int = ALICE, packet: bytes = b"{}") -> wire.Socket:
    """A connection with a descriptor under way whose last close takes ten minutes."""
    user = front.connect(uid)
    fd = lingering.take()
    send_raw(user, packet, (fd,))
    os.close(fd)
    return user


@pytest.fixture
def lingering() -> Iterator[Lingering]:
    with Lingering() as made:
        yield made


def test_poison_on_refused_connections_holds_nobody_up(short_tmp: Path, lingering: Lingering) -> None:
    with Front(short_tmp, "server.CONNECTIONS_MAX=1") as front, front.serving(BOB) as (bob, bobs):
        front.connect()
        for _ in range(3):
            with stopped(front.process.pid):  # so that all of it lies there when they are refused
                users = [poisoned(front, lingering) for _ in range(10)]
                for user in users[::2]:
                    user.close()
            for user in users[1::2]:
                assert refusal(user)["code"] == "too-many"
            ask(bob, bobs)
        new_user_is_served(front)


def test_poison_beside_a_request_holds_up_its_own_connection_only(front: Front, lingering: Lingering) -> None:
    with front.serving(BOB) as (bob, bobs):
        for closes in (False, True, True, False):
            user = poisoned(front, lingering)
            if closes:
                user.close()
            ask(bob, bobs)
        new_user_is_served(front)


def test_poison_on_connections_that_wait_for_a_broker_holds_nobody_up(short_tmp: Path, lingering: Lingering) -> None:
    with Front(short_tmp, "server.BROKER_PATIENCE=0.3") as front:
        front.zygote()
        with stopped(front.process.pid):
            users = [poisoned(front, lingering) for _ in range(10)]
            for user in users[::2]:
                user.close()
        for user in users[1::2]:
            assert refusal(user)["code"] == "broker-down"
        new_user_is_served(front)


def test_poison_before_a_child_that_is_killed_holds_nobody_up(short_tmp: Path, lingering: Lingering) -> None:
    with Front(short_tmp) as front, front.broker() as broker:
        kill(front.spare())
        poisoned(front, lingering).close()
        with broker.take() as dead:
            assert dead.ended()
        broker.take().sock.close()  # another child has it
        new_user_is_served(front)


def test_a_front_with_poison_everywhere_ends_when_it_is_told_to(short_tmp: Path, lingering: Lingering) -> None:
    with Front(short_tmp) as front, front.broker():
        for _ in range(5):
            poisoned(front, lingering)
        until(lambda: len(front.children(caged=True)) == 5, "five children")
    with Front(short_tmp) as front:
        for _ in range(5):
            poisoned(front, lingering)
        until(lambda: front.descriptors() > 9, "connections that wait")
        front.process.send_signal(signal.SIGTERM)
        assert front.process.wait(60) == 0


def new_user_is_served(front: Front) -> None:
    with front.broker() as broker, front.connect(CAROL) as user:
        while (served := broker.take()).uid != CAROL:
            served.sock.close()  # somebody who came before
        ask(user, served)
        served.sock.close()


@pytest.mark.slow
def test_one_user_makes_so_many_connections_in_a_row(short_tmp: Path) -> None:
    """Whoever connects and hangs up costs a process each time; others do not notice."""
    with Front(short_tmp, "server.IN_A_ROW=5", "server.EACH_SECOND=1") as front, front.broker() as broker:
        for _ in range(5):
            with front.connect(ALICE) as user, broker.take() as served:
                ask(user, served)
        with front.connect(ALICE) as user:
            assert refusal(user)["code"] == "too-many-connections"
        with front.connect(BOB) as user, broker.take() as served:
            ask(user, served)


def test_as_many_as_a_host_has_come_while_the_broker_does_not_read_and_none_is_lost(short_tmp: Path) -> None:
    """More than the connection to the broker takes, of 128 and more of one user; those beyond are refused meanwhile."""
    with Front(short_tmp) as front, front.broker() as broker:
        users = [front.connect(uid) for uid in (ALICE, BOB, CAROL) for _ in range(CONNECTIONS_MAX)]
        users += [front.connect(0) for _ in range(200)]
        beyond = [front.connect(ALICE) for _ in range(100)]
        for user in beyond:
            assert refusal(user)["code"] == "too-many"
        for user in users:
            wire.send(user, WHOAMI)
        with contextlib.ExitStack() as stack:
            for _ in users:  # by user in turn, not as they came
                served = stack.enter_context(broker.take())
                served.answer({"id": served.request()["id"], "ok": {"uid": served.uid}})
            for user in users:
                assert "ok" in receive(user).body
        until(lambda: len(front.children(caged=True)) == 0, "its children to end")
        new_user_is_served(front)
