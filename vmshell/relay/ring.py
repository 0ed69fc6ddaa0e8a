"""The last 64 KiB of a console, read straight from QEMU into place.

Positions are counts of bytes since the ring began: `head` is where the next byte goes, `start` the oldest byte still here.
A viewer's queue is a position in here and nothing more; one that has fallen behind `start` has lost what lies between.
Runs in: the relay. Pure memory.
"""

from __future__ import annotations

import mmap

SIZE = 64 * 1024


class Ring:
    """Memory is taken page by page as it is first written: a console that said little costs little."""

    __slots__ = ("_memory", "_view", "_whole", "head", "size", "start")

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.head = 0
        self.start = 0
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self._whole = [self._view]

    def space(self, count: int) -> list[memoryview]:
        """Where the next *count* bytes (at most `size`) belong: one view, or two around the end."""
        at = self.head % self.size
        if not at and count == self.size:
            return self._whole
        return self._cut(at, count)

    def advance(self, count: int) -> list[memoryview]:
        """Count *count* bytes as written into `space` and return them."""
        parts = self._cut(self.head % self.size, count)
        self.head += count
        if self.head - self.start > self.size:
            self.start = self.head - self.size
        return parts

    def piece(self, position: int, count: int) -> list[memoryview]:
        """*count* bytes from *position* on, which must lie between `start` and `head`."""
        return self._cut(position % self.size, count)

    def fill(self, data: bytes) -> None:
        """Append *data* (its last `size` bytes), as after a restart."""
        data = data[-self.size :]
        done = 0
        for part in self.space(len(data)):
            part[:] = data[done : done + len(part)]
            done += len(part)
        self.advance(len(data))

    def _cut(self, at: int, count: int) -> list[memoryview]:
        if not count:
            return []
        over = at + count - self.size
        if over <= 0:
            return [self._view[at : at + count]]
        return [self._view[at:], self._view[:over]]
