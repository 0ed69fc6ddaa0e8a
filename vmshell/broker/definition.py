"""What a VM is: the keys of `vm.toml`, each typed and ranged. Names of broker-owned objects stand in it, never host paths (R1).

Runs in: the broker. Pure: text in, text out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import BadValue, VmshellError, safe
from ..messages import choice, integer
from ..names import check_name


@dataclass(frozen=True)
class Disk:
    """A VM's own disk: `disks/<name>.qcow2`. With *base* it is an overlay over that catalogue image's disk."""

    name: str
    size: int  # virtual bytes
    base: str = ""

    @property
    def file(self) -> str:
        return f"{self.name}.qcow2"


@dataclass(frozen=True)
class Definition:
    """Memory in MiB. *kernel* names the image whose kernel, initrd and command line are booted; empty: boots from disk."""

    name: str
    image: str
    cpus: int = 1
    memory: int = 512
    machine: str = "q35"
    kernel: str = ""
    disks: tuple[Disk, ...] = ()

    def to_toml(self) -> str:
        """The text of `vm.toml`. Every value is a checked name or a whole number, so nothing needs escaping."""
        lines = [
            f'name = "{self.name}"',
            f'image = "{self.image}"',
            f'[machine]\ntype = "{self.machine}"',
            f"[cpu]\ncount = {self.cpus}",
            f'[memory]\nsize = "{self.memory}M"',
        ]
        if self.kernel:
            lines.append(f'[boot]\nkernel = "image:{self.kernel}"')
        for disk in self.disks:
            base = f'base = "image:{disk.base}"\n' if disk.base else ""
            lines.append(f'[[disk]]\nname = "{disk.name}"\nformat = "qcow2"\nsize = {disk.size}\n{base}'.rstrip())
        return "\n".join(lines) + "\n"


def parse(text: str) -> Definition:
    """Read a `vm.toml`; raises BadValue or BadName naming the key. Unknown keys are refused: nothing is silently not done."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise BadValue(field="vm.toml", value="not TOML", rule=str(exc)) from exc
    reader = _Reader(table, "")
    machine, cpu, memory, boot = (reader.section(key) for key in ("machine", "cpu", "memory", "boot"))
    definition = Definition(
        name=check_name(reader.take("name")),
        image=check_name(reader.take("image"), "image"),
        machine=choice("q35", "pc")(machine.take("type", "q35"), "machine.type"),
        cpus=integer(1, 255)(cpu.take("count", 1), "cpu.count"),
        memory=_mebibytes(memory.take("size", "512M")),
        kernel=_image(boot.take("kernel", ""), "boot.kernel"),
        disks=tuple(_disk(_Reader(item, "disk.")) for item in reader.tables("disk")),
    )
    for section in (reader, machine, cpu, memory, boot):
        section.finish()
    return definition


class _Reader:
    """A table whose keys are taken one by one; what is left over at the end was not expected."""

    def __init__(self, table: object, prefix: str) -> None:
        if not isinstance(table, dict):
            raise BadValue(field=prefix.rstrip("."), value=safe(repr(table), 40), rule="a section")
        self._table = dict(table)
        self._prefix = prefix

    def take(self, key: str, default: object = None) -> object:
        return self._table.pop(key, default)

    def section(self, key: str) -> _Reader:
        return _Reader(self._table.pop(key, {}), f"{self._prefix}{key}.")

    def tables(self, key: str) -> list[object]:
        value = self._table.pop(key, [])
        if not isinstance(value, list):
            raise BadValue(field=key, value=safe(repr(value), 40), rule=f"sections [[{key}]]")
        return value

    def finish(self) -> None:
        if self._table:
            key = sorted(self._table)[0]
            raise BadValue(field=self._prefix + key, value="not expected", rule="there is no such key")


def _disk(reader: _Reader) -> Disk:
    choice("qcow2")(reader.take("format"), "disk.format")
    disk = Disk(
        name=check_name(reader.take("name"), "disk"),
        size=integer(1, 1 << 50)(reader.take("size"), "disk.size"),
        base=_image(reader.take("base", ""), "disk.base"),
    )
    reader.finish()
    return disk


def _image(value: object, name: str) -> str:
    if value == "":
        return ""
    if not isinstance(value, str) or not value.startswith("image:"):
        raise BadValue(field=name, value=safe(repr(value), 60), rule="image:NAME")
    return check_name(value.removeprefix("image:"), "image")


def _mebibytes(value: object) -> int:
    check: Callable[[object, str], int] = integer(16, 1 << 24)
    if not isinstance(value, str) or not value.endswith("M") or not value[:-1].isdecimal() or len(value) > 10:
        raise BadValue(field="memory.size", value=safe(repr(value), 40), rule="whole MiB, like 512M")
    return check(int(value[:-1]), "memory.size")


def readable(text: str) -> Definition | None:
    """The definition in *text*, or None when it is damaged (its VM is then listed as failed, never guessed at)."""
    try:
        return parse(text)
    except VmshellError:
        return None
