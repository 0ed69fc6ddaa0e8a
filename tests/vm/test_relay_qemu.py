"""The relay with a real QEMU: a boot sector that echoes, and one that floods, on the serial port of machine `pc`.

QEMU runs by itself here, without the jail (see test_jail.py for that), but as the launch line has it: listening sockets
inherited, CPUs stopped.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.relays import RelayProcess, until
from vmshell.layout import Layout
from vmshell.messages import Forget, Order, Watch

pytestmark = pytest.mark.vm

GREETING = b"the guest speaks\r\n"
_ORIGIN = 0x7C00
_START = bytes.fromhex("fa31c08ed88ed0bc007cfc")  # cli; DS = SS = 0; SP = 7c00; cld
_PUT = bytes.fromhex("88c4bafd03eca82074fbb2f888e0eec3")  # AH = AL; until COM1 can send: wait; send AH; return
_GET = bytes.fromhex("bafd03eca80174fbb2f8ec")  # until COM1 has a byte: wait; AL = the byte


def boot_sector(*, flood: bool) -> bytes:
    """Code that says GREETING, over and over with *flood*, and else echoes each byte from then on."""
    put = message = 0
    for _ in range(2):  # the second pass knows where `put` and the message have come to lie
        code = _START + b"\xbe" + (_ORIGIN + message).to_bytes(2, "little")
        loop = len(code)
        code += b"\xac\x84\xc0\x74\x05"  # lodsb; at the NUL: leave the loop
        code += _call(code, put)
        code += _jump(code, loop)
        if flood:
            code += _jump(code, len(_START))
        else:
            again = len(code)
            code += _GET
            code += _call(code, put)
            code += _jump(code, again)
        put = len(code)
        message = put + len(_PUT)
    return (code + _PUT + GREETING + b"\0").ljust(510, b"\0") + b"\x55\xaa"


def _call(code: bytes, target: int) -> bytes:
    return b"\xe8" + (target - len(code) - 3).to_bytes(2, "little", signed=True)


def _jump(code: bytes, target: int) -> bytes:
    return b"\xeb" + (target - len(code) - 2).to_bytes(1, "little", signed=True)


class Qemu:
    """QEMU as the launch line starts it, less the jail."""

    def __init__(self, layout: Layout, number: int, *, flood: bool) -> None:
        run_dir = Path(layout.vm_run(number))
        run_dir.mkdir(parents=True)
        disk = run_dir / "disk"
        disk.write_bytes(boot_sector(flood=flood))
        sockets = []
        for name in ("console", "qmp"):
            sock = socket.socket(socket.AF_UNIX)
            sock.bind(f"{run_dir}/{name}.sock")
            sock.listen(1)
            sockets.append(sock)
        console, qmp = (sock.fileno() for sock in sockets)
        self.stderr, errors = os.pipe()
        command = (
            "qemu-system-x86_64 -nodefaults -no-user-config -display none -vga none -machine pc,accel=tcg -m 8 -S -no-reboot "
            f"-drive file={disk},format=raw,if=ide,snapshot=on -device isa-serial,chardev=ser0 "
            f"-chardev socket,id=ser0,fd={console},server=on,wait=off "
            f"-chardev socket,id=qmp0,fd={qmp},server=on,wait=off -mon chardev=qmp0,mode=control,pretty=off"
        )
        self.process = subprocess.Popen(command.split(), pass_fds=(console, qmp), stdin=subprocess.DEVNULL, stderr=errors)
        os.close(errors)
        for sock in sockets:
            sock.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(60)
        os.close(self.stderr)


@pytest.fixture
def layout(short_tmp: Path) -> Layout:
    return Layout(**{name: f"{short_tmp}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)


@pytest.fixture
def relay(layout: Layout) -> Iterator[RelayProcess]:
    with RelayProcess(layout) as running:
        yield running


@pytest.fixture
def qemu(layout: Layout) -> Iterator[Qemu]:
    made = Qemu(layout, 1, flood=False)
    yield made
    made.close()


def boot(relay: RelayProcess, qemu: Qemu, number: int = 1) -> None:
    relay.tell(Watch(number=number, log_max=64 << 20), qemu.stderr)
    relay.wait_word(number, "ready")
    relay.tell(Order(number=number, what="cont"))
    relay.wait_word(number, "running")


def wait_log(layout: Layout, text: bytes) -> None:
    until(lambda: text in Path(layout.vm_log(1), "console.log").read_bytes(), f"{text!r} in the log")


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


def test_the_guest_runs_on_while_the_relay_is_killed(relay: RelayProcess, qemu: Qemu, layout: Layout) -> None:
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
        relay.tell(Watch(number=1, log_max=64 << 20))
        relay.wait_word(1, "ready")
        relay.wait_word(1, "running")
    viewer = relay.attach(1)
    viewer.wait_output(GREETING.decode() + "".join(f"turn {turn};" for turn in range(5)))
    viewer.type("the end")
    viewer.wait_output("the end")
    assert qemu.process.poll() is None
    viewer.close()


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
    qemu = Qemu(layout, 1, flood=True)
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
    return Path(layout.vm_log(1), "console.log").stat().st_size
