"""Requests that take long have their turns by user: what others wait for is one of each, however many there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmshell.broker.api.turns import Turns
from vmshell.broker.runtime.loop import Loop

ALICE, BOB = 1000, 1001


def raised(exc: BaseException) -> None:
    raise exc


@pytest.fixture
def loop() -> Loop:
    return Loop(raised)


def go_round(loop: Loop) -> None:
    """One turn of the loop, at the end of which whatever is due is done."""
    loop.after(0, loop.stop)
    loop.run()


def test_one_request_of_each_user_in_a_turn_of_the_loop(loop: Loop) -> None:
    """F15: fifty of one user's are fifty turns, in each of which everybody's packets are read and another's has its turn."""
    turns, done = Turns(loop), list[str]()

    def asks(name: str) -> Callable[[], None]:
        return lambda: done.append(name)

    for index in range(50):
        turns.enter(ALICE, asks(f"a{index}"))
    go_round(loop)
    assert done == ["a0"]
    for index in range(2):
        turns.enter(BOB, asks(f"b{index}"))
    go_round(loop)
    assert done == ["a0", "a1", "b0"]
    go_round(loop)
    assert done == ["a0", "a1", "b0", "a2", "b1"]
    for _ in range(60):
        go_round(loop)
    assert [name for name in done if name[0] == "a"] == [f"a{index}" for index in range(50)]
    assert turns._waiting == {}


def test_what_a_request_brings_about_has_a_turn_of_its_own(loop: Loop) -> None:
    turns, done = Turns(loop), list[str]()

    def first() -> None:
        done.append("first")
        turns.enter(ALICE, lambda: done.append("second"))

    turns.enter(ALICE, first)
    go_round(loop)
    assert done == ["first"]
    go_round(loop)
    assert done == ["first", "second"]


def test_an_idle_loop_has_no_timer(loop: Loop) -> None:
    turns = Turns(loop)
    turns.enter(ALICE, lambda: None)
    go_round(loop)
    assert loop._wait() is None
