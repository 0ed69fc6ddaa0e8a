"""Taking in a file that a user sends: `put KIND MAX`, from the pipe on descriptor 4 into the empty file on descriptor 3.

The pipe's bytes up to its end are the file. Whether that end is the file's or its sender's is not to be seen here: we say how
many bytes came, and their SHA-256, and the broker compares that with what the sender says. When nobody listens to us any more
(the broker has given the upload up, or has ended), so do we.

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

import hashlib
import os
import select
from time import monotonic

from . import qcow2
from .files import write
from .qcow2 import BadImage

KINDS = ("raw", "qcow2", "file", "rom", "floppy")
IDLE_MAX = 600.0  # seconds without a byte
MARK = 2.0  # seconds after which the file is at least as long as what has come: by that the broker sees that something does
ANSWER = 1

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

_BUFFER = 64 << 10
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


def receive(fd: int, stream: int, kind: str, size_max: int, idle: float = IDLE_MAX) -> dict[str, object]:
    """Take the stream into the empty file *fd*, judge it, and make it safe on disk; on any failure the file is empty again.

    Returns `size`, what a guest will see as the size, and `bytes` and `sha256` of what came. Raises BadImage or OSError.
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
    return {"size": size, "bytes": taken.total, "sha256": taken.digest.hexdigest()}


def _take(source: _Source, sink: _Sink, kind: str, size_max: int) -> None:
    allowed = bytes_max(kind, size_max)
    judged = kind != "qcow2"
    while (count := source.read(sink.room())) != 0:
        if count is not None:
            sink.accept(count)
        if sink.total > allowed:
            raise BadImage(f"it has {sink.total} bytes or more; at most {allowed} are allowed here")
        sink.mark()
        if not judged and sink.head:
            # As soon as the header is here: nobody should send gigabytes to hear of their first line.
            judged = True
            qcow2.check(sink.head, allowed, size_max)
    sink.flush()


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


class _Source:
    """The stream, read with patience, for as long as somebody listens to us."""

    def __init__(self, fd: int, idle: float) -> None:
        self._fd = fd
        self._idle = idle
        self._until = monotonic() + idle
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(ANSWER, 0)

    def read(self, room: memoryview) -> int | None:
        """Read some of it into *room*; return how many bytes, 0 at its end, None if nothing has come for a moment."""
        ready = dict(self._poll.poll(max(0.0, min(MARK, self._until - monotonic())) * 1000))
        if ANSWER in ready:
            raise BadImage("nobody waits for it any more")
        if not ready:
            if monotonic() >= self._until:
                raise BadImage(f"nothing came for {self._idle:.0f} seconds")
            return None
        self._until = monotonic() + self._idle
        try:
            return os.readv(self._fd, [room])
        except BlockingIOError:
            return None


class _Sink:
    """The new file, written a buffer at a time; blocks of zeros are left out, so the file's own zeros stand for them."""

    def __init__(self, fd: int) -> None:
        self.total = 0
        self.head = b""  # the first bytes, once a buffer has been written
        self.digest = hashlib.sha256()
        self._fd = fd
        self._buffer = bytearray(_BUFFER)
        self._filled = 0
        self._marked = monotonic()

    def room(self) -> memoryview:
        """Where the next bytes are to go; `accept` says how many came."""
        if self._filled == len(self._buffer):
            self.flush()
        return memoryview(self._buffer)[self._filled :]

    def accept(self, count: int) -> None:
        self.digest.update(memoryview(self._buffer)[self._filled : self._filled + count])
        self._filled += count
        self.total += count

    def mark(self) -> None:
        """Make the file as long as what has come, if that was not done just now."""
        if monotonic() - self._marked >= MARK:
            self._marked = monotonic()
            os.ftruncate(self._fd, self.total)

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
