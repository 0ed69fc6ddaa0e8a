"""Netlink messages in bulk: many packed into one packet, each answered by its own errno.

pyroute2 does what happens once; this is for what a hundred taps at a time need, where its encoder would be most of the cost.
Runs in: tapnet.
"""

from __future__ import annotations

import socket
import struct

REQUEST, ACK, EXCL, CREATE, REPLACE = 0x1, 0x4, 0x200, 0x400, 0x100
DUMP = 0x300
ERROR = 2  # NLMSG_ERROR, which is also how "done" is said: errno 0
DONE = 3  # NLMSG_DONE, of a dump
NESTED = 0x8000
PACKED = 64  # messages sent before their answers are read: those must fit into the receive buffer
SECONDS = 10.0  # the kernel answers within microseconds; should it not, we say so rather than hang

HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")


def attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)


def u8(kind: int, value: int) -> bytes:
    return attribute(kind, bytes([value]))


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def u64(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=Q", value))


def nested(kind: int, *attributes: bytes) -> bytes:
    return attribute(kind | NESTED, b"".join(attributes))


def message(kind: int, flags: int, body: bytes) -> bytes:
    """A request that is to be acknowledged; `Channel.run` numbers it."""
    return HEADER.pack(HEADER.size + len(body), kind, REQUEST | ACK | flags, 0, 0) + body + bytes(-len(body) % 4)


def split(data: bytes) -> list[tuple[int, int, bytes]]:
    """The messages of a packet that the kernel sent: type, sequence number, body."""
    found, offset = [], 0
    while offset + HEADER.size <= len(data):
        length, kind, _, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size:
            break
        found.append((kind, sequence, data[offset + HEADER.size : offset + length]))
        offset += (length + 3) & ~3
    return found


def attributes(data: bytes) -> dict[int, bytes]:
    found, offset = {}, 0
    while offset + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


class Channel:
    """A netlink socket for requests."""

    def __init__(self, protocol: int) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._sock.bind((0, 0))
        self._sock.settimeout(SECONDS)
        self._sequence = 0

    def run(self, messages: list[bytes]) -> list[int]:
        """Have *messages* carried out in order; returns the errno of each, 0 for done. One that fails stops no other."""
        results = []
        for start in range(0, len(messages), PACKED):
            results += self._exchange(messages[start : start + PACKED])
        return results

    def ask(self, request: bytes) -> bytes:
        """The body of the one message that answers *request* (b"" if it was refused)."""
        self._sequence += 1
        self._sock.send(_numbered(request, self._sequence))
        answer = b""
        while True:
            for kind, sequence, body in split(self._sock.recv(1 << 16)):
                if sequence == self._sequence and kind == ERROR:
                    return answer
                if sequence == self._sequence:
                    answer = body

    def count(self, request: bytes) -> int:
        """How many messages answer *request*, a dump (0 also if it was refused)."""
        self._sequence += 1
        self._sock.send(_numbered(request, self._sequence))
        found = 0
        while True:
            for kind, sequence, _ in split(self._sock.recv(1 << 16)):
                if sequence == self._sequence and kind in (ERROR, DONE):
                    return found
                found += sequence == self._sequence

    def _exchange(self, messages: list[bytes]) -> list[int]:
        first = self._sequence + 1
        self._sequence += len(messages)
        self._sock.send(b"".join(_numbered(data, first + index) for index, data in enumerate(messages)))
        answered: dict[int, int] = {}
        while len(answered) < len(messages):
            for kind, sequence, body in split(self._sock.recv(1 << 16)):
                if kind == ERROR and first <= sequence <= self._sequence:
                    answered[sequence] = -int(struct.unpack_from("=i", body)[0])
        return [answered[first + index] for index in range(len(messages))]


def _numbered(data: bytes, sequence: int) -> bytes:
    return data[:8] + struct.pack("=I", sequence) + data[12:]
