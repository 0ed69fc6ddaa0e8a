"""The one table of a definition's keys: it feeds the reader and writer, `set`, `help keys`, completion and the man page.

A row: the key as it stands in `vm.toml`, the attribute it becomes, its kind, its default, what it means.
Used by: broker, shell, admin. Pure data.
"""

from __future__ import annotations

from ..errors import safe
from ..hardware import KEYMAPS
from ..names import MIB, nearest
from ..refusals import UnknownKey
from .shapes import Definition, Disk, Forward, Geometry, Nic
from .values import Bool, Catalogued, Choice, Device, Int, Kind, ListOf, Mac, Machine, Name, Port, Ref, Size, Table, Tag, Text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

SECTIONS = ("machine", "cpu", "memory", "boot", "display", "console")
OBJECTS = ("", "shelf", "library")

GEOMETRY = Table(
    {
        "cyls": Int(1, 65535),
        "heads": Int(1, 16),
        "secs": Int(1, 255),
        "trans": Choice("auto", "none", "lba", "large", "rechs"),
    },
    ("trans",),
    Geometry,
)


class Key:
    """One row. *always*: written even at its default, because everybody looks for it."""

    __slots__ = ("always", "attribute", "default", "help", "kind", "name")

    def __init__(self, name: str, attribute: str, kind: Kind, default: object, help: str, *, always: bool = False) -> None:
        self.name = name
        self.attribute = attribute
        self.kind = kind
        self.default = default
        self.help = help
        self.always = always


def _rows(model: type, rows: tuple[tuple[str, str, Kind, str], ...], always: tuple[str, ...] = ()) -> dict[str, Key]:
    defaults = {field.name: field.default for field in model.__dataclass_fields__.values()}  # type: ignore[attr-defined]
    return {
        name: Key(name, attribute, kind, defaults[attribute], help, always=name in always)
        for name, attribute, kind, help in rows
    }


KEYS: dict[str, Key] = _rows(
    Definition,
    (
        ("description", "description", Text(1024), "a line about the VM"),
        ("image", "image", Name("image"), "the catalogue image it was made from"),
        ("autostart", "autostart", Bool(), "boot it when the host starts, if the policy grants it"),
        ("agent", "agent", Bool(), "a port for the QEMU guest agent"),
        ("machine.type", "machine", Machine(), "the machine; pinned to today's version when set"),
        ("machine.firmware", "firmware", Catalogued("firmware"), "bios or uefi"),
        ("machine.acpi", "acpi", Bool(), "ACPI; without it `shutdown` cannot ask (q35's BIOS still makes tables of its own)"),
        ("machine.clock", "clock", Choice("utc", "localtime"), "what the clock on the board shows"),
        ("machine.on_reboot", "on_reboot", Choice("restart", "stop"), "what happens when the guest reboots"),
        ("cpu.count", "cpus", Int(1, 255), "processors"),
        ("cpu.model", "cpu_model", Catalogued("CPU model"), "processor model; host is what this host offers"),
        ("memory.size", "memory", Size(16, 1 << 24), "memory; on a running VM the balloon follows"),
        ("boot.order", "boot_order", ListOf(Device(), 32), "devices to boot from, first to last"),
        ("boot.menu", "boot_menu", Bool(), "the firmware's boot menu"),
        ("boot.kernel", "kernel", Ref(*OBJECTS, "image"), "kernel to boot directly; an image brings initrd and command line"),
        ("boot.initrd", "initrd", Ref(*OBJECTS, "image"), "initial RAM disk for it"),
        ("boot.cmdline", "cmdline", Text(2047), "its command line; other users of the host can read it"),
        ("boot.option_rom", "option_roms", ListOf(Ref("", "shelf"), 8), "option ROMs for the BIOS to run"),
        ("boot.restore", "restore", Tag(), "snapshot to go on from, at each boot"),
        ("display.type", "display", Choice("none", "vnc"), "a screen to look at with `display NAME`"),
        ("display.video", "video", Choice("none", "std", "virtio", "cirrus"), "graphics card; std with a screen"),
        ("display.keymap", "keymap", Choice(*KEYMAPS), "the keyboard that the screen's viewer has"),
        ("display.tablet", "tablet", Bool(), "with a screen: a pointer that follows the viewer's"),
        ("console.serial", "serial", Bool(), "the serial port, which is the console"),
        ("console.log", "log", Bool(), "keep what the guest prints in its log"),
    ),
    always=("machine.type", "cpu.count", "memory.size"),
)

DISK_KEYS: dict[str, Key] = _rows(
    Disk,
    (
        ("path", "path", Ref(*OBJECTS), "the object in it; an empty one is an empty CD drive"),
        ("type", "type", Choice("disk", "cdrom", "floppy"), "what the guest sees"),
        ("bus", "bus", Choice("virtio", "sata", "ide", "scsi", "usb", "fdc"), "where it sits: sata on q35, ide on pc"),
        ("format", "format", Choice("raw", "qcow2"), "what the object is; it must be what it was made as"),
        ("readonly", "readonly", Bool(), "the guest cannot write"),
        ("snapshot", "snapshot", Bool(), "what the guest writes is gone when it stops"),
        ("geometry", "geometry", GEOMETRY, "what the BIOS reports of a disk on ide"),
        ("size", "size", Size(MIB, 16 << 40, unit=1), "made with this size if it does not exist"),
        ("base", "base", Ref("image"), "made as an overlay over this image's disk if it does not exist"),
    ),
)

NET_KEYS: dict[str, Key] = _rows(
    Nic,
    (
        ("network", "network", Catalogued("network"), "which network it is on"),
        ("model", "model", Choice("virtio", "e1000e", "e1000", "rtl8139"), "what the guest sees"),
        ("mac", "mac", Mac(), "its address; without one it is made from the VM's number"),
        ("forward", "forward", ListOf(Port(Forward), 16), "ports that lead to the guest"),
        ("link", "link", Choice("up", "down"), "the cable; changed at once on a running VM"),
    ),
)

ALIASES = {
    "cpus": "cpu.count",
    "cpu": "cpu.count",
    "memory": "memory.size",
    "machine": "machine.type",
    "firmware": "machine.firmware",
    "acpi": "machine.acpi",
    "clock": "machine.clock",
    "on_reboot": "machine.on_reboot",
    "order": "boot.order",
    "kernel": "boot.kernel",
    "initrd": "boot.initrd",
    "append": "boot.cmdline",
    "cmdline": "boot.cmdline",
    "option_rom": "boot.option_rom",
    "restore": "boot.restore",
    "display": "display.type",
    "keymap": "display.keymap",
}


def unknown_key(name: str, keys: Iterable[str]) -> UnknownKey:
    near = nearest(name, keys)
    return UnknownKey(key=safe(name, 60), advice=f"did you mean {near}?" if near else "`help keys` lists them")
