"""The broker's end of a connection to one of our services: requests out, answers back in any order, a new try when it was lost.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...errors import ProtocolError, VmshellError
from ...refusals import from_wire
from ...spawn import FIRST_FD
from ..runtime.log import note, unexpected

if TYPE_CHECKING:
    from ...fields import Message
    from ...layout import Layout
    from ..host.processes import Host
    from ..runtime.loop import Loop, Timer

Answered = Callable[[VmshellError | None, wire.Packet], None]
_AGAIN_FIRST, _AGAIN_MOST = 0.1, 5.0  # seconds between tries to connect, doubled each time
_UNSENT_MAX = 20_000  # messages for a service that does not read; then it counts as lost


class Connection:
    """`name` stands in the journal, `down` is what those hear who wait when the connection is lost."""

    name = ""
    down: type[VmshellError]
    fds_allowed = 0

    def __init__(self, loop: Loop, path: str, on_connect: Callable[[], None]) -> None:
        self._loop = loop
        self._path = path
        self._on_connect = on_connect
        self._sock: wire.Socket | None = None
        self._connecting = False
        self._unsent: deque[tuple[dict[str, object], tuple[int, ...]]] = deque()
        self._waiting: dict[int, Answered] = {}
        self._last_id = 0
        self._again_after = _AGAIN_FIRST
        self._again: Timer | None = None
        self._closed = False

    def request(self, message: Message, answered: Answered, fds: tuple[int, ...] = ()) -> int:
        """Send *message*, with *fds* beside it (they stay open here); return its number.

        `answered(error, packet)` is called once, perhaps at once.
        """
        ident = self._last_id = self._last_id + 1
        try:
            if self._sock is None:
                self._connect()
            self._send({"id": ident, **message.to_body()}, fds)
        except OSError as exc:
            self._lost(str(exc))
            answered(self.down(), wire.Packet({}, []))
            return ident
        self._waiting[ident] = answered
        return ident

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

    def _heard(self, packet: wire.Packet) -> bool:
        """Act on a packet that answers nothing; False if it is none of that kind."""
        return False

    def _connect(self) -> None:
        if self._connecting:
            raise ConnectionError("it went away while it was told what there is")
        self._connecting = True
        try:
            self._sock = self._open()
            self._sock.setblocking(False)
            self._loop.watch(self._sock.fileno(), self._ready)
            self._on_connect()
        except OSError:
            raise
        except Exception as exc:
            unexpected(exc)
            self._drop()  # half told what there is, it would refuse all that follows
            raise ConnectionError("it could not be told what there is") from exc
        finally:
            self._connecting = False
        if self._sock is None:
            raise ConnectionError("it went away at once")

    def _send(self, body: dict[str, object], fds: tuple[int, ...]) -> None:
        """Send *body*, or keep it until the service reads again; raises OSError if there is none."""
        if self._sock is None or len(self._unsent) >= _UNSENT_MAX:
            raise ConnectionError("it does not take any more")
        if not self._unsent:
            try:
                wire.send(self._sock, body, fds)
                return
            except BlockingIOError:
                self._loop.watch_writing(self._sock.fileno(), True)
        self._unsent.append((body, _copies(fds)))

    def _flush(self, sock: wire.Socket) -> None:
        while self._unsent:
            body, fds = self._unsent[0]
            try:
                wire.send(sock, body, fds)
            except BlockingIOError:
                return
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.watch_writing(sock.fileno(), False)

    def _ready(self) -> None:
        if self._sock is None:
            return
        try:
            if self._unsent:
                self._flush(self._sock)
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
            if not self._heard(packet):
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
        # One timer, however many requests meet a service that is away.
        if not self._closed and self._again is None:
            self._again = self._loop.after(self._again_after, self.connect)
            self._again_after = min(2 * self._again_after, _AGAIN_MOST)
        waiting, self._waiting = self._waiting, {}
        for answered in waiting.values():
            try:
                answered(self.down(), wire.Packet({}, []))
            except Exception as exc:
                unexpected(exc)  # those behind it wait, too

    def _drop(self) -> None:
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()


def _copies(fds: tuple[int, ...]) -> tuple[int, ...]:
    """A copy of each descriptor; raises OSError, and then there is none."""
    made: list[int] = []
    try:
        for fd in fds:
            made.append(os.dup(fd))
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return tuple(made)


def start_service(loop: Loop, host: Host, layout: Layout, name: str, command: list[str], fd: int) -> None:
    """Start *command*, a service of a session, as our child with *fd* as its first descriptor; it complains in `NAME.err`."""
    errors = os.open(f"{layout.run}/{name}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        process = host.spawn(command, {FIRST_FD: fd}, stderr=errors)
    finally:
        os.close(errors)

    def ended() -> None:
        loop.unwatch(process.pidfd)
        note(f"{name}-ended", status=process.reap())

    loop.watch(process.pidfd, ended)
