"""What can still be said of a VM whose record cannot be read, so that it is listed, counted, killed and removed like any other.

Its folder says the owner's uid and its name. Its number, owner and age stand first in the record, and most damage is a cut; a VM
that runs has its number and owner in the run directory, too. An owner is only ever believed where it is written: a uid may be
another account's by now (D22).
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...numbering import NUMBER_MAX
from ..runtime.files import read_text

LINES = 8  # of a record, which begins with what is needed here


@dataclass
class Remains:
    """What is left of a record. *number* 0 and *owner* "" are not known."""

    number: int = 0
    owner: str = ""
    created: int = 0
    problem: str = field(default="", compare=False)  # why it cannot be read


def remains_of(folder: str, problem: str) -> Remains:
    """What the record in *folder* still says."""
    try:
        text = read_text(f"{folder}/record.json")
    except OSError:
        text = ""
    return _remains(_fields(text), problem)


def running(folder: str) -> dict[tuple[int, str], Remains]:
    """By owner's uid and name what the run directories below *folder* say of who runs."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                run = json.loads(read_text(f"{folder}/{entry}/run.json"))
                found[int(run["uid"]), str(run["name"])] = _remains({**run, "number": int(entry)}, "")
    return found


def only_owner(owners: Iterable[str]) -> str:
    """The owner whom all other records of one uid name, or nobody."""
    known = set(owners)
    return known.pop() if len(known) == 1 else ""


def _fields(text: str) -> dict[str, object]:
    """What a record says, or its first lines, one field each, as far as they are whole."""
    found: dict[str, object] = {}
    with contextlib.suppress(ValueError):
        whole = json.loads(text)
        return whole if isinstance(whole, dict) else {}
    for line in text.splitlines()[:LINES]:
        with contextlib.suppress(ValueError):
            found |= json.loads("{" + line.strip().removesuffix(",") + "}")
    return found


def _remains(fields: dict[str, object], problem: str) -> Remains:
    number, owner, created = (fields.get(name) for name in ("number", "owner", "created"))
    return Remains(
        number if type(number) is int and 0 < number <= NUMBER_MAX else 0,
        owner if isinstance(owner, str) else "",
        created if type(created) is int else 0,
        problem,
    )
