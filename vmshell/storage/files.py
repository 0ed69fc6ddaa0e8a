"""The two things every job does with an inherited file: ask how long it is, and write all of something.

Runs in: the storage worker. Touches the descriptors it is given.
"""

from __future__ import annotations

import os
import stat

from .qcow2 import BadImage


def regular_size(fd: int) -> int:
    """The length of the regular file *fd*; raises BadImage when it is anything else."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("it is not a regular file")
    return status.st_size


def write(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of *data* at *offset*."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
