"""What is needed to start one QEMU: numbers, descriptors and closed choices; no path and no name that a person chose.

The one free text is the guest kernel's command line, which becomes one argument of its own. Every value is checked here, so
that `argv.py` and `jail.py` can write it down without another look (threats B01-B04: a comma in a value is an option in QEMU).
Used by: broker, probe, admin. Touches nothing.
"""

from __future__ import annotations

MACHINES = ("q35", "pc")
ACCELS = ("kvm", "tcg")
FORMATS = ("raw", "qcow2")
CMDLINE_MAX = 2047  # what Linux on x86 takes (COMMAND_LINE_SIZE less its NUL)
FD_MIN = 3  # QEMU's -add-fd refuses the standard descriptors
FD_MAX = 1 << 16
UNIT_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class DiskPlan:
    """One disk by descriptor. With a base (read-only, never written) the disk is a qcow2 overlay over it."""

    __slots__ = ("base_fd", "base_format", "fd", "format", "readonly")

    def __init__(
        self, *, fd: int, format: str, base_fd: int | None = None, base_format: str | None = None, readonly: bool = False
    ) -> None:
        self.fd = _fd(fd, "disk")
        self.format = _choice(format, FORMATS, "format")
        if (base_fd is None) != (base_format is None):
            raise ValueError("base_fd and base_format go together")
        if base_fd is not None and format != "qcow2":
            raise ValueError("only a qcow2 disk has a base")
        self.base_fd = None if base_fd is None else _fd(base_fd, "base")
        self.base_format = None if base_format is None else _choice(base_format, FORMATS, "base_format")
        self.readonly = bool(readonly)


class NicPlan:
    """One network interface: its MAC, six octets in lower-case hex as `names.mac_address` makes them."""

    __slots__ = ("mac",)

    def __init__(self, *, mac: str) -> None:
        octets = mac.split(":")
        if len(octets) != 6 or any(len(octet) != 2 or octet.strip("0123456789abcdef") for octet in octets):
            raise ValueError("a MAC is six octets of two lower-case hex digits")
        if int(octets[0], 16) & 1:
            raise ValueError("a multicast address is no MAC of an interface")
        self.mac = mac


class LaunchPlan:
    """All of one start. Descriptors are the numbers that the started process sees; *uid* None means: stay who we are."""

    __slots__ = (
        "accel",
        "block_fd",
        "cmdline",
        "console_fd",
        "cpu_weight",
        "cpus",
        "disks",
        "file_size_max",
        "gid",
        "info_fd",
        "initrd_fd",
        "kernel_fd",
        "kvm_gid",
        "machine",
        "memory",
        "nics",
        "number",
        "oom_score_adj",
        "paused",
        "qmp_fd",
        "scope",
        "seccomp_fd",
        "slice",
        "uid",
    )

    def __init__(
        self,
        *,
        number: int,
        accel: str,
        cpus: int,
        memory: int,
        console_fd: int,
        qmp_fd: int,
        seccomp_fd: int,
        file_size_max: int,
        info_fd: int | None = None,
        block_fd: int | None = None,
        machine: str = "q35",
        kernel_fd: int | None = None,
        initrd_fd: int | None = None,
        cmdline: str = "",
        disks: tuple[DiskPlan, ...] = (),
        nics: tuple[NicPlan, ...] = (),
        uid: int | None = None,
        gid: int | None = None,
        kvm_gid: int | None = None,
        scope: str | None = None,
        slice: str = "vmshell.slice",
        cpu_weight: int = 100,
        oom_score_adj: int | None = None,
        paused: bool = True,
    ) -> None:
        self.number = _integer(number, 0, 0xFFFFFF, "number")
        self.machine = _choice(machine, MACHINES, "machine")
        self.accel = _choice(accel, ACCELS, "accel")
        self.cpus = _integer(cpus, 1, 255, "cpus")
        self.memory = _integer(memory, 1, 1 << 24, "memory")
        self.kernel_fd = None if kernel_fd is None else _fd(kernel_fd, "kernel")
        self.initrd_fd = None if initrd_fd is None else _fd(initrd_fd, "initrd")
        if kernel_fd is None and (initrd_fd is not None or cmdline):
            raise ValueError("an initrd and a command line need a kernel")
        self.cmdline = _cmdline(cmdline)
        self.disks = tuple(disks)
        self.nics = tuple(nics)
        self.console_fd = _fd(console_fd, "console")
        self.qmp_fd = _fd(qmp_fd, "qmp")
        self.info_fd = None if info_fd is None else _fd(info_fd, "info")
        self.block_fd = None if block_fd is None else _fd(block_fd, "block")
        self.seccomp_fd = _fd(seccomp_fd, "seccomp")
        if (uid is None) != (gid is None):
            raise ValueError("uid and gid go together")
        # Never 0: a plan that forgot the uid must not become a QEMU of root's.
        self.uid = None if uid is None else _integer(uid, 1, (1 << 32) - 2, "uid")
        self.gid = None if gid is None else _integer(gid, 1, (1 << 32) - 2, "gid")
        self.kvm_gid = None if kvm_gid is None else _integer(kvm_gid, 0, (1 << 32) - 2, "kvm_gid")
        self.file_size_max = _integer(file_size_max, 0, 1 << 62, "file_size_max")
        self.scope = None if scope is None else _unit(scope, ".scope")
        self.slice = _unit(slice, ".slice")
        self.cpu_weight = _integer(cpu_weight, 1, 10000, "cpu_weight")
        self.oom_score_adj = None if oom_score_adj is None else _integer(oom_score_adj, -1000, 1000, "oom_score_adj")
        self.paused = bool(paused)
        fds = self.fds()
        if len(set(fds)) != len(fds):
            # QEMU's -add-fd closes the number it took: the second user of it would get another file, or none.
            raise ValueError("two things share a descriptor")

    def fds(self) -> tuple[int, ...]:
        """Every descriptor that must be open, and inheritable, when the command starts."""
        named = (self.kernel_fd, self.initrd_fd, self.console_fd, self.qmp_fd, self.info_fd, self.block_fd, self.seccomp_fd)
        disks = (fd for disk in self.disks for fd in (disk.fd, disk.base_fd))
        return tuple(fd for fd in (*named, *disks) if fd is not None)


def _integer(value: int, low: int, high: int, what: str) -> int:
    # `type(...) is int`: a bool, or a str that compares, would be written into the line as it is.
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be an integer from {low} to {high}")
    return value


def _fd(value: int, what: str) -> int:
    return _integer(value, FD_MIN, FD_MAX, f"{what}_fd")


def _choice(value: str, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}")
    return allowed[allowed.index(value)]


def _cmdline(text: str) -> str:
    if not text.isprintable() or len(text.encode("utf-8", "surrogateescape")) > CMDLINE_MAX:
        raise ValueError(f"a kernel command line has at most {CMDLINE_MAX} bytes and no control characters")
    return text


def _unit(name: str, suffix: str) -> str:
    stem = name.removesuffix(suffix)
    if stem == name or not stem or stem.startswith(("-", ".")) or not UNIT_CHARS.issuperset(stem) or len(name) > 100:
        raise ValueError(f"a unit's name is letters, digits, '-', '_' and '.' before {suffix}")
    return name
