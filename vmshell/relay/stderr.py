"""QEMU's error pipe into the VM's `qemu.log`, 64 KiB of it at most.

It must be read to the end whatever happens: a full pipe would stop QEMU, and a guest can make QEMU complain without end (B47).
Runs in: the relay. Touches one pipe and one log.
"""

from __future__ import annotations

import os

from .logfile import Log
from .loop import IN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop

LIMIT = 32 * 1024  # each of the log's two files

_buffer = memoryview(bytearray(16 * 1024))


class Stderr:
    """Owns *fd* from here on; calls *ended* once when QEMU has closed its end."""

    __slots__ = ("_ended", "_loop", "fd", "log")

    def __init__(self, loop: Loop, fd: int, path: str, ended: Callable[[], None]) -> None:
        self.fd = fd
        self.log = Log(path, LIMIT)
        self._loop = loop
        self._ended = ended
        try:
            os.set_blocking(fd, False)
            loop.add(fd, IN, self._on_event, self)
        except BaseException:
            os.close(fd)
            raise

    def finish(self) -> None:
        """QEMU is gone: take its last words and close."""
        for _ in range(8):
            if self.fd < 0 or not self._read():
                break
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            self._loop.drop(fd)
            os.close(fd)
            self.log.close()

    def broken(self, exc: Exception) -> None:
        if self.fd >= 0:
            self.close()
            self._ended()

    def _on_event(self, events: int) -> None:
        self._read()

    def _read(self) -> bool:
        try:
            size = os.readv(self.fd, [_buffer])
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            self.close()
            self._ended()
            return False
        self.log.write([_buffer[:size]], size, self._loop.now)
        return True
