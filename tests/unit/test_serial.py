"""The FIFOs of a serial port: how the broker makes them, which ones the launcher gives to QEMU, what the relay does with them."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.serial import SerialPort, guests_side
from vmshell.broker.lifecycle import serial_port
from vmshell.errors import LaunchRefused
from vmshell.launcher.runs import Runs
from vmshell.launcher_messages import Launch
from vmshell.layout import Layout
from vmshell.relay.console import CRUMBS
from vmshell.relay.loop import IN, Loop
from vmshell.relay.port import Port, every_name, from_store
from vmshell.relay.service import Service
from vmshell.relay.vm import Vm

# --- the broker -------------------------------------------------------------------------------------------------------


def test_each_holder_has_its_own_and_nobody_sees_an_end(tmp_path: Path) -> None:
    with contextlib.ExitStack() as relay:
        with contextlib.ExitStack() as qemu:
            theirs = serial_port.make(str(tmp_path), qemu)
            ours = serial_port.open_both(str(tmp_path), relay)
            for fd in ours:
                os.set_blocking(fd, False)
            assert all(os.get_blocking(fd) for fd in theirs), "what one sets is not set for the other"
            os.write(theirs[1], b"last words")
        assert os.read(ours[1], 100) == b"last words"
        with pytest.raises(BlockingIOError):
            os.read(ours[1], 100)
        os.write(ours[0], b"keys for nobody")
    for name in serial_port.NAMES:
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_run_never_gets_the_fifos_of_another(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        serial_port.make(str(tmp_path), stack)
        with pytest.raises(FileExistsError):
            serial_port.make(str(tmp_path), stack)


def test_without_fifos_there_are_none_to_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with contextlib.ExitStack() as stack:
        assert serial_port.open_both(str(tmp_path), stack) == ()
        os.mkfifo(tmp_path / serial_port.NAMES[0])
        assert serial_port.open_both(str(tmp_path), stack) == ()
    assert os.listdir("/proc/self/fd") == before


# --- the launcher -----------------------------------------------------------------------------------------------------


def refused(fds: list[int]) -> str:
    """Why the launcher starts no QEMU with these as its 0, 1 and 2."""
    uids = cast(Any, SimpleNamespace(of_vm=lambda number: number, apart=False, managed=False, signal_all=None))
    policy = cast(Any, SimpleNamespace(cpu_models=frozenset))
    runs = Runs(uids=uids, policy=policy, broker_uid=os.geteuid())
    plan: dict[str, object] = {"accel": "tcg", "cpus": 1, "memory": 32, "file_size_max": 0}
    with contextlib.ExitStack() as stack:
        if len(fds) == 3:
            barrier = stack.enter_context(tempfile.TemporaryDirectory()) + "/barrier"
            os.mkfifo(barrier)
            fds = [os.open(barrier, os.O_RDWR), *fds]
            stack.callback(os.close, fds[0])
            plan["block_fd"] = 3
        with pytest.raises(LaunchRefused) as caught:
            runs.launch(Launch(number=7, plan=plan), fds, None)
    return str(caught.value)


def test_the_launcher_gives_qemu_fifos_that_have_no_end(tmp_path: Path) -> None:
    """An end seen once is input lost for ever; a terminal or a file in a FIFO's place would be worse."""
    with contextlib.ExitStack() as stack:
        good = serial_port.make(str(tmp_path), stack)
        reader, writer = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (reader, writer, null):
            stack.callback(os.close, fd)
        assert "standard input, output and error must be there" in refused([*good])
        assert "stdin: no pipe" in refused([null, good[1], writer])
        assert "stdin: a pipe opened in another mode" in refused([reader, good[1], writer])
        assert "stdout: a pipe opened in another mode" in refused([good[0], writer, writer])
        assert "stderr: a pipe opened in another mode" in refused([*good, reader])


# --- the relay --------------------------------------------------------------------------------------------------------


@pytest.fixture
def guest(layout: Layout) -> Iterator[SerialPort]:
    """The guest's side of VM 7."""
    os.makedirs(layout.vm_run(7))
    with guests_side(layout.vm_run(7)) as side:
        yield side


def opened(layout: Layout) -> Port:
    with contextlib.ExitStack() as stack:
        input_fd, output_fd = (os.dup(fd) for fd in serial_port.open_both(layout.vm_run(7), stack))
    return Port(input_fd, output_fd, lasting=True)


class Stop:
    def broken(self, exc: Exception) -> None:
        raise exc


def work(loop: Loop, seconds: float = 0.1) -> None:
    loop.stopping = False
    loop.after(seconds, lambda: setattr(loop, "stopping", True), Stop())
    loop.run()


def test_trouble_of_ours_does_not_cost_a_vm_its_console(layout: Layout, guest: SerialPort) -> None:
    """Nobody but the broker could open the FIFOs again: they are kept, and read again after a moment."""
    loop = Loop()
    vm = Vm(loop, layout, Service(""), 7, 1 << 20, lambda number, word, count: None, lambda vm: None)
    vm.start(fresh=True, port=opened(layout))
    guest.sendall(b"before;")
    work(loop)
    vm.console.broken(ValueError("of ours"))
    assert not vm.console.connected
    guest.sendall(b"after")
    work(loop, 0.3)
    assert Path(layout.vm_log(7), "console.log").read_bytes() == b"before;after"
    vm.forget("done", False)


def test_a_qemu_that_reads_its_own_words_keeps_nobody_busy(layout: Layout, guest: SerialPort) -> None:
    """It holds both ends of both FIFOs, so it can wake us for nothing as often as it likes; we look now and then."""
    loop = Loop()
    vm = Vm(loop, layout, Service(""), 7, 1 << 20, lambda number, word, count: None, lambda vm: None)
    port = opened(layout)
    vm.start(fresh=True, port=port)
    for _ in range(CRUMBS + 2):
        vm.console._on_output(IN)
    assert loop._table[port.output_fd].mask == 0, "it waits for time to go by"
    work(loop)
    assert loop._table[port.output_fd].mask == IN
    vm.forget("done", False)


def test_half_a_port_is_none(layout: Layout, guest: SerialPort) -> None:
    before = os.listdir("/proc/self/fd")
    whole = opened(layout)
    assert from_store({"input": whole.input_fd}) is None
    assert from_store({"output": whole.output_fd}) is None
    assert os.listdir("/proc/self/fd") == before


def test_a_port_is_kept_under_names_that_are_all_known(layout: Layout, guest: SerialPort) -> None:
    port = opened(layout)
    for logged in (True, False):
        names = port.names(7, logged=logged)
        assert set(names) < set(every_name(7)) and list(names.values()) == [port.input_fd, port.output_fd]
    port.close()


def test_the_service_manager_is_told_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service("", ["output-7"])
    said: list[str] = []
    monkeypatch.setattr(service, "notify", lambda text, fd=-1: said.append(text))
    service.remove("input-7")
    service.store("output-7", 0)
    service.store("viewer", 0)
    service.remove("viewer")
    service.remove("viewer")
    assert said == [
        *("FDSTOREREMOVE=1\nFDNAME=output-7", "FDSTORE=1\nFDNAME=output-7"),
        *("FDSTORE=1\nFDNAME=viewer", "FDSTOREREMOVE=1\nFDNAME=viewer"),
    ]
