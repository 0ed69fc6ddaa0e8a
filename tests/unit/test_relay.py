"""The relay's parts by themselves: ring, log, QMP's lines and monitor, the pen, words, descriptors from the service manager."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell import messages, servicemanager
from vmshell.consoles import CELL, Frames, cells
from vmshell.errors import ProtocolError
from vmshell.layout import Layout
from vmshell.relay import jobs, logfile, orders, qmp, words
from vmshell.relay.logfile import Log
from vmshell.relay.loop import IN, Loop
from vmshell.relay.orders import Orders
from vmshell.relay.qmp import Lines, Monitor
from vmshell.relay.ring import Ring
from vmshell.relay.service import Service
from vmshell.relay.viewers import Audience
from vmshell.relay.vm import Kept, Vm
from vmshell.relay.words import Words

ALICE = 1001, "alice"


class Owner:
    def __init__(self) -> None:
        self.errors: list[Exception] = []

    def broken(self, exc: Exception) -> None:
        self.errors.append(exc)


def run(loop: Loop, seconds: float) -> None:
    """Let *loop* work for so long."""
    loop.stopping = False

    def stop() -> None:
        loop.stopping = True

    loop.after(seconds, stop, Owner())
    loop.run()


# --- loop -------------------------------------------------------------------------------------------------------------


def test_an_exception_ends_its_owner_and_nobody_else(capfd: pytest.CaptureFixture[str]) -> None:
    loop, bad, good = Loop(), Owner(), Owner()
    pairs = [socket.socketpair() for _ in range(2)]
    heard: list[bytes] = []

    def raises(events: int) -> None:
        loop.drop(pairs[0][0].fileno())
        raise ValueError("hostile\x1b[2J")

    loop.add(pairs[0][0].fileno(), IN, raises, bad)
    loop.add(pairs[1][0].fileno(), IN, lambda events: heard.append(pairs[1][0].recv(10)), good)
    for _, other in pairs:
        other.send(b"x")
    run(loop, 0.1)
    assert [type(error) for error in bad.errors] == [ValueError] and not good.errors and heard == [b"x"]
    assert "\\x1b[2J" in capfd.readouterr().err
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_timers_run_in_order_and_cancelled_ones_do_not() -> None:
    loop, owner = Loop(), Owner()
    ran: list[str] = []
    loop.after(0.03, lambda: ran.append("late"), owner)
    loop.after(0.01, lambda: ran.append("early"), owner)
    loop.after(0.02, lambda: ran.append("never"), owner).cancel()
    run(loop, 0.06)
    assert ran == ["early", "late"]


# --- ring -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=30), st.integers(0, 200))
def test_the_ring_holds_the_last_bytes(pieces: list[bytes], back: int) -> None:
    ring, said = Ring(16), b""
    for piece in pieces:
        for at in range(0, len(piece), ring.size):
            part = piece[at : at + ring.size]
            done = 0
            for view in ring.space(len(part)):
                view[:] = part[done : done + len(view)]
                done += len(view)
            assert b"".join(ring.advance(len(part))) == part
        said += piece
        assert ring.head == len(said)
        assert ring.start == max(0, len(said) - ring.size)
        position = max(ring.start, ring.head - back)
        assert b"".join(ring.piece(position, ring.head - position)) == said[position:]


def test_a_refilled_ring_replays_the_end() -> None:
    ring = Ring(16)
    ring.fill(b"0123456789abcdefGHIJ")
    assert b"".join(ring.piece(ring.start, ring.head - ring.start)) == b"456789abcdefGHIJ"


# --- log --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=1, max_size=700), max_size=40))
def test_a_log_keeps_the_end_and_stays_small(pieces: list[bytes]) -> None:
    folder = f"/var/tmp/vms-log-{os.getpid()}"
    try:
        log = Log(f"{folder}/7/console.log", 256)
        for piece in pieces:
            log.write([piece[:3], piece[3:]], len(piece), 0.0)
            for path in (log.path, log.old):
                assert not os.path.exists(path) or os.path.getsize(path) <= 256
        said = b"".join(pieces)
        kept = log.tail(10_000)
        assert said.endswith(kept) and (len(kept) >= min(len(said), 256) or not pieces)
        assert log.tail(5) == said[-5:]
        assert log.lost == 0
        log.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_could_not_be_written_is_counted_and_noted(short_tmp: Path) -> None:
    blocker = short_tmp / "7"
    blocker.write_text("a file where the directory belongs")
    log = Log(f"{blocker}/console.log", 4096)
    log.write([b"x" * 100], 100, 1.0)
    assert log.lost == 100
    blocker.unlink()
    log.write([b"y" * 11], 11, 1.0)
    assert log.lost == 111, "it is not tried again at once"
    log.write([b"later"], 5, 1.0 + logfile.RETRY)
    text = log.tail(4096)
    assert text.endswith(b"later") and b"111 bytes are missing" in text and b"could not be written: File exists" in text
    assert log.lost == 0
    log.close()


def test_a_full_disk_is_survived() -> None:
    log = Log("/dev/full", 1 << 20)
    log.write([b"x" * 10], 10, 0.0)
    assert log.lost == 10 and log.why == "No space left on device"
    log.close()


def test_a_deleted_directory_is_made_again(short_tmp: Path) -> None:
    log = Log(f"{short_tmp}/7/console.log", 4096)
    log.write([b"before"], 6, 0.0)
    shutil.rmtree(short_tmp / "7")
    log.write([b"lost in silence"], 15, 0.1)
    log.write([b"after"], 5, 0.1 + logfile.LOOK)
    assert log.tail(100) == b"after"
    log.close()


def test_a_log_is_no_way_to_write_elsewhere(short_tmp: Path) -> None:
    target = short_tmp / "target"
    target.write_text("mine")
    (short_tmp / "7").mkdir()
    (short_tmp / "7/console.log").symlink_to(target)
    log = Log(f"{short_tmp}/7/console.log", 4096)
    log.write([b"x"], 1, 0.0)
    assert target.read_text() == "mine" and log.lost == 1


def test_purge_deletes_a_vms_log(short_tmp: Path) -> None:
    log = Log(f"{short_tmp}/7/console.log", 64)
    for _ in range(3):
        log.write([b"x" * 60], 60, 0.0)
    log.close()
    logfile.purge(f"{short_tmp}/7")
    logfile.purge(f"{short_tmp}/7")
    assert not (short_tmp / "7").exists()


# --- QMP --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")), max_size=10), st.integers(1, 20))
def test_lines_are_cut_wherever_the_reads_fall(expected: list[bytes], step: int) -> None:
    stream, lines, found = b"".join(line + b"\n" for line in expected), Lines(), []
    for at in range(0, len(stream), step):
        lines.feed(stream[at : at + step])
        while (line := lines.next()) is not None:
            found.append(line)
    assert found == expected


def test_a_line_without_an_end_is_refused_in_time() -> None:
    lines, fed = Lines(), 0
    with pytest.raises(ProtocolError):
        while True:
            lines.feed(b"x" * 4096)
            fed += 4096
            assert lines.next() is None
    assert fed <= qmp.LINE_MAX + 8192


class Machine:
    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def monitor_ready(self, status: str) -> None:
        self.heard.append(("ready", status))

    def monitor_event(self, name: str, data: dict[str, object]) -> None:
        self.heard.append((name, data))

    def monitor_lost(self, why: str) -> None:
        self.heard.append(("lost", why))


class Talk:
    """A monitor and, by hand, the QEMU at its other end."""

    def __init__(self) -> None:
        ours, self.qemu = socket.socketpair()
        ours.setblocking(False)
        self.qemu.setblocking(False)
        self.loop = Loop()
        self.machine = Machine()
        self.monitor = Monitor(self.loop, self.machine, ours)
        self.orders = Orders(self.loop, self.monitor)

    def give(self, what: str, value: int = 0, disks: int = 0, fd: int = -1) -> list[bool]:
        """Give an order; its answer comes into the list."""
        answers: list[bool] = []
        card: dict[str, Any] = {"mac": "06:00:00:00:00:07", "model": "e1000", "port": True} if what == "nic-add" else {}
        order = messages.Order(number=1, what=what, value=value, disks=disks, **card)
        self.orders.give(order, fd, answers.append)
        return answers

    def refuse(self, sent: dict[str, Any]) -> list[dict[str, Any]]:
        return self.say({"error": {"class": "GenericError", "desc": "no"}, "id": sent["id"]})

    def accept(self, sent: dict[str, Any], value: object = None) -> list[dict[str, Any]]:
        return self.say({"return": {} if value is None else value, "id": sent["id"]})

    def carry_out(self, sent: list[dict[str, Any]], refused: int = -1) -> list[dict[str, Any]]:
        """Say yes to each command, one after the other, and no to number *refused*; all that was sent."""
        seen: list[dict[str, Any]] = []
        while sent:
            (command,) = sent
            sent = self.refuse(command) if len(seen) == refused else self.accept(command)
            seen.append(command)
        return seen

    def say(self, *bodies: object, seconds: float = 0.05) -> list[dict[str, Any]]:
        """Send lines, let the monitor work, and return what it has sent by then."""
        for body in bodies:
            self.qemu.sendall(body if isinstance(body, bytes) else json.dumps(body).encode() + b"\r\n")
        run(self.loop, seconds)
        try:
            sent = self.qemu.recv(1 << 20)
        except (BlockingIOError, ConnectionResetError):
            return []
        return [json.loads(line) for line in sent.splitlines()]

    def greet(self, status: str = "prelaunch") -> None:
        (capabilities,) = self.say({"QMP": {"version": {}, "capabilities": []}})
        assert capabilities["execute"] == "qmp_capabilities"
        (query,) = self.say({"return": {}, "id": capabilities["id"]})
        assert query["execute"] == "query-status"
        self.say({"return": {"status": status}, "id": query["id"]})
        assert self.machine.heard == [("ready", status)]
        self.machine.heard.clear()

    def lost(self) -> bool:
        return bool(self.machine.heard) and self.machine.heard[-1][0] == "lost"


@pytest.fixture
def talk() -> Iterator[Talk]:
    made = Talk()
    yield made
    made.monitor.close()
    made.qemu.close()


def test_the_monitor_greets_and_hears_events(talk: Talk) -> None:
    talk.greet()
    assert talk.say({"event": "RESUME", "timestamp": {}}, {"event": "SHUTDOWN", "data": {"guest": True}}) == []
    talk.say({"event": "NIC_RX_FILTER_CHANGED", "data": {"name": "x" * 5000}})
    assert talk.machine.heard == [("RESUME", {}), ("SHUTDOWN", {"guest": True})]


def test_a_lost_monitor_answers_what_was_pending(talk: Talk) -> None:
    talk.greet()
    answers = talk.give("quit")
    talk.qemu.close()
    run(talk.loop, 0.05)
    assert answers == [False] and talk.lost()
    assert talk.give("cont") == [False]


def test_before_the_greeting_nothing_is_heard_and_no_order_given(talk: Talk) -> None:
    assert talk.give("cont") == [False]
    assert talk.say({"event": "RESUME"}) == [] and talk.lost()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flood",
    [
        b"x" * (qmp.LINE_MAX * 3),
        b"[" * 60_000 + b"\n" + b"not json\n" * 20,
        b'{"return": {}, "id": 99}\n' * 20,
        b'{"return": {}, "id": true}\n' * 20,
        b'{"return": {}, "id": [1]}\n' * 20,
        b"[1, 2]\n" * 20,
        b"\x00\xff\xfe\n" * 20,
        b'{"event": 1, "event": 2}\n' * 20,
    ],
    ids=["endless line", "deep", "wrong id", "id true", "id list", "no object", "no text", "a key twice"],
)
def test_hostile_qemu_loses_its_connection(talk: Talk, flood: bytes) -> None:
    """B46."""
    talk.greet()
    sent = 0
    while sent < len(flood) and not talk.lost():
        try:
            sent += talk.qemu.send(flood[sent : sent + 8192])
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass
        run(talk.loop, 0.01)
    for _ in range(500):
        if not talk.lost():
            run(talk.loop, 0.01)
    assert talk.lost()


def test_a_storm_of_events_is_read_at_a_bounded_rate(talk: Talk) -> None:
    """B46: a million events; QEMU is left waiting, not us working."""
    talk.greet()
    storm = b'{"event": "STOP"}\n' * 2000
    for _ in range(30):
        try:
            talk.qemu.send(storm)
        except BlockingIOError:
            pass
        run(talk.loop, 0.01)
    heard = [name for name, _ in talk.machine.heard]
    assert 32 <= len(heard) <= 3000 and set(heard) == {"STOP"}, "60,000 were sent"


def test_a_few_lines_nobody_understands_are_forgiven(talk: Talk) -> None:
    talk.greet()
    talk.say({"event": "X", "data": {"load": 0.5}}, {"event": "RESUME"})
    assert talk.machine.heard == [("RESUME", {})]


def test_a_monitor_that_does_not_answer_is_given_up(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talk.greet()
    monkeypatch.setattr(qmp, "ANSWER_TIME", 0.1)
    answers = talk.give("cont")
    run(talk.loop, 0.3)
    assert answers == [False] and talk.lost()


def test_one_question_at_a_time(talk: Talk) -> None:
    talk.greet()
    for _ in range(10):
        talk.monitor.ask_status()
    (first,) = talk.say()
    (second,) = talk.say({"return": {"status": "paused"}, "id": first["id"]})
    assert talk.say({"return": {"status": "running"}, "id": second["id"]}) == []
    assert [data["status"] for name, data in talk.machine.heard if name == "STATUS"] == ["paused", "running"]


# --- orders -----------------------------------------------------------------------------------------------------------


def test_every_order_of_the_broker_is_known() -> None:
    assert set(messages.ORDERS) == set(orders.PLANS) - {"break"} | {"log-on", "log-off"}
    assert {what for what in messages.ORDERS if orders.brings_fd(what)} == {"insert", "display", "nic-add"}


@pytest.mark.parametrize(
    ("what", "value", "command", "arguments"),
    [
        ("cont", 0, "cont", None),
        ("powerdown", 0, "system_powerdown", None),
        ("reset", 0, "system_reset", None),
        ("quit", 0, "quit", None),
        ("balloon", 300, "balloon", {"value": 300 << 20}),
        ("link-up", 2, "set_link", {"name": "nic2", "up": True}),
        ("link-down", 0, "set_link", {"name": "nic0", "up": False}),
    ],
)
@pytest.mark.slow
def test_single_orders_go_out_at_once_and_are_answered_once(
    talk: Talk, what: str, value: int, command: str, arguments: object
) -> None:
    talk.greet()
    eject = talk.give("eject")
    answers = talk.give(what, value)
    _, sent = talk.say()
    assert (sent["execute"], sent.get("arguments")) == (command, arguments)
    talk.say({"return": {}, "id": sent["id"]}, {"return": {}, "id": sent["id"]})
    assert answers == [True] and eject == [] and not talk.lost()
    answers = talk.give(what, value)
    (sent,) = talk.say()
    talk.refuse(sent)
    assert answers == [False]


def spoken(commands: list[dict[str, Any]]) -> list[str]:
    """Each command with the node or drive it is about."""
    said = []
    for command in commands:
        arguments = command.get("arguments", {})
        said.append(" ".join([command["execute"], *(arguments[key] for key in ("id", "node-name") if key in arguments)]))
    return said


INSERT = [
    "add-fd",
    "blockdev-open-tray cd1",
    "blockdev-remove-medium cd1",
    "blockdev-del cd1-disc",
    "blockdev-del cd1-disc-file",
    "blockdev-add cd1-disc-file",
    "blockdev-add cd1-disc",
    "blockdev-insert-medium cd1 cd1-disc",
    "blockdev-close-tray cd1",
    "remove-fd",
]


def opened(path: Path) -> int:
    path.write_bytes(b"a disc")
    return os.open(path, os.O_RDONLY)


def test_a_disc_is_inserted(talk: Talk, short_tmp: Path) -> None:
    talk.greet()
    fd = opened(short_tmp / "iso")
    answers = talk.give("insert", 1, fd=fd)
    with pytest.raises(OSError):
        os.fstat(fd)  # what was sent is not kept
    run(talk.loop, 0.01)
    line, fds, _, _ = socket.recv_fds(talk.qemu, 4096, 4)
    assert os.readlink(f"/proc/self/fd/{fds[0]}") == str(short_tmp / "iso") and len(fds) == 1
    os.close(fds[0])
    seen = talk.carry_out([json.loads(line)])
    assert spoken(seen) == INSERT and answers == [True]
    fdset = seen[0]["arguments"]["fdset-id"]
    assert orders.FDSET_FIRST <= fdset < orders.FDSET_LAST
    assert seen[5]["arguments"] == {
        "driver": "file",
        "node-name": "cd1-disc-file",
        "filename": f"/dev/fdset/{fdset}",
        "read-only": True,
        "auto-read-only": False,
    }
    assert seen[6]["arguments"] == {"driver": "raw", "node-name": "cd1-disc", "file": "cd1-disc-file", "read-only": True}
    assert seen[1]["arguments"]["force"] is True and seen[9]["arguments"] == {"fdset-id": fdset}


@pytest.mark.parametrize(
    ("step", "undone"),
    [
        (0, []),
        (1, ["remove-fd"]),
        (2, ["blockdev-close-tray cd1", "remove-fd"]),
        (5, ["blockdev-close-tray cd1", "remove-fd"]),
        (6, ["blockdev-del cd1-disc-file", "blockdev-close-tray cd1", "remove-fd"]),
        (7, ["blockdev-del cd1-disc", "blockdev-del cd1-disc-file", "blockdev-close-tray cd1", "remove-fd"]),
        (
            8,
            [
                "blockdev-remove-medium cd1",
                "blockdev-del cd1-disc",
                "blockdev-del cd1-disc-file",
                "blockdev-close-tray cd1",
                "remove-fd",
            ],
        ),
    ],
)
@pytest.mark.slow
def test_a_refused_step_takes_back_those_before_it(talk: Talk, short_tmp: Path, step: int, undone: list[str]) -> None:
    talk.greet()
    answers = talk.give("insert", 1, fd=opened(short_tmp / "iso"))
    seen = talk.carry_out(talk.say(), refused=step)
    assert spoken(seen) == INSERT[: step + 1] + undone and answers == [False]
    # And the next one is not in the way of what failed.
    answers = talk.give("eject", 1)
    assert spoken(talk.carry_out(talk.say())) == [*INSERT[1:5], "blockdev-close-tray cd1"] and answers == [True]


@pytest.mark.parametrize("step", [3, 4, 9])
@pytest.mark.slow
def test_what_need_not_work_is_no_failure(talk: Talk, short_tmp: Path, step: int) -> None:
    talk.greet()
    answers = talk.give("insert", 1, fd=opened(short_tmp / "iso"))
    assert spoken(talk.carry_out(talk.say(), refused=step)) == INSERT and answers == [True]


@pytest.mark.slow
def test_long_orders_go_one_after_the_other_and_are_bounded(talk: Talk, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "WAITING_MAX", 3)
    talk.greet()
    first, second = talk.give("eject", 0), talk.give("insert", 0, fd=opened(short_tmp / "iso"))
    waiting = [talk.give("eject", 0) for _ in range(orders.WAITING_MAX - 1)]
    before = len(os.listdir("/proc/self/fd"))
    assert talk.give("insert", 0, fd=opened(short_tmp / "other")) == [False], "too many wait"
    assert len(os.listdir("/proc/self/fd")) == before
    seen = spoken(talk.carry_out(talk.say()))
    assert seen[:5] == ["blockdev-open-tray cd0", *(text.replace("1", "0") for text in INSERT[2:5]), "blockdev-close-tray cd0"]
    assert seen[5:15] == [text.replace("1", "0") for text in INSERT] and len(seen) == 15 + 5 * len(waiting)
    assert [first, second, *waiting] == [[True]] * 4


def test_a_connection_lost_in_the_middle_fails_all_that_waits(talk: Talk, short_tmp: Path) -> None:
    talk.greet()
    before = len(os.listdir("/proc/self/fd"))
    first = talk.give("insert", 0, fd=opened(short_tmp / "iso"))
    others = [talk.give("insert", 0, fd=opened(short_tmp / "iso")) for _ in range(orders.WAITING_MAX)]
    (command,) = talk.say()
    talk.accept(command)
    talk.qemu.close()
    run(talk.loop, 0.1)
    assert talk.lost() and [first, *others] == [[False]] * (orders.WAITING_MAX + 1)
    assert len(os.listdir("/proc/self/fd")) == before - 2, "the two ends of the monitor"


@pytest.mark.parametrize("refused", [-1, 0, 1])
def test_a_display_client_is_handed_over(talk: Talk, refused: int) -> None:
    talk.greet()
    ours, theirs = socket.socketpair()
    answers = talk.give("display", fd=theirs.detach())
    run(talk.loop, 0.01)
    line, fds, _, _ = socket.recv_fds(talk.qemu, 4096, 4)
    with ours, socket.socket(fileno=fds[0]) as client:
        client.send(b"RFB")
        assert ours.recv(10) == b"RFB"
    seen = talk.carry_out([json.loads(line)], refused)
    name = seen[0]["arguments"]["fdname"]
    assert spoken(seen) == {-1: ["getfd", "add_client"], 0: ["getfd"], 1: ["getfd", "add_client", "closefd"]}[refused]
    if refused != 0:
        assert seen[1]["arguments"] == {"protocol": "vnc", "fdname": name, "skipauth": True}
    assert answers == [refused < 0]


def test_a_break_goes_to_the_serial_port(talk: Talk) -> None:
    talk.greet()
    talk.orders.send_break(1)
    (sent,) = talk.say()
    assert (sent["execute"], sent["arguments"]) == ("chardev-send-break", {"id": "ser0"})


THERE = [{"name": "nic1", "type": "child<e1000>"}]
GONE = [{"name": "nic0", "type": "child<e1000>"}]


@pytest.mark.parametrize("refused", [-1, 0, 1, 2])
def test_a_card_is_added_or_nothing_of_it_is_left(talk: Talk, refused: int) -> None:
    talk.greet()
    ours, theirs = socket.socketpair()
    with ours:
        answers = talk.give("nic-add", 1, fd=theirs.detach())
        (asked,) = talk.say()
        (look,) = talk.refuse(asked)
        (unplug,) = talk.accept(look, GONE)
        assert spoken([asked, look, unplug]) == ["device_del nic1", "qom-list", "netdev_del n1"], "nothing is in its way"
        talk.qemu.sendall(json.dumps({"error": {"class": "DeviceNotFound"}, "id": unplug["id"]}).encode() + b"\n")
        run(talk.loop, 0.01)
        line, fds, _, _ = socket.recv_fds(talk.qemu, 4096, 4)
        os.close(fds[0])
        seen = talk.carry_out([json.loads(line)], refused)
    done = ["getfd", "netdev_add n1", "device_add nic1"]
    undone = {-1: [], 0: [], 1: ["closefd"], 2: ["netdev_del n1", "closefd"]}[refused]
    assert spoken(seen) == done[: refused + 1 if refused >= 0 else 3] + undone and answers == [refused < 0]
    if refused < 0:
        name = seen[0]["arguments"]["fdname"]
        assert seen[1]["arguments"] == {"type": "tap", "id": "n1", "fd": name, "vhost": False}
        card = {"driver": "e1000", "id": "nic1", "netdev": "n1", "mac": "06:00:00:00:00:07", "romfile": "", "bus": "port1"}
        assert seen[2]["arguments"] == card


def test_a_card_is_gone_when_the_guest_has_let_it_go(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmshell.relay.jobs.LOOK", 0.01)
    talk.greet()
    answers = talk.give("nic-remove", 1)
    (asked,) = talk.say()
    assert (asked["execute"], asked["arguments"]) == ("device_del", {"id": "nic1"})
    (look,) = talk.accept(asked)
    assert (look["execute"], look["arguments"]) == ("qom-list", {"path": "/machine/peripheral"})
    (look,) = talk.accept(look, THERE)
    assert answers == []
    (unplug,) = talk.accept(look, GONE)
    assert (unplug["execute"], unplug["arguments"]) == ("netdev_del", {"id": "n1"})
    talk.accept(unplug)
    assert answers == [True]


def test_a_card_that_the_guest_keeps_stays_whole(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmshell.relay.jobs.GONE_TIME", 0.0)
    talk.greet()
    for answer in (talk.accept, talk.refuse):
        answers = talk.give("nic-remove", 1)
        (asked,) = talk.say()
        (look,) = answer(asked)
        assert talk.accept(look, THERE) == [] and answers == [False]
    # It is in the way of a new one as long as the guest has it.
    ours, theirs = socket.socketpair()
    answers = talk.give("nic-add", 1, fd=theirs.detach())
    (asked,) = talk.say()
    (look,) = talk.refuse(asked)
    assert talk.accept(look, THERE) == [] and answers == [False]
    with ours:
        assert ours.recv(1) == b"", "the cable is not kept"


@pytest.mark.parametrize("there", [False, True])
def test_a_card_that_went_late_can_be_removed_again(talk: Talk, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """The one who asked first gave up: QEMU says no to the second time, of a card that is gone, or still on its way."""
    monkeypatch.setattr("vmshell.relay.jobs.LOOK", 0.01)
    talk.greet()
    answers = talk.give("nic-remove", 1)
    (asked,) = talk.say()
    (look,) = talk.refuse(asked)
    if there:
        (look,) = talk.accept(look, THERE)
    (unplug,) = talk.accept(look, GONE)
    assert spoken([unplug]) == ["netdev_del n1"] and answers == []
    talk.refuse(unplug)
    assert answers == [True], "no cable either: all of it is gone"


def begin_job(talk: Talk, what: str = "snapshot-save") -> tuple[list[bool], dict[str, Any]]:
    """An order whose job QEMU has just been told to begin, and that command."""
    talk.greet()
    answers = talk.give(what, 7, disks=0b1010)
    (dismiss,) = talk.say()
    assert (dismiss["execute"], dismiss["arguments"]) == ("job-dismiss", {"id": "snap7"})
    (begin,) = talk.refuse(dismiss)
    return answers, begin


def job(status: str, name: str = "snap7", **more: object) -> list[dict[str, object]]:
    return [{"id": "other", "status": "running"}, {"id": name, "status": status, "current-progress": 1, **more}]


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("snapshot-save", {"job-id": "snap7", "tag": "s7", "vmstate": "disk1", "devices": ["disk1", "disk3"]}),
        ("snapshot-delete", {"job-id": "snap7", "tag": "s7", "devices": ["disk1", "disk3"]}),
    ],
)
def test_a_job_is_asked_about_until_it_has_concluded(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, what: str, arguments: object
) -> None:
    monkeypatch.setattr(jobs, "LOOK", 0.01)
    answers, begin = begin_job(talk, what)
    assert (begin["execute"], begin["arguments"]) == (what, arguments) and talk.orders.in_job
    (look,) = talk.accept(begin)
    for status in ("running", "pending"):
        assert look["execute"] == "query-jobs" and answers == []
        (look,) = talk.accept(look, job(status))
    (dismiss,) = talk.accept(look, job("concluded"))
    assert (dismiss["execute"], dismiss["arguments"]) == ("job-dismiss", {"id": "snap7"})
    (status_query,) = talk.accept(dismiss)
    assert status_query["execute"] == "query-status" and answers == [True] and not talk.orders.in_job


@pytest.mark.parametrize("answer", [job("concluded", error="no space left"), job("concluded", error=None)])
def test_a_job_that_ends_with_an_error_has_failed(talk: Talk, answer: object) -> None:
    answers, begin = begin_job(talk)
    (look,) = talk.accept(begin)
    (dismiss,) = talk.accept(look, answer)
    assert dismiss["execute"] == "job-dismiss"
    talk.refuse(dismiss)
    assert answers == [False] and not talk.lost()


@pytest.mark.parametrize("answer", [[], {}, [7], "snap7", job("concluded", "snap70"), [{"id": ["snap7"], "status": "concluded"}]])
@pytest.mark.slow
def test_a_job_nobody_knows_has_failed(talk: Talk, answer: object) -> None:
    """B46."""
    answers, begin = begin_job(talk)
    (look,) = talk.accept(begin)
    talk.accept(look, answer)
    assert answers == [False] and not talk.orders.in_job


@pytest.mark.parametrize("status", [None, 7, [], "CONCLUDED", "x" * 5000])
@pytest.mark.slow
def test_a_status_nobody_knows_is_no_end(talk: Talk, status: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """B46."""
    monkeypatch.setattr(jobs, "LOOK", 0.01)
    monkeypatch.setattr(jobs, "JOB_TIME", 0.3)
    answers, begin = begin_job(talk)
    (look,) = talk.accept(begin)
    (look,) = talk.say({"return": [{"id": "snap7", "status": status}], "id": look["id"]})
    assert look["execute"] == "query-jobs" and answers == []
    run(talk.loop, 0.4)
    talk.accept(look, job("running"))
    assert answers == [False], "its time was up"


def test_a_refused_job_has_failed(talk: Talk) -> None:
    answers, begin = begin_job(talk)
    (status_query,) = talk.refuse(begin)
    assert status_query["execute"] == "query-status" and answers == [False] and not talk.orders.in_job


@pytest.mark.slow
def test_answers_may_be_late_during_a_job_and_not_after_it(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "ANSWER_TIME", 0.5)
    answers, begin = begin_job(talk)
    early = talk.give("powerdown")
    run(talk.loop, 0.9)
    assert not talk.lost() and answers == early == []
    (command,) = talk.say()
    (look,) = talk.say({"return": {}, "id": begin["id"]}, {"return": {}, "id": command["id"]})
    run(talk.loop, 0.3)
    assert not talk.lost() and early == [True]
    (dismiss,) = talk.accept(look, job("concluded"))
    talk.accept(dismiss)
    assert answers == [True]
    run(talk.loop, 0.7)
    assert talk.lost(), "the question after its status was not answered in time"


def test_a_job_has_its_time_too(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "ANSWER_TIME", 0.5)
    monkeypatch.setattr(jobs, "JOB_TIME", 2.0)
    answers, _ = begin_job(talk)
    run(talk.loop, 0.9)
    assert not talk.lost()
    run(talk.loop, 1.3)
    assert talk.lost() and answers == [False] and not talk.orders.in_job


# --- a VM's state -----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(layout: Layout) -> Vm:
    """A VM after our restart, whose QEMU cannot be reached; its words go nowhere."""
    return Vm(Loop(), layout, Service(""), 7, 4096, lambda number, word, count: None, lambda vm: None)


class Ends:
    """A viewer's ends of its two pipes; `theirs` are the relay's, to be given away."""

    def __init__(self) -> None:
        keys, self.typed = os.pipe()
        self.shown, output = os.pipe()
        self.theirs = keys, output
        self._frames = Frames()
        for fd in (self.shown, self.typed):
            os.set_blocking(fd, False)

    def frames(self) -> list[tuple[bytes, bytes]]:
        """What has come since the last look."""
        found: list[tuple[bytes, bytes]] = []
        try:
            while data := os.read(self.shown, 1 << 17):
                found += self._frames.feed(data)
        except BlockingIOError:
            pass
        return found

    def notices(self) -> list[dict[str, Any]]:
        found = self.frames()
        assert all(tag == b"n" for tag, _ in found), found
        return [json.loads(payload) for _, payload in found]

    def states(self) -> list[str]:
        return [notice["state"] for notice in self.notices() if notice["notice"] == "state"]

    def close(self) -> None:
        os.close(self.shown)
        os.close(self.typed)


def test_after_our_restart_kept_viewers_are_not_told_what_they_know(machine: Vm) -> None:
    kept = Kept()
    ends = Ends()
    for end, fd in zip(("keys", "output"), ends.theirs, strict=True):
        kept.viewers.append((f"viewer-7-1-w-1001-{b'alice'.hex()}-{end}", fd))
    with contextlib.closing(ends):
        machine.resume(kept)
        machine.monitor_ready("running")
        assert machine.state == "running" and ends.states() == []
        machine.monitor_event("STATUS", {"status": "paused"})
        assert ends.states() == ["paused"]
        machine.monitor_event("RESUME", {})
        assert ends.states() == ["running"]
        machine.forget("done", False)


def test_a_viewer_of_whom_half_was_kept_is_let_go(machine: Vm) -> None:
    """The store was full, say: it sees its end and attaches again."""
    kept = Kept()
    halves = [Ends() for _ in range(3)]
    stem = f"viewer-7-%d-w-1001-{b'alice'.hex()}"
    kept.viewers.append((f"{stem % 1}-keys", halves[0].theirs[0]))
    kept.viewers.append((f"{stem % 2}-output", halves[1].theirs[1]))
    kept.viewers += [(f"{stem % 3}-keys", halves[2].theirs[1]), (f"{stem % 3}-output", halves[2].theirs[0])]
    for half, end in ((halves[0], 1), (halves[1], 0)):
        os.close(half.theirs[end])
    machine.resume(kept)
    assert machine.console.audience.viewers == []
    for half in halves:
        assert os.read(half.shown, 1) == b""
        with pytest.raises(BrokenPipeError):
            os.write(half.typed, b"x")
        half.close()
    machine.forget("done", False)


def test_whose_a_kept_viewer_is_outlives_our_restart(machine: Vm) -> None:
    """Of one that an earlier version kept nobody knows it: it could not be revoked, so it attaches again."""
    kept, ends, old = Kept(), Ends(), Ends()
    for stem, viewer in ((f"viewer-7-1-w-1001-{b'alice'.hex()}", ends), (f"viewer-7-2-w-{b'bob'.hex()}", old)):
        kept.viewers += [(f"{stem}-{end}", fd) for end, fd in zip(("keys", "output"), viewer.theirs, strict=True)]
    with contextlib.closing(ends), contextlib.closing(old):
        machine.resume(kept)
        assert [viewer.user for viewer in machine.console.audience.viewers] == [ALICE]
        assert os.read(old.shown, 1) == b""
        machine.console.audience.cut_off(ALICE, "access-ended", "out")
        assert machine.console.audience.viewers == [] and ends.frames() != [] and os.read(ends.shown, 1) == b""
        machine.forget("done", False)


def test_a_fresh_vms_viewers_are_told_that_it_runs(machine: Vm) -> None:
    ends = Ends()
    with contextlib.closing(ends):
        machine.console.audience.attach(*ends.theirs, ALICE, False, True)
        machine.monitor_ready("prelaunch")
        assert ends.states() == []
        machine.monitor_event("RESUME", {})
        assert ends.states() == ["running"]
        machine.forget("done", False)


# --- who may type -----------------------------------------------------------------------------------------------------


class Host:
    def __init__(self) -> None:
        self.typed = b""
        self.breaks = 0
        self.takes_keys = True

    def type(self, keys: bytes) -> bool:
        self.typed += keys
        return self.takes_keys

    def send_break(self) -> None:
        self.breaks += 1

    def review(self) -> None: ...

    def viewers_changed(self, count: int) -> None: ...

    def describe(self) -> dict[str, object]:
        return {"quiet_s": None, "state": "running"}


class Room:
    """An audience whose members are told apart by their labels."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.host = Host()
        self.ring = Ring(4096)
        self.audience = Audience(self.loop, self.ring, self.host, Service(""), "viewer-7")
        self.ends: dict[str, Ends] = {}

    def join(self, label: str, readonly: bool = False) -> None:
        self.ends[label] = Ends()
        self.audience.attach(*self.ends[label].theirs, (1001, label), readonly, True)

    def send(self, label: str, message: bytes) -> None:
        """Send a tag and what follows it in cells."""
        os.write(self.ends[label].typed, cells(message[:1], message[1:]))
        run(self.loop, 0.01)

    def leave(self, label: str) -> None:
        self.ends.pop(label).close()
        run(self.loop, 0.01)

    def notices(self, label: str) -> list[dict[str, Any]]:
        """What has come for *label* since the last look."""
        run(self.loop, 0.01)
        return self.ends[label].notices()

    def holder(self) -> str | None:
        holder = self.audience.pen.holder
        return holder.label if holder is not None else None


@pytest.fixture
def room() -> Iterator[Room]:
    made = Room()
    yield made
    for ends in made.ends.values():
        ends.close()
    made.audience.end("over")
    for viewer in list(made.audience.viewers):
        viewer.close()


def test_the_first_frame_is_hello(room: Room) -> None:
    room.join("reader", readonly=True)
    room.join("alice")
    hello = {"notice": "hello", "quiet_s": None, "state": "running"}
    assert room.notices("reader")[0] == {**hello, "pen": False, "holder": None, "viewers": 1}
    assert room.notices("alice") == [{**hello, "pen": True, "holder": "alice", "viewers": 2}]


def test_the_pen_goes_to_the_first_writer_and_then_to_the_longest_there(room: Room) -> None:
    room.join("reader", readonly=True)
    for label in ("alice", "bob", "carol"):
        room.join(label)
    assert room.holder() == "alice"
    room.leave("bob")
    assert room.holder() == "alice"
    room.notices("carol")
    room.notices("reader")
    room.leave("alice")
    assert room.holder() == "carol"
    assert room.notices("carol") == [{"notice": "pen", "pen": True, "holder": "carol"}]
    assert room.notices("reader") == [{"notice": "pen", "pen": False, "holder": "carol"}]
    room.leave("carol")
    assert room.holder() is None
    room.join("dave")
    assert room.holder() == "dave"


def test_taking_the_pen_tells_both(room: Room) -> None:
    room.join("alice")
    room.join("bob")
    room.notices("alice")
    room.notices("bob")
    room.send("bob", b'c{"do":"pen"}')
    assert room.notices("alice") == [{"notice": "pen", "pen": False, "holder": "bob"}]
    assert room.notices("bob") == [{"notice": "pen", "pen": True, "holder": "bob"}]
    room.send("alice", b"dlost")
    room.send("bob", b"dkept")
    assert room.host.typed == b"kept"


def test_a_reader_never_gets_the_pen(room: Room) -> None:
    room.join("reader", readonly=True)
    room.notices("reader")
    for packet in (b'c{"do":"pen"}', b"drm -rf /\r", b'c{"do":"break"}'):
        room.send("reader", packet)
    assert room.holder() is None and room.host.typed == b"" and room.host.breaks == 0
    assert [notice["notice"] for notice in room.notices("reader")] == ["refused"], "at most one in a second"


OUT = {"notice": "end", "reason": "you are out", "code": "access-ended"}


def test_whoever_is_cut_off_hears_why_and_sees_no_more(room: Room) -> None:
    """G18: the pen goes on; others, of the same name under another uid, too, stay."""
    for label in ("alice", "bob"):
        room.join(label)
    other = Ends()
    room.audience.attach(*other.theirs, (1002, "alice"), False, True)
    room.notices("alice")
    os.write(room.ends["alice"].typed, cells(b"d", b"too late"))
    room.audience.cut_off((1001, "alice"), "access-ended", "you are out")
    assert room.notices("alice") == [OUT] and os.read(room.ends["alice"].shown, 1) == b""
    assert room.host.typed == b"" and room.holder() == "bob"
    assert [viewer.user for viewer in room.audience.viewers] == [(1001, "bob"), (1002, "alice")]
    other.close()
    run(room.loop, 0.01)


def say(room: Room, size: int) -> None:
    for _ in range(size // 1024):
        for view in room.ring.space(1024):
            view[:] = b"x" * len(view)
        room.ring.advance(1024)
        room.audience.deliver()


@pytest.mark.parametrize("reads", [False, True])
def test_whoever_reads_nothing_is_cut_off_at_once(room: Room, reads: bool) -> None:
    """G18: without a word, if there is no room for it; and of what the guest has said and it has not read nothing comes."""
    room.join("alice")
    say(room, 1 << 17)
    (viewer,) = room.audience.viewers
    assert viewer.blocked
    ends = room.ends["alice"]
    if reads:
        ends.frames()
    else:
        with pytest.raises(BlockingIOError):
            while True:
                os.write(viewer.output, b"\0")  # no room for a word either
    room.audience.cut_off((1001, "alice"), "access-ended", "you are out")
    assert viewer.closed and room.audience.viewers == [] and room.audience.blocked == 0
    if reads:
        assert ends.notices() == [OUT]
    else:
        while (rest := os.read(ends.shown, 1 << 17)) != b"":
            assert b"access-ended" not in rest
    assert os.read(ends.shown, 1) == b""


def test_who_and_break(room: Room) -> None:
    room.join("alice")
    room.join("bob")
    room.notices("alice")
    room.send("alice", b'c{"do":"who"}')
    assert room.notices("alice") == [
        {"notice": "who", "viewers": [{"label": "alice", "pen": True}, {"label": "bob", "pen": False}]}
    ]
    room.send("alice", b'c{"do":"break"}')
    room.send("bob", b'c{"do":"break"}')
    assert room.host.breaks == 1


def test_a_typist_waits_for_a_guest_that_does_not_read(room: Room) -> None:
    room.join("alice")
    room.join("bob")
    room.host.takes_keys = False
    for _ in range(5):
        room.send("alice", b"dx")
    assert room.host.typed == b"x"
    room.send("bob", b'c{"do":"pen"}')
    room.host.takes_keys = True
    room.send("bob", b"dy")
    assert room.host.typed == b"xy", "with the pen gone, alice's keys are refused, not queued"
    room.audience.keys_wanted()
    room.send("bob", b"dz")
    assert room.host.typed == b"xyz"


def test_patience_is_used_up_and_earned_again_by_reading(room: Room) -> None:
    room.join("alice")
    room.notices("alice")
    (viewer,) = room.audience.viewers

    def forfeit() -> bool:
        return viewer.forfeit

    def blocked() -> bool:
        return viewer.blocked

    audience, ring, needed = room.audience, room.ring, 1024
    while audience.room() >= needed:
        for view in ring.space(512):
            view[:] = b"x" * len(view)
        ring.advance(512)
        audience.deliver()
    assert blocked()
    audience.charge(needed)
    room.loop.now += 0.15
    audience.charge(needed)
    assert audience.room() < needed and not forfeit() and 0.04 < viewer.patience < 0.06
    room.loop.now += 0.06
    audience.charge(needed)
    assert forfeit() and audience.room() == ring.size, "nothing waits for it any more"
    while blocked():
        room.ends["alice"].frames()
        run(room.loop, 0.01)
    assert not forfeit() and 0 < viewer.patience < 0.02, "a ring full earns a few milliseconds, not a fifth of a second"


@pytest.mark.parametrize(
    "cell",
    [
        *(b"\1q", b"\0q", b"\0c", b"\0d", b"\1c{", b"\2c[]", b'\x08c{"do":7}'),
        *(b'\x19c{"do":"pen","do":"who"}', b"\x3ec" + b"[" * 62, b""),
    ],
)
def test_odd_cells_are_ignored(room: Room, cell: bytes) -> None:
    room.join("alice")
    room.notices("alice")
    os.write(room.ends["alice"].typed, cell.ljust(CELL, b"\0"))
    room.send("alice", b"dok")
    assert room.host.typed == b"ok" and room.notices("alice") == []


@pytest.mark.parametrize("size", [63, 64, 255])
def test_a_cell_that_claims_too_much_closes_its_viewer(room: Room, size: int) -> None:
    room.join("alice")
    room.join("bob")
    os.write(room.ends["alice"].typed, bytes((size,)) + b"d" + b"x" * 254)
    run(room.loop, 0.01)
    assert room.holder() == "bob" and room.host.typed == b""


def test_cells_that_come_in_pieces_are_put_together(room: Room) -> None:
    room.join("alice")
    stream = cells(b"d", bytes(range(256)) * 20)
    for at in range(0, len(stream), 1001):
        os.write(room.ends["alice"].typed, stream[at : at + 1001])
        run(room.loop, 0.01)
    assert room.host.typed == bytes(range(256)) * 20


def test_a_flood_of_controls_closes_its_viewer(room: Room) -> None:
    room.join("alice")
    for _ in range(30):
        try:
            for _ in range(100):
                os.write(room.ends["alice"].typed, cells(b"c", b"{}"))
        except BlockingIOError:
            pass
        except BrokenPipeError:
            break
        run(room.loop, 0.02)
    assert room.audience.viewers == []


def test_one_turn_takes_a_few_cells(room: Room) -> None:
    """E06: whoever has filled their pipe with requests is heard a little at a time."""
    room.join("alice")
    (viewer,) = room.audience.viewers
    os.write(room.ends["alice"].typed, cells(b"d", b"x" * 62 * 64))
    viewer.read()
    assert len(room.host.typed) == 62 * 16


@pytest.mark.parametrize("size", [4096, 8192, 65536])
def test_frames_are_whole_in_a_pipe_of_any_size(room: Room, size: int) -> None:
    """Of what lies in the pipe at any moment, nothing is half a frame: so a killed relay leaves none behind."""
    room.ring = room.audience.ring = Ring()
    room.join("alice")
    ends = room.ends["alice"]
    fcntl.fcntl(ends.shown, fcntl.F_SETPIPE_SZ, size)
    room.notices("alice")
    (viewer,) = room.audience.viewers
    said = got = b""
    for step, count in enumerate((1, 5000, 40_000, 4093, 4094, 8186, 65_536, 100, 12_000)):
        data = bytes((step,)) * count
        for part in room.ring.space(count):
            part[:] = data[: len(part)]
        room.ring.advance(count)
        room.audience.deliver()
        said += data
        while viewer.blocked:
            frames = Frames()
            for tag, payload in frames.feed(os.read(ends.shown, 1 << 17)):
                assert tag == b"d"
                got += payload
            assert not frames._rest
            run(room.loop, 0.01)
    got += b"".join(payload for _, payload in ends.frames())
    assert got == said


def test_a_list_of_people_is_as_long_as_a_frame(room: Room) -> None:
    for number in range(64):
        room.join(f"{number:02d}" + "\u00e4" * 78)
    label = f"00{'ä' * 78}"
    room.notices(label)
    room.send(label, b'c{"do":"who"}')
    (notice,) = room.notices(label)
    assert 0 < len(notice["viewers"]) < 64 and notice["more"] == 64 - len(notice["viewers"])


# --- words and the service manager ------------------------------------------------------------------------------------


def test_words_have_a_bounded_rate_and_end_with_the_last_one() -> None:
    loop = Loop()
    heard: list[str] = []
    said = Words(loop, lambda word, count: heard.append(word))
    for _ in range(500):
        said.say("paused")
        said.say("running")
    assert len(heard) == words.BURST
    run(loop, 2 * words.INTERVAL)
    assert heard[words.BURST :] == ["paused", "running"]


def test_nothing_is_sent_without_a_service_manager() -> None:
    quiet = Service("")
    quiet.store("console-1", 0)
    assert not quiet.keeps


def test_descriptors_for_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert servicemanager.passed() == []
    assert "LISTEN_FDS" not in os.environ


def test_the_relay_stays_lean(layout: Layout) -> None:
    """P10: no asyncio, no third-party code, none of the dear imports."""
    import subprocess
    import sys

    code = "import sys; sys.path.insert(0, sys.argv[1]); import vmshell.relay.main; print(*sys.modules)"
    root = str(Path(__file__).resolve().parents[2])
    found = subprocess.run([sys.executable, "-IS", "-c", code, root], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in found.stdout.split()}
    assert not loaded & {"asyncio", "typing", "dataclasses", "logging", "subprocess", "pathlib", "argparse", "threading", "ssl"}
