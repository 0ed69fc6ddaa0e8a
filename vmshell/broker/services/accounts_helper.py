"""The accounts helper, from the broker's side: a process that answers one question at a time and is replaced when it hangs.

Runs in: the broker.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ... import wire
from ...messages import TO_ACCOUNTS, Found, Part
from ...refusals import AccountsSilent
from ...spawn import python
from ..runtime.log import note
from .connection import Connection

if TYPE_CHECKING:
    from ...errors import VmshellError
    from ...layout import Layout
    from ...messages import ToAccounts
    from ..host.processes import Host, Process
    from ..runtime.loop import Loop, Timer

PATIENCE = 5.0  # seconds for an answer; then the helper is killed
SLOW = 1.0  # seconds after which who is remembered is waited for no longer
QUEUE_MAX = 20_000  # questions that wait, of each urgency
_AGAIN_AFTER_SILENCE = 0.1  # seconds
_FILES = ("/etc/passwd", "/etc/group")
Stamp = tuple[tuple[int, int, int], ...]


class Question(NamedTuple):
    """`uid` 1001, `user` alice, `group` staff, or `members` of staff."""

    kind: str
    key: int | str

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"

    def message(self) -> ToAccounts:
        kind = TO_ACCOUNTS[self.kind]
        return kind(**dict.fromkeys(kind.fields, self.key))


@dataclass(frozen=True)
class Fact:
    """An answer; of the fields only those that were asked about say something."""

    exists: bool = False
    uid: int = 0
    user: str = ""
    groups: frozenset[str] = frozenset()
    uids: tuple[int, ...] = ()
    whole: bool = True  # else there may be more of it


Answered = Callable[[Question, Fact | None, Stamp], None]


def stamp_of_files() -> Stamp:
    """What is another as soon as the host's own files of accounts were changed."""
    found = []
    for path in _FILES:
        try:
            status = os.stat(path)
        except OSError:
            continue
        found.append((status.st_mtime_ns, status.st_ino, status.st_size))
    return tuple(found)


class AccountsLink(Connection):
    """`on_answer(question, fact, stamp)` gets what came of each question: None if there was no answer in time.

    *stamp* is that of the files before they were read. `on_slow` is called when an answer does not come soon.
    """

    name = "accounts"
    down = AccountsSilent

    def __init__(
        self, loop: Loop, host: Host, layout: Layout, on_answer: Answered, on_slow: Callable[[], None], patience: float = PATIENCE
    ) -> None:
        super().__init__(loop, "", self._next)
        self._host = host
        self._layout = layout
        self._on_answer = on_answer
        self._on_slow = on_slow
        self._patience = patience
        self._process: Process | None = None
        # What waits, in the order of asking: for a request; about who is here; about anybody else.
        self._urgent: dict[Question, None] = {}
        self._early: dict[Question, None] = {}
        self._later: dict[Question, None] = {}
        self._asked: Question | None = None  # what the helper is about
        self._stamp: Stamp = ()
        self._parts: list[Part] = []
        self._timers: list[Timer] = []
        self._overdue = False
        self._repeated: Question | None = None

    def ask(self, question: Question, *, urgent: bool, early: bool = False) -> None:
        """Ask when it is its turn, *urgent* ones first, then *early* ones; what waits already is not asked twice."""
        queues = [self._urgent, self._early, self._later]
        turn = 0 if urgent else 1 if early else 2
        if question == self._asked or any(question in queue for queue in queues[: turn + 1]):
            return
        for queue in queues[turn + 1 :]:
            queue.pop(question, None)
        queue = queues[turn]
        if len(queue) >= QUEUE_MAX:
            if urgent:
                self._on_answer(question, None, ())
            return
        queue[question] = None
        self._next()

    def _next(self) -> None:
        """Ask what waits the longest, unless something is being asked or the helper has only just been lost."""
        queue = self._urgent or self._early or self._later
        if not queue or self._asked is not None or self._again is not None or self._closed:
            return
        self._asked = question = next(iter(queue))
        del queue[question]
        self._stamp, self._parts = stamp_of_files(), []
        self._timers = [self._loop.after(SLOW, self._on_slow), self._loop.after(self._patience, self._give_up)]
        self.request(question.message(), self._answered)

    def _answered(self, error: VmshellError | None, packet: wire.Packet) -> None:
        question, self._asked = self._asked, None
        overdue, self._overdue = self._overdue, False
        for timer in self._timers:
            timer.cancel()
        assert question is not None
        if error and not overdue and self._repeated != question:
            self._repeated = question
            self._urgent = {question: None, **self._urgent}
        else:
            self._repeated = None
            self._on_answer(question, None if error else self._fact(packet), self._stamp)
        self._next()

    def _fact(self, packet: wire.Packet) -> Fact:
        found = Found.from_body(packet.body["ok"])  # type: ignore[arg-type]
        groups = frozenset(name for part in self._parts for name in part.groups)
        uids = tuple(uid for part in self._parts for uid in part.uids)
        return Fact(found.exists, found.uid, found.user, groups, uids, found.whole)

    def _heard(self, packet: wire.Packet) -> bool:
        if packet.body.get("verb") != Part.verb:
            return False
        self._parts.append(Part.from_body(packet.body))
        return True

    def _give_up(self) -> None:
        """A directory is silent, and a thread that waits in it cannot be called back: end the helper, for another to come."""
        self._overdue = True
        self._again_after = _AGAIN_AFTER_SILENCE  # that it hangs has taken long enough
        self._lost(f"no answer about {self._asked} in {self._patience:.0f} s")

    # --- the process --------------------------------------------------------------------------------------------------

    def _open(self) -> wire.Socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            command = python("accounts", self._layout.to_args())
            process = self._process = self._host.spawn(command, {3: theirs.fileno()}, stderr=2)
            self._loop.watch(process.pidfd, lambda: self._ended(process))
            return wire.Socket(fileno=ours.detach())

    def _drop(self) -> None:
        super()._drop()
        if self._process is not None:
            self._process.signal(signal.SIGKILL)

    def _ended(self, process: Process) -> None:
        self._loop.unwatch(process.pidfd)
        status = process.reap()
        if self._process is process:
            self._process = None
        note("accounts-ended", status=status)
