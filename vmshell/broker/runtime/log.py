"""What the broker writes for the administrator: one JSON object per line on standard error (the journal, under systemd).

Everything a peer chose is inside a JSON string, so no name can forge a second line (A30, D25). Lines that a user causes are
limited per user, so that nobody can flood the journal (F14).
Runs in: the broker.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

from ...errors import safe

BURST = 60  # lines of one event that one user may cause at once
_PER_SECOND = 1.0  # and for ever
_NOBODY = -1  # whose share our own mistakes are written from
_STACK_MAX = 6000

_buckets: dict[tuple[int, str], tuple[float, float, int]] = {}  # by uid and event: lines left, when, lines dropped since


def note(event: str, **fields: object) -> None:
    """Write one line. A journal that cannot be written never stops the broker."""
    shown = {key: value if isinstance(value, int) else safe(value, _STACK_MAX) for key, value in fields.items()}
    try:
        sys.stderr.write(json.dumps({"event": event, **shown}) + "\n")
        sys.stderr.flush()
    except OSError:
        return


def by_user(uid: int, event: str, **fields: object) -> None:
    """Write a line that *uid* can cause at will, if its share is not used up; what was dropped is said with the next one."""
    now, left, dropped = _share(uid, event)
    if left < 1:
        _buckets[uid, event] = (left, now, dropped + 1)
        return
    _buckets[uid, event] = (left - 1, now, 0)
    note(event, uid=uid, **fields, **({"dropped": dropped} if dropped else {}))


def seldom(event: str, **fields: object) -> None:
    """Write a line of which many may come for one cause, if our own share of them is not used up."""
    by_user(_NOBODY, event, **fields)


def has_share(uid: int, event: str) -> bool:
    """May *uid* cause a line of *event* now? What must not be done without one is refused otherwise."""
    return _share(uid, event)[1] >= 1


def _share(uid: int, event: str) -> tuple[float, float, int]:
    """Now, the lines that are left, and those that were dropped."""
    now = time.monotonic()
    left, then, dropped = _buckets.get((uid, event), (float(BURST), now, 0))
    return now, min(BURST, left + (now - then) * _PER_SECOND), dropped


def unexpected(exc: BaseException) -> str:
    """Write an exception nobody foresaw, with its stack; returns the reference that the person gets instead of it."""
    reference = os.urandom(4).hex()
    stack = " | ".join(line.strip() for line in traceback.format_exception(exc))
    seldom("unexpected", reference=reference, stack=stack[-_STACK_MAX:])
    return reference
