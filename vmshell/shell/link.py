"""The shell's end of a console socket: packets of one tag byte and a payload (`relay/viewers.py` holds the other end).

    d + bytes    the guest's output; to the relay: keys
    n + JSON     a notice of the relay: hello, pen, refused, who, gap, state, end
    c + JSON     to the relay: {"do": "pen" | "who" | "break"}

Runs in: the shell.
"""

from __future__ import annotations

import json
import select
import socket
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Tag = Literal["data", "notice", "end", "gone", "nothing"]

PACKET_MAX = 64 * 1024 + 1
KEYS_MAX = 4096  # bytes of keys in one packet
QUEUE_MAX = 64  # packets waiting for the relay before the terminal is read no further


class Link:
    """Receives without blocking, sends as the relay takes it."""

    def __init__(self, fd: int) -> None:
        self.sock = socket.socket(fileno=fd)
        self.sock.setblocking(False)
        self._queue: deque[bytes] = deque()

    def fileno(self) -> int:
        return self.sock.fileno()

    def close(self) -> None:
        self.sock.close()

    def detach(self) -> None:
        """Forget the descriptor without closing it."""
        self.sock.detach()

    def wait(self, seconds: float) -> bool:
        """Whether something can be received within *seconds*."""
        return bool(select.select([self.sock], [], [], seconds)[0])

    def receive(self) -> tuple[Tag, bytes, dict[str, object]]:
        """One packet as (tag, bytes of data, notice). `gone`: the relay vanished without saying `end`."""
        try:
            packet = self.sock.recv(PACKET_MAX)
        except BlockingIOError:
            return "nothing", b"", {}
        except OSError:
            return "gone", b"", {}
        if not packet:
            return "gone", b"", {}
        if packet[:1] == b"d":
            return "data", packet[1:], {}
        try:
            notice = json.loads(packet[1:])
        except ValueError:
            notice = None
        if packet[:1] != b"n" or not isinstance(notice, dict):
            return "nothing", b"", {}
        return ("end" if notice.get("notice") == "end" else "notice"), b"", notice

    # --- sending -----------------------------------------------------------------------------------------------------

    def keys(self, data: bytes) -> None:
        for start in range(0, len(data), KEYS_MAX):
            self._queue.append(b"d" + data[start : start + KEYS_MAX])
        self.flush()

    def control(self, what: str) -> None:
        self._queue.append(b"c" + json.dumps({"do": what}).encode("ascii"))
        self.flush()

    @property
    def backlog(self) -> bool:
        return bool(self._queue)

    @property
    def full(self) -> bool:
        return len(self._queue) >= QUEUE_MAX

    def flush(self) -> None:
        """Send what the relay takes now; that it has vanished shows when receiving."""
        while self._queue:
            try:
                self.sock.send(self._queue[0], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self._queue.clear()
                return
            self._queue.popleft()
