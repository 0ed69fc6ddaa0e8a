"""Whose boot is next, and how long a guest keeps its place: with a clock and CPU times of the test's own."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmshell.broker.lifecycle import boot_queue
from vmshell.broker.lifecycle.boot_queue import BUSY_TIME_MAX, SAMPLE, SILENT_CPU, SILENT_TIME_MAX, TICK, BootQueue
from vmshell.broker.vm.objects import Store
from vmshell.broker.vm.vm import Vm
from vmshell.messages import QUEUED, RUNNING, STARTING
from vmshell.model.definition import Definition

ALICE, BOB, CAROL, DAVE, ROOT = 1000, 1001, 1002, 1003, 0
GIVEN_BACK = 2 * SAMPLE + 2 * TICK  # by then one whole sample lies in a guest's run


class World:
    """A loop that stands still until it is told how much time goes by, and guests that use so much of a core."""

    def __init__(self, places: int) -> None:
        self.now = 100.0
        self.crowd = 1.0  # so many want each CPU
        self.loads: dict[int, float] = {}  # by pid, which is the VM's number
        self.used: dict[int, float] = {}
        self.wanted: dict[int, float] = {}  # as if there were always a CPU for it
        self.started: list[str] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self.admission = BootQueue(cast(Any, self), places, lambda vm: vm.number)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self.now + seconds, next(self._order), action))

    def boot(self, uid: int, name: str, *, load: float = 1.0, starting: bool = False) -> Vm:
        """Ask for a boot of a silent guest, which runs as soon as it has its turn, or stays where it is *starting*."""
        vm = Vm(next(self._numbers), uid, f"u{uid}", Definition(name=name), 0, Store("/nowhere", name))
        vm.state = QUEUED

        def start() -> None:
            self.started.append(name)
            vm.state = STARTING if starting else RUNNING
            self.loads[vm.number] = load

        self.admission.enter(vm, start)
        return vm

    def end(self, vm: Vm) -> None:
        self.loads.pop(vm.number, None)
        self.admission.leave(vm)
        self.go_on(0)

    def go_on(self, seconds: float) -> None:
        until = self.now + seconds
        while self._timers and self._timers[0][0] <= until:
            due, _, action = heapq.heappop(self._timers)
            self._spend(due - self.now)
            action()
        self._spend(until - self.now)

    def _spend(self, seconds: float) -> None:
        self.now += seconds
        for number, load in self.loads.items():
            self.used[number] = self.used.get(number, 0.0) + load * seconds / self.crowd
            self.wanted[number] = self.wanted.get(number, 0.0) + load * seconds


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    def made(places: int) -> World:
        new = World(places)
        monkeypatch.setattr(boot_queue, "time", SimpleNamespace(monotonic=lambda: new.now))
        monkeypatch.setattr(boot_queue, "cpu_seconds", lambda pid: new.used.get(pid, 0.0))
        monkeypatch.setattr(boot_queue, "cpu_demand", lambda pid: new.wanted.get(pid, 0.0))
        return new

    return made


# --- turns ------------------------------------------------------------------------------------------------------------


def test_fifty_boots_of_one_user_stand_before_nobody_elses_first(world: Callable[[int], World]) -> None:
    """F15: nor before root's, who is a user like the others here."""
    host = world(2)
    alices = [host.boot(ALICE, f"a{index}") for index in range(50)]
    assert host.started == ["a0", "a1"]
    host.boot(BOB, "b0")
    assert host.started == ["a0", "a1", "b0"], "bob's first one does not wait for any of hers"
    waiting = [host.boot(CAROL, "c0"), host.boot(ROOT, "r0")]
    assert host.started == ["a0", "a1", "b0"], "as many users boot as there are places"
    assert [host.admission.ahead(vm) for vm in waiting] == [3, 4]
    for vm in alices[:3]:
        host.end(vm)
    assert host.started == ["a0", "a1", "b0", "a2", "c0"], "one turn of hers, and it is the others'"


def test_turns_go_round_by_user_and_what_is_said_to_be_ahead_boots_before(world: Callable[[int], World]) -> None:
    host = world(1)
    booting = [host.boot(uid, f"u{uid}") for uid in (DAVE, ROOT)]
    assert len(host.started) == 2, "two users boot at a time, also with one place"
    counts = {ALICE: 5, BOB: 1, CAROL: 3}
    vms = {vm.name: vm for uid, count in counts.items() for index in range(count) for vm in [host.boot(uid, f"{uid}-{index}")]}
    order = ["1000-0", "1001-0", "1002-0", "1000-1", "1002-1", "1000-2", "1002-2", "1000-3", "1000-4"]
    assert [host.admission.ahead(vms[name]) for name in order] == [len(booting) + index for index in range(len(order))]
    for index in range(len(order) + len(booting)):
        host.end(booting[index])
        booting += [vms[name] for name in host.started[len(booting) :]]
    assert host.started[2:] == order


def test_one_user_alone_has_every_place(world: Callable[[int], World]) -> None:
    host = world(4)
    for index in range(6):
        host.boot(ALICE, f"a{index}")
    assert len(host.started) == 4


def test_what_is_beyond_the_places_is_bounded_and_paid_back(world: Callable[[int], World]) -> None:
    host = world(4)
    alices = [host.boot(ALICE, f"a{index}") for index in range(8)]
    others = [host.boot(uid, f"u{uid}") for uid in range(2000, 2020)]
    assert len(host.started) == 4 + 3, "four users boot"
    for vm in alices[:3]:
        host.end(vm)
    assert len(host.started) == 7, "four guests boot, and there are four places"
    host.end(others[0])
    assert host.started[7:] == ["u2003"]


def test_who_leaves_the_queue_is_before_nobody(world: Callable[[int], World]) -> None:
    host = world(2)
    first, second, third, fourth = (host.boot(ALICE, f"a{index}") for index in range(4))
    assert host.admission.ahead(fourth) == 3
    host.end(third)
    assert host.admission.ahead(fourth) == 2 and not host.admission.queued(third)
    host.end(fourth)
    host.end(first)
    host.end(second)
    assert host.started == ["a0", "a1"] and host.admission._queues == {}


# --- places -----------------------------------------------------------------------------------------------------------


def test_a_silent_idle_guest_gives_its_place_back_after_a_sample(world: Callable[[int], World]) -> None:
    host = world(2)
    for index in range(4):
        host.boot(ALICE, f"a{index}", load=0.0)
    host.go_on(SAMPLE)
    assert len(host.started) == 2, "before a whole sample nothing is known"
    host.go_on(GIVEN_BACK - SAMPLE)
    assert len(host.started) == 4
    host.go_on(GIVEN_BACK)
    host.boot(ALICE, "a4")
    assert len(host.started) == 5


def test_a_guest_that_does_not_run_yet_is_not_idle(world: Callable[[int], World]) -> None:
    host = world(1)
    vm = host.boot(ALICE, "a0", load=0.0, starting=True)
    host.boot(ALICE, "a1")
    host.go_on(10)
    assert host.started == ["a0"]
    vm.state = RUNNING
    host.go_on(GIVEN_BACK)
    assert host.started == ["a0", "a1"]


@pytest.mark.parametrize(("spoke", "load", "started"), [(False, 1.0, 1), (False, 0.1, 2), (True, 1.0, 2)])
def test_on_a_busy_host_a_silent_guest_that_waits_for_a_cpu_is_not_idle(
    world: Callable[[int], World], spoke: bool, load: float, started: int
) -> None:
    host = world(1)
    host.crowd = 20.0
    vm = host.boot(ALICE, "a0", load=load)
    vm.seen_output = spoke
    host.boot(ALICE, "a1")
    host.go_on(GIVEN_BACK)
    assert len(host.started) == started


def test_a_start_that_takes_for_ever_keeps_no_place(world: Callable[[int], World]) -> None:
    host = world(1)
    host.boot(ALICE, "a0", load=0.0, starting=True)
    host.boot(ALICE, "a1")
    host.go_on(SILENT_TIME_MAX + 2 * TICK)
    assert host.started == ["a0", "a1"]


@pytest.mark.parametrize(("load", "seconds"), [(1.0, SILENT_CPU), (0.5, 2 * SILENT_CPU), (0.2, SILENT_TIME_MAX)])
def test_a_silent_busy_guest_keeps_its_place_for_so_much_cpu(world: Callable[[int], World], load: float, seconds: float) -> None:
    host = world(1)
    vm = host.boot(ALICE, "a0", load=load)
    host.boot(ALICE, "a1")
    host.go_on(seconds - SAMPLE)
    assert host.started == ["a0"]
    host.go_on(2 * SAMPLE + TICK)
    assert host.started == ["a0", "a1"]
    host.go_on(200)
    assert vm.note.startswith("silent: ")
    vm.seen_output = True
    host.go_on(2)
    assert vm.note == ""


def test_four_silent_busy_guests_of_one_user_slow_anothers_boot_by_less_than_two(world: Callable[[int], World]) -> None:
    """On two cores: never more than two of hers beside his, until hers have had their time; then one that waited beside each."""
    host = world(2)
    for index in range(4):
        host.boot(ALICE, f"a{index}")
    host.boot(BOB, "b0")
    assert host.started == ["a0", "a1", "b0"]
    host.go_on(SILENT_CPU - 2 * SAMPLE)
    assert host.started == ["a0", "a1", "b0"]


def test_a_guest_that_has_printed_keeps_its_place_until_it_is_idle_or_its_time_is_over(world: Callable[[int], World]) -> None:
    host = world(1)
    vm = host.boot(ALICE, "a0")
    vm.seen_output = True
    host.boot(ALICE, "a1")
    host.go_on(BUSY_TIME_MAX / 2)
    assert host.started == ["a0"]
    host.loads[vm.number] = 0.01
    host.go_on(2 * SAMPLE)
    assert host.started == ["a0", "a1"]
    host.boot(ALICE, "a2")
    host.go_on(BUSY_TIME_MAX + SILENT_CPU)
    assert host.started == ["a0", "a1", "a2"]
