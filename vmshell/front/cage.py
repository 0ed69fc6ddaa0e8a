"""The cage of one connection: what a child needs to read, check and pass on, and nothing else of the kernel.

No path can be opened, no process started, no socket made or connected, no signal sent, nobody looked into. Every other call ends
the process at once.
Runs in: a front child. Touches only its own process.
"""

from __future__ import annotations

import resource

from ..confine import limit, lock_in, only

MEMORY_MAX = 512 << 20  # of addresses, nearly all of which is shared with the zygote

# x86-64 numbers of what Python does while it passes packets on, and when it ends.
# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "poll": 7, "ioctl": 16, "fcntl": 72, "close": 3,
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
    # memory; mmap and mprotect are looked at more closely, see `confine.only`
    "brk": 12, "munmap": 11, "mremap": 25, "madvise": 28,
    # time and limits
    "alarm": 37, "setitimer": 38, "getrusage": 98, "setrlimit": 160, "getrlimit": 97, "prlimit64": 302, "clock_gettime": 228,
    # signals as Python's own handlers leave them, waiting, and the end
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "restart_syscall": 219, "futex": 202,
    "exit": 60, "exit_group": 231,
}
# fmt: on


def enter() -> None:
    """Lock this process in. Everything that it imports must be there already."""
    limit({resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: MEMORY_MAX})
    lock_in(only(ALLOWED.values()))
