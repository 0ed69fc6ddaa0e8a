"""How often each user may do something: so many times in a row, and then so many each second.

Runs in: the front. Touches nothing.
"""

from __future__ import annotations

from time import monotonic

FORGET_AT = 256  # users who are remembered before any are forgotten


class Rate:
    """Whoever has done nothing for as long as it takes to have all of it again is forgotten."""

    def __init__(self, in_a_row: int, each_second: float) -> None:
        self._most = in_a_row
        self._each_second = each_second
        self._left: dict[int, tuple[float, float]] = {}  # by user: how many, and when that was so
        self._forget_at = FORGET_AT

    def allows(self, uid: int) -> bool:
        """Count one more of *uid*'s, unless that is one too many."""
        now = monotonic()
        left, then = self._left.get(uid, (float(self._most), now))
        left = min(self._most, left + (now - then) * self._each_second)
        allowed = left >= 1
        self._left[uid] = (left - allowed, now)
        if len(self._left) > self._forget_at:
            whole = now - self._most / self._each_second
            self._left = {user: entry for user, entry in self._left.items() if entry[1] > whole}
            self._forget_at = max(FORGET_AT, 2 * len(self._left))
        return allowed
