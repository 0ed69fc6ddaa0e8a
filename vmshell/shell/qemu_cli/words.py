"""What the parts of the wrapper share: a word on the command line, what became of it, and why it was refused.

Runs in: the shell, for the verb `kvm` alone. Pure functions.
"""

from __future__ import annotations

from ...errors import VmshellError
from ...model.keys import KEYS
from ...names import DIGITS, LETTERS, OBJECT_RULE, is_object_name
from .options import ALLOWED, DENIED, PARTS, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...model.keys import Key

ORIGINS = ("shelf", "library", "image")


class Refused(Exception):
    """Stops one option; *reason* and *instead* are its line."""

    def __init__(self, reason: str, instead: str = "", kind: str = DENIED) -> None:
        super().__init__(reason)
        self.reason = reason
        self.instead = instead
        self.kind = kind

    def throw(self) -> None:
        raise self


class Missing(Refused):
    """Another option should stand beside this one. Not said while other options are refused: it may be one of them."""


class Row:
    """One line for the person: the option as typed, its class here and in 2007, and what it became or why it did not."""

    __slots__ = ("became", "instead", "kind", "option", "page", "reason")

    def __init__(self, option: str, kind: str, *, became: str = "", reason: str = "", instead: str = "", page: str = "") -> None:
        self.option = option
        self.kind = kind
        self.became = became
        self.reason = reason
        self.instead = instead
        self.page = page

    def __repr__(self) -> str:
        return f"Row({self.option!r}, {self.kind}, {self.became or self.reason!r})"

    @property
    def refused(self) -> bool:
        return self.kind != ALLOWED

    def refuse(self, why: Refused) -> None:
        self.kind, self.reason, self.instead, self.became = why.kind, why.reason, why.instead, ""


class Given:
    """An option of the command line with its argument; *parts* are the rows of what was refused inside the argument."""

    __slots__ = ("option", "parts", "row", "typed", "value")

    def __init__(self, option: Option, typed: str, value: str = "") -> None:
        self.option = option
        self.typed = typed
        self.value = value
        self.parts: list[Row] = []
        self.row = Row(f"{typed} {value}" if option.argument else typed, ALLOWED, page=option.page)

    @property
    def refused(self) -> bool:
        return self.row.refused or bool(self.parts)

    def rows(self) -> list[Row]:
        """The option's own row, unless all there was to say is what was refused inside."""
        return [*([] if self.parts and not self.row.refused and not self.row.became else [self.row]), *self.parts]

    def refuse_part(self, part: str, reason: str = "", instead: str = "", kind: str = DENIED) -> None:
        option = {"-M": "-machine", "-nic": "-netdev", "-net": "-netdev"}.get(self.option.name, self.option.name)
        known = PARTS.get((option, part.partition("=")[0]), (self.option.reason, self.option.instead))
        row = Row(f"{self.typed} …{part}", kind, page=self.option.page)
        row.refuse(Refused(reason or known[0], instead or known[1], kind))
        self.parts.append(row)

    def properties(self, first: str, known: tuple[str, ...], many: tuple[str, ...] = ()) -> list[tuple[str, str]]:
        """The `name=value` parts that are *known*; the others have their rows. A first part without `=` belongs to *first*.

        QEMU reads a doubled comma as a comma inside a value: the one way to smuggle an option into a name, so there is none here.
        """
        if self.value.startswith(("{", "json:")):
            raise Refused("options written as JSON are not read here", f"the form with commas, {self.option.instead}")
        found: list[tuple[str, str]] = []
        for index, part in enumerate(self.value.split(",")):
            if not part:
                raise Refused("there is a comma too many", "one comma between two parts; none inside a name")
            name, equals, value = part.partition("=")
            if not equals:
                name, value = (first, part) if index == 0 and first else (part, "on")
            if name not in known:
                self.refuse_part(part)
            elif name not in many and any(name == before for before, _ in found):
                self.refuse_part(part, "it stands there twice", "say it once")
            else:
                found.append((name, value))
        return found


def on_off(name: str, value: str) -> bool:
    if value not in ("on", "off", "yes", "no", "true", "false"):
        raise Refused(f"{name} is neither on nor off", f"{name}=on")
    return value in ("on", "yes", "true")


def number(name: str, value: str, most: int) -> int:
    if not (value.isascii() and value.isdigit() and len(value) <= 9) or int(value) > most:
        raise Refused(f"{name}={value} is no number from 0 to {most}")
    return int(value)


def identifier(value: str) -> str:
    """What `-drive id=` and its like are called by others."""
    if not 0 < len(value) <= 60 or value[:1] not in LETTERS or not (LETTERS | DIGITS | frozenset("._-")).issuperset(value):
        raise Refused(f"{value or 'nothing'} is no identifier", "letters and digits, starting with a letter")
    return value


def checked(key: Key, value: object, name: str = "") -> object:
    """*value* as it stands in a table, if the key takes it."""
    try:
        key.kind.check(value, name or key.name)
    except VmshellError as exc:
        raise Refused(exc.sentence(), exc.advice()) from None
    return value


def object_ref(word: str, resolve: Callable[[str], str], *, images: bool = False) -> str:
    """The object that a word stands for where QEMU would have opened a file of that name.

    Everything that QEMU reads as more than a name ends here: commas, protocols, JSON, folders, descriptors. What is already a
    reference (`shelf:root`) stays what it is; a name alone is *resolve*'s.
    """
    keep = "`put shelf.NAME` makes an object of a file, and shelf:NAME is what it is called here"
    if word == "":
        raise Refused("no file is named", keep)
    if "," in word:
        raise Refused("a comma in a file's name starts another of QEMU's options", keep)
    if word.startswith("{"):
        raise Refused("a file's name cannot be JSON", keep)
    origin, colon, name = word.partition(":")
    if colon and origin not in ORIGINS:
        raise Refused(f"{origin}: is one of QEMU's protocols, which open other things than files", keep)
    if "/" in word or ".." in word:
        raise Refused("it is a path of the host, and only objects are opened", keep)
    if colon and origin == "image" and not images:
        raise Refused("an image is copied, not used itself", f"`new NAME --image {name}`")
    if not is_object_name(name if colon else word):
        raise Refused(OBJECT_RULE, keep)
    if colon:
        return word
    try:
        return resolve(word)
    except VmshellError as exc:
        raise Refused(exc.sentence(), exc.advice()) from None


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(shown(item) for item in value)
    if isinstance(value, dict):
        return ",".join(str(item) for item in value.values())
    return str(value)


def entry_text(device: str, entry: dict[str, object]) -> str:
    """`disk0: path=shelf:root bus=ide`"""
    return f"{device}: " + (" ".join(f"{name}={shown(value)}" for name, value in entry.items()) or "empty")


class Draft:
    """The definition as far as it is read."""

    def __init__(self, resolve: Callable[[str], str]) -> None:
        self.resolve = resolve
        self.values: dict[str, object] = {}
        self.sources: dict[str, str] = {}
        self.broken = False  # an option was refused, and what others refer to may be missing

    def put(self, given: Given, key: str, value: object) -> None:
        """Set a key once; a second option that says something else is refused, whichever QEMU would have listened to."""
        checked(KEYS[key], value)
        if key in self.values and self.values[key] != value:
            raise Refused(f"{self.sources[key]} already said otherwise", "say it once")
        self.values[key] = value
        self.sources[key] = given.row.option
        became = f"{key}={shown(value)}"
        given.row.became = f"{given.row.became} {became}".strip()

    def attempt(self, given: Given, act: Callable[[], object]) -> None:
        """Run one step for an option; its refusal ends up in the option's row."""
        if given.row.refused:
            return
        try:
            act()
        except Refused as why:
            if not (self.broken and isinstance(why, Missing)):
                given.row.refuse(why)

    @property
    def family(self) -> str:
        return "q35" if "q35" in str(self.values.get("machine.type", "pc")) else "pc"
