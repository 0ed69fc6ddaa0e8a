"""What is needed to start one QEMU: numbers, descriptors and closed choices; no path and no name that a person chose.

Two free texts: the guest kernel's command line, which becomes one argument of its own, and the CPU, which only the
administrator's catalogue names. Every value is checked here or in `devices.py`, so that `argv.py` and `jail.py` can write it
down without another look (threats B01-B04: a comma in a value is an option in QEMU).
A launch request holds a plan as JSON, less what the launcher says itself (`LAUNCHERS_OWN`).
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ..fields import Message, bad, boolean, choice, field, integer, listing, nested, optional, row, text
from ..hardware import KEYMAPS
from ..numbering import tap_name
from .devices import FD, DiskPlan, NicPlan

MACHINES = {"q35": "pc-q35-", "pc": "pc-i440fx-"}  # family → what its pinned versions begin with
VIDEOS = ("none", "std", "virtio", "cirrus")
# All of them at once, with every controller, fill the 30 free slots of the machine's PCI bus.
DISKS_MAX = 16
NICS_MAX = 8
BUS_MOST = {"ide": 4, "sata": 6, "usb": 8, "fdc": 2}
ONLY_ON = {"ide": "pc", "sata": "q35"}
CMDLINE_MAX = 2047  # what Linux on x86 takes (COMMAND_LINE_SIZE less its NUL)
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
CPU_CHARS = LETTERS | frozenset("._,=+-")
UNIT_CHARS = LETTERS | frozenset("-_.")
ID = optional(integer(1, (1 << 32) - 2))  # never 0: a plan that forgot the uid must not become a QEMU of root's
# Which VM it is, as whom it runs, where it is counted, which filter it gets.
LAUNCHERS_OWN = frozenset(
    ("number", "uid", "gid", "kvm_gid", "seccomp_fd", "scope", "slice", "oom_score_adj", "info_fd", "paused")
)
# Of which kind a descriptor has to be; TAP is followed by the tap's name.
READ, WRITTEN, LISTENER, STREAM, PIPE, OUTPUT, TAP = "read", "written", "listener", "stream", "pipe", "output", "tap"


def machine(value: object, name: str) -> str:
    said = text(32)(value, name)
    for family, prefix in MACHINES.items():
        major, _, minor = said.removeprefix(prefix).partition(".")
        # Built anew from two numbers and compared: nothing else can be in it.
        numbers = 0 < len(major) <= 2 and 0 < len(minor) <= 2 and (major + minor).isascii() and (major + minor).isdigit()
        if said == family or (numbers and said == f"{prefix}{int(major)}.{int(minor)}"):
            return said
    raise bad(name, value, "q35, pc, or one of their versions, like pc-q35-7.2")


def cpu_model(value: object, name: str) -> str:
    model = text(1024)(value, name)
    if not model or not CPU_CHARS.issuperset(model) or model.startswith("-"):
        raise bad(name, value, "letters, digits and any of . _ , = + -")
    return model


def cmdline(value: object, name: str) -> str:
    line = text(CMDLINE_MAX)(value, name)
    if not line.isprintable() or len(line.encode("utf-8", "surrogateescape")) > CMDLINE_MAX:
        raise bad(name, value, f"at most {CMDLINE_MAX} bytes without control characters")
    return line


def unit(value: object, name: str) -> str:
    stem, dot, kind = text(100)(value, name).rpartition(".")
    if f"{dot}{kind}" != f".{name}" or not stem or stem.startswith(("-", ".")) or not UNIT_CHARS.issuperset(stem):
        raise bad(name, value, f"a unit's name of letters, digits, '-', '_' and '.' before .{name}")
    return f"{stem}.{kind}"


class LaunchPlan(Message):
    """All of one start. Descriptors are the numbers that the started process sees; *uid* None means: stay who we are.

    The serial port is on QEMU's standard input and output (0 and 1), its own words go to 2. Without *qmp_fd* it has no monitor.
    """

    verb = "plan"

    number: int = field(integer(0, 0xFFFFFF))
    accel: str = field(choice("kvm", "tcg"))
    cpus: int = field(integer(1, 255))
    memory: int = field(integer(1, 1 << 24))
    seccomp_fd: int = field(FD)
    file_size_max: int = field(integer(0, 1 << 53))
    qmp_fd: int | None = field(optional(FD), default=None)
    info_fd: int | None = field(optional(FD), default=None)
    block_fd: int | None = field(optional(FD), default=None)
    machine: str = field(machine, default="q35")
    acpi: bool = field(boolean, default=True)
    clock: str = field(choice("utc", "localtime"), default="utc")
    reboot_stops: bool = field(boolean, default=False)
    cpu_model: str | None = field(optional(cpu_model), default=None)
    firmware: tuple[int, int] | None = field(optional(row(FD, FD)), default=None)  # its code, and this VM's variables
    boot_menu: bool = field(boolean, default=False)
    kernel_fd: int | None = field(optional(FD), default=None)
    initrd_fd: int | None = field(optional(FD), default=None)
    cmdline: str = field(cmdline, default="")
    option_rom_fds: tuple[int, ...] = field(listing(FD, 8), default=())
    loadvm: int | None = field(optional(integer(0, (1 << 32) - 1)), default=None)
    disks: tuple[DiskPlan, ...] = field(listing(nested(DiskPlan), DISKS_MAX), default=())
    nics: tuple[NicPlan, ...] = field(listing(nested(NicPlan), NICS_MAX), default=())
    spare_nics: int = field(integer(0, NICS_MAX), default=0)
    display: str = field(choice("none", "vnc"), default="none")
    video: str = field(choice(*VIDEOS), default="none")
    keymap: str | None = field(optional(choice(*KEYMAPS)), default=None)
    tablet: bool = field(boolean, default=False)
    serial: bool = field(boolean, default=True)
    agent_fd: int | None = field(optional(FD), default=None)
    balloon: bool = field(boolean, default=True)
    uid: int | None = field(ID, default=None)
    gid: int | None = field(ID, default=None)
    kvm_gid: int | None = field(optional(integer(0, (1 << 32) - 2)), default=None)
    scope: str | None = field(optional(unit), default=None)
    slice: str = field(unit, default="vmshell.slice")
    cpu_weight: int = field(integer(1, 10000), default=100)
    oom_score_adj: int | None = field(optional(integer(-1000, 1000)), default=None)
    paused: bool = field(boolean, default=True)

    @property
    def family(self) -> str:
        """`q35` or `pc`, whichever version is pinned."""
        return next(family for family, prefix in MACHINES.items() if self.machine == family or self.machine.startswith(prefix))

    @property
    def usb(self) -> bool:
        """Whether there is a USB controller: not for nothing, it is much code."""
        return self.tablet or any(disk.bus == "usb" for disk in self.disks)

    def lent(self) -> Iterator[tuple[str, int, str]]:
        """Every descriptor that a launch request brings: the field it stands in, its number, and of which kind it has to be.

        A tap's kind is `tap` and its name, which follows from the VM's number.
        """
        return ((name, fd, kind) for name, fd, kind in self._places() if fd is not None)

    def _places(self) -> Iterator[tuple[str, int | None, str]]:
        yield "kernel_fd", self.kernel_fd, READ
        yield "initrd_fd", self.initrd_fd, READ
        yield "agent_fd", self.agent_fd, LISTENER
        yield "qmp_fd", self.qmp_fd, LISTENER
        yield "block_fd", self.block_fd, PIPE
        yield from (("option_rom_fds", fd, READ) for fd in self.option_rom_fds)
        yield from (("firmware", fd, kind) for fd, kind in zip(self.firmware or (), (READ, WRITTEN), strict=False))
        for index, disk in enumerate(self.disks):
            for depth, (fd, _) in enumerate(disk.layers):
                yield f"disks[{index}].layers[{depth}]", fd, WRITTEN if not depth and not disk.readonly else READ
        for index, nic in enumerate(self.nics):
            yield f"nics[{index}].tap_fd", nic.tap_fd, f"{TAP} {tap_name(self.number, index)}"
            yield f"nics[{index}].stream_fd", nic.stream_fd, STREAM

    def all_fds(self) -> tuple[int, ...]:
        """Every descriptor beside the standard three that must be open, and inheritable, when the command starts."""
        own = (fd for fd in (self.info_fd, self.seccomp_fd) if fd is not None)
        return (*own, *(fd for _, fd, _ in self.lent()))

    def agree(self) -> None:
        """Raise BadValue where two fields contradict each other."""
        if self.kernel_fd is None and (self.initrd_fd is not None or self.cmdline):
            raise bad("kernel_fd", None, "needed for an initrd and a command line")
        if (self.uid is None) != (self.gid is None):
            raise bad("gid", self.gid, "given together with uid")
        if self.spare_nics > NICS_MAX - len(self.nics):
            raise bad("spare_nics", self.spare_nics, f"at most {NICS_MAX} with the interfaces there are")
        buses = [disk.bus for disk in self.disks]
        for bus in buses:
            if ONLY_ON.get(bus, self.family) != self.family or buses.count(bus) > BUS_MOST.get(bus, DISKS_MAX):
                raise bad("bus", bus, f"one that {self.family} has, with at most {BUS_MOST.get(bus, DISKS_MAX)} disks")
        orders = [*(disk.bootindex for disk in self.disks), *(nic.bootindex for nic in self.nics)]
        _unique([order for order in orders if order is not None], "bootindex")
        _unique([forward[:2] for nic in self.nics for forward in nic.forwards], "forwards")
        # QEMU's -add-fd closes the number it took: the second user of it would get another file, or none.
        _unique(self.all_fds(), "descriptors")
        written = [disk.layers[0][1] for disk in self.disks if not disk.readonly]
        # What QEMU asks for: every writable drive can hold a state, and one does. The firmware's variables are raw.
        if self.loadvm is not None and (not written or "raw" in written or self.firmware is not None):
            raise bad("loadvm", self.loadvm, "for writable disks that are all qcow2, and no firmware of its own")


def _unique(values: Collection[object], name: str) -> None:
    if len(set(values)) != len(values):
        raise bad(name, values, "all different")
