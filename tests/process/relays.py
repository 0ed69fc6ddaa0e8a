"""A real relay process for tests: started, spoken to as the broker does, killed, started again; and a service manager for it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.consoles import Viewer
from vmshell import wire
from vmshell.broker.lifecycle import serial_port
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.layout import Layout
from vmshell.messages import Attach, Event, ToRelay, Watch

PATIENCE = 60.0
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable

# Gives descriptors the numbers 3, 4, … and says whose they are, as the service manager does between fork and exec.
_STARTER = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 200) for fd in sys.argv[2].split(",") if fd]
for index, fd in enumerate(fds):
    os.dup2(fd, 3 + index)
os.closerange(3 + len(fds), 1000)
os.environ.update(LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=sys.argv[1], LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[3], sys.argv[3:])
"""


def until(done: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for *done()* to be true and return it."""
    end = time.monotonic() + seconds
    while not (value := done()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return value


@contextlib.contextmanager
def console_pipes() -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The ends of a console's two pipes: the relay's (keys, output) and the viewer's (output, keys)."""
    keys, typed = os.pipe()
    shown, output = os.pipe()
    try:
        yield (keys, output), (shown, typed)
    finally:
        for fd in (keys, typed, shown, output):
            os.close(fd)


class ServiceManager:
    """Keeps descriptors as systemd's store does, under NOTIFY_SOCKET."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/notify"
        self.messages: list[str] = []
        self.stored: list[tuple[str, int]] = []
        self._lock = threading.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(self.path)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def names(self) -> list[str]:
        with self._lock:
            return [name for name, _ in self.stored]

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._sock.close()
        for _, fd in self.stored:
            os.close(fd)

    def _serve(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 4096, 4)
            if not data:
                return
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            with self._lock:
                self.messages.append(data.decode())
                if "FDSTORE" in fields:
                    self.stored += [(fields["FDNAME"], fd) for fd in fds]
                if "FDSTOREREMOVE" in fields:
                    for name, fd in [item for item in self.stored if item[0] == fields["FDNAME"]]:
                        self.stored.remove((name, fd))
                        os.close(fd)
                if "BARRIER" in fields:
                    for fd in fds:
                        os.close(fd)


class RelayProcess:
    """The relay and the broker's connection to it. Words are collected in `words` as (number, word, count)."""

    def __init__(self, layout: Layout, manager: ServiceManager | None = None, journal: str = "") -> None:
        self.layout = layout
        self._journal = journal  # where what it says goes
        self.manager = manager
        self.words: list[tuple[int, str, int]] = []
        self._id = 0
        self._listener: socket.socket | None = None
        if manager is not None:
            os.makedirs(layout.run, exist_ok=True)
            self._listener = wire.listen(layout.relay_socket, 0o600)
        self.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> None:
        command = [PYTHON, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "relay", self.layout.to_args()]
        if self.manager is None:
            with open(self._journal, "a") if self._journal else contextlib.nullcontext() as stderr:
                self.process = subprocess.Popen(command, stderr=stderr)
        else:
            assert self._listener is not None
            items = [("relay", self._listener.fileno()), *self.manager.stored]
            names, fds = ":".join(name for name, _ in items), [fd for _, fd in items]
            starter = [PYTHON, "-c", _STARTER, names, ",".join(map(str, fds)), *command]
            environ = {**os.environ, "NOTIFY_SOCKET": self.manager.path}
            self.process = subprocess.Popen(starter, pass_fds=fds, env=environ)
        self.broker = self.connect()

    def connect(self) -> wire.Socket:
        def attempt() -> wire.Socket | None:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return wire.connect(self.layout.relay_socket, PATIENCE)
            assert self.process.poll() is None, "the relay has ended"
            return None

        found: wire.Socket = until(attempt, "the relay's socket")
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """End the process by signal *number* and return its exit status."""
        self.broker.close()
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            assert self.end() == 0
        if self._listener is not None:
            self._listener.close()

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the broker's side ---

    def send(self, message: ToRelay, *fds: int) -> int:
        self._id += 1
        wire.send(self.broker, {"id": self._id, **message.to_body()}, fds)
        return self._id

    def ask(self, message: ToRelay, *fds: int) -> dict[str, Any]:
        """Send *message* and return its answer: `{"ok": …}` or `{"error": …}`."""
        return self.answer(self.send(message, *fds))

    def answer(self, ident: int) -> dict[str, Any]:
        """The answer to the message with this number."""
        while True:
            body = self._receive()
            if body is not None and body.get("id") == ident:
                return body

    def tell(self, message: ToRelay, *fds: int) -> None:
        answer = self.ask(message, *fds)
        assert "ok" in answer, answer

    def watch(self, number: int, *errors: int, **options: Any) -> None:
        """Put a VM into the relay's care as the broker does: with its serial port, and with the error pipe of a new QEMU."""
        with contextlib.ExitStack() as stack:
            console = serial_port.open_both(self.layout.vm_run(number), stack)
            self.tell(Watch(number=number, **options), *console, *errors)

    def attach(self, number: int, label: str = "alice", uid: int = 1001, **options: Any) -> Viewer:
        """Attach a viewer."""
        with console_pipes() as (theirs, ours):
            self.tell(Attach(number=number, uid=uid, label=label, **options), *theirs)
            return Viewer(tuple(os.dup(fd) for fd in ours))

    def wait_word(self, number: int, word: str, seconds: float = PATIENCE, count: int = 0) -> None:
        """Wait until *word* has been said about VM *number* (with *count*)."""
        end = time.monotonic() + seconds
        while True:
            if (number, word, count) in self.words:
                return
            assert time.monotonic() < end, f"no word {word!r} about {number} in {self.words}"
            self.broker.settimeout(0.5)
            try:
                self._receive()
            except TimeoutError:
                pass
            finally:
                self.broker.settimeout(PATIENCE)

    def _receive(self) -> dict[str, Any] | None:
        packet = wire.recv(self.broker)
        assert packet is not None, "the relay closed the broker's connection"
        body: dict[str, Any] = packet.body
        if body.get("verb") == "event":
            event = Event.from_body(body)
            self.words.append((event.number, event.word, event.count))
            return None
        return body


def rss(pid: int) -> int:
    """The resident memory of *pid* in bytes."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def lost_in(log: bytes, said: bytes) -> list[int]:
    """The sizes of the pieces of *said* (lines, no two alike) that *log* has not; all else must be there, once and in order."""
    lost, at = [], 0
    while log:
        size = _common(log, said[at:])
        log, at = log[size:], at + size
        if log:
            # A line that is whole says where the log goes on; the one before it may have been cut in two.
            start = log.index(b"\n") + 1
            again = said.find(log[start : log.index(b"\n", start) + 1], at) - start
            assert again > at, f"something stands there twice: {log[:80]!r}"
            lost.append(again - at)
            at = again
    assert at == len(said)
    return lost


def _common(one: bytes, other: bytes) -> int:
    """How many bytes the two begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low
