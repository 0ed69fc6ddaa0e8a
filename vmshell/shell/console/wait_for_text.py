"""`boot --wait REGEX`: look at what the guest prints until it has printed that.

Runs in: the shell. Touches the console and, with --console, descriptor 1.
"""

from __future__ import annotations

import re
import signal
from time import monotonic

from ...errors import BadValue, safe
from ...refusals import RelayDown, TimedOut, VmStopped
from ..ui.terminal import write_all
from .notices import refusal
from .terminal_filter import Filter, plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

    from ..context import Context
    from .connection import Link

WINDOW = 8192  # characters of the guest's output that are searched: bounds what a hard pattern can cost
LAST_LINES = 5


class _Late(Exception):
    """The alarm went off."""


class Waiter:
    """Waits for one pattern. Made before the VM is booted, so that a bad pattern boots nothing."""

    def __init__(self, context: Context, vm: str, pattern: str, timeout: int, *, show: bool) -> None:
        try:
            self._regex = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise BadValue(field="--wait", value=safe(pattern, 60), rule=f"a regular expression ({safe(error, 100)})") from error
        self._context = context
        self._vm = vm
        self._pattern = pattern
        self._timeout = timeout
        self._show = show
        self._filter = Filter()
        self._window = ""

    def wait(self, link: Link) -> None:
        """Return when the pattern has matched; raises TimedOut or VmStopped. *link* stays open."""

        def late(number: int, frame: FrameType | None) -> None:
            raise _Late

        # An alarm, not a deadline between reads: it also ends a search that would take for ever, as Ctrl-C does
        # (the matching loop of `re` looks for signals).
        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, self._timeout)
        try:
            self._search(link)
        except _Late:
            self._explain()
            raise TimedOut(vm=self._vm, what=f"print {self._pattern}", seconds=self._timeout) from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def _search(self, link: Link) -> None:
        from ..ui.progress import Progress

        progress = Progress(self._context.terminal)
        progress.update(f"waiting for {self._vm} to print {safe(self._pattern, 60)}")
        started = monotonic()
        try:
            while True:
                if not link.wait(0.5):
                    if not self._show:
                        progress.tick()
                    continue
                tag, data, notice = link.receive()
                if tag == "end":
                    if refused := refusal(notice):
                        raise refused
                    self._explain()
                    reason = safe(notice.get("reason") or "it ended", 200)
                    raise VmStopped(vm=self._vm, problem=reason)
                if tag == "gone":
                    raise RelayDown()
                if tag == "data" and self._matches(data):
                    break
        finally:
            progress.clear()
        if not self._show:
            self._context.note(f"{self._vm} printed {safe(self._pattern, 60)} after {monotonic() - started:.1f} s")

    def _matches(self, data: bytes) -> bool:
        filtered = self._filter.feed(data)
        if self._show:
            write_all(1, filtered)
        self._window = (self._window + plain(filtered))[-2 * WINDOW :]
        found = self._regex.search(self._window) is not None
        self._window = self._window[-WINDOW:]
        return found

    def _explain(self) -> None:
        """A script's log shall hold what the guest said last."""
        lines = [line for line in self._window.split("\n") if line.strip()]
        if lines and not self._show:
            self._context.note(f"the last lines of {self._vm}:")
            for line in lines[-LAST_LINES:]:
                self._context.note(f"  {safe(line.strip(), 200)}")
