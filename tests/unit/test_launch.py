"""The launch line as a pure function: whole lines against golden files, and what must hold for every plan.

The golden files are one word a line. After a wanted change run this file once with VMSHELL_GOLDEN=write and read the diff.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmshell.errors import BadValue
from vmshell.hardware import KEYMAPS
from vmshell.launch import jail, seccomp
from vmshell.launch.argv import CPU, qemu_argv
from vmshell.launch.devices import DiskPlan, NicPlan
from vmshell.launch.plan import LaunchPlan

GOLDEN = Path(__file__).parent.parent / "golden"


def plan(**changes: Any) -> LaunchPlan:
    values: dict[str, Any] = {
        "number": 42,
        "accel": "tcg",
        "cpus": 1,
        "memory": 256,
        "qmp_fd": 8,
        "info_fd": 11,
        "seccomp_fd": 12,
        "uid": 61234,
        "gid": 61234,
        "file_size_max": 2147483648,
    }
    return LaunchPlan(**{**values, **changes})


def nic(last: int, **values: Any) -> NicPlan:
    return NicPlan(mac=f"06:00:00:00:00:{last:02x}", **values)


PLANS = {
    "kernel": plan(kernel_fd=5, initrd_fd=6, cmdline="console=ttyS0 quiet", nics=(nic(42),)),
    "disk": plan(disks=(DiskPlan(layers=((4, "qcow2"), (3, "raw")), bootindex=1),)),
    "disks": plan(
        disks=(
            DiskPlan(layers=((3, "qcow2"), (4, "qcow2"), (10, "raw")), bus="sata", bootindex=2),
            DiskPlan(layers=((5, "raw"),), bus="scsi", bootindex=1),
            DiskPlan(layers=((6, "raw"),), readonly=True),
            DiskPlan(layers=((9, "qcow2"),), bus="usb", bootindex=5),
            DiskPlan(layers=((13, "raw"),), kind="cdrom", bus="sata", bootindex=3),
            DiskPlan(layers=(), kind="cdrom", bus="scsi"),
            DiskPlan(layers=((14, "raw"),), kind="floppy", bus="fdc", readonly=True),
            DiskPlan(layers=((15, "qcow2"), (16, "raw")), kind="floppy", bus="fdc", bootindex=4),
        ),
    ),
    "pc": plan(
        machine="pc",
        acpi=False,
        clock="localtime",
        reboot_stops=True,
        boot_menu=True,
        option_rom_fds=(3, 4),
        disks=(
            DiskPlan(layers=((5, "raw"),), bus="ide", geometry=(130, 16, 63, "lba")),
            DiskPlan(layers=((6, "qcow2"),), bus="ide", bootindex=1),
            DiskPlan(layers=((9, "raw"),), bus="ide"),
            DiskPlan(layers=((10, "raw"),), kind="cdrom", bus="ide", bootindex=4),
            DiskPlan(layers=((13, "raw"),), kind="floppy", bus="fdc", bootindex=2),
            DiskPlan(layers=((14, "raw"),), kind="floppy", bus="fdc", bootindex=3),
        ),
        nics=(nic(1, model="rtl8139", bootindex=5), nic(2, model="e1000")),
    ),
    "screen": plan(
        display="vnc",
        video="std",
        keymap="fr-ca",
        tablet=True,
        agent_fd=3,
        serial=False,
        firmware=(4, 5),
        cpu_model="Nehalem,+aes,svm=off",
        nics=(nic(1, forwards=(("tcp", 20022, 22), ("udp", 20053, 53))), nic(2, model="e1000e", bootindex=1)),
    ),
    "loadvm": plan(
        machine="pc-q35-7.2",
        loadvm=3,
        video="virtio",
        balloon=False,
        disks=(DiskPlan(layers=((3, "qcow2"),)), DiskPlan(layers=((4, "raw"),), readonly=True)),
    ),
    "pinned": plan(machine="pc-i440fx-10.0", video="cirrus"),
    "nothing": plan(paused=False, qmp_fd=None),
    "kvm": plan(accel="kvm", kvm_gid=106, cpus=4, memory=4096, kernel_fd=5),
    "unprivileged": plan(uid=None, gid=None, kernel_fd=5, initrd_fd=6, cmdline="console=ttyS0"),
    "unprivileged-kvm": plan(uid=None, gid=None, accel="kvm", kernel_fd=5),
    "scoped": plan(scope="vmshell-vm-42.scope", slice="vmshell.slice", oom_score_adj=500, cpus=2, memory=1024, cpu_weight=50),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_whole_line(name: str) -> None:
    """What stands in the golden file is what runs: a change of the line is a change that somebody read."""
    line = "\n".join(jail.command(PLANS[name])) + "\n"
    golden = GOLDEN / f"launch-{name}.txt"
    if os.environ.get("VMSHELL_GOLDEN") == "write":
        golden.write_text(line, encoding="utf-8")
    assert line == golden.read_text(encoding="utf-8")


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.glob("launch-*.txt")} == {f"launch-{name}.txt" for name in PLANS}


# --- any plan at all ------------------------------------------------------------------------------------------------------

macs = st.integers(0, 0xFFFFFF).map(lambda n: f"06:00:00:{n >> 16:02x}:{n >> 8 & 255:02x}:{n & 255:02x}")
cmdlines = st.text(st.characters(exclude_categories=("C", "Z")), max_size=200) | st.sampled_from(
    ["-snapshot", "--", "a,b=c", "json:{}", "-monitor stdio", "x -S", "$(id)"]
)
cpu_models = st.text("abcXYZ019._,=+-", min_size=1, max_size=30).filter(lambda text: not text.startswith("-"))
BUSES = {  # what a machine has: (kind, bus), each as often as it may be there
    "q35": [("disk", "virtio"), ("disk", "scsi"), ("disk", "usb"), ("disk", "sata"), ("cdrom", "sata"), ("cdrom", "scsi")],
    "pc": [("disk", "virtio"), ("disk", "scsi"), ("disk", "usb"), ("disk", "ide"), ("cdrom", "ide"), ("cdrom", "scsi")],
}
FITS = {"sata": 6, "ide": 4, "fdc": 2, "usb": 8}


@st.composite
def plans(draw: st.DrawFn) -> LaunchPlan:
    """Any plan that the constructor takes."""
    # Descriptors come from anywhere and are never the same twice.
    step = draw(st.sampled_from([1, 2, 7, 500]))
    numbers = iter(range(draw(st.integers(3, 2000)), 65536, step))
    orders = iter(draw(st.permutations(range(1, 25))))
    some = st.booleans()

    def order() -> int | None:
        return next(orders) if draw(some) else None

    machine, family = draw(
        st.sampled_from([("q35", "q35"), ("pc", "pc"), ("pc-q35-7.2", "q35"), ("pc-q35-10.1", "q35"), ("pc-i440fx-2.12", "pc")])
    )
    loadvm = draw(st.none() | st.integers(0, 1 << 31))
    disks: list[DiskPlan] = []
    for kind, bus in draw(st.lists(st.sampled_from([*BUSES[family], ("floppy", "fdc")]), max_size=12)):
        if sum(disk.bus == bus for disk in disks) == FITS.get(bus, 12):
            continue
        readonly = draw(some) and not (kind == "disk" and bus in ("ide", "sata"))
        formats = draw(st.sampled_from([("raw",), ("qcow2",), ("qcow2", "raw"), ("qcow2", "qcow2", "raw"), ("qcow2",) * 3]))
        if kind == "cdrom":
            formats = draw(st.sampled_from([(), ("raw",)]))
        if loadvm is not None and kind != "cdrom" and not readonly:
            formats = ("qcow2", *formats[1:])
        geometry = None
        if (kind, bus) == ("disk", "ide") and draw(some):
            geometry = (draw(st.integers(1, 65535)), draw(st.integers(1, 16)), draw(st.integers(1, 255)), "rechs")
        layers = tuple((next(numbers), format) for format in formats)
        disks.append(DiskPlan(kind=kind, bus=bus, layers=layers, readonly=readonly, geometry=geometry, bootindex=order()))
    loadvm = loadvm if any(not disk.readonly for disk in disks) else None
    ports = iter(range(2000, 3000))
    nics = tuple(
        NicPlan(
            mac=mac,
            model=draw(st.sampled_from(["virtio", "e1000e", "e1000", "rtl8139"])),
            forwards=tuple((word, next(ports), 22) for word in draw(st.lists(st.sampled_from(["tcp", "udp"]), max_size=2)))
            if connected
            else (),
            bootindex=order(),
            connected=connected,
        )
        for mac, connected in draw(st.lists(st.tuples(macs, some), max_size=3))
    )
    kernel, root, serial = draw(some), draw(some), draw(some)
    return plan(
        number=draw(st.integers(0, 0xFFFFFF)),
        machine=machine,
        acpi=draw(some),
        clock=draw(st.sampled_from(["utc", "localtime"])),
        reboot_stops=draw(some),
        accel=draw(st.sampled_from(["kvm", "tcg"])),
        cpus=draw(st.integers(1, 255)),
        cpu_model=draw(st.none() | cpu_models),
        memory=draw(st.integers(1, 1 << 24)),
        serial=serial,
        agent_fd=next(numbers) if draw(some) else None,
        qmp_fd=next(numbers) if draw(some) else None,
        info_fd=next(numbers),
        seccomp_fd=next(numbers),
        kernel_fd=next(numbers) if kernel else None,
        initrd_fd=next(numbers) if kernel else None,
        cmdline=draw(cmdlines) if kernel else "",
        option_rom_fds=tuple(next(numbers) for _ in range(draw(st.integers(0, 8)))),
        firmware=(next(numbers), next(numbers)) if loadvm is None and draw(some) else None,
        boot_menu=draw(some),
        loadvm=loadvm,
        disks=tuple(disks),
        nics=nics,
        display=draw(st.sampled_from(["none", "vnc"])),
        video=draw(st.sampled_from(["none", "std", "virtio", "cirrus"])),
        keymap=draw(st.none() | st.sampled_from(KEYMAPS)),
        tablet=draw(some),
        balloon=draw(some),
        uid=61000 if root else None,
        gid=61000 if root else None,
        kvm_gid=draw(st.none() | st.integers(1, 70000)),
        oom_score_adj=draw(st.none() | st.integers(-1000, 1000)),
        paused=draw(some),
    )


every_plan = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- B01, B02, B03, B04, B41: nothing that a person chose is in the line --------------------------------------------------


def shapes(words: list[str]) -> Iterator[str]:
    """The pieces of a line, MACs and numbers taken out; the two texts that are the caller's, and a keymap, are left out."""
    free = {"-append", "-cpu", "-k"}
    for before, word in zip(["", *words], words, strict=False):
        if before in free:
            continue
        is_json = word.startswith("{")
        pieces = [f"{key}: {value}" for key, value in json.loads(word).items()] if is_json else word.split(",")
        for piece in pieces:
            yield re.sub(r"\d+", "N", re.sub(r"mac=[0-9a-f:]{17}", "mac=M", piece))


# Every piece that may stand in a line, numbers taken out: from the golden plans, whose lines are read by people, and a few more.
MORE = (
    plan(oom_score_adj=-900),
    plan(machine="pc", disks=(DiskPlan(layers=((3, "raw"),), bus="ide", geometry=(1, 1, 1, "rechs")),)),
    plan(disks=(DiskPlan(layers=((3, "raw"),), kind="floppy", bus="fdc", bootindex=1),)),
)
VOCABULARY = {shape for known in (*PLANS.values(), *MORE) for shape in shapes(jail.command(known))}


@pytest.mark.slow
@every_plan
@given(plans())
def test_b01_b02_a_line_is_made_of_numbers_and_fixed_words(any_plan: LaunchPlan) -> None:
    """B01, B02, B41: but for the guest's own command line and the administrator's CPU, every piece is one of a closed set."""
    words = jail.command(any_plan)
    assert set(shapes(words)) <= VOCABULARY
    assert words[words.index("-cpu") + 1] == (any_plan.cpu_model or CPU[any_plan.accel])
    assert "-k" not in words or words[words.index("-k") + 1] in KEYMAPS


@given(plans())
def test_b03_the_command_line_of_the_guest_is_one_word_behind_append(any_plan: LaunchPlan) -> None:
    """B03: whatever it holds, it is the value of -append, as it was given, and changes no other word."""
    words = qemu_argv(any_plan)
    if any_plan.kernel_fd is None:
        assert "-append" not in words
        return
    place = words.index("-append") + 1
    assert words[place] == any_plan.cmdline
    any_plan.cmdline = "something else"
    assert qemu_argv(any_plan) == [*words[:place], "something else", *words[place + 1 :]]


# --- the line read back: exactly what was asked for -----------------------------------------------------------------------

Table = dict[str, dict[str, str]]


class Line:
    """A line as QEMU reads it, by a parser that knows nothing of the one who wrote it."""

    FLAGS = frozenset({"-no-user-config", "-nodefaults", "-S"})
    LISTS = frozenset({"-device", "-netdev", "-chardev", "-object", "-blockdev", "-add-fd", "-global", "-option-rom", "-mon"})

    def __init__(self, words: list[str]) -> None:
        self.flags: set[str] = set()
        self.single: dict[str, str] = {}
        self.lists: dict[str, list[str]] = {name: [] for name in self.LISTS}
        assert words[0] == "/usr/bin/qemu-system-x86_64"
        rest = iter(words[1:])
        for word in rest:
            if word in self.FLAGS:
                self.flags.add(word)
            elif word in self.LISTS:
                self.lists[word].append(next(rest))
            else:
                assert word.startswith("-") and word not in self.single, word
                self.single[word] = next(rest)
        self.devices = self._table("-device", "driver")
        self.netdevs = self._table("-netdev", "type")
        self.chardevs = self._table("-chardev", "backend")
        self.objects = self._table("-object", "type")
        self.nodes = {node["node-name"]: node for node in map(json.loads, self.lists["-blockdev"])}
        assert len(self.nodes) == len(self.lists["-blockdev"])
        self.sets = {f"/dev/fdset/{group}": int(fd) for fd, group in self._add_fds()}
        assert len(self.sets) == len(self.lists["-add-fd"])

    def _table(self, option: str, first: str) -> Table:
        """id → properties; QEMU's rules: the first word may go without its name, a comma parts, `=` parts."""
        table: Table = {}
        for text in self.lists[option]:
            head, *others = text.split(",")
            properties = {first: head}
            for name, _, value in (other.partition("=") for other in others):
                if name == "hostfwd":
                    value = ",".join(filter(None, [properties.get(name), value]))
                else:
                    assert name not in properties, text
                properties[name] = value
            name = properties.pop("id")
            assert name not in table, text
            table[name] = properties
        return table

    def _add_fds(self) -> Iterator[tuple[str, str]]:
        for text in self.lists["-add-fd"]:
            match = re.fullmatch(r"fd=(\d+),set=(\d+)", text)
            assert match
            yield match[1], match[2]

    def take_layers(self, name: str | None) -> tuple[tuple[int, str, bool], ...]:
        """(descriptor, format, writable) of a node and those below it; each node and set may be used once."""
        if name is None:
            return ()
        node = self.nodes.pop(name)
        file = self.nodes.pop(node["file"])
        writable = not node.get("read-only", False)
        assert file["driver"] == "file"
        assert node["driver"] in ("raw", "qcow2")
        assert ("backing" in node) == (node["driver"] == "qcow2")
        assert file.get("read-only", False) == node.get("read-only", False)
        # QEMU may make a node read-only by itself; one that was asked to be writable must not become that silently.
        assert file.get("auto-read-only", False) is False
        assert set(node) <= {"driver", "node-name", "file", "backing", "read-only", "discard"}
        assert set(file) <= {"driver", "node-name", "filename", "read-only", "auto-read-only", "discard"}
        assert node["file"] == f"{name}-file"
        return ((self.sets.pop(file["filename"]), node["driver"], writable), *self.take_layers(node.get("backing")))


def wanted_devices(asked: LaunchPlan, q35: bool) -> Table:
    """What the guest is to see, put down device by device: id → driver and properties."""
    want: Table = {"rngdev0": {"driver": "virtio-rng-pci", "rng": "rng0", "max-bytes": "1024", "period": "1000"}}
    models = {"virtio": "virtio-net-pci", "e1000e": "e1000e", "e1000": "e1000", "rtl8139": "rtl8139"}
    for index, card in enumerate(asked.nics):
        boot = {"romfile": ""} if card.bootindex is None else {"bootindex": str(card.bootindex)}
        cable = {"netdev": f"n{index}"} if card.connected else {}
        want[f"nic{index}"] = {"driver": models[card.model], **cable, "mac": card.mac, **boot}
    if asked.serial:
        want["serial0"] = {"driver": "isa-serial", "chardev": "ser0"}
    if asked.balloon:
        want["balloon0"] = {"driver": "virtio-balloon-pci"}
    if asked.agent_fd is not None:
        want["vser0"] = {"driver": "virtio-serial-pci", "max_ports": "2"}
        port = {"driver": "virtserialport", "bus": "vser0.0", "nr": "1", "chardev": "agent0", "name": "org.qemu.guest_agent.0"}
        want["agentport0"] = port
    cards = {
        "std": {"driver": "VGA", "vgamem_mb": "16"},
        "virtio": {"driver": "virtio-vga", "max_hostmem": str(64 << 20)},
        "cirrus": {"driver": "cirrus-vga", "vgamem_mb": "4"},
    }
    if asked.video != "none":
        want["video0"] = cards[asked.video]
    buses = [disk.bus for disk in asked.disks]
    if asked.tablet or "usb" in buses:
        want["usb0"] = {"driver": "qemu-xhci", "p2": "10", "p3": "10"}
    if asked.tablet:
        want["tablet0"] = {"driver": "usb-tablet", "bus": "usb0.0"}
    if "scsi" in buses:
        want["scsi0"] = {"driver": "virtio-scsi-pci"}
    floppies = [disk for disk in asked.disks if disk.kind == "floppy"]
    if floppies and q35:
        want["fdc0"] = {"driver": "isa-fdc"}
        for letter, disk in zip("AB", floppies, strict=False):
            if disk.bootindex is not None:
                want["fdc0"][f"bootindex{letter}"] = str(disk.bootindex)
    # The first CD-ROM is the second channel's master, as -cdrom was; the next its slave, then the first channel from its end.
    ide_cds = [disk for disk in asked.disks if (disk.kind, disk.bus) == ("cdrom", "ide")]
    channels = [("ide.0", "0"), ("ide.0", "1"), ("ide.1", "0"), ("ide.1", "1")]
    cd_channels = [channels[place] for place in (2, 3, 1, 0)][: len(ide_cds)]
    ide = dict(zip(map(id, ide_cds), cd_channels, strict=True))
    left = [channel for channel in channels if channel not in cd_channels]
    ide |= dict(zip([id(disk) for disk in asked.disks if disk.bus == "ide" and disk.kind == "disk"], left, strict=False))
    cds = 0
    for index, disk in enumerate(asked.disks):
        k = str(buses[:index].count(disk.bus))
        at = {
            "virtio": {},
            "sata": {"bus": f"ide.{k}"},
            "ide": dict(zip(("bus", "unit"), ide.get(id(disk), ("", "")), strict=True)),
            "scsi": {"bus": "scsi0.0", "scsi-id": k},
            "usb": {"bus": "usb0.0"},
            "fdc": {"bus": "fdc0.0" if q35 else "floppy-bus.0", "unit": k},
        }[disk.bus]
        drive = {"drive": f"disk{index}"} if disk.layers else {}
        boot = {"bootindex": str(disk.bootindex)} if disk.bootindex is not None and disk.kind != "floppy" else {}
        if disk.kind == "disk":
            driver = {"virtio": "virtio-blk-pci", "sata": "ide-hd", "ide": "ide-hd", "scsi": "scsi-hd", "usb": "usb-storage"}
            errors = {"werror": "stop", "rerror": "report"}
            shape = dict(zip(("cyls", "heads", "secs", "bios-chs-trans"), map(str, disk.geometry or ()), strict=False))
            want[f"dev{index}"] = {"driver": driver[disk.bus], **errors, **at, **drive, **boot, **shape}
        elif disk.kind == "cdrom":
            want[f"cd{cds}"] = {"driver": "scsi-cd" if disk.bus == "scsi" else "ide-cd", **at, **drive, **boot}
            cds += 1
        else:
            want[f"dev{index}"] = {"driver": "floppy", **at, **drive}
    return want


def wanted_single(asked: LaunchPlan, q35: bool) -> dict[str, str]:
    """Every option that stands there once, word for word."""
    sata = "on" if q35 and any(disk.bus == "sata" for disk in asked.disks) else "off"
    flash = ",pflash0=fwcode,pflash1=fwvars" if asked.firmware else ""
    acpi = "on" if asked.acpi else "off"
    want = {
        "-name": f"guest=vm-{asked.number},debug-threads=off",
        "-vga": "none",
        "-serial": "none",
        "-parallel": "none",
        "-monitor": "none",
        "-machine": f"{asked.machine},acpi={acpi},usb=off,vmport=off,smbus=off,sata={sata},dump-guest-core=off{flash}",
        "-accel": "kvm" if asked.accel == "kvm" else "tcg,tb-size=256",
        "-cpu": asked.cpu_model or CPU[asked.accel],
        "-smp": f"cpus={asked.cpus},maxcpus={asked.cpus},sockets=1,cores={asked.cpus},threads=1",
        "-m": f"size={asked.memory}M",
        "-rtc": f"base={asked.clock},clock=host,driftfix=slew",
        "-msg": "timestamp=on",
        "-action": f"reboot={'shutdown' if asked.reboot_stops else 'reset'},shutdown=poweroff,panic=shutdown",
        "-sandbox": "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-boot": f"strict=on,menu={'on' if asked.boot_menu else 'off'}",
        "-vnc" if asked.display == "vnc" else "-display": "none",
    }
    if asked.keymap:
        want["-k"] = asked.keymap
    if asked.loadvm is not None:
        want["-loadvm"] = f"s{asked.loadvm}"
    if asked.kernel_fd is not None:
        want |= {"-kernel": f"/proc/self/fd/{asked.kernel_fd}", "-append": asked.cmdline}
    if asked.initrd_fd is not None:
        want["-initrd"] = f"/proc/self/fd/{asked.initrd_fd}"
    return want


@every_plan
@given(plans())
def test_b32_a_line_reads_back_as_the_plan_and_nothing_else(any_plan: LaunchPlan) -> None:
    """B09, B10, B15, B16, B30-B32: devices, sockets, networks and options are those of the plan, each with its properties."""
    line = Line(qemu_argv(any_plan))
    q35 = "q35" in any_plan.machine
    assert line.flags == {"-no-user-config", "-nodefaults"} | ({"-S"} if any_plan.paused else set())
    assert line.single == wanted_single(any_plan, q35)
    assert line.devices == wanted_devices(any_plan, q35)
    assert line.objects == {"rng0": {"type": "rng-builtin"}}
    sockets = {"qmp0": any_plan.qmp_fd, "agent0": any_plan.agent_fd}
    listening = {"backend": "socket", "server": "on", "wait": "off"}
    assert line.chardevs == {
        "ser0": {"backend": "stdio", "signal": "off"},
        **{name: {**listening, "fd": str(fd)} for name, fd in sockets.items() if fd is not None},
    }
    assert line.lists["-mon"] == ["chardev=qmp0,mode=control,pretty=off"] * (any_plan.qmp_fd is not None)
    assert line.lists["-option-rom"] == [f"/proc/self/fd/{fd}" for fd in any_plan.option_rom_fds]
    orders = [disk.bootindex for disk in any_plan.disks if disk.kind == "floppy"]
    on_pc = [] if q35 else [f"isa-fdc.bootindex{letter}={n}" for letter, n in zip("AB", orders, strict=False) if n is not None]
    assert line.lists["-global"] == on_pc
    assert line.netdevs == {
        f"n{index}": {"type": "user", "restrict": "on", "ipv6": "off"}
        | ({"hostfwd": ",".join(f"{word}:127.0.0.1:{port}-:{to}" for word, port, to in card.forwards)} if card.forwards else {})
        for index, card in enumerate(any_plan.nics)
        if card.connected
    }
    for index, disk in enumerate(any_plan.disks):
        layers = line.take_layers(f"disk{index}" if disk.layers else None)
        writable = not disk.readonly and disk.kind != "cdrom"
        assert layers == tuple((fd, format, writable and depth == 0) for depth, (fd, format) in enumerate(disk.layers))
    if any_plan.firmware is not None:
        code, variables = any_plan.firmware
        assert line.take_layers("fwcode") == ((code, "raw", False),)
        assert line.take_layers("fwvars") == ((variables, "raw", True),)
    assert line.nodes == line.sets == {}, "nothing is opened that no device has"


def test_the_reader_finds_what_is_too_much() -> None:
    """The parser above, tried on lines with something slipped in."""
    words = qemu_argv(PLANS["disk"])
    for extra in (["-device", "VGA"], ["-drive", "x"], ["-device", "virtio-blk-pci,id=dev0"], ["bare"], ["-m", "size=1M"]):
        with pytest.raises((AssertionError, KeyError, StopIteration)):
            line = Line([*words, *extra])
            assert line.single == wanted_single(PLANS["disk"], True)
            assert line.devices == wanted_devices(PLANS["disk"], True)


def test_where_ide_drives_are() -> None:
    """As -hda, -hdb, -cdrom and -hdd were: disks in their order, the CD-ROM at the second channel's master."""

    def places(*kinds: str) -> list[str]:
        disks = tuple(DiskPlan(kind=kind, bus="ide", layers=((20 + k, "raw"),)) for k, kind in enumerate(kinds))
        devices = [word for word in qemu_argv(plan(machine="pc", disks=disks)) if word.startswith("ide-")]
        return [f"{word[4]}{match[1]}{match[2]}" for word in devices if (match := re.search(r"bus=ide.(\d),unit=(\d)", word))]

    assert places("disk", "disk", "disk", "disk") == ["h00", "h01", "h10", "h11"]
    assert places("cdrom", "disk", "disk") == ["c10", "h00", "h01"]
    assert places("disk", "cdrom", "disk", "disk") == ["h00", "c10", "h01", "h11"]
    assert places("cdrom", "cdrom", "disk", "disk") == ["c10", "c11", "h00", "h01"]
    assert places("cdrom", "cdrom", "cdrom", "cdrom") == ["c10", "c11", "c01", "c00"]


@given(plans())
def test_r5_the_families_and_what_is_in_them(any_plan: LaunchPlan) -> None:
    """B32, CVE-2015-3456: no floppy controller, AHCI or USB where nobody asked for one."""
    assert any_plan.family == ("q35" if "q35" in any_plan.machine else "pc")
    words = " ".join(word for word in qemu_argv(any_plan) if word != any_plan.cmdline)
    buses = {disk.bus for disk in any_plan.disks}
    assert "fdc" in buses or "fdc" not in words
    assert ("sata=on" in words) == ("sata" in buses)
    assert ("xhci" in words) == any_plan.usb == (any_plan.tablet or "usb" in buses)


# What was removed or renamed between QEMU 7.2 and 11 must not come back into the line.
@given(plans())
def test_no_option_that_later_qemus_lack(any_plan: LaunchPlan) -> None:
    gone = {"-no-acpi", "-no-hpet", "-singlestep", "-async-teardown", "-chroot", "-runas", "-portrait", "-rotate", "-audio-help"}
    assert not gone & set(Line(qemu_argv(any_plan)).single)


# --- the jail -------------------------------------------------------------------------------------------------------------


@given(plans())
def test_b39_every_layer_is_in_every_line(any_plan: LaunchPlan) -> None:
    """B39: there is no plan without sandbox, filters, namespaces and no_new_privs."""
    words = jail.command(any_plan)
    for word in ("--no-new-privs", "--unshare-all", "--unshare-user", "--disable-userns", "--clearenv", "--add-seccomp-fd"):
        assert word in words
    assert words[words.index("--cap-drop") + 1] == "ALL"
    assert words[words.index("-sandbox") + 1] == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert ("--bounding-set=-all" in words) == (any_plan.uid is not None)
    assert "--die-with-parent" not in words
    assert all(word.startswith("/") for word in words if word.endswith(("setpriv", "prlimit", "bwrap", "choom", "systemd-run")))


def test_b45_groups() -> None:
    """B45, R8: the kvm group comes along only with KVM, and root's group never."""
    assert "--groups=106" in jail.command(plan(accel="kvm", kvm_gid=106))
    assert "--clear-groups" in jail.command(plan(accel="tcg", kvm_gid=106))
    assert "--clear-groups" in jail.command(plan(accel="kvm", kvm_gid=0))
    assert "/dev/kvm" not in jail.command(plan(accel="tcg", kvm_gid=106))


def test_f01_f04_the_scope_has_limits() -> None:
    """F01, F02, F04: memory, tasks and weight are the plan's, and stand before the program."""
    words = jail.command(PLANS["scoped"])
    assert words[0] == "/usr/bin/systemd-run"
    scope = words[: words.index("--")]
    assert f"MemoryMax={1024 + 128 + 16 + 16 + 256}M" in scope
    assert "TasksMax=98" in scope
    assert "CPUWeight=50" in scope
    assert words[words.index("--") + 1 :][:4] == ["/usr/bin/choom", "-n", "500", "--"]


def test_f02_screens_and_qcow2_files_are_in_the_ceiling() -> None:
    """F02: what QEMU holds for a graphics card, its viewers and each qcow2 file."""
    bare = jail.memory_ceiling(plan())
    assert jail.memory_ceiling(plan(video="std")) == bare + 16
    assert jail.memory_ceiling(plan(video="virtio")) == bare + 72
    assert jail.memory_ceiling(plan(video="cirrus", display="vnc")) == bare + 4 + 96
    layers = DiskPlan(layers=((3, "qcow2"), (4, "qcow2"), (5, "raw")))
    assert jail.memory_ceiling(plan(disks=(layers,))) == bare + 16


def test_descriptors_are_enough_for_every_queue() -> None:
    """F04: two for each CPU and disk, beside QEMU's own."""
    disks = tuple(DiskPlan(layers=((20 + k, "raw"),)) for k in range(16))
    assert "--nofile=264" in jail.command(plan())
    assert f"--nofile={256 + 160 + 40 * 255}" in jail.command(plan(cpus=255, disks=disks))


def test_r10_only_the_probes_guests_die_with_their_parent() -> None:
    usual = jail.command(plan())
    brief = jail.command(plan(), brief=True)
    assert [word for word in brief if word not in usual] == ["--cpu=10", "--die-with-parent"]
    assert [word for word in brief if word not in ("--cpu=10", "--die-with-parent")] == usual


# --- what a plan refuses --------------------------------------------------------------------------------------------------

DISK = DiskPlan(layers=((3, "raw"),))


def disks(count: int, **values: Any) -> tuple[DiskPlan, ...]:
    return tuple(DiskPlan(layers=((20 + index, "raw"),), **values) for index in range(count))


BAD: list[dict[str, Any]] = [
    {"number": -1},
    {"number": 1 << 24},
    {"number": True},
    {"number": "42,process=sshd"},
    {"machine": "microvm"},
    {"machine": "q35,accel=kvm"},
    {"machine": ""},
    {"machine": "pc-q35-"},
    {"machine": "pc-q35-7"},
    {"machine": "pc-q35-7."},
    {"machine": "pc-q35-07.2"},
    {"machine": "pc-q35-7.2.1"},
    {"machine": "pc-q35-7.2,accel=kvm"},
    {"machine": "pc-q35-100.0"},
    {"machine": "pc-q35-\u0667.2"},
    {"machine": "pc-7.2"},
    {"machine": "7.2"},
    {"accel": "kvm:tcg"},
    {"acpi": "off"},
    {"acpi": 1},
    {"clock": "2006-06-17"},
    {"reboot_stops": None},
    {"cpu_model": ""},
    {"cpu_model": "-S"},
    {"cpu_model": "host host"},
    {"cpu_model": "host\n"},
    {"cpu_model": "h\u00f6st"},
    {"cpu_model": "a" * 1025},
    {"cpus": 0},
    {"cpus": 256},
    {"cpus": "1"},
    {"memory": 0},
    {"memory": 1.5},
    {"firmware": (3, 3)},
    {"firmware": (3, 2)},
    {"boot_menu": "on"},
    {"qmp_fd": 2},
    {"qmp_fd": 12},
    {"serial": 0},
    {"agent_fd": 8},
    {"agent_fd": 65536},
    {"uid": 0, "gid": 0},
    {"uid": 61234, "gid": 0},
    {"uid": 61234, "gid": None},
    {"initrd_fd": 5},
    {"cmdline": "console=ttyS0"},
    {"kernel_fd": 5, "cmdline": "a\nb"},
    {"kernel_fd": 5, "cmdline": "a\0b"},
    {"kernel_fd": 5, "cmdline": "\x1b[2J"},
    {"kernel_fd": 5, "cmdline": "\udcff"},
    {"kernel_fd": 5, "cmdline": "é" * 1024},
    {"option_rom_fds": (3, 3)},
    {"option_rom_fds": ("/etc/passwd",)},
    {"option_rom_fds": tuple(range(20, 29))},
    {"loadvm": "s1"},
    {"loadvm": -1, "disks": (DiskPlan(layers=((3, "qcow2"),)),)},
    {"loadvm": 1},
    {"loadvm": 1, "disks": (DISK,)},
    {"loadvm": 1, "disks": (DiskPlan(layers=((3, "qcow2"),), readonly=True),)},
    {"loadvm": 1, "disks": (DiskPlan(layers=((4, "qcow2"),)), DISK)},
    {"loadvm": 1, "disks": (DiskPlan(layers=((4, "qcow2"),)),), "firmware": (5, 6)},
    {"display": "gtk"},
    {"display": "vnc=:1"},
    {"video": "qxl"},
    {"keymap": "/etc/passwd"},
    {"keymap": "common"},
    {"tablet": "yes"},
    {"balloon": None},
    {"paused": 1},
    {"disks": disks(17)},
    {"disks": disks(9, bus="usb")},
    {"disks": disks(7, bus="sata")},
    {"disks": disks(3, kind="floppy", bus="fdc")},
    {"disks": disks(5, bus="ide"), "machine": "pc"},
    {"disks": disks(1, bus="ide")},
    {"disks": disks(1, bus="sata"), "machine": "pc-i440fx-7.2"},
    {"disks": disks(2, bootindex=1)},
    {"disks": (DISK, DISK)},
    {"disks": disks(1, bootindex=1), "nics": (nic(1, bootindex=1),)},
    {"nics": tuple(nic(last) for last in range(9))},
    {"nics": (nic(1, forwards=(("tcp", 2022, 22),)), nic(2, forwards=(("tcp", 2022, 80),)))},
    {"scope": "x"},
    {"scope": "-x.scope"},
    {"scope": "a b.scope"},
    {"scope": "../x.scope"},
    {"slice": "x.scope"},
    {"oom_score_adj": 1001},
    {"file_size_max": -1},
]


@pytest.mark.parametrize("bad", BAD, ids=[f"{number}-{'-'.join(bad)}" for number, bad in enumerate(BAD)])
def test_a_plan_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=r"."):
        plan(**bad)


def test_the_same_port_may_be_forwarded_for_both_protocols() -> None:
    assert plan(nics=(nic(1, forwards=(("tcp", 5353, 53), ("udp", 5353, 53))),))


RAW, QCOW2 = (3, "raw"), (4, "qcow2")


@pytest.mark.parametrize(
    "bad",
    [
        {"layers": ((3, "vmdk"),)},
        {"layers": ((3, ""),)},
        {"layers": ()},
        {"layers": (), "kind": "floppy", "bus": "fdc"},
        {"layers": (RAW, (5, "raw"))},
        {"layers": (QCOW2, RAW, (5, "raw"))},
        {"layers": (QCOW2, (5, "vdi"))},
        {"layers": (QCOW2, (5, "qcow2"), (6, "qcow2"), RAW)},
        {"layers": ((0, "raw"),)},
        {"layers": (("3,set=9", "raw"),)},
        {"layers": (RAW,), "kind": "lun"},
        {"layers": (RAW,), "bus": "nvme"},
        {"layers": (RAW,), "bus": "fdc"},
        {"layers": (RAW,), "kind": "cdrom"},
        {"layers": (RAW,), "kind": "cdrom", "bus": "usb"},
        {"layers": (RAW,), "kind": "floppy"},
        {"layers": (QCOW2,), "kind": "cdrom", "bus": "ide"},
        {"layers": (QCOW2, RAW), "kind": "cdrom", "bus": "ide"},
        {"layers": (RAW,), "readonly": True, "bus": "ide"},
        {"layers": (RAW,), "readonly": True, "bus": "sata"},
        {"layers": (RAW,), "readonly": "yes"},
        {"layers": (RAW,), "bootindex": 0},
        {"layers": (RAW,), "bootindex": "1"},
        {"layers": (RAW,), "bootindex": 256},
        {"layers": (RAW,), "geometry": (1, 1, 1, "auto")},
        {"layers": (RAW,), "bus": "sata", "geometry": (1, 1, 1, "auto")},
        {"layers": (RAW,), "kind": "cdrom", "bus": "ide", "geometry": (1, 1, 1, "auto")},
        {"layers": (RAW,), "bus": "ide", "geometry": (0, 1, 1, "auto")},
        {"layers": (RAW,), "bus": "ide", "geometry": (65536, 1, 1, "auto")},
        {"layers": (RAW,), "bus": "ide", "geometry": (1, 17, 1, "auto")},
        {"layers": (RAW,), "bus": "ide", "geometry": (1, 1, 256, "auto")},
        {"layers": (RAW,), "bus": "ide", "geometry": (1, 1, 1, "lba,x=y")},
    ],
    ids=str,
)
def test_a_disk_refuses(bad: dict[str, Any]) -> None:
    """B13, B14: two formats, by descriptor."""
    with pytest.raises(BadValue, match=r"."):
        DiskPlan(**bad)


def test_a_cdrom_is_read_only_by_nature() -> None:
    assert DiskPlan(layers=((3, "raw"),), kind="cdrom", bus="ide").readonly is True


@pytest.mark.parametrize(
    "mac", ["", "06:00:00:00:00", "06:00:00:00:00:2A", "07:00:00:00:00:01", "06:00:00:00:00:2a,x=y", "06:0:00:00:00:2aa"]
)
def test_a_nic_refuses(mac: str) -> None:
    """E33: a MAC is made by us from the VM's number."""
    with pytest.raises(BadValue, match=r"."):
        NicPlan(mac=mac)


@pytest.mark.parametrize(
    "bad",
    [
        {"model": "ne2k_pci"},
        {"model": "virtio,romfile=/etc/passwd"},
        {"bootindex": 0},
        {"forwards": (("sctp", 2022, 22),)},
        {"forwards": (("tcp", 1023, 22),)},
        {"forwards": (("tcp", 65536, 22),)},
        {"forwards": (("tcp", 2022, 0),)},
        {"forwards": (("tcp", "2022", 22),)},
        {"forwards": (("tcp", 2022, "22-cmd:x"),)},
        {"forwards": tuple(("tcp", 2000 + k, 22) for k in range(65))},
    ],
    ids=str,
)
def test_a_nic_refuses_other_values(bad: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=r"."):
        nic(1, **bad)


# --- the filter, run by an interpreter of its own instructions ------------------------------------------------------------

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def judge(number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """What the kernel would answer: classic BPF over a struct seccomp_data, as documented in seccomp(2)."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", seccomp.program()))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x45:
                at += if_true if accumulator & value else if_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"an instruction nobody wrote: {operation:#x}")


def test_b39_the_filter_call_by_call() -> None:
    """B39, R9: exactly the listed calls are refused, of all numbers there are."""
    refused = {number for number in range(1024) if judge(number) == EPERM}
    assert refused == set(seccomp.DENIED.values())
    assert len(seccomp.DENIED) == len(refused)
    assert judge(435) == ENOSYS
    assert {judge(number) for number in range(1024) if number != 435} == {ALLOW, EPERM}


@pytest.mark.parametrize("request_", seccomp.DENIED_IOCTLS.values(), ids=hex)
def test_e28_ioctls_are_refused_whatever_stands_above_their_32_bits(request_: int) -> None:
    """E28: the kernel ignores the upper half of a request, so it must not help."""
    assert judge(16, (5, request_)) == EPERM
    assert judge(16, (5, request_ | 0xDEAD << 32)) == EPERM
    assert judge(16, (request_, 0x5401)) == ALLOW


def test_namespaces_by_clone_are_refused_and_threads_are_not() -> None:
    """B39: a thread's flags as the C library sets them, and each namespace flag."""
    assert judge(56, (0x003D0F00,)) == ALLOW
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert judge(56, (0x003D0F00 | flag,)) == EPERM


def test_other_architectures_and_x32() -> None:
    """R9: i386 calls (int 0x80) kill, x32 numbers are refused: both have other numbers for the same calls."""
    assert judge(101, arch=0x40000003) == KILL
    assert judge(0x40000000) == judge(0x40000000 | 101) == judge(0xFFFFFFFF) == EPERM
