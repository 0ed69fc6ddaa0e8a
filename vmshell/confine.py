"""What a process may do to itself without any right, before it looks at a byte that somebody else chose: lower its limits, hide
from others of its uid, and load a filter of system calls that nothing takes away again.

Runs in: storage jobs, front children. Touches only its own process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct

from .bpf import ALLOW, ANY_BIT, ARCH, AUDIT_ARCH_X86_64, EQUAL, KILL, LOAD, NR, RETURN, argument, assemble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from .bpf import Instruction

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2
MMAP, MPROTECT = 9, 10
_PROT_EXEC, _MAP_ANONYMOUS = 4, 0x20


def limit(limits: Mapping[int, int]) -> None:
    """Set each of the resource *limits*, soft and hard."""
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        # A hard limit is never raised: whoever started us may have set a lower one.
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def only(calls: Collection[int], with_values: Mapping[int, tuple[int, Collection[int]]] | None = None) -> bytes:
    """A filter that lets through *calls* and memory of one's own that holds no code; anything else ends the process.

    *with_values* are calls that are let through if their argument of that index, an int, has one of the values.
    """
    places = {"protection": -4, "allow": -2, "kill": -1}
    code: list[Instruction] = [
        (LOAD, ARCH, "next", "next"),
        (EQUAL, AUDIT_ARCH_X86_64, "next", "kill"),
        # The x32 calls have numbers of their own, far above these.
        (LOAD, NR, "next", "next"),
        *((EQUAL, number, "allow", "next") for number in sorted(calls)),
    ]
    for number, (index, values) in (with_values or {}).items():
        code += [
            (EQUAL, number, "next", f"not {number}"),
            (LOAD, argument(index), "next", "next"),
            *((EQUAL, value, "allow", "next") for value in values),
            (RETURN, KILL, "next", "next"),
        ]
        places[f"not {number}"] = len(code)
    return assemble(
        [
            *code,
            (EQUAL, MPROTECT, "protection", "next"),
            (EQUAL, MMAP, "next", "kill"),
            # Memory, but none of a file's, and none that could hold code brought along.
            (LOAD, argument(3), "next", "next"),
            (ANY_BIT, _MAP_ANONYMOUS, "next", "kill"),
            (LOAD, argument(2), "next", "next"),
            (ANY_BIT, _PROT_EXEC, "kill", "next"),
            (RETURN, ALLOW, "next", "next"),
            (RETURN, KILL, "next", "next"),
        ],
        places,
    )


def lock_in(code: bytes) -> None:
    """Load the filter *code*; from then on only its calls are possible. Raises OSError when the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_DUMPABLE, 0)  # nobody of our uid may look into us
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: unsigned short len, padding, struct sock_filter *filter
    array = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _prctl(libc, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(array))


def _prctl(libc: ctypes.CDLL, option: int, value: int, pointer: ctypes.c_char_p | None = None) -> None:
    unused = ctypes.c_ulong(0)
    if libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), pointer, unused, unused):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
