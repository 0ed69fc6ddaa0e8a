"""The broker's event loop: descriptors, timers, and a barrier so that one peer's error never ends the process.

Runs in: the broker. Single-threaded on purpose: between two callbacks nothing else changes, so no request sees half a state.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable

Callback = Callable[[], None]


class Timer:
    """A callback due at a time; `cancel()` may be called at any moment, also from the callback."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Callback) -> None:
        self.due = due
        self.action: Callback | None = action

    def cancel(self) -> None:
        self.action = None


class Loop:
    """`on_error` gets every exception that a callback let out (rule D26); the loop goes on."""

    def __init__(self, on_error: Callable[[BaseException], object]) -> None:
        # Not `selectors`: its layer over this costs a tenth of a request.
        self._epoll = select.epoll()
        self._actions: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._on_error = on_error
        self._running = False

    def watch(self, fd: int, action: Callback) -> None:
        """Call *action* whenever *fd* is readable (a pidfd: once its process has ended)."""
        self._epoll.register(fd, select.EPOLLIN)
        self._actions[fd] = action

    def watch_writing(self, fd: int, wanted: bool) -> None:
        """Call the action of *fd*, which is watched, also when it can be written to; or no longer."""
        self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT if wanted else select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop watching *fd*; must precede its closing. Harmless when it is not watched."""
        if self._actions.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # closed already, and with that forgotten by the kernel

    def after(self, seconds: float, action: Callback) -> Timer:
        """Call *action* once, *seconds* from now."""
        timer = Timer(time.monotonic() + seconds, action)
        heapq.heappush(self._timers, (timer.due, next(self._order), timer))
        return timer

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        self._running = True
        while self._running:
            for fd, action in [(fd, self._actions.get(fd)) for fd, _ in self._epoll.poll(self._wait())]:
                # An earlier callback of this round may have unwatched it; the number may even be someone else's by now.
                if action is not None and self._actions.get(fd) is action:
                    self._guard(action)
            self._fire()

    def _wait(self) -> float | None:
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _fire(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            action = heapq.heappop(self._timers)[2].action
            if action is not None:
                self._guard(action)

    def _guard(self, action: Callback) -> None:
        try:
            action()
        except Exception as exc:
            self._on_error(exc)
