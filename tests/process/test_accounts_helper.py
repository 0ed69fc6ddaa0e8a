"""The accounts helper as a process: what it answers, in how many packets, and when it ends. The databases are this machine's."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vmshell.accounts import lookups, main
from vmshell.broker.host.processes import Host
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services import accounts_helper
from vmshell.broker.services.accounts_helper import AccountsLink, Fact, Question, Stamp
from vmshell.encoding import encode
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout
from vmshell.messages import GROUPS_IN_PART, NUMBERS_MAX, UID_MAX, AboutMembers, AboutUser

NOBODY_HAS = 4_000_000_123


class Asking:
    """The broker's end, with what came of each question."""

    def __init__(self, layout: Layout) -> None:
        self.answers: list[tuple[Question, Fact | None]] = []
        self.loop = Loop(self._raise)
        host = Host(embedded=True)
        self.link = AccountsLink(self.loop, host, layout, self._answered, lambda: None, 60)

    def _raise(self, exc: BaseException) -> None:
        raise exc

    def _answered(self, question: Question, fact: Fact | None, stamp: Stamp) -> None:
        self.answers.append((question, fact))

    def turn(self, done: Callable[[], object]) -> None:
        until = time.monotonic() + 60
        while not done():
            assert time.monotonic() < until, self.answers
            self.loop.after(0.01, self.loop.stop)
            self.loop.run()

    def ask(self, kind: str, key: int | str) -> Fact | None:
        self.answers.clear()
        self.link.ask(Question(kind, key), urgent=True)
        self.turn(lambda: self.answers)
        ((_, fact),) = self.answers
        return fact


@pytest.fixture
def asking(layout: Layout) -> Iterator[Asking]:
    made = Asking(layout)
    yield made
    made.link.close()
    made.turn(lambda: made.link._process is None)
    made.loop._epoll.close()


def test_it_answers_what_the_hosts_databases_say(asking: Asking) -> None:
    own = pwd.getpwuid(os.geteuid())
    groups = {grp.getgrgid(gid).gr_name for gid in os.getgrouplist(own.pw_name, own.pw_gid)}
    assert asking.ask("uid", own.pw_uid) == Fact(True, user=own.pw_name)
    assert asking.ask("user", own.pw_name) == Fact(True, own.pw_uid, groups=frozenset(groups))
    assert asking.ask("group", "daemon") == Fact(True)
    members = asking.ask("members", "daemon")
    assert members is not None and members.exists and pwd.getpwnam("daemon").pw_uid in members.uids


@pytest.mark.parametrize(
    ("kind", "key"), [("uid", NOBODY_HAS), ("uid", UID_MAX), ("user", "nobody-has-this"), ("group", "x" * 256), ("members", "ä€")]
)
def test_nobody_is_an_answer(asking: Asking, kind: str, key: int | str) -> None:
    assert asking.ask(kind, key) == Fact()


def test_urgent_questions_come_before_others_and_none_is_asked_twice(asking: Asking) -> None:
    for number in (1, 2, 3, 3, 2):
        asking.link.ask(Question("uid", NOBODY_HAS + number), urgent=False)
    asking.link.ask(Question("uid", NOBODY_HAS + 3), urgent=True)
    asking.turn(lambda: len(asking.answers) == 3)
    assert [question.key for question, _ in asking.answers] == [NOBODY_HAS + 1, NOBODY_HAS + 3, NOBODY_HAS + 2]


def test_early_questions_come_before_others_and_after_urgent_ones(asking: Asking) -> None:
    for number in (1, 2, 3, 4):
        asking.link.ask(Question("uid", NOBODY_HAS + number), urgent=False)
    for number in (3, 4, 4):
        asking.link.ask(Question("uid", NOBODY_HAS + number), urgent=False, early=True)
    asking.link.ask(Question("uid", NOBODY_HAS + 4), urgent=True)
    asking.link.ask(Question("uid", NOBODY_HAS + 4), urgent=False, early=True)
    asking.turn(lambda: len(asking.answers) == 4)
    assert [question.key for question, _ in asking.answers] == [NOBODY_HAS + number for number in (1, 4, 3, 2)]


def test_a_full_queue_is_no_answer(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts_helper, "QUEUE_MAX", 1)
    for number in range(4):
        asking.link.ask(Question("uid", NOBODY_HAS + number), urgent=True)
    assert asking.answers == [(Question("uid", NOBODY_HAS + number), None) for number in (2, 3)]


def test_a_question_that_ends_the_helper_is_given_up(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a database's module may that is linked into it."""
    started = []

    def python(*words: str) -> list[str]:
        started.append(words)
        return ["false"]

    monkeypatch.setattr(accounts_helper, "python", python)
    assert asking.ask("user", "alice") is None
    assert len(started) >= 2


def test_g19_a_helper_that_hangs_is_killed_and_the_next_one_answers(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    asking.link._patience = 0.5
    with monkeypatch.context() as patch:
        patch.setattr(accounts_helper, "python", lambda *words: ["sleep", "3600"])
        asking.link.ask(Question("user", "alice"), urgent=True)
        asking.turn(lambda: asking.link._process)
        process = asking.link._process
        asking.turn(lambda: asking.answers)
    assert asking.answers == [(Question("user", "alice"), None)]
    assert process is not None
    asking.turn(lambda: not os.path.exists(f"/proc/{process.pid}"))
    asking.link._patience = 60
    assert asking.ask("uid", NOBODY_HAS) == Fact()


def test_it_ends_with_its_socket(asking: Asking) -> None:
    asking.ask("uid", 0)
    process = asking.link._process
    assert process is not None
    asking.link.close()
    asking.turn(lambda: asking.link._process is None)
    assert not os.path.exists(f"/proc/{process.pid}")


def test_a_verb_that_is_not_its_own_ends_it() -> None:
    """Its only peer is the broker; what that never says, nobody says."""
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [sys.executable, "-IS", f"{PACKAGE_DIR}/__main__.py", "accounts", "x"]
            script = 'exec "$@" 3<&"$0"'
            os.set_inheritable(theirs.fileno(), True)
            child = subprocess.Popen(
                ["bash", "-c", script, str(theirs.fileno()), *command], pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL
            )
        ours.send(encode({"id": 1, "verb": "shadow", "user": "root"}))
        assert child.wait(60) == 1
        assert ours.recv(100) == b""


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_what_is_longer_than_a_packet_comes_in_parts(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    names = [f"{number:04}" + "\U0001f600" * 252 for number in range(count // 50)]
    monkeypatch.setattr(lookups, "account", lambda user: (1001, names, True))
    monkeypatch.setattr(lookups, "members", lambda group: (list(range(count)), False))
    for question, items, size in (
        (AboutUser(user="x"), names, GROUPS_IN_PART),
        (AboutMembers(group="x"), range(count), NUMBERS_MAX),
    ):
        *parts, last = main.answers({"id": 7, **question.to_body()})
        assert len(parts) == -(-len(items) // size)
        got: list[Any] = [item for part in parts for item in (part.get("groups") or part["uids"])]  # type: ignore[attr-defined]
        assert got == list(items) and last["id"] == 7
        assert all(encode(body) for body in (*parts, last))


def test_names_that_no_message_holds_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "account", lambda user: (1001, ["a\nb", "\udcff", "x" * 257, "good name"], True))
    part, last = main.answers({"id": 7, "verb": "user", "user": "x"})
    assert part == {"verb": "part", "groups": ["good name"]}
    monkeypatch.setattr(lookups, "name_of", lambda uid: "\udcff")
    assert list(main.answers({"id": 7, "verb": "uid", "uid": 1})) == [{"id": 7, "ok": {"verb": "found"}}]
