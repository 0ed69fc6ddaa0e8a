"""The people attached to one console: what each still has to get, who may type, and what they tell each other.

Each has two pipes; `consoles.py` describes what travels on them. A viewer's queue is its position in the ring (see `ring.py`): it
costs no memory, and being slow costs the viewer its bytes, not the VM its time. How long the VM is held back for a slow viewer
is `PATIENCE`, earned again only by reading on: someone who takes a little now and then cannot slow a VM below `FLOOR` bytes a
second.
Runs in: the relay. Touches the viewers' pipes.
"""

from __future__ import annotations

import contextlib
import json
import os

from ..consoles import DATA_MAX
from ..refusals import TooManyRequests
from .checks import BadDescriptor, check_viewer
from .loop import GONE, IN
from .viewer import PATIENCE, Viewer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .loop import Loop, Timer
    from .ring import Ring
    from .service import Service
    from .viewer import User

    class Host(Protocol):
        """The console they are attached to."""

        def type(self, keys: bytes) -> bool: ...
        def send_break(self) -> None: ...
        def review(self) -> None: ...
        def viewers_changed(self, count: int) -> None: ...
        def describe(self) -> dict[str, object]: ...


VIEWERS_MAX = 64
LABEL_KEPT = 90  # bytes of a label that survive our restart: a name in the store has 255 characters
KEYS, OUTPUT = "keys", "output"  # how the names of a viewer's two pipes in the store end


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
    """All viewers of one console, in the order in which they came; their pipes survive our restart as *prefix*`-…`."""

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

    def attach(self, keys: int, output: int, user: User, readonly: bool, replay: bool) -> None:
        """Take two pipes (their closing is ours from here on) as a viewer for *user*; raises BadDescriptor or TooManyRequests."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, keys)
            stack.callback(os.close, output)
            check_viewer(keys, output)
            if len(self.viewers) >= VIEWERS_MAX:
                raise TooManyRequests(count=VIEWERS_MAX, what="consoles of this VM", limit=VIEWERS_MAX)
            stack.pop_all()
        viewer = self._add(keys, output, user, readonly, self.ring.start if replay else self.ring.head)
        viewer.tell("hello", **self._pen_fields(viewer), viewers=len(self.viewers), **self.host.describe())
        if not viewer.closed:
            self.host.viewers_changed(len(self.viewers))

    def restore(self, kept: list[tuple[str, int]]) -> None:
        """Go on with the viewers whose pipes survived our restart, by the names they were kept under.

        A viewer of whom only one pipe is left, or of whom nobody wrote down whose it is (as an earlier version did not), sees its
        end and attaches again.
        """
        pairs: dict[str, dict[str, int]] = {}
        for name, fd in kept:
            self.service.remove(name)
            stem, _, end = name.rpartition("-")
            pairs.setdefault(stem, {})[end] = fd
        # In the order in which they came; so a name given anew is never one that is still to be read.
        for stem, pair in sorted(pairs.items(), key=lambda item: _from_store(item[0])[0]):
            _, user, readonly = _from_store(stem)
            if user is None or not _is_viewer(pair):
                for fd in pair.values():
                    os.close(fd)
            else:
                self._add(pair[KEYS], pair[OUTPUT], user, readonly, self.ring.head)
        self._pen_moved()

    def _add(self, keys: int, output: int, user: User, readonly: bool, position: int) -> Viewer:
        self._count += 1
        viewer = Viewer(self, keys, output, user, readonly, position)
        uid, label = user
        stem = f"{self._prefix}-{self._count}-{'r' if readonly else 'w'}-{uid}-{label.encode()[:LABEL_KEPT].hex()}"
        viewer.kept = f"{stem}-{KEYS}", f"{stem}-{OUTPUT}"
        for name, fd in zip(viewer.kept, (keys, output), strict=True):
            os.set_blocking(fd, False)
            self.service.store(name, fd)
        self.viewers.append(viewer)
        self.pen.joined(viewer)
        self.loop.add(keys, IN, viewer.on_keys, viewer)
        self.loop.add(output, GONE, viewer.on_output, viewer)
        return viewer

    def left(self, viewer: Viewer) -> None:
        if viewer in self.viewers:
            self.viewers.remove(viewer)
            if self.pen.left(viewer, self.viewers):
                self._pen_moved()
            self.host.viewers_changed(len(self.viewers))
            self.host.review()

    def cut_off(self, user: User, code: str, reason: str) -> None:
        """End the viewers of *user*, who may look no longer; the VM and everybody else go on."""
        for viewer in tuple(self.viewers):
            if viewer.user == user:
                viewer.cut_off(code, reason)

    def end(self, reason: str) -> None:
        """Tell everyone that this was all, and close; slow ones get `LINGER` seconds."""
        self._stop_clock()
        viewers, self.viewers = self.viewers, []
        for viewer in viewers:
            viewer.end(reason)

    # --- towards the viewers ---

    def deliver(self) -> None:
        """Give everyone what the ring got last."""
        for viewer in tuple(self.viewers):
            if not viewer.blocked:
                try:
                    viewer.pump()
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
            viewer.tell("who", **self._people())
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

    def _people(self) -> dict[str, object]:
        """Everybody who is attached, as many as a notice has room for."""
        people, room = [], DATA_MAX - 64
        for viewer in self.viewers:
            person = {"label": viewer.label, "pen": viewer is self.pen.holder}
            room -= len(json.dumps(person)) + 1
            if room >= 0:
                people.append(person)
        more = len(self.viewers) - len(people)
        return {"viewers": people, **({"more": more} if more else {})}

    def _pen_fields(self, viewer: Viewer) -> dict[str, object]:
        holder = self.pen.holder
        return {"pen": holder is viewer, "holder": holder.label if holder is not None else None}

    def _pen_moved(self) -> None:
        # Whoever was paused with the pen is not paused without it: those keys will be refused, not queued.
        self.keys_wanted()
        for viewer in tuple(self.viewers):
            if not viewer.closed:
                viewer.tell("pen", **self._pen_fields(viewer))


def _is_viewer(pair: dict[str, int]) -> bool:
    try:
        check_viewer(pair.get(KEYS, -1), pair.get(OUTPUT, -1))
    except BadDescriptor:
        return False
    return True


def _from_store(stem: str) -> tuple[int, User | None, bool]:
    """Count, user and read-only from what the names that `_add` made begin with; no user if it is no such name.

    It is `viewer-<number>-<count>-<r|w>-<uid>-<label>`.
    """
    try:
        _, _, count, mode, uid, label = stem.split("-")
        return int(count), (int(uid), bytes.fromhex(label).decode("utf-8", "replace")), mode != "w"
    except ValueError:
        return 0, None, True
