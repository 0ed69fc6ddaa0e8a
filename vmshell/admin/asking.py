"""How vmshell-admin asks the running broker: one request, one answer, and nothing in that is believed before it is looked at.

Root asks a process that has no rights of its own and may be anybody's by now. So the whole conversation has one time limit,
whatever arrives meanwhile; each value is checked for its kind and escaped when it is taken out; and no descriptor is ever
received. Dropping one can take as long as its sender likes (a TCP connection that lingers: 5 s, tried), so a packet is looked at
while it lies in the kernel's queue and only taken if it brings none, and the socket is left to the end of the process, which
does not wait for what is in it.
Runs in: vmshell-admin. Touches the broker's socket.
"""

from __future__ import annotations

import contextlib
import socket
import time

from .. import encoding, messages, wire
from ..errors import ProtocolError, safe
from ..layout import Layout
from ..refusals import BrokerDown, from_wire

PATIENCE = 30.0  # seconds for a whole answer; a broker that has just started may look at the host first
IDENT = 1


class Answer:
    """What the broker answered to a request of *verb*. Each look at it raises ProtocolError where it is not of the right kind."""

    def __init__(self, verb: str, body: dict[str, object]) -> None:
        self._verb = verb
        self._body = body

    def number(self, key: str) -> int:
        """A whole number from 0 on."""
        value = self._body.get(key)
        if type(value) is not int or value < 0:
            raise self.wrong(key)
        return value

    def text(self, key: str) -> str:
        """A text, fit for a terminal."""
        value = self._body.get(key)
        if not isinstance(value, str):
            raise self.wrong(key)
        return safe(value)

    def texts(self, key: str, limit: int = 300) -> list[str]:
        """A list of texts, each fit for a terminal and cut at *limit* characters."""
        value = self._body.get(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.wrong(key)
        return [safe(text, limit) for text in value]

    def lacking(self, key: str) -> frozenset[str]:
        """The names that a table of names says no to."""
        value = self._body.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key)
        return frozenset(name for name, there in value.items() if there is False)

    def rows(self, key: str, count: int) -> list[Answer]:
        """Exactly *count* tables: as many as were asked about."""
        value = self._body.get(key)
        if not isinstance(value, list) or len(value) != count:
            raise self.wrong(key)
        return [self._part(key, row) for row in value]

    def table(self, key: str) -> Answer:
        return self._part(key, self._body.get(key))

    def _part(self, key: str, value: object) -> Answer:
        if not isinstance(value, dict):
            raise self.wrong(key)
        return Answer(self._verb, value)

    def wrong(self, key: str) -> ProtocolError:
        return ProtocolError(problem=f"what the VM service answered to {self._verb} has no {key}, or not as agreed")


def ask(layout: Layout, request: messages.Request, patience: float | None = None) -> Answer:
    """Send *request* and return the answer; raises what the broker refused with, BrokerDown or ProtocolError."""
    end = time.monotonic() + (PATIENCE if patience is None else patience)
    try:
        sock = wire.connect(layout.broker_socket, end - time.monotonic())
        try:
            with contextlib.suppress(BrokenPipeError):  # refused at accept: why is still to be read
                wire.send(sock, {"id": IDENT, **request.to_body()})
            while True:
                body = _packet(sock, end)
                if "progress" not in body:
                    return _answer(request.verb, body)
        finally:
            _leave(sock)
    except TimeoutError as exc:
        raise BrokerDown(problem="no answer in time") from exc
    except OSError as exc:
        raise BrokerDown(problem=(exc.strerror or str(exc)).lower()) from exc


def _answer(verb: str, body: dict[str, object]) -> Answer:
    if "error" in body:
        raise from_wire(body["error"])
    answer = body.get("ok")
    if body.get("id") != IDENT or not isinstance(answer, dict):
        raise ProtocolError(problem=f"what the VM service answered to {verb} is neither a result nor an error")
    return Answer(verb, answer)


def _packet(sock: wire.Socket, end: float) -> dict[str, object]:
    """The next packet, if it comes before *end* and brings no descriptor; else it stays in the queue."""
    try:
        data, flags = _look(sock, end)
    except ConnectionResetError:
        data, flags = _look(sock, end)  # it closed without reading everything; what it had said before comes behind that
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ProtocolError(problem="what the VM service answered is too large, or brings what nobody asked for")
    if not data:
        raise ConnectionResetError("it closed the connection")
    sock.recv(encoding.FRAME_MAX)
    return encoding.decode(data)


def _look(sock: wire.Socket, end: float) -> tuple[bytes, int]:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)
    data, _, flags, _ = sock.recvmsg(encoding.FRAME_MAX, 0, socket.MSG_PEEK)
    return data, flags


def _leave(sock: wire.Socket) -> None:
    """End the conversation without closing the socket: closing would drop what lies in it unread."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.detach()
