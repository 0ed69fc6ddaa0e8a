"""The people attached to one console: what each still has to get, who may type, and what they tell each other.

A console socket is one end of a SOCK_SEQPACKET pair; a packet is one tag byte and at most 64 KiB:

    viewer → relay   `d` keys               `c` {"do": "pen" | "who" | "break"}
    relay → viewer   `d` the guest's bytes   `n` {"notice": "hello" | "pen" | "refused" | "who" | "gap" | "state" | "end", …}

A viewer's queue is its position in the ring (see `ring.py`): it costs no memory, and being slow costs the viewer its bytes, not
the VM its time. How long the VM is held back for a slow viewer is `PATIENCE`, earned again only by reading on: someone
who takes a packet now and then cannot slow a VM below `FLOOR` bytes a second.
Runs in: the relay. Touches the viewers' sockets.
"""

from __future__ import annotations

import socket

from ..errors import ProtocolError
from ..refusals import TooManyRequests
from .loop import IN
from .viewer import DATA, FLOOR, PATIENCE, Viewer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .loop import Loop, Timer
    from .ring import Ring
    from .service import Service

    class Host(Protocol):
        """The console they are attached to."""

        def type(self, keys: bytes) -> bool: ...
        def send_break(self) -> None: ...
        def review(self) -> None: ...
        def viewers_changed(self, count: int) -> None: ...
        def describe(self) -> dict[str, object]: ...


VIEWERS_MAX = 64
SEND_BUFFER = 208 * 1024
LABEL_KEPT = 90  # bytes of a label that survive our restart: a name in the store has 255 characters


class Pen:
    """Who may type: the first writable viewer, then whoever takes it, then whoever has been there longest."""

    __slots__ = ("holder",)

    def __init__(self) -> None:
        self.holder: Viewer | None = None

    def joined(self, viewer: Viewer) -> None:
        if self.holder is None and not viewer.readonly:
            self.holder = viewer

    def left(self, viewer: Viewer, others: list[Viewer]) -> bool:
        """*viewer* has gone, *others* remain, oldest first; True when the pen went to someone else or to nobody."""
        if self.holder is not viewer:
            return False
        self.holder = next((other for other in others if not other.readonly), None)
        return True

    def take(self, viewer: Viewer) -> bool:
        """Give the pen to *viewer* unless it only reads."""
        if not viewer.readonly:
            self.holder = viewer
        return self.holder is viewer


class Audience:
    """All viewers of one console, in the order in which they came; their sockets survive our restart as *prefix*`-…`."""

    def __init__(self, loop: Loop, ring: Ring, host: Host, service: Service, prefix: str) -> None:
        self.loop = loop
        self.ring = ring
        self.host = host
        self.service = service
        self._prefix = prefix
        self._count = 0
        self.viewers: list[Viewer] = []
        self.pen = Pen()
        self.blocked = 0  # how many of them cannot take more just now
        self._timer: Timer | None = None

    # --- coming and going ---

    def attach(self, fd: int, label: str, readonly: bool, replay: bool) -> None:
        """Take the descriptor *fd* (its closing is ours from here on) as a viewer; raises OSError or VmshellError."""
        sock = socket.socket(fileno=fd)
        try:
            if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
                raise ProtocolError(problem="a console needs a SOCK_SEQPACKET socket")
            if len(self.viewers) >= VIEWERS_MAX:
                raise TooManyRequests(count=VIEWERS_MAX, what="consoles of this VM", limit=VIEWERS_MAX)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        except BaseException:
            sock.close()
            raise
        viewer = self._add(sock, label, readonly, self.ring.start if replay else self.ring.head)
        viewer.tell("hello", **self._pen_fields(viewer), viewers=len(self.viewers), **self.host.describe())
        if not viewer.closed:
            self.host.viewers_changed(len(self.viewers))

    def restore(self, kept: list[tuple[str, socket.socket]]) -> None:
        """Go on with the viewers whose sockets survived our restart, by the names they were kept under."""
        # In the order in which they came; so a name given anew is never one that is still to be read.
        for name, sock in sorted(kept, key=lambda item: _from_store(item[0])[0]):
            sock.setblocking(False)
            self.service.remove(name)
            _, label, readonly = _from_store(name)
            self._add(sock, label, readonly, self.ring.head)
        self._pen_moved()

    def _add(self, sock: socket.socket, label: str, readonly: bool, position: int) -> Viewer:
        self._count += 1
        viewer = Viewer(self, sock, label, readonly, position)
        viewer.kept = f"{self._prefix}-{self._count}-{'r' if readonly else 'w'}-{label.encode()[:LABEL_KEPT].hex()}"
        self.service.store(viewer.kept, viewer.fd)
        self.viewers.append(viewer)
        self.pen.joined(viewer)
        self.loop.add(viewer.fd, IN, viewer.on_event, viewer)
        return viewer

    def left(self, viewer: Viewer) -> None:
        if viewer in self.viewers:
            self.viewers.remove(viewer)
            if self.pen.left(viewer, self.viewers):
                self._pen_moved()
            self.host.viewers_changed(len(self.viewers))
            self.host.review()

    def end(self, reason: str) -> None:
        """Tell everyone that this was all, and close; slow ones get `LINGER` seconds."""
        self._stop_clock()
        viewers, self.viewers = self.viewers, []
        for viewer in viewers:
            viewer.end(reason)

    # --- towards the viewers ---

    def deliver(self, parts: list[memoryview], size: int) -> None:
        """Give everyone the *size* bytes in *parts*, which are the ring's newest."""
        head = self.ring.head
        before = head - size
        packet: list[bytes | memoryview] = [DATA, *parts]
        for viewer in tuple(self.viewers):
            if viewer.blocked:
                continue
            try:
                if viewer.position == before and not viewer.notices:
                    viewer.sock.sendmsg(packet)
                    viewer.position = head
                    if viewer.patience < PATIENCE:
                        viewer.patience = min(PATIENCE, viewer.patience + size / FLOOR)
                else:
                    viewer.pump()
            except BlockingIOError:
                viewer.block()
            except OSError:
                viewer.close()
            except Exception as exc:
                self.loop.contain(viewer, exc)

    def tell(self, kind: str, **fields: object) -> None:
        for viewer in tuple(self.viewers):
            viewer.tell(kind, **fields)

    def unblocked(self) -> None:
        self.blocked -= 1

    # --- how long the VM waits for them ---

    def room(self) -> int:
        """How many bytes may be read without taking any away from a viewer that still has patience."""
        room = self.ring.size
        for viewer in self.viewers:
            if viewer.blocked and not viewer.forfeit:
                room = min(room, self.ring.size - (self.ring.head - viewer.position))
        return room

    def charge(self, needed: int) -> None:
        """Reading waits until *needed* bytes fit: take the time from those it waits for; those that have none left forfeit."""
        now = self.loop.now
        self._stop_clock()
        wait = PATIENCE
        for viewer in self.viewers:
            if not viewer.blocked or viewer.forfeit or self.ring.size - (self.ring.head - viewer.position) >= needed:
                self._settle(viewer, now)
                continue
            if viewer.since:
                viewer.patience -= now - viewer.since
            viewer.since = now
            if viewer.patience <= 0:
                viewer.patience = viewer.since = 0.0
                viewer.forfeit = True
            else:
                wait = min(wait, viewer.patience)
        if self.room() < needed:
            self._timer = self.loop.after(wait, self.host.review, self)

    def release(self) -> None:
        """Reading goes on: nobody is waited for."""
        self._stop_clock()
        for viewer in self.viewers:
            self._settle(viewer, self.loop.now)

    def broken(self, exc: Exception) -> None:
        self.release()

    def _settle(self, viewer: Viewer, now: float) -> None:
        if viewer.since:
            viewer.patience = max(0.0, viewer.patience - (now - viewer.since))
            viewer.since = 0.0

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- from the viewers ---

    def keys(self, viewer: Viewer, keys: bytes) -> None:
        if self.pen.holder is not viewer:
            if not viewer.noisy():
                holder = self.pen.holder
                viewer.refuse("this console is read-only" if viewer.readonly or holder is None else f"{holder.label} has the pen")
            return
        if not self.host.type(keys):
            viewer.paused = True
            viewer.listen()

    def keys_wanted(self) -> None:
        """The guest took what it was sent: read keys again."""
        for viewer in self.viewers:
            if viewer.paused:
                viewer.paused = False
                viewer.listen()

    def control(self, viewer: Viewer, what: object) -> None:
        if what == "who":
            people = [{"label": other.label, "pen": other is self.pen.holder} for other in self.viewers]
            viewer.tell("who", viewers=people)
        elif what == "pen":
            before = self.pen.holder
            if not self.pen.take(viewer):
                viewer.refuse("this console is read-only")
            elif before is viewer:
                viewer.tell("pen", **self._pen_fields(viewer))
            else:
                self._pen_moved()
        elif what == "break":
            if self.pen.holder is viewer:
                self.host.send_break()
            else:
                viewer.refuse("a break needs the pen")

    def _pen_fields(self, viewer: Viewer) -> dict[str, object]:
        holder = self.pen.holder
        return {"pen": holder is viewer, "holder": holder.label if holder is not None else None}

    def _pen_moved(self) -> None:
        # Whoever was paused with the pen is not paused without it: those keys will be refused, not queued.
        self.keys_wanted()
        for viewer in tuple(self.viewers):
            if not viewer.closed:
                viewer.tell("pen", **self._pen_fields(viewer))


def _from_store(name: str) -> tuple[int, str, bool]:
    """Count, label and read-only from a name that `_add` made: `viewer-<number>-<count>-<r|w>-<label in hex>`."""
    parts = name.split("-")
    try:
        return int(parts[2]), bytes.fromhex(parts[4]).decode("utf-8", "replace"), parts[3] != "w"
    except (IndexError, ValueError):
        return 0, "?", True
