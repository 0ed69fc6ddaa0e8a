"""Disks of a QEMU command line: -hda to -hdd, -cdrom, -fda, -fdb, -drive, and the -device that a drive is tied to.

Runs in: the shell, for the verb `kvm` alone. Pure functions.
"""

from __future__ import annotations

from functools import partial

from ...model.keys import DISK_KEYS
from ...names import DIGITS
from .options import DRIVE
from .words import Draft, Given, Missing, Refused, checked, entry_text, identifier, number, object_ref, on_off

# -hda and its like: the bus, the place on it, and what sits there
PLACES = {
    "-hda": ("ide", 0, "disk"),
    "-hdb": ("ide", 1, "disk"),
    "-cdrom": ("ide", 2, "cdrom"),
    "-hdc": ("ide", 2, "disk"),
    "-hdd": ("ide", 3, "disk"),
    "-fda": ("floppy", 0, "disk"),
    "-fdb": ("floppy", 1, "disk"),
}
INTERFACES = ("ide", "virtio", "scsi", "floppy", "none")
# What -device makes of an if=none drive: the bus, and whether it is a disk, a CD drive or a floppy drive
DEVICES = {
    "virtio-blk-pci": ("virtio", "disk"),
    "virtio-blk": ("virtio", "disk"),
    "ide-hd": ("ide", "disk"),
    "ide-cd": ("ide", "cdrom"),
    "scsi-hd": ("scsi", "disk"),
    "scsi-cd": ("scsi", "cdrom"),
    "usb-storage": ("usb", "disk"),
    "floppy": ("floppy", "floppy"),
}
MAY_BE_EMPTY = ("ide-cd", "scsi-cd")
ROOM = {"ide": 4, "sata": 6, "virtio": 16, "scsi": 16, "usb": 4, "floppy": 2}
CD_BUSES = ("ide", "scsi")
TRANSLATIONS = ("auto", "none", "lba", "large", "rechs")


class Drive:
    """A disk that is still only known from its options."""

    __slots__ = ("bootindex", "bus", "device", "format", "given", "ident", "media", "name", "path", "readonly", "scratch", "seat")

    def __init__(self, given: Given, bus: str, seat: int | None = None, media: str = "disk", path: str = "") -> None:
        self.given = given
        self.bus = bus
        self.seat = seat
        self.media = media
        self.path = path
        self.format = ""
        self.ident = ""
        self.readonly = False
        self.scratch = False
        self.bootindex: int | None = None
        self.device: Given | None = None
        self.name = ""  # disk0, once all are known

    @property
    def type(self) -> str:
        return "floppy" if self.bus == "floppy" else self.media

    @property
    def writable(self) -> bool:
        return self.type != "cdrom" and not self.readonly and not self.scratch


class Disks:
    """All disks of a command line."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.drives: list[Drive] = []
        self.tied: list[tuple[Given, str, dict[str, str]]] = []
        self.snapshot: Given | None = None
        self.geometry: Given | None = None

    # --- one option at a time -----------------------------------------------------------------------------------------

    def file(self, given: Given) -> None:
        """-hda FILE and its like."""
        bus, index, media = PLACES[given.option.name]
        self.drives.append(Drive(given, bus, index, media, object_ref(given.value, self.draft.resolve)))

    def drive(self, given: Given) -> None:
        known = ("file", "if", "media", "format", "index", "readonly", "snapshot", "id")
        found = dict(given.properties("file", known))
        drive = Drive(given, found.get("if", "ide"), media=found.get("media", "disk"))
        if drive.bus not in INTERFACES:
            raise Refused(f"if={drive.bus} is not one of {', '.join(INTERFACES)}", DRIVE)
        if drive.media not in ("disk", "cdrom"):
            raise Refused(f"media={drive.media} is neither disk nor cdrom", "media=disk")
        if "index" in found:
            drive.seat = number("index", found["index"], 15)
        if "format" in found:
            drive.format = str(checked(DISK_KEYS["format"], found["format"], "format"))
        if "id" in found:
            drive.ident = identifier(found["id"])
        drive.readonly = on_off("readonly", found.get("readonly", "off"))
        drive.scratch = on_off("snapshot", found.get("snapshot", "off"))
        if "file" in found:
            drive.path = object_ref(found["file"], self.draft.resolve)
        elif drive.media != "cdrom" and drive.bus != "none":
            raise Refused("it names no file", DRIVE)
        self.drives.append(drive)

    def device(self, given: Given, driver: str) -> None:
        found = dict(given.properties("driver", ("driver", "drive", "bootindex")))
        self.tied.append((given, driver, found))

    # --- all together -------------------------------------------------------------------------------------------------

    def finish(self) -> list[dict[str, object]]:
        """The [[disk]] tables, in order."""
        for given, driver, found in self.tied:
            self.draft.attempt(given, partial(self._tie, given, driver, found))
        for drive in self.drives:
            if drive.bus == "none":
                beside = f"-device virtio-blk-pci,drive={drive.ident or 'ID'} beside it"
                self.draft.attempt(drive.given, Missing("no device uses it", beside).throw)
        self.drives = [drive for drive in self.drives if drive.bus != "none"]
        self._seat()
        if self.snapshot is not None:
            self._snapshot(self.snapshot)
        counts = {"disk": 0, "cdrom": 0, "floppy": 0}
        entries = []
        for drive in self.drives:
            drive.name = f"{drive.type}{counts[drive.type]}"
            counts[drive.type] += 1
            entry: dict[str, object] = {}
            self.draft.attempt(drive.given, partial(self._entry, drive, entry))
            entries.append(entry)
        if self.geometry is not None:
            self.draft.attempt(self.geometry, partial(self._geometry, self.geometry, entries))
        for drive, entry in zip(self.drives, entries, strict=True):
            if not drive.given.row.refused:
                drive.given.row.became = entry_text(drive.name, entry)
            if drive.device is not None and drive.device is not drive.given:
                drive.device.row.became = f"{drive.name}: bus={entry.get('bus', 'fdc')}"
        return entries

    def _tie(self, given: Given, driver: str, found: dict[str, str]) -> None:
        bus, kind = DEVICES[driver]
        ident = found.get("drive", "")
        if not ident and driver in MAY_BE_EMPTY:
            drive = Drive(given, bus, media="cdrom")
            self.drives.append(drive)
        else:
            drive = self._named(driver, ident)
            if kind != "cdrom" and drive.media == "cdrom":
                raise Refused(f"a CD is no {driver}", f"-device ide-cd,drive={ident}")
            drive.bus = bus
            drive.media = "cdrom" if kind == "cdrom" else "disk"
            self.drives.remove(drive)
            self.drives.append(drive)  # QEMU makes what -device says after what -drive says
        drive.device = given
        if "bootindex" in found:
            drive.bootindex = number("bootindex", found["bootindex"], 9999)

    def _named(self, driver: str, ident: str) -> Drive:
        if not ident:
            raise Refused("it names no drive", f"-drive file=NAME,if=none,id=ID and -device {driver},drive=ID")
        named = [drive for drive in self.drives if drive.ident == ident]
        if not named:
            raise Missing(f"there is no -drive with id={ident}", f"-drive file=NAME,if=none,id={ident} beside it")
        if len(named) > 1:
            raise Refused(f"two drives are called {ident}", "another id")
        if named[0].bus != "none":
            raise Refused(f"the drive {ident} already has a device", "if=none in its -drive, or leave this -device out")
        return named[0]

    def _seat(self) -> None:
        """Give every drive its place on its bus, as QEMU does; a bus's drives then stand in the order of their places."""
        taken: dict[str, set[int]] = {}
        for drive in self.drives:
            bus = self._bus(drive)
            seats = taken.setdefault(bus, set())
            if drive.seat is None:
                drive.seat = next(seat for seat in range(len(seats) + 1) if seat not in seats)
            elif drive.seat in seats:
                both = "-cdrom is the same place as -hdc" if drive.bus == "ide" and drive.seat == 2 else "say each place once"
                drive.given.row.refuse(Refused(f"place {drive.seat} of {bus} is taken by another option", both))
            if drive.seat >= ROOM[bus]:
                drive.given.row.refuse(Refused(f"{bus} has {ROOM[bus]} places", "if=virtio has more"))
            seats.add(drive.seat)
        buses = list(taken)
        self.drives.sort(key=lambda drive: (buses.index(self._bus(drive)), drive.seat or 0))

    def _bus(self, drive: Drive) -> str:
        return "sata" if drive.bus == "ide" and self.draft.family == "q35" else drive.bus

    def _snapshot(self, given: Given) -> None:
        protected = [drive for drive in self.drives if drive.writable]
        for drive in protected:
            drive.scratch = True
        given.row.became = "snapshot=true on every disk that can be written to" if protected else "nothing: no disk is written to"

    def _entry(self, drive: Drive, entry: dict[str, object]) -> None:
        """Fill one [[disk]]; the format follows the name's ending, and is never guessed from what is inside."""
        bus = self._bus(drive)
        if drive.path:
            entry["path"] = checked(DISK_KEYS["path"], drive.path, "file")
        elif drive.type != "cdrom":
            raise Refused("it names no file", DRIVE)
        if drive.type != "disk":
            entry["type"] = drive.type
            if drive.format not in ("", "raw"):
                raise Refused(f"a {drive.type} has no format {drive.format}", "format=raw")
        if drive.media == "cdrom" and drive.bus not in CD_BUSES:
            raise Refused(f"a CD drive is not on {bus}", "-cdrom FILE")
        if drive.type != "floppy":
            entry["bus"] = bus
        if drive.type == "disk":
            entry["format"] = drive.format or ("qcow2" if drive.path.lower().endswith(".qcow2") else "raw")
        if drive.readonly and drive.scratch:
            raise Refused("it is read-only, so nothing is written that could be lost", "readonly=on or snapshot=on, not both")
        if drive.path.startswith("library:") and drive.writable:
            raise Refused("the library is read-only", "-snapshot, or -drive with snapshot=on")
        if drive.type != "cdrom":
            entry.update({"readonly": True} if drive.readonly else {})
            entry.update({"snapshot": True} if drive.scratch else {})

    def _geometry(self, given: Given, entries: list[dict[str, object]]) -> None:
        """-hdachs: QEMU's own order is cylinders, heads, sectors, translation, and it is about -hda alone."""
        words = given.value.split(",")
        if len(words) not in (3, 4) or not all(word and len(word) <= 5 and DIGITS.issuperset(word) for word in words[:3]):
            raise Refused("three numbers and a translation are needed", "-hdachs 1024,16,63,lba")
        geometry: dict[str, object] = dict(zip(("cyls", "heads", "secs"), map(int, words[:3]), strict=True))
        if len(words) == 4:
            if words[3] not in TRANSLATIONS:
                raise Refused(f"the translation is not one of {', '.join(TRANSLATIONS)}", "-hdachs 1024,16,63,lba")
            geometry["trans"] = words[3]
        if self.draft.family != "pc":
            raise Refused("a q35 machine has no IDE disk, and others have no geometry", "-M pc")
        first = next((index for index, drive in enumerate(self.drives) if (drive.bus, drive.seat) == ("ide", 0)), None)
        if first is None or self.drives[first].type != "disk":
            raise Missing("there is no -hda that it could be about", "-hda FILE beside it")
        checked(DISK_KEYS["geometry"], geometry, "geometry")
        entries[first]["geometry"] = geometry
        given.row.became = f"{self.drives[first].name}: geometry={given.value}"
