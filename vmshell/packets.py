"""One JSON object per packet on a Unix SOCK_SEQPACKET socket, descriptors beside it, the peer's identity from the kernel.

A packet, byte for byte (what `ssh host boot web1` sends; 38 bytes, no length prefix, no newline: the packet is the frame):

    7b 22 69 64 22 3a 31 2c 22 76 65 72 62 22 3a 22 62 6f 6f 74 22 2c 22 76 6d 22 3a 22 77 65 62 31 22 7d
    {  "  i  d  "  :  1  ,  "  v  e  r  b  "  :  "  b  o  o  t  "  ,  "  v  m  "  :  "  w  e  b  1  "  }

What comes in is hostile (rule R12): over 64 KiB, cut short, deeper than 16, a key twice, a float, NaN, an integer beyond
2**53, NUL or half a surrogate pair, or a descriptor nobody asked for, and the packet is a `ProtocolError`.
Received descriptors are close-on-exec from the first moment and always closed by someone.
Runs in: every process. Stdlib only, no I/O at import.
"""

from __future__ import annotations

# Not `json` and `socket`, but the C modules below them: those two bring `re`, `enum` and `selectors`, half of what
# `ssh host list` would cost (bench P1). Same code, same rules; what they would add is not used here.
import _socket
import os
import struct

from .encoding import FRAME_MAX, decode, encode
from .errors import ProtocolError, StrayDescriptors

FDS_MAX = 4  # descriptors beyond those asked for that are seen, and refused, one by one


class Packet:
    """What one `recv` brought: the decoded object and its descriptors, which the taker must close."""

    __slots__ = ("body", "fds")

    def __init__(self, body: dict[str, object], fds: list[int]) -> None:
        self.body = body
        self.fds = fds

    def take_fd(self) -> int:
        """Take the first descriptor out of the packet (its closing is now the caller's), or raise ProtocolError."""
        if not self.fds:
            raise ProtocolError(problem="it should bring a descriptor and brings none")
        return self.fds.pop(0)

    def close(self) -> None:
        """Close every descriptor not taken."""
        while self.fds:
            close_fd(self.fds.pop())


def close_fd(fd: int) -> None:
    """Close a descriptor that somebody sent: it is closed also where the file behind it answers with an error (FUSE can)."""
    try:
        os.close(fd)
    except OSError:
        pass


def peer_uid(sock: _socket.socket) -> int:
    """The uid that connected (SO_PEERCRED: who *connected*, whatever that process became later)."""
    return int(struct.unpack("iII", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))[1])  # pid, uid, gid


def send(sock: _socket.socket, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
    """Send one packet; *fds* beside it stay open here. Raises OSError (BlockingIOError when the peer does not read)."""
    ancillary = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
    sock.sendmsg([encode(body)], ancillary, _socket.MSG_NOSIGNAL)


def recv(sock: _socket.socket, fds_allowed: int = 0) -> Packet | None:
    """Receive one packet; None when the peer has closed. Raises ProtocolError (descriptors already closed) and OSError."""
    # Room for more descriptors than we take: then stray ones arrive, are seen and closed, and nothing is cut silently.
    room = _socket.CMSG_SPACE((fds_allowed + FDS_MAX) * 4)
    try:
        data, ancillary, flags, _ = sock.recvmsg(FRAME_MAX, room, _socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        # A peer that closed without reading everything: the kernel says so before it gives out what that peer sent last.
        data, ancillary, flags, _ = sock.recvmsg(FRAME_MAX, room, _socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds.extend(struct.unpack_from(f"{len(payload) // 4}i", payload))
    packet = Packet({}, fds)
    try:
        if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
            raise ProtocolError(problem=f"it was larger than {FRAME_MAX} bytes or brought too many descriptors")
        if not data and not fds:
            return None
        if len(fds) > fds_allowed:
            raise StrayDescriptors()
        packet.body = decode(data)
    except BaseException:
        packet.close()
        raise
    return packet
