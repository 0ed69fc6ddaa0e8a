"""What a word of a request may be: one function for each kind of value that the table of verbs names.

Each returns the value, or raises BadValue or BadName with the rule that was broken.
Runs in: the shell. Pure functions.
"""

from __future__ import annotations

from ...errors import BadValue, safe
from ...names import DIGITS, LETTERS, MIB, check_name, check_object, check_vm_ref, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LOGIN_CHARS = LETTERS | DIGITS | frozenset("._-")


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise BadValue(field=name, value=safe(text, 40), rule="a whole number")
    return int(text)


def _seconds(text: str, name: str) -> int:
    number = _number(text.removesuffix("s"), name)
    if not 1 <= number <= 3600:
        raise BadValue(field=name, value=safe(text, 40), rule="seconds from 1 to 3600")
    return number


def _mebibytes(text: str, name: str) -> int:
    size = parse_size(text, name)
    if size % MIB:
        raise BadValue(field=name, value=safe(text, 40), rule="whole mebibytes, like 512M or 2G")
    return size // MIB


def escape_key(text: str, name: str = "--escape") -> int:
    """The byte of `^X` (or of that very control character)."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return ord(text[1].upper()) & 0x1F
    if len(text) == 1 and text < " ":
        return ord(text)
    raise BadValue(field=name, value=safe(text, 40), rule="a control key like ^A or ^]")


def _vm(text: str, name: str) -> str:
    return check_vm_ref(text)


def _new_vm(text: str, name: str) -> str:
    return check_name(text)


def _image(text: str, name: str) -> str:
    return check_name(text, "image")


def _text(text: str, name: str) -> str:
    return text


def _assignment(text: str, name: str) -> str:
    if not text.partition("=")[1]:
        raise BadValue(field=safe(text, 60), value="a key alone", rule="KEY=VALUE, like memory=1G")
    return text


def split_object(text: str) -> tuple[str, str]:
    """`web1.kernel` as VM (or `shelf`) and object; the VM's part may have its owner before it."""
    where, dot, name = text.partition(".")
    if not dot:
        raise BadValue(field="OBJECT", value=safe(text, 60), rule="VM.OBJECT or shelf.OBJECT, like web1.kernel")
    return check_vm_ref(where), check_object(name)


def _object(text: str, name: str) -> str:
    split_object(text)
    return text


def _vm_or_object(text: str, name: str) -> str:
    return _object(text, name) if "." in text else check_vm_ref(text)


def _object_name(text: str, name: str) -> str:
    return check_object(text)


def _add(text: str, name: str) -> str:
    if text != "add":
        raise BadValue(field="disk", value=safe(text, 40), rule="`disk add NAME OBJECT --size SIZE` is what there is")
    return text


def _dash(text: str, name: str) -> str:
    if text != "-":
        raise BadValue(field=name, value=safe(text, 40), rule="-, which is standard input; vmshell opens no files")
    return text


def _in_range(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise BadValue(field=name, value=safe(text, 40), rule="a port is a number from 1 to 65535")
    return int(text)


def split_port(text: str, name: str = "PORT") -> tuple[int, str]:
    """`80`, `80/tcp` or `53/udp` as number and protocol."""
    number, slash, proto = text.partition("/")
    if slash and proto not in ("tcp", "udp"):
        raise BadValue(field=name, value=safe(text, 40), rule="a port is written 80, 80/tcp or 53/udp")
    return _in_range(number, name), proto or "tcp"


def _port(text: str, name: str) -> str:
    split_port(text)
    return text


def split_place(text: str) -> tuple[str, int]:
    """`web1:22` as VM and port; port 0 for a VM alone."""
    vm, colon, port = text.rpartition(":")
    if not colon or "/" in port:  # an owner's name may hold a colon
        return check_vm_ref(text), 0
    return check_vm_ref(vm), _in_range(port, "PORT")


def _place(text: str, name: str) -> str:
    split_place(text)
    return text


def _tcp_port(text: str, name: str) -> int:
    return _in_range(text, "PORT")


def split_grantee(text: str) -> tuple[str, int]:
    """`bob`, `@staff`, `world` or `world:8080` as whom a port is for and the host's port, 0 if none was said."""
    to, colon, port = text.partition(":")
    account = to.removeprefix("@")
    good = 0 < len(account) <= 64 and account.isascii() and account.isprintable() and not set(" /@") & set(account)
    if not good or account.startswith("-"):
        raise BadValue(field="--to", value=safe(text, 60), rule="USER, @GROUP or world[:HOSTPORT] is what it may be")
    if colon and to != "world":
        raise BadValue(field="--to", value=safe(text, 60), rule="only the world comes by a port of the host, as in world:8080")
    return to, _in_range(port, "HOSTPORT") if colon else 0


def _grantee(text: str, name: str) -> str:
    split_grantee(text)
    return text


def _login(text: str, name: str) -> str:
    # It becomes an argument of ssh: nothing in it may look like an option, nor mean anything to a shell (A38).
    if not (0 < len(text) <= 64 and text[0] in LETTERS | DIGITS | {"_"} and LOGIN_CHARS.issuperset(text)):
        raise BadValue(field="USER", value=safe(text, 40), rule="a login has letters, digits and . _ -, no . or - first")
    return text


def split_login(text: str) -> tuple[str, str]:
    """`root@web1` as user and VM; no user for a VM alone."""
    user, at, vm = text.rpartition("@")
    return _login(user, "USER") if at else "", check_vm_ref(vm)


def _login_at(text: str, name: str) -> str:
    split_login(text)
    return text


CHECKS: dict[str, Callable[[str, str], object]] = {
    "vm": _vm,
    "new-vm": _new_vm,
    "image": _image,
    "number": _number,
    "seconds": _seconds,
    "mebibytes": _mebibytes,
    "key": escape_key,
    "assignment": _assignment,
    "object": _object,
    "object-name": _object_name,
    "vm-or-object": _vm_or_object,
    "add": _add,
    "dash": _dash,
    "text": _text,
    "port": _port,
    "tcp-port": _tcp_port,
    "place": _place,
    "grantee": _grantee,
    "login": _login,
    "login-at": _login_at,
}
