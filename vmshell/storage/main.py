"""One storage job on inherited descriptors: `create SIZE`, `verify HEX…`, `check-header FORMAT [MAX]`, `check-overlay [MAX]`,
`put KIND MAX`.

Descriptors start at 3 and are all it ever touches: it opens no path. The answer is one line of JSON on standard output, the last
thing that it does: `{"status": 0}`, of `put` also `size`, `bytes` and `sha256` of what came, or `{"status": 1, "problem": "…"}`.
The status is also the exit status: 0 done, 1 damaged or refused, 2 no space, 3 another I/O error.
Runs in: a process of its own under a job's uid, without capabilities. `create` and `verify` parse nothing that a user made;
`put`, which does, locks itself in first (see `cage`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os

from . import qcow2
from .files import regular_size, write
from .qcow2 import BadImage

OK, REFUSED, NO_SPACE, IO_ERROR = 0, 1, 2, 3

FIRST_FD = 3
_CHUNK = 1 << 20
# EFBIG is RLIMIT_FSIZE or the file system's own limit (Python ignores SIGXFSZ): for the asker it is space as well.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

USAGE = "usage: storage create SIZE | verify HEX… | check-header raw|qcow2 [MAX] | check-overlay [MAX] | put KIND MAX"


def main(argv: list[str]) -> int:
    """Do the job in *argv*; return the exit status."""
    try:
        _run(argv)
    except (BadImage, OSError) as exc:
        status, reason = _explain(exc)
        _answer(status, {"problem": reason})
        return status
    _answer(OK, {})
    return OK


def _explain(exc: Exception) -> tuple[int, str]:
    """The exit status that *exc* means, and the reason in words."""
    if isinstance(exc, BadImage):
        return REFUSED, str(exc)
    if isinstance(exc, OSError):
        return NO_SPACE if exc.errno in _NO_SPACE else IO_ERROR, os.strerror(exc.errno or errno.EIO)
    return IO_ERROR, f"unexpected {type(exc).__name__}"


def _run(argv: list[str]) -> None:
    match argv:
        case ["create", size] if size.isdecimal():
            create(FIRST_FD, int(size[:20]))
        case ["verify", *digests] if digests:
            verify(digests)
        case ["check-header", "raw" | "qcow2" as kind]:
            check_header(FIRST_FD, kind, qcow2.SIZE_MAX)
        case ["check-header", "raw" | "qcow2" as kind, size_max] if size_max.isdecimal():
            check_header(FIRST_FD, kind, int(size_max[:20]))
        case ["check-overlay"]:
            check_header(FIRST_FD, "qcow2", qcow2.SIZE_MAX)
        case ["check-overlay", size_max] if size_max.isdecimal():
            check_header(FIRST_FD, "qcow2", int(size_max[:20]))
        case ["put", "raw" | "qcow2" | "file" | "rom" | "floppy" as kind, size_max] if size_max.isdecimal():
            put(kind, int(size_max[:20]))
        case _:
            raise BadImage(USAGE)


def put(kind: str, size_max: int) -> None:
    """Take in what a user sends. Ends the process: the cage has no way out, not even the interpreter's own."""
    from . import cage
    from .put import bytes_max, receive

    status = OK
    try:
        if regular_size(FIRST_FD):
            raise BadImage("the file for the upload is not empty")
        cage.enter(bytes_max(kind, size_max))
        answer: dict[str, object] = {**receive(FIRST_FD, FIRST_FD + 1, kind, size_max)}
    except Exception as exc:  # a traceback would open files, which is not for the caged either
        status, reason = _explain(exc)
        answer = {"problem": reason}
    _answer(status, answer)
    os._exit(status)


def _answer(status: int, more: dict[str, object]) -> None:
    # Whoever asked may have gone.
    with contextlib.suppress(OSError):
        os.write(1, json.dumps({"status": status, **more}).encode() + b"\n")


def create(fd: int, size: int) -> None:
    """Make the empty file *fd* an empty qcow2 disk of *size* bytes; on failure it is empty again."""
    qcow2.check_size(size)
    if regular_size(fd):
        raise BadImage("the file for the new disk is not empty")
    parts, length = qcow2.empty(size)
    try:
        for offset, data in parts:
            write(fd, data, offset)
        os.ftruncate(fd, length)
        os.fsync(fd)
    except OSError:
        os.ftruncate(fd, 0)
        raise


def verify(digests: list[str]) -> None:
    """Compare the files from FIRST_FD on with *digests* (sha256, in hex)."""
    for number, digest in enumerate(digests):
        if _digest(FIRST_FD + number) != digest:
            raise BadImage(f"file {number + 1} of {len(digests)} is not what its recorded hash says")


def check_header(fd: int, kind: str, size_max: int) -> None:
    """Judge the image *fd*, declared to be *kind*: nothing is ever guessed from its contents."""
    file_size = regular_size(fd)
    if kind == "qcow2":
        qcow2.check(os.pread(fd, qcow2.HEADER_READ, 0), file_size, size_max)
    elif not 0 < file_size <= size_max or file_size % 512:
        raise BadImage(f"a raw disk has at most {size_max} bytes in whole sectors, not {file_size}")


def _digest(fd: int) -> str:
    import hashlib  # only this job needs it, and it costs as much as the rest of the start

    regular_size(fd)
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    offset = 0
    # pread: the descriptor is shared with whoever gave it, and its position is not ours to move.
    while count := os.preadv(fd, [buffer], offset):
        digest.update(memoryview(buffer)[:count])
        offset += count
    return digest.hexdigest()
