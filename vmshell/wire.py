"""How our processes meet: sockets to listen at and to connect to; and all of `packets.py`, what goes over them.

Runs in: every process but the launcher, which is handed its socket. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import _socket
import os
import struct

from .packets import Packet, close_fd, peer_uid, recv, send

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

__all__ = ("Packet", "Socket", "close_fd", "connect", "listen", "peer_uid", "recv", "send", "take_fds")


def take_fds(packet: Packet) -> tuple[int, ...]:
    """All descriptors of *packet*, to be closed by the caller from now on."""
    fds = tuple(packet.fds)
    packet.fds.clear()
    return fds


class Socket(_socket.socket):
    """What `connect` returns: a socket for `with`."""

    __slots__ = ()

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(path: str, timeout: float | None = None) -> Socket:
    """Return a connected socket; raises OSError. *timeout* in seconds bounds the connect and every later call."""
    sock = Socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    try:
        if timeout is not None:
            # A non-blocking connect fails at once while the queue is full; a blocking one waits its turn, for this long.
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", int(timeout), int(timeout % 1 * 1e6)))
        sock.connect(path)
        sock.settimeout(timeout)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(path: str, mode: int, backlog: int = 512) -> socket.socket:
    """Bind and listen at *path* with permissions *mode*, replacing a stale socket file.

    The directory must be ours alone to write.
    """
    import socket

    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        if os.path.lexists(path):
            os.unlink(path)
        sock.bind(path)
        os.chmod(path, mode)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
