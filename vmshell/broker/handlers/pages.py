"""Long lists in answers, cut to what a packet holds. Runs in: the broker."""

from __future__ import annotations

import json
from typing import TypeVar

T = TypeVar("T")
PAGE_ROWS = 100  # rows of a reply
PAGE_SHARE, LIST_SHARE = 60 << 10, 10 << 10  # bytes of a packet for a page, and for each long list beside other things


def fitting(rows: list[T], room: int) -> list[T]:
    """Return the first of *rows*, as many as take no more than *room* bytes of a packet."""
    shown = []
    for row in rows:
        room -= len(json.dumps(row)) + 1
        if room < 0:
            break
        shown.append(row)
    return shown
