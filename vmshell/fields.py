"""How every message between our processes is made of fields, each with its type and range.

A message class lists its fields once; building one, from keywords or from a packet, checks each of them, refuses unknown ones
and fills in defaults. Nothing else in the program touches a packet's raw keys. (No `dataclasses`: importing it costs a login
more than everything else here together.)
Runs in: every process. Stdlib only, no I/O at import.
"""

from __future__ import annotations

from .encoding import INT_MAX
from .errors import BadValue, ProtocolError, safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Self, TypeVar, dataclass_transform

    T = TypeVar("T")
    M = TypeVar("M", bound="Message")
else:

    def dataclass_transform(**_):
        return lambda cls: cls


_REQUIRED = object()


class Field:
    """One field: how a value is checked, and what it is when absent."""

    __slots__ = ("check", "default")

    def __init__(self, check: Callable[[object, str], object], default: object) -> None:
        self.check = check
        self.default = default


def field(check: Callable[[object, str], T], *, default: Any = _REQUIRED) -> Any:
    """Declare a field whose values *check(value, field_name)* returns or refuses with BadValue or BadName."""
    return Field(check, default)


def bad(name: str, value: object, rule: str) -> BadValue:
    return BadValue(field=name, value=safe(repr(value), 60), rule=rule)


def integer(low: int, high: int) -> Callable[[object, str], int]:
    def check(value: object, name: str) -> int:
        # `type(...) is int`: True is an int to isinstance, and a quota is no place for it.
        if type(value) is not int or not low <= value <= high:
            raise bad(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def text(limit: int) -> Callable[[object, str], str]:
    def check(value: object, name: str) -> str:
        if not isinstance(value, str) or len(value) > limit:
            raise bad(name, value, f"text of at most {limit} characters")
        return value

    return check


def boolean(value: object, name: str) -> bool:
    if type(value) is not bool:
        raise bad(name, value, "true or false")
    return value


def choice(*allowed: str) -> Callable[[object, str], str]:
    def check(value: object, name: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise bad(name, value, f"one of {', '.join(allowed)}")
        return value

    return check


def optional(check: Callable[[object, str], T]) -> Callable[[object, str], T | None]:
    """None, or what *check* lets through."""
    return lambda value, name: None if value is None else check(value, name)


def listing(check: Callable[[object, str], T], most: int) -> Callable[[object, str], tuple[T, ...]]:
    """At most *most* values that *check* lets through."""

    def check_all(value: object, name: str) -> tuple[T, ...]:
        if not isinstance(value, list | tuple) or len(value) > most:
            raise bad(name, value, f"a list of at most {most}")
        return tuple(check(item, name) for item in value)

    return check_all


def row(*checks: Callable[[object, str], object]) -> Callable[[object, str], tuple[object, ...]]:
    """As many values as there are *checks*, each for its own."""

    def check_all(value: object, name: str) -> tuple[object, ...]:
        if not isinstance(value, list | tuple) or len(value) != len(checks):
            raise bad(name, value, f"a list of {len(checks)}")
        return tuple(check(item, name) for check, item in zip(checks, value, strict=True))

    return check_all


def nested(kind: type[M]) -> Callable[[object, str], M]:
    """A message of *kind*, or the table that it is made of."""
    return lambda value, name: value if isinstance(value, kind) else kind(**table(value, name))


def table(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise bad(name, value, "a table")
    return value


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class Message:
    """The base: subclasses set `verb`, by which they are known, and declare fields with `field()`."""

    verb = ""
    fds = 0  # how many descriptors come beside it
    fields: dict[str, Field] = {}

    def __init_subclass__(cls) -> None:
        own = {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        cls.fields = {**cls.fields, **own}
        for name in own:
            delattr(cls, name)

    def __init__(self, /, **values: object) -> None:
        for name, spec in self.fields.items():
            if name in values:
                setattr(self, name, spec.check(values.pop(name), name))
            elif spec.default is _REQUIRED:
                raise BadValue(field=name, value="missing", rule=f"{self.verb} needs it")
            else:
                setattr(self, name, spec.default)
        if values:
            raise BadValue(field=safe(sorted(values)[0], 40), value="not expected", rule=f"{self.verb} has no such field")
        self.agree()

    def agree(self) -> None:
        """Raise BadValue where fields contradict each other; none do, unless a subclass says otherwise."""

    @classmethod
    def from_body(cls, body: dict[str, object]) -> Self:
        """Build the message from a packet's object, without its envelope."""
        return cls(**{key: value for key, value in body.items() if key not in ("id", "verb")})

    def to_body(self) -> dict[str, object]:
        """The message as a packet's object: defaults left out."""
        body: dict[str, object] = {"verb": self.verb}
        for name, spec in self.fields.items():
            value = getattr(self, name)
            if spec.default is _REQUIRED or value != spec.default:
                body[name] = value
        return body

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.fields)})"


def parsed(body: dict[str, object], kinds: Mapping[str, type[M]], service: str) -> M:
    """The message of one of *kinds*, which are known by their verbs; raises ProtocolError, BadValue or BadName."""
    verb = body.get("verb")
    kind = kinds.get(verb) if isinstance(verb, str) else None
    if kind is None:
        raise ProtocolError(problem=f"{service} has no such verb")
    return kind.from_body(body)


def request_id(body: dict[str, object]) -> int:
    """The number that ties a reply to its request."""
    return integer(0, INT_MAX)(body.get("id", 0), "id")
