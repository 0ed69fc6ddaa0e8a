"""The cage a storage job locks itself into before it looks at a byte that a user sent.

What is left inside: read and write on the five descriptors it has, take some memory, end. No path can be opened, no process or
program started, no socket made, no signal sent; whoever takes the process over by a bug in our parsing, or in Python's own
code, gets that and no more. Every other call of the kernel ends the process at once.

Made of what a process may do to itself without any right: limits, prctl, and a seccomp filter (classic BPF for x86-64).
Runs in: the storage worker. Touches only its own process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

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
_MMAP, _MPROTECT = 9, 10
_PROT_EXEC = 4
_MAP_ANONYMOUS = 0x20

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2

_AUDIT_ARCH_X86_64 = 0xC000003E
# classic BPF, as in linux/filter.h and linux/seccomp.h
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_ALLOW = 0x7FFF0000

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]. The low half of an argument comes first.
_NR, _ARCH, _PROTECTION, _FLAGS = 0, 4, 16 + 2 * 8, 16 + 3 * 8


def enter(file_max: int) -> None:
    """Lock this process in; its files can grow to *file_max* bytes. Raises OSError when the kernel refuses: then do nothing more.

    Everything that the job imports must be there already.
    """
    os.closerange(LAST_FD + 1, os.sysconf("SC_OPEN_MAX"))
    for limit, value in (
        (resource.RLIMIT_FSIZE, file_max),
        (resource.RLIMIT_NOFILE, LAST_FD + 1),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY_MAX),
        (resource.RLIMIT_CPU, CPU_SECONDS + file_max // CPU_BYTES_PER_SECOND),
    ):
        _, hard = resource.getrlimit(limit)
        # A hard limit is never raised: whoever started us may have set a lower one.
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_DUMPABLE, 0)  # nobody of our uid may look into us
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    code = program()
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: unsigned short len, padding, struct sock_filter *filter
    array = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _prctl(libc, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(array))


def _prctl(libc: ctypes.CDLL, option: int, value: int, pointer: ctypes.c_char_p | None = None) -> None:
    unused = ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), pointer, unused, unused):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def program() -> bytes:
    """The filter as an array of `struct sock_filter`."""
    # Jumps go forward only and by name: "next" is the following instruction.
    code: list[tuple[int, int, str, str]] = [
        (_LOAD, _ARCH, "next", "next"),
        (_EQUAL, _AUDIT_ARCH_X86_64, "next", "kill"),
        # The x32 calls have numbers of their own, far above these.
        (_LOAD, _NR, "next", "next"),
        *((_EQUAL, number, "allow", "next") for number in sorted(ALLOWED.values())),
        (_EQUAL, _MPROTECT, "protection", "next"),
        (_EQUAL, _MMAP, "next", "kill"),
        # Memory, but none of a file's, and none that could hold code brought along.
        (_LOAD, _FLAGS, "next", "next"),
        (_ANY_BIT, _MAP_ANONYMOUS, "next", "kill"),
        (_LOAD, _PROTECTION, "next", "next"),
        (_ANY_BIT, _PROT_EXEC, "kill", "next"),
        (_RETURN, _ALLOW, "next", "next"),
        (_RETURN, _KILL, "next", "next"),
    ]
    last = len(code)
    places = {"protection": last - 4, "allow": last - 2, "kill": last - 1}
    words = []
    for index, (operation, value, if_true, if_false) in enumerate(code):
        places["next"] = index + 1
        # One byte for each distance: struct refuses what does not fit, so a filter grown too long cannot go wrong silently.
        words.append(struct.pack("=HBBI", operation, places[if_true] - index - 1, places[if_false] - index - 1, value))
    return b"".join(words)
