"""`connect`: a real TCP connection to where a fake broker says, bytes both ways, ends, breaks and slow sides."""

from __future__ import annotations

import hashlib
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import FakeBroker
from tests.fakes.shell import PROMPT, environment, leave, run, spawn, starter
from vmshell.layout import Layout
from vmshell.refusals import NotConnected, WrongState

SIZE = 16 << 20
LONG = 60  # seconds


class Guest:
    """The other end of the connection, served by *act* in a thread of its own."""

    def __init__(self, act: Callable[[socket.socket], object]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._act = act
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def answer(self, body: dict[str, object]) -> dict[str, object]:
        address, port = self._listener.getsockname()
        return {"name": body["vm"], "address": address, "port": port}

    def done(self) -> None:
        self._thread.join(LONG)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        sock, _ = self._listener.accept()
        with self._listener, sock:
            sock.settimeout(LONG)
            self._act(sock)


@pytest.fixture
def broker(layout: Layout) -> Iterator[FakeBroker]:
    with FakeBroker(layout) as fake:
        yield fake


def start(broker: FakeBroker, folder: Path, act: Callable[[socket.socket], object]) -> tuple[subprocess.Popen[bytes], Guest]:
    guest = Guest(act)
    broker.answers["connect"] = guest.answer
    command = [starter(folder), "--layout", broker.layout.to_args(), "connect", "web1:22"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment()), guest


def read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


def one_byte(sock: socket.socket) -> None:
    """Send it, and stay until the other side goes."""
    sock.sendall(b"x")
    read_all(sock)


def test_sixteen_mebibytes_both_ways_at_once(broker: FakeBroker, short_tmp: Path) -> None:
    """Neither way waits for the other: each side sends everything before it reads a byte."""
    inwards, outwards = random.Random(1).randbytes(SIZE), random.Random(2).randbytes(SIZE)
    got = []

    def act(sock: socket.socket) -> None:
        sender = threading.Thread(target=sock.sendall, args=(outwards,))
        sender.start()
        sender.join()
        got.append(read_all(sock))

    shell, guest = start(broker, short_tmp, act)
    output, errors = shell.communicate(inwards, timeout=LONG)
    guest.done()
    assert (shell.returncode, errors) == (0, b"")
    assert hashlib.sha256(output).digest() == hashlib.sha256(outwards).digest()
    assert hashlib.sha256(got[0]).digest() == hashlib.sha256(inwards).digest()
    assert broker.requests[-1]["port"] == 22


def test_a_request_in_two_words_and_every_byte(broker: FakeBroker, short_tmp: Path) -> None:
    every = bytes(range(256)) * 3
    for words in (["connect", "web1", "80"], ["nc", "alice/web1:80"]):
        guest = Guest(lambda sock: sock.sendall(read_all(sock)))
        broker.answers["connect"] = guest.answer
        done = run(short_tmp, broker.layout, *words, input=every)
        assert (done.returncode, done.stdout, done.stderr) == (0, every, b"")
        assert broker.requests[-1]["port"] == 80


def test_the_end_of_the_input_is_passed_on_and_the_answer_still_comes(broker: FakeBroker, short_tmp: Path) -> None:
    def act(sock: socket.socket) -> None:
        assert read_all(sock) == b"question"
        time.sleep(1)  # longer than what the other half-close waits for
        sock.sendall(b"answer")

    shell, guest = start(broker, short_tmp, act)
    assert shell.communicate(b"question", timeout=LONG) == (b"answer", b"")
    guest.done()
    assert shell.returncode == 0


def test_the_guests_end_is_ours_though_the_input_goes_on(broker: FakeBroker, short_tmp: Path) -> None:
    shell, guest = start(broker, short_tmp, lambda sock: sock.sendall(b"bye"))
    assert shell.stdin is not None and shell.stdout is not None and shell.stderr is not None
    with shell:
        assert shell.stdout.read() == b"bye"
        assert shell.wait(LONG) == 0  # its input is still open
        assert shell.stderr.read() == b""
    guest.done()


def test_a_guest_that_only_stops_sending_gets_the_rest(broker: FakeBroker, short_tmp: Path) -> None:
    got = []

    def act(sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)
        got.append(read_all(sock))

    shell, guest = start(broker, short_tmp, act)
    data = random.Random(3).randbytes(SIZE)
    assert shell.communicate(data, timeout=LONG) == (b"", b"")
    guest.done()
    assert shell.returncode == 0 and got[0] == data


def test_a_slow_reader_holds_the_guest_up(broker: FakeBroker, short_tmp: Path) -> None:
    data = random.Random(4).randbytes(2 * SIZE)
    sent = [0]
    stuck = threading.Event()

    def act(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
        sock.settimeout(1)
        view = memoryview(data)
        while view:
            try:
                count = sock.send(view)
            except TimeoutError:
                stuck.set()
                sock.settimeout(LONG)
                continue
            sent[0] += count
            view = view[count:]

    shell, guest = start(broker, short_tmp, act)
    assert shell.stdout is not None
    with shell:
        assert stuck.wait(LONG) and sent[0] < len(data)  # nobody reads: what is kept on the way has a bound
        assert shell.stdout.read() == data
        assert shell.wait(LONG) == 0
    guest.done()


def test_a_connection_that_breaks_says_so_on_stderr_only(broker: FakeBroker, short_tmp: Path) -> None:
    def act(sock: socket.socket) -> None:
        sock.sendall(b"half a")
        assert sock.recv(1) == b"x"
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets

    shell, guest = start(broker, short_tmp, act)
    assert shell.stdin is not None and shell.stdout is not None and shell.stderr is not None
    with shell:
        assert shell.stdout.read(6) == b"half a"
        shell.stdin.write(b"x")
        shell.stdin.flush()
        assert shell.wait(LONG) == 4
        assert shell.stdout.read() == b""
        assert b"web1 cannot be reached: the connection broke" in shell.stderr.read()
    guest.done()


def test_a_reader_that_leaves_ends_it_in_silence(broker: FakeBroker, short_tmp: Path) -> None:
    shell, guest = start(broker, short_tmp, one_byte)
    assert shell.stdout is not None and shell.stderr is not None
    with shell:
        assert shell.stdout.read(1) == b"x"
        shell.stdout.close()
        assert shell.wait(LONG) == 1  # though neither side sends anything
        assert shell.stderr.read() == b""
    guest.done()


def test_ctrl_c(broker: FakeBroker, short_tmp: Path) -> None:
    shell, guest = start(broker, short_tmp, one_byte)
    assert shell.stdout is not None and shell.stderr is not None
    with shell:
        assert shell.stdout.read(1) == b"x"
        shell.send_signal(signal.SIGINT)
        assert shell.wait(LONG) == 130
        assert shell.stdout.read() == shell.stderr.read() == b""
    guest.done()


def test_what_the_broker_refuses(broker: FakeBroker, short_tmp: Path) -> None:
    for error, status in (
        (WrongState(vm="web1", state="off", verb="connect", needed="running"), 4),
        (NotConnected(vm="web1", problem="connection refused"), 4),
    ):
        broker.answers["connect"] = error
        done = run(short_tmp, broker.layout, "connect", "web1:22", input=b"x")
        assert (done.returncode, done.stdout) == (status, b"") and error.sentence().encode() in done.stderr
    broker.answers["connect"] = {"name": "web1"}  # and no address
    assert run(short_tmp, broker.layout, "connect", "web1:22").returncode == 70


def test_a_guest_that_does_not_listen(broker: FakeBroker, short_tmp: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address, port = closed.getsockname()
    broker.answers["connect"] = {"name": "web1", "address": address, "port": port}
    done = run(short_tmp, broker.layout, "connect", "web1:22")
    assert done.returncode == 4 and b"web1 cannot be reached: connection refused" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["connect"],
        ["connect", "web1"],
        ["connect", "web1:"],
        ["connect", "web1:0"],
        ["connect", "web1:65536"],
        ["connect", "web1:-1"],
        ["connect", "web1:22x"],
        ["connect", "web1:٢٢"],
        ["connect", "web1", "ssh"],
        ["connect", "web1:22", "22"],
        ["connect", "web1", "22", "23"],
        ["connect", ":22"],
        ["connect", "a/b/c:22"],
        ["connect", "Web1:22"],
        ["connect", "10.77.0.2:22"],
        ["connect", "--", "-web1:22"],
        ["connect", "web1:22\n"],
        ["connect", "web1:22", "--json"],
    ],
)
def test_bad_words_are_refused_before_anything_is_sent(broker: FakeBroker, short_tmp: Path, words: list[str]) -> None:
    done = run(short_tmp, broker.layout, *words)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.startswith(b"vmshell: ")
    assert broker.requests == []


def test_not_from_a_list_of_requests(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, input=b"connect web1:22\nlist\n")
    assert b"standard input" in done.stderr and broker.verbs() == ["list"]


def test_on_a_terminal_the_guest_cannot_make_it_type(broker: FakeBroker, short_tmp: Path) -> None:
    """E03; lines, the end of the input and the way back to the prompt."""
    got = []

    def act(sock: socket.socket) -> None:
        sock.sendall(b"\x1b]0;title\x07\x1b[6nhello\n")
        got.append(read_all(sock))
        sock.sendall(b"thanks\n")

    guest = Guest(act)
    broker.answers["connect"] = guest.answer
    broker.answers["list"] = {"vms": [], "more": False}
    child = spawn(short_tmp, broker.layout)
    child.expect_exact(PROMPT)
    child.send("connect web1:80\r")
    child.expect_exact("hello\r\n")
    assert "\x1b]0" not in child.before and "\x1b[6n" not in child.before
    child.send("GET /\r\x04")
    child.expect_exact("thanks\r\n")
    guest.done()
    assert got == [b"GET /\n"]
    child.expect_exact("vmshell>")
    child.send("help exit\r")
    child.expect_exact("usage: exit")
    child.send("exit\r")
    assert leave(child) == 0


def test_display_is_pumped_the_same_way(broker: FakeBroker, short_tmp: Path) -> None:
    ours, theirs = socket.socketpair()
    broker.answers["display"] = lambda body: ({"name": body["vm"]}, (theirs.detach(),))

    def act() -> None:
        ours.sendall(read_all(ours)[::-1])
        ours.close()

    server = threading.Thread(target=act)
    server.start()
    done = run(short_tmp, broker.layout, "display", "web1", input=b"RFB 003.008\n")
    server.join(LONG)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\n800.300 BFR", b"")
