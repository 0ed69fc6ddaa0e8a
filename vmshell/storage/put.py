"""Taking in a file that a user sends: `put KIND MAX`, from the stream on descriptor 4 into the empty file on descriptor 3.

The stream is frames, each a length in four bytes (big-endian, 1 to FRAME_MAX) and as many bytes; the length 0 ends it. So a
connection that was cut is never taken for the end of the file. What is not such a stream counts as cut off.

What each KIND must be:
    raw      a disk as it is: at most MAX bytes; filled up with zeros to a whole sector
    qcow2    a disk of at most MAX bytes whose header names no other file (rule R3)
    file     anything, at least a byte
    rom      a PC option ROM that a BIOS would run
    floppy   exactly one of the sizes floppies have
Runs of zeros become holes, so that an empty disk takes no room.
Runs in: the storage worker, caged (see `cage`). Touches descriptors 3 and 4.
"""

from __future__ import annotations

import contextlib
import os
import select
from time import monotonic

from . import qcow2
from .files import write
from .qcow2 import BadImage

KINDS = ("raw", "qcow2", "file", "rom", "floppy")
FRAME_MAX = 1 << 20
IDLE_MAX = 600.0  # seconds without a byte; the broker ends us long before when the client is gone

SECTOR = 512
ROM_MAX = 256 << 10
FLOPPIES = {
    "160K": 163840,
    "180K": 184320,
    "320K": 327680,
    "360K": 368640,
    "720K": 737280,
    "1.2M": 1228800,
    "1.44M": 1474560,
    "2.88M": 2949120,
}

_BLOCK = 4096  # the smallest hole
_ZEROS = bytes(_BLOCK)


def bytes_max(kind: str, size_max: int) -> int:
    """How many bytes a file of *kind* may have when *size_max* are allowed."""
    match kind:
        case "raw":
            return min(size_max, qcow2.SIZE_MAX) // SECTOR * SECTOR
        case "qcow2":
            # The smallest clusters (512 bytes) take 1/32 for tables and reference counts; twice that, and room for a long header.
            return min(size_max, qcow2.SIZE_MAX) * 17 // 16 + (8 << 20)
        case "rom":
            return min(size_max, ROM_MAX)
    return size_max


def receive(fd: int, stream: int, kind: str, size_max: int, idle: float = IDLE_MAX) -> dict[str, int]:
    """Take the stream into the empty file *fd*, judge it, and make it safe on disk; on any failure the file is empty again.

    Returns `size`, what a guest will see as the size, and `bytes`, the length of the file. Raises BadImage or OSError.
    """
    try:
        taken = _Sink(fd)
        _take(_Source(stream, idle), taken, kind, size_max)
        size, length = _judge(fd, taken.total, kind, size_max)
        os.ftruncate(fd, length)
        os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, 0)
        raise
    return {"size": size, "bytes": length}


def _take(source: _Source, sink: _Sink, kind: str, size_max: int) -> None:
    allowed = bytes_max(kind, size_max)
    prefix = bytearray(4)
    judged = kind != "qcow2"
    while True:
        if not source.fill(memoryview(prefix)):
            raise _cut_off(sink.total)
        length = int.from_bytes(prefix)
        if not length:
            return sink.flush()
        if length > FRAME_MAX:
            raise _cut_off(sink.total)
        if sink.total + length > allowed:
            raise BadImage(f"it has {sink.total + length} bytes or more; at most {allowed} are allowed here")
        while length:
            room = sink.room()[:length]
            complete = source.fill(room)
            sink.accept(source.got)
            if not complete:
                raise _cut_off(sink.total)
            length -= len(room)
        if not judged and sink.head:
            # As soon as the header is here: nobody should send gigabytes to hear of their first line.
            judged = True
            qcow2.check(sink.head, allowed, size_max)


def _judge(fd: int, total: int, kind: str, size_max: int) -> tuple[int, int]:
    """Judge the whole file; return the size its guest will see and the length to give it."""
    if not total:
        raise BadImage("it is empty")
    match kind:
        case "raw":
            whole = -(-total // SECTOR) * SECTOR
            return whole, whole
        case "qcow2":
            return qcow2.check(os.pread(fd, qcow2.HEADER_READ, 0), total, size_max), total
        case "rom":
            check_rom(os.pread(fd, ROM_MAX, 0))
        case "floppy" if total not in FLOPPIES.values():
            raise BadImage(f"it has {total} bytes, which no floppy has; the sizes are {', '.join(FLOPPIES)}")
    return total, total


def check_rom(data: bytes) -> None:
    """Raises BadImage unless *data* is an option ROM as a PC's BIOS wants it; any other it would skip without a word."""
    if data[:2] != b"\x55\xaa":
        raise BadImage("it is not an option ROM: those start with the bytes 55 AA")
    length = data[2] * 512 if len(data) > 2 else 0
    if not 0 < length <= len(data):
        raise BadImage(f"its header claims {length} bytes; it has {len(data)}")
    if sum(data[:length]) & 0xFF:
        raise BadImage("it is damaged: the bytes of an option ROM add up to a multiple of 256")


def _cut_off(total: int) -> BadImage:
    return BadImage(f"the upload was cut off after {total} bytes")


class _Source:
    """The stream, read with patience."""

    def __init__(self, fd: int, idle: float) -> None:
        self._fd = fd
        self._idle = idle
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self.got = 0  # bytes of the last `fill`

    def fill(self, room: memoryview) -> bool:
        """Read until *room* is full; false when the stream ends before."""
        self.got = 0
        until = monotonic() + self._idle
        while self.got < len(room):
            if not self._poll.poll(max(0.0, until - monotonic()) * 1000):
                raise BadImage(f"nothing came for {self._idle:.0f} seconds")
            count = 0
            # A sender that goes away without reading what was said to it resets the connection; a spurious wake-up is none.
            with contextlib.suppress(ConnectionResetError):
                try:
                    count = os.readv(self._fd, [room[self.got :]])
                except BlockingIOError:
                    continue
            if not count:
                return False
            self.got += count
            until = monotonic() + self._idle
        return True


class _Sink:
    """The new file, written a buffer at a time; blocks of zeros are left out, so the file's own zeros stand for them."""

    def __init__(self, fd: int) -> None:
        self.total = 0
        self.head = b""  # the first bytes, once a buffer has been written
        self._fd = fd
        self._buffer = bytearray(FRAME_MAX)
        self._filled = 0

    def room(self) -> memoryview:
        """Where the next bytes are to go; `accept` says how many came."""
        if self._filled == len(self._buffer):
            self.flush()
        return memoryview(self._buffer)[self._filled :]

    def accept(self, count: int) -> None:
        self._filled += count
        self.total += count

    def flush(self) -> None:
        if not self.head:
            self.head = bytes(self._buffer[: min(self._filled, qcow2.HEADER_READ)])
        offset = self.total - self._filled
        data = memoryview(self._buffer)[: self._filled]
        # Offsets stay multiples of the buffer and so of the block: what is not full is only ever the last.
        begun = 0
        for at in range(0, self._filled, _BLOCK):
            if self._buffer.startswith(_ZEROS[: self._filled - at], at):
                write(self._fd, data[begun:at], offset + begun)
                begun = at + _BLOCK
        write(self._fd, data[begun:], offset + begun)
        self._filled = 0
