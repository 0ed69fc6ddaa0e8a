"""Plans started for real, in the jail: QEMU takes every word, and has the devices of the plan and no others (threat B32)."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.vm.jailed import Jailed, Qmp, read_until
from vmshell.broker.lifecycle import serial_port
from vmshell.launch.devices import DiskPlan, NicPlan

# As root the VM has a uid of its own, and files are root's, mode 0600; otherwise all is the user's.
UID = 61234 if os.geteuid() == 0 else None

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not os.path.exists("/usr/bin/qemu-system-x86_64"), reason="QEMU is not installed"),
    pytest.mark.skipif(not os.path.exists("/usr/bin/bwrap"), reason="bubblewrap is not installed"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed"),
]


class Drive(NamedTuple):
    """A drive as a case writes it down; its files are made for it."""

    bus: str
    formats: str = "raw"  # of its layers, the top one first
    kind: str = "disk"
    more: dict[str, Any] = {}

    def plan(self, vm: Jailed, name: str) -> DiskPlan:
        readonly = self.kind == "cdrom" or self.more.get("readonly", False)
        layers = []
        for depth, format in enumerate(self.formats.split()):
            path = vm.folder / f"{name}-{depth}"
            if format == "raw":
                path.touch(0o600)
                os.truncate(path, 1440 << 10)
            else:
                subprocess.run(["qemu-img", "create", "-q", "-f", format, str(path), "16M"], check=True, timeout=60)
                path.chmod(0o600)
            layers.append((vm.open(path, os.O_RDONLY if readonly or depth else os.O_RDWR), format))
        return DiskPlan(kind=self.kind, bus=self.bus, layers=tuple(layers), **self.more)


def cdrom(bus: str, formats: str = "raw", **more: Any) -> Drive:
    return Drive(bus, formats, "cdrom", more)


def floppy(formats: str = "raw", **more: Any) -> Drive:
    return Drive("fdc", formats, "floppy", more)


def nic(last: int, **values: Any) -> NicPlan:
    return NicPlan(mac=f"06:00:00:00:00:{last:02x}", **values)


class Case(NamedTuple):
    """A plan, and what QEMU is to have: devices as `driver:id`, drives as id → node, other nodes."""

    values: dict[str, Any]
    devices: str
    drives: tuple[Drive, ...] = ()
    blocks: dict[str, str | None] = {}
    nodes: str = ""


ALWAYS = "virtio-rng-pci:rngdev0 "
USUAL = ALWAYS + "isa-serial:serial0 virtio-balloon-pci:balloon0 "
IDS = [f"nic{index}" for index in range(8)]
CASES = {
    "q35": Case({}, USUAL),
    "pc": Case({"machine": "pc"}, USUAL),
    "bare": Case({"serial": False, "balloon": False, "acpi": False, "reboot_stops": True, "clock": "localtime"}, ALWAYS),
    "pinned q35": Case({"machine": "pc-q35-7.2", "boot_menu": True, "cpu_model": "qemu64,+ssse3,svm=off"}, USUAL),
    "pinned pc": Case({"machine": "pc-i440fx-7.2", "acpi": False, "clock": "localtime"}, USUAL),
    "layers": Case(
        {},
        USUAL + "virtio-blk-pci:dev0 virtio-blk-pci:dev1 virtio-blk-pci:dev2",
        (Drive("virtio", "qcow2 qcow2 raw"), Drive("virtio", "qcow2 raw"), Drive("virtio", more={"readonly": True})),
        {"dev0": "disk0", "dev1": "disk1", "dev2": "disk2"},
        "disk0-base1 disk0-base2 disk1-base1",
    ),
    "buses of q35": Case(
        {},
        USUAL + "ide-hd:dev0 scsi-hd:dev1 virtio-scsi-pci:scsi0 usb-storage:dev2 qemu-xhci:usb0 scsi-hd:dev3 usb-storage:dev4 "
        "ide-cd:cd0 ide-cd:cd1 scsi-cd:cd2 scsi-cd:cd3 isa-fdc:fdc0 floppy:dev9 floppy:dev10",
        (
            *(Drive("sata", "qcow2"), Drive("scsi", more={"bootindex": 1}), Drive("usb", "qcow2 raw", more={"bootindex": 2})),
            *(Drive("scsi", more={"readonly": True}), Drive("usb", more={"readonly": True})),
            *(cdrom("sata", bootindex=3), cdrom("sata", ""), cdrom("scsi"), cdrom("scsi", "", bootindex=4)),
            *(floppy(readonly=True, bootindex=6), floppy("qcow2 raw", bootindex=5)),
        ),
        {
            **{name: f"disk{name[3:]}" for name in ("dev0", "dev1", "dev2", "dev3", "dev4", "dev9", "dev10")},
            **{"cd0": "disk5", "cd1": None, "cd2": "disk7", "cd3": None},
        },
        "disk2-base1 disk10-base1",
    ),
    "buses of pc": Case(
        {"machine": "pc"},
        USUAL + "ide-cd:cd0 ide-hd:dev1 ide-hd:dev2 ide-cd:cd1 floppy:dev4 floppy:dev5 usb-storage:dev6 qemu-xhci:usb0 "
        "scsi-hd:dev7 virtio-scsi-pci:scsi0",
        (
            *(cdrom("ide", ""), Drive("ide", more={"geometry": (20, 16, 9, "none")}), Drive("ide", "qcow2")),
            *(cdrom("ide", bootindex=2), floppy(bootindex=3), floppy(bootindex=4), Drive("usb"), Drive("scsi", "qcow2")),
        ),
        {"cd0": None, "cd1": "disk3", **{f"dev{index}": f"disk{index}" for index in (1, 2, 4, 5, 6, 7)}},
    ),
    "nics of q35": Case(
        {
            "nics": (
                nic(1, bootindex=1, forwards=(("tcp", 20022, 22), ("udp", 20022, 53))),
                *(nic(2, model="e1000e", bootindex=2), nic(3, model="e1000", bootindex=3), nic(4, model="rtl8139", bootindex=4)),
            )
        },
        USUAL + "virtio-net-pci:nic0 e1000e:nic1 e1000:nic2 rtl8139:nic3",
    ),
    "nics of pc": Case(
        {"machine": "pc", "nics": tuple(nic(k, model=model) for k, model in enumerate(("virtio", "e1000e", "e1000", "rtl8139")))},
        USUAL + "virtio-net-pci:nic0 e1000e:nic1 e1000:nic2 rtl8139:nic3",
    ),
    "std": Case(
        {"video": "std", "display": "vnc", "keymap": "fr-ca", "tablet": True},
        USUAL + "VGA:video0 qemu-xhci:usb0 usb-tablet:tablet0",
    ),
    "virtio": Case({"video": "virtio", "machine": "pc"}, USUAL + "virtio-vga:video0"),
    "cirrus": Case({"video": "cirrus", "keymap": "bepo"}, USUAL + "cirrus-vga:video0"),
    "full q35": Case(
        {"nics": tuple(nic(k) for k in range(8)), "video": "std", "tablet": True},
        USUAL + "VGA:video0 qemu-xhci:usb0 usb-tablet:tablet0 virtio-scsi-pci:scsi0 scsi-cd:cd0 "
        + " ".join([*(f"virtio-net-pci:{name}" for name in IDS), *(f"virtio-blk-pci:dev{k}" for k in range(15))]),
        (*(Drive("virtio") for _ in range(15)), cdrom("scsi")),
        {"cd0": "disk15", **{f"dev{k}": f"disk{k}" for k in range(15)}},
    ),
    "full pc": Case(
        {"machine": "pc", "nics": tuple(nic(k) for k in range(8)), "video": "virtio", "tablet": True},
        USUAL + "virtio-vga:video0 qemu-xhci:usb0 usb-tablet:tablet0 "
        + " ".join(
            [
                *(f"virtio-net-pci:{name}" for name in IDS),
                *(f"usb-storage:dev{k}" for k in range(8)),
                *(f"virtio-blk-pci:dev{k}" for k in range(8, 16)),
            ]
        ),
        (*(Drive("usb") for _ in range(8)), *(Drive("virtio") for _ in range(8))),
        {f"dev{k}": f"disk{k}" for k in range(16)},
    ),
}  # fmt: skip

# What a machine is made of without a device of ours. All versions' together: a later QEMU may have fewer.
COMMON = [
    *("ps2-mouse", "ps2-kbd", "hpet", "ioapic", "port92", "i8042", "isa-pcspk", "isa-pit", "mc146818rtc", "isa-i8259", "i8257"),
    *("fw_cfg_io", "kvmvapic"),
]
CHIPSET = {
    "q35": [*COMMON, "q35-pcihost", "mch", "ICH9-LPC", "ich9-ahci"],
    "pc": [*COMMON, "i440FX-pcihost", "i440FX", "PIIX4_PM", "smbus-eeprom", "piix3-ide", "PIIX3", "isa-fdc"],
}
PCI_CHIPSET = {
    "q35": {"8086:29c0", "8086:2918"},  # host bridge, ISA bridge
    "pc": {"8086:1237", "8086:7000", "8086:7010"},  # the same, and IDE
}
AHCI, ACPI_OF_PC = "8086:2922", "8086:7113"
NOT_PCI = {"isa-serial", "isa-fdc", "floppy", "ide-hd", "ide-cd", "scsi-hd", "scsi-cd", "usb-storage", "usb-tablet"}
# The second half of a device, made by the first.
INNER = {
    "virtio-rng-pci": "virtio-rng-device",
    "virtio-balloon-pci": "virtio-balloon-device",
    "virtio-blk-pci": "virtio-blk-device",
    "virtio-net-pci": "virtio-net-device",
    "virtio-scsi-pci": "virtio-scsi-device",
    "virtio-serial-pci": "virtio-serial-device",
    "virtio-vga": "virtio-gpu-device",
    "usb-storage": "scsi-hd",
}


def hmp(qmp: Qmp, line: str) -> str:
    return str(qmp.ask("human-monitor-command", **{"command-line": line}))


def ask_all(qmp: Qmp) -> tuple[Counter[tuple[str, str]], dict[str, str | None], set[str], set[str]]:
    """All devices (driver, id), drives (id → node), nodes that no device names, PCI functions (id, or vendor:device)."""
    tree = Counter(re.findall(r'dev: ([\w.-]+), id "([^"]*)"', hmp(qmp, "info qtree")))
    blocks: dict[str, str | None] = {}
    for block in qmp.ask("query-block"):
        name = block["qdev"].removeprefix("/machine/peripheral/").partition("/")[0]
        blocks[name] = block.get("inserted", {}).get("node-name")
    nodes = {node["node-name"] for node in qmp.ask("query-named-block-nodes")}
    assert nodes == {name for node in nodes for name in (node.removesuffix("-file"), f"{node.removesuffix('-file')}-file")}
    pci = set()
    for bus in qmp.ask("query-pci"):
        for device in bus["devices"]:
            assert "pci_bridge" not in device
            pci.add(device["qdev_id"] or "{vendor:04x}:{device:04x}".format(**device["id"]))
    return tree, blocks, {node for node in nodes if not node.endswith("-file")} - set(blocks.values()), pci


def check(qmp: Qmp, case: Case, family: str, acpi: bool = True) -> None:
    """B32: what QEMU has is what *case* says."""
    wanted = Counter({tuple(word.split(":")): 1 for word in case.devices.split()})
    tree, blocks, nodes, pci = ask_all(qmp)
    inner = Counter((INNER[driver], "") for driver, _ in wanted if driver in INNER)
    ours = Counter({item: count for item, count in tree.items() if item[1] or item[0] not in CHIPSET[family]})
    assert ours == wanted + inner
    sata = any(drive.bus == "sata" for drive in case.drives)
    assert tree[("ich9-ahci", "")] == (1 if sata else 0)
    assert blocks == case.blocks
    assert nodes == set(case.nodes.split())
    chips = PCI_CHIPSET[family] | ({AHCI} if sata else set()) | ({ACPI_OF_PC} if family == "pc" and acpi else set())
    assert pci == chips | {name for driver, name in wanted if driver not in NOT_PCI and driver != "virtserialport"}
    # Every device has a name: nothing comes in sideways.
    assert [item["name"] for item in qmp.ask("qom-list", path="/machine/peripheral-anon")] == ["type"]
    peripheral = {item["name"] for item in qmp.ask("qom-list", path="/machine/peripheral")} - {"type"}
    assert peripheral == {name for _, name in wanted}


def leave(vm: Jailed, qmp: Qmp) -> None:
    """Quit, as it should be, and without a word of complaint."""
    qmp.ask("quit")
    qmp.close()
    _, errors = vm.process.communicate(timeout=60)
    assert (vm.process.returncode, errors) == (0, b"")


@pytest.mark.parametrize("name", CASES)
def test_b32_qemu_has_the_devices_of_the_plan_and_no_others(short_tmp: Path, name: str) -> None:
    case = CASES[name]

    def more(vm: Jailed) -> dict[str, Any]:
        return {"disks": tuple(drive.plan(vm, f"d{index}") for index, drive in enumerate(case.drives))}

    with Jailed(short_tmp, uid=UID, more=more, **case.values) as vm:
        qmp = vm.qmp()
        assert qmp.ask("query-status")["running"] is False
        check(qmp, case, vm.plan.family, vm.plan.acpi)
        chardevs = {item["label"] for item in qmp.ask("query-chardev")}
        assert chardevs == {"qmp0", "ser0"}
        leave(vm, qmp)


def test_b32_agent_and_firmware(short_tmp: Path) -> None:
    """The agent's port on its own socket; the firmware's code read-only and its variables not, by descriptor."""
    for name, size in (("code", 1 << 20), ("vars", 1 << 17)):
        (short_tmp / name).touch(0o600)
        os.truncate(short_tmp / name, size)

    def more(vm: Jailed) -> dict[str, Any]:
        return {
            "agent_fd": vm.listen("agent"),
            "firmware": (vm.open(short_tmp / "code", os.O_RDONLY), vm.open(short_tmp / "vars")),
        }

    with Jailed(short_tmp, uid=UID, more=more) as vm:
        qmp = vm.qmp()
        vm.connect("agent").close()
        devices = {item["name"] for item in qmp.ask("qom-list", path="/machine/peripheral")} - {"type"}
        assert devices == {"rngdev0", "serial0", "balloon0", "vser0", "agentport0"}
        assert {item["label"] for item in qmp.ask("query-chardev")} == {"qmp0", "ser0", "agent0"}
        nodes = {node["node-name"]: node["ro"] for node in qmp.ask("query-named-block-nodes")}
        assert nodes == {"fwcode": True, "fwcode-file": True, "fwvars": False, "fwvars-file": False}
        tree = hmp(qmp, "info qtree")
        assert 'name = "org.qemu.guest_agent.0"' in tree
        assert tree.count("dev: cfi.pflash01") == 2
        leave(vm, qmp)


# --- it boots, in the order asked for -------------------------------------------------------------------------------------


def sector(letter: str) -> bytes:
    """A boot sector that says one letter on the serial port and stops: cli; mov al, …; mov dx, 3f8h; out; hlt."""
    code = b"\xfa\xb0" + letter.encode() + b"\xba\xf8\x03\xee" + b"\xf4\xeb\xfd"
    return code.ljust(510, b"\0") + b"\x55\xaa"


def disc(letter: str) -> bytes:
    """A CD-ROM of El Torito's kind: the boot record at block 17, the catalogue at 18, the sector at 19."""
    blocks = [bytes(2048)] * 17
    blocks.append((b"\0CD001\x01EL TORITO SPECIFICATION".ljust(0x47, b"\0") + struct.pack("<I", 18)).ljust(2048, b"\0"))
    validation = b"\x01\x00".ljust(28, b"\0") + struct.pack("<H", (0x10000 - 0x01 - 0xAA55) & 0xFFFF) + b"\x55\xaa"
    entry = struct.pack("<BBHBBHI", 0x88, 0, 0, 0, 0, 4, 19)  # bootable, no emulation, four sectors of 512
    blocks.append((validation + entry).ljust(2048, b"\0"))
    blocks.append(sector(letter).ljust(2048, b"\0"))
    return b"".join(blocks).ljust(64 << 10, b"\0")


BOOTS = [
    *("q35 disk virtio", "q35 disk sata", "q35 disk scsi", "q35 disk usb", "q35 cdrom sata", "q35 cdrom scsi", "q35 floppy fdc"),
    *("pc disk ide", "pc cdrom ide", "pc floppy fdc", "pc disk usb"),
]


@pytest.mark.parametrize("boot", BOOTS)
def test_boot_order(short_tmp: Path, boot: str) -> None:
    """R5: the drive that is first in order boots, though another that could comes before it in the plan."""
    machine, kind, bus = boot.split()
    (short_tmp / "other").write_bytes(sector("n").ljust(1 << 20, b"\0"))
    (short_tmp / "first").write_bytes(disc("y") if kind == "cdrom" else sector("y").ljust(1440 << 10, b"\0"))

    def more(vm: Jailed) -> dict[str, Any]:
        other = DiskPlan(layers=((vm.open(short_tmp / "other"), "raw"),), bootindex=2)
        flags = os.O_RDONLY if kind == "cdrom" else os.O_RDWR
        layers = ((vm.open(short_tmp / "first", flags), "raw"),)
        return {"disks": (other, DiskPlan(kind=kind, bus=bus, layers=layers, bootindex=1))}

    with Jailed(short_tmp, uid=UID, machine=machine, more=more, paused=False) as vm:
        assert read_until(vm.console, b"y") == b"y"


def test_an_option_rom_runs_by_descriptor(short_tmp: Path) -> None:
    """The ROM says `r` on its way: mov dx, 3f8h; mov al, 'r'; out; retf. Its bytes add up to zero, as the BIOS wants."""
    code = b"\x55\xaa\x01\xba\xf8\x03\xb0r\xee\xcb".ljust(511, b"\0")
    rom = short_tmp / "rom"
    rom.write_bytes(code + bytes([-sum(code) & 255]))
    rom.chmod(0o444)

    def more(vm: Jailed) -> dict[str, Any]:
        return {"option_rom_fds": (vm.open(rom, os.O_RDONLY),)}

    with Jailed(short_tmp, uid=UID, more=more, paused=False) as vm:
        assert read_until(vm.console, b"r") == b"r"


@pytest.mark.parametrize("code", ["/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_CODE_4M.fd"])
def test_uefi_comes_up(short_tmp: Path, code: str) -> None:
    """The firmware keeps its variables in the file that it was given."""
    if not os.path.exists(code):
        pytest.skip(f"{code} is not installed")
    variables = short_tmp / "vars"
    shutil.copy(code.replace("CODE", "VARS"), variables)
    variables.chmod(0o600)
    before = variables.read_bytes()

    def more(vm: Jailed) -> dict[str, Any]:
        return {"firmware": (vm.open(Path(code), os.O_RDONLY), vm.open(variables))}

    with Jailed(short_tmp, uid=UID, memory=128, more=more, paused=False) as vm:
        assert b"BdsDxe" in read_until(vm.console, b"BdsDxe", 240)
    assert variables.read_bytes() != before


# --- what the plan's other words do ---------------------------------------------------------------------------------------


def test_on_reboot_stop(short_tmp: Path) -> None:
    with Jailed(short_tmp, uid=UID, reboot_stops=True) as vm:
        qmp = vm.qmp()
        qmp.ask("cont")
        qmp.ask("system_reset")
        qmp.close()
        assert vm.process.wait(60) == 0


def test_loadvm_goes_on_from_a_saved_state(short_tmp: Path) -> None:
    """A state saved by QMP in the qcow2 disk, beside a CD-ROM; the boot sector is in memory though nothing has run."""
    drives = (Drive("virtio", "qcow2 raw"), cdrom("sata", ""))
    loaded = {"disks": (), "paused": True}

    def start(vm: Jailed) -> dict[str, Any]:
        disks = tuple(drive.plan(vm, f"d{index}") for index, drive in enumerate(drives))
        (short_tmp / "d0-1").write_bytes(sector("y").ljust(1 << 20, b"\0"))
        first = DiskPlan(layers=disks[0].layers, bootindex=1)
        return {"disks": (first, disks[1])}

    def again(vm: Jailed) -> dict[str, Any]:
        layers = ((vm.open(short_tmp / "d0-0"), "qcow2"), (vm.open(short_tmp / "d0-1", os.O_RDONLY), "raw"))
        return {**loaded, "disks": (DiskPlan(layers=layers, bootindex=1), DiskPlan(kind="cdrom", bus="sata", layers=()))}

    with Jailed(short_tmp, uid=UID, machine="pc-q35-7.2", more=start) as vm:
        qmp = vm.qmp()
        qmp.ask("cont")
        assert read_until(vm.console, b"y") == b"y"
        qmp.ask("stop")
        save = {"job-id": "save", "tag": "s5", "vmstate": "disk0", "devices": ["disk0"]}
        qmp.ask("snapshot-save", **save)
        deadline = time.monotonic() + 120
        while (job := qmp.ask("query-jobs")[0])["status"] != "concluded" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (job["status"], job.get("error")) == ("concluded", None)
        leave(vm, qmp)
    for name in ("qmp.sock", *serial_port.NAMES):
        (short_tmp / name).unlink()
    with Jailed(short_tmp, uid=UID, machine="pc-q35-7.2", more=again, loadvm=5) as vm:
        qmp = vm.qmp()
        assert qmp.ask("query-status")["running"] is False
        assert "0xfa 0xb0 0x79 0xba" in hmp(qmp, "xp /4xb 0x7c00")
        leave(vm, qmp)


def test_b30_a_viewer_comes_by_descriptor_and_nothing_listens(short_tmp: Path) -> None:
    """B30: VNC answers on a socket handed over by QMP; in the jail's network only the forwarded port listens, on loopback."""
    forwards = (("tcp", 20022, 22), ("udp", 20053, 53))
    with Jailed(short_tmp, uid=UID, display="vnc", video="std", keymap="de-ch", nics=(nic(1, forwards=forwards),)) as vm:
        qmp = vm.qmp()
        ours, theirs = socket.socketpair()
        socket.send_fds(qmp.sock, [json.dumps({"execute": "getfd", "arguments": {"fdname": "v"}}).encode()], [theirs.fileno()])
        assert json.loads(qmp.file.readline()) == {"return": {}}
        theirs.close()
        qmp.ask("add_client", protocol="vnc", fdname="v", skipauth=True)
        assert read_until(ours, b"\n") == b"RFB 003.008\n"
        ours.close()
        # /proc/net/tcp: address and port as hexadecimal, 0A is listening.
        tcp = [line.split() for line in vm.proc("net/tcp").decode().splitlines()[1:]]
        assert [words[1] for words in tcp if words[3] == "0A"] == [f"0100007F:{20022:04X}"]
        udp = [line.split() for line in vm.proc("net/udp").decode().splitlines()[1:]]
        assert [words[1] for words in udp] == [f"0100007F:{20053:04X}"]
        assert len(vm.proc("net/tcp6").splitlines()) == len(vm.proc("net/udp6").splitlines()) == 1
        qmp.ask("quit")
        qmp.close()
        assert vm.process.wait(60) == 0


def refused(more: Callable[[Jailed], dict[str, Any]], change: Callable[[list[str]], list[str]], folder: Path) -> bytes:
    with Jailed(folder, uid=UID, more=more, change=change, machine="pc") as vm:
        _, errors = vm.process.communicate(timeout=60)
        assert vm.process.returncode == 1
        return bytes(errors)


def test_why_a_plan_has_no_read_only_ide_disk(short_tmp: Path) -> None:
    """The counterpart of a refusal in `DiskPlan`: QEMU has none either."""

    def more(vm: Jailed) -> dict[str, Any]:
        return {"disks": (Drive("virtio", more={"readonly": True}).plan(vm, "d"),)}

    def as_ide(words: list[str]) -> list[str]:
        return [word.replace("virtio-blk-pci", "ide-hd") for word in words]

    assert b"Block node is read-only" in refused(more, as_ide, short_tmp)
