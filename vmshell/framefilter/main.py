"""`framefilter`: stand between a session's QEMU (descriptor 3) and its passt (4), and keep from passt what it must not get.

Both speak the same stream: a frame behind its length, 4 bytes, the highest first. What comes from passt is copied as it is; of
what comes from QEMU, that is from the guest, only the frames that `frames.passes`. It ends as soon as one of the two does, and
passt with it; the VM goes on without this network.
Runs in: a process of its own for each card, started by the broker in session mode with the session's uid (nobody, where that is
root), no way to more rights, and limits with which nothing can be opened or started. It goes on while there is no broker.
"""

from __future__ import annotations

import os
import resource
import select
import socket
from collections.abc import Callable, Iterator

from .frames import HEAD, asks_for_address, passes

QEMU, PASST = 3, 4
NOBODY = 65534
MEMORY_MAX = 256 << 20

LENGTH = 4
SENT_MAX = 69632  # QEMU's NET_BUFSIZE: what a guest gives it beyond that, it drops itself
TAKEN_MAX = 65535  # passt's ETH_MAX_MTU
CHUNK = 1 << 18
# What passt of 2023 has of a frame's beginning when a read ends, it may lose, and take what the guest wrote in the middle of that
# frame for the next. So a frame must come to it at once. A send of so much is one buffer of the kernel's (`UNIX_SKB_FRAGS_SZ` in
# net/unix/af_unix.c), wholly queued or not at all; a longer frame, sent alone, is two of them: for the second passt waits.
RUN = 32768
SEND_BUFFER = 4 * RUN  # with less the kernel makes smaller pieces: half of it, and a few bytes less
# And it writes its answer by DHCP where the question was, however long it is: over the frames it has behind that, when they have
# been judged. So nothing of use is there: frames of no kind. An answer has 255 options at most, of 257 bytes.
SPACERS, SPACER = 3, 32000

Pieces = list[memoryview]


class Strainer:
    """Takes the guest's stream as it comes and gives what passes of it."""

    def __init__(self) -> None:
        self._rest = b""  # the beginning of a frame that has not come wholly

    def __call__(self, data: bytes) -> Pieces:
        """Whole frames that pass, as many in one piece as fit into a RUN. Raises ValueError for what no QEMU sends."""
        data = self._rest + data
        pieces: Pieces = []
        view = memoryview(data)
        begin = last = 0  # what waits to be a piece
        for at, end in self._frames(data):
            head = data[at + LENGTH : min(end, at + LENGTH + HEAD)]
            good = end - at - LENGTH <= TAKEN_MAX and passes(head)
            if not good or end - begin > RUN:
                pieces.append(view[begin:at])
                begin = at if good else end
            if good and asks_for_address(head):
                pieces += [view[begin:end], *[_spacer(head)] * SPACERS]
                begin = end
            last = end
        pieces.append(view[begin:last])
        self._rest = data[last:]
        return [piece for piece in pieces if piece]

    @staticmethod
    def _frames(data: bytes) -> Iterator[tuple[int, int]]:
        """Where each whole frame begins, with its length, and ends."""
        at = 0
        while len(data) >= at + LENGTH:
            length = int.from_bytes(data[at : at + LENGTH], "big")
            if length > SENT_MAX:
                raise ValueError(f"a frame of {length} bytes")
            end = at + LENGTH + length
            if end > len(data):
                break
            yield at, end
            at = end


def _spacer(head: bytes) -> memoryview:
    """From the same card: passt takes the address it has last seen for the guest's."""
    return memoryview(SPACER.to_bytes(LENGTH, "big") + head[:12] + bytes(SPACER - 12))


class Way:
    """One direction. It reads only when all it has read before is sent on, so it never holds more than a chunk."""

    def __init__(self, source: socket.socket, sink: socket.socket, strain: Callable[[bytes], Pieces]) -> None:
        self._source, self._sink, self._strain = source, sink, strain
        self._pieces: Pieces = []

    def waits_for(self) -> tuple[int, int]:
        """A descriptor, and what is to happen to it."""
        return (self._sink.fileno(), select.POLLOUT) if self._pieces else (self._source.fileno(), select.POLLIN)

    def go_on(self) -> None:
        """Do what was waited for. Raises EOFError when the source has ended, OSError, and what the strainer raises."""
        try:
            if not self._pieces:
                data = self._source.recv(CHUNK)
                if not data:
                    raise EOFError
                self._pieces = self._strain(data)
            while self._pieces:
                piece = self._pieces[0]
                sent = self._sink.send(piece)
                self._pieces[:1] = [piece[sent:]] if sent < len(piece) else []
        except BlockingIOError:
            return


def copy(qemu: socket.socket, passt: socket.socket) -> None:
    """Copy both ways until one of them has ended."""
    ways = (Way(qemu, passt, Strainer()), Way(passt, qemu, lambda data: [memoryview(data)]))
    poll = select.poll()
    while True:
        waits = [(way, *way.waits_for()) for way in ways]
        for fd in (qemu.fileno(), passt.fileno()):
            # Also with nothing to wait for: that it has hung up is told all the same.
            poll.register(fd, sum(event for _, awaited, event in waits if awaited == fd))
        happened = dict(poll.poll())
        if any(events & ~(select.POLLIN | select.POLLOUT) for events in happened.values()):
            return
        for way, fd, event in waits:
            if happened.get(fd, 0) & event:
                way.go_on()


def main(argv: list[str]) -> int:
    """Copy until one of the two has ended."""
    qemu, passt = socket.socket(fileno=QEMU), socket.socket(fileno=PASST)
    passt.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    if passt.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < SEND_BUFFER:
        return 1  # this host allows no such buffers, so a frame may come to passt in parts
    for sock in (qemu, passt):
        sock.setblocking(False)
    _shed()
    try:
        copy(qemu, passt)
    except (EOFError, OSError, ValueError):
        return 0
    return 0


def _shed() -> None:
    """Give away every right that copying does not need; all that it imports is there already."""
    os.closerange(PASST + 1, os.sysconf("SC_OPEN_MAX"))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    for limit, value in (
        (resource.RLIMIT_NOFILE, PASST + 1),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, MEMORY_MAX),
    ):
        _, hard = resource.getrlimit(limit)
        # A hard limit is never raised: whoever started us may have set a lower one.
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
