"""What a snapshot may be made of: a run whose interfaces are where the next boot puts them, or its memory never fits again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from tests.unit.test_live import Bench, Client, only
from vmshell import messages
from vmshell.broker.handlers import snapshots
from vmshell.broker.runtime.call import Call
from vmshell.messages import RUNNING
from vmshell.model.definition import Definition, Nic


@pytest.fixture
def bench(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """One with a disk that can hold snapshots, as far as they can see."""
    monkeypatch.setattr(snapshots, "writable_disks", lambda resolved: 1)
    return Bench(short_tmp, RUNNING, Nic())


def snapshot(bench: Bench, tag: str, *, delete: bool = False) -> list[dict[str, Any]]:
    client = Client()
    call = Call(cast(Any, client), 1)
    request = messages.Snapshot(vm="web1", tag=tag, delete=delete)
    call.guard(lambda: bench.parts.handlers[messages.Snapshot](call, request, bench.vm))
    return client.sent


def answered(bench: Bench, answers: list[dict[str, Any]], order: str) -> dict[str, Any]:
    assert [what for what, _ in bench.relay.orders()] == [order]
    bench.relay.answer()
    return only([answer for answer in answers if "progress" not in answer])


def test_an_interface_that_came_is_in_no_snapshot(bench: Bench) -> None:
    """Nothing is asked of QEMU; once the card has gone again, or after another boot, there is nothing against it."""
    assert answered(bench, snapshot(bench, "before"), "snapshot-save")["tag"] == "before"
    answers = bench.set(net1="users")
    bench.network.make(1)
    bench.relay.answer()
    assert only(answers)["now"] == ["net1"]
    refused = only(snapshot(bench, "with"))
    assert refused["code"] == "cannot-snapshot" and "interfaces came or went" in str(refused) and not bench.relay.orders()
    assert answered(bench, snapshot(bench, "before", delete=True), "snapshot-delete")["deleted"] is True
    answers = bench.unset("net1")
    bench.relay.answer()
    assert only(answers)["now"] == ["net1"]
    assert answered(bench, snapshot(bench, "after"), "snapshot-save")["tag"] == "after"


def test_nor_is_the_lack_of_an_interface_that_went(bench: Bench) -> None:
    """`pc` lets go of interfaces that it booted with; one that comes again takes the place of the one that went."""
    bench.vm.booted = bench.vm.definition = Definition("web1", machine="pc", nics=(Nic(),))
    answers = bench.unset("net0")
    bench.relay.answer()
    assert only(answers)["now"] == ["net0"]
    assert only(snapshot(bench, "without"))["code"] == "cannot-snapshot"
    answers = bench.set(net0="users")
    bench.network.make(0)
    bench.relay.answer()
    assert only(answers)["now"] == ["net0"]
    assert answered(bench, snapshot(bench, "again"), "snapshot-save")["tag"] == "again"
