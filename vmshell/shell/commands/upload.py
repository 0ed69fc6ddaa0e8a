"""`put`: standard input on its way into a storage job, and how far it has come.

The bytes go through a pipe as they are. Its end says nothing: only `done`, with what `send` returns, makes them a file.
Runs in: the shell. Touches descriptor 0, the job's pipe and descriptor 2.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from time import monotonic

from ...names import format_size
from ...refusals import Usage
from ..ui.output import duration
from ..ui.terminal import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..ui.terminal import Terminal

READ = 256 << 10

PATIENCE = 1.0  # seconds before anything is said: most files are there by then
REDRAW = 0.5
PACE = 10.0  # seconds between lines where neither the line can be redrawn nor the end is known
TENTH = 10  # per cent between lines where it is known
BAR = 20


def check_stdin(terminal: Terminal, name: str) -> None:
    """Raises Usage when somebody sits at standard input; *name* is what they would put. Before the broker is asked."""
    if terminal.stdin_tty:
        raise Usage(problem="put reads the file from standard input", usage=f"ssh HOST put {name} < FILE")


def size_of(stdin: int) -> int | None:
    """How many bytes will come from *stdin*, if that can be known."""
    status = os.fstat(stdin)
    if not stat.S_ISREG(status.st_mode):
        return None
    return max(0, status.st_size - os.lseek(stdin, 0, os.SEEK_CUR))


def send(pipe: int, stdin: int, progress: Callable[[int], None]) -> tuple[int, str]:
    """Send all of *stdin* to the job; return how many bytes were sent, and their SHA-256.

    Returns early when the job wants no more of it: the broker's answer says why. Raises Usage when *stdin* cannot be read.
    """
    import hashlib

    digest = hashlib.sha256()
    poll = select.poll()
    poll.register(stdin, select.POLLIN)
    poll.register(pipe, 0)  # that the job has hung up is told unasked
    sent = 0
    while True:
        events = dict(poll.poll(int(REDRAW * 1000)))
        if pipe in events:
            break
        if stdin in events:
            data = _read(stdin)
            if data == b"":
                break
            if data is not None:
                try:
                    write_all(pipe, data)
                except BrokenPipeError:
                    break
                digest.update(data)
                sent += len(data)
        progress(sent)
    return sent, digest.hexdigest()


def _read(stdin: int) -> bytes | None:
    try:
        return os.read(stdin, READ)
    except BlockingIOError:
        return None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise Usage(problem=f"standard input cannot be read ({reason})", usage="ssh HOST put NAME < FILE") from error


class Meter:
    """How far it has come, on stderr: a bar on a terminal, else a line per tenth, or per ten seconds if the end is unknown."""

    def __init__(self, terminal: Terminal, total: int | None) -> None:
        self._redraws = terminal.stderr_tty and not terminal.dumb
        self._width = terminal.size()[0] - 1 if self._redraws else 200
        self._total = total
        self._start = monotonic()
        self._next = self._start + PATIENCE
        self._tenth = 0
        self._shown = False

    def __call__(self, sent: int) -> None:
        """*sent* bytes have gone."""
        now = monotonic()
        if now < self._next or not self._worth_a_line(sent):
            return
        text = self._text(sent, now - self._start)
        if self._redraws:
            self._next = now + REDRAW
            self._shown = True
            sys.stderr.write(f"\r{text[: self._width]}\x1b[K")
        else:
            self._next = now + (PACE if self._total is None else 0)
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """It is over: leave no trace on a terminal."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _worth_a_line(self, sent: int) -> bool:
        if self._redraws or self._total is None:
            return True
        tenth = self._percent(sent) // TENTH
        news = tenth > self._tenth
        self._tenth = max(tenth, self._tenth)
        return news

    def _percent(self, sent: int) -> int:
        # A file may grow while it is read.
        return min(100, sent * 100 // self._total) if self._total else 0

    def _text(self, sent: int, elapsed: float) -> str:
        rate = sent / elapsed
        pace = f"{format_size(int(rate))}/s"
        if self._total is None:
            return f"{format_size(sent)} sent, {pace}"
        percent = self._percent(sent)
        text = f"{percent} %, {format_size(sent)} of {format_size(self._total)}, {pace}"
        if sent and sent < self._total:
            text += f", {duration(int((self._total - sent) / rate) + 1)} left"
        if self._redraws:
            text = f"[{'#' * (percent * BAR // 100):{BAR}}] {text}"
        return text
