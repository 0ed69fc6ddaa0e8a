"""What the broker hears about one VM: words of `messages.WORDS`, at a bounded rate however often QEMU repeats itself.

A burst goes out at once (a boot waits for these words). After that, words wait for their turn together: they keep their
order, and saying a waiting word again moves it to the end, so there is a bounded number of them and the last one said is
the last one heard.
Runs in: the relay. Touches the broker's connection only.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop, Timer

BURST = 20
PER_SECOND = 10
INTERVAL = 0.2


class Words:
    """Hands words to *send(word, count)*."""

    __slots__ = ("_loop", "_send", "_since", "_timer", "_tokens", "_waiting")

    def __init__(self, loop: Loop, send: Callable[[str, int], None]) -> None:
        self._loop = loop
        self._send = send
        self._tokens = float(BURST)
        self._since = loop.now
        self._waiting: dict[str, int] = {}
        self._timer: Timer | None = None

    def say(self, word: str, count: int = 0) -> None:
        now = self._loop.now
        self._tokens = min(BURST, self._tokens + (now - self._since) * PER_SECOND)
        self._since = now
        if self._timer is None and self._tokens >= 1:
            self._tokens -= 1
            self._send(word, count)
            return
        self._waiting.pop(word, None)
        self._waiting[word] = count
        if self._timer is None:
            self._timer = self._loop.after(INTERVAL, self.flush, self)

    def flush(self) -> None:
        """Say now what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, {}
        for word, count in waiting.items():
            self._send(word, count)

    def broken(self, exc: Exception) -> None:
        """A word that could not be said is lost; the next Watch brings the state again."""
