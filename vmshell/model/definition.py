"""What a VM is: `vm.toml`, read into typed values and written back. Names of objects stand in it, never host paths (R1).

Stored files are read with `read_stored`, which keeps going where a newer version wrote something unknown; what a person sends is
read with `parse`, which refuses it.
Used by: broker, shell, admin. Pure.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from functools import partial

from ..errors import BadValue, VmshellError, safe
from ..names import check_name
from . import edit
from .bounds import check_bounds
from .keys import DISK_KEYS, KEYS, NET_KEYS, SECTIONS, Key, unknown_key
from .shapes import Definition, Disk, Forward, Geometry, Nic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

__all__ = [
    "Definition",
    "Disk",
    "Forward",
    "Geometry",
    "Nic",
    "change",
    "differences",
    "emit",
    "flat",
    "from_table",
    "parse",
    "read_stored",
    "to_table",
    "to_toml",
    "with_key_of",
    "with_values",
]

VERSION = 1
ROWS_MAX = 32


def parse(text: str, name: str = "") -> Definition:
    """Read what a person sent; raises BadValue or BadName. *name* is the VM's where that is said elsewhere."""
    return from_table(_toml(text), name)


def from_table(table: dict[str, Any], name: str = "") -> Definition:
    """As `parse`, from the tables that TOML would have given."""
    reading = _Reading(table)
    found = reading.found
    if problem := reading.problem or reading.unknown_key():
        raise problem
    if name and found.setdefault("name", name) != name:
        raise BadValue(field="name", value=found["name"], rule=f"it must be {name}, or left out")
    if "name" not in found:
        raise BadValue(field="name", value="missing", rule="a definition names its VM")
    definition = Definition(**found)
    check_together(definition)
    return definition


def read_stored(text: str, name: str) -> tuple[Definition, str]:
    """Read a stored `vm.toml` as far as it is understood; returns it and why it must not be booted (empty: it may)."""
    try:
        reading = _Reading(_toml(text))
        definition = Definition(**{**reading.found, "name": name})
        if reading.problem:
            raise reading.problem
        unknown = reading.unknown_key()
        if not unknown:
            check_together(definition)
    except VmshellError as exc:
        return Definition(name=name), f"its definition is damaged: {exc.sentence()}"
    if unknown:
        return definition, f"its definition was written by a newer version: {unknown.sentence()}"
    return definition, ""


def to_toml(definition: Definition) -> str:
    """The text of `vm.toml`: what differs from the defaults, and what everybody wants to see."""
    return emit(to_table(definition))


def to_table(definition: Definition) -> dict[str, Any]:
    """The definition as TOML's own tables, defaults left out."""
    table: dict[str, Any] = {"name": definition.name}
    for key in KEYS.values():
        value = getattr(definition, key.attribute)
        if key.always or value != key.default:
            section, _, word = key.name.rpartition(".")
            (table.setdefault(section, {}) if section else table)[word] = key.kind.raw(value)
    if definition.disks:
        table["disk"] = [_set_keys(disk) for disk in definition.disks]
    if definition.nics:
        table["net"] = [_set_keys(nic) or {"network": "users"} for nic in definition.nics]
    return table


def _set_keys(device: Disk | Nic) -> dict[str, Any]:
    keys = DISK_KEYS if isinstance(device, Disk) else NET_KEYS
    return {key.name: key.kind.raw(value) for key in keys.values() if (value := getattr(device, key.attribute)) != key.default}


def flat(definition: Definition) -> dict[str, object]:
    """Every key that is set, by the name `set` knows it by: `cpu.count`, `disk0.path`, `net0.link`."""
    found: dict[str, object] = {}
    for word, value in to_table(replace(definition, disks=(), nics=())).items():
        found |= {f"{word}.{inner}": item for inner, item in value.items()} if isinstance(value, dict) else {word: value}
    for name, device in definition.devices().items():
        found |= {name: True} | {f"{name}.{inner}": item for inner, item in _set_keys(device).items()}
    return found


def differences(one: Definition, other: Definition) -> list[str]:
    """The keys in which two definitions differ; a device that only one of them has stands for all of its keys."""
    left, right = flat(one), flat(other)
    keys = [key for key in dict.fromkeys((*left, *right)) if left.get(key) != right.get(key)]
    devices = {key for key in keys if "." not in key}
    return [key for key in keys if key in devices or key.partition(".")[0] not in devices]


def with_key_of(definition: Definition, other: Definition, key: str) -> Definition:
    """*definition* with one key (as `flat` names it) as *other* has it."""
    table = to_table(definition)
    edit.copy(table, to_table(other), key)
    return from_table(table)


def change(definition: Definition, sets: dict[str, str], unsets: Iterable[str]) -> Definition:
    """The definition with some keys at their defaults again and others set from words (`memory` = `1G`, `cdrom0.path` = `x.iso`).

    A device's name alone stands for what is in it (`cdrom0` its path, `net0` its network); the next number makes a new device.
    """
    table = to_table(definition)
    for name in unsets:
        edit.unset(table, name)
    for name, word in sets.items():
        edit.assign(table, name, word)
    return from_table(table)


def with_values(definition: Definition, values: dict[str, object]) -> Definition:
    """The definition with keys replaced by values as TOML gives them (the policy's `fixed`); raises BadValue."""
    table = to_table(definition)
    for name, value in values.items():
        section, _, word = name.rpartition(".")
        (table.setdefault(section, {}) if section else table)[word] = value
    return from_table(table)


# --- reading ----------------------------------------------------------------------------------------------------------


def _toml(text: str) -> dict[str, Any]:
    check_bounds(text)
    try:
        return tomllib.loads(text)
    except ValueError as exc:
        raise BadValue(field="vm.toml", value="not TOML", rule=safe(exc, 120)) from None


class _Reading:
    """What was understood of a document: typed values by attribute, the first problem, and the first key that is not ours.

    One of each is all that anybody is told: a text may have thousands, and looking for what is meant by a key takes its time.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self.found: dict[str, Any] = {}
        self.problem: VmshellError | None = None
        self._unknown: Callable[[], VmshellError] | None = None
        for word, value in table.items():
            if word == "version":
                self._version(value)
            elif word == "name":
                self._try(self.found, "name", partial(check_name, value))
            elif word in SECTIONS:
                self._section(word, value)
            elif word == "disk":
                self.found["disks"] = tuple(Disk(**row) for row in self._rows(word, value, DISK_KEYS))
            elif word == "net":
                self.found["nics"] = tuple(Nic(**row) for row in self._rows(word, value, NET_KEYS))
            else:
                self._take(KEYS, word, value, self.found)

    def unknown_key(self) -> VmshellError | None:
        return self._unknown() if self._unknown else None

    def _version(self, value: object) -> None:
        if type(value) is not int or value != VERSION:
            rule = f"this vmshell reads version {VERSION}"
            error = BadValue(field="version", value=safe(repr(value), 20), rule=rule)
            self._unknown = self._unknown or (lambda: error)

    def _section(self, word: str, value: object) -> None:
        if not isinstance(value, dict):
            self._refuse(BadValue(field=word, value=safe(repr(value), 40), rule=f"a section [{word}]"))
            return
        for inner, item in value.items():
            self._take(KEYS, f"{word}.{inner}", item, self.found)

    def _rows(self, word: str, rows: object, keys: dict[str, Key]) -> list[dict[str, Any]]:
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or len(rows) > ROWS_MAX:
            rule = f"up to {ROWS_MAX} sections [[{word}]]"
            self._refuse(BadValue(field=word, value=safe(repr(rows), 40), rule=rule))
            return []
        return [self._row(word, row, keys) for row in rows]

    def _row(self, word: str, row: dict[str, Any], keys: dict[str, Key]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for inner, item in row.items():
            self._take(keys, inner, item, found, prefix=f"{word}.")
        return found

    def _take(self, keys: dict[str, Key], name: str, value: object, found: dict[str, Any], prefix: str = "") -> None:
        key = keys.get(name)
        if key is None:
            self._unknown = self._unknown or (lambda: unknown_key(prefix + name, [prefix + each for each in keys]))
        else:
            self._try(found, key.attribute, lambda: key.kind.check(value, prefix + name))

    def _try(self, found: dict[str, Any], attribute: str, check: Callable[[], object]) -> None:
        try:
            found[attribute] = check()
        except VmshellError as exc:
            self._refuse(exc)

    def _refuse(self, problem: VmshellError) -> None:
        self.problem = self.problem or problem


# --- what only the whole shows ----------------------------------------------------------------------------------------

BUSES: dict[str, dict[str, tuple[str, ...]]] = {
    "disk": {"q35": ("virtio", "sata", "scsi", "usb"), "pc": ("virtio", "ide", "scsi", "usb")},
    "cdrom": {"q35": ("sata", "scsi"), "pc": ("ide", "scsi")},
    "floppy": {"q35": ("fdc",), "pc": ("fdc",)},
}
PLACES = {"virtio": 16, "sata": 6, "ide": 4, "scsi": 16, "usb": 4, "fdc": 2}  # devices that fit on a bus


def check_together(definition: Definition) -> None:
    """Rules between keys; raises BadValue."""
    names = definition.devices()
    used: dict[str, int] = {}
    written: set[str] = set()
    for name, disk in names.items():
        if isinstance(disk, Disk):
            _check_disk(definition, name, disk)
            bus = definition.bus_of(disk)
            used[bus] = used.get(bus, 0) + 1
            if used[bus] > PLACES[bus]:
                raise BadValue(field=f"{name}.bus", value=bus, rule=f"{PLACES[bus]} devices fit there")
            if disk.path and disk.path in written:
                raise BadValue(field=f"{name}.path", value=disk.path, rule="another disk of this VM writes to it")
            written |= {disk.path} if disk.writable and disk.path else set()
    missing = next((name for name in definition.boot_order if name not in names), "")
    if missing:
        there = ", ".join(names) or "none"
        raise BadValue(field="boot.order", value=missing, rule=f"this VM has no such device; its devices are {there}")
    for value, key in ((definition.initrd, "boot.initrd"), (definition.cmdline, "boot.cmdline")):
        if value and not definition.kernel:
            raise BadValue(field=key, value=value, rule="only with boot.kernel")
    if definition.keymap and definition.display != "vnc":
        raise BadValue(field="display.keymap", value=definition.keymap, rule="only with display.type = vnc")


def _check_disk(definition: Definition, name: str, disk: Disk) -> None:
    buses = BUSES[disk.type][definition.family]
    if disk.bus and disk.bus not in buses:
        near = {"ide": "sata", "sata": "ide"}.get(disk.bus, buses[0])
        rule = f"a {disk.type} of a {definition.family} machine is on one of {', '.join(buses)}"
        raise BadValue(field=f"{name}.bus", value=disk.bus, rule=f"{rule}; nearest is {near if near in buses else buses[0]}")
    if disk.readonly and disk.type == "disk" and definition.bus_of(disk) in ("ide", "sata"):
        raise BadValue(field=f"{name}.readonly", value="true", rule="not on ide or sata, whose disks are writable; virtio can")
    if not disk.path and disk.type != "cdrom":
        raise BadValue(field=f"{name}.path", value="missing", rule="the object that is in it; only a CD drive may be empty")
    if disk.geometry and definition.bus_of(disk) != "ide":
        raise BadValue(field=f"{name}.geometry", value="given", rule="only with bus = ide, on a pc machine")
    if disk.snapshot and (disk.readonly or disk.type == "cdrom"):
        raise BadValue(field=f"{name}.snapshot", value="true", rule="only for what can be written to")
    if disk.type != "disk" and disk.format == "qcow2":
        raise BadValue(field=f"{name}.format", value="qcow2", rule=f"a {disk.type} is raw")
    if disk.path.startswith("library:") and disk.writable:
        raise BadValue(field=f"{name}.path", value=disk.path, rule="the library is read-only: readonly = true or snapshot = true")
    if (disk.size or disk.base) and ":" in disk.path:
        raise BadValue(field=f"{name}.size", value=disk.path, rule="only objects of the VM itself are made with it")


# --- writing ----------------------------------------------------------------------------------------------------------


def emit(table: dict[str, Any]) -> str:
    """TOML text of a table of scalars, lists, sections and lists of sections, two levels deep."""
    lines = [f"{word} = {toml_value(value)}" for word, value in table.items() if not _is_section(value)]
    for word, value in table.items():
        if _is_section(value):
            for section in value if isinstance(value, list) else [value]:
                lines.append(f"[[{word}]]" if isinstance(value, list) else f"[{word}]")
                lines += [f"{inner} = {toml_value(item)}" for inner, item in section.items()]
    return "\n".join(lines) + "\n"


def _is_section(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def toml_value(value: object) -> str:
    """One value as TOML writes it. JSON's text is TOML's, but for DEL and what JSON would write as two halves."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{word} = {toml_value(item)}" for word, item in value.items()) + " }"
    if isinstance(value, int):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a definition")
