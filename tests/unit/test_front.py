"""Parts of the front: its cage call by call, a child's bounds, and the server beside children that the test plays.

Rows N1-N5 of the architecture, E31.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hostile import Lingering
from tests.process.fronts import send_raw
from vmshell import wire
from vmshell.front import cage, child, rate, zygote
from vmshell.front import server as server_module
from vmshell.front.server import Server
from vmshell.installed import PACKAGE_DIR
from vmshell.messages import Arrived
from vmshell.refusals import Upgraded

PATIENCE = 60
ALICE, BOB = (64_912, 64_913) if os.geteuid() == 0 else (os.geteuid(), os.geteuid())


def until(done: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.005)


# --- the cage ---------------------------------------------------------------------------------------------------------

_BEFORE = """
import ctypes, json, os, resource, select, signal, socket, sys
sys.path.insert(0, sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
from vmshell.front import cage
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
"""
# One process for each attempt, forked for speed; prints how each of them ended.
_EACH = """
ends = []
for attempt in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        code = compile(attempt, "attempt", "exec")
        parent = os.getppid()
        cage.enter()
        exec(code)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(ends))
"""


def caged(*attempts: str) -> dict[str, int]:
    """How a process in the cage ends that does what each of *attempts* says."""
    command = [sys.executable, "-IS", "-c", _BEFORE + _EACH, os.path.dirname(PACKAGE_DIR)]
    done = subprocess.run(command, input=json.dumps(attempts), check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return dict(zip(attempts, json.loads(done.stdout), strict=True))


@pytest.mark.slow
def test_every_call_that_is_not_named_ends_a_child() -> None:
    """Each call there is, and some that there will be, with all arguments zero."""
    ends = caged(*[f"call({number}, 0, 0, 0, 0, 0, 0)" for number in range(520)])
    protection_none = 10  # mprotect to no access at all; mmap with no arguments asks for a file's
    probes = {335, 336}  # a kernel's own trampolines, which it lets through every filter and nobody else may use
    survived = {number for number, end in enumerate(ends.values()) if end != -signal.SIGSYS}
    assert survived - probes == {*cage.ALLOWED.values(), cage.PRLIMIT64, protection_none}


def test_a_child_that_was_taken_over_reaches_nobody() -> None:
    """Neither the world outside, nor the server and the other children, which have its uid."""
    attempts = [
        *(
            "open('/etc/passwd')",
            "os.open('/dev/null', os.O_RDONLY)",
            "os.stat('/')",
            "os.listdir('/')",
            "os.readlink('/proc/self/exe')",
        ),
        *("os.fork()", "os.execv('/bin/true', ['true'])", "os.posix_spawn('/bin/true', [], {})", "os.pidfd_open(parent)"),
        *("os.kill(parent, 0)", "os.kill(0, 0)", "libc.ptrace(16, parent, 0, 0)", "call(424, 0, 9, 0, 0)", "call(438, 0, 0, 0)"),
        *("socket.socket()", "socket.socketpair()", "ours.connect('/run/x')", "ours.bind('x')", "ours.listen()", "ours.accept()"),
        *("ours.getpeername()", "ours.setsockopt(1, 2, 1)", "ours.getsockopt(1, 17, 12)", "ours.shutdown(2)"),
        *("os.dup(1)", "os.dup2(1, 9)", "os.pipe()", "os.memfd_create('x')", "libc.prctl(4, 1, 0, 0, 0)", "os.setuid(0)"),
        # Limits of others: a second of CPU, or no descriptor, is the end of them.
        *("resource.prlimit(parent, resource.RLIMIT_CPU)", "resource.prlimit(parent, resource.RLIMIT_NOFILE, (0, 0))"),
        # Whom the kernel signals, and with what, when something can be read: F_SETOWN, F_SETSIG, F_SETFL, F_SETOWN_EX, F_NOTIFY.
        *(f"call(72, ours.fileno(), {command}, parent)" for command in (8, 10, 4, 15, 1026)),
        *(f"call(72, ours.fileno(), {command}, 20)" for command in (0, 1030, 1)),  # F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD
        # FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI, TIOCSCTTY, SIOCUNIXFILE.
        *(f"call(16, ours.fileno(), {command}, parent)" for command in (0x8901, 0x8902, 0x5452, 0x5412, 0x540E, 0x89E0)),
        # Code brought along.
        *("call(9, 0, 4096, 7, 0x22, -1, 0)", "call(9, 0, 4096, 1, 2, 0, 0)", "call(10, 0, 4096, 4)", "call(0x40000000 + 39)"),
    ]
    ends = caged(*attempts)
    assert {attempt: end for attempt, end in ends.items() if end != -signal.SIGSYS} == {}


def test_what_a_child_needs_works() -> None:
    attempts = [
        "ours.setblocking(False); theirs.settimeout(5); ours.send(b'x'); assert theirs.recv(1) == b'x'",
        "theirs.settimeout(0.01); ours.settimeout(0.01)\ntry:\n    ours.recv(1)\nexcept TimeoutError:\n    pass",
        "assert call(16, ours.fileno(), 0x5411, ctypes.addressof(ctypes.c_int())) == 0",
        "ours.sendmsg([b'x'], [(1, 1, b'\\0\\0\\0\\0')]); assert theirs.recvmsg(9, 99)[1]",
        "poll = select.poll(); poll.register(ours, 1); poll.register(theirs, 1); poll.modify(ours, 0); poll.poll(0)",
        "hard = resource.getrlimit(resource.RLIMIT_CPU)[1]; resource.setrlimit(resource.RLIMIT_CPU, (1000, hard))",
        "signal.alarm(5); signal.alarm(0)",
        "resource.getrusage(resource.RUSAGE_SELF); os.urandom(4); x = bytearray(20 << 20); del x; os.write(2, b''); os.close(0)",
        "try:\n    x = bytearray(1 << 30)\nexcept MemoryError:\n    pass",
    ]
    assert set(caged(*attempts).values()) == {0}
    assert caged("signal.alarm(1); ours.recv(1)") == {"signal.alarm(1); ours.recv(1)": -signal.SIGALRM}


# --- a child's bounds -------------------------------------------------------------------------------------------------


class Forked:
    """A process with a `Connection` that the test has both other ends of, after *prepare* there."""

    def __init__(self, prepare: Callable[[], object] = lambda: None) -> None:
        kind = (socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (self.user, user), (self.broker, broker), (self.control, control) = (socket.socketpair(*kind) for _ in range(3))
        for sock in (self.user, self.broker):
            sock.settimeout(PATIENCE)
        self.pid = os.fork()
        if not self.pid:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's own time limit has a handler
            with contextlib.suppress(OSError):
                for sock in (self.user, self.broker, self.control):
                    sock.close()
                prepare()
                cage.enter()
                child.Connection(user, broker, control).serve()
            os._exit(0)
        for sock in (user, broker, control):
            sock.close()

    def ask(self, body: dict[str, object]) -> dict[str, Any]:
        wire.send(self.user, body)
        packet = wire.recv(self.user)
        assert packet is not None
        return packet.body

    def cpu_seconds(self) -> float:
        """What it has used so far."""
        words = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def status(self) -> int:
        """How it ended: minus the number of a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.user, self.broker, self.control):
            sock.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


WHOAMI: dict[str, object] = {"id": 1, "verb": "whoami"}


def burn(seconds: float) -> Callable[[dict[str, object]], Any]:
    """In place of checking: so much calculating, and then a refusal."""

    def checked(body: dict[str, object]) -> Any:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        raise Upgraded()

    return checked


@pytest.mark.slow
def test_a_request_that_is_calculated_for_too_long_ends_its_child() -> None:
    """N4."""

    def prepare() -> None:
        child._checked, child.CPU_SECONDS = burn(3600), 1  # type: ignore[assignment]

    with Forked(prepare) as forked:
        wire.send(forked.user, WHOAMI)
        assert forked.status() == -signal.SIGXCPU
        assert wire.recv(forked.broker) is None


@pytest.mark.slow
def test_many_requests_may_together_be_calculated_for_longer() -> None:
    def prepare() -> None:
        child._checked, child.CPU_SECONDS = burn(0.5), 1  # type: ignore[assignment]

    with Forked(prepare) as forked:
        for _ in range(5):
            assert forked.ask(WHOAMI)["error"]["code"] == "upgraded"


@pytest.mark.slow
def test_answers_may_be_calculated_for_as_long_as_they_come() -> None:
    def prepare() -> None:
        child.CPU_SECONDS = 1

    with Forked(prepare) as forked:
        wire.send(forked.user, WHOAMI)
        assert wire.recv(forked.broker)
        while forked.cpu_seconds() < 4:
            wire.send(forked.broker, {"id": 1, "progress": "\x1b" * 10_000})
            assert wire.recv(forked.user)


@pytest.mark.slow
def test_waiting_for_the_next_request_is_free_and_waiting_within_one_is_not() -> None:
    """N4."""

    def second() -> None:
        child.SECONDS = 1
        child._checked = burn(0)  # type: ignore[assignment]

    with Forked(second) as forked:
        forked.ask(WHOAMI)
        time.sleep(1.5)
        forked.ask(WHOAMI)

    def waits() -> None:
        child.SECONDS = 1
        child._checked = lambda body: select.poll().poll(3_600_000)  # type: ignore[assignment,return-value]

    with Forked(waits) as forked:
        wire.send(forked.user, WHOAMI)
        assert forked.status() == -signal.SIGALRM


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError])
def test_an_error_that_nobody_thought_of_is_answered_with_a_reference(error: type[Exception]) -> None:
    """Also one for want of memory (N4); the connection goes on."""
    reader, writer = os.pipe()

    def raises(body: dict[str, object]) -> Any:
        return 1 // 0 if error is ZeroDivisionError else bytearray(1 << 30)

    def prepare() -> None:
        child._checked = raises
        sys.stderr = os.fdopen(writer, "w")

    with Forked(prepare) as forked:
        os.close(writer)
        for _ in range(2):
            answer = forked.ask(WHOAMI)["error"]
            assert answer["code"] == "internal"
            reference = answer["text"].rpartition(" ")[2].rstrip(")")
            assert os.read(reader, 200).startswith(f"front: {reference}: {error.__name__}:".encode())
        os.close(reader)


def test_what_is_checked_is_the_same_when_it_is_checked_again() -> None:
    body: dict[str, object] = {"verb": "define", "vm": "web1", "text": 'description = "\\u00e9"\n[cpu]\ncount=2 #\n'}
    once = child._checked(body).to_body()
    assert child._checked(once).to_body() == once


# --- the server, beside children that the test plays ------------------------------------------------------------------


class Played:
    """A process with a `Server`; the test is its zygote, and each of its children. *constants* are of its module."""

    def __init__(self, folder: Path, **constants: float) -> None:
        self.path, self.control_path = f"{folder}/users", f"{folder}/control"
        users, control = wire.listen(self.path, 0o666), wire.listen(self.control_path, 0o600)
        folder.chmod(0o755)
        self._zygote, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._zygote.settimeout(PATIENCE)
        self._open = contextlib.ExitStack()
        self.pid = os.fork()
        if not self.pid:
            try:
                self._zygote.close()
                for name, value in constants.items():
                    setattr(server_module, name, value)
                Server(users=users, control=control, children=theirs, broker_uid=os.geteuid()).run()
            finally:
                os._exit(1)
        for sock in (users, control, theirs):
            sock.close()

    def fork(self) -> socket.socket:
        """A child that the server wants: its end of the connection to the server."""
        assert self._zygote.recv(1) == zygote.FORK
        ours, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child_end.settimeout(PATIENCE)
        socket.send_fds(self._zygote, [zygote.FORK], [ours.fileno()])
        ours.close()
        return self._open.enter_context(child_end)

    def fork_none(self) -> None:
        assert self._zygote.recv(1) == zygote.FORK
        self._zygote.send(zygote.NONE)

    def wants_a_child(self) -> bool:
        return bool(select.select([self._zygote], [], [], 0)[0])

    def connect(self, uid: int = ALICE) -> wire.Socket:
        own = os.geteuid()
        os.seteuid(uid)
        try:
            return self._open.enter_context(wire.connect(self.path, PATIENCE))
        finally:
            os.seteuid(own)

    def broker(self) -> wire.Socket:
        return self._open.enter_context(wire.connect(self.control_path, PATIENCE))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        stop(self.pid)
        yield
        os.kill(self.pid, signal.SIGCONT)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._open.close()
        self._zygote.close()


@pytest.fixture
def played(short_tmp: Path) -> Iterator[Played]:
    with Played(short_tmp) as running:
        yield running


@pytest.fixture
def lingering() -> Iterator[Lingering]:
    with Lingering() as made:
        yield made


def poison(user: wire.Socket, lingering: Lingering) -> None:
    """Put a descriptor under way whose last close takes ten minutes."""
    fd = lingering.take()
    send_raw(user, b"{}", (fd,))
    os.close(fd)


def told(worker: socket.socket) -> tuple[bytes, list[int]]:
    """What a child is told to do, and with which descriptors."""
    data, fds, _, _ = socket.recv_fds(worker, 16, child.BATCH)
    return data, fds


def holds(worker: socket.socket) -> None:
    """Say that the child holds what it was given, and wait for the word to go on."""
    worker.send(child.HAVE)
    assert worker.recv(16) == child.GO


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


def arrived(broker: wire.Socket) -> tuple[int, socket.socket]:
    """Who has come, and the broker's end of the connection."""
    packet = wire.recv(broker, fds_allowed=1)
    assert packet is not None
    return Arrived.from_body(packet.body).uid, socket.socket(fileno=packet.take_fd())


def test_a_child_gets_the_connection_and_the_other_end_of_the_brokers(played: Played) -> None:
    first, broker = played.fork(), played.broker()
    user = played.connect()
    played.fork()
    uid, outer = arrived(broker)
    what, (theirs, inner) = told(first)
    assert (uid, what) == (ALICE, child.SERVE)
    holds(first)
    user.send(b"hello")
    assert os.read(theirs, 9) == b"hello"
    outer.send(b"from the broker")
    assert os.read(inner, 99) == b"from the broker"
    close(theirs, inner)
    outer.close()


def test_nothing_comes_back_from_a_child_that_was_taken_over(played: Played) -> None:
    """Else what it sends, its user's descriptors too, would be dropped by the server or the broker."""
    first, broker = played.fork(), played.broker()
    played.connect()
    played.fork()
    _, outer = arrived(broker)
    _, fds = told(first)
    holds(first)
    for beside in ((), fds):
        with pytest.raises(BrokenPipeError):
            send_raw(first, b"x", tuple(beside))
    with socket.socket(fileno=fds[1]) as inner, outer:
        inner.send(b"a request")
        if can_refuse_descriptors():
            with pytest.raises(PermissionError):
                send_raw(inner, b"x", fds[:1])
    os.close(fds[0])


def can_refuse_descriptors() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, server_module._SO_PASSRIGHTS, 0)
        return True
    return False


DIES = ("before it is told", "before it says that it has it", "at that moment", "when it works")


@pytest.mark.parametrize("when", DIES)
def test_a_child_may_die_at_any_moment_whatever_lies_in_the_connection(played: Played, lingering: Lingering, when: str) -> None:
    """N1: the server goes on at once, and so does everybody else; what was never held is given to another child."""

    def dies(worker: socket.socket) -> None:
        if when == "before it is told":
            return
        told(worker)
        if when == "at that moment":
            stop(played.pid)
            worker.send(child.HAVE)
        elif when == "when it works":
            holds(worker)

    def works(worker: socket.socket) -> None:
        told(worker)
        holds(worker)

    first, broker = played.fork(), played.broker()
    with played.stopped():
        user = played.connect()
        poison(user, lingering)
        user.close()
    spare = played.fork()
    run(first, dies)
    os.kill(played.pid, signal.SIGCONT)
    arrived(broker)[1].close()
    if when in ("before it is told", "before it says that it has it"):
        second, spare = spare, played.fork()
        arrived(broker)[1].close()
        run(second, works)
    played.connect(BOB)
    uid, outer = arrived(broker)
    played.fork()
    what, fds = told(spare)
    assert (uid, what) == (BOB, child.SERVE)
    close(*fds)
    outer.close()


def run(worker: socket.socket, script: Callable[[socket.socket], object]) -> None:
    """Let a process be that child, and end as one does, which waits for nothing that lies in its connection."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(OSError):
            script(worker)
        os._exit(0)
    worker.close()
    os.waitpid(pid, 0)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T", "the server to be stopped")


def test_a_child_that_cannot_be_told_gives_its_connection_to_the_next(played: Played) -> None:
    first, broker = played.fork(), played.broker()
    first.shutdown(socket.SHUT_RD)
    played.connect()
    second = played.fork()
    played.fork()
    for _ in range(2):
        uid, outer = arrived(broker)
        assert uid == ALICE
        outer.close()
    what, fds = told(second)
    assert what == child.SERVE
    close(*fds)
    assert not played.wants_a_child()


def test_children_that_die_before_they_are_of_use_are_not_made_for_ever(played: Played) -> None:
    worker, broker = played.fork(), played.broker()
    user = played.connect()
    for _ in range(server_module.TRIES):
        spare = played.fork()
        assert told(worker)[0] == child.SERVE
        worker.close()
        arrived(broker)[1].close()
        worker = spare
    played.fork()
    what, (fd,) = told(worker)
    assert what == child.DOWN
    refuse(worker, what, fd)
    packet = wire.recv(user)
    assert packet is not None and packet.body["error"]["code"] == "broker-down"  # type: ignore[index]


def refuse(worker: socket.socket, what: bytes, *fds: int) -> None:
    """Do as a child that is to refuse."""
    holds(worker)
    child._work(what, [socket.socket(fileno=fd) for fd in fds], worker)
    worker.close()


def test_where_there_is_no_child_to_be_had_nobody_is_lost(short_tmp: Path) -> None:
    with Played(short_tmp, PACE=0.05) as played:
        played.fork_none()
        broker = played.broker()
        users = [played.connect(uid) for uid in (ALICE, BOB)]
        for _ in range(5):
            played.fork_none()
        workers = [played.fork() for _ in range(3)]
        for user, uid, worker in zip(users, (ALICE, BOB), workers, strict=False):
            came, outer = arrived(broker)
            what, fds = told(worker)
            holds(worker)
            assert (came, what) == (uid, child.SERVE)
            user.send(b"x")
            assert os.read(fds[0], 9) == b"x"
            close(*fds)
            outer.close()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="root itself is never refused")
def test_one_child_at_a_time_drops_a_users_refused_connections_in_batches(short_tmp: Path) -> None:
    """While it hangs, the others of that user wait, up to a number; then nobody is accepted for a while."""
    with Played(short_tmp, CONNECTIONS_MAX=0, BATCH=4, REFUSED_MAX=6, PACE=0.05) as played:
        worker, broker = played.fork(), played.broker()
        users = [played.connect(ALICE) for _ in range(9)]
        hanging, worker = worker, played.fork()
        what, fds = told(hanging)
        assert (what, len(fds)) == (child.MANY, 1)
        other = played.connect(BOB)  # another user's have a child of their own, in spite of the pace
        second, worker = worker, played.fork()
        bobs, bobs_fds = told(second)
        assert bobs == child.MANY
        refuse(second, bobs, *bobs_fds)
        assert error_of(other) == "too-many"
        refuse(hanging, what, *fds)
        for size in (4, 4):
            second, worker = worker, played.fork()
            what, fds = told(second)
            assert (what, len(fds)) == (child.MANY, size)
            refuse(second, what, *fds)
        assert [error_of(user) for user in users] == ["too-many"] * 9
        assert not played.wants_a_child() and broker


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="root itself is never refused")
def test_a_child_that_is_killed_before_it_has_refused_leaves_it_to_the_next(short_tmp: Path) -> None:
    with Played(short_tmp, CONNECTIONS_MAX=0) as played:
        worker = played.fork()
        user = played.connect(ALICE)
        for _ in range(5):
            spare = played.fork()
            _, fds = told(worker)
            close(*fds)
            worker.close()
            worker = spare
        played.fork()
        what, fds = told(worker)
        refuse(worker, what, *fds)
        assert error_of(user) == "too-many"


def error_of(user: wire.Socket) -> str:
    packet = wire.recv(user)
    assert packet is not None
    error: Any = packet.body["error"]
    return str(error["code"])


# --- how often --------------------------------------------------------------------------------------------------------


def test_a_rate_is_so_many_in_a_row_and_so_many_each_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(rate, "monotonic", lambda: now)
    limited = rate.Rate(3, 2)
    assert [limited.allows(1) for _ in range(5)] == [True, True, True, False, False]
    assert limited.allows(2), "another user"
    now += 0.5
    assert [limited.allows(1) for _ in range(2)] == [True, False]
    now += 60
    assert [limited.allows(1) for _ in range(4)] == [True, True, True, False]


def test_who_has_been_away_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(rate, "monotonic", lambda: now)
    limited = rate.Rate(3, 2)
    for uid in range(10 * rate.FORGET_AT):
        limited.allows(uid)
        now += 0.1
    assert len(limited._left) <= 2 * rate.FORGET_AT
