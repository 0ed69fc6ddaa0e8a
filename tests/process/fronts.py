"""A real front process without rights, its sockets as the service manager passes them; users, and the broker's part."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.process.launchers import status
from tests.process.relays import _STARTER as STARTER
from tests.process.relays import PATIENCE, PYTHON, until
from vmshell import brokeraccount, wire
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.layout import Layout
from vmshell.messages import Arrived

ALICE, BOB, CAROL = 64_912, 64_913, 64_914
BROKER = brokeraccount.uid()
RIGHTS = ("--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--")
_UIDS = itertools.count(2_200_000_000 + os.getpid() * 100)  # a front's own: what it has counts against no other's limits
# The same process, with other values of the constants that argv names as MODULE.NAME=VALUE.
_PATCHED = """
import importlib, sys
from vmshell.front.main import main
for word in sys.argv[2:]:
    place, _, value = word.partition("=")
    name, _, constant = place.rpartition(".")
    module = importlib.import_module(f"vmshell.front.{name}")
    setattr(module, constant, type(getattr(module, constant))(value))
main(sys.argv[1:2])
"""

Body = dict[str, Any]


class Served:
    """The broker's end of one user's connection."""

    def __init__(self, uid: int, fd: int) -> None:
        self.uid = uid
        self.sock = socket.socket(fileno=fd)
        self.sock.settimeout(PATIENCE)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def request(self) -> Body:
        """The next request."""
        packet = wire.recv(self.sock)
        assert packet is not None, "the child has gone"
        return packet.body

    def answer(self, body: Body, *fds: int) -> None:
        wire.send(self.sock, body, fds)

    def has_request(self) -> bool:
        """Has anything come?"""
        return bool(select.select([self.sock], [], [], 0)[0])

    def ended(self) -> bool:
        """Wait for the end of the connection, with nothing before it."""
        with contextlib.suppress(ConnectionError):
            return wire.recv(self.sock) is None
        return True


class Front:
    """The process; a context manager. *patched*: constants of its modules, as `server.BROKER_PATIENCE=1`.

    *limits* are options of prlimit(1) that it starts with.
    """

    def __init__(self, folder: Path, *patched: str, limits: tuple[str, ...] = ()) -> None:
        parts = {name: str(folder / name) for name in ("etc", "state", "run", "log")}
        self.layout = Layout(**parts, embedded=False)
        self.uid = next(_UIDS)
        self._patched, self._limits = patched, limits
        os.makedirs(self.layout.run, exist_ok=True)
        self.users = wire.listen(self.layout.broker_socket, 0o666)
        self.control = wire.listen(self.layout.front_socket, 0o600)
        os.chown(self.layout.front_socket, BROKER, -1)
        self._journal, self._errors = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(self._errors, True)
        self.journal = ""
        self._open = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        """Start the process (again), as the service manager does."""
        if self._patched:
            code = [PYTHON, "-S", "-c", _PATCHED, self.layout.to_args(), *self._patched]
        else:
            code = [PYTHON, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "front", self.layout.to_args()]
        limits = ["prlimit", *self._limits, "--"] if self._limits else []
        fds = (self.users.fileno(), self.control.fileno())
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-IS", "-c", STARTER, "broker:front", ",".join(map(str, fds)), "/usr/bin/env"),
                *(*limits, "setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", *RIGHTS, *code),
            ],
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": os.path.dirname(PACKAGE_DIR)},
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )

    # --- who speaks to it ---------------------------------------------------------------------------------------------

    def connect(self, uid: int = ALICE) -> wire.Socket:
        """A connection of *uid*: the kernel remembers who connected."""
        return self._connect(self.layout.broker_socket, uid)

    def broker(self, uid: int = BROKER) -> Broker:
        return Broker(self._connect(self.layout.front_socket, uid))

    def _connect(self, path: str, uid: int) -> wire.Socket:
        os.seteuid(uid)
        try:
            return self._open.enter_context(wire.connect(path, PATIENCE))
        finally:
            os.seteuid(0)

    @contextlib.contextmanager
    def serving(self, uid: int = ALICE) -> Iterator[tuple[wire.Socket, Served]]:
        """A broker and one connection: the user's end and the broker's."""
        with self.broker() as broker, self.connect(uid) as user, broker.take() as served:
            yield user, served

    @contextlib.contextmanager
    def serving_two(self) -> Iterator[tuple[wire.Socket, Served, wire.Socket, Served]]:
        """A broker, alice's connection and bob's, each with the broker's end."""
        with self.broker() as broker, self.connect(ALICE) as alice, broker.take() as hers, self.connect(BOB) as bob:
            his = broker.take()
            yield alice, hers, bob, his
            his.sock.close()

    # --- what there is ------------------------------------------------------------------------------------------------

    def zygote(self) -> int:
        found: int = until(lambda: next(iter(_children(self.process.pid)), 0), "the zygote")
        return found

    def children(self, *, caged: bool) -> list[int]:
        """The children at work (caged), or the one that waits for work."""
        found = []
        for pid in _children(self.zygote()):
            with contextlib.suppress(OSError, StopIteration):
                if (status(pid, "Seccomp") == [2]) is caged:
                    found.append(pid)
        return found

    def child(self) -> int:
        """The one child at work."""
        until(lambda: self.children(caged=True), "a child at work")
        (pid,) = self.children(caged=True)
        return pid

    def spare(self) -> int:
        """The child that waits for work."""
        # One that has work already is not caged for a moment.
        until(lambda: len(self.children(caged=False)) == 1, "a child that waits")
        (pid,) = self.children(caged=False)
        return pid

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def said(self, text: str) -> bool:
        """Has it said *text* so far?"""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._journal, 65536):
                self.journal += data.decode()
        return text in self.journal

    # --- its end ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if self.process.poll() is None:
            pids = [self.process.pid, *_children(self.process.pid)]
            self.kill()
            until(lambda: not any(map(_runs, pids)), "its zygote to end")
        for sock in (self.users, self.control):
            sock.close()
        self.said("")
        sys.stderr.write(self.journal)
        os.close(self._journal)
        os.close(self._errors)


class Broker:
    """The broker's connection to the front."""

    def __init__(self, sock: wire.Socket) -> None:
        self.sock = sock

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def take(self) -> Served:
        """The next who has come."""
        packet = wire.recv(self.sock, fds_allowed=1)
        assert packet is not None, "the front has closed the connection"
        return Served(Arrived.from_body(packet.body).uid, packet.take_fd())


def ask(user: wire.Socket, served: Served, body: Body | None = None, answer: Body | None = None, *fds: int) -> wire.Packet:
    """Send a request, answer it with *answer*; what the user gets."""
    wire.send(user, {"id": 1, "verb": "whoami"} if body is None else body)
    ident = served.request()["id"]
    served.answer({"id": ident, "ok": {"user": "alice"} if answer is None else answer}, *fds)
    return receive(user)


def receive(user: wire.Socket) -> wire.Packet:
    """The next packet that a user gets."""
    packet = wire.recv(user, fds_allowed=2)
    assert packet is not None, "the front has closed the connection"
    return packet


def refusal(user: wire.Socket) -> Body:
    """The error that a user gets next."""
    error: Body = receive(user).body["error"]  # type: ignore[assignment]
    return error


def ended(user: wire.Socket) -> bool:
    """Wait for the end of a user's connection, with nothing before it."""
    with contextlib.suppress(ConnectionError):
        return wire.recv(user) is None
    return True


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not _runs(pid), f"the end of {pid}")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process sees nothing of what happens meanwhile, and all of it at once afterwards."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: _state(pid) == "T", f"{pid} to be stopped")
    yield
    os.kill(pid, signal.SIGCONT)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _runs(pid: int) -> bool:
    return _state(pid) not in "ZX"


def _state(pid: int) -> str:
    """The letter of the process in /proc/PID/stat; X if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(") ")[2][0]
    except OSError:
        return "X"


def send_raw(sock: wire.Socket | socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send *data*, whatever it is, with *fds* beside it."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
