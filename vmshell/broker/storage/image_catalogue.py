"""The image catalogue: `images/<name>/image.toml` and its files, read-only, pinned by hash. Only the administrator writes it.

Runs in: the broker. Reads small TOML files and opens image files; their contents are never parsed or hashed here.
"""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass

from ...errors import safe
from ...names import check_name
from ...refusals import BadName, ImageDamaged, NoSuchImage

_TOML_MAX = 64 * 1024


@dataclass(frozen=True)
class Image:
    """One catalogue entry. *disk_size* in bytes (0: it has no disk), *memory_min* in MiB; *sha256* by file name."""

    name: str
    directory: str
    description: str
    memory_min: int
    kernel: str
    initrd: str
    cmdline: str
    disk: str
    disk_format: str
    disk_size: int
    sha256: dict[str, str]

    def open(self, file: str) -> int:
        """Open one of the image's files read-only; raises ImageDamaged. Open first, then judge the descriptor (R2)."""
        try:
            fd = os.open(f"{self.directory}/{file}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise ImageDamaged(image=self.name, problem=f"its file {file} cannot be opened ({exc.strerror})") from exc
        try:
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
        except OSError:
            regular = False
        if not regular:
            os.close(fd)
            raise ImageDamaged(image=self.name, problem=f"{file} is not a file")
        return fd

    def files(self) -> list[str]:
        return [file for file in (self.kernel, self.initrd, self.disk) if file]


def names(directory: str) -> list[str]:
    """The catalogue's names in order; entries that are no names (half-built ones start with a dot) do not count."""
    try:
        entries = sorted(os.listdir(directory))
    except OSError:
        return []
    return [entry for entry in entries if _is_name(entry)]


def load(directory: str, name: str) -> Image:
    """Read the image *name*; raises NoSuchImage or ImageDamaged."""
    check_name(name, "image")
    folder = f"{directory}/{name}"
    try:
        with open(f"{folder}/image.toml", "rb") as file:
            table = tomllib.loads(file.read(_TOML_MAX).decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NoSuchImage(image=name) from exc
    except (OSError, ValueError) as exc:
        raise ImageDamaged(image=name, problem=f"its image.toml cannot be read ({safe(exc, 80)})") from exc
    return _build(name, folder, table)


def _build(name: str, folder: str, table: dict[str, object]) -> Image:
    boot, disk, sha256 = (_table(name, table, key) for key in ("boot", "disk", "sha256"))

    def text(source: dict[str, object], key: str) -> str:
        value = source.get(key, "")
        if not isinstance(value, str):
            raise ImageDamaged(image=name, problem=f"{key} in its image.toml is not text")
        return value

    def number(source: dict[str, object], key: str) -> int:
        value = source.get(key, 0)
        if type(value) is not int or value < 0:
            raise ImageDamaged(image=name, problem=f"{key} in its image.toml is not a whole number")
        return value

    image = Image(
        name=name,
        directory=folder,
        description=text(table, "description"),
        memory_min=number(table, "memory_min"),
        kernel=text(boot, "kernel"),
        initrd=text(boot, "initrd"),
        cmdline=text(boot, "cmdline"),
        disk=text(disk, "file"),
        disk_format=text(disk, "format") or "raw",
        disk_size=number(disk, "size"),
        sha256={key: value for key, value in sha256.items() if isinstance(value, str)},
    )
    if not image.kernel and not image.disk:
        raise ImageDamaged(image=name, problem="it has neither a kernel nor a disk")
    if any("/" in file or file.startswith(".") or file not in image.sha256 for file in image.files()):
        raise ImageDamaged(image=name, problem="its image.toml names a file without a hash")
    if image.disk_format not in ("raw", "qcow2"):
        raise ImageDamaged(image=name, problem="its disk is neither raw nor qcow2")
    return image


def _table(name: str, table: dict[str, object], key: str) -> dict[str, object]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ImageDamaged(image=name, problem=f"[{key}] in its image.toml is not a section")
    return value


def _is_name(entry: str) -> bool:
    try:
        check_name(entry)
    except BadName:
        return False
    return True
