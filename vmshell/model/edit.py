"""`set` and `unset`: one key of a definition, named as a person names it, put into or taken out of its tables.

Used by: broker. Pure.
"""

from __future__ import annotations

from ..errors import BadValue, safe
from .keys import ALIASES, DISK_KEYS, KEYS, NET_KEYS, SECTIONS, Key, unknown_key
from .values import split_device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ALONE = {"net": "network"}  # what a device's name alone stands for; else its path


def assign(table: dict[str, Any], name: str, word: str) -> None:
    """Put the value that *word* says under the key *name*; raises BadValue."""
    key, place = _find(table, name, make=True)
    short = key.name.rpartition(".")[2]
    value = key.kind.read(word)
    key.kind.check(value, _shown(name))
    place[short] = value


def unset(table: dict[str, Any], name: str) -> None:
    """Take the key *name* out, so that its default holds; a device's name alone takes the device out."""
    device = split_device(name)
    if device is not None:
        kind, number = device
        rows = table.get("net" if kind == "net" else "disk", [])
        row = _row(table, name, kind, number)
        rows.remove(row)
        if not rows:
            del table["net" if kind == "net" else "disk"]
        return
    key, place = _find(table, name, make=False)
    short = key.name.rpartition(".")[2]
    if short not in place and not any(key.name == each for each in KEYS):
        raise BadValue(field=_shown(name), value="not set", rule="there is nothing to unset")
    place.pop(short, None)


def copy(table: dict[str, Any], other: dict[str, Any], name: str) -> None:
    """Make the value under the key *name* the one it has in *other*, or none."""
    key, place = _find(table, name, make=True)
    _, source = _find(other, name, make=True)
    short = key.name.rpartition(".")[2]
    place.pop(short, None)
    if short in source:
        place[short] = source[short]


def _find(table: dict[str, Any], name: str, *, make: bool) -> tuple[Key, dict[str, Any]]:
    """The row of the key called *name* and the table in which its value stands."""
    known = ALIASES.get(name, name)
    if known == "name":
        raise BadValue(field="name", value="given", rule="a VM keeps its name here")
    if known in KEYS:
        section = known.rpartition(".")[0]
        return KEYS[known], table.setdefault(section, {}) if section else table
    stem, _, field = known.partition(".")
    device = split_device(stem)
    if device is None:
        names = [*KEYS, *ALIASES, *(f"disk0.{key}" for key in DISK_KEYS), *(f"net0.{key}" for key in NET_KEYS)]
        if known in SECTIONS:
            inner = ", ".join(key for key in KEYS if key.startswith(f"{known}."))
            raise BadValue(field=known, value="a section", rule=f"its keys are {inner}")
        raise unknown_key(name, names)
    kind, number = device
    keys = NET_KEYS if kind == "net" else DISK_KEYS
    field = field or ALONE.get(kind, "path")
    if field not in keys or field == "type":
        raise unknown_key(name, [f"{stem}.{key}" for key in keys if key != "type"])
    return keys[field], _row(table, stem, kind, number, make=make)


def _row(table: dict[str, Any], name: str, kind: str, number: int, *, make: bool = False) -> dict[str, Any]:
    rows: list[dict[str, Any]] = table.setdefault("net" if kind == "net" else "disk", []) if make else table.get(
        "net" if kind == "net" else "disk", []
    )  # fmt: skip
    same = rows if kind == "net" else [row for row in rows if row.get("type", "disk") == kind]
    if number < len(same):
        return same[number]
    if not make or number > len(same):
        there = ", ".join(f"{kind}{index}" for index in range(len(same))) or "none"
        also = f"; the next is {kind}{len(same)}" if make else ""
        raise BadValue(field=safe(name, 40), value="not there", rule=f"this VM's are: {there}{also}")
    made = {} if kind in ("disk", "net") else {"type": kind}
    rows.append(made)
    return made


def _shown(name: str) -> str:
    return ALIASES.get(name, name)
