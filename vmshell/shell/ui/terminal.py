"""The person's terminal: its modes, its size, whether it has colours, and how to give it back as it was found.

Runs in: the shell. Touches descriptors 0, 1 and 2 only.
"""

from __future__ import annotations

import os
import select
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Terminal:
    """What stands at descriptors 0, 1 and 2, and the modes it had when we came."""

    def __init__(self) -> None:
        self.stdin_tty = os.isatty(0)
        self.stdout_tty = os.isatty(1)
        self.stderr_tty = os.isatty(2)
        self.kind = os.environ.get("TERM", "dumb")
        self.dumb = self.kind == "dumb"
        self.colour = self.stdout_tty and not self.dumb and "NO_COLOR" not in os.environ
        self._found: list[object] | None = None
        self._reset: Callable[[], bytes] | None = None
        if self.stdin_tty:
            try:
                self._found = termios.tcgetattr(0)
            except termios.error:
                self.stdin_tty = False

    def columns(self) -> int:
        """Width to fit tables into; 0 (no limit) when the answer does not go to a terminal."""
        if not self.stdout_tty:
            return 0
        return self.size()[0]

    def size(self) -> tuple[int, int]:
        """Columns and rows: of the terminal, else what COLUMNS and LINES say, else 80 by 24."""
        for number in (0, 1, 2):
            try:
                columns, rows = os.get_terminal_size(number)
            except OSError:
                continue
            if columns > 0 and rows > 0:
                return columns, rows
        return int(os.environ.get("COLUMNS", "80")) or 80, int(os.environ.get("LINES", "24")) or 24

    # --- modes. Always TCSADRAIN or TCSANOW: flushing would lose keys typed ahead ------------------------------------

    def raw(self) -> None:
        """Every key comes as it is typed, nothing is echoed, nothing makes a signal; output is translated as before."""
        self._set(signals=False, lines=False, echo=False, translate=False)

    def raw_both_ways(self) -> None:
        """As `raw`, and the guest's bytes go out untouched too."""
        self._set(signals=False, lines=False, echo=False, translate=False, output=False)

    def quiet(self) -> None:
        """While a command runs: Ctrl-C interrupts it, other keys wait unseen for the next prompt."""
        self._set(signals=True, lines=False, echo=False, translate=True)

    def cooked(self) -> None:
        """The modes we found."""
        if self._found is not None:
            _apply(self._found)

    def hold_reset(self, reset: Callable[[], bytes]) -> None:
        """What `restore` shall write first, whenever it is called."""
        self._reset = reset

    def restore(self) -> None:
        """Give the terminal back as it was found. Never raises and never blocks: it may be gone, or stopped."""
        reset, self._reset = self._reset, None
        if reset is not None and self.stdout_tty:
            try:
                if select.select([], [1], [], 0)[1]:
                    os.write(1, reset())
            except OSError:
                pass
        self.cooked()

    def discard_keys(self) -> None:
        """Throw away what was typed so far: used where a wrong key would do harm."""
        try:
            termios.tcflush(0, termios.TCIFLUSH)
        except termios.error:
            pass

    def drain_answers(self) -> None:
        """Read and forget what the terminal types by itself, until it has been quiet for a tenth of a second."""
        for _ in range(20):
            if not select.select([0], [], [], 0.1)[0]:
                return
            self.discard_keys()

    def _set(self, *, signals: bool, lines: bool, echo: bool, translate: bool, output: bool = True) -> None:
        if self._found is None:
            return
        iflag, oflag, cflag, lflag, ispeed, ospeed, cc = list(self._found)
        assert isinstance(iflag, int) and isinstance(oflag, int) and isinstance(lflag, int) and isinstance(cc, list)
        if not signals:
            lflag &= ~(termios.ISIG | termios.IEXTEN)
            iflag &= ~(termios.IXON | termios.IXOFF | termios.IXANY)
        if not lines:
            lflag &= ~termios.ICANON
            cc = list(cc)
            cc[termios.VMIN], cc[termios.VTIME] = 1, 0
        if not echo:
            lflag &= ~(termios.ECHO | termios.ECHONL)
        if not translate:
            iflag &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP)
        if not output:
            oflag &= ~termios.OPOST
        _apply([iflag, oflag, cflag, lflag, ispeed, ospeed, cc])


def _apply(modes: list[object]) -> None:
    try:
        termios.tcsetattr(0, termios.TCSANOW, modes)  # type: ignore[arg-type]
    except termios.error:
        pass  # hung up: nothing to restore any more


def write_all(number: int, data: bytes) -> None:
    """Write all of *data*; raises OSError when the other side is gone."""
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]
