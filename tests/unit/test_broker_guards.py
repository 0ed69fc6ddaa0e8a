"""What keeps the broker whole: nothing grows or stays open because a peer, the relay or the disk does the unexpected."""

from __future__ import annotations

import fcntl
import gc
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmshell.broker.composition import Parts
from vmshell.broker.host import processes as host_module
from vmshell.broker.host.processes import Host
from vmshell.broker.lifecycle import removal, start, stop
from vmshell.broker.lifecycle.boot_queue import BootQueue
from vmshell.broker.lifecycle.runs import Run, Runs
from vmshell.broker.lifecycle.start import Starter
from vmshell.broker.lifecycle.stop import Stops
from vmshell.broker.runtime.call import Call
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services import connection as link_module
from vmshell.broker.services.relay import Relay
from vmshell.broker.vm.objects import Store
from vmshell.broker.vm.registry import Registry
from vmshell.broker.vm.vm import Vm
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.messages import FAILED, OFF, QUEUED, RUNNING, STOPPING, Forget, Order
from vmshell.model.definition import Definition
from vmshell.model.policy import Policy
from vmshell.numbering import NUMBER_MAX
from vmshell.refusals import NotWatched, StorageFailed, TooManyRequests


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}/r", log=f"{tmp_path}/l", embedded=False)


@pytest.fixture
def loop() -> Iterator[Loop]:
    def raised(exc: BaseException) -> None:
        raise exc

    yield Loop(raised)


@pytest.fixture
def parts(layout: Layout, loop: Loop) -> Parts:
    """All of a broker, without a client."""
    made = Parts(layout, Policy(), loop, Host(embedded=True))
    made.addresses.load()
    made.capabilities.known = True
    made.registry.load()
    return made


def defined(parts: Parts, name: str) -> Vm:
    vm = parts.registry.create(1000, "alice", Definition(name=name))
    parts.registry.finish_creation(vm)
    return vm


def turn(loop: Loop, done: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not done():
        assert time.monotonic() < until
        loop.after(0.01, loop.stop)
        loop.run()


def open_fds() -> list[str]:
    gc.collect()  # what a test before this one has dropped closes now, and not in between
    return sorted(os.listdir("/proc/self/fd"))


def due(loop: Loop) -> int:
    """How many timers still have something to do."""
    return sum(1 for _, _, timer in loop._timers if timer.action is not None)


# --- descriptors ------------------------------------------------------------------------------------------------------


class FakeClient:
    def __init__(self) -> None:
        self.pending = 1
        self.peer: Any = None
        self.sent: list[tuple[dict[str, object], tuple[int, ...]]] = []

    def send(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        self.sent.append((body, fds))

    def call(self) -> Call:
        return Call(cast(Any, self), 1)

    def answers(self) -> list[object]:
        """How each answer went: the error's code, or what is said of the VM."""
        bodies = [cast(dict[str, Any], body) for body, _ in self.sent]
        return [body["error"]["code"] if "error" in body else body["ok"]["state"] for body in bodies if "progress" not in body]


def test_a_console_that_comes_after_the_reply_is_closed() -> None:
    """The relay came back while a VM booted: its `running` overtakes the console asked for anew."""
    client = FakeClient()
    call = Call(cast(Any, client), 1)
    before = open_fds()
    call.keep_fds(os.pipe())
    call.reply({})
    call.keep_fds(os.pipe())
    call.fail(TooManyRequests(count=1, what="x", limit=1))
    assert open_fds() == before
    assert [body for body, _ in client.sent] == [{"id": 1, "ok": {}}]
    assert client.pending == 0


class QuietRelay:
    """Keeps what it is handed until it is to answer."""

    def __init__(self) -> None:
        self.done: list[Callable[[VmshellError | None], None]] = []

    def send(self, message: object, done: Callable[[VmshellError | None], None], fds: tuple[int, ...] = ()) -> None:
        self.done.append(done)


@pytest.mark.parametrize("left", [0, 1])
def test_a_console_without_descriptors_left_leaks_none(parts: Parts, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    vm, client, relay = defined(parts, "web1"), FakeClient(), QuietRelay()
    client.peer = SimpleNamespace(uid=1001, label="alice")
    monkeypatch.setattr(parts.relay, "send", relay.send)
    vm.state = RUNNING
    real, made = os.pipe2, 0

    def scarce(flags: int) -> tuple[int, int]:
        nonlocal made
        made += 1
        if made > left:
            raise OSError(24, "Too many open files")
        return real(flags)

    before = open_fds()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", scarce)
        parts.consoles.console(client.call(), vm, readonly=False, replay=True)
    assert client.answers() == ["relay-down"] and relay.done == [] and open_fds() == before
    # A relay that refuses, and a viewer that has gone by the time of its answer.
    for error in (NotWatched(vm=1), None):
        call = client.call()
        parts.consoles.console(call, vm, readonly=False, replay=True)
        if error is None:
            call.fail(NotWatched(vm=1))
        relay.done.pop()(error)
        assert open_fds() == before


def test_a_start_without_descriptors_left_leaks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.fcntl, []

    def scarce(fd: int, command: int, *rest: int) -> int:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(24, "Too many open files")
        return int(real(fd, command, *rest))

    host = Host(embedded=True)
    monkeypatch.setattr(fcntl, "fcntl", scarce)
    before = open_fds()
    with pytest.raises(OSError, match="Too many"):
        host.spawn(["true"], {})
    assert open_fds() == before


@pytest.mark.parametrize("trouble", ["pipe2", "build", "launch"])
def test_a_start_that_fails_leaves_no_descriptor(
    layout: Layout, loop: Loop, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """What opens the jail's barrier is there before the jail, and closes with everything else."""

    def fails(*arguments: object, **options: object) -> Any:
        raise RuntimeError(trouble)

    launcher: Any = SimpleNamespace(launch=lambda *arguments: None)
    plans: Any = SimpleNamespace(build=lambda *arguments, **more: {})
    starter = Starter(loop=loop, host=Host(embedded=True), layout=layout, launcher=launcher, plans=plans)
    monkeypatch.setattr({"pipe2": os, "build": plans, "launch": launcher}[trouble], trouble, fails)
    os.makedirs(layout.vm_run(1))
    run = Run(Vm(1, 1000, "alice", Definition(name="web1"), 0, Store("/nowhere", "web1")))
    before = open_fds()
    with pytest.raises(RuntimeError, match=trouble):
        starter.start(run, cast(Any, None), {}, {}, lambda *arguments: None)
    assert open_fds() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_the_relay_gets_in_by_its_group_and_not_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account with uid 64990 and group 64991: group 64990 may be somebody else's."""
    accounts = tmp_path / "passwd"
    accounts.write_text("root:x:0:0:root:/root:/bin/bash\nvmshell-relay:x:64990:64991::/:/usr/sbin/nologin\n")
    monkeypatch.setattr(host_module, "ACCOUNTS_FILE", str(accounts))
    Host(embedded=False).share_with_relay(str(tmp_path), 0o750)
    status = tmp_path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (0, 64991, 0o750)


# --- the relay is away ------------------------------------------------------------------------------------------------


def test_requests_that_meet_no_relay_leave_one_timer(layout: Layout, loop: Loop) -> None:
    link = Relay(loop, cast(Any, None), layout, lambda event: None, lambda: None)
    errors: list[VmshellError | None] = []
    for _ in range(50):
        link.send(Order(number=1, what="reset"), errors.append)
    assert [error.code for error in errors if error] == ["relay-down"] * 50
    assert due(loop) == 1
    link.connect()
    assert due(loop) == 1
    assert link._again_after <= link_module._AGAIN_MOST


# --- the end of a VM --------------------------------------------------------------------------------------------------


class Waiter:
    """Stands for a Call: what it was told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def reply(self, ok: dict[str, object]) -> None:
        self.told.append(ok["state"])

    def fail(self, error: VmshellError) -> None:
        self.told.append(error.code)

    def progress(self, sentence: str) -> None:
        pass


class Sick(Registry):
    """A registry whose disk is full from now on."""

    def set_state(self, vm: Vm, state: str) -> None:
        if state not in (OFF, FAILED):
            raise StorageFailed(problem="the disk is full")
        super().set_state(vm, state)

    def save(self, vm: Vm) -> None:
        raise StorageFailed(problem="the disk is full")


class Bench:
    """The run table and stops around one running VM without a process; the relay only counts."""

    def __init__(self, layout: Layout, loop: Loop, registry: Registry) -> None:
        self.sent: list[Any] = []
        self.again: list[tuple[Vm, list[Any]]] = []
        self.killed: list[int] = []
        relay: Any = SimpleNamespace(send=lambda message, done, fds=(): self.sent.append(message))
        launcher: Any = SimpleNamespace(kill=self.killed.append, terminate=lambda number: None)
        self.runs = Runs(loop=loop, layout=layout, registry=registry, launcher=launcher, relay=relay, log_max=1 << 20)
        self.stops = Stops(
            loop=loop,
            registry=registry,
            relay=relay,
            runs=self.runs,
            queue=BootQueue(loop, 1, lambda vm: 0),
            network=cast(Any, SimpleNamespace(ended=lambda vm: None)),
            removal=cast(Any, None),
            boot_again=lambda vm, waiting: self.again.append((vm, waiting)),
        )
        self.vm = Vm(1, 1000, "alice", Definition(name="web1", image="demo"), 0, Store("/nowhere", "web1"))
        self.vm.state = RUNNING
        self.run = self.runs.add(Run(self.vm))

    def shutdown(self, timeout: int = 3600) -> Waiter:
        waiter = Waiter()
        self.stops.shutdown(cast(Any, waiter), self.vm, force=False, timeout=timeout)
        return waiter

    def reboot(self) -> Waiter:
        waiter = Waiter()
        self.stops.reboot(cast(Any, waiter), self.vm)
        return waiter


def test_asking_for_a_shutdown_over_and_over_stays_bounded(layout: Layout, loop: Loop) -> None:
    """F14: a client that asks, hangs up and asks again holds a limited number of calls and timers, and one power button."""
    bench = Bench(layout, loop, Registry(layout))
    waiters = [bench.shutdown() for _ in range(stop.WAITERS_MAX)]
    with pytest.raises(TooManyRequests):
        bench.shutdown()
    with pytest.raises(TooManyRequests):
        bench.reboot()
    assert due(loop) == stop.WAITERS_MAX + 1
    before = len(bench.sent)
    assert bench.run.button is not None
    assert bench.run.button.action is not None
    bench.run.button.action()
    assert len(bench.sent) == before + 1
    bench.stops.kill(cast(Any, Waiter()), bench.vm)  # the plug is there for everyone, always
    bench.stops._finish(bench.run)
    assert {told for waiter in waiters for told in waiter.told} == {"off"}
    assert due(loop) == 0


def test_a_shutdown_that_gave_up_does_not_take_a_reboot_with_it(layout: Layout, loop: Loop) -> None:
    bench = Bench(layout, loop, Registry(layout))
    rebooter, impatient = bench.reboot(), bench.shutdown(timeout=1)
    too_long = bench.run.patience[-1].action
    assert too_long is not None
    too_long()
    assert impatient.told == ["timed-out"]
    assert bench.run.asked == "reboot"
    assert rebooter.told == []


@pytest.mark.parametrize("how", ["kill", "reboot"])
def test_a_full_disk_keeps_no_plug_in_and_nobody_waiting(layout: Layout, loop: Loop, how: str) -> None:
    bench = Bench(layout, loop, Sick(layout))
    waiter = Waiter()
    if how == "kill":
        bench.stops.kill(cast(Any, waiter), bench.vm)
        assert bench.vm.state == STOPPING and bench.killed == [1]
    else:
        waiter = bench.reboot()
    bench.stops._finish(bench.run)
    assert waiter.told == ([OFF] if how == "kill" else [])  # who waits for a reboot is handed on with it
    assert len(bench.again) == (how == "reboot")
    assert bench.vm.state == OFF
    assert len(bench.runs) == 0


def test_a_reboot_begins_a_new_run(layout: Layout, loop: Loop) -> None:
    os.makedirs(layout.run)
    registry = Registry(layout)
    registry.save = lambda vm: None  # type: ignore[method-assign]
    bench = Bench(layout, loop, registry)
    waiter = bench.reboot()
    bench.stops._finish(bench.run)
    ((vm, waiting),) = bench.again
    assert (vm, vm.state) == (bench.vm, OFF)
    assert [call for call, _ in waiting] == [cast(Any, waiter)]
    assert waiter.told == []


def test_three_hundred_boots_that_fail_at_once_do_so_one_after_the_other(loop: Loop) -> None:
    admission = BootQueue(loop, 1, lambda vm: 0)
    store = Store("/nowhere", "web1")
    vms = [Vm(number, 1000, "alice", Definition(name="web1", image="demo"), 0, store) for number in range(1, 301)]
    failed: list[int] = []

    def fail(vm: Vm) -> None:
        failed.append(vm.number)
        admission.leave(vm)
        if vm is vms[-1]:
            loop.stop()

    admission.enter(vms[0], lambda: None)
    for vm in vms[1:]:
        admission.enter(vm, lambda vm=vm: fail(vm))  # type: ignore[misc]
    assert failed == []
    admission.leave(vms[0])
    loop.run()
    assert failed == list(range(2, 301))


@pytest.mark.parametrize("step", ["image check", "overlay"])
def test_the_late_failure_of_a_killed_boot_is_nothing_to_the_next_one(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """What it waited for fails when the VM is in its next run: that one goes on, and each caller has one answer."""
    fail: list[Callable[[VmshellError], None]] = []
    if step == "image check":
        monkeypatch.setattr(parts.images, "when_verified", lambda images, done: fail.append(done))
    else:
        monkeypatch.setattr(parts.overlays, "make", lambda resolved, done: fail.append(lambda error: done(error, {})))
    vm = defined(parts, "web1")
    first, killer, second = FakeClient(), FakeClient(), FakeClient()
    parts.boots.boot(first.call(), vm, console=False)
    parts.stops.kill(killer.call(), vm)
    assert (first.answers(), killer.answers(), len(fail)) == (["vm-stopped"], ["off"], 1)
    parts.boots.boot(second.call(), vm, console=False)
    turn(parts.loop, lambda: len(fail) == 2)
    run = parts.runs.get(vm.number)
    fail[0](StorageFailed(problem="the disk is full"))
    assert parts.runs.get(vm.number) is run and vm.state == QUEUED and os.path.exists(parts.layout.vm_run(vm.number))
    assert second.answers() == []
    fail[1](StorageFailed(problem="the disk is full"))
    assert parts.runs.get(vm.number) is None and vm.state == FAILED
    assert (first.answers(), killer.answers(), second.answers()) == (["vm-stopped"], ["off"], ["storage"])


def test_a_run_that_was_ended_ends_no_other(layout: Layout, loop: Loop) -> None:
    bench = Bench(layout, loop, Registry(layout))
    os.makedirs(layout.vm_run(bench.vm.number))
    present = bench.runs.add(Run(bench.vm))
    bench.stops.end_now(bench.run)
    assert bench.runs.get(bench.vm.number) is present and bench.vm.state == RUNNING
    assert os.path.exists(layout.vm_run(bench.vm.number))


# --- removing ---------------------------------------------------------------------------------------------------------


def address(parts: Parts, number: int) -> int | None:
    """The address of VM *number*'s first interface, by its number in the one segment that there is."""
    return parts.addresses.known_host(0, number, 0)


def test_rm_makes_room_on_a_full_disk(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """To write down that an address is free takes room, too: it comes after the disks, and is tried until it is written."""

    def full(number: int) -> None:
        raise StorageFailed(problem="the disk is full")

    sent: list[Any] = []
    monkeypatch.setattr(parts.relay, "send", lambda message, done, fds=(): sent.append(message))
    monkeypatch.setattr(removal, "DELETE_AGAIN", 0.3)
    vm = defined(parts, "web1")
    parts.addresses.host("users", parts.addresses.segment("users", (1000, "alice"), subnet=True), vm.number, 0)
    Path(vm.store.folder, "root").write_bytes(b"a disk")
    aside = f"{parts.layout.vms}/1000/.rm-{vm.number}"
    with monkeypatch.context() as trouble:
        trouble.setattr(parts.addresses, "release", full)
        parts.removal.remove(vm)
        turn(parts.loop, lambda: not os.path.exists(f"{aside}/disks"))
    assert [(type(message), message.number, message.purge) for message in sent] == [(Forget, vm.number, True)]
    assert list(parts.registry) == [] and address(parts, vm.number) is not None
    assert os.path.exists(aside), "a broker after this one would not know whose address it is"
    turn(parts.loop, lambda: not os.path.exists(aside))
    assert address(parts, vm.number) is None


def test_what_a_killed_broker_has_not_given_back_the_next_one_does(layout: Layout, parts: Parts, loop: Loop) -> None:
    gone, stays = defined(parts, "web1"), defined(parts, "web2")
    for vm in (gone, stays):
        parts.addresses.host("users", parts.addresses.segment("users", (1000, "alice"), subnet=True), vm.number, 0)
    parts.registry.set_aside(gone)
    os.makedirs(f"{layout.vms}/1000/.rm-{stays.number}")  # what could not be deleted of one that had its number before
    os.makedirs(f"{layout.vms}/1000/.rm-x")
    second = Parts(layout, Policy(), loop, Host(embedded=True))
    leftovers = second.registry.load()
    second.addresses.load()
    for folder in leftovers:
        second.removal.delete_later(folder)
    assert len(leftovers) == 3 and address(second, gone.number) is None and address(second, stays.number) is not None
    turn(loop, lambda: os.listdir(f"{layout.vms}/1000") == ["web2"])


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_begin_anew_behind_the_last_one(layout: Layout) -> None:
    """Making and removing VMs is free for everybody; using up all numbers must not be."""
    registry = Registry(layout)
    registry.load()
    made = [registry.create(1000, "alice", Definition(name=name, image="demo")) for name in ("a", "b")]
    Path(layout.vms, "next").write_text(f"{NUMBER_MAX}\n")
    registry._next = registry._read_next()
    made += [registry.create(1000, "alice", Definition(name=name, image="demo")) for name in ("c", "d")]
    assert [vm.number for vm in made] == [1, 2, NUMBER_MAX, 3]
    assert registry._read_next() == 4


@pytest.mark.parametrize(("text", "number"), [("-5", 1), ("0", 1), ("99999999", NUMBER_MAX + 1), ("x", 1), ("7\n", 7)])
def test_a_damaged_counter_gives_no_wrong_number(layout: Layout, text: str, number: int) -> None:
    os.makedirs(layout.vms)
    Path(layout.vms, "next").write_text(text)
    assert Registry(layout)._read_next() == number


# --- a start that nobody wrote down -----------------------------------------------------------------------------------


def test_nothing_runs_in_the_jail_before_its_process_is_written_down(tmp_path: Path) -> None:
    """D23: a broker killed in between leaves a jail that waits, also once the broker's own end of the barrier is closed."""
    ran = tmp_path / "ran"
    with start._barrier(str(tmp_path / "barrier")) as barrier:
        words = ["bwrap", "--ro-bind", "/", "/", "--bind", str(tmp_path), str(tmp_path), "--unshare-pid", "--block-fd", "3"]
        process = Host(embedded=True).spawn([*words, "touch", str(ran)], {3: barrier})
        ours = os.dup(barrier)
    assert list(tmp_path.iterdir()) == []
    ended = select.poll()
    ended.register(process.pidfd, select.POLLIN)
    assert ended.poll(300) == []
    os.write(ours, b"g")
    os.close(ours)
    assert ended.poll(10_000)
    process.reap()
    assert ran.exists()
