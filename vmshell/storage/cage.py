"""The cage a storage job locks itself into before it looks at a byte that a user sent.

What is left inside: read and write on the five descriptors it has, take some memory, end. No path can be opened, no process or
program started, no socket made, no signal sent; whoever takes the process over by a bug in our parsing, or in Python's own
code, gets that and no more. Every other call of the kernel ends the process at once.

Made of what a process may do to itself without any right: limits, prctl, and a seccomp filter (classic BPF for x86-64).
Runs in: the storage worker. Touches only its own process.
"""

from __future__ import annotations

import os
import resource

from ..confine import limit, lock_in, only

LAST_FD = 4  # 0 to 2 as everywhere, 3 the new file, 4 the stream
MEMORY_MAX = 256 << 20
# A limit on calculating, not on waiting: an honest upload needs a fraction, one that comes byte by byte does not pass.
CPU_SECONDS = 60
CPU_BYTES_PER_SECOND = 4 << 20

# x86-64 numbers of what Python does while it copies and when it ends.
ALLOWED = {
    "read": 0,
    "write": 1,
    "readv": 19,
    "pread64": 17,
    "pwrite64": 18,
    "poll": 7,
    "ftruncate": 77,
    "fsync": 74,
    # memory; mmap and mprotect are looked at more closely below
    "brk": 12,
    "munmap": 11,
    "mremap": 25,
    "madvise": 28,
    # signals as Python's own handlers leave them, waiting, and the end
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "restart_syscall": 219,
    "futex": 202,
    "clock_gettime": 228,
    "exit": 60,
    "exit_group": 231,
}


def enter(file_max: int) -> None:
    """Lock this process in; its files can grow to *file_max* bytes. Raises OSError when the kernel refuses: then do nothing more.

    Everything that the job imports must be there already.
    """
    os.closerange(LAST_FD + 1, os.sysconf("SC_OPEN_MAX"))
    limit(
        {
            resource.RLIMIT_FSIZE: file_max,
            resource.RLIMIT_NOFILE: LAST_FD + 1,
            resource.RLIMIT_NPROC: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_AS: MEMORY_MAX,
            resource.RLIMIT_CPU: CPU_SECONDS + file_max // CPU_BYTES_PER_SECOND,
        }
    )
    lock_in(program())


def program() -> bytes:
    """The filter as an array of `struct sock_filter`."""
    return only(ALLOWED.values())
