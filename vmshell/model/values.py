"""Kinds of values that stand in a definition: how each is checked, read from a word, and written back.

A kind has three functions: `check(value, key)` takes what TOML gave and returns the typed value or raises BadValue naming key,
value, what is allowed and the nearest allowed; `read(text)` makes of a word like `8G` or `disk0,net0` what TOML would have given;
`raw(value)` is the way back.
Used by: broker, shell, admin, tapnet, dnsmasq. Pure.
"""

from __future__ import annotations

from ..errors import BadValue, VmshellError, safe
from ..names import DIGITS, LETTERS, MIB, OBJECT_RULE, check_name, format_size, is_object_name, nearest, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def bad(key: str, value: object, rule: str) -> BadValue:
    shown = safe(value, 60) if isinstance(value, str) and value else safe(repr(value), 60)
    return BadValue(field=key, value=shown, rule=rule)


def with_nearest(rule: str, word: str) -> str:
    return f"{rule}; nearest is {word}" if word else rule


class Kind:
    """The base, for values that look alike in TOML, in memory and as a word."""

    metavar = "VALUE"

    def check(self, value: object, key: str) -> object:
        raise NotImplementedError

    def read(self, text: str) -> object:
        return text

    def raw(self, value: object) -> object:
        return value

    def words(self) -> tuple[str, ...]:
        """All there is to choose from, where that is a closed list (completion offers it)."""
        return ()


class Bool(Kind):
    metavar = "true|false"

    def check(self, value: object, key: str) -> bool:
        if type(value) is not bool:
            raise bad(key, value, "true or false")
        return value

    def read(self, text: str) -> object:
        low = text.lower()
        return True if low in TRUE else False if low in FALSE else text

    def words(self) -> tuple[str, ...]:
        return ("true", "false")


class Int(Kind):
    metavar = "N"

    def __init__(self, low: int, high: int) -> None:
        self.low = low
        self.high = high

    def check(self, value: object, key: str) -> int:
        # `type(...) is int`: True is an int to isinstance, and a quota is no place for it.
        if type(value) is not int or not self.low <= value <= self.high:
            near = str(min(max(value, self.low), self.high)) if type(value) is int else ""
            raise bad(key, value, with_nearest(f"a whole number from {self.low} to {self.high}", near))
        return value

    def read(self, text: str) -> object:
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else text


class Size(Kind):
    """A text like `512M` or `2G`; in memory whole units of *unit* bytes."""

    metavar = "SIZE"

    def __init__(self, low: int, high: int, unit: int = MIB) -> None:
        self.low = low
        self.high = high
        self.unit = unit

    def check(self, value: object, key: str) -> int:
        low, high = format_size(self.low * self.unit), format_size(self.high * self.unit)
        what = "whole MiB" if self.unit == MIB else "a multiple of 512 bytes"
        rule = f"{what} from {low} to {high}, written like 512M or 2G"
        try:
            size = parse_size(value, key)
        except VmshellError:
            raise bad(key, value, rule) from None
        if not self.low * self.unit <= size <= self.high * self.unit:
            raise bad(key, value, with_nearest(rule, low if size < self.low * self.unit else high))
        if size % (self.unit if self.unit > 1 else 512):
            whole = self.unit if self.unit > 1 else 512
            raise bad(key, value, with_nearest(rule, _exact(-(-size // whole) * whole)))
        return size // self.unit

    def raw(self, value: object) -> object:
        assert isinstance(value, int)
        return _exact(value * self.unit)


def _exact(size: int) -> str:
    """*size* bytes in the largest unit that keeps them whole: `1536M`, never `1.5G`, which would not be read again."""
    for power, unit in ((40, "T"), (30, "G"), (20, "M"), (10, "K")):
        if size and size % (1 << power) == 0:
            return f"{size >> power}{unit}"
    return str(size)


class Choice(Kind):
    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed
        self.metavar = "|".join(allowed) if len(allowed) <= 6 else "NAME"

    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or value not in self.allowed:
            near = nearest(value, self.allowed) if isinstance(value, str) else ""
            raise bad(key, value, with_nearest(f"one of {', '.join(self.allowed)}", near))
        return value

    def words(self) -> tuple[str, ...]:
        return self.allowed


class Text(Kind):
    """Free text of one line; the only values that may hold what a person likes."""

    metavar = "TEXT"

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def check(self, value: object, key: str) -> str:
        rule = f"one line of at most {self.limit} bytes without control characters"
        if not isinstance(value, str) or not value.isprintable():
            # isprintable also refuses lone surrogates and the marks that turn text around.
            raise bad(key, value, rule)
        if len(value.encode("utf-8")) > self.limit:
            raise bad(key, f"{value[:20]}…", f"{rule}; it has {len(value.encode('utf-8'))}")
        return value


class Catalogued(Kind):
    """A name from one of the administrator's lists; which names there are is the policy's to say."""

    metavar = "NAME"

    def __init__(self, what: str) -> None:
        self.what = what

    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not is_object_name(value):
            raise bad(key, value, f"the name of a {self.what}")
        return value


class Name(Kind):
    metavar = "NAME"

    def __init__(self, what: str) -> None:
        self.what = what

    def check(self, value: object, key: str) -> str:
        return check_name(value, self.what) if value != "" else ""


class Machine(Kind):
    """`q35`, `pc`, or one of their versions, which is what creation pins them to (`pc-q35-7.2`)."""

    metavar = "q35|pc"
    prefixes = {"pc-q35-": "q35", "pc-i440fx-": "pc"}

    def check(self, value: object, key: str) -> str:
        if isinstance(value, str) and (value in ("q35", "pc") or self._pinned(value)):
            return value
        near = nearest(value, ("q35", "pc")) if isinstance(value, str) else ""
        raise bad(key, value, with_nearest("q35 or pc, or a version of these like pc-q35-7.2", near))

    def _pinned(self, value: str) -> bool:
        for prefix in self.prefixes:
            parts = value.removeprefix(prefix).split(".")
            if value.startswith(prefix) and len(parts) == 2 and all(_short_number(part) for part in parts):
                return True
        return False

    def words(self) -> tuple[str, ...]:
        return ("q35", "pc")


def _short_number(text: str) -> bool:
    return 1 <= len(text) <= 2 and DIGITS.issuperset(text)


class Ref(Kind):
    """The name of an object: `root` (this VM's own), or `shelf:x`, `library:x`, `image:x` where *origins* has them."""

    metavar = "OBJECT"

    def __init__(self, *origins: str) -> None:
        self.origins = origins

    def check(self, value: object, key: str) -> str:
        if value == "":
            return ""
        shapes = [f"{origin}:NAME" if origin else "NAME" for origin in self.origins]
        rule = f"an object, {' or '.join(shapes)}; {OBJECT_RULE}"
        if not isinstance(value, str):
            raise bad(key, value, rule)
        origin, name = split_ref(value)
        if origin not in self.origins or not is_object_name(name):
            raise bad(key, value, rule)
        return check_ref_image(value, name) if origin == "image" else value


def check_ref_image(ref: str, name: str) -> str:
    check_name(name, "image")
    return ref


def split_ref(ref: str) -> tuple[str, str]:
    """`shelf:x` as ("shelf", "x"); an object of the VM itself has the origin ""."""
    origin, colon, name = ref.partition(":")
    return (origin, name) if colon else ("", ref)


class Tag(Kind):
    """A snapshot's name."""

    metavar = "TAG"

    def check(self, value: object, key: str) -> str:
        chars = LETTERS | DIGITS | frozenset("._-")
        if value == "":
            return ""
        if not isinstance(value, str) or len(value) > 63 or value[0] not in LETTERS or not chars.issuperset(value):
            raise bad(key, value, "a snapshot's name: 1 to 63 letters, digits and . _ -, starting with a letter")
        return value


class Device(Kind):
    """`disk0`, `cdrom1`, `floppy0`, `net2`; whether the VM has it is seen when the whole definition is there."""

    metavar = "DEVICE"

    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or split_device(value) is None:
            raise bad(key, value, "a device of this VM: disk0, cdrom0, floppy0, net0 and so on")
        return value


DEVICE_TYPES = ("disk", "cdrom", "floppy", "net")


def split_device(text: str) -> tuple[str, int] | None:
    """`disk0` as ("disk", 0), or None."""
    stem = text.rstrip("0123456789")
    digits = text[len(stem) :]
    if stem not in DEVICE_TYPES or not digits.isascii() or not 1 <= len(digits) <= 2 or str(int(digits)) != digits:
        return None
    return stem, int(digits)


class Mac(Kind):
    metavar = "MAC"

    def check(self, value: object, key: str) -> str:
        if value == "":
            return ""
        octets = value.lower().split(":") if isinstance(value, str) and value.isascii() else []
        if len(octets) != 6 or any(len(octet) != 2 or octet.strip("0123456789abcdef") for octet in octets):
            raise bad(key, value, "six octets of two hexadecimal digits, like 06:00:00:00:00:2a")
        if int(octets[0], 16) & 1 or set(octets) == {"00"}:
            raise bad(key, value, "the address of one interface: neither a group's nor all zero")
        return ":".join(octets)


class ListOf(Kind):
    def __init__(self, kind: Kind, most: int) -> None:
        self.kind = kind
        self.most = most
        self.metavar = f"{kind.metavar},…"

    def check(self, value: object, key: str) -> tuple[object, ...]:
        if not isinstance(value, list | tuple) or len(value) > self.most:
            raise bad(key, value, f"a list of at most {self.most}")
        found = tuple(self.kind.check(item, key) for item in value)
        twice = next((item for index, item in enumerate(found) if item in found[:index]), None)
        if twice is not None:
            raise bad(key, self.kind.raw(twice), "each only once")
        return found

    def read(self, text: str) -> object:
        inner = text.removeprefix("[").removesuffix("]")
        return [self.kind.read(word.strip().strip("'\"")) for word in inner.split(",")] if inner.strip() else []

    def raw(self, value: object) -> object:
        assert isinstance(value, tuple)
        return [self.kind.raw(item) for item in value]


class Table(Kind):
    """An inline table of closed fields; *build* makes the typed value of them. As a word: the fields in order, by commas."""

    def __init__(self, fields: dict[str, Kind], optional: Iterable[str], build: type) -> None:
        self.fields = fields
        self.optional = tuple(optional)
        self.build = build
        self.metavar = ",".join(name.upper() for name in fields)

    def check(self, value: object, key: str) -> object:
        if value is None or value == "":
            return None
        names = ", ".join(self.fields)
        if not isinstance(value, dict):
            raise bad(key, value, f"a table of {names}, like {{ {', '.join(f'{name} = …' for name in self.fields)} }}")
        unknown = sorted(set(value) - set(self.fields), key=str)
        if unknown:
            raise bad(f"{key}.{safe(unknown[0], 40)}", value[unknown[0]], with_nearest(f"its keys are {names}", ""))
        missing = [name for name in self.fields if name not in value and name not in self.optional]
        if missing:
            raise bad(key, value, f"{missing[0]} is missing; its keys are {names}")
        return self.build(**{name: self.fields[name].check(item, f"{key}.{name}") for name, item in value.items()})

    def read(self, text: str) -> object:
        words = text.split(",")
        if not text or len(words) > len(self.fields):
            return text
        return {name: kind.read(word) for (name, kind), word in zip(self.fields.items(), words, strict=False)}

    def raw(self, value: object) -> object:
        return {name: kind.raw(getattr(value, name)) for name, kind in self.fields.items()}


class Port(Kind):
    """A forward, `tcp:2222:22`; *build* makes the typed value."""

    metavar = "tcp|udp:HOSTPORT:GUESTPORT"

    def __init__(self, build: type) -> None:
        self.build = build

    def check(self, value: object, key: str) -> object:
        parts = value.split(":") if isinstance(value, str) else []
        if len(parts) == 3 and parts[0] in ("tcp", "udp"):
            ports = [int(part) for part in parts[1:] if part.isascii() and part.isdigit() and len(part) <= 5]
            # Below 1024 only root listens, and no QEMU is root.
            if len(ports) == 2 and 1024 <= ports[0] <= 65535 and 1 <= ports[1] <= 65535:
                return self.build(parts[0], *ports)
        raise bad(key, value, "tcp:HOSTPORT:GUESTPORT or udp:HOSTPORT:GUESTPORT, host ports from 1024, guest ports from 1")

    def raw(self, value: object) -> object:
        return str(value)
