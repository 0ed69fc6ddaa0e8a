"""The shell's ends of a console's two pipes: frames come, keys and controls go (see `consoles.py`; the relay has the other ends).

Runs in: the shell.
"""

from __future__ import annotations

import json
import os
import select
from collections import deque

from ...consoles import CONTROL, DATA, NOTICE, Frames, cells
from ...errors import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    from ...messages import Request
    from ..context import Context

    Tag = Literal["data", "notice", "end", "gone", "nothing"]
    Item = tuple[Tag, bytes, dict[str, object]]

PIPES = 2  # that come beside an answer: to read from, and for keys
READ = 64 * 1024
WRITE = 4096  # PIPE_BUF: a pipe takes so much whole or not at all
QUEUE_MAX = 256 * 1024  # bytes waiting for the relay before the terminal is read no further


def ask_console(context: Context, request: Request) -> tuple[dict[str, object], Link]:
    """Send *request*; return its answer and the console that comes with it."""
    answer, pipes = context.ask_fds(request, PIPES)
    return answer, Link(*pipes)


class Link:
    """Receives without blocking, sends as the relay takes it. Closes both descriptors."""

    def __init__(self, output: int, keys: int) -> None:
        self._output = output
        self._keys = keys
        self._frames = Frames()
        self._items: deque[Item] = deque()
        self._queue = bytearray()
        for fd in (output, keys):
            os.set_blocking(fd, False)

    def wants(self) -> dict[int, int]:
        """What to poll for, by descriptor."""
        return {self._output: select.POLLIN, **({self._keys: select.POLLOUT} if self._queue else {})}

    @property
    def waiting(self) -> bool:
        """Has something been read that `receive` has not given out yet?"""
        return bool(self._items)

    def close(self) -> None:
        for fd in (self._output, self._keys):
            os.close(fd)

    def wait(self, seconds: float) -> bool:
        """Whether something can be received within *seconds*."""
        return self.waiting or bool(select.select([self._output], [], [], seconds)[0])

    def receive(self) -> Item:
        """What came next, as (tag, bytes of data, notice). `gone`: the relay vanished without saying `end`."""
        if not self._items:
            self._read()
        return self._items.popleft() if self._items else ("nothing", b"", {})

    def _read(self) -> None:
        try:
            data = os.read(self._output, READ)
            frames = self._frames.feed(data)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            data, frames = b"", []
        shown: list[bytes] = []
        for tag, payload in frames:
            if tag == DATA:
                shown.append(payload)
            elif tag == NOTICE and (notice := _notice(payload)) is not None:
                self._show(shown)
                self._items.append(("end" if notice.get("notice") == "end" else "notice", b"", notice))
        self._show(shown)
        if not data:
            self._items.append(("gone", b"", {}))

    def _show(self, parts: list[bytes]) -> None:
        if parts:
            self._items.append(("data", b"".join(parts), {}))
            parts.clear()

    # --- sending -----------------------------------------------------------------------------------------------------

    def keys(self, data: bytes) -> None:
        self._queue += cells(DATA, data)
        self.flush()

    def control(self, what: str) -> None:
        self._queue += cells(CONTROL, json.dumps({"do": what}).encode("ascii"))
        self.flush()

    @property
    def full(self) -> bool:
        return len(self._queue) >= QUEUE_MAX

    def flush(self) -> None:
        """Send what the relay takes now; that it has vanished shows when receiving."""
        while self._queue:
            try:
                sent = os.write(self._keys, self._queue[:WRITE])
            except BlockingIOError:
                return
            except OSError:
                self._queue.clear()
                return
            del self._queue[:sent]


def _notice(payload: bytes) -> dict[str, object] | None:
    try:
        notice = json.loads(payload)
    except ValueError:
        return None
    return notice if isinstance(notice, dict) else None
