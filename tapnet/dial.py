"""TCP connections to guests, made here because the host's own filter lets only us and root through to everybody's.

Runs in: tapnet.
"""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Callable
from time import monotonic

from vmshell.errors import NotConnected
from vmshell.messages import Dial

from .network import Answer

SECONDS = 5.0
AT_ONCE = 256


class _Attempt:
    def __init__(self, ident: int, wanted: Dial) -> None:
        self.ident = ident
        self.wanted = wanted
        self.until = monotonic() + SECONDS
        self.sock = socket.socket(socket.AF_INET6 if ":" in wanted.address else socket.AF_INET, socket.SOCK_STREAM)
        self.sock.setblocking(False)


class Dials:
    """The connections being made. *answer(ident, Answer)* is called once for each, perhaps before `start` returns."""

    def __init__(self, selector: selectors.BaseSelector, answer: Callable[[int, Answer], None]) -> None:
        self.waiting: list[_Attempt] = []
        self._selector = selector
        self._answer = answer

    def start(self, ident: int, wanted: Dial, known: bool) -> None:
        """Connect; *known* says that the address is a card's. Nothing else is ever dialled."""
        problem = "" if known else "no card has this address"
        if len(self.waiting) >= AT_ONCE:
            problem = "too many connections are being made just now"
        if problem:
            self._answer(ident, Answer(NotConnected(vm=wanted.address, problem=problem)))
            return
        attempt = _Attempt(ident, wanted)
        self.waiting.append(attempt)
        self._selector.register(attempt.sock, selectors.EVENT_WRITE, lambda: self._on_event(attempt))
        try:
            attempt.sock.connect((wanted.address, wanted.port))
        except BlockingIOError:
            pass
        except OSError as error:
            self._done(attempt, error.strerror or str(error))

    def expire(self) -> None:
        """Give up on those that have had their time."""
        now = monotonic()
        for attempt in [attempt for attempt in self.waiting if attempt.until <= now]:
            self._done(attempt, f"no answer within {SECONDS:.0f} seconds")

    def clear(self) -> None:
        """Nobody waits for them any more."""
        for attempt in list(self.waiting):
            self._forget(attempt)

    def _on_event(self, attempt: _Attempt) -> None:
        code = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._done(attempt, os.strerror(code) if code else "")

    def _done(self, attempt: _Attempt, problem: str) -> None:
        attempt.sock.setblocking(True)
        fd = -1 if problem else os.dup(attempt.sock.fileno())
        self._forget(attempt)
        error = NotConnected(vm=attempt.wanted.address, problem=problem) if problem else None
        self._answer(attempt.ident, Answer(error, fd))

    def _forget(self, attempt: _Attempt) -> None:
        self.waiting.remove(attempt)
        self._selector.unregister(attempt.sock)
        attempt.sock.close()
