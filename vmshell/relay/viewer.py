"""One attached shell: what it still has to get, and what it says. What travels on its two pipes is described in `consoles.py`.

Viewers are hostile: any program of the user's may hold the other ends, change the pipes' sizes, write anything, read nothing, or
read a byte at a time. What they cannot reach is our ends' own flags, so that no call here ever waits.
Runs in: the relay. Touches one viewer's pipes.
"""

from __future__ import annotations

import json
import os

from .. import encoding
from ..consoles import CELL, CONTROL, DATA, DATA_MAX, FRAME, NOTICE, frame, header, open_cells
from ..errors import ProtocolError
from .loop import GONE, IN, OUT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .viewers import Audience

    User = tuple[int, str]  # uid and label

PATIENCE = 0.2  # seconds
FLOOR = 1_000_000  # bytes a second; twice what a serial port under emulation can say
IDLE_CELLS_PER_SECOND = 1000  # controls, and keys without the pen: more than a person or a paste makes
LINGER = 5.0  # seconds a slow viewer has left to read the end

READ = 16 * CELL  # at once
_FULL = header(DATA, DATA_MAX)


class Viewer:
    """One attached shell: its keys come from the pipe *keys*, what the guest says goes into the pipe *output*."""

    __slots__ = (
        "audience", "blocked", "closed", "ending", "forfeit", "kept", "keys", "noise", "noise_since", "notices",
        "output", "patience", "paused", "position", "readonly", "refused_at", "rest", "since", "user",
    )  # fmt: skip

    def __init__(self, audience: Audience, keys: int, output: int, user: User, readonly: bool, position: int) -> None:
        self.audience = audience
        self.keys = keys
        self.output = output
        self.rest = b""  # of a cell that came in pieces
        self.user = user
        self.kept: tuple[str, str] = ("", "")  # the pipes' names in the service manager's descriptor store
        self.readonly = readonly
        self.position = position
        self.blocked = False  # its pipe is full; EPOLLOUT is awaited
        self.forfeit = False  # its patience is used up: nothing waits for it until it has caught up
        self.patience = PATIENCE
        self.since = 0.0  # since when reading from the VM waits for it, 0.0 when it does not
        self.paused = False  # the guest takes no more keys, so none are read
        self.notices: dict[str, bytes] = {}  # by kind, a later one in place of an earlier one: bounded by the kinds
        self.refused_at = -10.0
        self.noise = 0
        self.noise_since = 0.0
        self.ending = False
        self.closed = False

    @property
    def label(self) -> str:
        return self.user[1]

    # --- towards the viewer ---

    def tell(self, kind: str, **fields: object) -> None:
        """Send a notice as soon as the viewer takes it."""
        self.notices.pop(kind, None)
        self.notices[kind] = frame(NOTICE, json.dumps({"notice": kind, **fields}, separators=(",", ":")).encode("ascii"))
        if not self.blocked:
            self.pump()

    def pump(self) -> None:
        """Send what there is until the pipe is full."""
        ring = self.audience.ring
        try:
            while self.notices:
                kind, notice = next(iter(self.notices.items()))
                if kind == "end" and self.position < ring.head:
                    break
                os.write(self.output, notice)
                del self.notices[kind]
            lost = ring.start - self.position
            if lost > 0:
                self.position = ring.start
                self.notices["gap"] = frame(NOTICE, b'{"notice":"gap","bytes":%d}' % lost)
                os.write(self.output, self.notices["gap"])
                del self.notices["gap"]
            if self.position < ring.head:
                self._flow()
            if self.ending:
                if "end" in self.notices:
                    os.write(self.output, self.notices.pop("end"))
                self.close()
                return
        except BlockingIOError:
            self.block()
            return
        except OSError:
            self.close()
            return
        self.forfeit = False
        if self.blocked:
            self.blocked = False
            self.audience.unblocked()
            self.listen()

    def _flow(self) -> None:
        """Send the guest's bytes; raises BlockingIOError when the pipe is full.

        A frame that is a page, or ends within one, a pipe takes whole or not at all; so it does with each of several pages.
        """
        left = self.audience.ring.head - self.position
        full, rest = divmod(left, DATA_MAX)
        last = self.audience.ring.piece(self.position, left)
        if full:
            pages, last = _cut(last)
            sent, over = divmod(os.writev(self.output, pages), FRAME)
            if over:
                raise OSError("the pipe took half a frame")
            self._took(sent * DATA_MAX)
            if sent < full:
                raise BlockingIOError
        if rest:
            os.writev(self.output, [header(DATA, rest), *last])
            self._took(rest)

    def _took(self, size: int) -> None:
        """Count *size* bytes as sent, and as patience earned."""
        self.position += size
        if self.patience < PATIENCE:
            self.patience = min(PATIENCE, self.patience + size / FLOOR)

    def block(self) -> None:
        if not self.blocked:
            self.blocked = True
            self.audience.blocked += 1
            self.listen()

    def listen(self) -> None:
        loop = self.audience.loop
        loop.want(self.keys, GONE if self.paused or self.ending else IN)
        loop.want(self.output, GONE | OUT if self.blocked else GONE)

    # --- from the viewer ---

    def on_output(self, events: int) -> None:
        if events & GONE:
            self.close()
        elif self.blocked:
            self.pump()
            self.audience.host.review()

    def on_keys(self, events: int) -> None:
        if events & IN:
            self.read()
        elif events & GONE:
            self.close()

    def read(self) -> None:
        """Take a few cells; the next ones wait their turn behind the other peers."""
        try:
            data = os.read(self.keys, READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self.rest:
            data = self.rest + data
        whole = len(data) - len(data) % CELL
        self.rest = data[whole:]
        try:
            for tag, payload in open_cells(data[:whole]):
                self._take(tag, payload)
                if self.closed:
                    return
        except ProtocolError:
            self.close()

    def _take(self, tag: bytes, payload: bytes) -> None:
        if tag == DATA and payload:
            self.audience.keys(self, payload)
        elif self.noisy():
            return
        elif tag == CONTROL:
            try:
                what = encoding.decode(payload).get("do")
            except ProtocolError:
                return
            self.audience.control(self, what)

    def noisy(self) -> bool:
        """Count a cell that leads to nothing; True when there were so many that the viewer has been closed."""
        now = self.audience.loop.now
        if now - self.noise_since >= 1.0:
            self.noise, self.noise_since = 0, now
        self.noise += 1
        if self.noise <= IDLE_CELLS_PER_SECOND:
            return False
        self.close()
        return True

    def refuse(self, why: str) -> None:
        """Say why keys or a control led to nothing, at most once a second."""
        now = self.audience.loop.now
        if now - self.refused_at >= 1.0:
            self.refused_at = now
            self.tell("refused", why=why)

    # --- the end ---

    def end(self, reason: str) -> None:
        """Say goodbye once everything before it has been read, and wait for that only a while."""
        self.ending = True
        self.tell("end", reason=reason)
        if not self.closed:
            self.listen()
            self.audience.loop.after(LINGER, self.close, self)

    def cut_off(self, code: str, reason: str) -> None:
        """End at once: what it has not read yet it may no longer see. The reason is told if there is room for it."""
        self.ending = True
        self.position = self.audience.ring.head
        self.notices.clear()
        self.tell("end", reason=reason, code=code)
        if self.blocked:
            self.pump()  # it may have read meanwhile
        self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for fd in (self.keys, self.output):
            self.audience.loop.drop(fd)
            os.close(fd)
        for name in self.kept:
            # As long as the service manager holds a copy, the other end sees no end.
            self.audience.service.remove(name)
        if self.blocked:
            self.blocked = False
            self.audience.unblocked()
        self.audience.left(self)

    def broken(self, exc: Exception) -> None:
        self.close()


def _cut(views: list[memoryview]) -> tuple[list[bytes | memoryview], list[memoryview]]:
    """Cut *views* into full frames, each with its header, and what remains."""
    frames: list[bytes | memoryview] = []
    begun: list[memoryview] = []
    room = DATA_MAX
    for view in views:
        while view:
            piece, view = view[:room], view[room:]
            begun.append(piece)
            room -= len(piece)
            if not room:
                frames += _FULL, *begun
                begun, room = [], DATA_MAX
    return frames, begun
