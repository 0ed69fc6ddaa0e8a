"""A guest's file tree, and writing it as a newc cpio archive (what the kernel unpacks as its initramfs) or into a directory.

Written here because an archive with device nodes and root-owned files must be made by people who are not root.
The format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
Runs in: vmshell-admin. Touches only the directory it is told to fill.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One file: *mode* with its type bits, as in stat."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)


def directory(path: str, mode: int = 0o755) -> Entry:
    return Entry(path, stat.S_IFDIR | mode)


def regular(path: str, data: bytes | str, mode: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(path, stat.S_IFCHR | mode, device=(major, minor))


def archive(entries: list[Entry]) -> bytes:
    """Return the archive of *entries*, all owned by root, without dates: the same tree gives the same bytes."""
    parts = [_record(number, entry) for number, entry in enumerate(entries, 1)]
    parts.append(_record(0, Entry(_TRAILER, 0)))
    return _padded(b"".join(parts), 512)


def write_tree(entries: list[Entry], root: str) -> None:
    """Make *entries* below *root* as far as an ordinary user can: no devices, the owner is who we are."""
    for entry in entries:
        path = f"{root}/{entry.path}"
        if entry.kind == stat.S_IFDIR:
            os.makedirs(path, exist_ok=True)
        elif entry.kind == stat.S_IFLNK:
            os.symlink(entry.data.decode(), path)
        elif entry.kind == stat.S_IFREG:
            with open(path, "xb") as file:
                file.write(entry.data)
        else:
            raise ValueError(f"{entry.path}: a directory tree made by an ordinary user has no devices")
        if entry.kind != stat.S_IFLNK:
            os.chmod(path, stat.S_IMODE(entry.mode))


def _record(number: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if entry.kind == stat.S_IFDIR else 1
    #        inode   mode        uid gid links  mtime size           file's device  node's device    name's length, checksum
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name, 4) + _padded(entry.data, 4)


def _padded(data: bytes, unit: int) -> bytes:
    return data + b"\0" * (-len(data) % unit)
