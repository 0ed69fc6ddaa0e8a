"""The two FIFOs on which the serial port of a VM's guest lies: made for each run, opened anew for each process that gets them.

Their names stay in the run directory for as long as the VM runs: who was killed and had nobody to keep its descriptors gets new
ones, and goes on with what lies in them. Nobody opens them by name but the broker, whose they are.
Runs in: the broker.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import contextlib

NAMES = ("input", "output")  # as the guest sees them


def make(folder: str, stack: contextlib.ExitStack) -> tuple[int, ...]:
    """Make the FIFOs of a run that begins, and open them for its QEMU; *stack* closes them. Raises OSError."""
    for name in NAMES:
        os.mkfifo(f"{folder}/{name}", 0o600)
    return open_both(folder, stack)


def open_both(folder: str, stack: contextlib.ExitStack) -> tuple[int, ...]:
    """Open the FIFOs of a run, input and output; none if an earlier version started it, on a socket. Raises OSError.

    For reading and writing: who holds one end so holds the other, and never sees an end, after which QEMU would listen no more.
    Never a dup: whether its holder wants to be kept waiting is then its own affair.
    """
    try:
        opened = []
        for name in NAMES:
            fd = os.open(f"{folder}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            opened.append(fd)
        return tuple(opened)
    except FileNotFoundError:
        return ()
