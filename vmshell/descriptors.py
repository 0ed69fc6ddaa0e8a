"""What a received descriptor really is: each check asks the kernel about the open descriptor, never about a name.

A process that hands descriptors on to QEMU (the launcher, the relay) does not believe the one it got them from: a directory, a
socket or somebody else's file in a disk's place is refused before QEMU sees it.
Runs in: the launcher, the relay. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct

_TUNGETIFF = 0x800454D2
_IFREQ = struct.Struct("16sH22x")
_IFF_TAP = 0x0002


def check_read_file(fd: int, owner: int) -> None:
    """Raise ValueError unless *fd* is a regular file opened for reading only that *owner* owns or everybody may read."""
    status = _regular(fd, os.O_RDONLY)
    if status.st_uid != owner and not status.st_mode & stat.S_IROTH:
        raise ValueError(f"a file of uid {status.st_uid} that others may not read")


def check_written_file(fd: int, owner: int) -> None:
    """Raise ValueError unless *fd* is a regular file of *owner*'s, opened for reading and writing."""
    status = _regular(fd, os.O_RDWR)
    if status.st_uid != owner:
        raise ValueError(f"a file of uid {status.st_uid}, which only that uid may have written")


def check_listener(fd: int) -> None:
    """Raise ValueError unless *fd* is a listening Unix stream socket."""
    if not _unix_stream(fd).getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ValueError("a socket that does not listen")


def check_stream(fd: int) -> None:
    """Raise ValueError unless *fd* is a connected Unix stream socket."""
    sock = _unix_stream(fd)
    try:
        sock.getpeername()
    except OSError as exc:
        raise ValueError("a socket that is not connected") from exc


def check_pipe(fd: int, mode: int | None = None) -> None:
    """Raise ValueError unless *fd* is a pipe, opened with *mode* (one of os.O_RDONLY, O_WRONLY, O_RDWR) if that is given."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise ValueError("no pipe")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or (mode is not None and flags & os.O_ACCMODE != mode):
        raise ValueError("a pipe opened in another mode")


def check_tap(fd: int, name: str) -> None:
    """Raise ValueError unless *fd* is the tap *name*."""
    if not stat.S_ISCHR(os.fstat(fd).st_mode):
        raise ValueError("no tap")
    try:
        found, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as exc:
        raise ValueError("no tap") from exc
    if found.rstrip(b"\0") != name.encode("ascii"):
        raise ValueError(f"another tap than {name}")
    if not flags & _IFF_TAP:
        raise ValueError("an interface without Ethernet frames")


def _regular(fd: int, mode: int) -> os.stat_result:
    """The status of *fd*, a regular file opened exactly for *mode*."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE != mode:
        raise ValueError("a file opened in another mode")
    return status


def _unix_stream(fd: int) -> socket.socket:
    """A duplicate of *fd* as a socket object, which closes with its last reference."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode) or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        raise ValueError("no socket")
    # Told the family Python does not look for it, which fails for sockets without names; whether it is true the kernel says.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, os.dup(fd))
    found = [sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_DOMAIN, socket.SO_TYPE)]
    if found != [socket.AF_UNIX, socket.SOCK_STREAM]:
        sock.close()
        raise ValueError("no Unix stream socket")
    return sock
