"""The relay's event loop: epoll, timers, and one barrier around everything that is done for a peer.

A handler that raises ends its owner (one viewer, one VM, one connection) and nothing else. A descriptor that is closed and whose
number is given anew within one batch does not get its predecessor's event.
Runs in: the relay. Touches nothing but the epoll descriptor.
"""

from __future__ import annotations

import heapq
import select
import sys
from time import monotonic

from ..errors import safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Owner(Protocol):
        """Whose trouble an exception is."""

        def broken(self, exc: Exception) -> None:
            """Close what belongs to this owner; the exception has been reported."""


IN = select.EPOLLIN
OUT = select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR
PEER_CLOSED = select.EPOLLRDHUP

BATCH = 64  # events per round: with many peers ready, timers still run in between
REPORTS_PER_MINUTE = 30


class Timer:
    """One call in the future; `cancel` is enough to forget it."""

    __slots__ = ("call", "owner")

    def __init__(self, call: Callable[[], None], owner: Owner) -> None:
        self.call: Callable[[], None] | None = call
        self.owner: Owner | None = owner

    def cancel(self) -> None:
        # It stays in the heap until its time; what it belongs to need not.
        self.call = self.owner = None


class Entry:
    """What the loop knows about one descriptor."""

    __slots__ = ("handler", "mask", "owner", "since")

    def __init__(self, handler: Callable[[int], None], owner: Owner, since: int) -> None:
        self.handler = handler
        self.owner = owner
        self.since = since  # the round in which it was added
        self.mask = 0


class Loop:
    """`now` is the monotonic time at which the current round began; `typing_until` says that somebody waits for an echo."""

    def __init__(self) -> None:
        self.now = monotonic()
        self.typing_until = 0.0
        self.stopping = False
        self._epoll = select.epoll()
        self._table: dict[int, Entry] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._count = 0
        self._round = 0
        self._reports = 0
        self._reports_since = self.now

    # --- descriptors ---

    def add(self, fd: int, mask: int, handler: Callable[[int], None], owner: Owner) -> None:
        """Call *handler(events)* whenever *fd* has one of the events in *mask*; level-triggered."""
        self._table[fd] = Entry(handler, owner, self._round)
        self.want(fd, mask)

    def want(self, fd: int, mask: int) -> None:
        """Change what *fd* waits for. 0 takes it out of epoll altogether, so that a hang-up cannot spin."""
        entry = self._table[fd]
        if entry.mask == mask:
            return
        if not mask:
            self._epoll.unregister(fd)
        elif entry.mask:
            self._epoll.modify(fd, mask)
        else:
            self._epoll.register(fd, mask)
        entry.mask = mask

    def drop(self, fd: int) -> None:
        """Forget *fd*; must come before it is closed."""
        entry = self._table.pop(fd, None)
        if entry is not None and entry.mask:
            self._epoll.unregister(fd)

    # --- time ---

    def after(self, seconds: float, call: Callable[[], None], owner: Owner) -> Timer:
        """Call *call* once, *seconds* after this round began."""
        timer = Timer(call, owner)
        self._count += 1
        heapq.heappush(self._timers, (self.now + seconds, self._count, timer))
        return timer

    # --- the round ---

    def run(self) -> None:
        """Serve until `stopping` is set."""
        poll = self._epoll.poll
        table = self._table
        while not self.stopping:
            timeout = max(0.0, self._timers[0][0] - monotonic()) if self._timers else None
            batch = poll(timeout, BATCH)
            self.now = monotonic()
            self._round += 1
            for fd, events in batch:
                entry = table.get(fd)
                if entry is None or entry.since == self._round:
                    continue
                try:
                    entry.handler(events)
                except Exception as exc:
                    self.contain(entry.owner, exc)
            if self._timers and self._timers[0][0] <= self.now:
                self._fire()

    def contain(self, owner: Owner, exc: Exception) -> None:
        """Report *exc* and end its owner."""
        self.report(f"{type(owner).__name__}: {type(exc).__name__}: {exc}{_where(exc)}")
        try:
            owner.broken(exc)
        except Exception as again:
            self.report(f"{type(owner).__name__} could not be closed: {type(again).__name__}: {again}{_where(again)}")

    def report(self, text: str) -> None:
        """One escaped line on stderr, which is the service's journal; a bounded number of them a minute."""
        if self.now - self._reports_since > 60:
            self._reports, self._reports_since = 0, self.now
        self._reports += 1
        if self._reports > REPORTS_PER_MINUTE:
            return
        try:
            print(f"relay: {safe(text)}", file=sys.stderr, flush=True)
        except OSError:
            pass  # the journal is gone; nothing here depends on it

    def _fire(self) -> None:
        # Only what is due now: a timer set by a timer waits for the next round, so descriptors get their turn.
        due = []
        while self._timers and self._timers[0][0] <= self.now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            call, owner = timer.call, timer.owner
            if call is None or owner is None:
                continue
            timer.cancel()
            try:
                call()
            except Exception as exc:
                self.contain(owner, exc)


def _where(exc: Exception) -> str:
    frame = exc.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f" (line {frame.tb_lineno} of {frame.tb_frame.f_code.co_filename})" if frame is not None else ""
