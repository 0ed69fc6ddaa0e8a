"""Descriptors whose closing waits: whoever drops the last reference to one pays for it, for as long as its maker likes.

Both can be made by anybody without a right: a TCP connection that lingers over data which its peer never reads, and a file of a
file system that its own maker serves, who never answers that it was flushed or released.
Runs in: attackers' programs on a host, as a user; stdlib only, for that host has no tests.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
from collections import deque
from contextlib import suppress

LINGER = 600  # seconds
SMALL = 4096  # bytes of buffers, of which there are thousands
KEPT = 8000
FUSE = "/dev/fuse"


class LingeringSockets:
    """`take` gives a connection whose last close waits LINGER seconds, or until KEPT others have been taken."""

    def __init__(self) -> None:
        self._server = socket.socket()
        self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self._server.bind(("127.0.0.1", 0))
        self._server.listen()
        self._peers: deque[socket.socket] = deque(maxlen=KEPT)  # who never read; of one that is closed nobody waits for anything

    def take(self) -> int:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        sock.connect(self._server.getsockname())
        self._peers.append(self._server.accept()[0])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sock.send(b"x" * 65536)
        return sock.detach()


class SilentFile:
    """`fd` is a file whose every close waits until `end`, which ends its server. That keeps what was open when it was forked."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._server = os.fork()
        if self._server == 0:
            try:
                ours.close()
                _serve(theirs)
            finally:
                os._exit(1)
        theirs.close()
        with ours:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if not fds:
            raise OSError(errno.ENODEV, "no file system of one's own can be mounted here")
        self.fd = fds[0]

    def end(self) -> None:
        os.kill(self._server, signal.SIGKILL)
        os.waitpid(self._server, 0)


# --- the file system (see linux/fuse.h) ---------------------------------------------------------------------------------

_LOOKUP, _FORGET, _GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT, _BATCH_FORGET = 1, 2, 3, 14, 18, 25, 26, 42
_NEVER_ANSWERED = {_FLUSH, _RELEASE, _FORGET, _BATCH_FORGET}
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MOUNT_AT = "/mnt"
_DIRECTORY, _FILE = 0o040755, 0o100666


def _serve(opener: socket.socket) -> None:
    """Mount, have a child open a file and hand it over, and answer what that takes and nothing else."""
    device = _mount()
    if os.fork() == 0:
        try:
            socket.send_fds(opener, [b"f"], [os.open(f"{_MOUNT_AT}/file", os.O_RDWR)])
        finally:
            os._exit(0)
    opener.close()
    while True:
        request = os.read(device, 1 << 18)
        _, what, number = struct.unpack_from("IIQ", request)
        if what in _NEVER_ANSWERED:
            continue
        answer = _answer(what, request)
        problem = 0 if answer else -errno.ENOSYS
        os.write(device, struct.pack("IiQ", 16 + len(answer), problem, number) + answer)


def _mount() -> int:
    """In namespaces of our own, where we are root; the file system's device."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    _check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    device = os.open(FUSE, os.O_RDWR)
    options = f"fd={device},rootmode={_DIRECTORY:o},user_id=0,group_id=0"
    _check(libc.mount(b"silent", _MOUNT_AT.encode(), b"fuse", 0, options.encode()))
    return device


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _answer(what: int, request: bytes) -> bytes:
    if what == _INIT:
        major, minor, readahead = struct.unpack_from("III", request, 40)
        return struct.pack("IIIIHHIIHHI7I", major, min(minor, 31), readahead, 0, 16, 12, 65536, 1, 0, 0, 0, *[0] * 7)
    if what == _LOOKUP:
        return struct.pack("QQQQII", 2, 0, 3600, 3600, 0, 0) + _attributes(2, _FILE)
    if what == _GETATTR:
        node = struct.unpack_from("Q", request, 16)[0]
        return struct.pack("QII", 3600, 0, 0) + _attributes(node, _DIRECTORY if node == 1 else _FILE)
    if what == _OPEN:
        return struct.pack("QII", 1, 0, 0)
    return b""


def _attributes(node: int, mode: int) -> bytes:
    return struct.pack("6Q10I", node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
