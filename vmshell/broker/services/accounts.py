"""Who is who on this host: what the accounts helper answered lately. The loop reads it here and never waits for a directory.

What a request needs to know is asked first, and the request goes on when it is known (`when_known`). An answer holds for FRESH
seconds and as long as /etc/passwd and /etc/group are what they were when it was given. Then it is asked anew; when that takes
long, what was answered last goes on to hold: an outage is not a deletion (G19). Only whom nobody remembers is refused.
What others depend on without asking (whose VMs run, who is confined) is asked every now and then, about who is here more often,
and `changed` called when an answer is another than before.
Runs in: the broker.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ...refusals import AccountsSilent
from ..runtime.files import write_fast
from ..runtime.log import note, seldom
from .accounts_helper import PATIENCE, SLOW, AccountsLink, Fact, Question, Stamp, stamp_of_files

if TYPE_CHECKING:
    from ...layout import Layout
    from ..host.processes import Host
    from ..runtime.loop import Loop, Timer

FRESH = 2.0  # seconds
LOOK = 2.0  # seconds between two looks at the files of accounts
KEPT_FRESH = 60.0  # seconds after which what is in use is asked about again
FORGOTTEN = 86_400.0  # seconds for which who is not in use is remembered
LIST_PATIENCE = 60.0  # seconds for all members of a group: a directory may list thousands of accounts
SOON = 0.2  # seconds in which several changes are one
NOBODY = Fact()


class Entry:
    """What was answered last: when, from which state of the files, and when it was last of use."""

    __slots__ = ("fact", "read", "stamp", "when")

    def __init__(self, fact: Fact, when: float, stamp: Stamp) -> None:
        self.fact = fact
        self.when = self.read = when
        self.stamp = stamp


class _Wait:
    """Somebody who waits for answers."""

    __slots__ = ("deadline", "done", "questions")

    def __init__(self, questions: set[Question], done: Callable[[], None]) -> None:
        self.questions = questions
        self.done = done
        self.deadline: Timer | None = None


class Accounts:
    """*in_use* names what must be known without being asked for; `changed` is called when something of it is another."""

    def __init__(
        self, loop: Loop, host: Host, layout: Layout, in_use: Callable[[], Iterable[Question]], changed: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._path = f"{layout.broker_run}/accounts.json"
        self._in_use = in_use
        self._present: Callable[[], Iterable[Question]] = tuple
        self._changed = [changed]
        self._people = AccountsLink(loop, host, layout, self._answered, self._be_slow)
        # Of its own: to list everybody takes long without anything being wrong, and nobody else is to wait for it.
        self._lists = AccountsLink(loop, host, layout, self._answered, lambda: None, LIST_PATIENCE)
        self._memory: dict[Question, Entry] = {}
        self._missed: set[Question] = set()  # read before they were known
        self._waits: list[_Wait] = []
        self._slow = False  # the helper has been about one question for long, or was replaced for it
        self._news: Timer | None = None
        self._unsaved = False
        self._seen_whole = False  # has it been said that somebody is unknown, or which groups are all of somebody's?

    def begin(self) -> None:
        """Start the helper, and wait a little for all that is in use. The loop runs for this alone: it is the broker's start."""
        self._load()
        self._people.connect()
        known = False

        def done() -> None:
            nonlocal known
            known = True
            self._loop.stop()

        self.when_known(set(self._in_use()), done)
        if not known:
            self._loop.run()

    def watch(self) -> None:
        """Ask about what is in use as soon as the files have changed, and every now and then."""
        self._loop.after(LOOK, self.watch)
        self.look()

    def look(self) -> None:
        """Ask about all of what is in use that may be another by now."""
        stamp, here, used = stamp_of_files(), set(self._present()), set(self._in_use())
        due = [question for question in here if not self._is_fresh(question, stamp, FRESH)]
        due += [question for question in used - here if not self._is_fresh(question, stamp, KEPT_FRESH)]
        if self._slow:
            due = random.sample(due, min(1, len(due)))  # enough to notice when it is over
        else:
            self._forget(used | here)
        for question in due:
            self._ask(question, urgent=False, early=question in here)
        if self._unsaved:
            self._save()

    def follow(self, present: Callable[[], Iterable[Question]], changed: Callable[[], None]) -> None:
        """Keep what *present* names as fresh as what is asked for a request, and call *changed*, too."""
        self._present = present
        self._changed.append(changed)

    def close(self) -> None:
        self._people.close()
        self._lists.close()

    # --- what is known ------------------------------------------------------------------------------------------------

    def knows(self, question: Question) -> bool:
        """Was it ever answered?"""
        return question in self._memory

    def is_sure(self, question: Question) -> bool:
        """Have all databases answered it since we were started, so that it is no outage if something is missing?"""
        entry = self._memory.get(question)
        return entry is not None and entry.fact.whole and entry.stamp != ()

    def must_know(self, *questions: Question) -> None:
        """Raise AccountsSilent if one of them was never answered."""
        if not all(map(self.knows, questions)):
            raise AccountsSilent

    def uid_of(self, user: str) -> int | None:
        """The uid of *user*; None if there is no such account, or nobody has said so far."""
        fact = self._read(Question("user", user))
        return fact.uid if fact.exists else None

    def groups_of(self, user: str) -> frozenset[str]:
        """The names of *user*'s groups; none for an account that is gone or not known."""
        return self._read(Question("user", user)).groups

    def user_of(self, uid: int) -> str:
        """The account's name, empty if there is none or it is not known."""
        return self._read(Question("uid", uid)).user

    def is_group(self, group: str) -> bool:
        return self._read(Question("group", group)).exists

    def members(self, group: str) -> list[int]:
        """The uids of *group*'s members: of those it lists, and of accounts whose own group it is."""
        return list(self._read(Question("members", group)).uids)

    def _read(self, question: Question) -> Fact:
        entry = self._memory.get(question)
        if entry is None:
            if question.key != "":
                self._missed.add(question)
                self._ask(question, urgent=False)
            return NOBODY
        entry.read = time.monotonic()
        return entry.fact

    # --- asking -------------------------------------------------------------------------------------------------------

    def when_known(self, questions: Iterable[Question], done: Callable[[], None]) -> None:
        """Call `done` when all *questions* have fresh answers, or there was time enough for them: at once, or within PATIENCE."""
        stamp = stamp_of_files()
        stale = [question for question in questions if not self._is_fresh(question, stamp, FRESH)]
        if not stale:
            done()
            return
        wait = _Wait({question for question in stale if not self._may_do(question)}, done)
        if wait.questions:
            seconds = SLOW if all(map(self.knows, wait.questions)) else PATIENCE
            wait.deadline = self._loop.after(seconds, lambda: self._too_late(wait))
            self._waits.append(wait)
        for question in stale:
            self._ask(question, urgent=True)
        if wait.deadline is None:
            done()

    def when_peer_known(self, uid: int, done: Callable[[], None]) -> None:
        """Call `done` when it is known who *uid* is and in which groups, as far as anybody says."""

        def named() -> None:
            user = self.user_of(uid)
            self.when_known([Question("user", user)] if user else [], done)

        self.when_known([Question("uid", uid)], named)

    def _is_fresh(self, question: Question, stamp: Stamp, seconds: float) -> bool:
        entry = self._memory.get(question)
        return entry is not None and entry.stamp == stamp and time.monotonic() - entry.when <= seconds

    def _may_do(self, question: Question) -> bool:
        """Is what is remembered of it good enough, for the helper takes too long?"""
        return self._slow and question in self._memory

    def _ask(self, question: Question, *, urgent: bool, early: bool = False) -> None:
        (self._lists if question.kind == "members" else self._people).ask(question, urgent=urgent, early=early)

    def _answered(self, question: Question, fact: Fact | None, stamp: Stamp) -> None:
        if question.kind != "members":
            self._slow = fact is None
        if fact is None:
            seldom("accounts-silent", about=question)
        else:
            self._learn(question, fact, stamp)
            if stamp != stamp_of_files() and any(question in wait.questions for wait in self._waits):
                self._ask(question, urgent=True)  # somebody asked after the files had changed
                return
        self._release(question)

    def _learn(self, question: Question, fact: Fact, stamp: Stamp) -> None:
        """Believe an answer that is whole, and of one that is not, what there is of it.

        But once all databases have answered, what is missing is an outage: who is remembered stays what he was. (Where one never
        answers, as where nsswitch.conf names a service that is not set up, the others are all there is.)
        """
        if fact.whole:
            # A name that is found may be from the first of them.
            self._seen_whole = self._seen_whole or not fact.exists or question.kind == "user"
        elif self._seen_whole or not fact.exists:
            seldom("accounts-silent", about=question)
            if not self._seen_whole and question in self._memory:
                del self._memory[question]
                self._tell_soon()
            return
        self._remember(question, Entry(fact, time.monotonic(), stamp))

    def _remember(self, question: Question, entry: Entry) -> None:
        before = self._memory.get(question)
        self._memory[question] = entry
        if before is not None:
            entry.read = before.read
        same = before is not None and before.fact == entry.fact
        self._unsaved = self._unsaved or not same
        if question in self._missed or not (same or before is None):
            self._missed.discard(question)
            self._tell_soon()

    def _tell_soon(self) -> None:
        if self._news is None:
            self._news = self._loop.after(SOON, self._tell)

    def _tell(self) -> None:
        self._news = None
        for changed in self._changed:
            changed()

    # --- those who wait -----------------------------------------------------------------------------------------------

    def _release(self, question: Question) -> None:
        """There is an answer, or there will be none: whoever waits for it goes on."""
        for wait in list(self._waits):
            wait.questions.discard(question)
            if not wait.questions:
                self._end(wait)

    def _be_slow(self) -> None:
        """What is remembered is good enough from now on, until an answer comes."""
        self._slow = True
        for wait in list(self._waits):
            wait.questions = {question for question in wait.questions if not self._may_do(question)}
            if not wait.questions:
                self._end(wait)

    def _too_late(self, wait: _Wait) -> None:
        self._be_slow()
        self._end(wait)

    def _end(self, wait: _Wait) -> None:
        if wait in self._waits:
            self._waits.remove(wait)
            if wait.deadline is not None:
                wait.deadline.cancel()
            wait.done()

    # --- what outlives the broker -------------------------------------------------------------------------------------

    def _forget(self, used: set[Question]) -> None:
        before = time.monotonic() - FORGOTTEN
        for question in [question for question, entry in self._memory.items() if entry.read < before and question not in used]:
            del self._memory[question]

    def _save(self) -> None:
        """A broker that is started while a directory is silent remembers what we knew."""
        rows = [[*question, *map(_plain, vars(entry.fact).values())] for question, entry in self._memory.items()]
        try:
            write_fast(self._path, json.dumps({"whole": self._seen_whole, "facts": rows}))
        except OSError as exc:
            note("accounts-not-saved", problem=exc)
        self._unsaved = False

    def _load(self) -> None:
        try:
            with open(self._path, encoding="utf-8") as file:
                saved: Any = json.load(file)
            self._seen_whole = bool(saved["whole"])
            for kind, key, exists, uid, user, groups, uids, whole in saved["facts"]:
                fact = Fact(exists, uid, user, frozenset(groups), tuple(uids), whole)
                entry = self._memory[Question(kind, key)] = Entry(fact, -KEPT_FRESH, ())
                entry.read = time.monotonic()
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as exc:
            note("accounts-unreadable", problem=exc)


def _plain(value: object) -> object:
    """As JSON has it."""
    return sorted(value) if isinstance(value, frozenset) else value
