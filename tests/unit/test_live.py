"""Changes of a VM that runs, and its boot's last orders: whatever relay, tapnet or disk say, everybody is answered."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fakes.parts import PartsWith
from vmshell import messages
from vmshell.broker.host.processes import Host
from vmshell.broker.lifecycle.start import Starter
from vmshell.broker.network.interfaces import Interface
from vmshell.broker.network.taps import Done as Made
from vmshell.broker.runtime.call import Call
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services.relay import Done
from vmshell.broker.vm.registry import Registry
from vmshell.broker.vm.vm import Vm
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.messages import OFF, QUEUED, RUNNING, STARTING, STOPPING, Order
from vmshell.model.definition import Definition, Nic
from vmshell.model.policy import parse
from vmshell.refusals import NetworkFailed, QemuSilent, RelayDown, StorageFailed, VmBusy

SILENT = QemuSilent(vm=1, what="it")


class Relay:
    """Keeps what it is told until the test answers, in order."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Any, Done]] = []

    def send(self, message: Any, done: Done, fds: tuple[int, ...] = ()) -> None:
        assert all(os.fstat(fd) for fd in fds)
        self.waiting.append((message, done))

    def orders(self) -> list[tuple[str, int]]:
        """The orders without an answer."""
        return [(message.what, message.value) for message, _ in self.waiting if isinstance(message, Order)]

    def answer(self, error: VmshellError | None = None) -> None:
        self.waiting.pop(0)[1](error)


class Network:
    """Keeps who wants a tap until the test has made it."""

    def __init__(self) -> None:
        self.asked: list[Made] = []
        self.removed: list[set[int]] = []
        self.ends = 0
        self.trouble: Exception | None = None

    def add(self, vm: Vm, index: int, done: Made) -> None:
        if self.trouble:
            raise self.trouble
        self.asked.append(done)

    def attach(self, vm: Vm, done: Made) -> None:
        self.add(vm, 0, done)

    def attached(self, vm: Vm) -> list[Interface]:
        return [Interface(index, nic, cast(Any, None), "06:01:00:00:00:01") for index, nic in enumerate(vm.definition.nics)]

    def remove(self, vm: Vm, indexes: set[int]) -> None:
        self.removed.append(indexes)

    def ended(self, vm: Vm) -> None:
        self.ends += 1

    def make(self, index: int) -> None:
        """Make the tap that was asked for first; it is the taker's to close."""
        self.asked.pop(0)(None, {index: os.open(os.devnull, os.O_RDWR)})


class Client:
    def __init__(self) -> None:
        self.pending = 9
        self.peer = None
        self.sent: list[dict[str, Any]] = []

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.sent.append(body)


class Bench:
    """A broker's parts around one VM without a process."""

    def __init__(self, folder: Path, state: str, *nics: Nic) -> None:
        layout = Layout(**{name: f"{folder}/{name}" for name in ("etc", "state", "run", "log")}, embedded=True)
        policy = parse("[defaults]\nnics_max = 4\n", "policy.toml", session=True)
        self.relay, self.network = Relay(), Network()
        loop, replaced = Loop(lambda exc: None), {"relay": self.relay, "network": self.network}
        self.parts = parts = PartsWith(layout, policy, loop, Host(embedded=True), **replaced)
        parts.attached.of = self.network.attached  # type: ignore[method-assign]
        parts.capabilities.known = True
        parts.registry.load()
        parts.registry.finish_creation(parts.registry.create(1000, "alice", Definition("web1", nics=nics)))
        (self.vm,) = parts.registry.of(1000)
        self.run = parts.runs.begin(self.vm, self.vm.definition)
        parts.registry.set_state(self.vm, state)

    def set(self, **words: str) -> list[dict[str, Any]]:
        """`set web1` with these words; what is answered, then or later."""
        return self._change(messages.Change(vm="web1", set={key.replace("_", "."): word for key, word in words.items()}))

    def unset(self, *keys: str) -> list[dict[str, Any]]:
        return self._change(messages.Change(vm="web1", unset=list(keys)))

    def _change(self, request: messages.Change) -> list[dict[str, Any]]:
        client = Client()
        call = Call(cast(Any, client), 1)
        call.guard(lambda: self.parts.handlers[messages.Change](call, request, self.vm))
        return client.sent

    def end(self) -> None:
        self.parts.runs.drop(self.run)
        self.parts.registry.set_state(self.vm, OFF)
        self.vm.booted = None


@pytest.fixture
def bench(short_tmp: Path) -> Bench:
    return Bench(short_tmp, RUNNING, Nic())


def held() -> int:
    """How many cables and overlays are open: all of them lead to /dev/null here."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own is gone by now
            found += os.readlink(f"/proc/self/fd/{fd}") == os.devnull
    return found


def only(answers: list[dict[str, Any]]) -> dict[str, Any]:
    (answer,) = answers
    return cast(dict[str, Any], answer.get("ok", answer.get("error")))


# --- cards that come --------------------------------------------------------------------------------------------------


def test_a_card_whose_link_is_down_comes_that_way(bench: Bench) -> None:
    before = held()
    answers = bench.set(net1="users", net1_link="down")
    bench.network.make(1)
    assert bench.relay.orders() == [("nic-add", 1)]
    bench.relay.answer()
    assert bench.relay.orders() == [("link-down", 1)] and answers == []
    bench.relay.answer()
    assert (only(answers)["now"], only(answers)["next_boot"], bench.vm.added) == (["net1"], [], {1})
    assert bench.vm.booted is not None and bench.vm.booted.nics == (Nic(), Nic(link="down"))
    assert bench.parts.registry.saved_booted(bench.vm).nics == bench.vm.booted.nics
    assert held() == before and bench.network.removed == []


def test_a_card_whose_link_cannot_be_down_leaves_again(bench: Bench) -> None:
    answers = bench.set(net1="users", net1_link="down")
    bench.network.make(1)
    bench.relay.answer()
    bench.relay.answer(SILENT)
    assert bench.relay.orders() == [("nic-remove", 1)] and bench.network.removed == [{1}]
    assert only(answers)["problems"] == [f"net1: {SILENT.sentence()}"] and only(answers)["now"] == []
    assert only(answers)["next_boot"] == ["net1"] and bench.vm.added == set()


def test_a_card_that_failed_is_tried_again_by_the_next_change(bench: Bench) -> None:
    first = bench.set(net1="users")
    bench.network.make(1)
    bench.relay.answer(RelayDown())
    assert only(first)["now"] == [] and bench.network.removed == [{1}]
    bench.relay.answer(RelayDown())  # of the order to take away what there may be
    second = bench.set(description="x")
    bench.network.make(1)
    bench.relay.answer()
    assert only(second)["now"] == ["net1"]


def test_a_vm_that_ends_while_its_tap_is_made_gets_no_card(bench: Bench) -> None:
    before = held()
    answers = bench.set(net1="users")
    bench.end()
    again = bench.parts.runs.begin(bench.vm, bench.vm.definition)
    bench.parts.registry.set_state(bench.vm, RUNNING)
    bench.network.make(1)
    assert bench.relay.orders() == [] and bench.network.removed == [] and held() == before, "its end took away what there was"
    assert only(answers)["problems"] == ["net1: web1 stopped before that was done: QEMU ended by itself"]
    assert again.vm.added == set() and only(answers)["next_boot"] == []


def test_the_answers_of_a_run_that_has_ended_are_not_believed_of_the_next(bench: Bench) -> None:
    answers = bench.set(net1="users", net0_link="down", console_log="false")
    bench.end()
    bench.parts.runs.begin(bench.vm, Definition("web1", nics=(Nic(),)))
    bench.parts.registry.set_state(bench.vm, RUNNING)
    bench.relay.answer()
    assert "stopped" in only(answers)["problems"][0] and only(answers)["now"] == [] and bench.relay.orders() == []
    assert bench.vm.booted == Definition("web1", nics=(Nic(),))


# --- one change at a time, and an answer to each ----------------------------------------------------------------------


def test_a_second_change_waits_until_the_vm_has_followed_the_first(bench: Bench) -> None:
    first = bench.set(net1="users")
    assert only(bench.unset("net1"))["text"] == VmBusy(vm="web1", state="being changed").sentence()
    bench.network.make(1)
    assert only(bench.set(net0_link="down"))["code"] == "vm-busy" and first == []
    bench.relay.answer()
    assert only(first)["now"] == ["net1"]
    third = bench.unset("net1")
    assert bench.relay.orders() == [("nic-remove", 1)]
    bench.relay.answer()
    assert only(third)["now"] == ["net1"] and bench.network.removed == [{1}] and bench.vm.added == set()


def test_two_changes_that_wait_for_the_host_are_one_and_a_refusal(bench: Bench) -> None:
    known: list[Any] = []
    bench.parts.capabilities.when_known = known.append  # type: ignore[method-assign,assignment]
    first, second = bench.set(net0_link="down"), bench.set(description="x")
    assert only(second)["code"] == "vm-busy" and first == []
    known.pop()()
    bench.relay.answer()
    assert only(first)["now"] == ["net0.link"] and not bench.vm.defining


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), NetworkFailed(problem="x"), ValueError("x")])
def test_trouble_with_a_cable_is_an_answer(bench: Bench, trouble: Exception) -> None:
    bench.network.trouble = trouble
    answers = bench.set(net1="users")
    assert only(answers)["now"] == [] and only(answers)["problems"][0].startswith("net1: ") and not bench.vm.defining


def test_trouble_on_the_way_to_the_relay_is_an_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = bench.set(net1="users")
    monkeypatch.setattr(bench.parts.attached, "of", lambda vm: [])
    before = held()
    bench.network.make(1)
    assert only(answers)["now"] == [] and not bench.vm.defining and bench.network.removed == [{1}]
    assert held() == before


def test_a_disk_that_is_full_when_the_guest_has_followed_is_an_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Registry, vm: Vm, state: str) -> None:
        raise StorageFailed(problem="the disk is full")

    answers = bench.set(net0_link="down")
    monkeypatch.setattr(Registry, "set_state", full)
    bench.relay.answer()
    assert "the disk is full" in only(answers)["problems"][0] and not bench.vm.defining


@pytest.mark.parametrize("step", ["normalized", "missing"])
def test_a_change_that_breaks_off_is_over(bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError(step)

    monkeypatch.setattr(bench.parts.validation, step, broken)
    answers = bench.set(description="x")
    assert only(answers)["code"] == "internal" and not bench.vm.defining


# --- before the first instruction -------------------------------------------------------------------------------------


def starting(folder: Path, *nics: Nic) -> tuple[Bench, Client]:
    bench, client = Bench(folder, STARTING, *nics), Client()
    bench.run.boots.append((Call(cast(Any, client), 1), False))
    bench.parts.events.heard(messages.Event(number=bench.vm.number, word="ready"))
    return bench, client


def test_no_guest_runs_with_a_cable_that_is_to_be_pulled(short_tmp: Path) -> None:
    bench, _ = starting(short_tmp, Nic(link="down"), Nic(), Nic(link="down"))
    for number in (0, 2):
        assert bench.relay.orders() == [("link-down", number)]
        bench.relay.answer()
    assert bench.relay.orders() == [("cont", 0)]


def test_a_boot_whose_cable_cannot_be_pulled_has_failed(short_tmp: Path) -> None:
    bench, client = starting(short_tmp, Nic(link="down"), Nic(link="down"))
    bench.relay.answer(SILENT)
    assert bench.relay.orders() == [] and bench.vm.state == "failed" and bench.network.ends == 1
    error = only(client.sent)
    assert error["code"] == "start-failed" and "link = down" in error["text"]


def test_a_relay_that_comes_back_pulls_the_cable_again(short_tmp: Path) -> None:
    bench, client = starting(short_tmp, Nic(link="down"))
    bench.relay.answer(RelayDown())
    assert bench.relay.orders() == [] and bench.vm.state == STARTING
    bench.parts.events.heard(messages.Event(number=bench.vm.number, word="ready"))
    bench.relay.answer()
    assert bench.relay.orders() == [("cont", 0)] and client.sent == []


def test_a_vm_killed_before_its_cable_was_pulled_does_not_run(short_tmp: Path) -> None:
    for error in (None, SILENT):
        bench, _ = starting(short_tmp / str(error), Nic(link="down"))
        bench.parts.registry.set_state(bench.vm, STOPPING)
        bench.relay.answer(error)
        assert bench.relay.orders() == [] and bench.vm.state == STOPPING


# --- what a boot that fails leaves ------------------------------------------------------------------------------------


def attach(bench: Bench) -> None:
    made = bench.parts.boots
    overlay = os.open(os.devnull, os.O_RDWR)
    try:
        made._step(bench.run, lambda run: made._attach_network(run, {0: overlay, 2: overlay}))
    finally:
        os.close(overlay)


@pytest.mark.parametrize("trouble", [OSError(28, "No space left on device"), NetworkFailed(problem="x")])
def test_a_boot_without_cables_keeps_no_overlays(short_tmp: Path, trouble: Exception) -> None:
    bench = Bench(short_tmp, QUEUED)
    bench.network.trouble = trouble
    before = held()
    attach(bench)
    assert held() == before and bench.vm.state == "failed" and bench.network.ends == 1


def test_a_boot_without_descriptors_left_keeps_none(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(short_tmp, QUEUED)
    before = held()
    real, calls = os.dup, []

    def scarce(fd: int) -> int:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(24, "Too many open files")
        return real(fd)

    monkeypatch.setattr(os, "dup", scarce)
    attach(bench)
    assert held() == before and len(calls) == 2 and bench.vm.state == "failed"


def test_cables_of_a_boot_that_was_killed_take_none_from_the_next(short_tmp: Path) -> None:
    """Its end has given back what there was to be: what tapnet has of this VM by now is the next run's."""
    bench, client = Bench(short_tmp, QUEUED), Client()
    before = held()
    attach(bench)
    bench.parts.stops.kill(Call(cast(Any, client), 1), bench.vm)
    assert bench.network.ends == 1 and only(client.sent)["state"] == OFF
    bench.run = bench.parts.runs.begin(bench.vm, bench.vm.definition)
    bench.parts.registry.set_state(bench.vm, QUEUED)
    attach(bench)
    bench.network.asked.pop(0)(NetworkFailed(problem="x"), {})
    assert bench.network.ends == 1 and bench.vm.state == QUEUED and len(bench.network.asked) == 1
    bench.parts.stops.kill(Call(cast(Any, client), 2), bench.vm)
    bench.network.make(0)
    assert bench.network.ends == 2 and held() == before


@pytest.mark.parametrize("trouble", [OSError(24, "Too many open files"), NetworkFailed(problem="x"), ValueError("x")])
def test_a_start_that_fails_leaves_no_cables(short_tmp: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception) -> None:
    def start(*arguments: object) -> None:
        raise trouble

    monkeypatch.setattr(Starter, "start", start)
    bench = Bench(short_tmp, QUEUED)
    before = held()
    attach(bench)
    bench.network.make(0)
    assert held() == before and bench.vm.state == "failed" and bench.network.ends == 1
