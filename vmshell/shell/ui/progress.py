"""What a request waits for, on stderr: after a second, redrawn on a terminal, else one line per ten seconds.

Runs in: the shell.
"""

from __future__ import annotations

import sys
from time import monotonic

from ...errors import safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .terminal import Terminal

PATIENCE = 1.0  # seconds before anything is said
PACE = 10.0  # seconds between lines where a line cannot be redrawn


class Progress:
    """One wait."""

    def __init__(self, terminal: Terminal) -> None:
        self._redraws = terminal.stderr_tty and not terminal.dumb
        self._width = terminal.size()[0] - 1 if self._redraws else 200
        self._start = monotonic()
        self._next = self._start + PATIENCE
        self._text = "waiting for the VM service"
        self._shown = False

    def update(self, text: str) -> None:
        """The broker says what it waits for."""
        self._text = safe(text, 200)
        self.tick()

    def tick(self) -> None:
        """Called about twice a second while nothing comes."""
        now = monotonic()
        if now < self._next:
            return
        line = f"{self._text} ({now - self._start:.0f} s)"
        if self._redraws:
            self._next = now + 0.5
            self._shown = True
            sys.stderr.write(f"\r{line[: self._width]}\x1b[K")
        else:
            self._next = now + PACE
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """The wait is over: leave no trace on a terminal."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
