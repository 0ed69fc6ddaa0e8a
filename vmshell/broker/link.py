"""The broker's end of a connection to one of our services: requests out, answers back in any order, a new try when it was lost.

Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import wire
from ..errors import ProtocolError, VmshellError, from_wire
from .journal import note

if TYPE_CHECKING:
    from ..messages import Message
    from .loop import Loop, Timer

Answered = Callable[[VmshellError | None, wire.Packet], None]
_AGAIN_FIRST, _AGAIN_MOST = 0.1, 5.0  # seconds between tries to connect, doubled each time


class Link:
    """`name` stands in the journal, `down` is what those hear who wait when the connection is lost."""

    name = ""
    down: type[VmshellError]
    fds_allowed = 0

    def __init__(self, loop: Loop, path: str, on_connect: Callable[[], None]) -> None:
        self._loop = loop
        self._path = path
        self._on_connect = on_connect
        self._sock: wire.Socket | None = None
        self._waiting: dict[int, Answered] = {}
        self._last_id = 0
        self._again_after = _AGAIN_FIRST
        self._again: Timer | None = None
        self._closed = False

    def request(self, message: Message, answered: Answered, fd: int = -1) -> None:
        """Send *message*, with *fd* beside it (it stays open here). `answered(error, packet)` is called once, perhaps at once."""
        try:
            sock = self._sock or self._connect()
            self._last_id += 1
            wire.send(sock, {"id": self._last_id, **message.to_body()}, (fd,) if fd >= 0 else ())
        except OSError as exc:
            self._lost(str(exc))
            answered(self.down(), wire.Packet({}, []))
            return
        self._waiting[self._last_id] = answered

    def connect(self) -> None:
        """Connect if need be; keeps trying until it works."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._sock is None and not self._closed:
            try:
                self._connect()
            except OSError as exc:
                self._lost(str(exc))

    def close(self) -> None:
        self._closed = True
        self._drop()

    def _open(self) -> wire.Socket:
        """A new connection; raises OSError."""
        return wire.connect(self._path)

    def _heard(self, body: dict[str, object]) -> bool:
        """Act on a packet that answers nothing; False if it is none of that kind."""
        return False

    def _connect(self) -> wire.Socket:
        sock = self._open()
        sock.setblocking(False)
        self._sock = sock
        self._loop.watch(sock.fileno(), self._readable)
        self._on_connect()
        return sock

    def _readable(self) -> None:
        if self._sock is None:
            return
        try:
            packet = wire.recv(self._sock, fds_allowed=self.fds_allowed)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as exc:
            self._lost(str(exc))
            return
        if packet is None:
            self._lost("it closed the connection")
            return
        self._again_after = _AGAIN_FIRST
        try:
            if not self._heard(packet.body):
                self._answer(packet)
        finally:
            packet.close()

    def _answer(self, packet: wire.Packet) -> None:
        ident = packet.body.get("id")
        answered = self._waiting.pop(ident, None) if type(ident) is int else None
        if answered is not None:
            answered(from_wire(packet.body["error"]) if "error" in packet.body else None, packet)

    def _lost(self, why: str) -> None:
        if self._sock is not None:
            note(f"{self.name}-lost", problem=why)
        self._drop()
        waiting, self._waiting = self._waiting, {}
        for answered in waiting.values():
            answered(self.down(), wire.Packet({}, []))
        # One timer, however many requests meet a service that is away.
        if not self._closed and self._again is None:
            self._again = self._loop.after(self._again_after, self.connect)
            self._again_after = min(2 * self._again_after, _AGAIN_MOST)

    def _drop(self) -> None:
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None
