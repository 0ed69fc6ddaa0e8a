"""Kinds of values that stand in `policy.toml` and in no definition. As in values.py: `check` returns the typed value or raises.

Used by: broker, shell, admin, tapnet, dnsmasq. Pure.
"""

from __future__ import annotations

import ipaddress

from ..errors import BadValue, safe
from ..names import DIGITS, INTERFACE_RULE, LOWER, NAME_CHARS, is_interface, is_object_name, nearest
from .keys import KEYS, SECTIONS
from .values import Choice, Kind, ListOf, bad

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Each with what has it, as a refusal names it, and what to take instead.
FEATURES = {
    "floppy": ("a floppy drive", "disks and CD drives"),
    "cdrom": ("a CD drive", "disks"),
    "option_rom": ("an option ROM", "boot.option_rom = []"),
    "kernel": ("a kernel of one's own", "boot.kernel = image:NAME, or booting from a disk"),
    "restore": ("going on from a saved state", "boot.restore left out"),
    "snapshot": ("a disk whose changes are thrown away", "snapshot = false"),
    "vnc": ("a screen", "display.type = none"),
    "agent": ("a port for the guest agent", "agent = false"),
    "usb-storage": ("a disk on usb", "bus = virtio"),
    "scsi": ("a disk on scsi", "bus = virtio; a CD drive without a bus"),
    "uefi": ("UEFI firmware", "machine.firmware = bios"),
    "forward": ("a forwarded port", "net.forward = []"),
    "geometry": ("a geometry of one's own", "geometry left out"),
}

# Addresses that no card can have: this network, loopback, link-local, multicast and beyond.
NO_POOL4 = tuple(ipaddress.IPv4Network(net) for net in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3"))
POOL6 = (ipaddress.IPv6Network("fc00::/7"), ipaddress.IPv6Network("2000::/3"))  # unique local, and global

FIRST_CONFINED = 1000  # below it are root and services, whose sockets are nobody's to confine
HEX = DIGITS | frozenset("abcdef")


class Octets(Kind):
    """The beginning of a MAC address, `06` or `06:00:5e`, or nothing."""

    metavar = "OCTETS"

    def check(self, value: object, key: str) -> str:
        if value == "":
            return ""
        octets = value.lower().split(":") if isinstance(value, str) and value.isascii() else []
        if not 1 <= len(octets) <= 5 or any(len(octet) != 2 or not HEX.issuperset(octet) for octet in octets):
            raise bad(key, value, 'text of 1 to 5 octets of two hexadecimal digits, like "06" or "06:00:5e"; "" allows none')
        if int(octets[0], 16) & 1:
            near = f"{int(octets[0], 16) - 1:02x}"
            raise bad(key, value, f"the address of one interface, with an even first octet; nearest is {near}")
        return ":".join(octets)


class PortRange(Kind):
    """`LOW-HIGH`, or nothing."""

    metavar = "LOW-HIGH"

    def check(self, value: object, key: str) -> str:
        if value == "":
            return ""
        ports = port_range(value) if isinstance(value, str) else range(0)
        if not ports:
            raise bad(key, value, 'text LOW-HIGH, ports from 1 to 65535, like "20000-20999"; "" allows none')
        return f"{ports.start}-{ports.stop - 1}"


def port_range(text: str) -> range:
    """The ports of `LOW-HIGH`; none if it is anything else."""
    low, _, high = text.partition("-")
    if not all(0 < len(port) <= 5 and DIGITS.issuperset(port) for port in (low, high)):
        return range(0)
    return range(int(low), int(high) + 1) if 1 <= int(low) <= int(high) <= 65535 else range(0)


class _Name(Kind):
    def __init__(self, what: str) -> None:
        self.what = what

    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or (value != "*" and not is_object_name(value)):
            raise bad(key, value, f'a list of names of {self.what}s; "*" is all of them')
        return value


class Names(Kind):
    """An allow-list of names in a catalogue. Whether the catalogue has them is for the whole policy to say."""

    metavar = "[NAME, …]"

    def __init__(self, what: str) -> None:
        self.what = what
        self._list = ListOf(_Name(what), 256)

    def check(self, value: object, key: str) -> tuple[str, ...]:
        names = _texts(self._list.check(value, key))
        return ("*",) if "*" in names else names


class _Option(Kind):
    def check(self, value: object, key: str) -> str:
        word = value.removeprefix("-") if isinstance(value, str) else ""
        if value != "*" and (not 0 < len(word) <= 32 or not (LOWER | DIGITS | {"-"}).issuperset(word) or word[0] == "-"):
            raise bad(key, value, 'a list of options like "-hda"; "*" is all of them')
        return "*" if value == "*" else f"-{word}"


class Options(Kind):
    """QEMU's own options; None: every one that is known."""

    metavar = "[OPTION, …]"

    def check(self, value: object, key: str) -> tuple[str, ...] | None:
        options = _texts(ListOf(_Option(), 256).check(value, key))
        return None if "*" in options else options

    def raw(self, value: object) -> object:
        return ["*"] if value is None else value


class Features(Kind):
    metavar = "[FEATURE, …]"

    def check(self, value: object, key: str) -> tuple[str, ...]:
        features = _texts(ListOf(Choice(*FEATURES), len(FEATURES)).check(value, key))
        return tuple(feature for feature in FEATURES if feature in features)

    def words(self) -> tuple[str, ...]:
        return tuple(FEATURES)


def _texts(items: tuple[object, ...]) -> tuple[str, ...]:
    return tuple(str(item) for item in items)


class Fixed(Kind):
    """Values by the keys of a definition, `"memory.size" = "196M"`; without quotes TOML makes two tables of it: just as good."""

    metavar = "{ KEY = VALUE, … }"

    def check(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise bad(key, value, 'a table of keys of a VM\'s definition, like { "memory.size" = "196M" }')
        found: dict[str, Any] = {}
        for name, item in value.items():
            inner = {f"{name}.{word}": each for word, each in item.items()} if name in SECTIONS and isinstance(item, dict) else {}
            for full, raw in (inner or {name: item}).items():
                if full not in KEYS:
                    near = nearest(full, KEYS)
                    rule = f"a VM has no such key; did you mean {near}?" if near else "a VM has no such key that can be fixed"
                    raise BadValue(field=f"{key} {safe(full, 40)}", value=safe(repr(raw), 40), rule=rule)
                KEYS[full].kind.check(raw, f"{key} {full}")
                found[full] = raw
        return found


class Account(Kind):
    """The name of an account or group of this host, in all the shapes that directories have."""

    metavar = "NAME"

    def __init__(self, what: str) -> None:
        self.what = what

    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 64 or not value.isprintable() or set(value) & set("/:\"'"):
            raise bad(key, value, f"the name of a {self.what}, at most 64 characters, without / and :")
        return value


# --- networks ---------------------------------------------------------------------------------------------------------


class Pool4(Kind):
    """An IPv4 network that segments are cut from."""

    metavar = "NETWORK"

    def check(self, value: object, key: str) -> str:
        try:
            pool = ipaddress.IPv4Network(value if isinstance(value, str) else "")
        except ValueError:
            pool = None
        if pool is None or not 8 <= pool.prefixlen <= 28 or any(map(pool.overlaps, NO_POOL4)):
            raise bad(key, value, 'a network of hosts, /8 to /28, like "10.77.0.0/16", with nothing behind the prefix')
        return str(pool)


class Pool6(Kind):
    """An IPv6 network of which each segment gets a /64, or nothing."""

    metavar = "NETWORK"

    def check(self, value: object, key: str) -> str:
        if value == "":
            return ""
        try:
            pool = ipaddress.IPv6Network(value if isinstance(value, str) and "%" not in value else "")
        except ValueError:
            pool = None
        if pool is None or not 32 <= pool.prefixlen <= 56 or not any(map(pool.subnet_of, POOL6)):
            raise bad(key, value, 'a unique local or global network of /32 to /56, like "fd12:3456:789a::/48"; "" is no IPv6')
        return str(pool)


class Domain(Kind):
    metavar = "DOMAIN"

    def check(self, value: object, key: str) -> str:
        labels = value.split(".") if isinstance(value, str) and len(value) <= 100 else []
        fine = (0 < len(part) <= 63 and NAME_CHARS.issuperset(part) and part == part.strip("-") for part in labels)
        if not labels or not all(fine):
            raise bad(key, value, 'a domain in lower case, like "vm" or "vm.example.org"')
        return str(value)


class Address(Kind):
    metavar = "ADDRESS"

    def check(self, value: object, key: str) -> str:
        try:
            address = ipaddress.ip_address(value if isinstance(value, str) and "%" not in value else "")
        except ValueError:
            address = None
        if address is None or address.is_unspecified or address.is_multicast:
            raise bad(key, value, 'a list of IP addresses of one host each, like ["192.0.2.53"]')
        return str(address)


class Interface(Kind):
    """A network interface of the host, not one that we make."""

    metavar = "INTERFACE"

    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or not is_interface(value):
            raise bad(key, value, INTERFACE_RULE)
        if value.startswith("vtb"):
            raise bad(key, value, "an interface of the host's; names that begin with vtb are those of vmshell's own bridges")
        return value


class Person(Account):
    """An account, or `@` and a group."""

    def check(self, value: object, key: str) -> str:
        if isinstance(value, str) and value.startswith("@"):
            return f"@{Account('group').check(value[1:], key)}"
        return super().check(value, key)


class People(Kind):
    metavar = "[NAME or @GROUP, …]"

    def check(self, value: object, key: str) -> tuple[str, ...]:
        return _texts(ListOf(Person("user"), 256).check(value, key))


class Addresses(Kind):
    metavar = "[ADDRESS, …]"

    def check(self, value: object, key: str) -> tuple[str, ...]:
        return _texts(ListOf(Address(), 8).check(value, key))
