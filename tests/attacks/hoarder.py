"""A member of the group who has the host give them descriptors, and leaves these lying, or makes them as large as can be.

`way` is `unread` (`count` connections, on which every one of the requests is sent again and again and no answer is read), `left`
(as many, one after the other; each is given up when its answer has come, which is never read), or `grown` (a console on each, of
which both ends are grown to a mebibyte as often as the kernel allows it).
Runs in: a host, as a user. Stdlib only. Says what it holds, and at the end what had lain unread.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

AGAIN = 8  # times that each request is sent
SETTLE = 2.0  # seconds for the answers to come
PATIENCE = 20.0
LARGE = 1 << 20
DESCRIPTORS = 16  # of one packet that would be seen


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(path)
    return sock


def unread(path: str, requests: list[str], count: int) -> Iterator[dict[str, int]]:
    socks = [connect(path) for _ in range(count)]
    for index, sock in enumerate(socks):
        sock.setblocking(False)
        with suppress(OSError):
            for _ in range(AGAIN):
                sock.send(requests[index % len(requests)].encode())
    time.sleep(SETTLE)
    yield {"connections": count}
    yield counted(socks)


def left(path: str, requests: list[str], count: int) -> Iterator[dict[str, int]]:
    socks = []
    for index in range(count):
        socks.append(sock := connect(path))
        with suppress(OSError):
            sock.send(requests[index % len(requests)].encode())
            select.select([sock], [], [], PATIENCE)
            sock.send(b"what is no request ends a connection")
            sock.shutdown(socket.SHUT_WR)
    yield {"connections": count}
    yield counted(socks)


def counted(socks: list[socket.socket]) -> dict[str, int]:
    lay = [lying(sock) for sock in socks]
    return {"most": max(lay), "in all": sum(lay), "holding": sum(map(bool, lay))}


def lying(sock: socket.socket) -> int:
    """How many descriptors lie in *sock*."""
    count = 0
    sock.setblocking(False)
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(sock, 1 << 16, DESCRIPTORS)
        except ConnectionResetError:
            continue  # said once, by a peer that had not read everything; what it said before is behind that
        except BlockingIOError:
            return count
        for fd in fds:
            os.close(fd)
        count += len(fds)
        if not data:
            return count


def grown(path: str, requests: list[str], count: int) -> Iterator[dict[str, int]]:
    socks, held, large = [connect(path) for _ in range(count)], [], 0
    for index, sock in enumerate(socks):
        with suppress(OSError):
            sock.send(requests[index % len(requests)].encode())
            held += socket.recv_fds(sock, 1 << 16, DESCRIPTORS)[1]
    for fd in held:
        with suppress(OSError):
            large += fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, LARGE) >= LARGE
    yield {"held": len(held), "large": large}
    yield {"held": len(held), "large": large}


def main() -> int:
    todo = json.loads(sys.stdin.readline())
    what = {"unread": unread, "left": left, "grown": grown}[todo["way"]](todo["socket"], todo["requests"], todo["count"])
    print(json.dumps(next(what)), flush=True)
    sys.stdin.read()
    print(json.dumps(next(what)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
