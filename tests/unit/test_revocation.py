"""Who loses connections and consoles, why, and whom nobody's silence takes anything (G18, G19, D22)."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.accounts import People
from vmshell import messages
from vmshell.broker.api.revocation import Revocation, User
from vmshell.broker.runtime.call import label_of
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services.accounts_helper import Question
from vmshell.encoding import encode
from vmshell.errors import VmshellError
from vmshell.messages import ATTACHED_IN_PART, Attached, Detach
from vmshell.refusals import RelayDown

ALICE, BOB = (1001, "alice"), (1002, "bob")
NO_MEMBER = "you may no longer use vmshell here: you are no longer a member of the group vmshell"


class Host(People):
    """The host's accounts; *silent*: nothing more is heard of who is in it, *half*: not all databases answer."""

    def __init__(self) -> None:
        super().__init__({"alice": 1001, "bob": 1002}, {"vmshell": {"alice", "bob"}})
        self.silent: set[int | str] = set()
        self.half = False
        self.present: Any = None
        self.changed: Any = None

    def follow(self, present: Any, changed: Any) -> None:
        self.present, self.changed = present, changed

    def knows(self, question: Question) -> bool:
        return question.key not in self.silent

    def is_sure(self, question: Question) -> bool:
        return not self.half


class Server:
    def __init__(self) -> None:
        self.here: set[User] = set()
        self.ended: list[tuple[int, str, str]] = []

    def users(self) -> set[User]:
        return set(self.here)

    def revoke(self, uid: int, user: str, error: VmshellError) -> int:
        self.here.discard((uid, user))
        self.ended.append((uid, user, error.sentence()))
        return 1


class Relay:
    """Answers at once; `users` have consoles."""

    def __init__(self) -> None:
        self.users: list[User] = []
        self.told: list[Detach] = []
        self.asked = 0
        self.away = False

    def request(self, message: Attached, answered: Any) -> None:
        self.asked += 1
        part = self.users[message.skip : message.skip + ATTACHED_IN_PART]
        answered(RelayDown() if self.away else None, SimpleNamespace(body={} if self.away else {"ok": {"users": part}}))

    def send(self, message: Detach, done: Any) -> None:
        self.told.append(message)
        if not self.away:
            self.users = [user for user in self.users if user != (message.uid, message.label)]
        done(RelayDown() if self.away else None)


class Bench:
    def __init__(self) -> None:
        self.host, self.server, self.relay = Host(), Server(), Relay()
        self.vm = SimpleNamespace(viewers=0, state=messages.RUNNING)
        loop = Loop(lambda exc: None)
        self.revocation = Revocation(
            loop=loop,
            group="vmshell",
            accounts=cast(Any, self.host),
            registry=cast(Any, [self.vm]),
            relay=cast(Any, self.relay),
            server=cast(Any, self.server),
        )
        self.revocation.begin()
        loop._epoll.close()

    def attach(self, *users: User) -> None:
        self.relay.users += users
        self.vm.viewers = len(self.relay.users)
        self.look()

    def look(self) -> list[Detach]:
        """What the relay is told at this look."""
        self.relay.told.clear()
        self.revocation.look()
        return list(self.relay.told)


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.server.here = {ALICE, BOB}
    made.attach(ALICE, BOB)
    assert made.server.ended == [] and made.relay.told == []
    return made


def test_g18_who_left_the_group_loses_connections_and_consoles_and_nobody_else_does(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.host.groups = {"vmshell": {"bob"}, "staff": {"alice"}}
    (told,) = bench.look()
    assert (told.uid, told.label, told.code, told.reason) == (*ALICE, "access-ended", NO_MEMBER)
    assert bench.server.ended == [(*ALICE, NO_MEMBER)] and bench.server.here == {BOB} and bench.relay.users == [BOB]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["uid"], line["user"]) for line in lines] == [("access-ended", *ALICE)] * 2
    assert bench.look() == [] and len(bench.server.ended) == 1


def test_g18_who_is_gone_does_too(bench: Bench) -> None:
    del bench.host.names["alice"]
    (told,) = bench.look()
    assert told.reason == bench.server.ended[0][2] == "you may no longer use vmshell here: the account alice is gone"


def test_d22_a_uid_that_is_another_accounts_now_keeps_nothing(bench: Bench) -> None:
    bench.host.names = {"dave": 1001, "bob": 1002}
    bench.host.groups["vmshell"].add("dave")
    (told,) = bench.look()
    assert (told.uid, told.label) == ALICE and bench.server.here == {BOB}


def test_g19_silence_revokes_nobody(bench: Bench) -> None:
    bench.host.groups, bench.host.names = {}, {}
    bench.host.silent = {"alice", 1001, "bob", 1002}
    assert bench.look() == [] and bench.server.ended == []


def test_g19_half_an_answer_revokes_only_who_was_found_to_be_a_member(bench: Bench) -> None:
    """Where a database never answers, the others are all there is; after a start in an outage they are not."""
    bench.host.half = True
    bench.host.groups["vmshell"].discard("alice")
    assert len(bench.look()) == 1 and len(bench.server.ended) == 1
    fresh = Bench()
    fresh.host.half = True
    fresh.host.groups = {}
    fresh.server.here = {ALICE}
    fresh.attach(BOB)
    assert fresh.relay.told == [] and fresh.server.ended == []


def test_root_loses_nothing(bench: Bench) -> None:
    bench.attach((0, "root"))
    assert bench.look() == []


def test_who_is_here_is_asked_about_once(bench: Bench) -> None:
    bench.host.names["carol"] = 1003
    bench.host.groups["vmshell"].add("carol")
    bench.attach(ALICE, (1003, "carol"))
    assert set(bench.host.present()) == {
        *(Question("user", user) for user in ("alice", "bob", "carol")),
        *(Question("uid", uid) for uid in (1001, 1002, 1003)),
    }


def test_the_relay_is_asked_only_where_there_are_consoles_and_again_when_it_was_away(bench: Bench) -> None:
    bench.host.groups["vmshell"].discard("alice")
    bench.relay.away = True
    assert bench.look() == []
    bench.relay.away = False
    assert [told.label for told in bench.look()] == ["alice"]
    bench.vm.state = messages.OFF  # how many there were is said no more when a VM has ended
    before = bench.relay.asked
    assert bench.look() == [] and bench.relay.asked == before
    assert set(bench.host.present()) == {Question("user", "bob")}


def test_g18_among_many_everybody_is_looked_at(bench: Bench) -> None:
    crowd = [(uid, f"user{uid}") for uid in range(2000, 2000 + 2 * ATTACHED_IN_PART)]
    bench.host.names |= {user: uid for uid, user in crowd}
    bench.host.groups["vmshell"] |= {user for _, user in crowd}
    bench.attach(*crowd)
    bench.host.groups["vmshell"].discard(crowd[-1][1])
    assert [(told.uid, told.label) for told in bench.look()] == crowd[-1:]


def test_a_part_of_the_longest_labels_fits_into_a_packet() -> None:
    for label in ("ß" * messages.LABEL_MAX, "\U00010348" * messages.LABEL_MAX, "€" * messages.LABEL_MAX):
        assert len(encode({"id": 1 << 40, "ok": {"users": [[messages.UID_MAX, label_of(label)]] * ATTACHED_IN_PART}})) <= 64 << 10


def test_a_label_is_what_the_relay_keeps_whole() -> None:
    assert label_of("alice") == "alice"
    assert label_of("ä" * 41) == "ä" * 40 and label_of("a" + "€" * 30) == "a" + "€" * 26
