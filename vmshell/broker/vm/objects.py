"""Objects: disks, ISOs, kernels and ROMs of one VM, or of a user's shelf. What each was made as is recorded, never probed (R3).

A store is a folder with the files and `objects.json`, which says what each was made as. A file that is not in it (a half-made
one, say) is not an object and is deleted at the next start. Where that list cannot be read, every file is kept, shown, counted
with what it takes on the disk, and may be deleted; nothing is used or added before the last one is gone.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...names import MIB, is_object_name
from ...refusals import NoSuchObject, ObjectExists, StorageFailed, TooMany
from ..runtime.files import read_text, storage, why, write_text
from ..runtime.log import note

FACTS = "objects.json"
OBJECTS_MAX = 1000  # of one store: its list is written anew with each, and read in one piece
DAMAGED = "damaged"  # the format of what nobody knows any more
FILE = "file"  # the format of what a guest is given and never changes: kernels, ROMs, ISOs


@dataclass(frozen=True)
class Object:
    """*size* in bytes: what a guest sees of a disk, or the file's own. *base*: the catalogue image under an overlay."""

    format: str
    size: int
    base: str = ""


class Store:
    """Raises StorageFailed when the disk says no; memory and disk then still agree."""

    def __init__(self, folder: str, where: str) -> None:
        self.folder = folder
        self.where = where  # how a person calls it: the VM's name, or `shelf`
        self._objects: dict[str, Object] = {}
        self._making: dict[str, Object] = {}  # counted like objects, so that two requests cannot take the same last room
        self.damaged = ""  # why its list cannot be read

    def __iter__(self) -> Iterator[tuple[str, Object]]:
        return iter(sorted(self._objects.items()))

    def load(self) -> None:
        """Read the facts; forget, and delete, what they do not name. If they cannot be read, all that is there stays."""
        try:
            self._objects = _read_facts(f"{self.folder}/{FACTS}")
        except (OSError, ValueError) as exc:
            self.damaged = f"the list of its objects is damaged ({why(exc)})"
            self._objects = self._found()
            note("objects-unreadable", folder=self.folder, problem=exc)
            return
        for entry in self._entries():
            if entry not in (FACTS, *KEPT) and (entry.startswith(".") or entry not in self._objects):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self.folder}/{entry}")

    def _entries(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except OSError:
            return []  # none yet, or none to be seen: the reason is in `damaged` then

    def _found(self) -> dict[str, Object]:
        """What lies in the folder, whatever it was."""
        return {name: Object(DAMAGED, self._bytes(name)) for name in self._entries() if name != FACTS and is_object_name(name)}

    def _bytes(self, name: str) -> int:
        """What a file says it has, or takes on the disk, whichever is more."""
        try:
            status = os.stat(self.path(name), follow_symlinks=False)
        except OSError:
            return 0
        return max(status.st_size, status.st_blocks * 512)

    def find(self, name: str) -> Object | None:
        return self._objects.get(name)

    def get(self, name: str) -> Object:
        found = self._objects.get(name)
        if found is None:
            ref = f"{self.where}.{name}"
            advice = f"`put {ref} < FILE` brings it in; `objects {self.where}` lists what is there"
            raise NoSuchObject(where=self.where, object=name, advice=advice)
        return found

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def begin(self, name: str, made: Object) -> str:
        """Take *name* for an object that is about to be made; returns the path to make it at."""
        if self.damaged:
            raise StorageFailed(problem=f"of {self.where} {self.damaged}; `rm` takes away what is left there")
        if len(self._objects) + len(self._making) >= OBJECTS_MAX:
            raise TooMany(where=self.where, what="objects", limit=OBJECTS_MAX)
        if name in self._objects or name in self._making or name == FACTS:
            raise ObjectExists(where=self.where, object=name, ref=f"{self.where}.{name}")
        self._making[name] = made
        return self._half_made(name)

    def grown(self, name: str) -> int:
        """How many bytes the half-made file *name* has by now."""
        try:
            return os.stat(self._half_made(name), follow_symlinks=False).st_size
        except OSError:
            return 0

    def count(self, name: str, size: int) -> None:
        """Count *size* bytes for the object *name* that is being made."""
        self._making[name] = replace(self._making[name], size=size)

    def give_up(self, name: str) -> None:
        self._making.pop(name, None)
        with contextlib.suppress(OSError):
            os.unlink(self._half_made(name))

    def finish(self, name: str, made: Object) -> None:
        """The half-made file is whole: make it an object, in one rename and one write."""
        with storage():
            os.rename(self._half_made(name), self.path(name))
            self._write({**self._objects, name: made})
        self._making.pop(name, None)

    def _half_made(self, name: str) -> str:
        return f"{self.folder}/.new-{name}"

    def remove(self, name: str) -> None:
        left = {other: made for other, made in self._objects.items() if other != name}
        with storage():
            if not self.damaged:
                self._write(left)
            os.unlink(self.path(name))
            if self.damaged and not left:
                os.unlink(f"{self.folder}/{FACTS}")
                self.damaged = ""
        self._objects = left

    def size(self) -> int:
        """What all of it counts against the owner's limit, in MiB, each object rounded up."""
        return sum(mebibytes(made.size) for made in (*self._objects.values(), *self._making.values()))

    def used(self, name: str) -> int:
        """Bytes that an object takes on the host's disk."""
        try:
            return os.stat(self.path(name), follow_symlinks=False).st_blocks * 512
        except OSError:
            return 0

    def _write(self, objects: dict[str, Object]) -> None:
        write_text(f"{self.folder}/{FACTS}", json.dumps({name: vars(made) for name, made in sorted(objects.items())}, indent=1))
        self._objects = objects


NVRAM = ".nvram"  # UEFI's variables: made at the first boot, not an object
KEPT = (NVRAM,)


def _read_facts(path: str) -> dict[str, Object]:
    """What was written of each object, checked; raises OSError or ValueError."""
    try:
        rows = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    try:
        found = {name: Object(**row) for name, row in rows.items() if is_object_name(name)}
    except (AttributeError, TypeError):
        raise ValueError("it is not as it was written") from None
    if not all(isinstance(made.format, str) and type(made.size) is int and isinstance(made.base, str) for made in found.values()):
        raise ValueError("it is not as it was written")
    return found


def mebibytes(size: int) -> int:
    return -(-size // MIB)
