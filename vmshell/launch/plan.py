"""What is needed to start one QEMU: numbers, descriptors and closed choices; no path and no name that a person chose.

Two free texts: the guest kernel's command line, which becomes one argument of its own, and the CPU, which only the
administrator's catalogue names. Every value is checked here or in `devices.py`, so that `argv.py` and `jail.py` can write it
down without another look (threats B01-B04: a comma in a value is an option in QEMU).
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

from ..names import KEYMAPS
from .devices import DiskPlan, NicPlan, choice, descriptor, flag, integer, optional, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["DiskPlan", "LaunchPlan", "NicPlan"]

MACHINES = {"q35": "pc-q35-", "pc": "pc-i440fx-"}  # family → what its pinned versions begin with
ACCELS = ("kvm", "tcg")
CLOCKS = ("utc", "localtime")
DISPLAYS = ("none", "vnc")
VIDEOS = ("none", "std", "virtio", "cirrus")
# All of them at once, with every controller, fill the 30 free slots of the machine's PCI bus.
DISKS_MAX = 16
NICS_MAX = 8
BUS_MOST = {"ide": 4, "sata": 6, "usb": 8, "fdc": 2}
ONLY_ON = {"ide": "pc", "sata": "q35"}
OPTION_ROMS_MAX = 8
CMDLINE_MAX = 2047  # what Linux on x86 takes (COMMAND_LINE_SIZE less its NUL)
CPU_MAX = 1024
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
CPU_CHARS = LETTERS | frozenset("._,=+-")
UNIT_CHARS = LETTERS | frozenset("-_.")
ID_MAX = (1 << 32) - 2


class LaunchPlan:
    """All of one start. Descriptors are the numbers that the started process sees; *uid* None means: stay who we are.

    The serial port is on QEMU's standard input and output (0 and 1), its own words go to 2. Without *qmp_fd* it has no monitor.
    """

    def __init__(
        self,
        *,
        number: int,
        accel: str,
        cpus: int,
        memory: int,
        seccomp_fd: int,
        file_size_max: int,
        qmp_fd: int | None = None,
        info_fd: int | None = None,
        block_fd: int | None = None,
        machine: str = "q35",
        acpi: bool = True,
        clock: str = "utc",
        reboot_stops: bool = False,
        cpu_model: str | None = None,
        firmware: tuple[int, int] | None = None,
        boot_menu: bool = False,
        kernel_fd: int | None = None,
        initrd_fd: int | None = None,
        cmdline: str = "",
        option_rom_fds: tuple[int, ...] = (),
        loadvm: int | None = None,
        disks: tuple[DiskPlan, ...] = (),
        nics: tuple[NicPlan, ...] = (),
        spare_nics: int = 0,
        display: str = "none",
        video: str = "none",
        keymap: str | None = None,
        tablet: bool = False,
        serial: bool = True,
        agent_fd: int | None = None,
        balloon: bool = True,
        uid: int | None = None,
        gid: int | None = None,
        kvm_gid: int | None = None,
        scope: str | None = None,
        slice: str = "vmshell.slice",
        cpu_weight: int = 100,
        oom_score_adj: int | None = None,
        paused: bool = True,
    ) -> None:
        self.number = integer(number, 0, 0xFFFFFF, "number")
        self.machine = _machine(machine)
        self.accel = choice(accel, ACCELS, "accel")
        self.cpus = integer(cpus, 1, 255, "cpus")
        self.cpu_model = None if cpu_model is None else _cpu(cpu_model)
        self.memory = integer(memory, 1, 1 << 24, "memory")
        self.acpi = flag(acpi, "acpi")
        self.clock = choice(clock, CLOCKS, "clock")
        self.reboot_stops = flag(reboot_stops, "reboot_stops")
        self.firmware = None if firmware is None else _firmware(*firmware)
        self.boot_menu = flag(boot_menu, "boot_menu")
        self.kernel_fd = _fd(kernel_fd, "kernel")
        self.initrd_fd = _fd(initrd_fd, "initrd")
        if kernel_fd is None and (initrd_fd is not None or cmdline):
            raise ValueError("kernel_fd must be there for an initrd or a command line")
        self.cmdline = _cmdline(cmdline)
        self.option_rom_fds = tuple(descriptor(fd, "option_rom") for fd in option_rom_fds)
        if len(self.option_rom_fds) > OPTION_ROMS_MAX:
            raise ValueError(f"option_rom_fds must be at most {OPTION_ROMS_MAX}")
        self.disks = tuple(disks)
        self.nics = tuple(nics)
        self.spare_nics = integer(spare_nics, 0, NICS_MAX - min(NICS_MAX, len(self.nics)), "spare_nics")
        self.loadvm = optional(loadvm, 0, (1 << 32) - 1, "loadvm")
        self.display = choice(display, DISPLAYS, "display")
        self.video = choice(video, VIDEOS, "video")
        self.keymap = None if keymap is None else choice(keymap, KEYMAPS, "keymap")
        self.tablet = flag(tablet, "tablet")
        self.serial = flag(serial, "serial")
        self.balloon = flag(balloon, "balloon")
        self.agent_fd = _fd(agent_fd, "agent")
        self.qmp_fd = _fd(qmp_fd, "qmp")
        self.info_fd = _fd(info_fd, "info")
        self.block_fd = _fd(block_fd, "block")
        self.seccomp_fd = descriptor(seccomp_fd, "seccomp")
        if (uid is None) != (gid is None):
            raise ValueError("uid and gid must be there together")
        # Never 0: a plan that forgot the uid must not become a QEMU of root's.
        self.uid = optional(uid, 1, ID_MAX, "uid")
        self.gid = optional(gid, 1, ID_MAX, "gid")
        self.kvm_gid = optional(kvm_gid, 0, ID_MAX, "kvm_gid")
        self.file_size_max = integer(file_size_max, 0, 1 << 62, "file_size_max")
        self.scope = None if scope is None else _unit(scope, ".scope")
        self.slice = _unit(slice, ".slice")
        self.cpu_weight = integer(cpu_weight, 1, 10000, "cpu_weight")
        self.oom_score_adj = optional(oom_score_adj, -1000, 1000, "oom_score_adj")
        self.paused = flag(paused, "paused")
        self._check_devices()
        self._check_loadvm()
        # QEMU's -add-fd closes the number it took: the second user of it would get another file, or none.
        _unique(self.fds(), "descriptor")

    @property
    def family(self) -> str:
        """`q35` or `pc`, whichever version is pinned."""
        return next(family for family, prefix in MACHINES.items() if self.machine == family or self.machine.startswith(prefix))

    @property
    def usb(self) -> bool:
        """Whether there is a USB controller: not for nothing, it is much code."""
        return self.tablet or any(disk.bus == "usb" for disk in self.disks)

    def fds(self) -> tuple[int, ...]:
        """Every descriptor beside the standard three that must be open, and inheritable, when the command starts."""
        named = (
            *(self.kernel_fd, self.initrd_fd, self.agent_fd, self.qmp_fd),
            *(self.info_fd, self.block_fd, self.seccomp_fd),
        )
        layers = (fd for disk in self.disks for fd, _ in disk.layers)
        cables = (fd for nic in self.nics for fd in nic.fds())
        return (*(fd for fd in named if fd is not None), *layers, *(self.firmware or ()), *self.option_rom_fds, *cables)

    def _check_devices(self) -> None:
        if len(self.disks) > DISKS_MAX or len(self.nics) > NICS_MAX:
            raise ValueError(f"disks and nics must be at most {DISKS_MAX} and {NICS_MAX}")
        buses = [disk.bus for disk in self.disks]
        for bus in buses:
            if ONLY_ON.get(bus, self.family) != self.family:
                raise ValueError(f"bus must be one that machine {self.family} has, not {bus}")
            if buses.count(bus) > BUS_MOST.get(bus, DISKS_MAX):
                raise ValueError(f"bus {bus} takes {BUS_MOST[bus]} disks")
        orders = [*(disk.bootindex for disk in self.disks), *(nic.bootindex for nic in self.nics)]
        _unique([order for order in orders if order is not None], "bootindex")
        _unique([forward[:2] for nic in self.nics for forward in nic.forwards], "host port")

    def _check_loadvm(self) -> None:
        written = [disk.layers[0][1] for disk in self.disks if not disk.readonly]
        # What QEMU asks for: every writable drive can hold a state, and one does. The firmware's variables are raw.
        if self.loadvm is not None and (not written or "raw" in written or self.firmware is not None):
            raise ValueError("loadvm needs a writable disk, all of them qcow2, and no firmware of its own")


def _fd(value: int | None, what: str) -> int | None:
    return None if value is None else descriptor(value, what)


def _unique(values: Collection[object], what: str) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"two things share a {what}")


def _machine(value: str) -> str:
    text(value, "machine")
    for family, prefix in MACHINES.items():
        if value == family:
            return family
        major, _, minor = value.removeprefix(prefix).partition(".")
        # Built anew from two numbers and compared: nothing else can be in it.
        if 0 < len(major) <= 2 and 0 < len(minor) <= 2 and (major + minor).isascii() and (major + minor).isdigit():
            pinned = f"{prefix}{int(major)}.{int(minor)}"
            if value == pinned:
                return pinned
    raise ValueError("machine must be q35, pc, or one of their versions, like pc-q35-7.2")


def _cpu(model: str) -> str:
    text(model, "cpu_model")
    if not model or len(model) > CPU_MAX or not CPU_CHARS.issuperset(model) or model.startswith("-"):
        raise ValueError("cpu_model must be letters, digits and any of . _ , = + -")
    return model


def _firmware(code_fd: int, vars_fd: int) -> tuple[int, int]:
    return descriptor(code_fd, "firmware"), descriptor(vars_fd, "variables")


def _cmdline(line: str) -> str:
    text(line, "cmdline")
    if not line.isprintable() or len(line.encode("utf-8", "surrogateescape")) > CMDLINE_MAX:
        raise ValueError(f"cmdline must have at most {CMDLINE_MAX} bytes and no control characters")
    return line


def _unit(name: str, suffix: str) -> str:
    stem = name.removesuffix(suffix)
    if stem == name or not stem or stem.startswith(("-", ".")) or not UNIT_CHARS.issuperset(stem) or len(name) > 100:
        raise ValueError(f"a unit's name is letters, digits, '-', '_' and '.' before {suffix}")
    return name
