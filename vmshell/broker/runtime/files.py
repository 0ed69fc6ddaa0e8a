"""Reading and writing the broker's own small files so that a power cut leaves the old or the new one, never half of either.

Runs in: the broker.
"""

from __future__ import annotations

import errno
import os

from ...errors import safe
from ...refusals import StorageFailed
from .log import note

TEXT_MAX = 1 << 20  # characters of one file: what would be more is neither written nor read, and nothing is ever cut


def read_text(path: str) -> str:
    """The whole of a small file; raises OSError, also if it is large or no text."""
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read(TEXT_MAX + 1)
        except UnicodeDecodeError:
            raise OSError(errno.EILSEQ, "it is no text", path) from None
    if len(text) > TEXT_MAX:
        raise OSError(errno.EFBIG, f"it has more than {TEXT_MAX} characters", path)
    return text


def why(exc: Exception) -> str:
    """What is wrong with a file of ours, for its owner: without the path, which is in the journal (R25)."""
    if isinstance(exc, KeyError):
        return safe(f"{exc.args[0]} is missing", 80)
    return safe((isinstance(exc, OSError) and exc.strerror) or exc, 80)


def write_fast(path: str, text: str) -> None:
    """Beside and renamed, but not synced: for what need not outlive a power cut."""
    _must_be_small(path, text)
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(path + ".new", path)


def write_text(path: str, text: str) -> None:
    """Beside, synced and renamed."""
    _must_be_small(path, text)
    beside = f"{os.path.dirname(path)}/.{os.path.basename(path)}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    os.rename(beside, path)


def _must_be_small(path: str, text: str) -> None:
    """Who writes has limits of his own, with a sentence each; this is for the limit that nobody thought of."""
    if len(text) > TEXT_MAX:
        raise OSError(errno.EFBIG, f"it would have {len(text)} characters, and {TEXT_MAX} are the most", path)


def sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class kept:
    """`with kept(thing, name):` what cannot be saved is not believed either: on an error the attribute is what it was."""

    def __init__(self, thing: object, name: str) -> None:
        self._thing, self._name, self._before = thing, name, getattr(thing, name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is not None:
            setattr(self._thing, self._name, self._before)


class storage:
    """`with storage():` turns what the file system says into the sentence a person reads; the path stays in the journal (R25)."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, OSError):
            note("storage", problem=str(exc))
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageFailed(problem="the disk is full" if full else exc.strerror or "the disk refused") from exc


def boot_id() -> str:
    """This boot of the host, so that no pid of an earlier one is believed."""
    return read_text("/proc/sys/kernel/random/boot_id").strip()
