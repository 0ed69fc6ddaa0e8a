"""Our ends of a guest's serial port: two FIFOs that the broker hands over, and that last as long as the VM does.

QEMU holds both ends of both, and so do we: nobody ever sees an end. What the guest says while nobody reads waits in there, and
when they are full the guest waits too. A VM that an earlier version started has one socket in their place; that one can be lost,
and connected anew.
Runs in: the relay. Touches two descriptors and, for a socket, one `console.sock`.
"""

from __future__ import annotations

import os

from .qmp import connect

INPUT, OUTPUT = "input", "output"  # as the guest sees them
SOCKET = "console"
KINDS = (INPUT, OUTPUT, SOCKET)  # what names in the service manager's store begin with
UNLOGGED = "-unlogged"  # and what they end with when the guest's output is not to be written down


class Port:
    """`input_fd` takes keys, `output_fd` brings what the guest says. *lasting*: neither ends before the broker says so."""

    __slots__ = ("input_fd", "lasting", "output_fd")

    def __init__(self, input_fd: int, output_fd: int, *, lasting: bool) -> None:
        self.input_fd = input_fd
        self.output_fd = output_fd
        self.lasting = lasting
        for fd in (input_fd, output_fd):
            os.set_blocking(fd, False)

    def leads_to(self, output_fd: int) -> bool:
        """Is *output_fd* the same FIFO as ours?"""
        return os.path.sameopenfile(self.output_fd, output_fd)

    def names(self, number: int, *, logged: bool) -> dict[str, int]:
        """What the service manager is to keep of VM *number*'s port, by name."""
        end = "" if logged else UNLOGGED
        if self.lasting:
            return {f"{INPUT}-{number}": self.input_fd, f"{OUTPUT}-{number}{end}": self.output_fd}
        return {f"{SOCKET}-{number}{end}": self.output_fd}

    def close(self) -> None:
        os.close(self.input_fd)
        os.close(self.output_fd)


def every_name(number: int) -> list[str]:
    """All that VM *number*'s port may be kept under."""
    return [f"{kind}-{number}{end}" for kind in KINDS for end in ("", UNLOGGED)]


def dial(run_dir: str) -> Port:
    """Connect to the socket of a VM that an earlier version started; raises OSError."""
    return _of_socket(connect(f"{run_dir}/console.sock").detach())


def from_store(kept: dict[str, int]) -> Port | None:
    """Make a port of what the service manager kept, by the kinds of its names; what belongs to no whole port is closed."""
    fds = dict(kept)
    port = None
    if INPUT in fds and OUTPUT in fds:
        port = Port(fds.pop(INPUT), fds.pop(OUTPUT), lasting=True)
    elif SOCKET in fds:
        port = _of_socket(fds.pop(SOCKET))
    for fd in fds.values():
        os.close(fd)
    return port


def _of_socket(fd: int) -> Port:
    # Two descriptors, so that whoever waits for one direction is not woken by the other.
    return Port(os.dup(fd), fd, lasting=False)
