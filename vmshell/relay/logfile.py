"""A log bounded in size: `NAME`, and `NAME.1` with what came before it. A log that cannot be written never stops anything.

What could not be written is counted, writing is tried again every few seconds, and one line in the log then says how
much is missing.
Runs in: the relay. Touches its own files below the log directory.
"""

from __future__ import annotations

import os

from ..errors import safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

RETRY = 5.0  # seconds between attempts to write again
LOOK = 2.0  # seconds between looks whether somebody deleted the file under us

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Log:
    """`limit` bounds each of the two files; `lost` counts the bytes that were not written since the last note."""

    __slots__ = ("_closed", "_fd", "_look_at", "_retry_at", "_size", "limit", "lost", "path", "why")

    def __init__(self, path: str, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.lost = 0
        self.why = ""
        self._fd = -1
        self._size = 0
        self._retry_at = 0.0
        self._look_at = 0.0
        self._closed = False

    @property
    def old(self) -> str:
        return self.path + ".1"

    def write(self, parts: Sequence[bytes | memoryview], size: int, now: float) -> None:
        """Append *parts*, *size* bytes in all. Never raises."""
        try:
            if now >= self._look_at:
                self._look(now)
            if self._fd < 0 and not self._open(now):
                self.lost += size
                return
            if self._size + size > self.limit:
                if size > self.limit:
                    self._write_long(b"".join(parts))
                    return
                self._rotate()
            done = os.write(self._fd, parts[0]) if len(parts) == 1 else os.writev(self._fd, parts)
            self._size += done
            if done < size:
                self.lost += size - done
        except OSError as exc:
            self.lost += size
            self._give_up(exc, now)

    def tail(self, count: int) -> bytes:
        """The last *count* bytes of the log, or fewer."""
        data = _read_tail(self.path, count)
        if len(data) < count:
            data = _read_tail(self.old, count - len(data)) + data
        return data

    def changed(self) -> float:
        """When the log was last written, in seconds since the epoch; 0.0 if it is empty or not there."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return 0.0
        return status.st_mtime if status.st_size else 0.0

    def close(self) -> None:
        """Close for good."""
        self._closed = True
        self._release()

    def rest(self) -> None:
        """Close the file until something is written again."""
        self._release()

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self, now: float) -> bool:
        if self._closed or now < self._retry_at:
            return False
        os.makedirs(os.path.dirname(self.path), 0o750, exist_ok=True)
        self._fd = os.open(self.path, _FLAGS, 0o640)
        self._size = os.fstat(self._fd).st_size
        if self.lost:
            self._note()
        return True

    def _note(self) -> None:
        note = f"\r\n[vmshell: {self.lost} bytes are missing here; the log could not be written: {safe(self.why)}]\r\n".encode()
        if self._size + len(note) > self.limit:
            self._rotate()
        self._size += os.write(self._fd, note)
        self.lost = 0

    def _look(self, now: float) -> None:
        """A deleted or moved file would swallow everything in silence: open it anew."""
        self._look_at = now + LOOK
        if self._fd < 0:
            return
        try:
            there = os.stat(self.path, follow_symlinks=False).st_ino == os.fstat(self._fd).st_ino
        except FileNotFoundError:
            there = False
        if not there:
            self._release()

    def _rotate(self) -> None:
        # Deleting first is not tidiness: renaming over a file makes ext4 write the new one's pages to disk at once,
        # which costs a flooded log four times as much as everything else here together.
        try:
            os.unlink(self.old)
        except FileNotFoundError:
            pass
        os.rename(self.path, self.old)
        self._release()
        self._fd = os.open(self.path, _FLAGS, 0o640)
        self._size = os.fstat(self._fd).st_size

    def _write_long(self, data: bytes) -> None:
        """More than a whole file at once: only what would survive the rotations is written."""
        for at in range(max(0, len(data) - 2 * self.limit), len(data), self.limit):
            piece = data[at : at + self.limit]
            if self._size:
                self._rotate()
            self._size += os.write(self._fd, piece)

    def _give_up(self, exc: OSError, now: float) -> None:
        self.why = exc.strerror or type(exc).__name__
        self._retry_at = now + RETRY
        self._release()


class NoLog:
    """In a log's place where nothing is to be kept: writes nothing and remembers nothing."""

    __slots__ = ()

    def write(self, parts: Sequence[bytes | memoryview], size: int, now: float) -> None:
        """Forget *parts*."""

    def tail(self, count: int) -> bytes:
        return b""

    def changed(self) -> float:
        return 0.0


def purge(directory: str) -> None:
    """Delete a VM's log directory: the files in it (there are no folders) and itself. What cannot be deleted stays."""
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        try:
            os.unlink(f"{directory}/{name}")
        except OSError:
            pass
    try:
        os.rmdir(directory)
    except OSError:
        pass


def _read_tail(path: str, count: int) -> bytes:
    if count <= 0:
        return b""
    try:
        fd = os.open(path, _READ)
    except OSError:
        return b""
    try:
        size = os.fstat(fd).st_size
        return os.pread(fd, count, max(0, size - count))
    except OSError:
        return b""
    finally:
        os.close(fd)
