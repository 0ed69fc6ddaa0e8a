"""A member of the group with a program of their own, who sends descriptors whose closing waits to wherever a packet can lie.

`way` is `storm` (every request, read and unread, closed at once and kept, below and above the limit of connections, over and
over) or `crowd` (`count` connections above the limit at a time, each with such a descriptor in it).
Runs in: a host, as a user. Says what it has done, by number, after each round.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress

from tests.fakes.poison import LingeringSockets, SilentFile

LIMIT = 140  # connections: more than anybody is allowed
BATCH = 50  # connections that are opened before something is sent on them
KEPT = 20  # connections that are left as they are while others come
PACKETS = 3  # on a connection; the first is read, others lie behind it
PAUSE = {"storm": 0.05, "crowd": 0.0}  # seconds between two turns: the processors of the machine are no subject of this
REPLACED = 0.2  # seconds between two batches of connections that take the place of those that were ended
PATIENCE = 20.0
GOOD = b'{"id":1,"verb":"whoami"}'


class Poisoner:
    """*kind* of descriptor: `socket` or `file`."""

    def __init__(self, path: str, kind: str) -> None:
        self._path = path
        self._file = SilentFile() if kind == "file" else None
        self._sockets = LingeringSockets()
        self.count: Counter[str] = Counter()

    def connect(self) -> socket.socket:
        """A connection, if there is anybody who takes one; waits while there is no room in the queue."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(PATIENCE), 0))
        try:
            sock.connect(self._path)
        except OSError:
            self.count["not taken"] += 1
        sock.setblocking(False)
        return sock

    def poison(self, data: bytes, *socks: socket.socket) -> None:
        """Send *data* to each of *socks*, with a descriptor of which nobody else holds any when this returns."""
        self.count["sent"] += len(socks)
        if self._file is not None:
            for sock in socks:
                _send(sock, data, self._file.fd)
            return
        # Whoever is the last to close one waits: so a child sends them, and ends, which closes without waiting.
        fds = [self._sockets.take() for _ in socks]
        wait, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(wait, 1)
            for sock, fd in zip(socks, fds, strict=True):
                _send(sock, data, fd)
            os._exit(0)
        for fd in (wait, *fds, go):
            os.close(fd)
        os.waitpid(pid, 0)

    def read(self, sock: socket.socket) -> None:
        """Take what was answered so far."""
        with suppress(OSError):
            while answer := sock.recv(65536):
                self.count["refused" if b'"error"' in answer else "answered"] += 1

    def end(self) -> None:
        if self._file is not None:
            self._file.end()


def _send(sock: socket.socket, data: bytes, fd: int) -> None:
    with suppress(OSError):
        socket.send_fds(sock, [data], [fd], socket.MSG_NOSIGNAL)


def storm(poisoner: Poisoner, requests: list[bytes]) -> Iterator[None]:
    """Every request, below the limit of connections and above it, on connections that are read, not read, and closed at once."""
    kept: deque[tuple[socket.socket, bool]] = deque()
    while True:
        for idle in (0, LIMIT):
            others = [poisoner.connect() for _ in range(idle)]
            for data in requests:
                read, unread, closed = socks = [poisoner.connect() for _ in range(3)]
                with suppress(OSError):
                    read.send(GOOD, socket.MSG_NOSIGNAL)
                poisoner.poison(data, *socks * PACKETS)
                closed.close()
                kept += (read, True), (unread, False)
                for sock in [sock for sock, reads in kept if reads]:
                    poisoner.read(sock)
                while len(kept) > KEPT:
                    kept.popleft()[0].close()
                yield
            for sock in others:
                sock.close()
        poisoner.count["rounds"] += 1


def crowd(poisoner: Poisoner, requests: list[bytes], count: int) -> Iterator[None]:
    """Keep *count* connections above the limit: whichever is ended, another takes its place."""
    poll, held = select.poll(), dict[int, socket.socket]()
    while True:
        while len(held) < count + LIMIT:
            socks = [poisoner.connect() for _ in range(BATCH)]
            poisoner.poison(requests[poisoner.count["sent"] // BATCH % len(requests)], *socks)
            for sock in socks:
                held[sock.fileno()] = sock
                poll.register(sock, 0)
            yield
        if not poisoner.count["rounds"]:
            poisoner.count["rounds"] += 1
            yield
        time.sleep(REPLACED)
        for fd, _ in poll.poll(0)[:BATCH]:
            poll.unregister(fd)
            held.pop(fd).close()
            poisoner.count["ended"] += 1
        yield


def go_on(count: Counter[str], turns: Iterator[None], pause: float) -> None:
    """Take turns until the input ends, and say after each round what was done."""
    rounds = 0
    for _ in turns:
        if count["rounds"] > rounds:
            rounds = count["rounds"]
            print(json.dumps(count), flush=True)
        if select.select([sys.stdin], [], [], pause)[0]:
            break
    print(json.dumps(count), flush=True)


def main() -> int:
    todo = json.loads(sys.stdin.readline())
    poisoner = Poisoner(todo["socket"], todo["kind"])
    requests = [request.encode() for request in todo["requests"]]
    turns = storm(poisoner, requests) if todo["way"] == "storm" else crowd(poisoner, requests, todo["count"])
    try:
        go_on(poisoner.count, turns, PAUSE[todo["way"]])
    finally:
        poisoner.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
