"""The guests that other tests look through: each shows what it should, with QEMU by itself under TCG, without us around it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests import guests
from tests.guest_programs import assemble
from tests.guest_programs.machine_code import CODE

pytestmark = pytest.mark.vm

PATIENCE = 120  # seconds: other builds share the cores
BOTH = pytest.mark.parametrize("machine", ["pc", "q35"])


class Guest:
    """A QEMU with its serial port in our hands."""

    def __init__(self, *words: str) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.serial, self._qmp = (ours for ours, _ in pairs)
        self.serial.settimeout(1)
        self._qmp.settimeout(PATIENCE)
        self._lines = self._qmp.makefile("rb")
        self.output = ""
        self._seen = 0
        serial, qmp = (theirs.fileno() for _, theirs in pairs)
        command = ["qemu-system-x86_64", "-display", "none", "-nodefaults", "-accel", "tcg", "-m", "32"]
        command += ["-chardev", f"socket,id=serial,fd={serial}", "-serial", "chardev:serial"]
        command += ["-chardev", f"socket,id=qmp,fd={qmp}", "-qmp", "chardev:qmp"]
        self.process = subprocess.Popen([*command, *words], pass_fds=(serial, qmp), stdin=subprocess.DEVNULL)
        for _, theirs in pairs:
            theirs.close()
        self._lines.readline()  # its greeting
        self._execute("qmp_capabilities")

    def wait(self, line: str) -> None:
        """Wait for *line*, behind those waited for before."""
        self.match(re.escape(line))

    def match(self, pattern: str) -> re.Match[str]:
        """As `wait`, for a line that is *pattern*; returns the match."""
        until = time.monotonic() + PATIENCE
        while not (found := re.compile(f"^{pattern}\r$", re.MULTILINE).search(self.output, self._seen)):
            assert time.monotonic() < until, f"waited for {pattern!r}; got {self.output!r}"
            try:
                data = self.serial.recv(4096)
            except TimeoutError:
                continue
            assert data, f"it ended before {pattern!r}; got {self.output!r}"
            self.output += data.decode("ascii", "backslashreplace")
        self._seen = found.end()
        return found

    def type(self, keys: str) -> None:
        self.serial.sendall(keys.encode())

    def monitor(self, command: str) -> None:
        """Give a command to QEMU's monitor, which is to have nothing to say about it."""
        assert self._execute("human-monitor-command", **{"command-line": command}) == ""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self.serial.close()
        self._qmp.close()

    def _execute(self, command: str, **arguments: str) -> object:
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._lines.readline())):
            assert "error" not in answer
        return answer["return"]


Start = Callable[..., Guest]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(*words)` runs a guest; all are gone afterwards."""
    started: list[Guest] = []

    def run(*words: str) -> Guest:
        started.append(Guest(*words))
        return started[-1]

    yield run
    for guest in started:
        guest.close()


@pytest.fixture
def drive(tmp_path: Path) -> Callable[..., str]:
    """`drive(data, more)` writes a raw image and returns what `-drive` takes."""

    def write(data: bytes, more: str = "") -> str:
        path = tmp_path / f"image{len(list(tmp_path.iterdir()))}"
        path.write_bytes(data)
        return f"file={path},format=raw{more and ','}{more}"

    return write


Drive = Callable[..., str]


@pytest.mark.skipif(not shutil.which("as") or not shutil.which("ld"), reason="needs GNU binutils")
def test_the_machine_code_is_the_sources() -> None:
    assert set(CODE) == set(assemble.names())
    for name in assemble.names():
        assert CODE[name] == assemble.assemble(name), f"{name}: run tests/guest_programs/assemble.py"


@BOTH
def test_each_medium_says_that_it_was_booted(start: Start, drive: Drive, machine: str) -> None:
    hard = drive(guests.disk(guests.bootsector("hard disk")), "if=none,id=hard")
    soft = drive(guests.floppy("floppy"), "if=floppy")
    shiny = drive(guests.iso("cd"), "media=cdrom")
    words = ["-M", machine, "-drive", hard, "-drive", soft, "-drive", shiny, "-device", "virtio-blk-pci,drive=hard"]
    for letter, line in (("a", "boot from floppy 00"), ("c", "boot from hard disk 80"), ("d", r"boot from cd e[0-9a-f]")):
        guest = start(*words, "-boot", letter)
        guest.match(line)
        guest.close()


def test_the_cd_is_one_that_others_can_read(tmp_path: Path) -> None:
    """An empty file system, as the one tool for it that is everywhere sees it."""
    image = tmp_path / "cd.iso"
    image.write_bytes(guests.iso("cd"))
    assert image.stat().st_size == 24 * 2048
    known = subprocess.run(["blkid", "-p", "-o", "export", str(image)], capture_output=True, text=True, check=True)
    assert "TYPE=iso9660" in known.stdout
    assert "LABEL=VMSHELL" in known.stdout
    assert "BOOT_SYSTEM_ID=EL_TORITO_SPECIFICATION" in known.stdout.replace("\\ ", "_")


@pytest.mark.parametrize(("cyls", "heads", "secs"), [(20, 4, 17), (615, 4, 26), (100, 16, 63)])
def test_the_geometry_is_what_the_bios_was_given(start: Start, drive: Drive, cyls: int, heads: int, secs: int) -> None:
    image = drive(guests.disk(guests.GEOMETRY, cyls * heads * secs * 512), "if=none,id=hard")
    given = f"cyls={cyls},heads={heads},secs={secs},bios-chs-trans=none"
    guest = start("-M", "pc", "-drive", image, "-device", f"ide-hd,drive=hard,{given}")
    found = guest.match(r"geometry ([0-9a-f]{4})/([0-9a-f]{2})/([0-9a-f]{2})")
    assert tuple(int(number, 16) for number in found.groups()) == (cyls - 1, heads, secs)  # the BIOS keeps one


def test_a_machine_without_a_hard_disk_has_no_geometry(start: Start, drive: Drive) -> None:
    start("-M", "pc", "-drive", drive(guests.disk(guests.GEOMETRY, guests.FLOPPY_SIZE), "if=floppy")).wait("geometry none")


@BOTH
def test_the_clock_runs(start: Start, drive: Drive, machine: str) -> None:
    words = ["-M", machine, "-drive", drive(guests.disk(guests.CLOCK))]
    guest = start(*words, "-rtc", "base=2007-03-04T23:59:58")
    guest.match(r"clock 2007-03-04 23:59:5[89]")
    guest.match(r"clock 2007-03-05 00:00:0[0-9]")
    guest.close()
    found = start(*words, "-rtc", "base=utc").match(r"clock (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
    shown = datetime.fromisoformat(found[1] + "+00:00").timestamp()
    assert abs(shown - time.time()) < PATIENCE


def test_the_counter_comes_back_with_its_memory(start: Start, tmp_path: Path) -> None:
    raw, disk = tmp_path / "raw", tmp_path / "disk"
    raw.write_bytes(guests.disk(guests.COUNTER))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(disk)], check=True)
    words = ["-M", "pc", "-drive", f"file={disk},format=qcow2"]
    guest = start(*words)
    guest.wait("counter ready")
    guest.type("ab")
    guest.wait("counter 0000")
    guest.wait("counter 0001")
    guest.monitor("savevm here")
    guest.type("c")
    guest.wait("counter 0002")
    guest.close()
    guest = start(*words, "-loadvm", "here")
    guest.type("d")
    guest.wait("counter 0002")
    assert "ready" not in guest.output


@BOTH
def test_the_writer_writes_and_reads(start: Start, drive: Drive, machine: str) -> None:
    words = ["-M", machine, "-drive", drive(guests.disk(guests.WRITER)), "-drive", drive(bytes(guests.DISK_SIZE), "if=virtio")]

    def session(keys: str, *lines: str, more: tuple[str, ...] = ()) -> None:
        guest = start(*words, *more)
        guest.wait("writer ready")
        for key, line in zip(keys, lines, strict=True):
            guest.type(key)
            guest.wait(line)
        guest.close()

    session("rwr", f"read {guests.UNWRITTEN}", "write ok", f"read {guests.WRITTEN}", more=("-snapshot",))
    session("r1r", f"read {guests.UNWRITTEN}", "drive 81", f"read {guests.UNWRITTEN}")
    session("1w0r", "drive 81", "write ok", "drive 80", f"read {guests.UNWRITTEN}")
    session("r1r", f"read {guests.UNWRITTEN}", "drive 81", f"read {guests.WRITTEN}")
    guest = start(*words)
    guest.wait("writer ready")
    guest.type("7r")
    guest.match("read error [0-9a-f]{2}")


@BOTH
def test_keys_are_shown_as_scancodes(start: Start, drive: Drive, machine: str) -> None:
    guest = start("-M", machine, "-drive", drive(guests.disk(guests.SCANCODE)))
    guest.wait("scancode ready")
    guest.monitor("sendkey z")
    for code in ("2c", "ac"):
        guest.wait(f"scancode {code}")
    guest.monitor("sendkey up")
    for code in ("e0", "48", "e0", "c8"):
        guest.wait(f"scancode {code}")


@BOTH
def test_the_rebooter_reboots(start: Start, drive: Drive, machine: str) -> None:
    words = ["-M", machine, "-drive", drive(guests.disk(guests.REBOOT))]
    guest = start(*words)
    for key in "RK":
        guest.wait("up")
        guest.type(key)
    guest.wait("up")
    guest.type("P")
    assert guest.process.wait(PATIENCE) == 0
    guest = start(*words, "-no-reboot")
    guest.wait("up")
    guest.type("R")
    assert guest.process.wait(PATIENCE) == 0


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        ("pc", "acpi yes FACP APIC HPET WAET"),
        ("pc,acpi=off", "acpi no"),
        ("q35", "acpi yes FACP APIC HPET MCFG WAET"),
        # Without QEMU's tables SeaBIOS makes some of its own where it finds an ICH9: SSDT is one of them, WAET is none.
        ("q35,acpi=off", "acpi yes FACP SSDT APIC HPET MCFG"),
    ],
)
def test_acpi_tables_are_listed(start: Start, drive: Drive, machine: str, line: str) -> None:
    start("-M", machine, "-drive", drive(guests.disk(guests.ACPI))).wait(line)


@pytest.mark.parametrize("size", [16, 100, 5000])
def test_memory_is_counted(start: Start, drive: Drive, size: int) -> None:
    start("-M", "q35", "-m", f"{size}M", "-drive", drive(guests.disk(guests.MEMORY))).wait(f"memory {size}M")


@BOTH
def test_option_roms_run_before_the_boot(start: Start, drive: Drive, tmp_path: Path, machine: str) -> None:
    for name in ("one", "two"):
        rom = guests.option_rom(name)
        assert not sum(rom) % 256
        (tmp_path / name).write_bytes(rom)
    # SeaBIOS runs them by file name, the last one first; the order of the options means nothing.
    roms = ["-option-rom", str(tmp_path / "one"), "-option-rom", str(tmp_path / "two")]
    guest = start("-M", machine, *roms, "-drive", drive(guests.disk(guests.bootsector("disk"))))
    for line in ("rom two", "rom one", "boot from disk 80"):
        guest.wait(line)


@BOTH
def test_the_kernel_says_what_it_was_given(start: Start, tmp_path: Path, machine: str) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(guests.kernel("6.1"))
    initrd.write_bytes(b"\x1f\x8bsome bytes in front" + bytes(100_000))
    words = ["-M", machine, "-kernel", str(kernel)]
    guest = start(*words, "-append", 'console=ttyS0 x="a b"', "-initrd", str(initrd))
    for line in ("kernel 6.1", 'cmdline console=ttyS0 x="a b"', f"initrd {initrd.stat().st_size:08x} ..some bytes in "):
        guest.wait(line)
    guest = start(*words)
    for line in ("kernel 6.1", "cmdline ", "initrd none"):
        guest.wait(line)
    long = "y" * 2047
    start(*words, "-append", long).wait(f"cmdline {long}")
    initrd.write_bytes(b"tiny")
    start(*words, "-initrd", str(initrd)).wait("initrd 00000004 tiny")
