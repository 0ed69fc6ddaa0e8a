"""The broker's one connection to the relay: sends messages, hears words, comes back when the relay was restarted.

In session mode it also starts the relay; on an installed host the service manager does that at the first connect.
Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import wire
from ..errors import ProtocolError, RelayDown, VmshellError, from_wire
from ..messages import Event, ToRelay
from .journal import note

if TYPE_CHECKING:
    from ..layout import Layout
    from .host import Host, Process
    from .loop import Loop, Timer

Done = Callable[[VmshellError | None], None]
_AGAIN_FIRST, _AGAIN_MOST = 0.1, 5.0  # seconds between tries to connect, doubled each time


class RelayLink:
    """`on_event` gets each word; `on_connect` is called for every new connection, to tell the relay which VMs there are."""

    def __init__(
        self, loop: Loop, host: Host, layout: Layout, on_event: Callable[[Event], None], on_connect: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._host = host
        self._layout = layout
        self._on_event = on_event
        self._on_connect = on_connect
        self._sock: wire.Socket | None = None
        self._waiting: dict[int, Done] = {}
        self._last_id = 0
        self._again_after = _AGAIN_FIRST
        self._again: Timer | None = None
        self._closed = False

    def send(self, message: ToRelay, done: Done, fd: int = -1) -> None:
        """Send *message*, with *fd* beside it (it stays open here). `done` is called with None or the error, perhaps at once."""
        try:
            sock = self._sock or self._connect()
            self._last_id += 1
            wire.send(sock, {"id": self._last_id, **message.to_body()}, (fd,) if fd >= 0 else ())
        except OSError as exc:
            self._lost(str(exc))
            done(RelayDown())
            return
        self._waiting[self._last_id] = done

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

    def _connect(self) -> wire.Socket:
        try:
            sock = wire.connect(self._layout.relay_socket)
        except (FileNotFoundError, ConnectionRefusedError):
            if not self._layout.embedded:
                raise
            self._start()
            sock = wire.connect(self._layout.relay_socket)
        sock.setblocking(False)
        self._sock = sock
        self._loop.watch(sock.fileno(), self._readable)
        self._on_connect()
        return sock

    def _start(self) -> None:
        """Start the relay with its listening socket in hand, so that connecting works from now on."""
        os.makedirs(self._layout.log, mode=0o700, exist_ok=True)
        listener = wire.listen(self._layout.relay_socket, 0o600)
        try:
            command = self._host.python("relay", self._layout.to_args(), "--listen-fd=3", uid=None)
            errors = os.open(f"{self._layout.run}/relay.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                process = self._host.spawn(command, {3: listener.fileno()}, stderr=errors)
            finally:
                os.close(errors)
        finally:
            listener.close()
        self._loop.watch(process.pidfd, lambda: self._ended(process))

    def _ended(self, process: Process) -> None:
        self._loop.unwatch(process.pidfd)
        note("relay-ended", status=process.reap())

    def _readable(self) -> None:
        if self._sock is None:
            return
        try:
            packet = wire.recv(self._sock)
        except BlockingIOError:
            return
        except (OSError, ProtocolError) as exc:
            self._lost(str(exc))
            return
        if packet is None:
            self._lost("it closed the connection")
            return
        self._again_after = _AGAIN_FIRST
        if packet.body.get("verb") == "event":
            self._on_event(Event.from_body(packet.body))
        else:
            self._answered(packet.body)

    def _answered(self, body: dict[str, object]) -> None:
        ident = body.get("id")
        done = self._waiting.pop(ident, None) if type(ident) is int else None
        if done is not None:
            done(from_wire(body["error"]) if "error" in body else None)

    def _lost(self, why: str) -> None:
        if self._sock is not None:
            note("relay-lost", problem=why)
        self._drop()
        waiting, self._waiting = self._waiting, {}
        for done in waiting.values():
            done(RelayDown())
        # One timer, however many requests meet a relay that is away.
        if not self._closed and self._again is None:
            self._again = self._loop.after(self._again_after, self.connect)
            self._again_after = min(2 * self._again_after, _AGAIN_MOST)

    def _drop(self) -> None:
        if self._sock is not None:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None
