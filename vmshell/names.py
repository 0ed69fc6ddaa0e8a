"""Names and sizes as people type them, and everything that follows from a VM's number.

Parsers return the value or raise `BadName`/`BadValue` saying which rule was broken. No `re`: a closed set of ASCII
characters needs none, and it would be the dearest import of a login.
Runs in: every process. Stdlib only, no I/O at import.
"""

from __future__ import annotations

from .errors import BadValue, safe
from .refusals import BadName

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

LOWER = frozenset("abcdefghijklmnopqrstuvwxyz")
NAME_CHARS = LOWER | frozenset("0123456789-")
NAME_MAX = 31
NAME_RULE = f"names are 1 to {NAME_MAX} of a-z, 0-9 and '-', starting with a letter"

LETTERS = LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
DIGITS = frozenset("0123456789")
OBJECT_CHARS = LETTERS | DIGITS | frozenset("._+-")
OBJECT_MAX = 64
OBJECT_RULE = f"objects have names of 1 to {OBJECT_MAX} letters, digits and . _ + -, starting with a letter or digit"

INTERFACE_CHARS = LETTERS | DIGITS | frozenset("._-")
INTERFACE_MAX = 15
INTERFACE_RULE = f"a network interface's name is 1 to {INTERFACE_MAX} letters, digits and . _ -, starting with a letter or digit"


MIB = 1 << 20

_UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}


def check_name(value: object, what: str = "VM") -> str:
    """Return *value* if it is a name (rule R24: ASCII, lower case, 1..31 characters), else raise BadName."""
    if not isinstance(value, str) or not value or value[0] not in LOWER or not NAME_CHARS.issuperset(value):
        raise BadName(what=what, value=safe(value, 40), rule=NAME_RULE)
    if len(value) > NAME_MAX:
        raise BadName(what=what, value=safe(value, 40), rule=f"it has {len(value)} characters; {NAME_RULE}")
    return value


def is_object_name(text: str) -> bool:
    return 0 < len(text) <= OBJECT_MAX and text[0] in LETTERS | DIGITS and OBJECT_CHARS.issuperset(text)


def check_object(value: object) -> str:
    """Return *value* if it is the name of an object (a disk, an ISO, a kernel of a VM's own), else raise BadName."""
    if not isinstance(value, str) or not is_object_name(value):
        raise BadName(what="object", value=safe(value, 40), rule=OBJECT_RULE)
    return value


def check_vm_ref(value: object) -> str:
    """Return *value* if it is `name` or `owner/name`; the owner is any account name without `/` or control characters."""
    if isinstance(value, str) and "/" in value:
        owner, _, name = value.partition("/")
        if not owner or len(owner) > 64 or not owner.isascii() or not owner.isprintable() or " " in owner:
            raise BadName(what="owner", value=safe(owner, 40), rule="an account name of this host")
        return f"{owner}/{check_name(name)}"
    return check_name(value)


def parse_size(text: object, field: str = "size") -> int:
    """Return the bytes meant by *text*: a whole number with an optional K, M, G or T (powers of 1024; `1G`, `512M`, `512MiB`)."""
    rule = "a whole number with K, M, G or T, like 512M or 2G"
    if not isinstance(text, str) or not text or len(text) > 20 or not text.isascii():
        raise BadValue(field=field, value=safe(text, 40), rule=rule)
    digits = text.rstrip("KMGTkmgtiB")
    unit = text[len(digits) :].upper().removesuffix("IB").removesuffix("B")
    if not digits.isdigit() or unit not in _UNITS:
        raise BadValue(field=field, value=safe(text, 40), rule=rule)
    return int(digits) * _UNITS[unit]


def format_size(size: int) -> str:
    """Return *size* bytes in the largest unit that keeps it whole or within 1 %: `512M`, `1G`, `1.5G`."""
    for unit in "TGMK":
        scale = _UNITS[unit]
        if size >= scale:
            whole = f"{size / scale:.1f}".removesuffix(".0")
            return f"{whole}{unit}"
    return str(size)


def is_interface(name: str) -> bool:
    """May this be the name of a network interface? The kernel cuts what is longer, and takes `%d` for a template (E25)."""
    return 0 < len(name) <= INTERFACE_MAX and name[0] in LETTERS | DIGITS and INTERFACE_CHARS.issuperset(name)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """The candidate a slip of the fingers away from *word*, or an empty string."""
    best, best_distance = "", 3
    for candidate in candidates:
        distance = _distance(word[:40], candidate)
        if distance < best_distance and distance <= max(1, len(candidate) // 3):
            best, best_distance = candidate, distance
    return best


def _distance(left: str, right: str) -> int:
    """Edits between two words; two neighbours changed over count as one (`lsit` is one edit from `list`)."""
    if abs(len(left) - len(right)) > 2:
        return 9
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, before = before, row
        row = [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
