"""How often a user may ask for what others pay for: so many a minute of each kind, at once or one after the other.

A VM that is made or removed, a boot, a console and a connection cost jobs, files, processes and the packet filter, whose work
everybody waits for. What only looks costs its asker's own turn on the loop. Which request counts as what: `dispatch.RATES`.
Runs in: the broker.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...model.policy import Effective
from ...refusals import TooFast
from ..runtime.call import Peer

MINUTE = 60.0  # seconds
FORGET_AT = 64  # users and rates that are remembered before any are forgotten


@dataclass(frozen=True)
class Rate:
    """*key*: the limit in the policy, 0 being none. *what*: what it counts, as a refusal calls it."""

    key: str
    what: str


CHANGES = Rate("changes_per_minute", "changes")
BOOTS = Rate("boots_per_minute", "boots")
CONSOLES = Rate("consoles_per_minute", "consoles")
CONNECTIONS = Rate("connections_per_minute", "connections")


class Rates:
    """Each user has a limit's worth of each rate, and gets that much anew every minute. Administrators are not counted.

    `effective` says what holds for a user. Whoever has asked for nothing for a minute is forgotten, for then all of it is there
    again: there are never many more entries than users who asked lately, each with every rate.
    """

    def __init__(self, effective: Callable[[str], Effective]) -> None:
        self._effective = effective
        self._left: dict[tuple[int, str], tuple[float, float]] = {}  # by uid and key: how many, and at what time
        self._forget_at = FORGET_AT

    def take(self, peer: Peer, rate: Rate) -> None:
        """Count one of *rate*, or raise TooFast."""
        effective = self._effective(peer.user)
        limit: int = getattr(effective.limits, rate.key)
        if peer.admin or not limit:
            return
        now = time.monotonic()
        left, then = self._left.get((peer.uid, rate.key), (float(limit), now))
        left = min(limit, left + (now - then) * limit / MINUTE)
        if left < 1:
            seconds = math.ceil((1 - left) * MINUTE / limit)
            raise TooFast(limit=limit, what=rate.what, rule=rate.key, section=effective.section(rate.key), seconds=seconds)
        self._left[peer.uid, rate.key] = (left - 1, now)
        if len(self._left) > self._forget_at:
            self._forget(now)

    def _forget(self, now: float) -> None:
        self._left = {key: entry for key, entry in self._left.items() if now - entry[1] < MINUTE}
        self._forget_at = max(FORGET_AT, 2 * len(self._left))
