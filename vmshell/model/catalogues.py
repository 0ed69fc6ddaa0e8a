"""What there is to choose from on this host, by names: users see the names, the administrator says what stands behind them.

Used by: broker, shell, admin, tapnet, dnsmasq. Pure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import VmshellError, safe
from ..hardware import CPU_MODELS
from ..names import DIGITS, LETTERS, is_object_name, nearest
from .limitkinds import Interface, People
from .limits import MACHINES, NIC_MODELS, VIDEO_MODELS
from .values import Bool, Choice, Int, Kind, ListOf, bad

# Each kind of network with the keys that mean something to it.
NETWORK_KINDS: dict[str, tuple[str, ...]] = {
    "private": ("outside", "members"),  # a segment for each user: own VMs see each other, and nobody else's
    "shared": ("outside", "members", "isolated"),  # one segment for all members
    "service": ("outside", "members", "providers"),  # members reach what is published there, and not each other
    "bridged": ("members", "bridge", "parent", "vlan"),  # on a bridge of the host's, or on a VLAN
    "none": ("members",),  # a card whose cable leads nowhere
    "user": ("members",),  # a session's: out through one's own sockets
}
OUTSIDE = ("none", "internet", "all")
CPU_CHARS = LETTERS | DIGITS | frozenset("._,=+-")


@dataclass(frozen=True)
class Firmware:
    """Code file and template of the variables; both empty: QEMU's own BIOS."""

    code: str = ""
    vars: str = ""


@dataclass(frozen=True)
class Network:
    """*members* and *providers* are accounts and `@groups`; without members everybody is one whom the policy allows it.

    A provider needs not be named as a member, too. A kind has no use for some of the keys (NETWORK_KINDS).
    *outside* says where cards get beyond their segment: nowhere, everywhere but private networks, or everywhere.
    """

    kind: str = "private"
    outside: str = "internet"
    members: tuple[str, ...] = ()
    isolated: bool = False
    providers: tuple[str, ...] = ()
    bridge: str = ""
    parent: str = ""
    vlan: int = 0

    @property
    def people(self) -> tuple[str, ...]:
        """Everybody who is named."""
        return self.members + self.providers

    def is_for(self, user: str, groups: Collection[str]) -> bool:
        return not self.members or any(one == user or (one[:1] == "@" and one[1:] in groups) for one in self.people)


OVMF = Firmware("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")


@dataclass(frozen=True)
class Catalogues:
    """`cpu_models`: QEMU's -cpu text by name; an empty one is what this host offers, without nested virtualisation."""

    machines: tuple[str, ...] = MACHINES
    cpu_models: dict[str, str] = field(default_factory=CPU_MODELS.copy, hash=False)
    firmware: dict[str, Firmware] = field(default_factory=lambda: {"bios": Firmware(), "uefi": OVMF}, hash=False)
    networks: dict[str, Network] = field(default_factory=lambda: {"users": Network()}, hash=False)
    nic_models: tuple[str, ...] = NIC_MODELS
    video_models: tuple[str, ...] = VIDEO_MODELS
    library: tuple[str, ...] = ()

    def names(self, catalogue: str) -> tuple[str, ...]:
        """The names in one of `machines cpu_models firmware networks nic_models video_models`."""
        return tuple(getattr(self, catalogue))


SESSION_CATALOGUES = Catalogues(networks={"users": Network("user")})

NETWORK_KEYS: dict[str, Kind] = {
    "kind": Choice(*NETWORK_KINDS),
    "outside": Choice(*OUTSIDE),
    "members": People(),
    "isolated": Bool(),
    "providers": People(),
    "bridge": Interface(),
    "parent": Interface(),
    "vlan": Int(1, 4094),
}


class CpuText(Kind):
    def check(self, value: object, key: str) -> str:
        if not isinstance(value, str) or len(value) > 256 or not CPU_CHARS.issuperset(value) or value[:1] in tuple(",=+-."):
            raise bad(key, value, 'what QEMU\'s -cpu takes, of letters, digits and . _ , = + -, like "EPYC,svm=off"')
        return value


class Path(Kind):
    def check(self, value: object, key: str) -> str:
        parts = value.split("/") if isinstance(value, str) and value.isprintable() and len(value.encode()) <= 255 else []
        if len(parts) < 2 or parts[0] or any(part in ("", ".", "..") for part in parts[1:]):
            raise bad(key, value, "an absolute path of at most 255 bytes, without . and .. in it and without / at its end")
        return str(value)


_LISTS = {"machines": MACHINES, "nic_models": NIC_MODELS, "video_models": VIDEO_MODELS}


class Reading:
    """Reads the sections of the catalogues out of a document; what is wrong goes into *problems*, one sentence each."""

    def __init__(self, document: dict[str, Any], problems: list[str], built_in: Catalogues) -> None:
        self._document = document
        self._built_in = built_in
        self._problems = problems

    def catalogues(self) -> Catalogues:
        built_in = self._built_in
        lists: dict[str, Kind] = {name: ListOf(Choice(*known), len(known)) for name, known in _LISTS.items()}
        found = self._fields("[catalogue]", self._section("catalogue"), lists)
        models = {name: self._named("cpu_models", name, CpuText(), text) for name, text in self._section("cpu_models").items()}
        library = self._fields("[library]", self._section("library"), {"directories": ListOf(Path(), 32)})
        return Catalogues(
            **found,
            cpu_models={**built_in.cpu_models, **{name: text for name, text in models.items() if isinstance(text, str)}},
            firmware={**built_in.firmware, **self._firmware(built_in)},
            networks={**built_in.networks, **self._networks(built_in)},
            library=library.get("directories", ()),
        )

    def _firmware(self, built_in: Catalogues) -> dict[str, Firmware]:
        found = {}
        for name, table in self._tables("firmware"):
            section = f"[firmware.{name}]"
            if name == "bios":
                self._problems.append(f"{section} is QEMU's own and takes no files; give yours another name")
                continue
            known = built_in.firmware.get(name, Firmware())
            fields = self._fields(section, table, {"code": Path(), "vars": Path()})
            code, variables = fields.get("code", known.code), fields.get("vars", known.vars)
            for key, value in (("code", code), ("vars", variables)):
                if not value and key not in table:
                    self._problems.append(f"{section} {key} is missing: the path of the firmware's {key} file")
            found[name] = Firmware(code, variables)
        return found

    def _networks(self, built_in: Catalogues) -> dict[str, Network]:
        found: dict[str, Network] = {}
        for name, table in self._tables("networks"):
            known = built_in.networks.get(name)
            section = f"[networks.{name}]"
            fields = self._fields(section, table, NETWORK_KEYS)
            if known is None and "kind" not in table:
                self._problems.append(f"{section} kind is missing: one of {', '.join(NETWORK_KINDS)}")
            network = replace(known or Network("none"), **fields)
            self._problems += [f"{section} {problem}" for problem in _contradictions(network, fields)]
            vlan = (network.parent, network.vlan)
            twins = [other for other, each in found.items() if network.vlan and (each.parent, each.vlan) == vlan]
            self._problems += [f"{section} is the VLAN of [networks.{twin}] again; it can have one name only" for twin in twins]
            found[name] = network
        return found

    def _section(self, name: str) -> dict[str, Any]:
        table = self._document.get(name, {})
        if isinstance(table, dict):
            return table
        self._problems.append(f"{name} is {safe(repr(table), 40)}: a section [{name}]")
        return {}

    def _tables(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """The sections `[name.X]` that have a good name and are sections."""
        found = []
        for inner, table in self._section(name).items():
            if not isinstance(table, dict):
                self._problems.append(f"[{name}] {safe(inner, 40)} is {safe(repr(table), 40)}: a section [{name}.NAME]")
            elif self._good_name(name, inner):
                found.append((inner, table))
        return found

    def _named(self, section: str, name: str, kind: Kind, value: object) -> object:
        return self._checked(f"[{section}] {safe(name, 40)}", kind, value) if self._good_name(section, name) else None

    def _good_name(self, section: str, name: str) -> bool:
        if not is_object_name(name):
            rule = "a name is 1 to 64 letters, digits and . _ + -, starting with a letter or digit"
            self._problems.append(f"[{section}] {safe(repr(name), 60)}: {rule}")
        return is_object_name(name)

    def _fields(self, section: str, table: dict[str, Any], kinds: dict[str, Kind]) -> dict[str, Any]:
        found = {}
        for name, value in table.items():
            if name not in kinds:
                near = nearest(name, kinds)
                also = f"; did you mean {near}?" if near else f"; its keys are {', '.join(kinds)}"
                self._problems.append(f"{section} has no key {safe(name, 40)}{also}")
                continue
            checked = self._checked(f"{section} {name}", kinds[name], value)
            if checked is not None:
                found[name] = checked
        return found

    def _checked(self, key: str, kind: Kind, value: object) -> object:
        try:
            return kind.check(value, key)
        except VmshellError as exc:
            self._problems.append(exc.sentence())
            return None


def _contradictions(network: Network, said: Collection[str]) -> list[str]:
    """Keys that the network's kind has no use for, and those that it needs."""
    useful = NETWORK_KINDS[network.kind]
    problems = [
        f"{key} means nothing to a network of kind {network.kind}, whose keys are {', '.join(useful)}"
        for key in said
        if key != "kind" and key not in useful
    ]
    host = (bool(network.bridge), bool(network.parent), bool(network.vlan))
    if network.kind == "bridged" and host not in ((True, False, False), (False, True, True)):
        problems.append("kind bridged needs either bridge, or parent and vlan")
    return problems
