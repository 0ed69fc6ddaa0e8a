"""Taps as descriptors, and what makes them: tapnet's on an installed host, passt's streams in a session.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from ...errors import VmshellError

if TYPE_CHECKING:
    from ..vm.vm import Vm

Taps = dict[int, int]  # by the interface's index: a tap, or the stream that passt serves
Done = Callable[[VmshellError | None, Taps], None]


class Network(Protocol):
    """What a run needs of the network."""

    def attach(self, vm: Vm, done: Done) -> None:
        """Make the taps of *vm*'s next run. `done(error, taps)`; the taps are the taker's to close."""

    def add(self, vm: Vm, index: int, done: Done) -> None:
        """Make the tap of one more interface of a VM that runs."""

    def remove(self, vm: Vm, indexes: set[int]) -> None:
        """Take these interfaces' taps and their filter away."""

    def ended(self, vm: Vm) -> None:
        """Take away all taps of a run that has ended."""


def close(taps: Taps) -> None:
    """Close them, once: afterwards there are none."""
    while taps:
        os.close(taps.popitem()[1])
