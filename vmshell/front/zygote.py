"""The zygote: forks a child whenever the server wants one. It never holds a user's socket, so none of its children inherits one.

Runs in: the front. Touches the server's connection.
"""

from __future__ import annotations

import array
import os
import signal
import socket

from . import child

FORK, NONE = b"f", b"n"


def start(*listening: socket.socket) -> socket.socket:
    """Fork the zygote; the server's end of its connection. Call it while nothing of any user's is open.

    It keeps none of *listening*: who has those could give them away, to somebody who then is the front for users and broker.
    """
    server, own = _pair()
    if os.fork() == 0:
        try:
            for sock in (server, *listening):
                sock.close()
            _run(own)
        finally:
            os._exit(0)
    own.close()
    return server


def new_child(zygote: socket.socket) -> socket.socket | None:
    """Ask for a child; our end of its connection, or None if the host allows no more processes.

    Raises OSError if the zygote has ended.
    """
    zygote.send(FORK, socket.MSG_NOSIGNAL)
    data, ancillary, _, _ = zygote.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if data == NONE:
        return None
    if not ancillary:
        raise OSError("the zygote has ended")
    (fd,) = array.array("i", ancillary[0][2])
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)


def _run(server: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    while server.recv(1):
        try:
            _fork(server)
        except OSError:
            server.send(NONE)


def _fork(server: socket.socket) -> None:
    outer, inner = _pair()
    with outer, inner:
        if os.fork() == 0:
            server.close()
            outer.close()
            child.run(inner)
        server.sendmsg([FORK], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [outer.fileno()]))])


def _pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
