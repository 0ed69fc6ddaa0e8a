"""One storage job on inherited descriptors: `create SIZE`, `verify HEX…`, `check-header FORMAT [MAX]`, `check-overlay [MAX]`.

Descriptors start at 3 and are all it ever touches: it opens no path. The exit status is the answer, one line on standard
error the reason: 0 done, 1 damaged or refused, 2 no space, 3 another I/O error.
Runs in: a process of its own under a job's uid, without capabilities. `create` and `verify`, which the broker uses, parse
nothing that a user made; what will import users' files needs the jail of `launch/` around it.
"""

from __future__ import annotations

import errno
import os
import stat
import sys

from . import qcow2
from .qcow2 import BadImage

OK, REFUSED, NO_SPACE, IO_ERROR = 0, 1, 2, 3

FIRST_FD = 3
_CHUNK = 1 << 20
# EFBIG is RLIMIT_FSIZE or the file system's own limit (Python ignores SIGXFSZ): for the asker it is space as well.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

USAGE = "usage: storage create SIZE | verify HEX… | check-header raw|qcow2 [MAX] | check-overlay [MAX]"


def main(argv: list[str]) -> int:
    """Do the job in *argv*; return the exit status."""
    try:
        _run(argv)
    except BadImage as exc:
        return _fail(REFUSED, str(exc))
    except OSError as exc:
        return _fail(NO_SPACE if exc.errno in _NO_SPACE else IO_ERROR, os.strerror(exc.errno or errno.EIO))
    return OK


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
        case _:
            raise BadImage(USAGE)


def create(fd: int, size: int) -> None:
    """Make the empty file *fd* an empty qcow2 disk of *size* bytes; on failure it is empty again."""
    qcow2.check_size(size)
    if _regular_size(fd):
        raise BadImage("the file for the new disk is not empty")
    parts, length = qcow2.empty(size)
    try:
        for offset, data in parts:
            _write(fd, data, offset)
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
    file_size = _regular_size(fd)
    if kind == "qcow2":
        qcow2.check(os.pread(fd, qcow2.HEADER_READ, 0), file_size, size_max)
    elif not 0 < file_size <= size_max or file_size % 512:
        raise BadImage(f"a raw disk has at most {size_max} bytes in whole sectors, not {file_size}")


def _regular_size(fd: int) -> int:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("it is not a regular file")
    return status.st_size


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _digest(fd: int) -> str:
    import hashlib  # only this job needs it, and it costs as much as the rest of the start

    _regular_size(fd)
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    offset = 0
    # pread: the descriptor is shared with whoever gave it, and its position is not ours to move.
    while count := os.preadv(fd, [buffer], offset):
        digest.update(memoryview(buffer)[:count])
        offset += count
    return digest.hexdigest()


def _fail(status: int, reason: str) -> int:
    print(reason, file=sys.stderr)
    return status
