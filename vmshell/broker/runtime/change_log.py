"""A file to which each change adds one line, for what grows to thousands of entries of which one changes at a time.

A line is on the disk before it counts. One that a power cut or a full disk left without its end never counted: it is cut off.
When most lines are of entries that are gone, what is left is written anew beside, and renamed.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable

from .files import storage, sync_folder

Line = list[str | int]
LINE_MAX = 4096  # characters
ANEW = 1000  # lines that count no more, beside as many as do


class ChangeLog:
    """Raises StorageFailed when the disk says no; then the file says what it said before."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._size = 0  # bytes of whole lines
        self._lines = 0

    def load(self) -> tuple[list[Line], str]:
        """Every line, and what is wrong with the first one that cannot be read; raises OSError."""
        found: list[Line] = []
        problem = ""
        self._size = self._lines = 0
        with open(self._path, "rb") as file:
            while (text := file.readline(LINE_MAX)).endswith(b"\n"):
                self._size += len(text)
                self._lines += 1
                try:
                    found.append(_parsed(text))
                except (ValueError, RecursionError) as exc:
                    problem = problem or f"line {self._lines} of it is damaged ({exc})"
        if len(text) == LINE_MAX:
            problem = problem or f"line {self._lines + 1} of it is damaged (it is too long)"
        return found, problem

    def add(self, *lines: Line) -> None:
        """Add *lines*, all of them or none."""
        data = b"".join(json.dumps(line).encode("ascii") + b"\n" for line in lines)
        with storage():
            new = not os.path.exists(self._path)
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(fd, self._size)  # what an earlier try may have left there
                _write(fd, data, self._size)
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, self._size)
                raise
            finally:
                os.close(fd)
            if new:
                sync_folder(os.path.dirname(self._path))
        self._size += len(data)
        self._lines += len(lines)

    def wants_anew(self, entries: int) -> bool:
        """Are most lines of entries that are gone?"""
        return self._lines > 2 * entries + ANEW

    def write_anew(self, lines: Iterable[Line]) -> None:
        """Say the same in as few lines as there are entries."""
        beside = self._path + ".new"
        with storage():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            fresh = ChangeLog(beside)
            fresh.add(*lines)
            os.rename(beside, self._path)
            sync_folder(os.path.dirname(self._path))
        self._size, self._lines = fresh._size, fresh._lines


def _parsed(text: bytes) -> Line:
    line = json.loads(text)
    if not isinstance(line, list) or not all(type(word) in (str, int) for word in line):
        raise ValueError("it is no list of words and numbers")
    return line


def _write(fd: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written
