"""What a libvirt domain has become so far: the tables, what to say about it, and the objects it needs.

Runs in: the shell, for `domain.py`. Pure functions.
"""

from __future__ import annotations

from ...errors import VmshellError
from ...model.keys import KEYS, Key
from ...names import OBJECT_CHARS, OBJECT_MAX, OBJECT_RULE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .xml import Node

Table = dict[str, object]


class Draft:
    """One definition in the making."""

    def __init__(self) -> None:
        self.table: Table = {}
        self.notes: list[tuple[str, str]] = []
        self.objects: list[str] = []
        self.devices: list[str] = []  # disk0, cdrom0, net0 …, as they come
        self.order: list[tuple[int, str]] = []  # boot order= and the device
        self._files: dict[str, str] = {}

    def put(self, node: Node, key: str, value: object) -> None:
        """Set a key if it takes the value; else the place in the document is listed with the reason."""
        if value == "" or not self.takes(node, KEYS[key], value):
            return
        section, _, word = key.rpartition(".")
        inner = self.table.setdefault(section, {}) if section else self.table
        assert isinstance(inner, dict)
        inner[word] = value

    def takes(self, node: Node, key: Key, value: object) -> bool:
        try:
            key.kind.check(value, key.name)
        except VmshellError as exc:
            self.notes.append((node.path, exc.sentence()))
            return False
        return True

    def note(self, node: Node, why: str) -> None:
        self.notes.append((node.path, why))

    def device(self, kind: str, entry: Table) -> str:
        """Add a [[disk]] or [[net]]; returns the name it goes by."""
        entries = self.table.setdefault("net" if kind == "net" else "disk", [])
        assert isinstance(entries, list)
        entries.append(entry)
        name = f"{kind}{sum(device.startswith(kind) for device in self.devices)}"
        self.devices.append(name)
        return name

    @property
    def family(self) -> str:
        machine = self.table.get("machine")
        return str(machine.get("type", "pc")) if isinstance(machine, dict) else "pc"

    def object(self, file: str) -> str:
        """The name of the object that is to hold what *file* holds: its last part, with what names may have."""
        if file in self._files:
            return self._files[file]
        base = file.rpartition("/")[2]
        clean = "".join(char if char in OBJECT_CHARS else "-" for char in base)
        clean = clean.lstrip("._+-")[:OBJECT_MAX] or "disk"
        name, count = clean, 1
        while name in self.objects:
            count += 1
            name = f"{count}-{clean}"[:OBJECT_MAX]
        self._files[file] = name
        self.objects.append(name)
        if name != base:
            self.notes.append((f"file {base}", f"it is called {name} here" + (f"; {OBJECT_RULE}" if name == clean else "")))
        return name
