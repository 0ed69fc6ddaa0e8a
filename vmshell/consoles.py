"""What travels on a console's two pipes, one for each way; the relay is at one end of both, a shell at the other.

    relay → viewer   frames: the length of what follows in two bytes (big-endian), a tag byte, at most DATA_MAX bytes
                         `d` the guest's bytes
                         `n` {"notice": "hello" | "pen" | "refused" | "who" | "gap" | "state" | "end", …}
                             `end` has a `code` where not the VM has ended but what this user may do
    viewer → relay   cells of CELL bytes: the length of the payload in one byte, a tag byte, the payload, zeros up to the end
                         `d` keys
                         `c` {"do": "pen" | "who" | "break"}

Both are made so that a relay which is killed at any moment, and goes on with the same pipes, never meets half a message:

- a frame is no longer than PIPE_BUF, so a pipe takes it whole or not at all, and each is written by one call;
- cells all have one length, so a read of several is always of whole ones, if each write was.

Whoever writes cells otherwise spoils their own typing and nothing else. A pipe may be of any size, down to one page.
Runs in: the relay, the shell. Stdlib only, no I/O at import.
"""

from __future__ import annotations

from .errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FRAME = 4096  # PIPE_BUF
_HEADER = 3
DATA_MAX = FRAME - _HEADER
CELL = 64
CELL_MAX = CELL - 2

DATA = b"d"
NOTICE = b"n"
CONTROL = b"c"


def header(tag: bytes, size: int) -> bytes:
    """What stands before the *size* bytes of a frame."""
    return (size + 1).to_bytes(2) + tag


def frame(tag: bytes, data: bytes) -> bytes:
    if len(data) > DATA_MAX:
        raise ProtocolError(problem=f"a frame has at most {DATA_MAX} bytes, not {len(data)}")
    return header(tag, len(data)) + data


class Frames:
    """Cuts a stream into frames, however it is delivered."""

    def __init__(self) -> None:
        self._rest = b""  # less than a frame

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """The frames, as tag and data, that *data* completes; raises ProtocolError for what is no frame."""
        if self._rest:
            data = self._rest + data
        found, at, there = [], 0, len(data)
        while there - at >= _HEADER:
            end = at + 2 + (data[at] << 8 | data[at + 1])
            if not at + 2 < end <= at + FRAME:
                raise ProtocolError(problem="it is not a console's frame")
            if there < end:
                break
            found.append((data[at + 2 : at + _HEADER], data[at + _HEADER : end]))
            at = end
        self._rest = data[at:]
        return found


def cells(tag: bytes, data: bytes) -> bytes:
    """*data* in as many cells as it takes."""
    parts = (data[at : at + CELL_MAX] for at in range(0, len(data), CELL_MAX))
    return b"".join((bytes((len(part),)) + tag + part).ljust(CELL, b"\0") for part in parts)


def open_cells(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Tag and payload of each cell in *data*, which is whole ones; raises ProtocolError for what is no cell."""
    for at in range(0, len(data), CELL):
        size = data[at]
        if size > CELL_MAX:
            raise ProtocolError(problem="it is not a console's cell")
        yield data[at + 1 : at + 2], data[at + 2 : at + 2 + size]
