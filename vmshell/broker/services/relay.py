"""The broker's one connection to the relay: sends messages, hears words, comes back when the relay was restarted.

In session mode it also starts the relay; on an installed host the service manager does that at the first connect.
Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...errors import VmshellError
from ...messages import Event, ToRelay
from ...refusals import RelayDown
from ...spawn import python
from .connection import Connection, start_service

if TYPE_CHECKING:
    from ...layout import Layout
    from ..host.processes import Host
    from ..runtime.loop import Loop

Done = Callable[[VmshellError | None], None]


class Relay(Connection):
    """`on_event` gets each word; `on_connect` is called for every new connection, to tell the relay which VMs there are."""

    name = "relay"
    down = RelayDown

    def __init__(
        self, loop: Loop, host: Host, layout: Layout, on_event: Callable[[Event], None], on_connect: Callable[[], None]
    ) -> None:
        super().__init__(loop, layout.relay_socket, on_connect)
        self._host = host
        self._layout = layout
        self._on_event = on_event

    def send(self, message: ToRelay, done: Done, fds: tuple[int, ...] = ()) -> None:
        """Send *message* with *fds* beside it, which stay open here. `done` is called with None or the error, perhaps at once."""
        self.request(message, lambda error, packet: done(error), fds)

    def _heard(self, packet: wire.Packet) -> bool:
        if packet.body.get("verb") != "event":
            return False
        self._on_event(Event.from_body(packet.body))
        return True

    def _open(self) -> wire.Socket:
        try:
            return super()._open()
        except (FileNotFoundError, ConnectionRefusedError):
            if not self._layout.embedded:
                raise
            self._start()
            return super()._open()

    def _start(self) -> None:
        """Start the relay with its listening socket in hand, so that connecting works from now on."""
        os.makedirs(self._layout.log, mode=0o700, exist_ok=True)
        listener = wire.listen(self._layout.relay_socket, 0o600)
        try:
            command = python(self.name, self._layout.to_args(), "--listen-fd=3")
            start_service(self._loop, self._host, self._layout, self.name, command, listener.fileno())
        finally:
            listener.close()
