"""The typed values that a definition is made of.

Used by: broker, shell, admin. Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """What the BIOS is to report of a disk: cylinders, heads, sectors, and how it translates them."""

    cyls: int
    heads: int
    secs: int
    trans: str = "auto"


@dataclass(frozen=True)
class Forward:
    """A port of the host that leads to one of the guest."""

    proto: str
    host: int
    guest: int

    def __str__(self) -> str:
        return f"{self.proto}:{self.host}:{self.guest}"


@dataclass(frozen=True)
class Disk:
    """A disk, CD drive or floppy drive. *path* is an object; *size* (bytes) and *base* say what to make where there is none."""

    path: str = ""
    type: str = "disk"
    bus: str = ""
    format: str = ""
    readonly: bool = False
    snapshot: bool = False
    geometry: Geometry | None = None
    size: int = 0
    base: str = ""

    @property
    def writable(self) -> bool:
        """Does a guest change the object itself?"""
        return self.type != "cdrom" and not self.readonly and not self.snapshot


@dataclass(frozen=True)
class Nic:
    network: str = "users"
    model: str = "virtio"
    mac: str = ""
    forward: tuple[Forward, ...] = ()
    link: str = "up"


@dataclass(frozen=True)
class Definition:
    """Every key of `vm.toml` that is not a device's; memory in MiB. The names here are those of `keys.KEYS`' attributes."""

    name: str
    description: str = ""
    image: str = ""
    autostart: bool = False
    agent: bool = False
    machine: str = "q35"
    firmware: str = "bios"
    acpi: bool = True
    clock: str = "utc"
    on_reboot: str = "restart"
    cpus: int = 1
    cpu_model: str = "host"
    memory: int = 512
    boot_order: tuple[str, ...] = ()
    boot_menu: bool = False
    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    option_roms: tuple[str, ...] = ()
    restore: str = ""
    display: str = "none"
    video: str = ""
    keymap: str = ""
    tablet: bool = True
    serial: bool = True
    log: bool = True
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()

    @property
    def family(self) -> str:
        """`q35` or `pc`, whatever version the machine is pinned to."""
        return "q35" if "q35" in self.machine else "pc"

    def bus_of(self, disk: Disk) -> str:
        if disk.bus:
            return disk.bus
        ide = "ide" if self.family == "pc" else "sata"
        return {"disk": "virtio", "cdrom": ide, "floppy": "fdc"}[disk.type]

    @property
    def video_shown(self) -> str:
        return self.video or ("std" if self.display == "vnc" else "none")

    def devices(self) -> dict[str, Disk | Nic]:
        """Every device by its name: each type is counted for itself, in the order of the file."""
        found: dict[str, Disk | Nic] = {}
        counts = dict.fromkeys(("disk", "cdrom", "floppy", "net"), 0)
        every: list[Disk | Nic] = [*self.disks, *self.nics]
        for device in every:
            kind = device.type if isinstance(device, Disk) else "net"
            found[f"{kind}{counts[kind]}"] = device
            counts[kind] += 1
        return found

    def objects(self) -> list[str]:
        """Every object this VM needs to boot, as its references stand here."""
        refs = [disk.path for disk in self.disks] + [self.kernel, self.initrd, *self.option_roms]
        return [ref for ref in dict.fromkeys(refs) if ref]
