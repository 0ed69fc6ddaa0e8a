"""One disk and one network interface of a plan, and the checks of values that all plans share.

Every value is checked here and held as a number or as our own copy of a word from a closed list, so that `argv.py` can write
it down without another look (threats B01-B04: a comma in a value is an option in QEMU).
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

FORMATS = ("raw", "qcow2")
KINDS = ("disk", "cdrom", "floppy")
BUSES = {"disk": ("virtio", "sata", "ide", "scsi", "usb"), "cdrom": ("sata", "ide", "scsi"), "floppy": ("fdc",)}
LAYERS_MAX = 3  # one run's overlay, over a disk, over a catalogue image
TRANSLATIONS = ("auto", "none", "lba", "large", "rechs")
NIC_MODELS = ("virtio", "e1000e", "e1000", "rtl8139")
PROTOCOLS = ("tcp", "udp")
FORWARDS_MAX = 64
FD_MIN = 3  # QEMU's -add-fd refuses the standard descriptors
FD_MAX = (1 << 16) - 1  # descriptor N becomes QEMU's set N; the sets that the relay adds begin behind them
BOOTINDEX_MAX = 255


class DiskPlan:
    """One drive and what is in it: descriptors with their formats, the top one first, each over the next.

    Only the top one is ever written, and it is not if *readonly*, as CD-ROMs always are. A CD-ROM drive may be empty.
    """

    def __init__(
        self,
        *,
        layers: tuple[tuple[int, str], ...],
        kind: str = "disk",
        bus: str = "virtio",
        readonly: bool = False,
        geometry: tuple[int, int, int, str] | None = None,
        bootindex: int | None = None,
    ) -> None:
        self.kind = choice(kind, KINDS, "kind")
        self.bus = choice(bus, BUSES[self.kind], f"the bus of a {self.kind}")
        self.layers = tuple((descriptor(fd, "layer"), choice(format, FORMATS, "format")) for fd, format in layers)
        fewest, most = (0, 1) if self.kind == "cdrom" else (1, LAYERS_MAX)
        if not fewest <= len(self.layers) <= most:
            raise ValueError(f"layers of a {self.kind} must be {fewest} to {most}")
        if any(format != "qcow2" for _, format in self.layers[:-1]):
            raise ValueError("layers below another must be under a qcow2 one")
        if self.kind == "cdrom" and any(format != "raw" for _, format in self.layers):
            raise ValueError("layers of a CD-ROM must be raw")
        self.readonly = flag(readonly, "readonly") or self.kind == "cdrom"
        if self.readonly and self.kind == "disk" and self.bus in ("ide", "sata"):
            raise ValueError("readonly must be false for a hard disk on ide or sata")
        self.geometry = None if geometry is None else _geometry(*geometry)
        if geometry is not None and (self.kind, self.bus) != ("disk", "ide"):
            raise ValueError("geometry must be a disk's on ide")
        self.bootindex = optional(bootindex, 1, BOOTINDEX_MAX, "bootindex")


class NicPlan:
    """One network interface: its MAC, six octets in lower-case hex as `names.mac_address` makes them.

    Its cable is a tap (*tap_fd*), a stream on whose other end passt is (*stream_fd*), or else QEMU's own small network with
    *forwards*: (protocol, port on QEMU's own loopback, port of the guest); the jail's network is its own and has nothing else.
    Not *connected*, the card is there and its cable leads nowhere.
    """

    def __init__(
        self,
        *,
        mac: str,
        model: str = "virtio",
        forwards: tuple[tuple[str, int, int], ...] = (),
        bootindex: int | None = None,
        connected: bool = True,
        tap_fd: int | None = None,
        stream_fd: int | None = None,
    ) -> None:
        octets = text(mac, "mac").split(":")
        if len(octets) != 6 or any(len(octet) != 2 or octet.strip("0123456789abcdef") for octet in octets):
            raise ValueError("mac must be six octets of two lower-case hex digits")
        if int(octets[0], 16) & 1:
            raise ValueError("mac must be no multicast address")
        self.mac = mac
        self.model = choice(model, NIC_MODELS, "model")
        # From 1024: without a capability nobody binds to less, not even in a network namespace of his own.
        self.forwards = tuple(
            (choice(word, PROTOCOLS, "protocol"), integer(port, 1024, 65535, "host port"), integer(to, 1, 65535, "guest port"))
            for word, port, to in forwards
        )
        if len(self.forwards) > FORWARDS_MAX:
            raise ValueError(f"forwards must be at most {FORWARDS_MAX}")
        self.connected = flag(connected, "connected")
        if self.forwards and not self.connected:
            raise ValueError("connected must be true where there are forwards")
        self.tap_fd = None if tap_fd is None else descriptor(tap_fd, "tap")
        self.stream_fd = None if stream_fd is None else descriptor(stream_fd, "stream")
        if len(self.fds()) > int(self.connected) or (self.fds() and self.forwards):
            raise ValueError("tap_fd and stream_fd must be one at most, without forwards: those are of QEMU's own network")
        self.bootindex = optional(bootindex, 1, BOOTINDEX_MAX, "bootindex")

    def fds(self) -> tuple[int, ...]:
        return tuple(fd for fd in (self.tap_fd, self.stream_fd) if fd is not None)


def integer(value: int, low: int, high: int, what: str) -> int:
    # `type(...) is int`: a bool, or a str that compares, would be written into the line as it is.
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} must be an integer from {low} to {high}")
    return value


def optional(value: int | None, low: int, high: int, what: str) -> int | None:
    return None if value is None else integer(value, low, high, what)


def descriptor(value: int, what: str) -> int:
    return integer(value, FD_MIN, FD_MAX, f"{what}_fd")


def choice(value: str, allowed: tuple[str, ...], what: str) -> str:
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(allowed)}")
    return allowed[allowed.index(value)]


def text(value: str, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text")
    return value


def flag(value: bool, what: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{what} must be True or False")
    return value


def _geometry(cyls: int, heads: int, secs: int, trans: str) -> tuple[int, int, int, str]:
    return (
        integer(cyls, 1, 65535, "cyls"),
        integer(heads, 1, 16, "heads"),
        integer(secs, 1, 255, "secs"),
        choice(trans, TRANSLATIONS, "trans"),
    )
