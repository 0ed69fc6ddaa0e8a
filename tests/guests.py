"""Tiny guests for tests: boot sectors as catalogue images, up in a tenth of a second, nothing to download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vmshell.layout import Layout

DISK_SIZE = 1 << 20

# Sets COM1 up, prints READY, then echoes each byte; Ctrl-D switches the machine off through the ACPI port.
READY = "echo guest ready"
_ECHO = bytes.fromhex(
    "fa31c08ed88ed0bc007cfcbe447cac84c07405e82000ebf6bafd03eca80174f8b2f8ec3c047405e80c00ebec"
    "ba0406b80020eff4ebfd50bafd03eca82074fb58b2f8eec3"
)
_SPIN = bytes.fromhex("faebfe")  # cli; jmp to itself: all of a CPU, never a byte


def echo_image(layout: Layout, name: str = "echo") -> None:
    """A guest that says READY and echoes what is typed; Ctrl-D ends it."""
    disk_image(layout, name, _ECHO + READY.encode() + b"\r\n\0")


def spin_image(layout: Layout, name: str = "spin") -> None:
    """A guest that hangs with its CPU spinning, as some do."""
    disk_image(layout, name, _SPIN)


def disk_image(layout: Layout, name: str, code: bytes) -> None:
    """Put a boot sector into the catalogue as image *name*."""
    data = (code.ljust(510, b"\0") + b"\x55\xaa").ljust(DISK_SIZE, b"\0")
    folder = Path(layout.images, name)
    folder.mkdir(parents=True, mode=0o755)
    disk = folder / "disk.raw"
    disk.write_bytes(data)
    os.chmod(disk, 0o444)
    sha256 = hashlib.sha256(data).hexdigest()
    folder.joinpath("image.toml").write_text(
        f'description = "a boot sector"\nmemory_min = 16\n[disk]\nfile = "disk.raw"\nformat = "raw"\nsize = {DISK_SIZE}\n'
        f'[sha256]\n"disk.raw" = "{sha256}"\n'
    )
