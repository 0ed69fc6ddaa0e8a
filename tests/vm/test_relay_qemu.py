"""The relay with a real QEMU: boot sectors that echo, flood or count, on the serial port of machine `pc`.

QEMU runs by itself here, without the jail (see test_jail.py for that), but as the launch line has it: its serial port on the
broker's FIFOs, a listening socket inherited, CPUs stopped, its names for devices and nodes. Where a test must see what an order
did, QEMU has a second monitor.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.guest_programs.machine_code import CODE
from tests.process.relays import RelayProcess, ServiceManager, lost_in, until
from vmshell.broker.lifecycle import serial_port
from vmshell.layout import Layout
from vmshell.messages import Forget, Order
from vmshell.numbering import tap_name

pytestmark = pytest.mark.vm

GREETING = b"the guest speaks\r\n"
LINES = CODE["lines"].ljust(510, b"\0") + b"\x55\xaa"
_ORIGIN = 0x7C00
_START = bytes.fromhex("fa31c08ed88ed0bc007cfc")  # cli; DS = SS = 0; SP = 7c00; cld
_PUT = bytes.fromhex("88c4bafd03eca82074fbb2f888e0eec3")  # AH = AL; until COM1 can send: wait; send AH; return
_GET = bytes.fromhex("bafd03eca80174fbb2f8ec")  # until COM1 has a byte: wait; AL = the byte


_COUNTER = bytes.fromhex("c606000540")  # the byte at 0500 is `@`
_COUNT = bytes.fromhex("fe060005a00005")  # add one to it; AL = that


def boot_sector(*, flood: bool = False, count: bool = False, greeting: bytes = GREETING) -> bytes:
    """Code that says *greeting*, over and over with *flood*, and else answers each byte: with the same one, or, with *count*,
    with the next letter, which it keeps in memory."""
    put = message = 0
    for _ in range(2):  # the second pass knows where `put` and the message have come to lie
        code = _START + _COUNTER + b"\xbe" + (_ORIGIN + message).to_bytes(2, "little")
        loop = len(code)
        code += b"\xac\x84\xc0\x74\x05"  # lodsb; at the NUL: leave the loop
        code += _call(code, put)
        code += _jump(code, loop)
        if flood:
            code += _jump(code, len(_START))
        else:
            again = len(code)
            code += _GET + (_COUNT if count else b"")
            code += _call(code, put)
            code += _jump(code, again)
        put = len(code)
        message = put + len(_PUT)
    return (code + _PUT + greeting + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def _call(code: bytes, target: int) -> bytes:
    return b"\xe8" + (target - len(code) - 3).to_bytes(2, "little", signed=True)


def _jump(code: bytes, target: int) -> bytes:
    return b"\xeb" + (target - len(code) - 2).to_bytes(1, "little", signed=True)


class Qemu:
    """QEMU as the launch line starts it, less the jail. *more* are further arguments; without a *sector* they bring the disk.

    With *old* its serial port is on a socket, as an earlier version had it.
    """

    def __init__(
        self, layout: Layout, number: int, *, sector: bytes = b"", more: tuple[str, ...] = (), old: bool = False
    ) -> None:
        run_dir = Path(layout.vm_run(number))
        run_dir.mkdir(parents=True, exist_ok=True)
        if sector:
            disk = run_dir / "disk"
            disk.write_bytes(sector)
            more = (*more, "-drive", f"file={disk},format=raw,if=ide,snapshot=on")
        console, qmp = (_listening(run_dir / f"{name}.sock") for name in ("console", "qmp"))
        for name in serial_port.NAMES:
            (run_dir / name).unlink(missing_ok=True)
        backend = f"socket,fd={console.fileno()},server=on,wait=off" if old else "stdio,signal=off"
        ours, theirs = socket.socketpair()
        self._second = ours
        self._answers = ours.makefile("rb")
        self.stderr, errors = os.pipe()
        command = (
            "qemu-system-x86_64 -nodefaults -no-user-config -display none -vga none -machine pc,accel=tcg -m 8 -S "
            f"-chardev {backend},id=ser0 -device isa-serial,chardev=ser0 "
            f"-chardev socket,id=qmp0,fd={qmp.fileno()},server=on,wait=off -mon chardev=qmp0,mode=control,pretty=off "
            f"-chardev socket,id=qmp1,fd={theirs.fileno()} -mon chardev=qmp1,mode=control"
        )
        with contextlib.ExitStack() as stack:
            stdin, stdout = (subprocess.DEVNULL, subprocess.DEVNULL) if old else serial_port.make(str(run_dir), stack)
            fds = tuple(sock.fileno() for sock in (console, qmp, theirs))
            self.process = subprocess.Popen([*command.split(), *more], pass_fds=fds, stdin=stdin, stdout=stdout, stderr=errors)
        os.close(errors)
        for sock in (console, qmp, theirs):
            sock.close()

    def ask(self, command: str, **arguments: object) -> Any:
        """What QEMU says on its second monitor, which the relay knows nothing of."""
        for name, given in (("qmp_capabilities", {}), (command, arguments)):
            self._second.sendall(json.dumps({"execute": name, "arguments": given, "id": name}).encode() + b"\n")
            while (answer := json.loads(self._answers.readline())).get("id") != name:
                pass
        return answer["return"]

    def files(self) -> list[str]:
        """What QEMU has open."""
        folder = f"/proc/{self.process.pid}/fd"
        return [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        self._answers.close()
        self._second.close()
        os.close(self.stderr)


def _listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    sock.bind(str(path))
    sock.listen(1)
    return sock


@pytest.fixture
def layout(short_tmp: Path) -> Layout:
    return Layout(**{name: f"{short_tmp}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)


@pytest.fixture
def relay(layout: Layout) -> Iterator[RelayProcess]:
    with RelayProcess(layout) as running:
        yield running


@pytest.fixture
def qemu(layout: Layout) -> Iterator[Qemu]:
    made = Qemu(layout, 1, sector=boot_sector())
    yield made
    made.close()


def boot(relay: RelayProcess, qemu: Qemu, number: int = 1) -> None:
    relay.watch(number, qemu.stderr, log_max=64 << 20)
    relay.wait_word(number, "ready")
    relay.tell(Order(number=number, what="cont"))
    relay.wait_word(number, "running")


def wait_log(layout: Layout, text: bytes) -> None:
    log = Path(layout.vm_log(1), "console.log")  # made with its first line
    until(lambda: log.exists() and text in log.read_bytes(), f"{text!r} in the log")


def test_no_byte_of_the_guest_is_missed_and_keys_come_back(relay: RelayProcess, qemu: Qemu) -> None:
    boot(relay, qemu)
    viewer = relay.attach(1)
    viewer.wait_output(GREETING.decode())
    relay.wait_word(1, "output")
    for key in "uname -r\r":
        viewer.type(key)
        viewer.wait_output(key)
    # B15: what would open a monitor elsewhere are keys like others here.
    viewer.output = b""
    viewer.type("\x01c\x01x\x01h")
    viewer.wait_output("\x01c\x01x\x01h")
    assert qemu.process.poll() is None
    # A break reads as a NUL; typed at the same moment, a key would be overwritten by it in the port's one-byte buffer.
    viewer.control(do="break")
    viewer.wait_output("\0")
    viewer.type("!")
    viewer.wait_output("!")
    viewer.close()


@pytest.mark.parametrize("old", [False, True], ids=["FIFOs", "the socket of an earlier version"])
def test_the_guest_runs_on_while_the_relay_is_killed(relay: RelayProcess, layout: Layout, old: bool) -> None:
    qemu = Qemu(layout, 1, sector=boot_sector(), old=old)
    try:
        boot(relay, qemu)
        for turn in range(5):
            viewer = relay.attach(1)
            viewer.type(f"turn {turn};")
            viewer.wait_output(f"turn {turn};")
            wait_log(layout, f"turn {turn};".encode())
            relay.end(signal.SIGKILL)
            viewer.close()
            relay.words.clear()
            relay.start()
            relay.watch(1, log_max=64 << 20)
            relay.wait_word(1, "ready")
            relay.wait_word(1, "running")
        viewer = relay.attach(1)
        viewer.wait_output(GREETING.decode() + "".join(f"turn {turn};" for turn in range(5)))
        viewer.type("the end")
        viewer.wait_output("the end")
        assert qemu.process.poll() is None
        viewer.close()
    finally:
        qemu.close()


@pytest.mark.slow
def test_ten_mebibytes_while_the_relay_is_killed(layout: Layout, short_tmp: Path) -> None:
    """The guest waits for a relay that is away and QEMU answers; then all goes on: what lay in the FIFO is neither lost nor
    doubled, and of what was read no more is missing than the one read that had not been written down."""
    manager = ServiceManager(str(short_tmp))
    qemu = Qemu(layout, 1, sector=LINES)
    try:
        with RelayProcess(layout, manager) as relay:
            boot(relay, qemu)
            for kill in range(5):
                until(lambda kill=kill: _said(layout) > (kill + 1) << 20, "more of it in the log")  # type: ignore[misc]
                relay.end(signal.SIGKILL)
                assert _lying(layout) <= 64 << 10
                assert qemu.ask("query-status")["status"] == "running"
                relay.start()
            relay.watch(1, log_max=64 << 20)
            until(lambda: _tail(layout).endswith(b"lines end\r\n"), "the end of it", 300)
            text = Path(layout.vm_log(1), "console.log").read_bytes()
            lost = lost_in(text[text.index(b"00000000") :], lines())
            print(f"lost: {lost}")
            assert len(lost) <= 5 and all(size <= 64 << 10 for size in lost)
            qemu.process.kill()
            qemu.process.wait(60)
            relay.tell(Forget(number=1))
            until(lambda: manager.names() == [], "the store to be empty")
    finally:
        qemu.close()
        manager.close()


def lines() -> bytes:
    """What the guest program `lines` says."""
    return b"".join(b"%08x\r\n" % number for number in range(1 << 20)) + b"lines end\r\n"


def _lying(layout: Layout) -> int:
    """How many bytes lie in the FIFO, once it is full and the guest waits."""
    with open(f"{layout.vm_run(1)}/{serial_port.NAMES[1]}", "r+b", buffering=0) as fifo:

        def count() -> int:
            return int(struct.unpack("i", fcntl.ioctl(fifo, termios.FIONREAD, bytes(4)))[0])

        until(lambda: count() >= 60 << 10, "the FIFO to be full")
        before = 0
        while (now := count()) != before:
            before = now
            time.sleep(0.3)
        return now


def _tail(layout: Layout) -> bytes:
    with open(f"{layout.vm_log(1)}/console.log", "rb") as log:
        log.seek(-11, os.SEEK_END)
        return log.read()


@pytest.mark.parametrize("old", [False, True], ids=["FIFOs", "the socket of an earlier version"])
def test_what_a_guest_said_last_is_read_after_its_end(relay: RelayProcess, layout: Layout, old: bool) -> None:
    """No end shows on a FIFO: that QEMU is gone is the broker's to say, and then the relay takes what lies there."""
    qemu = Qemu(layout, 1, sector=LINES, old=old)
    try:
        boot(relay, qemu)
        viewer = relay.attach(1)
        until(lambda: _said(layout) > 100_000, "some of it in the log")
        os.kill(relay.pid, signal.SIGSTOP)
        size = _said(layout) + (0 if old else _lying(layout))
        qemu.process.kill()
        qemu.process.wait(60)
        os.kill(relay.pid, signal.SIGCONT)
        relay.tell(Forget(number=1, reason="it was killed"))
        text = Path(layout.vm_log(1), "console.log").read_bytes()
        before = text.index(b"00000000")  # the BIOS may say something first
        assert len(text) >= size and text[before:] == lines()[: len(text) - before]
        assert viewer.wait_notice("end")["reason"] == "it was killed"
        assert text.endswith(viewer.output[-1000:])
        viewer.close()
    finally:
        qemu.close()


def test_orders_and_the_end(relay: RelayProcess, qemu: Qemu, layout: Layout) -> None:
    boot(relay, qemu)
    viewer = relay.attach(1)
    viewer.wait_output("speaks")
    relay.tell(Order(number=1, what="powerdown"))
    relay.tell(Order(number=1, what="quit"))
    assert qemu.process.wait(60) == 0
    relay.tell(Forget(number=1, reason="it was told to quit"))
    assert viewer.wait_notice("end")["reason"] == "it was told to quit"
    viewer.close()
    assert not any(word == "guest-shutdown" for _, word, _ in relay.words)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_a_flooding_guest_costs_the_relay_little(relay: RelayProcess, layout: Layout) -> None:
    """Byte by byte, as a serial port speaks; the log has all of it, in order."""
    qemu = Qemu(layout, 1, sector=boot_sector(flood=True))
    try:
        boot(relay, qemu)
        time.sleep(1)
        began, size, cpu = time.monotonic(), _said(layout), _cpu(relay.pid)
        time.sleep(4)
        seconds = time.monotonic() - began
        rate, share = (_said(layout) - size) / seconds, (_cpu(relay.pid) - cpu) / seconds
        print(f"guest: {rate / 1000:.0f} kB/s, relay: {share:.1%} of a processor")
        relay.tell(Order(number=1, what="quit"))
        qemu.process.wait(60)
        relay.tell(Forget(number=1))
        text = Path(layout.vm_log(1), "console.log").read_bytes()
        # The BIOS may say something first.
        assert text[text.index(GREETING) :] == (GREETING * (len(text) // len(GREETING) + 1))[: len(text) - text.index(GREETING)]
        assert rate > 10_000
        assert share < 0.5
    finally:
        qemu.close()


def _said(layout: Layout) -> int:
    log = Path(layout.vm_log(1), "console.log")
    return log.stat().st_size if log.exists() else 0


# --- orders with something to them ------------------------------------------------------------------------------------


def refused(relay: RelayProcess, *fds: int, **order: Any) -> bool:
    answer = relay.ask(Order(number=1, **order), *fds)
    return "error" in answer and answer["error"]["code"] == "qemu-silent"


@pytest.fixture
def fitted(layout: Layout) -> Iterator[Qemu]:
    """A QEMU with all that orders are about, whose BIOS tries the CD drive first."""
    more = "-vnc none -device virtio-balloon-pci,id=balloon0 -netdev user,id=n0,restrict=on -boot order=d"
    nic = "-device virtio-net-pci,netdev=n0,id=nic0,romfile= -device ide-cd,id=cd0,bus=ide.1,unit=0"
    made = Qemu(layout, 1, sector=boot_sector(), more=(*more.split(), *nic.split()))
    yield made
    made.close()


def test_memory_and_links_are_changed_as_told(relay: RelayProcess, fitted: Qemu) -> None:
    boot(relay, fitted)
    relay.tell(Order(number=1, what="balloon", value=6))
    assert refused(relay, what="balloon", value=0), "there is no machine without memory"
    for what in ("link-down", "link-up"):
        relay.tell(Order(number=1, what=what, value=0))
        assert refused(relay, what=what, value=3), "there is no such NIC"


@contextmanager
def tap() -> Iterator[int]:
    """The tap of VM 1's card 1, gone with the last one who holds it; on a host that does not let us make one, a skip."""
    name = tap_name(1, 1)
    subprocess.run(["ip", "link", "delete", name], stderr=subprocess.DEVNULL)  # one that was lost, as tapnet does
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR)
    except OSError as exc:
        pytest.skip(f"/dev/net/tun: {exc.strerror}")
    try:
        flags = 0x0002 | 0x1000 | 0x4000  # TAP, NO_PI, VNET_HDR
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))  # TUNSETIFF
        yield fd
    except PermissionError as exc:
        pytest.skip(f"a tap cannot be made: {exc.strerror}")
    finally:
        os.close(fd)


def devices(qemu: Qemu) -> set[str]:
    return {each["name"] for each in qemu.ask("qom-list", path="/machine/peripheral")}


def test_cards_come_and_go_whatever_was_left_half_done(relay: RelayProcess, fitted: Qemu) -> None:
    """The guest has no driver that would let a card go: a reset does that, long after it was asked."""
    boot(relay, fitted)
    card = Order(number=1, what="nic-add", value=1, mac="06:00:00:00:00:07", model="e1000")
    with tap() as fd:
        relay.tell(card, fd)
        assert "nic1" in devices(fitted) and fitted.files().count("/dev/net/tun") == 1
        relay.tell(Order(number=1, what="link-down", value=1))
        fitted.ask("device_del", id="nic1")
        fitted.ask("system_reset")
        until(lambda: "nic1" not in devices(fitted), "the card to go")
        assert fitted.files().count("/dev/net/tun") == 1, "its cable is still there"
        for _ in range(2):
            relay.tell(Order(number=1, what="nic-remove", value=1))
            assert fitted.files().count("/dev/net/tun") == 0

    with tap() as first:
        relay.tell(card, first)
    with tap() as second:
        # The answer was lost, and with it the cable; whoever tries again brings another one.
        ident = relay.send(card, second)
        relay.send(Order(number=1, what="reset"))
        assert "ok" in relay.answer(ident)
        assert "nic1" in devices(fitted) and fitted.files().count("/dev/net/tun") == 1
    assert "nic0" in devices(fitted)


def bootable_disc(path: Path, greeting: bytes) -> int:
    """An El Torito disc whose boot sector says *greeting*; opened to be read."""
    sectors = {
        16: b"\1CD001\1",
        17: (b"\0CD001\1EL TORITO SPECIFICATION".ljust(0x47, b"\0") + (19).to_bytes(4, "little")),
        18: b"\xffCD001\1",
        # Key, checksum and signature of the catalogue; then: bootable, no emulation, at 07c0, four sectors of 512 from 20 on.
        19: (b"\1" + bytes(27) + b"\xaa\x55\x55\xaa" + b"\x88\0\0\0\0\0\4\0" + (20).to_bytes(4, "little")),
        20: boot_sector(greeting=greeting),
    }
    path.write_bytes(b"".join(sectors.get(number, b"").ljust(2048, b"\0") for number in range(200)))
    return os.open(path, os.O_RDONLY)


def drive(qemu: Qemu) -> tuple[bool, str]:
    """Whether the tray is open, and the node of the medium in the drive."""
    (found,) = (each for each in qemu.ask("query-block") if each["qdev"].endswith("cd0"))
    return found["tray_open"], found.get("inserted", {}).get("node-name", "")


def test_the_guest_finds_the_disc_that_was_inserted(relay: RelayProcess, fitted: Qemu, short_tmp: Path) -> None:
    boot(relay, fitted)
    viewer = relay.attach(1)
    viewer.wait_output(GREETING.decode())
    for name in ("first", "second"):
        path = short_tmp / f"{name}.iso"
        fd = bootable_disc(path, f"the {name} disc\r\n".encode())
        relay.tell(Order(number=1, what="insert", value=0), fd)
        os.close(fd)
        assert drive(fitted) == (False, "cd0-disc")
        assert [name for name in fitted.files() if name.endswith(".iso")] == [str(path)], "the one before is closed"
        relay.tell(Order(number=1, what="reset"))
        viewer.wait_output(f"the {name} disc")
    # After a restart of ours the drive is as usable as before.
    relay.end(signal.SIGKILL)
    viewer.close()
    relay.words.clear()
    relay.start()
    relay.watch(1)
    relay.wait_word(1, "ready")
    fd = bootable_disc(short_tmp / "third.iso", b"the third disc\r\n")
    relay.tell(Order(number=1, what="insert", value=0), fd)
    assert [name for name in fitted.files() if name.endswith(".iso")] == [f"{short_tmp}/third.iso"]
    # What QEMU is not to have leaves everything as it is.
    directory = os.open(short_tmp, os.O_RDONLY)
    assert relay.ask(Order(number=1, what="insert", value=0), directory)["error"]["code"] == "protocol"
    os.close(directory)
    assert drive(fitted) == (False, "cd0-disc") and str(short_tmp) not in fitted.files()
    relay.tell(Order(number=1, what="insert", value=0), fd)
    assert drive(fitted) == (False, "cd0-disc")
    assert refused(relay, fd, what="insert", value=1), "there is no such drive"
    assert len([name for name in fitted.files() if name.endswith(".iso")]) == 1
    os.close(fd)
    for _ in range(2):  # the second time there is nothing in it
        relay.tell(Order(number=1, what="eject", value=0))
        assert drive(fitted) == (False, "") and not any(name.endswith(".iso") for name in fitted.files())
    assert refused(relay, what="eject", value=1)
    assert not [node for node in fitted.ask("query-named-block-nodes") if node["node-name"].startswith("cd0")]
    assert fitted.ask("query-fdsets") == []


def test_a_medium_of_the_launch_line_is_replaced(relay: RelayProcess, layout: Layout, short_tmp: Path) -> None:
    first = bootable_disc(short_tmp / "first.iso", b"the first disc\r\n")
    nodes: tuple[dict[str, object], ...] = (
        {"driver": "file", "node-name": "disk0-file", "filename": f"{short_tmp}/first.iso", "read-only": True},
        {"driver": "raw", "node-name": "disk0", "file": "disk0-file", "read-only": True},
    )
    more = [word for node in nodes for word in ("-blockdev", json.dumps(node))]
    qemu = Qemu(layout, 1, more=(*more, "-device", "ide-cd,id=cd0,drive=disk0", "-boot", "order=d"))
    try:
        boot(relay, qemu)
        viewer = relay.attach(1)
        viewer.wait_output("the first disc")
        second = bootable_disc(short_tmp / "second.iso", b"the second disc\r\n")
        relay.tell(Order(number=1, what="insert"), second)
        relay.tell(Order(number=1, what="reset"))
        viewer.wait_output("the second disc")
        viewer.close()
        for fd in (first, second):
            os.close(fd)
    finally:
        qemu.close()


def test_a_display_client_is_greeted(relay: RelayProcess, fitted: Qemu) -> None:
    boot(relay, fitted)
    pairs = [socket.socketpair() for _ in range(2)]
    for _, theirs in pairs:
        relay.tell(Order(number=1, what="display"), theirs.fileno())
        theirs.close()
    for ours, _ in pairs:
        ours.settimeout(60)
        assert ours.recv(100) == b"RFB 003.008\n"
        ours.close()


def snapshots(disk: Path) -> list[str]:
    told = subprocess.run(["qemu-img", "info", "-U", "--output=json", disk], capture_output=True, check=True)
    return [each["name"] for each in json.loads(told.stdout).get("snapshots", [])]


def counting(layout: Layout, folder: Path, *more: str) -> Qemu:
    """A guest that counts, on two disks of qcow2; the same ones each time."""
    words = list(more)
    for index in range(2):
        disk = folder / f"disk{index}.qcow2"
        if not disk.exists():
            raw = folder / "raw"
            raw.write_bytes(boot_sector(count=True).ljust(1 << 20, b"\0"))
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
        file = {"driver": "file", "node-name": f"disk{index}-file", "filename": str(disk)}
        top = {"driver": "qcow2", "node-name": f"disk{index}", "file": f"disk{index}-file", "backing": None}
        for node in (file, top):
            words += ["-blockdev", json.dumps(node)]
        words += ["-device", f"virtio-blk-pci,drive=disk{index},id=vd{index},bootindex={index + 1}"]
    return Qemu(layout, 1, more=tuple(words))


def test_a_snapshot_brings_the_guests_memory_back(relay: RelayProcess, layout: Layout, short_tmp: Path) -> None:
    qemu = counting(layout, short_tmp)
    try:
        boot(relay, qemu)
        viewer = relay.attach(1)
        viewer.wait_output(GREETING.decode())
        for letter in "ABC":
            viewer.type("x")
            viewer.wait_output(letter)
        relay.wait_word(1, "output")
        relay.words.clear()
        notices = len(viewer.notices)
        relay.tell(Order(number=1, what="snapshot-save", value=1, disks=0b11))
        relay.tell(Order(number=1, what="snapshot-save", value=2, disks=0b10))
        assert refused(relay, what="snapshot-save", value=1, disks=0b11), "the name is taken"
        assert refused(relay, what="snapshot-save", value=3, disks=0b100), "there is no such disk"
        assert refused(relay, what="snapshot-save", value=3, disks=0)
        for letter in "DE":
            viewer.type("x")
            viewer.wait_output(letter)
        assert viewer.notices[notices:] == [] and relay.words == [], "that QEMU stood still was our doing"
        assert snapshots(short_tmp / "disk0.qcow2") == ["s1"] and snapshots(short_tmp / "disk1.qcow2") == ["s1", "s2"]
        relay.tell(Order(number=1, what="snapshot-delete", value=2, disks=0b10))
        assert snapshots(short_tmp / "disk1.qcow2") == ["s1"] and qemu.ask("query-jobs") == []
        relay.tell(Order(number=1, what="quit"))
        qemu.process.wait(60)
        relay.tell(Forget(number=1))
        viewer.close()
    finally:
        qemu.close()
    qemu = counting(layout, short_tmp, "-loadvm", "s1")
    try:
        boot(relay, qemu)
        viewer = relay.attach(1, replay=False)
        viewer.type("x")
        viewer.wait_output("D")
        assert viewer.output == b"D"
        viewer.close()
    finally:
        qemu.close()


def test_a_snapshot_of_a_paused_guest_leaves_it_paused(relay: RelayProcess, layout: Layout, short_tmp: Path) -> None:
    qemu = counting(layout, short_tmp)
    try:
        boot(relay, qemu)
        qemu.ask("stop")
        relay.wait_word(1, "paused")
        relay.words.clear()
        relay.tell(Order(number=1, what="snapshot-save", value=1, disks=1))
        assert qemu.ask("query-status")["status"] == "paused" and relay.words == []
        relay.tell(Order(number=1, what="cont"))
        relay.wait_word(1, "running")
    finally:
        qemu.close()
