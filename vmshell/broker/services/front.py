"""The broker's connection to the front, by which users' connections come: who it is, and our end of the one to their child.

Runs in: the broker, on an installed host.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...messages import Arrived
from ...refusals import FrontDown
from .connection import Connection

if TYPE_CHECKING:
    from ...layout import Layout
    from ..runtime.loop import Loop


class Front(Connection):
    """*arrived* gets each user's uid and connection. While this is away, clients wait in the socket's queue."""

    name = "front"
    down = FrontDown
    fds_allowed = 1

    def __init__(self, loop: Loop, layout: Layout, arrived: Callable[[int, socket.socket], None]) -> None:
        super().__init__(loop, layout.front_socket, lambda: None)
        self._arrived = arrived

    def _heard(self, packet: wire.Packet) -> bool:
        message = Arrived.from_body(packet.body)
        fd = packet.take_fd()
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            wire.close_fd(fd)
            raise
        self._arrived(message.uid, sock)
        return True
