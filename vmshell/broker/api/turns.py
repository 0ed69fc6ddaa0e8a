"""Whose request is next on the loop, of those that take it long: one of each user in a turn of the loop, whatever else waits.

Making a VM waits for the disk several times over. A user who asks for it on every connection at once would make everybody wait
for all of them; so others wait for one at most, and their own requests are read in between.
Runs in: the broker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ..runtime.loop import Loop


class Turns:
    """What waits is bounded by the calls that a connection may have open and the connections of a user."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: dict[int, deque[Callable[[], None]]] = {}  # by uid

    def enter(self, uid: int, action: Callable[[], None]) -> None:
        """Call *action*, which must not raise, at the end of this turn of the loop, or of the first one that *uid* has free."""
        if not self._waiting:
            self._loop.after(0, self._turn)
        self._waiting.setdefault(uid, deque()).append(action)

    def _turn(self) -> None:
        actions = [waiting.popleft() for waiting in self._waiting.values()]
        self._waiting = {uid: waiting for uid, waiting in self._waiting.items() if waiting}
        if self._waiting:
            self._loop.after(0, self._turn)
        for action in actions:
            action()
