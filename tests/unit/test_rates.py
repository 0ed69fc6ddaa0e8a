"""How often a user may ask for what others pay for, with a clock of the test's own; and what every verb counts as."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.costs import ALICE, ROOT, Bench
from tests.unit.test_costs import plain
from vmshell.broker.api import dispatch, rates
from vmshell.broker.api.rates import BOOTS, CHANGES, CONNECTIONS, CONSOLES, FORGET_AT, MINUTE, Rate, Rates
from vmshell.broker.runtime.call import Peer
from vmshell.messages import REQUESTS, Request
from vmshell.model.limits import LIMIT_KEYS, Limits
from vmshell.model.policy import parse
from vmshell.refusals import EX_BUSY, TooFast

BOB = Peer(1001, "bob", admin=False)
EVERY = (CHANGES, BOOTS, CONSOLES, CONNECTIONS)
POLICY = "[defaults]\nchanges_per_minute = 60\nboots_per_minute = 0\n[user.bob]\nchanges_per_minute = 6\n"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(rates, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def of(text: str) -> Rates:
    policy = parse(text, "policy.toml")
    return Rates(lambda user: policy.effective(user, ()))


def taken(made: Rates, peer: Peer, rate: Rate, asked: int = 1000) -> int:
    """How many of *asked* are let through."""
    count = 0
    for _ in range(asked):
        try:
            made.take(peer, rate)
            count += 1
        except TooFast:
            continue
    return count


def test_a_minutes_worth_at_once_and_as_much_again_each_minute(clock: SimpleNamespace) -> None:
    """F15: what is refused costs nothing, and whoever keeps asking is not put off for longer."""
    made = of(POLICY)
    assert taken(made, ALICE, CHANGES) == 60
    clock.now += 1
    assert taken(made, ALICE, CHANGES) == 1
    for _ in range(20):
        clock.now += 0.5
        taken(made, ALICE, CHANGES)
    clock.now += 30
    assert taken(made, ALICE, CHANGES) == 30
    clock.now += 10 * MINUTE
    assert taken(made, ALICE, CHANGES) == 60


def test_the_refusal_says_rule_number_and_when_to_try_again(clock: SimpleNamespace) -> None:
    made = of(POLICY)
    assert taken(made, BOB, CHANGES) == 6
    clock.now += 2
    with pytest.raises(TooFast) as caught:
        made.take(BOB, CHANGES)
    assert caught.value.sentence() == "that is more than 6 changes a minute (changes_per_minute in [user.bob])"
    assert (caught.value.advice(), caught.value.exit_status) == ("try again in 8 s", EX_BUSY)
    clock.now += 8
    made.take(BOB, CHANGES)


def test_one_users_rate_is_nothing_to_another_nor_to_another_rate(clock: SimpleNamespace) -> None:
    made = of(POLICY)
    assert taken(made, ALICE, CHANGES) == 60
    assert taken(made, BOB, CHANGES) == 6
    assert taken(made, ALICE, CONSOLES) == Limits().consoles_per_minute


def test_no_limit_and_administrators_are_not_counted(clock: SimpleNamespace) -> None:
    made = of(POLICY)
    assert taken(made, ALICE, BOOTS) == 1000
    assert taken(made, ROOT, CHANGES) == 1000
    assert made._left == {}


def test_a_policy_that_is_loaded_holds_at_once(clock: SimpleNamespace) -> None:
    limits = {"now": parse(POLICY, "policy.toml")}
    made = Rates(lambda user: limits["now"].effective(user, ()))
    assert taken(made, ALICE, CHANGES, 30) == 30
    limits["now"] = parse("[defaults]\nchanges_per_minute = 6\n", "policy.toml")
    assert taken(made, ALICE, CHANGES) == 6
    limits["now"] = parse(POLICY, "policy.toml")
    clock.now += MINUTE
    assert taken(made, ALICE, CHANGES) == 60


def test_who_asks_no_more_is_forgotten(clock: SimpleNamespace) -> None:
    """F14: what is kept is bounded by who asked in the last minute, however many have ever asked."""
    made = of(POLICY)
    for uid in range(10_000):
        made.take(Peer(uid, f"u{uid}", admin=False), CHANGES)
        clock.now += 1
        assert len(made._left) <= max(FORGET_AT, 2 * MINUTE) + 1


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_verb_has_a_rate_or_says_that_it_needs_none(bench: Bench) -> None:
    """Both tables name every verb once: what is not in them was forgotten."""
    assert set(dispatch.RATES) == set(bench.parts.handlers)
    assert set(dispatch.RATES) == set(REQUESTS.values())
    tree = ast.parse(Path(dispatch.__file__).read_text(encoding="utf-8"))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "RATES")
    assert isinstance(table, ast.Dict) and len(table.keys) == len(dispatch.RATES), "none stands there twice"


def test_every_rate_is_a_limit_of_the_policy() -> None:
    assert {rate for rate in dispatch.RATES.values() if rate} == set(EVERY)
    for rate in EVERY:
        assert getattr(Limits(), rate.key) > 0 and LIMIT_KEYS[rate.key].help.endswith("; 0: no limit")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(tmp_path)
    monkeypatch.setattr(made.server, "_rates", of("[defaults]\n" + "".join(f"{rate.key} = 1\n" for rate in EVERY)))
    yield made
    made.close()


@pytest.mark.parametrize("kind", [kind for kind, rate in dispatch.RATES.items() if rate], ids=lambda kind: kind.verb)
def test_what_has_a_rate_is_refused_when_it_is_used_up(bench: Bench, kind: type[Request]) -> None:
    """F15: by the code that answers; whatever became of the first one."""
    rate = dispatch.RATES[kind]
    assert rate
    first, second = bench.ask(plain(kind)), bench.ask(plain(kind, vm="run1"))
    assert not any(answer.get("error", {}).get("code") == "too-fast" for answer in first)
    (answer,) = second
    assert answer["error"]["code"] == "too-fast" and rate.key in answer["error"]["text"]


@pytest.mark.parametrize("kind", [kind for kind, rate in dispatch.RATES.items() if not rate], ids=lambda kind: kind.verb)
def test_what_has_none_may_be_asked_at_any_time(bench: Bench, kind: type[Request]) -> None:
    for rate in EVERY:
        taken(bench.server._rates, ALICE, rate)
    for _ in range(3):
        assert not any(answer.get("error", {}).get("code") == "too-fast" for answer in bench.ask(plain(kind)))
