"""What the broker knows of the host's accounts, and for how long: answers that are late, missing, or half (G19, D21)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services import accounts as accounts_module
from vmshell.broker.services.accounts import Accounts
from vmshell.broker.services.accounts_helper import Fact, Question, Stamp
from vmshell.layout import Layout
from vmshell.refusals import AccountsSilent

ALICE, UID = Question("user", "alice"), Question("uid", 1001)
STAFF = Fact(True, 1001, groups=frozenset({"staff"}))
NAMED = Fact(True, user="alice")
SILENT = Fact(whole=False)


class Bench:
    """The memory without a helper: what it asks stands in a list until the test answers."""

    def __init__(self, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Question] = []
        self.early: set[Question] = set()
        self.changes = 0
        self.in_use: list[Question] = []
        self.stamp: Stamp = ((1, 1, 1),)
        self.loop = Loop(self._raise)
        self.accounts = Accounts(self.loop, cast(Any, None), layout, lambda: self.in_use, self._changed)
        self.accounts._people = self.accounts._lists = cast(Any, self)
        monkeypatch.setattr(accounts_module, "stamp_of_files", lambda: self.stamp)
        monkeypatch.setattr(accounts_module, "SLOW", 0.05)
        monkeypatch.setattr(accounts_module, "PATIENCE", 0.1)
        monkeypatch.setattr(accounts_module, "SOON", 0.0)

    def _raise(self, exc: BaseException) -> None:
        raise exc

    def _changed(self) -> None:
        self.changes += 1

    def ask(self, question: Question, *, urgent: bool, early: bool = False) -> None:
        self.early.update([question] if early else [])
        if question not in self.asked:
            self.asked.append(question)

    def connect(self) -> None:
        """The helper is there."""

    def answer(self, question: Question, fact: Fact | None) -> None:
        self.asked.remove(question)
        self.accounts._answered(question, fact, self.stamp)

    def wait(self, *questions: Question) -> list[bool]:
        """A list that gets an item when all is known."""
        done: list[bool] = []
        self.accounts.when_known(questions, lambda: done.append(True))
        return done

    def turn(self, done: Callable[[], object]) -> None:
        until = time.monotonic() + 20
        while not done():
            assert time.monotonic() < until
            self.loop.after(0.01, self.loop.stop)
            self.loop.run()

    def age(self) -> None:
        """Make every answer an old one."""
        for entry in self.accounts._memory.values():
            entry.when -= 1000


@pytest.fixture
def layout(tmp_path: Any) -> Layout:
    made = Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}", log=f"{tmp_path}/l", embedded=False)
    (tmp_path / "broker").mkdir()
    return made


@pytest.fixture
def bench(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(layout, monkeypatch)
    yield made
    made.loop._epoll.close()


def test_what_is_not_known_is_asked_and_waited_for(bench: Bench) -> None:
    done = bench.wait(ALICE, UID)
    assert not done and bench.asked == [ALICE, UID]
    bench.answer(ALICE, STAFF)
    assert not done
    bench.answer(UID, NAMED)
    assert done == [True]
    assert bench.accounts.groups_of("alice") == {"staff"} and bench.accounts.user_of(1001) == "alice"
    assert bench.wait(ALICE, UID) == [True] and bench.asked == [], "what is fresh is not asked again"


def test_an_answer_is_old_after_a_few_seconds(bench: Bench) -> None:
    bench.wait(ALICE)
    bench.answer(ALICE, STAFF)
    bench.age()
    done = bench.wait(ALICE)
    assert not done and bench.asked == [ALICE]
    bench.answer(ALICE, Fact(True, 1001))
    assert done and bench.accounts.groups_of("alice") == frozenset()


def test_d21_a_change_of_the_files_is_seen_at_once(bench: Bench) -> None:
    bench.wait(ALICE)
    bench.answer(ALICE, STAFF)
    bench.stamp = ((2, 2, 2),)
    done = bench.wait(ALICE)
    assert not done and bench.asked == [ALICE]


def test_d21_an_answer_from_before_the_change_is_not_enough(bench: Bench) -> None:
    before = bench.stamp
    done = bench.wait(ALICE)
    bench.stamp = ((2, 2, 2),)
    bench.asked.clear()
    bench.accounts._answered(ALICE, STAFF, before)
    assert not done and bench.asked == [ALICE]
    bench.answer(ALICE, Fact(True, 1001))
    assert done


def test_g19_who_is_remembered_waits_a_moment_and_then_goes_on_as_he_was(bench: Bench) -> None:
    bench.wait(ALICE)
    bench.answer(ALICE, STAFF)
    bench.age()
    known, stranger = bench.wait(ALICE), bench.wait(Question("user", "bob"), ALICE)
    bench.turn(lambda: known)
    assert not stranger and bench.accounts.groups_of("alice") == {"staff"}
    assert bench.wait(ALICE) == [True], "nobody waits for what is slow already"
    bench.turn(lambda: stranger)
    with pytest.raises(AccountsSilent):
        bench.accounts.must_know(Question("user", "bob"))
    bench.answer(ALICE, STAFF)
    bench.age()
    assert bench.wait(ALICE) == [], "it answers again"


def test_g19_a_helper_that_was_replaced_leaves_a_stranger_unknown(bench: Bench) -> None:
    done = bench.wait(ALICE)
    bench.answer(ALICE, None)
    assert done and not bench.accounts.knows(ALICE)
    assert bench.accounts.uid_of("alice") is None


def test_g19_an_outage_is_not_a_deletion(bench: Bench) -> None:
    bench.wait(ALICE, UID)
    bench.answer(ALICE, STAFF)
    bench.answer(UID, NAMED)
    bench.age()
    done = bench.wait(ALICE, UID)
    bench.answer(ALICE, Fact(True, 1001, whole=False))
    bench.answer(UID, SILENT)
    assert done and bench.accounts.groups_of("alice") == {"staff"} and bench.accounts.user_of(1001) == "alice"
    bench.wait(ALICE, UID)
    bench.answer(ALICE, Fact())
    bench.answer(UID, Fact())
    assert bench.accounts.uid_of("alice") is None and bench.accounts.user_of(1001) == "", "this is one"


def test_g19_a_stranger_is_not_let_in_by_half_an_answer(bench: Bench) -> None:
    bench.wait(ALICE)
    bench.answer(ALICE, STAFF)
    bench.wait(bob := Question("user", "bob"))
    bench.answer(bob, Fact(True, 1002, groups=frozenset({"staff"}), whole=False))
    assert not bench.accounts.knows(bob)


def test_where_a_database_never_answers_the_others_are_all_there_is(bench: Bench) -> None:
    """`sss` stands in nsswitch.conf of many a host that has no sssd running."""
    bench.wait(ALICE, UID)
    bench.answer(UID, NAMED)
    bench.answer(ALICE, Fact(True, 1001, groups=frozenset({"staff"}), whole=False))
    assert bench.accounts.groups_of("alice") == {"staff"}
    bench.age()
    bench.wait(ALICE, UID)
    bench.answer(ALICE, Fact(True, 1001, whole=False))
    assert bench.accounts.groups_of("alice") == frozenset(), "she left the group"
    bench.answer(UID, SILENT)
    assert bench.accounts.user_of(1001) == "" and not bench.accounts.knows(UID), "she is gone"


def test_what_depends_on_somebody_hears_of_a_change_and_of_nothing_else(bench: Bench) -> None:
    bench.in_use = [ALICE, UID]
    bench.accounts.watch()
    assert sorted(bench.asked) == sorted([ALICE, UID])
    bench.answer(UID, NAMED)
    bench.answer(ALICE, STAFF)
    bench.stamp = ((2, 2, 2),)
    bench.accounts.watch()
    bench.answer(UID, NAMED)
    assert bench.accounts._news is None
    bench.answer(ALICE, Fact(True, 1001))
    bench.turn(lambda: bench.changes == 1)
    bench.accounts.watch()
    assert bench.asked == []


def test_g18_who_is_here_is_asked_about_anew_every_few_seconds(bench: Bench) -> None:
    """Before whoever owns something, of whom there may be thousands, and whoever else is told of a change hears of it, too."""
    heard: list[bool] = []
    bench.in_use = [ALICE, UID]
    bench.accounts.follow(lambda: [ALICE, ALICE], lambda: heard.append(True))
    bench.accounts.look()
    assert sorted(bench.asked) == sorted([ALICE, UID]) and bench.asked[0] == ALICE and bench.early == {ALICE}
    bench.answer(ALICE, STAFF)
    bench.answer(UID, NAMED)
    for entry in bench.accounts._memory.values():
        entry.when -= accounts_module.FRESH + 0.1
    bench.accounts.look()
    assert bench.asked == [ALICE], "not yet of what is merely in use"
    bench.answer(ALICE, Fact(True, 1001))
    bench.turn(lambda: heard)
    assert bench.changes == 1


def test_g19_only_what_all_databases_said_since_we_were_started_is_sure(
    bench: Bench, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.wait(ALICE, UID)
    bench.answer(ALICE, Fact(True, 1001, whole=False))
    bench.answer(UID, NAMED)
    assert not bench.accounts.is_sure(ALICE) and bench.accounts.is_sure(UID) and not bench.accounts.is_sure(Question("uid", 7))
    bench.accounts.watch()
    after = Bench(layout, monkeypatch)
    after.accounts._load()
    assert after.accounts.knows(UID) and not after.accounts.is_sure(UID)
    after.loop._epoll.close()


def test_what_was_read_before_it_was_known_is_news_when_it_is(bench: Bench) -> None:
    assert bench.accounts.groups_of("alice") == frozenset() and bench.asked == [ALICE]
    bench.answer(ALICE, STAFF)
    bench.turn(lambda: bench.changes == 1)


def test_while_a_directory_is_silent_it_is_asked_one_thing_at_a_time(bench: Bench) -> None:
    bench.in_use = [Question("uid", number) for number in range(1000)]
    bench.accounts._slow = True
    bench.accounts.watch()
    assert len(bench.asked) == 1


def test_g19_a_broker_that_is_started_in_an_outage_remembers_who_was_who(
    bench: Bench, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.in_use = [ALICE, UID]
    bench.accounts.watch()
    bench.answer(ALICE, STAFF)
    bench.answer(UID, NAMED)
    bench.accounts.watch()
    after = Bench(layout, monkeypatch)
    after.in_use = [ALICE, UID]
    after.accounts.begin()
    assert sorted(after.asked) == sorted([ALICE, UID])
    assert after.accounts.groups_of("alice") == {"staff"} and after.accounts.user_of(1001) == "alice"
    after.answer(ALICE, Fact(True, 1001, whole=False))
    assert after.accounts.groups_of("alice") == {"staff"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"whole": true, "facts": [[1]]}', '{"whole": 1, "facts": 7}', "\0"])
def test_what_cannot_be_read_is_not_remembered(bench: Bench, layout: Layout, text: str) -> None:
    with open(f"{layout.broker_run}/accounts.json", "w") as file:
        file.write(text)
    bench.accounts.begin()
    assert not bench.accounts._memory


def test_who_was_of_no_use_for_a_day_is_forgotten_unless_something_depends_on_him(bench: Bench) -> None:
    bench.wait(ALICE, UID)
    bench.answer(ALICE, STAFF)
    bench.answer(UID, NAMED)
    for entry in bench.accounts._memory.values():
        entry.read -= accounts_module.FORGOTTEN + 1
    bench.in_use = [ALICE]
    bench.accounts.watch()
    assert bench.accounts.knows(ALICE) and not bench.accounts.knows(UID)
