"""Taps: made by one ioctl on the descriptor that is handed over, so that each dies with the QEMU that holds it.

A tap takes plain frames. With offloading (IFF_VNET_HDR) the guest would name a place in its frame where the kernel is to write a
checksum, and the kernel writes it after the last look of the filter: into an address, a port or an ARP sender.
Nobody can attach to one that is there: its owner and group are root's, and it takes one descriptor only.
Runs in: tapnet. Touches /dev/net/tun.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from vmshell.refusals import NetworkFailed

DEVICE = "/dev/net/tun"

_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETOWNER, _TUNSETGROUP = 0x400454CC, 0x400454CE
_TAP, _NO_PI, _OFFLOADING, _EXCLUSIVE, _PERSISTENT = 0x0002, 0x1000, 0x4000, 0x8000, 0x0800
_IFREQ = struct.Struct("16sH22x")


def create(name: str) -> int:
    """Make the tap *name*, still down, and return its descriptor; raises NetworkFailed if there is an interface of that name."""
    encoded = name.encode("ascii")
    if len(encoded) > 15:
        # The kernel would cut the name and might hand us somebody else's tap (E25).
        raise NetworkFailed(problem=f"{name} is longer than the 15 characters that an interface's name may have")
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NetworkFailed(problem=f"{DEVICE} cannot be opened: {error.strerror}; its mode should be 0666") from error
    try:
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(encoded, _TAP | _NO_PI | _EXCLUSIVE))
        fcntl.ioctl(fd, _TUNSETOWNER, 0)
        fcntl.ioctl(fd, _TUNSETGROUP, 0)
        got, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
        if got.rstrip(b"\0") != encoded or flags & (_PERSISTENT | _OFFLOADING):
            raise NetworkFailed(problem=f"the kernel made another tap than {name}")
    except OSError as error:
        os.close(fd)
        if error.errno == errno.EBUSY:
            raise NetworkFailed(problem=f"there is an interface {name} already, and it is not ours; remove it") from error
        raise NetworkFailed(problem=f"the tap {name} cannot be made: {error.strerror}") from error
    except NetworkFailed:
        os.close(fd)
        raise
    return fd
