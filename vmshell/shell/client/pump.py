"""Bytes both ways between standard input and output and a socket (`connect`, `display`).

Neither way waits for the other: somebody who sends before they read must not stand still. What one side does not take, the
other is not asked for. An end of the input is passed on as such and the other way goes on; after the socket's end, what still
comes in is passed on until it is quiet, for its end can be one of two, and nobody can tell before they write.
Runs in: the shell. Touches descriptors 0 and 1, and the socket.
"""

from __future__ import annotations

import os
import select
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..ui.terminal import Terminal

BUFFER = 256 * 1024
LINGER = 0.5  # seconds of quiet after the socket's end
GONE = select.POLLERR | select.POLLHUP | select.POLLNVAL
# A guest whose plug was pulled sends nothing any more, not even an end: after two minutes without an answer that is one.
KEEPALIVE = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 7))


class Way:
    """One direction: reads when all that it had read is written."""

    def __init__(self, source: int, sink: int, change: Callable[[bytes], bytes] | None = None, first: bytes = b"") -> None:
        self._source = source
        self._sink = sink
        self._change = change
        self._buffer = memoryview(bytearray(BUFFER))
        self._left = memoryview(first)
        self.open = True

    def wants(self) -> tuple[int, int]:
        """The descriptor and the event that this way waits for."""
        return (self._sink, select.POLLOUT) if self._left else (self._source, select.POLLIN)

    def move(self) -> None:
        """Read if there is nothing to write, and write. At the end of its source it is no longer `open`."""
        try:
            if not self._left:
                count = os.readv(self._source, [self._buffer])
                self._left = self._buffer[:count]
                if not count:
                    self.open = False
                elif self._change is not None:
                    self._left = memoryview(self._change(bytes(self._left)))
            while self._left:
                self._left = self._left[os.write(self._sink, self._left) :]
        except BlockingIOError:
            pass


def run(terminal: Terminal, sock: socket.socket, first: bytes = b"") -> None:
    """Until the socket's other end closes. *first* goes into it before the input.

    Raises BrokenPipeError when nobody reads the output any more, another OSError when the connection broke.
    """
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    change = None
    if terminal.stdout_tty:
        # What a guest sends may not make a terminal type (E03); a pipe gets every byte.
        from ..console.terminal_filter import Filter

        escapes = Filter()
        change = escapes.feed
        terminal.hold_reset(escapes.reset)
    blocking = os.get_blocking(1)
    os.set_blocking(1, terminal.stdout_tty)  # a terminal is shared with whoever started us
    try:
        _both_ways(sock, Way(0, sock.fileno(), first=first), Way(sock.fileno(), 1, change), terminal)
    finally:
        os.set_blocking(1, blocking)


def _both_ways(sock: socket.socket, inwards: Way, outwards: Way, terminal: Terminal) -> None:
    while outwards.open or (inwards.open and not terminal.stdin_tty):
        wanted = {1: 0} if outwards.open else {}
        for way in (inwards, outwards):
            if way.open:
                fd, event = way.wants()
                wanted[fd] = wanted.get(fd, 0) | event
        ready = _poll(wanted, None if outwards.open else LINGER)
        if not ready and not outwards.open:
            return
        if ready.get(1, 0) & GONE:
            raise BrokenPipeError
        if inwards.open and inwards.wants()[0] in ready:
            _move_in(inwards, sock)
        if outwards.open and outwards.wants()[0] in ready:
            outwards.move()
            if not outwards.open and not terminal.stdout_tty:
                _close_output()


def _poll(wanted: dict[int, int], seconds: float | None) -> dict[int, int]:
    poll = select.poll()
    for fd, events in wanted.items():
        poll.register(fd, events)
    return dict(poll.poll(None if seconds is None else seconds * 1000))


def _move_in(inwards: Way, sock: socket.socket) -> None:
    try:
        inwards.move()
    except BrokenPipeError:
        inwards.open = False  # the guest reads no more; what it has said is still on its way
        return
    except OSError:
        # Standard input that cannot be read has ended (a terminal that hung up); a broken connection is another matter.
        if inwards.wants()[0] != 0:
            raise
        inwards.open = False
    if not inwards.open:
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has closed before


def _close_output() -> None:
    """The reader of our output learns of the end at once, though the input may go on."""
    os.set_blocking(1, True)
    null = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, 1)
    os.close(null)
