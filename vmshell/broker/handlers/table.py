"""The shape of what answers requests. Runs in: the broker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from ...messages import Request

Handlers = Mapping[type[Request], Callable[..., None]]  # called with the call, the request and, for requests about one, its VM


class Answering(Protocol):
    """A part that answers some requests."""

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
