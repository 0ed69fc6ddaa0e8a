"""The monitor of one QEMU: a line of JSON each way, commands of ours, a handful of events.

QEMU may have been taken over by its guest (threat B46), so everything it says is bounded: a line has 64 KiB, a value sixteen
levels, 32 lines are handled in one go, 500 lines or 256 KiB in a second, an answer has 30 seconds (while one
of our jobs stops QEMU, as long as the job), and what is not understood a few times over closes the connection. Nothing from
here is used as a path, shown to a person or passed on: the VM hears a run state and the names in `EVENTS`, and who gave a
command hears whether it was done (`orders.py` has the commands, `jobs.py` those that take long).
Runs in: the relay. Touches one `qmp.sock`.
"""

from __future__ import annotations

import array
import json
import socket

from .. import encoding
from ..errors import ProtocolError
from .loop import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from .loop import Loop, Timer

    Answer = Callable[[bool, object], None]

    class Machine(Protocol):
        """Whose monitor it is."""

        def monitor_ready(self, status: str) -> None: ...
        def monitor_event(self, name: str, data: dict[str, object]) -> None: ...
        def monitor_lost(self, why: str) -> None: ...


LINE_MAX = 64 * 1024
READ_MAX = 16 * 1024
LAST_READS = 16
LINES_PER_TURN = 32
LINES_PER_SECOND = 500
BYTES_PER_SECOND = 256 * 1024
BAD_LINES_MAX = 8
PENDING_MAX = 32
GREETING_TIME = 30.0  # QEMU may wait long for its turn while fifty others boot
ANSWER_TIME = 30.0

EVENTS = frozenset(("RESUME", "STOP", "SHUTDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR", "RESET"))


class Lines:
    """Cuts a byte stream into lines, never keeping more than one line and one read."""

    __slots__ = ("_data", "_seen")

    def __init__(self) -> None:
        self._data = bytearray()
        self._seen = 0  # how far we have looked for the end: a line that comes byte by byte is looked at once

    def feed(self, data: bytes) -> None:
        self._data += data

    def next(self) -> bytes | None:
        """The next whole line without its end, None when there is none yet; raises ProtocolError when it grows too long."""
        end = self._data.find(b"\n", self._seen)
        if end < 0:
            self._seen = len(self._data)
            if self._seen > LINE_MAX:
                raise ProtocolError(problem="a line without an end")
            return None
        if end > LINE_MAX:
            raise ProtocolError(problem="a line is too long")
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        self._seen = 0
        return line

    def whole(self) -> bool:
        """Is another whole line here?"""
        return self._data.find(b"\n", self._seen) >= 0


class Monitor:
    """One connection to one monitor, from the connect to its loss; the VM makes a new one to try again."""

    def __init__(self, loop: Loop, machine: Machine, sock: socket.socket) -> None:
        self.ready = False
        self._loop = loop
        self._machine = machine
        self._sock = sock
        self._fd = sock.fileno()
        self._lines = Lines()
        self._greeted = False
        self._number = 0
        self._bad = 0
        self._count = self._bytes = 0  # lines and bytes in this second
        self._second = 0
        self._asking = False  # a query-status is on its way
        self._ask_again = False
        self._pending: dict[int, Answer] = {}
        self._deadlines: dict[int, Timer] = {}
        self._excused_until = 0.0
        self._pause: Timer | None = None
        loop.add(self._fd, IN, self._on_event, self)
        self._expect(0, GREETING_TIME)

    # --- for the VM ---

    def execute(self, command: str, arguments: dict[str, object], answer: Answer, fd: int = -1) -> None:
        """Give a command, with *fd* beside it (it stays open here); *answer(done, body)* is called exactly once."""
        if not self.ready or len(self._pending) >= PENDING_MAX:
            answer(False, None)
        else:
            self._execute(command, arguments, answer, fd)

    def excuse(self, until: float) -> None:
        """QEMU is busy with something of ours: up to then, answers may come late."""
        self._excused_until = until

    def ask_status(self) -> None:
        """Have `monitor_event("STATUS", …)` say QEMU's run state; one question at a time however often it is asked."""
        if self._asking:
            self._ask_again = True
        elif self.ready:
            self._asking = True
            self._execute("query-status", {}, self._status)

    def finish(self) -> None:
        """QEMU is gone: hear what it said last. Its end may be known before the event that explains it was read."""
        try:
            for _ in range(LAST_READS):
                data = self._sock.recv(READ_MAX)
                if not data:
                    break
                self._lines.feed(data)
            while (line := self._lines.next()) is not None:
                self._on_line(line)
        except (OSError, ProtocolError):
            return

    def close(self) -> None:
        """Close without a word to the VM; whatever was pending is answered with False."""
        if self._fd < 0:
            return
        self._loop.drop(self._fd)
        self._fd = -1
        self._sock.close()
        self.ready = False
        for timer in self._deadlines.values():
            timer.cancel()
        if self._pause is not None:
            self._pause.cancel()
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer(False, None)

    def broken(self, exc: Exception) -> None:
        self._lose(type(exc).__name__)

    # --- the connection ---

    def _lose(self, why: str) -> None:
        if self._fd >= 0:
            self.close()
            self._machine.monitor_lost(why)

    def _on_event(self, events: int) -> None:
        try:
            data = self._sock.recv(READ_MAX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as exc:
            self._lose(exc.strerror or "error")
            return
        if not data:
            self._lose("closed")
            return
        self._bytes += len(data)
        self._lines.feed(data)
        self._work()

    def _work(self) -> None:
        """Handle a few lines; with more of them waiting, or too many in this second, stop reading and go on later."""
        self._pause = None
        try:
            for _ in range(LINES_PER_TURN):
                line = self._lines.next()
                if line is None:
                    break
                self._on_line(line)
                if self._fd < 0:
                    return
        except ProtocolError as exc:
            self._lose(str(exc))
            return
        wait = 0.0
        second = int(self._loop.now)
        if second != self._second:
            self._second, self._count, self._bytes = second, 0, 0
        if self._count >= LINES_PER_SECOND or self._bytes >= BYTES_PER_SECOND:
            wait = second + 1 - self._loop.now
        if wait or self._lines.whole():
            self._loop.want(self._fd, 0)
            self._pause = self._loop.after(wait, self._work, self)
        else:
            self._loop.want(self._fd, IN)

    def _on_line(self, line: bytes) -> None:
        self._count += 1
        try:
            body = encoding.decode(line)
        except ProtocolError:
            self._bad_line()
            return
        if not self._greeted:
            self._on_greeting(body)
        elif "event" in body:
            name, data = body["event"], body.get("data", {})
            if self.ready and isinstance(name, str) and name in EVENTS:
                self._machine.monitor_event(name, data if isinstance(data, dict) else {})
        else:
            self._on_answer(body)

    def _bad_line(self) -> None:
        self._bad += 1
        if self._bad > BAD_LINES_MAX:
            raise ProtocolError(problem="it does not speak QMP")

    def _on_greeting(self, body: dict[str, object]) -> None:
        if not isinstance(body.get("QMP"), dict):
            raise ProtocolError(problem="no greeting")
        self._greeted = True
        self._met(0)
        self._execute("qmp_capabilities", {}, self._negotiated)

    def _negotiated(self, done: bool, body: object) -> None:
        if not done:
            self._lose("refused to negotiate")
            return
        self._execute("query-status", {}, self._first_status)

    def _first_status(self, done: bool, body: object) -> None:
        status = body.get("status") if isinstance(body, dict) else None
        if not done or not isinstance(status, str):
            self._lose("no status")
            return
        self.ready = True
        self._machine.monitor_ready(status)

    def _status(self, done: bool, body: object) -> None:
        self._asking = False
        if done and isinstance(body, dict):
            self._machine.monitor_event("STATUS", body)
        if self._ask_again:
            self._ask_again = False
            self.ask_status()

    def _on_answer(self, body: dict[str, object]) -> None:
        number = body.get("id")
        answer = self._pending.pop(number, None) if type(number) is int else None
        if answer is None:
            self._bad_line()
            return
        assert type(number) is int
        self._met(number)
        answer("return" in body, body.get("return"))

    def _execute(self, command: str, arguments: dict[str, object], answer: Answer, fd: int = -1) -> None:
        self._number += 1
        number = self._number
        body: dict[str, object] = {"execute": command, "id": number}
        if arguments:
            body["arguments"] = arguments
        line = json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n"
        self._pending[number] = answer
        self._expect(number, ANSWER_TIME)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            # Commands are short and answered one by one: a QEMU whose buffer is full of them has stopped listening.
            if self._sock.sendmsg([line], ancillary) != len(line):
                self._lose("does not read")
        except OSError as exc:
            self._lose(exc.strerror or "error")

    def _expect(self, number: int, seconds: float) -> None:
        self._deadlines[number] = self._loop.after(seconds, lambda: self._late(number), self)

    def _met(self, number: int) -> None:
        timer = self._deadlines.pop(number, None)
        if timer is not None:
            timer.cancel()

    def _late(self, number: int) -> None:
        excused = self._excused_until - self._loop.now
        if excused > 0:
            self._expect(number, min(ANSWER_TIME, excused))
        else:
            self._lose("does not answer")


def connect(path: str) -> socket.socket:
    """A non-blocking connection to one of QEMU's listening sockets; raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
