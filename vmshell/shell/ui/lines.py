"""Reading requests without a line editor: a dumb terminal, or no terminal at all.

Reads single bytes where there is no terminal: what follows the line may be meant for a console.
Runs in: the shell. Touches descriptors 0 and 1.
"""

from __future__ import annotations

import os

from ..cli.grammar import LINE_MAX
from .terminal import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..context import Context


class PlainEditor:
    """The terminal's own line editing, or a pipe. Same calls as `prompt.Editor`."""

    def __init__(self, context: Context, prompt: str) -> None:
        self._context = context
        self._prompt = prompt
        self._given_back = b""

    def read(self) -> str:
        """One line. Raises EOFError at the end of the input and KeyboardInterrupt on Ctrl-C."""
        terminal, signals = self._context.terminal, self._context.signals
        if terminal.stdin_tty:
            terminal.cooked()
            write_all(1, self._prompt.encode("ascii"))
        interruptible, signals.interruptible = signals.interruptible, True
        try:
            return self._line().decode("utf-8", "surrogateescape")
        finally:
            signals.interruptible = interruptible

    def _line(self) -> bytes:
        line = bytearray()
        while True:
            data = self._given_back[:1] or os.read(0, LINE_MAX if self._context.terminal.stdin_tty else 1)
            self._given_back = self._given_back[1:]
            if not data and not line:
                raise EOFError
            # One byte more than allowed is kept: the grammar refuses the line by its length.
            line += data[: LINE_MAX + 1 - len(line)]
            if not data or data.endswith((b"\n", b"\r")):
                return bytes(line).rstrip(b"\r\n")

    def take_typed_ahead(self) -> bytes:
        data, self._given_back = self._given_back, b""
        return data

    def give_back(self, data: bytes) -> None:
        self._given_back += data
