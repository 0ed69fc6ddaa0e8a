"""Tiny guests for tests, up in a tenth of a second, nothing to download: boot sectors as catalogue images, and media of all kinds
whose programs show on COM1 what an option did. Their sources are in `guest_programs/`; all lines end with CR LF.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

from tests.guest_programs.machine_code import CODE
from vmshell.layout import Layout

DISK_SIZE = 1 << 20
FLOPPY_SIZE = 1474560
SECTOR = 512

# Sets COM1 up, prints READY, then echoes each byte; Ctrl-D switches the machine off through the ACPI port.
READY = "echo guest ready"
_ECHO = bytes.fromhex(
    "fa31c08ed88ed0bc007cfcbe447cac84c07405e82000ebf6bafd03eca80174f8b2f8ec3c047405e80c00ebec"
    "ba0406b80020eff4ebfd50bafd03eca82074fb58b2f8eec3"
)
_SPIN = bytes.fromhex("faebfe")  # cli; jmp to itself: all of a CPU, never a byte
_HALT = bytes.fromhex("faf4ebfd")  # cli; hlt; jmp to the hlt: no CPU, never a byte


def echo_image(layout: Layout, name: str = "echo") -> None:
    """A guest that says READY and echoes what is typed; Ctrl-D ends it."""
    disk_image(layout, name, _ECHO + READY.encode() + b"\r\n\0")


def spin_image(layout: Layout, name: str = "spin") -> None:
    """A guest that hangs with its CPU spinning, as some do."""
    disk_image(layout, name, _SPIN)


def halt_image(layout: Layout, name: str = "halt") -> None:
    """A guest that never prints and does nothing, as one whose only output is a screen at rest."""
    disk_image(layout, name, _HALT)


def disk_image(layout: Layout, name: str, code: bytes) -> None:
    """Put a boot sector into the catalogue as image *name*."""
    data = disk(sector(code))
    folder = Path(layout.images, name)
    folder.mkdir(parents=True, mode=0o755)
    file = folder / "disk.raw"
    file.write_bytes(data)
    os.chmod(file, 0o444)
    sha256 = hashlib.sha256(data).hexdigest()
    folder.joinpath("image.toml").write_text(
        f'description = "a boot sector"\nmemory_min = 16\n[disk]\nfile = "disk.raw"\nformat = "raw"\nsize = {DISK_SIZE}\n'
        f'[sha256]\n"disk.raw" = "{sha256}"\n'
    )


# --- media ------------------------------------------------------------------------------------------------------------


def sector(code: bytes) -> bytes:
    """*code* as a sector that a BIOS boots."""
    assert len(code) <= 510
    return code.ljust(510, b"\0") + b"\x55\xaa"


def disk(boot: bytes, size: int = DISK_SIZE) -> bytes:
    """A raw disk of *size* bytes that begins with *boot*."""
    return boot.ljust(size, b"\0")


def bootsector(label: str) -> bytes:
    """Says `boot from LABEL DL`, DL being the BIOS's drive in hex: 80 the first hard disk, 00 the first floppy, e0 or so a CD."""
    return sector(CODE["boot"] + _text(label))


def floppy(label: str) -> bytes:
    """A 1.44M floppy that says what `bootsector` says."""
    return disk(bootsector(label), FLOPPY_SIZE)


def iso(label: str) -> bytes:
    """A CD that boots without emulating a floppy (El Torito) and says what `bootsector` says; it holds no files."""
    return _iso(bootsector(label))


def option_rom(label: str) -> bytes:
    """A PC option ROM that says `rom LABEL` when the BIOS runs it, before any boot; several run by file name, backwards."""
    code = CODE["rom"] + _text(label)
    length = -(-(len(code) + 1) // SECTOR)
    rom = bytearray(code.ljust(length * SECTOR, b"\0"))
    rom[2] = length
    rom[-1] = -sum(rom) & 0xFF
    return bytes(rom)


def kernel(label: str) -> bytes:
    """A bzImage that says `kernel LABEL`, `cmdline TEXT` and `initrd SIZE FIRST-16-BYTES` (hex; dots for what is unprintable) or
    `initrd none`."""
    setup = (CODE["kernel"] + _text(label)).ljust(5 * SECTOR, b"\0")
    assert len(setup) == 5 * SECTOR
    return setup + bytes(SECTOR)


# --- boot sectors -----------------------------------------------------------------------------------------------------

GEOMETRY = sector(CODE["geometry"])  # `geometry CCCC/HH/SS` of drive 80 in hex, or `geometry none`; the BIOS keeps a cylinder
CLOCK = sector(CODE["clock"])  # `clock YYYY-MM-DD HH:MM:SS`, each second
COUNTER = sector(CODE["counter"])  # `counter ready`, then at each key `counter NNNN` in hex, one more each time
WRITER = sector(CODE["writer"])  # `writer ready`; w: `write ok`, r: `read HEX` (8 bytes), 0-7: `drive 8N`; else `error AH`
SCANCODE = sector(CODE["scancode"])  # `scancode ready`, then `scancode XX` for each byte of the keyboard
REBOOT = sector(CODE["reboot"])  # `up`; R resets by port CF9, K by the keyboard controller, P powers off
ACPI = sector(CODE["acpi"])  # `acpi yes` or `acpi no`
MEMORY = sector(CODE["memory"])  # `memory NM`, decimal

WRITTEN = b"WRITTEN!".hex()  # what WRITER's r shows after its w; before: UNWRITTEN
UNWRITTEN = bytes(8).hex()


def _text(label: str) -> bytes:
    return label.encode("ascii") + b"\0"


_CD_SECTOR = 2048


def _iso(boot: bytes) -> bytes:
    """16 sectors of nothing, descriptors, boot catalogue (19), the boot sector (20), an empty root folder (21), path tables."""
    catalogue, image, root, path_l, path_m, sectors = 19, 20, 21, 22, 23, 24
    # The validation entry's words add up to 0, two of them being the checksum and 55 AA.
    validation = struct.pack("<BBH24sHH", 1, 0, 0, b"", 0, 0xAA55)
    validation = validation[:28] + struct.pack("<H", -sum(struct.unpack("<16H", validation)) & 0xFFFF) + validation[30:]
    entry = struct.pack("<BBHBBHI20x", 0x88, 0, 0, 0, 0, 1, image)  # bootable, no emulation, at 7C00, one sector of 512 bytes
    date = bytes((100, 1, 1, 0, 0, 0, 0))

    def folder(name: bytes) -> bytes:
        head = struct.pack("<BBIIII", 34, 0, root, _swap(root), _CD_SECTOR, _swap(_CD_SECTOR))
        return head + date + struct.pack("<BBBHHB", 2, 0, 0, 1, 0x0100, 1) + name

    volume = bytearray(_CD_SECTOR)
    volume[:7] = b"\x01CD001\x01"
    volume[8:40] = b" " * 32
    volume[40:72] = b"VMSHELL".ljust(32)
    struct.pack_into("<II", volume, 80, sectors, _swap(sectors))
    for at, value in ((120, 1), (124, 1), (128, _CD_SECTOR)):
        struct.pack_into("<H", volume, at, value)
        struct.pack_into(">H", volume, at + 2, value)
    struct.pack_into("<II", volume, 132, 10, _swap(10))
    struct.pack_into("<II", volume, 140, path_l, 0)
    struct.pack_into(">II", volume, 148, path_m, 0)
    volume[156:190] = folder(b"\0")
    volume[190:813] = b" " * 623
    for at in (813, 830, 847, 864):
        volume[at : at + 17] = b"0" * 16 + b"\0"
    volume[881] = 1
    parts = {
        16: bytes(volume),
        17: struct.pack("<B5sB32s32xI", 0, b"CD001", 1, b"EL TORITO SPECIFICATION", catalogue),
        18: b"\xffCD001\x01",
        catalogue: validation + entry,
        image: boot,
        root: folder(b"\0") + folder(b"\1"),
        path_l: struct.pack("<BBIHH", 1, 0, root, 1, 0),
        path_m: struct.pack(">BBIHH", 1, 0, root, 1, 0),
    }
    return b"".join(parts.get(number, b"").ljust(_CD_SECTOR, b"\0") for number in range(sectors))


def _swap(value: int) -> int:
    """*value* as it reads when its four bytes are turned round: ISO 9660 writes numbers both ways."""
    return int.from_bytes(value.to_bytes(4, "little"), "big")
