"""Every option of 2007 that users may set, and the keys beside them: a real guest under a real broker shows the effect."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import guests
from tests.consoles import Viewer
from tests.session import Session
from vmshell import messages
from vmshell.errors import VmshellError
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout
from vmshell.model.definition import emit
from vmshell.refusals import ReportedError
from vmshell.shell.qemu_cli import translate

pytestmark = pytest.mark.vm

ZONE = Path("/usr/share/zoneinfo/Asia/Kolkata")  # five hours and a half from UTC: no other clock looks like it


def make_layout(folder: str) -> Layout:
    layout = Layout(etc=f"{folder}/etc", state=f"{folder}/state", run=f"{folder}/run", log=f"{folder}/log", embedded=True)
    os.makedirs(layout.etc)
    library = Path(folder, "library")
    library.mkdir()
    library.joinpath("lib.iso").write_bytes(guests.iso("library"))
    Path(layout.policy).write_text(f'[host]\naccel = "tcg"\nconnections_max = 256\n[library]\ndirectories = ["{library}"]\n')
    return layout


@pytest.fixture(scope="module")
def room() -> Iterator[Session]:
    """One broker for all of them, with every medium on the shelf."""
    with tempfile.TemporaryDirectory(prefix="vms-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        with Session(make_layout(folder)) as session:
            for name in ("hda", "hdb", "hdc"):
                session.put(f"shelf.{name}", guests.disk(guests.bootsector(name)), "raw")
            for name in ("GEOMETRY", "CLOCK", "WRITER", "SCANCODE", "REBOOT", "ACPI", "MEMORY"):
                session.put(f"shelf.{name.lower()}", guests.disk(getattr(guests, name)), "raw")
            session.put("shelf.geo", guests.disk(guests.GEOMETRY, 130 * 16 * 63 * 512), "raw")
            for name in ("fda", "fdb"):
                session.put(f"shelf.{name}", guests.floppy(name), "raw")
            session.put("shelf.cd.iso", guests.iso("cd"))
            session.put("shelf.kernel", guests.kernel("mine"))
            session.put("shelf.initrd", b"0123456789abcdef" * 100)
            session.put("shelf.hello.rom", guests.option_rom("hello"), "rom")
            yield session


def resolve(word: str) -> str:
    return f"library:{word}" if word == "lib.iso" else f"shelf:{word}"


def table_of(line: str, only: Any = None) -> dict[str, Any]:
    found = translate.translate(line.split(), resolve, only)
    assert not found.refused, translate.refusal_lines(found)
    return found.table


@contextmanager
def run(session: Session, line: str) -> Iterator[tuple[Viewer, str]]:
    """Run a VM once by QEMU's own options, with its console; it is gone afterwards."""
    with session.client() as client:
        request = messages.Define(vm="kvm", text=emit(table_of(line)), new=True, once=True)
        answer, fds = client.ask_fds(request)
    viewer, name = Viewer(fds), str(answer["name"])
    try:
        yield viewer, name
    finally:
        viewer.close()
        if name in names(session):
            session.ask(messages.Kill(vm=name))
        session.wait_for(lambda: name not in names(session), f"{name} to be forgotten", 60)


def names(session: Session) -> list[str]:
    return [row["name"] for row in session.ask(messages.List())["vms"]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-fda fda -boot a", "boot from fda 00"),
        ("-fda fda -fdb fdb -hda hda -boot a", "boot from fda 00"),
        ("-hda hda -cdrom cd.iso -boot c", "boot from hda 80"),
        ("-hda hda -hdb hdb", "boot from hda 80"),
        ("-hda hda -cdrom cd.iso -boot d", "boot from cd e"),
        ("-cdrom lib.iso -hda hda -boot d -M q35", "boot from library e"),
        ("-hda hda -cdrom cd.iso -fda fda -boot dca", "boot from cd e"),
        ("-drive file=hda,if=virtio,format=raw -M q35", "boot from hda 80"),
        ("-drive file=hda,if=none,id=x,format=raw -device virtio-blk-pci,drive=x", "boot from hda 80"),
        ("-hda acpi", "acpi yes"),
        ("-hda acpi -no-acpi", "acpi no"),
        ("-M q35 -hda acpi -no-acpi", "acpi yes FACP SSDT"),
        ("-hda memory -m 48", "memory 4"),
        ("-hda geo -hdachs 130,16,63", "geometry 0081/10/3f"),
        ("-hda geo -hdachs 130,16,63,lba", "geometry "),
        ("-hda hda -option-rom hello.rom", "rom hello"),
        ("-kernel kernel -append quiet=1,x -initrd initrd", "cmdline quiet=1,x"),
        ("-kernel kernel -initrd initrd", "initrd 00000640 0123456789abcdef"),
        ("-kernel kernel -append a", "initrd none"),
        ("--hda hda --boot c --smp 2", "boot from hda 80"),
    ],
)
def test_the_guest_shows_what_was_asked(room: Session, line: str, said: str) -> None:
    with run(room, line) as (viewer, _):
        viewer.wait_output(said)


def test_a_second_disk_and_a_second_floppy_are_there(room: Session) -> None:
    with run(room, "-hda writer -hdb hdb -boot c") as (viewer, _):
        viewer.wait_output("writer ready")
        viewer.type("1")
        viewer.wait_output("drive 81")
        assert "error" not in viewer.output.decode()
    with run(room, "-fdb fdb -fda fda -boot a") as (viewer, name):
        viewer.wait_output("boot from fda 00")
        devices = [device["name"] for device in room.ask(messages.Info(vm=name))["devices"]]
        assert devices[:2] == ["floppy0", "floppy1"]


def test_boot_from_the_network_leaves_the_disk_alone(room: Session) -> None:
    with run(room, "-hda hda -boot n") as (viewer, _):
        until = time.monotonic() + 5
        while time.monotonic() < until:
            viewer.read_some()
        assert b"boot from" not in viewer.output


def test_what_a_snapshot_run_writes_is_gone_and_what_another_writes_stays(room: Session) -> None:
    for options, after in (("-snapshot", guests.UNWRITTEN), ("", guests.WRITTEN)):
        with run(room, f"-hda writer {options}") as (viewer, _):
            viewer.wait_output("writer ready")
            viewer.type("w")
            viewer.wait_output("write ok")
            viewer.type("r")
            viewer.wait_output(f"read {guests.WRITTEN}")
        with run(room, "-hda writer -snapshot") as (viewer, _):
            viewer.wait_output("writer ready")
            viewer.type("r")
            viewer.wait_output(f"read {after}")


def test_no_reboot_ends_it_and_without_it_goes_on(room: Session) -> None:
    with run(room, "-hda reboot") as (viewer, _):
        viewer.wait_output("up")
        viewer.type("R")
        viewer._wait(lambda: viewer.output.count(b"up") == 2, "a second start", 60)
    with run(room, "-hda reboot -no-reboot") as (viewer, name):
        viewer.wait_output("up")
        viewer.type("R")
        room.wait_for(lambda: name not in names(room), "the VM to end and be forgotten")


def test_loadvm_brings_the_memory_back(room: Session) -> None:
    """The page's -loadvm: a counter in memory goes on where it was saved."""
    room.put("shelf.counter", guests.disk(guests.COUNTER), "raw")
    text = '[memory]\nsize = "64M"\n[[disk]]\npath = "shelf:counter"\nformat = "raw"\nreadonly = true\n'
    text += '[[disk]]\npath = "state"\nformat = "qcow2"\nsize = "256M"\n'
    room.ask(messages.Define(vm="saved", text=text, new=True))

    def count(viewer: Viewer, shown: str) -> None:
        viewer.type("x")
        viewer.wait_output(f"counter {shown}")

    with room.client() as client:
        _, fds = client.ask_fds(messages.Boot(vm="saved", console=True))
    viewer = Viewer(fds)
    viewer.wait_output("counter ready")
    for shown in ("0000", "0001", "0002"):
        count(viewer, shown)
    assert room.ask(messages.Snapshot(vm="saved", tag="three"))["tag"] == "three"
    count(viewer, "0003")
    room.ask(messages.Kill(vm="saved"))
    viewer.close()
    room.ask(messages.Change(vm="saved", set={"restore": "three"}))  # -loadvm three
    with room.client() as client:
        _, fds = client.ask_fds(messages.Boot(vm="saved", console=True))
    viewer = Viewer(fds)
    count(viewer, "0003")
    assert b"ready" not in viewer.output
    room.ask(messages.Snapshot(vm="saved", tag="three", delete=True))
    room.ask(messages.Kill(vm="saved"))
    with pytest.raises(ReportedError, match="no snapshot three"):
        room.ask(messages.Boot(vm="saved"))
    room.ask(messages.Change(vm="saved", unset=["boot.restore"], set={"cpus": "2"}))
    room.ask(messages.Rm(vm="saved"))


def test_a_snapshot_of_other_hardware_is_refused_by_the_keys(room: Session) -> None:
    text = '[memory]\nsize = "64M"\n[[disk]]\npath = "state"\nformat = "qcow2"\nsize = "64M"\n'
    room.ask(messages.Define(vm="hard", text=text, new=True))
    room.ask(messages.Boot(vm="hard"))
    room.ask(messages.Snapshot(vm="hard", tag="one"))
    room.ask(messages.Kill(vm="hard"))
    room.ask(messages.Change(vm="hard", set={"cpus": "2"}))
    with pytest.raises(ReportedError, match="have changed since: cpu.count"):
        room.ask(messages.Boot(vm="hard", restore="one"))
    room.ask(messages.Rm(vm="hard"))


@pytest.mark.skipif(os.geteuid() != 0, reason="binds another zone over /etc/localtime in a mount namespace of its own")
@pytest.mark.skipif(not ZONE.exists(), reason="needs tzdata")
def test_localtime_is_the_hosts_time_zone() -> None:
    with tempfile.TemporaryDirectory(prefix="vms-", dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        bind = f'touch /etc/localtime; mount --bind {ZONE} /etc/localtime && exec "$@"'
        wrap = ("unshare", "--mount", "sh", "-c", bind, "sh")
        if subprocess.run([*wrap, "true"], check=False, capture_output=True).returncode:
            pytest.skip("no mount namespace here")
        with Session(make_layout(folder), *wrap) as session:
            session.put("shelf.clock", guests.disk(guests.CLOCK), "raw")
            shown = {}
            for option in ("", "-localtime"):
                with run(session, f"-hda clock {option}") as (viewer, _):
                    text = viewer.wait_output("clock 2")
                    shown[option] = viewer._wait(lambda v=viewer: v.output.count(b"clock 2") > 1, "the next second", 60) or text
            hours = {option: _minutes(text) for option, text in shown.items()}
            assert abs((hours["-localtime"] - hours[""]) % 1440 - 330) <= 3


def _minutes(text: str) -> int:
    hour, minute = text.split("clock ")[1].split()[1].split(":")[:2]
    return int(hour) * 60 + int(minute)


# --- the screen -------------------------------------------------------------------------------------------------------


def rfb(sock: socket.socket) -> None:
    """A VNC client's way in: version, no password, shared; then the server's name."""
    sock.settimeout(60)
    assert sock.recv(12, socket.MSG_WAITALL) == b"RFB 003.008\n"
    sock.sendall(b"RFB 003.008\n")
    count = sock.recv(1)[0]
    assert 1 in sock.recv(count, socket.MSG_WAITALL)
    sock.sendall(b"\1")
    assert sock.recv(4, socket.MSG_WAITALL) == bytes(4)
    sock.sendall(b"\1")
    width, height = struct.unpack(">HH", sock.recv(4, socket.MSG_WAITALL))
    assert width >= 320 and height >= 200
    length = struct.unpack(">16xI", sock.recv(20, socket.MSG_WAITALL))[0]
    sock.recv(length, socket.MSG_WAITALL)


@pytest.mark.parametrize(("keymap", "code"), [("en-us", "2c"), ("de", "15")])
def test_vnc_and_the_keymap(room: Session, keymap: str, code: str) -> None:
    """A viewer that types z: on a German keyboard that is the key right of t."""
    with run(room, f"-hda scancode -vnc :1 -k {keymap}") as (viewer, name):
        viewer.wait_output("scancode ready")
        with room.client() as client:
            _, (fd,) = client.ask_fds(messages.Display(vm=name))
        with socket.socket(fileno=fd) as sock:
            rfb(sock)
            for down in (1, 0):
                sock.sendall(struct.pack(">BBxxI", 4, down, ord("z")))
            viewer.wait_output(f"scancode {code}")


def test_a_vm_without_a_screen_says_what_it_needs(room: Session) -> None:
    with run(room, "-hda hda") as (_, name), pytest.raises(ReportedError, match=r"display.type = vnc"):
        room.ask(messages.Display(vm=name))


def test_uefi_starts_and_keeps_its_variables(room: Session) -> None:
    if not Path("/usr/share/OVMF/OVMF_CODE_4M.fd").exists():
        pytest.skip("needs Debian's package ovmf")
    text = '[machine]\nfirmware = "uefi"\n[memory]\nsize = "256M"\n[[disk]]\npath = "shelf:hda"\nreadonly = true\n'
    room.ask(messages.Define(vm="uefi", text=text, new=True))
    with room.client() as client:
        _, fds = client.ask_fds(messages.Boot(vm="uefi", console=True))
    viewer = Viewer(fds)
    viewer.wait_output("BdsDxe", 240)
    room.ask(messages.Kill(vm="uefi"))
    viewer.close()
    (nvram,) = Path(room.layout.vms).glob("*/uefi/disks/.nvram")
    assert nvram.read_bytes() != Path("/usr/share/OVMF/OVMF_VARS_4M.fd").read_bytes()
    room.ask(messages.Rm(vm="uefi"))


# --- live -------------------------------------------------------------------------------------------------------------


def test_what_changes_while_it_runs(room: Session) -> None:
    """A disc goes into the drive and the next reset boots from it; balloon, cable and log follow; processors wait."""
    text = '[memory]\nsize = "64M"\n[boot]\norder = ["cdrom0", "disk0"]\n[[disk]]\npath = "shelf:reboot"\nformat = "raw"\n'
    text += '[[disk]]\ntype = "cdrom"\n[[net]]\nnetwork = "users"\n[[net]]\nlink = "down"\n'
    room.ask(messages.Define(vm="live", text=text, new=True))
    with room.client() as client:
        _, fds = client.ask_fds(messages.Boot(vm="live", console=True))
    viewer = Viewer(fds)
    viewer.wait_output("up")
    changes = {"cdrom0": "shelf:cd.iso", "net0.link": "down", "memory": "32M", "cpus": "2", "console.log": "off"}
    answer = room.ask(messages.Change(vm="live", set=changes))
    assert set(answer["now"]) == {"cdrom0.path", "net0.link", "memory.size", "console.log"}
    assert (answer["next_boot"], answer["problems"]) == (["cpu.count"], [])
    viewer.type("R")
    viewer.wait_output("boot from cd e")
    room.kill_broker()
    room.start_broker()
    assert room.ask(messages.Info(vm="live"))["next_boot"] == ["cpu.count"]
    assert room.ask(messages.Change(vm="live", unset=["cdrom0.path"]))["now"] == ["cdrom0.path"]
    with pytest.raises(ReportedError, match="in use"):
        room.ask(messages.Drop(vm="shelf", object="reboot"))
    room.ask(messages.Kill(vm="live"))
    room.ask(messages.Rm(vm="live"))
    viewer.close()


# --- the example, and the shell's own way -------------------------------------------------------------------------------

EXAMPLE = """
name = "web1"
[machine]
clock = "localtime"
on_reboot = "stop"
[cpu]
count = 2
[memory]
size = "1G"
[boot]
order = ["disk0", "cdrom0", "floppy0", "net0"]
[[disk]]                       # disk0   (-hda)
path = "root.qcow2"
format = "qcow2"
[[disk]]                       # disk1   (-hdb -snapshot)
path = "data.img"
format = "raw"
bus = "sata"
snapshot = true
[[disk]]                       # cdrom0  (-cdrom)
type = "cdrom"
path = "library:lib.iso"
[[disk]]                       # floppy0 (-fda)
type = "floppy"
path = "info.img"
[[net]]
network = "users"
forward = ["tcp:20022:22"]
[display]
type = "vnc"
keymap = "fr"
"""


def test_the_example_boots(room: Session, tmp_path: Path) -> None:
    answer = room.ask(messages.Define(vm="web1", text=EXAMPLE))
    assert answer["missing"] == ["root.qcow2", "data.img", "info.img"]
    with pytest.raises(ReportedError, match="web1 has no root.qcow2"):
        room.ask(messages.Boot(vm="web1"))
    raw, disk = tmp_path / "raw", tmp_path / "disk"
    raw.write_bytes(guests.disk(guests.bootsector("root")))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk], check=True)
    room.put("web1.root.qcow2", disk.read_bytes(), "qcow2")
    room.put("web1.data.img", bytes(1 << 20), "raw")
    room.put("web1.info.img", guests.floppy("info"), "raw")
    with room.client() as client:
        _, fds = client.ask_fds(messages.Boot(vm="web1", console=True))
    viewer = Viewer(fds)
    viewer.wait_output("boot from root 80")
    viewer.close()
    line = room.ask(messages.LaunchLine(vm="web1"))["argv"]
    assert not [word for word in line if "web1" in word or "root.qcow2" in word]
    room.ask(messages.Kill(vm="web1"))
    text = room.ask(messages.Info(vm="web1", toml=True))["toml"]
    room.ask(messages.Rm(vm="web1"))
    assert room.ask(messages.Define(vm="web1", text=text, new=True))["missing"] == answer["missing"]
    room.ask(messages.Rm(vm="web1"))


def shell(room: Session, *words: str, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-IS", f"{PACKAGE_DIR}/__main__.py", "shell", "--layout", room.layout.to_args(), *words]
    if given is None:
        return subprocess.run(command, capture_output=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    return subprocess.run(command, capture_output=True, timeout=120, check=False, input=given)


def test_from_the_shell(room: Session) -> None:
    """put, set, explain, kvm, disk, objects, info --toml, define: as a person gives them."""
    assert shell(room, "put", "shelf.mine", given=guests.disk(guests.bootsector("mine"))).stdout == b"shelf.mine: 1M file\n"
    assert shell(room, "rm", "shelf.mine", "--yes").returncode == 0
    assert shell(room, "put", "shelf.mine.img", given=guests.disk(guests.bootsector("mine"))).returncode == 0
    explained = shell(room, "kvm", "--explain", "-hda", "mine.img", "-boot", "c", "-snapshot")
    assert explained.returncode == 0, explained.stderr
    assert b"shelf:mine.img" in explained.stdout and b"allowed" in explained.stdout
    refused = shell(room, "kvm", "-hda", "mine.img", "-monitor", "stdio", "-smb", "/home")
    assert refused.returncode == 1
    assert [line.split(b":")[0] for line in refused.stderr.splitlines()] == [b"-monitor stdio", b"-smb /home"]
    once = shell(room, "kvm", "-hda", "mine.img")
    assert once.returncode == 0 and b"boot from mine 80" in once.stdout, once
    (name,) = [name for name in names(room) if name.startswith("kvm")]
    assert shell(room, "kill", name).returncode == 0
    assert name not in names(room)
    kept = shell(room, "kvm", "-hda", "mine.img", "-m", "32", "--save", "kept")
    assert (kept.returncode, kept.stdout) == (0, b"kept: off\n")
    assert shell(room, "disk", "add", "kept", "data", "--size", "2G").returncode == 0
    assert b"data  qcow2" in shell(room, "objects", "kept").stdout
    changed = shell(room, "set", "kept", "memory=64M", "order=disk0", "description=a b")
    assert (changed.returncode, changed.stdout) == (0, b"kept: off\n")
    wrong = shell(room, "set", "kept", "memroy=64M")
    assert wrong.returncode == 2 and b"did you mean memory" in wrong.stderr
    text = shell(room, "info", "kept", "--toml").stdout
    assert b'description = "a b"' in text
    assert shell(room, "new", "other", "--from", "-", given=text.replace(b'name = "kept"\n', b"")).returncode == 0
    explained = shell(room, "explain", "set", "kept", "memory=9000G")
    assert explained.returncode == 1 and b"memory_max" in explained.stdout
    assert shell(room, "explain", "boot", "kept").returncode == 0
    for vm in ("kept", "other"):
        assert shell(room, "rm", vm, "--yes").returncode == 0
    xml = b"<domain type='kvm'><name>W</name><memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type>hvm</type></os></domain>"
    assert shell(room, "import-libvirt", "virt", given=xml).stdout == b"virt: off\n"
    assert shell(room, "rm", "virt", "--yes").returncode == 0


# --- bringing files in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "format", "problem"),
    [
        (b"", "file", "empty"),
        (b"QFI\xfb" + bytes(600), "qcow2", "qcow2"),
        (b"not", "rom", "55 AA"),
    ],
)
def test_what_is_refused_leaves_nothing(room: Session, data: bytes, format: str, problem: str) -> None:
    before = room.ask(messages.Objects(vm="shelf"))
    with pytest.raises(VmshellError, match=problem):
        room.put("shelf.bad", data, format)
    assert room.ask(messages.Objects(vm="shelf")) == before


def test_an_upload_that_is_cut_off_is_no_file(room: Session) -> None:
    with pytest.raises(VmshellError, match="shelf.cut was not taken: what came is not what was sent"):
        room.put("shelf.cut", b"hello", bytes=6)
    with pytest.raises(VmshellError, match="already has kernel"):
        room.put("shelf.kernel", b"x")
    left = [path.name for path in Path(room.layout.state, "shelf").glob("*/*/.*") if path.name.startswith(".")]
    assert left == []
