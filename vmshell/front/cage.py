"""The cage of one connection: what a child needs to read, check and pass on, and nothing else of the kernel.

No path can be opened, no process started, no socket made or connected, no signal sent, nobody looked into. Every other call ends
the process at once.

All children, the zygote and the server have one uid, so each call is looked at for what it does to others of that uid, too:
limits are one's own only (prlimit64 takes a pid), and whom the kernel is to signal when something can be read is nobody's to say
(fcntl and ioctl could, with SIGKILL).
Runs in: a front child. Touches only its own process.
"""

from __future__ import annotations

import os
import resource

from ..confine import limit, lock_in, only

MEMORY_MAX = 64 << 20  # of addresses, beside those it starts with, which are shared with the zygote
NICE = 5  # many children of one user, each at work, weigh less than the server, which accepts the others

# x86-64 numbers of what Python does while it passes packets on, and when it ends.
# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "poll": 7, "close": 3,
    "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
    # memory; mmap and mprotect are looked at more closely, see `confine.only`
    "brk": 12, "munmap": 11, "mremap": 25, "madvise": 28,
    # time and limits; the number of an error that nobody thought of
    "alarm": 37, "setitimer": 38, "getrusage": 98, "setrlimit": 160, "getrlimit": 97, "clock_gettime": 228, "getrandom": 318,
    # signals as Python's own handlers leave them, waiting, and the end
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "restart_syscall": 219, "futex": 202,
    "exit": 60, "exit_group": 231,
}
# fmt: on
IOCTL, PRLIMIT64 = 16, 302
FIONBIO, SIOCOUTQ = 0x5421, 0x5411
# By number: the index of an argument, and what it may be.
WITH_VALUES = {IOCTL: (1, (FIONBIO, SIOCOUTQ)), PRLIMIT64: (0, (0,))}


def enter() -> None:
    """Lock this process in. Everything that it imports must be there already."""
    os.nice(NICE)
    memory = _addresses() + MEMORY_MAX
    limit({resource.RLIMIT_FSIZE: 0, resource.RLIMIT_NPROC: 0, resource.RLIMIT_CORE: 0, resource.RLIMIT_AS: memory})
    lock_in(program())


def _addresses() -> int:
    """Bytes of addresses that this process has."""
    file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    pages = int(os.read(file, 100).split()[0])
    os.close(file)
    return pages * resource.getpagesize()


def program() -> bytes:
    """The filter as an array of `struct sock_filter`."""
    return only(ALLOWED.values(), WITH_VALUES)
