"""The administrator's one file, `policy.toml`: the host, every user, groups, single users, and what there is to choose from.

It is complete without the file: the built-in limits are in force before the first login. Of the sections that concern a user the
narrowest wins, key by key: [user.NAME], then of the [group.NAME]s the one that stands first in the file, then [defaults].
Used by: broker, shell, admin, tapnet, dnsmasq. Pure, but for `load`, the one look at the file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import BadPolicy, VmshellError, safe
from ..names import DIGITS, LETTERS, nearest
from ..policyfile import read
from . import catalogues
from .catalogues import SESSION_CATALOGUES, Catalogues, Firmware, Network
from .limitkinds import Account
from .limits import HOST_KEYS, LIMIT_KEYS, SESSION_LIMITS, HostPolicy, Limits, PolicyKey

__all__ = [
    "BUILT_IN",
    "SESSION_CATALOGUES",
    "SESSION_LIMITS",
    "Catalogues",
    "Effective",
    "Firmware",
    "HostPolicy",
    "Limits",
    "Network",
    "Policy",
    "examine",
    "load",
    "parse",
    "read",
]

BUILT_IN = "built in"
# Each section as it is written, for those who look for it.
SECTIONS = {
    "host": "[host]",
    "defaults": "[defaults]",
    "group": "[group.NAME]",
    "user": "[user.NAME]",
    "catalogue": "[catalogue]",
    "cpu_models": "[cpu_models]",
    "firmware": "[firmware.NAME]",
    "networks": "[networks.NAME]",
    "library": "[library]",
}
# The limits that are lists of names in a catalogue of the same name. (What images there are is not the policy's to say.)
ALLOW_LISTS = ("machines", "cpu_models", "firmware", "networks", "nic_models", "video_models")
_BARE = LETTERS | DIGITS | frozenset("_-")


@dataclass(frozen=True)
class Effective:
    """What holds for one user. `source` says for each key where it comes from: `[user.alice]`, …, or `built in`."""

    limits: Limits
    source: Mapping[str, str]
    catalogues: Catalogues
    closed: frozenset[str] = frozenset()  # networks that are for others

    def section(self, key: str) -> str:
        """Where *key* was said, as it stands in a sentence after `in`."""
        return "the built-in limits" if self.source[key] == BUILT_IN else self.source[key]

    def names(self, catalogue: str) -> tuple[str, ...]:
        """The names in *catalogue* (one of ALLOW_LISTS) that this user may choose from."""
        allowed = getattr(self.limits, catalogue)
        closed = self.closed if catalogue == "networks" else ()
        names = [name for name in self.catalogues.names(catalogue) if name not in closed]
        return tuple(name for name in names if "*" in allowed or name in allowed)

    def choices(self) -> dict[str, list[str]]:
        """What this user may choose from, by catalogue."""
        return {catalogue: list(self.names(catalogue)) for catalogue in ALLOW_LISTS}

    def numbers(self) -> dict[str, int]:
        """The limits that are numbers, sizes in MiB."""
        return {name: value for name, value in vars(self.limits).items() if type(value) is int}


@dataclass(frozen=True)
class Policy:
    """*defaults* are the built-in limits and over them what [defaults] says; *said* are the keys that it says."""

    host: HostPolicy = field(default_factory=HostPolicy)
    defaults: Limits = field(default_factory=Limits)
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    users: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)
    catalogues: Catalogues = field(default_factory=Catalogues)
    said: frozenset[str] = field(default=frozenset(), compare=False)
    _known: dict[tuple[str, tuple[str, ...], frozenset[str]], Effective] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def has_groups(self) -> bool:
        """Is any group named, so that somebody's groups matter?"""
        networks = self.catalogues.networks.values()
        return bool(self.groups) or any(name[:1] == "@" for network in networks for name in network.people)

    @property
    def library(self) -> tuple[str, ...]:
        """The directories with the administrator's read-only files."""
        return self.catalogues.library

    def names_for(self, limits: Limits) -> dict[str, list[str]]:
        """What somebody with these limits may choose from, by catalogue."""
        return Effective(limits, {}, self.catalogues).choices()

    def effective(self, user: str, groups: Collection[str]) -> Effective:
        """What holds for *user*, a member of *groups*. Cheap: remembered for each set of sections that concern somebody."""
        closed = frozenset(name for name, network in self.catalogues.networks.items() if not network.is_for(user, groups))
        key = (user if user in self.users else "", tuple(name for name in self.groups if name in groups), closed)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._combine(*key)
        return found

    def networks_for(self, user: str, groups: Collection[str]) -> tuple[str, ...]:
        """The networks that *user*, a member of *groups*, may put cards on."""
        return self.effective(user, groups).names("networks")

    def _combine(self, user: str, groups: tuple[str, ...], closed: frozenset[str]) -> Effective:
        source = {item.name: "[defaults]" if item.name in self.said else BUILT_IN for item in fields(Limits)}
        values: dict[str, Any] = {}
        layers = [(header("group", name), self.groups[name]) for name in reversed(groups)]
        if user:
            layers.append((header("user", user), self.users[user]))
        for section, said in layers:
            values.update(said)
            source.update(dict.fromkeys(said, section))
        return Effective(replace(self.defaults, **values), source, self.catalogues, closed)


def header(section: str, name: str) -> str:
    """`[user.alice]` as TOML wants it written: quoted where the name has other characters than letters, digits, _ and -."""
    return f"[{section}.{name}]" if _BARE.issuperset(name) else f'[{section}."{name}"]'


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: str, *, session: bool, required: bool = False) -> Policy:
    """Read the policy at *path*; raises BadPolicy, and nothing is half applied. A missing file means what is built in."""
    try:
        text = read(path)
    except FileNotFoundError:
        if required:
            raise BadPolicy(path=path, problem="there is no such file") from None
        return built_in(session=session)
    return parse(text, path, session=session)


def built_in(*, session: bool) -> Policy:
    """What holds without any file: on an installed host, or in somebody's session, where the host itself is the limit."""
    return Policy(defaults=SESSION_LIMITS, catalogues=SESSION_CATALOGUES) if session else Policy()


def parse(text: str, path: str, *, session: bool = False) -> Policy:
    """The policy in *text*; raises BadPolicy with the first problem and how many more there are."""
    policy, problems = examine(text, session=session)
    if problems:
        more = f" (and {len(problems) - 1} more: `vmshell-admin policy check` lists them)" if len(problems) > 1 else ""
        raise BadPolicy(path=path, problem=problems[0] + more)
    return policy


def examine(text: str, *, session: bool = False) -> tuple[Policy, list[str]]:
    """The policy as far as it is understood, and every problem, one sentence each."""
    start = built_in(session=session)
    try:
        document = tomllib.loads(text)
    except RecursionError:
        return start, ["it is nested too deeply"]
    except tomllib.TOMLDecodeError as exc:
        last = text.count("\n") + (not text.endswith("\n"))
        return start, [str(exc).replace("at end of document", f"at line {last}, where the file ends")]
    except ValueError:  # Python reads no number of more than 4300 digits
        return start, ["a number in it has thousands of digits"]
    reading = _Reading(document)
    return reading.policy(start), reading.problems


class _Reading:
    """Takes a document apart; what is wrong goes into `problems`, and the rest is read all the same."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.problems: list[str] = []

    def policy(self, start: Policy) -> Policy:
        self._sections()
        host = self._values("[host]", self._table("host"), HOST_KEYS)
        said = self._values("[defaults]", self._table("defaults"), LIMIT_KEYS)
        groups, users = self._people("group"), self._people("user")
        found = catalogues.Reading(self.document, self.problems, start.catalogues).catalogues()
        self._segments_fit(replace(HostPolicy(), **host))
        self._names_exist("[defaults]", said, found)
        for section, people in (("group", groups), ("user", users)):
            for name, values in people.items():
                self._names_exist(header(section, name), values, found)
        return Policy(replace(HostPolicy(), **host), replace(start.defaults, **said), groups, users, found, frozenset(said))

    def _segments_fit(self, host: HostPolicy) -> None:
        pool = int(host.ipv4_pool.rpartition("/")[2])
        if host.segment_prefix <= pool:
            rule = f"{pool + 1} to 30, longer than the pool's, which is /{pool}"
            self.problems.append(f"[host] segment_prefix is {host.segment_prefix}: {rule}")

    def _sections(self) -> None:
        for name, value in self.document.items():
            if name in SECTIONS:
                continue
            shown = f"section [{safe(name, 40)}]" if isinstance(value, dict) else f"key {safe(name, 40)} outside of the sections"
            near = nearest(name, SECTIONS)
            also = f"did you mean {SECTIONS[near]}?" if near else f"the sections are {' '.join(SECTIONS.values())}"
            self.problems.append(f"there is no {shown}; {also}")

    def _table(self, name: str) -> dict[str, Any]:
        table = self.document.get(name, {})
        if isinstance(table, dict):
            return table
        self.problems.append(f"{name} is {safe(repr(table), 40)}: a section {SECTIONS[name]}")
        return {}

    def _people(self, section: str) -> dict[str, dict[str, Any]]:
        found = {}
        for name, table in self._table(section).items():
            if not isinstance(table, dict):
                self.problems.append(f"[{section}] {safe(name, 40)} is {safe(repr(table), 40)}: a section {SECTIONS[section]}")
                continue
            try:
                Account(section).check(name, f"{SECTIONS[section]} NAME")
            except VmshellError as exc:
                self.problems.append(exc.sentence())
                continue
            found[name] = self._values(header(section, name), table, LIMIT_KEYS)
        return found

    def _values(self, section: str, table: dict[str, Any], keys: dict[str, PolicyKey]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in table.items():
            if name not in keys:
                self.problems.append(f"{section} has no key {safe(name, 40)}{self._advice(section, name, value, keys)}")
                continue
            try:
                found[name] = keys[name].kind.check(value, f"{section} {name}")
            except VmshellError as exc:
                self.problems.append(exc.sentence())
        return found

    def _advice(self, section: str, name: str, value: object, keys: dict[str, PolicyKey]) -> str:
        """What the writer of an unknown key may have meant."""
        for other, there in (("[host]", HOST_KEYS), ("[defaults]", LIMIT_KEYS)):
            if name in there and section != other:
                return f"; it belongs into {other}"
        if isinstance(value, dict) and section.startswith(("[user.", "[group.")):
            return f"; a name with a dot needs quotes: {section[:-1]}.{safe(name, 40)}] is {header_of(section, name)}"
        near = nearest(name, keys)
        alike = [near] if near else [key for key in keys if len(name) > 2 and (name in key or key in name)][:4]
        if alike:
            return f"; did you mean {' or '.join(alike)}?"
        return f"; its keys are {', '.join(keys)}" if len(keys) < 10 else "; vmshell-policy(5) lists its keys"

    def _names_exist(self, section: str, values: Mapping[str, Any], found: Catalogues) -> None:
        """An allow-list with a slip in it would silently allow less than was meant."""
        for catalogue in ALLOW_LISTS:
            names = found.names(catalogue)
            for name in values.get(catalogue, ()):
                if name != "*" and name not in names:
                    near = nearest(name, names)
                    also = f"nearest is {near}" if near else f"there are {', '.join(names)}"
                    self.problems.append(f"{section} {catalogue}: the catalogue has no {name}; {also}")


def header_of(section: str, name: str) -> str:
    """`[user.a.b]`, in which TOML saw two names, as it was meant: `[user."a.b"]`."""
    kind, _, first = section.strip("[]").partition(".")
    return f'[{kind}."{first.strip(chr(34))}.{safe(name, 40)}"]'
