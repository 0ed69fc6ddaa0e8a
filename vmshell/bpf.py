"""Seccomp filters: from instructions whose jumps are names to the bytes that the kernel takes, and loading them.

Classic BPF for x86-64, as in linux/filter.h and linux/seccomp.h. Jumps go forward only.
Used by: the launch line's filter, the cages of storage jobs and of the front. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

# operation, value, where to go on if true and if false: the name of a place, or "next"
Instruction = tuple[int, int, str, str]

LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K

KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
ALLOW = 0x7FFF0000
ERRNO = 0x00050000

AUDIT_ARCH_X86_64 = 0xC000003E
# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]. The low half of an argument comes first.
NR, ARCH = 0, 4


def argument(index: int) -> int:
    """Where the low half of a call's argument is."""
    return 16 + 8 * index


def assemble(code: Sequence[Instruction], places: Mapping[str, int]) -> bytes:
    """The filter as an array of `struct sock_filter`; *places* are indexes into *code*, from its end if negative."""
    at = {name: place % len(code) for name, place in places.items()}
    words = []
    for index, (operation, value, if_true, if_false) in enumerate(code):
        at["next"] = index + 1
        # One byte for each distance: struct refuses what does not fit, so a filter grown too long cannot go wrong silently.
        words.append(struct.pack("=HBBI", operation, at[if_true] - index - 1, at[if_false] - index - 1, value))
    return b"".join(words)
