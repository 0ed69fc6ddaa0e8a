"""One disk and one network interface of a plan.

Every value is checked where it is built and held as a number or a word from a closed list, so that `argv.py` can write it down
without another look (threats B01-B04: a comma in a value is an option in QEMU).
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

from ..fields import Message, bad, boolean, choice, field, integer, listing, optional, row, text

FORMATS = ("raw", "qcow2")
BUSES = {"disk": ("virtio", "sata", "ide", "scsi", "usb"), "cdrom": ("sata", "ide", "scsi"), "floppy": ("fdc",)}
LAYERS_MAX = 3  # one run's overlay, over a disk, over a catalogue image
TRANSLATIONS = ("auto", "none", "lba", "large", "rechs")
NIC_MODELS = ("virtio", "e1000e", "e1000", "rtl8139")
FORWARDS_MAX = 64
# Descriptor N becomes QEMU's set N, which refuses 0 to 2; sets that the relay adds begin behind them.
FD = integer(3, (1 << 16) - 1)
BOOTINDEX = optional(integer(1, 255))


def mac(value: object, name: str) -> str:
    octets = text(17)(value, name).split(":")
    if len(octets) != 6 or any(len(octet) != 2 or octet.strip("0123456789abcdef") for octet in octets) or int(octets[0], 16) & 1:
        raise bad(name, value, "six octets of two lower-case hex digits, and no multicast address")
    return ":".join(octets)


class DiskPlan(Message):
    """One drive and what is in it: descriptors with their formats, the top one first, each over the next.

    Only the top one is ever written, and it is not if *readonly*, as CD-ROMs always are. A CD-ROM drive may be empty.
    """

    verb = "disk"

    layers: tuple[tuple[int, str], ...] = field(listing(row(FD, choice(*FORMATS)), LAYERS_MAX))
    kind: str = field(choice(*BUSES), default="disk")
    bus: str = field(text(16), default="virtio")
    readonly: bool = field(boolean, default=False)
    geometry: tuple[int, int, int, str] | None = field(
        optional(row(integer(1, 65535), integer(1, 16), integer(1, 255), choice(*TRANSLATIONS))), default=None
    )
    bootindex: int | None = field(BOOTINDEX, default=None)

    def agree(self) -> None:
        """Raise BadValue where two fields contradict each other."""
        choice(*BUSES[self.kind])(self.bus, "bus")
        formats = [format for _, format in self.layers]
        if len(formats) not in ((0, 1) if self.kind == "cdrom" else (1, 2, 3)):
            raise bad("layers", formats, f"as many as a {self.kind} has")
        if set(formats[:-1]) - {"qcow2"} or (self.kind == "cdrom" and "qcow2" in formats):
            raise bad("layers", formats, "qcow2 above another one, raw in a CD-ROM drive")
        if self.readonly and self.kind == "disk" and self.bus in ("ide", "sata"):
            raise bad("readonly", True, "false for a hard disk on ide or sata: QEMU has none")
        if self.geometry is not None and (self.kind, self.bus) != ("disk", "ide"):
            raise bad("geometry", self.geometry, "a disk's on ide")
        self.readonly = self.readonly or self.kind == "cdrom"


class NicPlan(Message):
    """One network interface: its MAC, six octets in lower-case hex as `names.mac_address` makes them.

    It is attached to a tap (*tap_fd*), to a stream on whose other end passt is (*stream_fd*), or else to QEMU's own small network
    with *forwards*: (protocol, port on QEMU's own loopback, port of the guest); the jail's network is its own, with nothing else.
    Not *connected*, it is there and attached to nothing.
    """

    verb = "nic"

    mac: str = field(mac)
    model: str = field(choice(*NIC_MODELS), default="virtio")
    # From 1024: without a capability nobody binds to less, not even in a network namespace of his own.
    forwards: tuple[tuple[str, int, int], ...] = field(
        listing(row(choice("tcp", "udp"), integer(1024, 65535), integer(1, 65535)), FORWARDS_MAX), default=()
    )
    bootindex: int | None = field(BOOTINDEX, default=None)
    connected: bool = field(boolean, default=True)
    tap_fd: int | None = field(optional(FD), default=None)
    stream_fd: int | None = field(optional(FD), default=None)

    def agree(self) -> None:
        """Raise BadValue unless it is attached to one thing at most."""
        ways = [self.tap_fd is not None, self.stream_fd is not None, bool(self.forwards)]
        if sum(ways) > int(self.connected):
            raise bad("connected", self.connected, "to one thing: a tap, a stream, QEMU's own network")
