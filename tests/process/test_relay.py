"""The relay as a process, between something in QEMU's place and viewers: restarts, slow peers and hostile ones included."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.consoles import Viewer
from tests.fakes.qmp_speaker import GREETING, HangUp, QmpSpeaker, Refusal
from tests.fakes.serial import SerialPort
from tests.process.relays import PATIENCE, RelayProcess, ServiceManager, console_pipes, lost_in, rss, until
from vmshell import wire
from vmshell.consoles import CELL, CONTROL, DATA, cells
from vmshell.layout import Layout
from vmshell.messages import Attach, Attached, Detach, Forget, Order, Watch

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def layout(short_tmp: Path) -> Layout:
    return Layout(**{name: f"{short_tmp}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)


@pytest.fixture
def relay(layout: Layout) -> Iterator[RelayProcess]:
    with RelayProcess(layout) as running:
        yield running


@pytest.fixture
def qemus(layout: Layout) -> Iterator[Callable[..., QmpSpeaker]]:
    """Makes QEMUs by number; all closed at the end."""
    made: list[QmpSpeaker] = []

    def make(number: int = 1, **options: object) -> QmpSpeaker:
        made.append(QmpSpeaker(layout.vm_run(number), **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for qemu in made:
        qemu.close()


Qemus = Callable[..., QmpSpeaker]
Guest = socket.socket | SerialPort


def boot(relay: RelayProcess, qemus: Qemus, number: int = 1, *, old: bool = False, **watch: Any) -> tuple[QmpSpeaker, Guest]:
    """A watched, running VM: its QEMU and the guest's end of its console."""
    qemu = qemus(number, old=old)
    relay.watch(number, **watch)
    guest = qemu.console()
    relay.wait_word(number, "ready")
    relay.tell(Order(number=number, what="cont"))
    relay.wait_word(number, "running")
    return qemu, guest


def log_of(layout: Layout, number: int = 1, name: str = "console.log") -> bytes:
    try:
        return Path(layout.vm_log(number), name).read_bytes()
    except FileNotFoundError:  # not yet, or just being rotated
        return b""


def wait_closed(viewer: Viewer) -> None:
    """Read until the relay closes the viewer's pipes."""
    end = time.monotonic() + PATIENCE
    while not viewer.closed:
        assert time.monotonic() < end, "the viewer was not closed"
        viewer.read_some()
    viewer.close()


def wait_log(layout: Layout, text: bytes, number: int = 1) -> None:
    until(lambda: text in log_of(layout, number), f"{text!r} in the log")


# --- the way of a VM --------------------------------------------------------------------------------------------------


old_and_new = pytest.mark.parametrize("old", [False, True], ids=["FIFOs", "the socket of an earlier version"])


@old_and_new
def test_a_vms_life(relay: RelayProcess, qemus: Qemus, layout: Layout, old: bool) -> None:
    qemu, guest = boot(relay, qemus, old=old)
    viewer = relay.attach(1)
    hello = viewer.wait_notice("hello")
    assert hello == {"notice": "hello", "pen": True, "holder": "alice", "viewers": 1, "quiet_s": None, "state": "running"}
    relay.wait_word(1, "viewers", count=1)
    guest.sendall(b"login: ")
    viewer.wait_output("login: ")
    relay.wait_word(1, "output")
    viewer.type("root\r")
    assert guest.recv(100) == b"root\r"
    wait_log(layout, b"login: ")
    late = relay.attach(1, "bob", readonly=True)
    assert late.wait_notice("hello")["quiet_s"] == 0
    late.wait_output("login: ")
    fresh = relay.attach(1, "carol", replay=False)
    guest.sendall(b"# ")
    fresh.wait_output("# ")
    assert fresh.output == b"# "
    qemu.event("SHUTDOWN", guest=True, reason="guest-shutdown")
    relay.wait_word(1, "guest-shutdown")
    guest.sendall(b"Power down\r\n")
    guest.close()
    relay.tell(Forget(number=1, reason="QEMU ended by itself"))
    relay.wait_word(1, "unwatched")
    for each in (viewer, late, fresh):
        assert each.wait_notice("end")["reason"] == "the guest switched itself off"  # the relay heard why
        assert each.output.endswith(b"Power down\r\n")
        wait_closed(each)
    assert log_of(layout) == b"login: # Power down\r\n"
    relay.tell(Forget(number=1, purge=True))
    assert not Path(layout.vm_log(1)).exists()


def test_the_console_is_connected_before_the_monitor_is_asked(relay: RelayProcess, qemus: Qemus) -> None:
    """`ready` means: no byte of the guest can be missed."""
    qemu = qemus(old=True)
    relay.watch(1)
    relay.wait_word(1, "ready")
    qemu.console(timeout=0.5).close()
    assert [command["execute"] for command in qemu.commands] == ["qmp_capabilities", "query-status"]


@pytest.mark.parametrize(("what", "command"), [("powerdown", "system_powerdown"), ("reset", "system_reset"), ("quit", "quit")])
def test_orders_reach_qemu(relay: RelayProcess, qemus: Qemus, what: str, command: str) -> None:
    qemu, _ = boot(relay, qemus)
    relay.tell(Order(number=1, what=what))
    qemu.wait_command(command)


def test_an_order_that_nobody_takes_is_answered(relay: RelayProcess, qemus: Qemus) -> None:
    qemus(1, script=lambda sock: time.sleep(0.5))
    relay.watch(1)
    assert relay.ask(Order(number=1, what="cont"))["error"]["code"] == "qemu-silent"


def test_an_unknown_vm_is_an_error(relay: RelayProcess) -> None:
    with console_pipes() as (theirs, _):
        assert relay.ask(Attach(number=9, uid=1001, label="alice"), *theirs)["error"]["code"] == "not-watched"
        assert relay.ask(Order(number=9, what="cont"))["error"]["code"] == "not-watched"


def test_why_a_guest_stopped_is_said(relay: RelayProcess, qemus: Qemus) -> None:
    qemu, _ = boot(relay, qemus)
    viewer = relay.attach(1)
    for status, word in (("internal-error", "internal-error"), ("io-error", "io-error"), ("guest-panicked", "guest-panic")):
        relay.words.clear()
        qemu.status = status
        qemu.event("STOP")
        relay.wait_word(1, word)
        qemu.event("RESUME")
        relay.wait_word(1, "running")
        said = [said for _, said, _ in relay.words]
        assert said == ["paused", word, "running"] or said == [word, "running"], said
    late = relay.attach(1)
    assert late.wait_notice("hello")["state"] == "running"
    viewer.wait_notice("state")
    for each in (viewer, late):
        each.close()


def test_a_new_broker_hears_everything_again(relay: RelayProcess, qemus: Qemus) -> None:
    _, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    guest.sendall(b"x")
    relay.wait_word(1, "output")
    old = relay.broker
    relay.broker = relay.connect()
    relay.words.clear()
    relay.watch(1)
    for word in ("ready", "running", "output"):
        relay.wait_word(1, word)
    relay.wait_word(1, "viewers", count=1)
    old.settimeout(PATIENCE)
    while True:
        try:
            if wire.recv(old) is None:
                break
        except ConnectionResetError:
            break
    old.close()
    viewer.type("y")
    assert guest.recv(10) == b"y", "the viewer never noticed"
    viewer.close()


def test_what_a_broker_cannot_have_said_harms_nothing(relay: RelayProcess, qemus: Qemus) -> None:
    _, guest = boot(relay, qemus)
    bodies: list[dict[str, object]] = [{"id": 1}, {"id": 2, "verb": "launch"}, {"id": 3, "verb": "watch", "number": 0}]
    for body in [*bodies, {"id": 4, "verb": "attach", "number": 1}]:
        wire.send(relay.broker, body)
    relay.broker.send(b"\xff" * 100)
    relay.broker.close()
    relay.broker = relay.connect()
    relay.watch(1)
    relay.tell(Order(number=1, what="powerdown"))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_only_root_and_itself_may_command_the_relay(relay: RelayProcess, layout: Layout) -> None:
    os.chmod(layout.relay_socket, 0o666)
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setresuid(65534, 65534, 65534)
            sock = wire.connect(layout.relay_socket, 20.0)
            try:
                wire.send(sock, {"id": 1, "verb": "watch", "number": 5})
                status = 0 if wire.recv(sock) is None else 2
            except (BrokenPipeError, ConnectionResetError):
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    relay.watch(1)


# --- orders that bring something or take long -------------------------------------------------------------------------


def refusing(command: object) -> object:
    raise Refusal("no")


def hanging_up(command: object) -> object:
    raise HangUp


def descriptors(relay: RelayProcess) -> int:
    return len(os.listdir(f"/proc/{relay.pid}/fd"))


@pytest.fixture
def disc(short_tmp: Path) -> Iterator[int]:
    path = short_tmp / "disc.iso"
    path.write_bytes(b"a disc")
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_a_disc_reaches_qemu_and_nothing_stays_behind(relay: RelayProcess, qemus: Qemus, disc: int, short_tmp: Path) -> None:
    qemu, _ = boot(relay, qemus)
    before = descriptors(relay)
    relay.tell(Order(number=1, what="insert", value=2), disc)
    ((command, fd),) = qemu.fds
    assert command == "add-fd" and os.readlink(f"/proc/self/fd/{fd}") == f"{short_tmp}/disc.iso"
    assert qemu.names("add-fd")[-3:] == ["blockdev-insert-medium", "blockdev-close-tray", "remove-fd"]
    relay.tell(Order(number=1, what="eject", value=2))
    assert descriptors(relay) == before


def test_a_refused_disc_leaves_the_tray_closed(relay: RelayProcess, qemus: Qemus, disc: int) -> None:
    qemu, _ = boot(relay, qemus)
    before = descriptors(relay)
    qemu.answers["blockdev-insert-medium"] = refusing
    assert relay.ask(Order(number=1, what="insert"), disc)["error"]["code"] == "qemu-silent"
    undone = ["blockdev-del", "blockdev-del", "blockdev-close-tray", "remove-fd"]
    assert qemu.names("blockdev-insert-medium") == ["blockdev-insert-medium", *undone]
    del qemu.answers["blockdev-insert-medium"]
    relay.tell(Order(number=1, what="insert"), disc)
    assert descriptors(relay) == before


def test_an_order_ends_with_its_connection(relay: RelayProcess, qemus: Qemus, disc: int) -> None:
    qemu, guest = boot(relay, qemus)
    before = descriptors(relay)
    qemu.answers["blockdev-remove-medium"] = hanging_up
    first = relay.send(Order(number=1, what="insert"), disc)
    relay.send(Order(number=1, what="insert"), disc)
    last = relay.ask(Order(number=1, what="insert"), disc)
    assert last["error"]["code"] == "qemu-silent" and last["id"] == first + 2
    until(lambda: qemu.connections == 2, "a new connection")
    del qemu.answers["blockdev-remove-medium"]
    until(lambda: "ok" in relay.ask(Order(number=1, what="insert"), disc), "an order on the new connection")
    assert descriptors(relay) == before
    viewer = relay.attach(1)
    viewer.type("x")
    assert guest.recv(10) == b"x"
    viewer.close()


def test_descriptors_belong_to_the_orders_that_bring_one(relay: RelayProcess, qemus: Qemus, disc: int) -> None:
    qemu, _ = boot(relay, qemus)
    before = descriptors(relay)
    relay.tell(Order(number=1, what="powerdown"), disc)
    relay.tell(Order(number=1, what="log-on"), disc)
    for what in ("insert", "display"):
        assert relay.ask(Order(number=1, what=what))["error"]["code"] == "protocol"
    assert relay.ask(Order(number=9, what="insert"), disc)["error"]["code"] == "not-watched"
    qemus(2, script=lambda sock: time.sleep(0.5))
    relay.watch(2)
    assert relay.ask(Order(number=2, what="insert"), disc)["error"]["code"] == "qemu-silent"
    relay.tell(Forget(number=2))
    until(lambda: descriptors(relay) == before, "all descriptors to be closed")
    assert qemu.fds == []


def test_a_snapshot_is_nobodys_news(relay: RelayProcess, qemus: Qemus) -> None:
    qemu, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    viewer.wait_notice("hello")
    relay.words.clear()
    looks = 0

    def save(command: object) -> object:
        qemu.status = "save-vm"
        qemu.event("STOP")
        return {}

    def look(command: object) -> object:
        nonlocal looks
        looks += 1
        if looks == 2:
            qemu.status = "running"
            qemu.event("RESUME")
        return [{"id": "snap3", "status": "running" if looks < 3 else "concluded"}]

    qemu.answers.update({"snapshot-save": save, "query-jobs": look})
    relay.tell(Order(number=1, what="snapshot-save", value=3, disks=1))
    until(lambda: qemu.names("snapshot-save")[-2:] == ["job-dismiss", "query-status"], "its last question")
    assert looks == 3
    guest.sendall(b"still here")
    viewer.wait_output("still here")
    relay.tell(Order(number=1, what="powerdown"))
    assert not any(notice["notice"] == "state" for notice in viewer.notices)
    assert [word for _, word, _ in relay.words if word in ("running", "paused")] == []
    # A guest that was stopped for a reason of its own meanwhile is news once the job is over.
    qemu.answers["query-jobs"] = lambda command: [{"id": "snap3", "status": "concluded", "error": "the disk is full"}]

    def save_and_stop(command: object) -> object:
        qemu.status = "io-error"
        qemu.event("STOP")
        return {}

    qemu.answers["snapshot-save"] = save_and_stop
    assert relay.ask(Order(number=1, what="snapshot-save", value=3, disks=1))["error"]["code"] == "qemu-silent"
    relay.wait_word(1, "io-error")
    assert viewer.wait_notice("state")["state"] == "io-error"
    viewer.close()


# --- a log that is not kept -------------------------------------------------------------------------------------------


def test_without_a_log_the_replay_goes_on(relay: RelayProcess, qemus: Qemus, layout: Layout) -> None:
    qemu, guest = boot(relay, qemus, log=False)
    viewer = relay.attach(1)
    guest.sendall(b"a secret;")
    viewer.wait_output("a secret;")
    late = relay.attach(1, "bob")
    late.wait_output("a secret;")
    assert not Path(layout.vm_log(1), "console.log").exists()
    relay.tell(Order(number=1, what="log-on"))
    guest.sendall(b"no secret;")
    wait_log(layout, b"no secret;")
    relay.tell(Order(number=1, what="log-off"))
    guest.sendall(b"another;")
    viewer.wait_output("another;")
    relay.watch(1, log=True)
    guest.sendall(b"and none")
    wait_log(layout, b"no secret;and none")
    assert log_of(layout) == b"no secret;and none"
    assert {command["execute"] for command in qemu.commands} <= {"qmp_capabilities", "query-status", "cont"}
    for each in (viewer, late):
        each.close()


def test_without_a_log_nothing_is_remembered(relay: RelayProcess, qemus: Qemus, layout: Layout) -> None:
    qemu, guest = boot(relay, qemus)
    guest.sendall(b"from before")
    wait_log(layout, b"from before")
    relay.tell(Order(number=1, what="log-off"))
    relay.end(signal.SIGKILL)
    relay.start()
    relay.watch(1, log=False)
    guest = qemu.console()
    relay.wait_word(1, "ready")
    viewer = relay.attach(1)
    guest.sendall(b"after")
    viewer.wait_output("after")
    assert viewer.output == b"after" and log_of(layout) == b"from before"
    viewer.close()


def test_a_kept_console_stays_without_a_log(layout: Layout, qemus: Qemus, short_tmp: Path) -> None:
    """Between its restart and the broker's Watch, the relay knows it from the name in the store."""
    manager = ServiceManager(str(short_tmp))
    try:
        with RelayProcess(layout, manager) as relay:
            _, guest = boot(relay, qemus)
            relay.tell(Order(number=1, what="log-off"))
            until(lambda: manager.names() == ["input-1", "output-1-unlogged"], "the console's new name in the store")
            viewer = relay.attach(1)
            viewer.wait_notice("hello")
            relay.end()
            relay.start()
            guest.sendall(b"a secret;")
            viewer.wait_output("a secret;")
            assert not Path(layout.vm_log(1), "console.log").exists()
            relay.watch(1, log=True)
            until(lambda: sorted(manager.names())[:2] == ["input-1", "output-1"], "the console's old name")
            guest.sendall(b"no secret;")
            wait_log(layout, b"no secret;")
            assert log_of(layout) == b"no secret;"
            viewer.close()
            relay.tell(Forget(number=1))
            until(lambda: manager.names() == [], "the store to be empty")
    finally:
        manager.close()


# --- restarts ---------------------------------------------------------------------------------------------------------


@old_and_new
def test_killed_and_started_again(relay: RelayProcess, qemus: Qemus, layout: Layout, old: bool) -> None:
    qemu, guest = boot(relay, qemus, old=old)
    viewer = relay.attach(1)
    guest.sendall(b"before the kill\r\n")
    viewer.wait_output("before the kill")
    wait_log(layout, b"before the kill\r\n")
    relay.end(signal.SIGKILL)
    wait_closed(viewer)
    relay.words.clear()
    relay.start()
    relay.watch(1)
    guest = qemu.console()
    for word in ("ready", "running", "output"):
        relay.wait_word(1, word)
    again = relay.attach(1)
    assert again.wait_notice("hello")["quiet_s"] is not None
    again.wait_output("before the kill\r\n")
    guest.sendall(b"after it\r\n")
    again.wait_output("after it\r\n")
    assert again.output == b"before the kill\r\nafter it\r\n"
    again.close()


def numbered(first: int, count: int) -> bytes:
    return b"".join(b"%07d\n" % number for number in range(first, first + count))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["with a descriptor store", "without one"])
def test_twenty_kills_mid_stream_lose_no_more_than_one_read_each(
    layout: Layout, qemus: Qemus, short_tmp: Path, kept: bool
) -> None:
    """What lay in the FIFO is read after the kill, once; what had been read and not yet written down is all that can be lost."""
    manager = ServiceManager(str(short_tmp)) if kept else None
    said = 0
    stop = threading.Event()
    try:
        with RelayProcess(layout, manager) as relay:
            _, guest = boot(relay, qemus, log_max=64 * MIB)

            def talk() -> None:
                nonlocal said
                while not stop.is_set():
                    guest.sendall(numbered(said, 300))
                    said += 300

            thread = threading.Thread(target=talk)
            thread.start()
            for _ in range(20):
                size = len(log_of(layout))
                until(lambda size=size: len(log_of(layout)) > size, "more of it in the log")  # type: ignore[misc]
                relay.end(signal.SIGKILL)
                relay.start()
                if not kept:
                    relay.watch(1, log_max=64 * MIB)
            stop.set()
            thread.join()
            guest.sendall(b"the end\n")
            wait_log(layout, b"the end\n")
            lost = lost_in(log_of(layout), numbered(0, said) + b"the end\n")
            print(f"of {8 * said} bytes were lost: {lost}")
            assert len(lost) <= 20 and all(size <= 64 * KIB for size in lost)
    finally:
        stop.set()
        if manager is not None:
            manager.close()


def test_a_vm_of_an_earlier_version_keeps_its_socket_over_an_upgrade(layout: Layout, qemus: Qemus, short_tmp: Path) -> None:
    """What its relay has left in the store is `console-1`; a VM started meanwhile under its number has FIFOs."""
    manager = ServiceManager(str(short_tmp))
    reader, writer = os.pipe()
    try:
        with RelayProcess(layout, manager) as relay:
            qemu, guest = boot(relay, qemus, old=True)
            until(lambda: manager.names() == ["console-1"], "the socket in the store")
            relay.end(signal.SIGKILL)
            guest.sendall(b"said to nobody;")
            relay.start()
            wait_log(layout, b"said to nobody;")
            relay.watch(1)
            viewer = relay.attach(1)
            viewer.type("x")
            assert guest.recv(10) == b"x"
            # Lost without a store, it is connected anew.
            guest.close()
            guest = qemu.console()
            guest.sendall(b"on a new connection;")
            viewer.wait_output("on a new connection;")
            qemu.close()
            qemu = qemus()
            relay.watch(1, reader)
            viewer.wait_notice("end")
            viewer.close()
            relay.wait_word(1, "ready")
            viewer = relay.attach(1)
            qemu.console().sendall(b"new")
            viewer.wait_output("new")
            assert viewer.output == b"new"
            until(lambda: sorted(manager.names())[:2] == ["input-1", "output-1"], "the FIFOs in the store")
            assert not any(name.startswith("console") for name in manager.names())
            viewer.close()
    finally:
        os.close(reader)
        os.close(writer)
        manager.close()


def test_what_the_store_kept_of_an_earlier_run_is_not_taken_for_this_one(layout: Layout, qemus: Qemus, short_tmp: Path) -> None:
    """While the relay was away a VM ended and was started again; no end shows on a FIFO, so it must be told from the next one."""
    manager = ServiceManager(str(short_tmp))
    try:
        with RelayProcess(layout, manager) as relay:
            first, _ = boot(relay, qemus)
            viewer = relay.attach(1)
            viewer.wait_notice("hello")
            until(lambda: len(manager.names()) == 4, "four descriptors")
            relay.end(signal.SIGKILL)
            first.close()
            guest = qemus().console()
            relay.start()
            relay.watch(1)
            assert viewer.wait_notice("end")["reason"] == "the VM was started anew"
            viewer.close()
            relay.wait_word(1, "ready")
            viewer = relay.attach(1)
            guest.sendall(b"of the second run")
            viewer.wait_output("of the second run")
            viewer.type("x")
            assert guest.recv(10) == b"x"
            viewer.close()
    finally:
        manager.close()


def test_what_is_no_serial_port_is_refused_and_closed(relay: RelayProcess, qemus: Qemus) -> None:
    _, guest = boot(relay, qemus)
    before = descriptors(relay)
    reader, writer = os.pipe()
    for fds in ((reader, writer), (reader, writer, reader), (relay.broker.fileno(), reader)):
        error = relay.ask(Watch(number=1), *fds)["error"]
        assert error["code"] == "protocol" and "serial port" in error["text"]
    until(lambda: descriptors(relay) == before, "all of them to be closed")
    relay.watch(1)
    until(lambda: descriptors(relay) == before, "those to be closed that it has already")
    viewer = relay.attach(1)
    guest.sendall(b"still here")
    viewer.wait_output("still here")
    viewer.close()
    os.close(reader)
    os.close(writer)


def test_with_a_descriptor_store_a_restart_loses_no_byte(layout: Layout, qemus: Qemus, short_tmp: Path) -> None:
    manager = ServiceManager(str(short_tmp))
    reader, writer = os.pipe()
    try:
        with RelayProcess(layout, manager) as relay:
            until(lambda: "READY=1" in manager.messages, "READY")
            qemu = qemus()
            relay.watch(1, reader, log_max=64 * MIB)
            os.close(reader)
            guest = qemu.console()
            relay.wait_word(1, "ready")
            viewer = relay.attach(1, "älice")
            until(lambda: len(manager.names()) == 5, "five descriptors")
            said = 0

            def talk(stop: threading.Event) -> None:
                nonlocal said
                while not stop.is_set():
                    guest.sendall(b"%07d\n" % said * 100)
                    said += 1

            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM):
                stop = threading.Event()
                thread = threading.Thread(target=talk, args=(stop,))
                thread.start()
                time.sleep(0.1)
                relay.end(number)
                time.sleep(0.05)
                relay.start()
                time.sleep(0.1)
                stop.set()
                thread.join()
            wait_log(layout, b"%07d\n" % (said - 1))
            # Killed while all is quiet: what the guest says meanwhile waits in the FIFO.
            relay.end(signal.SIGKILL)
            guest.sendall(b"said to nobody\n")
            os.write(writer, b"a warning\n")
            relay.start()
            relay.watch(1, log_max=64 * MIB)
            relay.wait_word(1, "ready")
            wait_log(layout, b"said to nobody\n")
            expected = b"".join(b"%07d\n" % number * 100 for number in range(said)) + b"said to nobody\n"
            assert log_of(layout) == expected
            until(lambda: log_of(layout, name="qemu.log") == b"a warning\n", "QEMU's warning in its log")
            # The viewer outlived all of it, label and pen included.
            viewer.wait_output("said to nobody\n")
            viewer.control(do="who")
            assert viewer.wait_notice("who")["viewers"] == [{"label": "älice", "pen": True}]
            viewer.type("x")
            assert guest.recv(10) == b"x"
            relay.tell(Forget(number=1, reason="done"))
            viewer.wait_notice("end")
            until(lambda: manager.names() == [], "the store to be empty")
            wait_closed(viewer)
    finally:
        os.close(writer)
        manager.close()


@pytest.mark.slow
def test_a_relay_killed_at_any_moment_leaves_no_half_message(layout: Layout, qemus: Qemus, short_tmp: Path) -> None:
    """What it had read is gone with it; what comes through is whole, in both directions, on the same pipes."""
    manager = ServiceManager(str(short_tmp))
    typed, shown = b"", b""
    stop, forgotten = threading.Event(), threading.Event()
    try:
        with RelayProcess(layout, manager) as relay:
            _, guest = boot(relay, qemus)
            assert isinstance(guest, SerialPort)
            viewer = relay.attach(1)
            until(lambda: len(manager.names()) == 4, "four descriptors")

            def talk() -> None:
                while not stop.is_set():
                    guest.sendall(b"[said]" * 3000)

            def hear() -> None:
                nonlocal typed
                while not forgotten.wait(0.01):
                    typed += guest.lying()

            def type_on() -> None:
                while not stop.is_set():
                    if select.select([], [viewer.typed], [], 0.1)[1]:
                        os.write(viewer.typed, b"".join(cells(DATA, b"<%06d>" % number) for number in range(64)))

            def read_on() -> None:
                while not stop.is_set():
                    viewer.read_some(0.1)  # raises, were it ever given half a frame

            threads = [threading.Thread(target=work, daemon=True) for work in (talk, type_on, read_on)]
            hearing = threading.Thread(target=hear, daemon=True)
            for thread in (*threads, hearing):
                thread.start()
            for turn in range(8):
                time.sleep(0.05 + 0.03 * turn)
                relay.end(signal.SIGKILL)
                before = len(viewer.output)
                relay.start()
                until(lambda before=before: len(viewer.output) > before, "more of the guest's words")  # type: ignore[misc]
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
                assert not thread.is_alive()
            viewer.control(do="who")
            assert viewer.wait_notice("who")["viewers"] == [{"label": "alice", "pen": True}]
            relay.watch(1)
            relay.tell(Forget(number=1))
            forgotten.set()
            hearing.join(PATIENCE)
            assert not hearing.is_alive()
            typed += guest.lying()
            viewer.close()
            shown = viewer.output
    finally:
        stop.set()
        forgotten.set()
        manager.close()
    assert len(typed) > 64 * 8 and re.fullmatch(rb"(<[0-9]{6}>)*", typed)
    assert len(re.findall(rb"\[said\]", shown)) > 1000


def test_who_has_consoles_is_told_and_whose_end(layout: Layout, short_tmp: Path, qemus: Qemus) -> None:
    """G18: by uid and name, whichever VMs they show, also after a restart; everybody else's go on."""
    manager = ServiceManager(str(short_tmp))
    try:
        with RelayProcess(layout, manager) as relay:
            guests = [boot(relay, qemus, number)[1] for number in (1, 2)]
            alices = [relay.attach(number, "alice", 1001) for number in (1, 2, 2)]
            bob, namesake = relay.attach(1, "bob", 1002), relay.attach(2, "alice", 1003)
            everybody = [[1001, "alice"], [1002, "bob"], [1003, "alice"]]
            assert relay.ask(Attached())["ok"] == {"users": everybody}
            assert relay.ask(Attached(skip=2))["ok"] == {"users": everybody[2:]}
            until(lambda: len(manager.names()) == 14, "two descriptors a VM, and two a console")
            relay.end(signal.SIGKILL)
            relay.start()
            for number in (1, 2):
                relay.watch(number)
                relay.wait_word(number, "ready")
            assert relay.ask(Attached())["ok"] == {"users": everybody}
            relay.tell(Detach(uid=1001, label="alice", code="access-ended", reason="you are out"))
            for viewer in alices:
                assert viewer.wait_notice("end") == {"notice": "end", "reason": "you are out", "code": "access-ended"}
                wait_closed(viewer)
            assert relay.ask(Attached())["ok"] == {"users": everybody[1:]}
            relay.tell(Detach(uid=1001, label="alice", code="access-ended", reason="nobody is left to hear it"))
            until(lambda: len(manager.names()) == 8, "theirs to be dropped from the store")
            for guest, viewer in zip(guests, (bob, namesake), strict=True):
                guest.sendall(b"goes on")
                viewer.wait_output("goes on")
                viewer.close()
    finally:
        manager.close()


def lingering(seconds: int) -> socket.socket:
    """A TCP socket whose last close takes so long: what it has sent is never taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(1 << 16))
        _kept_open.append(server.accept()[0])
    return sock


_kept_open: list[socket.socket] = []


def test_a_viewers_socket_of_before_is_dropped_without_being_read(layout: Layout, short_tmp: Path) -> None:
    """N1, at an upgrade: whoever closed the last reference would also close what lies in it, and wait for that."""
    manager = ServiceManager(str(short_tmp))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with lingering(300) as trap:
        socket.send_fds(ours, [b"dx"], [trap.fileno()])
    try:
        manager.stored.append((f"viewer-1-1-w-{b'alice'.hex()}", theirs.detach()))
        began = time.monotonic()
        with RelayProcess(layout, manager) as relay:
            until(lambda: "READY=1" in manager.messages, "READY")
            ours.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):  # it was not read
                assert ours.recv(100) == b""
            assert manager.names() == [] and "BARRIER=1" in manager.messages
            relay.tell(Watch(number=1))
        assert time.monotonic() - began < PATIENCE
    finally:
        ours.close()
        manager.close()
        while _kept_open:
            _kept_open.pop().close()


def test_sigterm_says_goodbye_and_sighup_nothing(relay: RelayProcess, qemus: Qemus) -> None:
    _, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    relay.process.send_signal(signal.SIGHUP)
    guest.sendall(b"x")
    viewer.wait_output("x")
    assert relay.end() == 0
    assert "restarting" in viewer.wait_notice("end")["reason"]
    viewer.close()


@pytest.mark.slow
def test_a_vm_that_cannot_be_reached_is_reported_and_found_again(relay: RelayProcess, qemus: Qemus) -> None:
    relay.watch(1)
    began = time.monotonic()
    relay.wait_word(1, "unreachable", 30)
    assert time.monotonic() - began > 4.5
    qemus(1, status="running", old=True)
    relay.wait_word(1, "running", 30)


@pytest.mark.slow
def test_embedded_it_ends_when_nobody_needs_it(short_tmp: Path, qemus: Qemus) -> None:
    paths = {name: f"{short_tmp}/{name}" for name in ("etc", "state", "run", "log")}
    relay = RelayProcess(Layout(**paths, embedded=True))
    qemus()
    relay.watch(1)
    relay.broker.close()
    time.sleep(6.5)
    assert relay.process.poll() is None, "it has a VM"
    relay.broker = relay.connect()
    relay.tell(Forget(number=1))
    time.sleep(6.5)
    assert relay.process.poll() is None, "it has a broker"
    relay.broker.close()
    assert relay.process.wait(30) == 0


# --- slow and hostile viewers -----------------------------------------------------------------------------------------


class Reader(threading.Thread):
    """Reads a viewer's output to the end of *total* bytes and keeps count."""

    def __init__(self, viewer: Viewer, total: int) -> None:
        super().__init__()
        self.viewer = viewer
        self.total = total
        self.start()

    def run(self) -> None:
        while len(self.viewer.output) + sum(n["bytes"] for n in self.viewer.notices if n["notice"] == "gap") < self.total:
            self.viewer.read_some()
            if self.viewer.closed:
                return


@pytest.mark.slow
def test_a_viewer_that_does_not_read_loses_bytes_and_nobody_else_does(relay: RelayProcess, qemus: Qemus, layout: Layout) -> None:
    _, guest = boot(relay, qemus, log_max=256 * MIB)
    asleep, awake = relay.attach(1, "asleep"), relay.attach(1, "awake")
    total = 6 * MIB
    block = bytes(range(256)) * 256
    reader = Reader(awake, total)
    began = time.monotonic()
    for sent in range(0, total, len(block)):
        guest.sendall(block)
        # Not so fast that a busy test machine makes the reader a slow one too.
        until(lambda sent=sent: len(awake.output) >= sent, "the reader")  # type: ignore[misc]
    took = time.monotonic() - began
    reader.join(PATIENCE)
    assert not reader.is_alive() and not any(notice["notice"] == "gap" for notice in awake.notices)
    assert awake.output == block * (total // len(block))
    until(lambda: len(log_of(layout)) == total, "the whole log")
    assert took < 20, "the VM waited for a viewer that did not read"
    # It wakes up: some of the old bytes, a notice of what is missing, the newest bytes, nothing twice.
    reader = Reader(asleep, total)
    reader.join(PATIENCE)
    lost = sum(notice["bytes"] for notice in asleep.notices if notice["notice"] == "gap")
    assert lost > 0 and len(asleep.output) + lost == total
    assert asleep.output[-64 * KIB :] == (block * 2)[-64 * KIB :]
    guest.sendall(b"live again")
    asleep.wait_output("live again")
    for viewer in (asleep, awake):
        viewer.close()


@pytest.mark.slow
def test_a_viewer_that_takes_crumbs_cannot_slow_a_vm_down(relay: RelayProcess, qemus: Qemus) -> None:
    """A read every 150 ms would be within the patience of each wait; the waits together are bounded too."""
    _, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    stop = threading.Event()

    def nibble() -> None:
        while not stop.is_set():
            os.read(viewer.shown, 1 << 17)
            stop.wait(0.15)

    thread = threading.Thread(target=nibble)
    thread.start()
    began = time.monotonic()
    for _ in range(256):
        guest.sendall(b"x" * 64 * KIB)
    took = time.monotonic() - began
    stop.set()
    guest.sendall(b"a little more for the last read")
    thread.join(PATIENCE)
    viewer.close()
    # 16 MiB: 38 s at one pipe full per 150 ms; at the floor of 1 MB/s no more than 17.
    assert took < 25


def test_hostile_viewers_are_bounded(relay: RelayProcess, qemus: Qemus) -> None:
    _, guest = boot(relay, qemus)
    good = relay.attach(1, "good")
    pid = relay.pid
    long = bytes((255,)) + b"d" + b"x" * 100
    for data in (b"x" * 60_000, long, b"z", cells(b"z", b"x" * 3000), cells(b"c", b"[" * 60), b"\2c\xff", b"\0" * 30_000):
        bad = relay.attach(1, "bad")
        os.write(bad.typed, data)
        bad.close()
    floods = [relay.attach(1, "flood") for _ in range(5)]
    for flood in floods:
        os.set_blocking(flood.typed, False)
        try:
            while True:
                os.write(flood.typed, cells(CONTROL, b'{"do":"who"}'))
        except OSError:
            pass
    began = time.monotonic()
    good.type("x")
    assert guest.recv(10) == b"x"
    guest.sendall(b"still fine")
    good.wait_output("still fine")
    assert time.monotonic() - began < 5
    for flood in floods:
        flood.close()
    good.close()
    assert relay.pid == pid and relay.process.poll() is None


def test_whatever_a_viewer_does_to_its_pipes_is_its_own_trouble(relay: RelayProcess, qemus: Qemus) -> None:
    """N1: sizes changed, flags set, written and read a byte at a time, filled by splice, never read; another console goes on."""
    _, guest = boot(relay, qemus)
    good, odd, deaf = relay.attach(1, "good"), relay.attach(1, "odd"), relay.attach(1, "deaf")
    for viewer in (odd, deaf):
        for fd in (viewer.shown, viewer.typed):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 4096)
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    fcntl.fcntl(odd.typed, fcntl.F_SETFL, os.O_DIRECT)  # packets: a read ends with each write
    odd.control(do="pen")
    for byte in cells(DATA, b"a byte at a time"):
        os.write(odd.typed, bytes((byte,)))
    got = b""
    while len(got) < 16:
        got += guest.recv(100)
    assert got == b"a byte at a time"
    with tempfile.TemporaryFile() as file:
        file.write(cells(DATA, b"from a file"))
        file.seek(0)
        assert os.splice(file.fileno(), odd.typed, CELL) == CELL
        assert guest.recv(100) == b"from a file"
    fcntl.fcntl(deaf.shown, fcntl.F_SETPIPE_SZ, 1 << 20)
    for turn in range(40):
        guest.sendall(b"%06d" % turn * 10_000)
        good.wait_output(f"{turn:06d}")
    out = b""
    while b"000039" not in out:
        with contextlib.suppress(BlockingIOError):
            out = out[-10:] + os.read(odd.shown, 1)
    good.control(do="who")
    assert len(good.wait_notice("who")["viewers"]) == 3
    for viewer in (good, odd, deaf):
        viewer.close()


def test_either_pipes_end_is_the_viewers(relay: RelayProcess, qemus: Qemus) -> None:
    boot(relay, qemus)
    for end in ("shown", "typed"):
        viewer = relay.attach(1)
        relay.wait_word(1, "viewers", count=1)
        relay.words.clear()
        os.close(getattr(viewer, end))
        relay.wait_word(1, "viewers", count=0)
        if end == "typed":
            wait_closed(viewer)
        else:
            with pytest.raises(BrokenPipeError):
                viewer.type("x")
            os.close(viewer.typed)


def test_only_a_pair_of_pipes_is_a_console(relay: RelayProcess, qemus: Qemus) -> None:
    boot(relay, qemus)
    before = descriptors(relay)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with console_pipes() as ((keys, output), (shown, typed)), ours, theirs:
        for fds in ((theirs.fileno(),), (theirs.fileno(), theirs.fileno()), (output, keys), (keys, keys), (keys,), ()):
            answer = relay.ask(Attach(number=1, uid=1001, label="alice"), *fds)
            assert answer["error"]["code"] == "protocol", fds
    assert descriptors(relay) == before


def test_too_many_viewers_are_refused(relay: RelayProcess, qemus: Qemus) -> None:
    boot(relay, qemus)
    viewers = [relay.attach(1, f"v{index}") for index in range(64)]
    with console_pipes() as (theirs, _):
        assert relay.ask(Attach(number=1, uid=1001, label="one too many"), *theirs)["error"]["code"] == "too-many"
    viewers.pop().close()
    relay.wait_word(1, "viewers", count=63)
    relay.attach(1).close()
    for viewer in viewers:
        viewer.close()


def test_too_many_consoles_of_one_person_are_refused(relay: RelayProcess, qemus: Qemus) -> None:
    """N1: each costs two pipes, whose memory the kernel counts as their maker's; over all VMs, and others are not counted."""
    for number in (1, 2):
        boot(relay, qemus, number)
    viewers = [relay.attach(1 + index % 2, "alice") for index in range(64)]
    with console_pipes() as (theirs, _):
        error = relay.ask(Attach(number=2, uid=1001, label="alice"), *theirs)["error"]
    assert (error["code"], error["text"]) == ("too-many", "you have 64 consoles open and the limit is 64")
    viewers.append(relay.attach(2, "bob"))
    viewers.pop(0).close()
    relay.wait_word(1, "viewers", count=31)
    relay.attach(1, "alice").close()
    for viewer in viewers:
        viewer.close()


def test_a_guest_that_does_not_read_stops_only_its_typist(relay: RelayProcess, qemus: Qemus) -> None:
    _, guest = boot(relay, qemus)
    _, other = boot(relay, qemus, 2)
    typist, reader, elsewhere = relay.attach(1, "typist"), relay.attach(1, "reader"), relay.attach(2)
    sent = 0
    while sent < 64 * MIB and select.select([], [typist.typed], [], 1.0)[1]:
        typist.type("k" * 62)
        sent += 62
    assert sent < 8 * MIB, "keys are queued without bound"
    elsewhere.type("x")
    assert other.recv(10) == b"x"
    guest.sendall(b"output goes on")
    reader.wait_output("output goes on")
    reader.control(do="who")
    reader.wait_notice("who")
    # When the guest reads again, all that was typed arrives.
    got = 0
    while got < sent:
        got += len(guest.recv(1 << 20))
    assert got == sent
    typist.type("!")
    assert guest.recv(10) == b"!"
    for viewer in (typist, reader, elsewhere):
        viewer.close()


# --- hostile QEMUs ----------------------------------------------------------------------------------------------------


def _endless_line(sock: socket.socket) -> None:
    sock.sendall(GREETING)
    while True:
        sock.sendall(b"x" * 65536)


def _events(sock: socket.socket) -> None:
    sock.sendall(GREETING)
    for number in (1, 2):
        sock.recv(4096)
        sock.sendall(b'{"return": {"status": "running"}, "id": %d}\n' % number)
    for _ in range(1_000_000 // 1000):
        sock.sendall(b'{"event": "STOP"}\n{"event": "RESUME"}\n' * 500)


def _early_end(sock: socket.socket) -> None:
    sock.sendall(GREETING[:40])


def _deep(sock: socket.socket) -> None:
    sock.sendall(GREETING)
    while True:
        sock.sendall(b'{"a":' * 10_000 + b"\n")


def _wrong_ids(sock: socket.socket) -> None:
    sock.sendall(GREETING)
    while True:
        sock.sendall(b'{"return": {}, "id": 4711}\n')


@pytest.mark.parametrize("script", [_endless_line, _events, _early_end, _deep, _wrong_ids])
def test_a_hostile_qemu_disturbs_nobody(relay: RelayProcess, qemus: Qemus, script: Callable[[socket.socket], None]) -> None:
    """B46, E06: the relay goes on, in bounded memory, and another VM's console answers promptly."""
    _, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    before = rss(relay.pid)
    qemus(2, script=script)
    relay.watch(2)
    waits = []
    for _ in range(40):
        began = time.monotonic()
        viewer.type("x")
        guest.sendall(guest.recv(10))
        viewer.output = b""
        viewer.wait_output("x")
        waits.append(time.monotonic() - began)
        time.sleep(0.02)
    assert sorted(waits)[len(waits) // 2] < 0.2 and max(waits) < 5
    assert rss(relay.pid) - before < 4 * MIB
    assert relay.process.poll() is None
    relay.tell(Forget(number=2))
    viewer.close()


def test_a_flooding_console_leaves_the_others_alone(relay: RelayProcess, qemus: Qemus) -> None:
    """E06, E07: and its log stays within its two files."""
    _, guest = boot(relay, qemus)
    _, loud = boot(relay, qemus, 2, log_max=256 * KIB)
    viewer = relay.attach(1)
    stop = threading.Event()

    def flood() -> None:
        try:
            while not stop.is_set():
                loud.sendall(b"y\n" * 50_000)
        except OSError:
            pass

    thread = threading.Thread(target=flood)
    thread.start()
    waits = []
    for _ in range(50):
        began = time.monotonic()
        viewer.type("x")
        guest.sendall(guest.recv(10))
        viewer.output = b""
        viewer.wait_output("x")
        waits.append(time.monotonic() - began)
        time.sleep(0.01)
    stop.set()
    thread.join()
    viewer.close()
    assert sorted(waits)[len(waits) // 2] < 0.2
    sizes = [len(log_of(relay.layout, 2, name)) for name in ("console.log", "console.log.1")]
    assert all(size <= 256 * KIB for size in sizes) and sizes[1] > 0


def test_qemus_own_words_are_bounded_and_never_block_it(relay: RelayProcess, qemus: Qemus, layout: Layout) -> None:
    """B47."""
    qemus()
    reader, writer = os.pipe()
    relay.watch(1, reader)
    os.close(reader)
    for _ in range(1000):
        os.write(writer, b"warning: guest did something\n" * 500)
    os.write(writer, b"the last words\n")
    until(lambda: b"the last words" in log_of(layout, name="qemu.log"), "the last words")
    os.close(writer)
    assert sum(len(log_of(layout, name=name)) for name in ("qemu.log", "qemu.log.1")) <= 64 * KIB


def test_a_log_that_cannot_be_written_stops_nothing(relay: RelayProcess, qemus: Qemus, layout: Layout) -> None:
    Path(layout.log).mkdir()
    Path(layout.vm_log(1)).write_text("a file where the directory belongs")
    _, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    guest.sendall(b"never mind the log")
    viewer.wait_output("never mind the log")
    viewer.close()


def test_a_qemu_started_anew_replaces_the_old_one(relay: RelayProcess, qemus: Qemus) -> None:
    first, guest = boot(relay, qemus)
    viewer = relay.attach(1)
    guest.sendall(b"old")
    viewer.wait_output("old")
    relay.wait_word(1, "output")
    first.close()
    qemu = qemus()
    reader, writer = os.pipe()
    relay.words.clear()
    relay.watch(1, reader)
    viewer.wait_notice("end")
    viewer.close()
    guest = qemu.console()
    relay.wait_word(1, "ready")
    assert not any(word == "output" for _, word, _ in relay.words)
    again = relay.attach(1)
    guest.sendall(b"new")
    again.wait_output("new")
    assert again.output == b"new", "no replay of another run's output"
    again.close()
    os.close(reader)
    os.close(writer)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_vm_costs_little_memory(relay: RelayProcess, qemus: Qemus) -> None:
    """P10: at most 0.5 MiB for each VM (with the broker's share), here with a full ring and a viewer."""
    idle = rss(relay.pid)
    viewers = []
    for number in range(1, 51):
        _, guest = boot(relay, qemus, number)
        viewers.append(relay.attach(number))
        guest.sendall(b"x" * 100_000)
    for viewer in viewers:
        while len(viewer.output) < 100_000:
            viewer.read_some()
    each = (rss(relay.pid) - idle) / 50
    print(f"relay: idle {idle / MIB:.1f} MiB, {each / KIB:.0f} KiB for each VM")
    for viewer in viewers:
        viewer.close()
    assert idle < 20 * MIB
    assert each < 200 * KIB
