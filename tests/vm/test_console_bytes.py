"""What lies on a guest's console is what the guest said, byte for byte: nothing else of the launch line writes there.

Every program of the line is made to complain in turn: their words are on standard error.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vm.jailed import Jailed, read_until
from tests.vm.test_relay_qemu import GREETING, boot_sector
from vmshell.launch import jail

UID = 61234 if os.geteuid() == 0 else None
# More of a CPU than an emulator has: a line of complaint for each part.
DEMANDING = "Skylake-Server-IBRS,svm=off"

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not os.path.exists("/usr/bin/qemu-system-x86_64"), reason="QEMU is not installed"),
    pytest.mark.skipif(not os.path.exists("/usr/bin/bwrap"), reason="bubblewrap is not installed"),
]


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    path = short_tmp / "disk"
    path.write_bytes(boot_sector().ljust(1 << 20, b"\0"))
    return path


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_only_the_guest_writes_to_its_console(short_tmp: Path, disk: Path, machine: str) -> None:
    """Through warnings at the start, a break, a reset and an end by a signal."""
    values: dict[str, Any] = {"machine": machine, "cpu_model": DEMANDING, "oom_score_adj": 500, "display": "vnc", "video": "std"}
    with Jailed(short_tmp, uid=UID, disks=((disk, "raw", None),), **values) as vm:
        qmp = vm.qmp()
        qmp.ask("cont")
        said = read_until(vm.console, GREETING)
        vm.console.sendall(b"\x03\x1a\x1c\x01c")  # with a terminal's signals, or a monitor beside it, these would never arrive
        said += read_until(vm.console, b"c")
        qmp.ask("chardev-send-break", id="ser0")
        said += read_until(vm.console, b"\0")
        qmp.ask("system_reset")
        said += read_until(vm.console, GREETING)
        qmp.ask("stop")
        qmp.close()
        vm.terminate()
        _, errors = vm.process.communicate(timeout=60)
        said += vm.console.lying()
    assert said == GREETING + b"\x03\x1a\x1c\x01c" + b"\0" + GREETING
    assert errors.count(b"warning: TCG doesn't support requested feature") > 3
    assert b"terminating on signal 15" in errors


def without(program: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [f"/nonexistent{word}" if word == program else word for word in words]


def with_option(program: str, *options: str) -> Callable[[list[str]], list[str]]:
    """The line with an option that this program refuses, before its own."""
    return lambda words: [more for word in words for more in ((word, *options) if word == program else (word,))]


FAILURES = {
    "setpriv refuses": with_option(jail.SETPRIV, "--nonsense"),
    "prlimit refuses": with_option(jail.PRLIMIT, "--nonsense"),
    "bwrap refuses": with_option(jail.BWRAP, "--nonsense"),
    "bwrap fails": with_option(jail.BWRAP, "--ro-bind", "/nonexistent", "/x"),
    "choom refuses": with_option(jail.CHOOM, "--nonsense"),
    "QEMU refuses": with_option("-nodefaults", "-nonsense"),
    "QEMU fails": with_option("-nodefaults", "-add-fd", "fd=99,set=9"),
    "no prlimit": without(jail.PRLIMIT),
    "no bwrap": without(jail.BWRAP),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_start_that_fails_says_so_on_standard_error_only(short_tmp: Path, disk: Path, name: str) -> None:
    with Jailed(short_tmp, uid=UID, oom_score_adj=500, disks=((disk, "raw", None),), change=FAILURES[name]) as vm:
        _, errors = vm.process.communicate(timeout=60)
        assert vm.process.returncode and errors
        assert vm.console.lying() == b""
