"""The acceleration probe's judgement, without any QEMU: what is seen, and which sentence comes of it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from vmshell.probe import guest, verdict
from vmshell.probe.main import kvm_closed
from vmshell.probe.trial import Trial


def seen(console: bytes = b"", errors: bytes = b"", *, over: bool = False, seconds: float = 0.1) -> Trial:
    """A trial as it looks afterwards."""
    trial = Trial.__new__(Trial)
    trial.console, trial.errors, trial.over, trial.seconds = console, errors, over or guest.DONE in console, seconds
    return trial


GOOD = seen(b"12345V")


# --- the sector -------------------------------------------------------------------------------------------------------------


def test_the_sector_is_its_source(tmp_path: Path) -> None:
    """The bytes are what GNU as and ld make of the assembly beside them."""
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("binutils are not installed")
    source = tmp_path / "guest.S"
    source.write_text(guest.SOURCE, encoding="ascii")
    made, linked = str(tmp_path / "guest.o"), tmp_path / "guest.bin"
    subprocess.run(["as", "--64", "-o", made, str(source)], check=True, timeout=60)
    link = ["ld", "-m", "elf_x86_64", "-Ttext", "0x7c00", "--oformat", "binary", "-o", str(linked), made]
    subprocess.run(link, check=True, timeout=60)
    assert linked.read_bytes() == guest.SECTOR


def test_the_sector_is_a_boot_sector() -> None:
    assert len(guest.SECTOR) == 512
    assert guest.SECTOR.endswith(b"\x55\xaa")


# --- QEMU's version ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "number"),
    [
        (b"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", "7.2.22"),
        (b"QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n", "10.0.2"),
        (b"QEMU emulator version 9.1\n", "9.1"),
    ],
)
def test_versions(output: bytes, number: str) -> None:
    assert verdict.version(output) == (number, "")


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (b"QEMU emulator version 7.1.0\n", "QEMU 7.1.0 is too old: 7.2 or later is needed"),
        (b"QEMU emulator version 5.2.0 (Debian)\n", "QEMU 5.2.0 is too old: 7.2 or later is needed"),
        (b"", "QEMU does not say its version"),
        (b"QEMU emulator version seven\n", "QEMU does not say its version (it says 'QEMU emulator version seven')"),
        (b"QEMU emulator version 7\n", "QEMU does not say its version (it says 'QEMU emulator version 7')"),
        (b"QEMU emulator version 7.\x1b[2J\n", "QEMU does not say its version (it says 'QEMU emulator version 7.\\x1b[2J')"),
        (b"QEMU emulator version 99999999999999999999999.1\n", None),
        ("QEMU emulator version ٧.٢\n".encode(), None),
    ],
)
def test_versions_that_are_none(output: bytes, problem: str | None) -> None:
    _, said = verdict.version(output)
    assert said == problem if problem is not None else said.startswith("QEMU does not say its version")
    assert said.isprintable()


# --- can any guest run ------------------------------------------------------------------------------------------------------


def test_a_guest_that_came_through() -> None:
    assert verdict.jail_problem(GOOD) == ""


def test_a_busy_host_is_no_fault() -> None:
    """A TCG guest that is still on its way when the time is up says nothing against QEMU."""
    assert verdict.jail_problem(seen(b"12", seconds=2.4)) == ""


@pytest.mark.parametrize(
    ("trial", "problem"),
    [
        (
            seen(errors=b"bwrap: No permissions to create a new namespace, likely because the kernel\n", over=True),
            "this host lets ordinary processes make no user namespaces, which QEMU's jail is made of",
        ),
        (
            seen(errors=b"bwrap: Creating new namespace failed: No space left on device\n", over=True),
            "this host lets ordinary processes make no user namespaces, which QEMU's jail is made of",
        ),
        (
            seen(errors=b"bwrap: Can't find source path /usr/lib64: No such file\n", over=True),
            "QEMU's jail cannot be built here (Can't find source path /usr/lib64: No such file)",
        ),
        (
            seen(errors=b"2026-01-01T00:00:00Z qemu-system-x86_64: could not load PC BIOS 'bios-256k.bin'\n", over=True),
            "QEMU does not run a guest here (could not load PC BIOS 'bios-256k.bin')",
        ),
        (seen(over=True), "QEMU does not run a guest here (it ended, without a byte)"),
        (seen(b"12312", over=True), "QEMU does not run a guest here (it came as far as long mode and then started anew)"),
    ],
)
def test_what_keeps_guests_from_running(trial: Trial, problem: str) -> None:
    assert verdict.jail_problem(trial) == problem


# --- is KVM to be used ------------------------------------------------------------------------------------------------------


def test_kvm_that_runs_a_guest() -> None:
    assert verdict.kvm_refusal(seen(b"12345V", seconds=0.08), GOOD) == ""


def test_kvm_on_a_busy_host() -> None:
    """Slow, and TCG is slow too, or did not get through at all: the host is busy, not KVM broken."""
    assert verdict.kvm_refusal(seen(b"12345V", seconds=2.0), seen(b"12345V", seconds=2.2)) == ""
    assert verdict.kvm_refusal(seen(b"12345V", seconds=2.0), seen(b"1", seconds=2.4)) == ""


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        (seen(b"12345V", seconds=1.9), "a guest took 1.9 s under KVM and 0.1 s without: KVM only emulates here"),
        (seen(b""), "KVM does not run a guest here (not a byte came in time)"),
        (seen(b"123"), "KVM does not run a guest here (it came as far as long mode and then said no more)"),
        (seen(b"12341"), "KVM does not run a guest here (it came as far as its first exception and then started anew)"),
        (
            seen(b"12", b"KVM internal error. Suberror: 1\nemulation failure\n", over=True),
            "KVM does not run a guest here (it came as far as protected mode and then stopped with an internal error of KVM)",
        ),
        (
            seen(
                errors=b"qemu-system-x86_64: warning: x\nqemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\n", over=True
            ),
            "QEMU cannot use KVM here (failed to set MSR 0x10a to 0x69)",
        ),
        (seen(errors=b"qemu-system-x86_64: \x1b]0;x\x07\n", over=True), "QEMU cannot use KVM here (\\x1b]0;x\\x07)"),
    ],
)
def test_kvm_that_is_not_to_be_used(trial: Trial, reason: str) -> None:
    assert verdict.kvm_refusal(trial, GOOD) == reason


# --- may the VM's account open it -------------------------------------------------------------------------------------------


def test_kvm_absent_or_no_device(tmp_path: Path) -> None:
    file = tmp_path / "kvm"
    assert kvm_closed(str(file), None) == (f"there is no {file}", None)
    file.touch()
    assert kvm_closed(str(file), None) == (f"{file} is no device", None)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device node needs root")
@pytest.mark.parametrize(
    ("mode", "group", "closed", "lent"),
    [
        (0o666, 0, False, None),
        (0o660, 106, False, 106),
        (0o660, 0, True, None),
        (0o600, 106, True, None),
        (0o640, 106, True, None),
        (0o606, 106, False, None),
    ],
)
def test_who_may_open_kvm(tmp_path: Path, mode: int, group: int, closed: bool, lent: int | None) -> None:
    """R8: by everybody, or by a group of its own that the VM then gets; root's group is never lent."""
    node = tmp_path / "kvm"
    try:
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this container may make no device nodes")
    node.chmod(mode)
    os.chown(node, 0, group)
    problem, gid = kvm_closed(str(node), 61234)
    assert (problem != "", gid) == (closed, lent)
    assert not closed or re.search(rf"mode {mode:04o}", problem)
