"""`vmshell-admin policy check|show`: read a policy as the broker would, and say what it means.

Runs in: vmshell-admin, as whoever typed it. Touches the policy file, reading; looks accounts and groups up.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Collection, Iterator

from ..errors import BadPolicy, safe
from ..model import policy
from ..model.limits import LIMIT_KEYS, shown
from ..model.policy import ALLOW_LISTS, Effective, Policy
from ..refusals import NoSuchUser
from .verbs import Arguments, Context

# Two limits of which the first can never be reached where the second is lower.
PAIRS = (
    ("memory_min", "memory_max"),
    ("running_max", "vms_max"),
    ("cpus_max", "user_cpus"),
    ("memory_max", "user_memory"),
    ("disk_size_max", "user_disk"),
    ("snapshots_max", "user_snapshots"),
    ("nics_max", "user_nics"),
)


def check(context: Context, args: Arguments) -> int:
    """Say every problem of a policy, or that it is fine and what is odd about it; nothing is applied."""
    path = args.get("FILE", context.layout.policy)
    try:
        text = policy.read(path, trusted=path == context.layout.policy)
    except FileNotFoundError:
        raise BadPolicy(path=path, problem="there is no such file") from None
    found, problems = policy.examine(text, session=context.layout.embedded)
    for problem in problems:
        context.say(f"{path}: {problem}")
    if problems:
        return BadPolicy.exit_status
    for doubt in (*_strangers(context, found), *_missing(found), *_doubts(found)):
        context.say(f"{path}: warning: {doubt}")
    print(f"{safe(path)}: fine: {_count(len(found.users), 'user')}, {_count(len(found.groups), 'group')}")
    return 0


def show(context: Context, args: Arguments) -> None:
    """Every key as it holds for USER, by the policy file as it is now."""
    effective = _load(context).effective(args["USER"], _groups_of(args["USER"]))
    rows = [("KEY", "VALUE", "FROM"), *((key, _value(effective, key), effective.source[key]) for key in LIMIT_KEYS)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, source in rows:
        print(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}")


def _load(context: Context) -> Policy:
    return policy.load(context.layout.policy, session=context.layout.embedded)


def _value(effective: Effective, key: str) -> str:
    if key in ALLOW_LISTS:
        return ", ".join(effective.names(key)) or "none"
    text = shown(LIMIT_KEYS[key], getattr(effective.limits, key))
    return "all" if text == "*" else text


def _groups_of(user: str) -> list[str]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise NoSuchUser(user=user) from None
    names = []
    for gid in os.getgrouplist(user, entry.pw_gid):
        with contextlib.suppress(KeyError):
            names.append(grp.getgrgid(gid).gr_name)
    return names


# --- what is valid and yet perhaps not meant --------------------------------------------------------------------------


def _strangers(context: Context, found: Policy) -> Iterator[str]:
    for user in found.users:
        if not _is_account(user):
            yield f"{policy.header('user', user)}: this host has no such account"
    for group in found.groups:
        if not _is_group(group):
            yield f"{policy.header('group', group)}: this host has no such group"
    for name, network in found.catalogues.networks.items():
        for one in network.people:
            if not (_is_group(one[1:]) if one.startswith("@") else _is_account(one)):
                yield f"{policy.header('networks', name)}: this host has no {'group' if one[0] == '@' else 'account'} {one}"
        if network.kind == "service" and not network.providers:
            yield f"{policy.header('networks', name)}: without providers nobody can offer anything there"
    if not context.layout.embedded and not _is_group(found.host.group):
        yield f"[host] group: this host has no group {found.host.group}, so nobody may use the service"


def _is_account(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _is_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _missing(found: Policy) -> Iterator[str]:
    built_in = policy.Catalogues()
    for name, firmware in found.catalogues.firmware.items():
        for path in (firmware.code, firmware.vars):
            # UEFI's own files come with a package of their own, which not every host wants.
            if path and firmware != built_in.firmware.get(name) and not os.path.isfile(path):
                yield f"[firmware.{name}]: there is no file {path}"
    for folder in found.library:
        if not os.path.isdir(folder):
            yield f"[library] directories: there is no directory {folder}"
    yield from missing_interfaces(found)


def missing_interfaces(found: Policy) -> Iterator[str]:
    """Networks that need a bridge or an interface which the host has not."""
    for name, network in found.catalogues.networks.items():
        interface = network.bridge or network.parent
        if interface and not os.path.exists(f"/sys/class/net/{interface}"):
            yield f"{policy.header('networks', name)}: this host has no interface {interface}"


def _doubts(found: Policy) -> Iterator[str]:
    """Limits that cannot be reached. Where nobody said either of the two, the built-in ones speak for themselves."""
    places: list[tuple[str, Effective, Collection[str]]] = [("[defaults]", found.effective("", ()), found.said)]
    places += [(policy.header("group", name), found.effective("", (name,)), said) for name, said in found.groups.items()]
    places += [(policy.header("user", name), found.effective(name, ()), said) for name, said in found.users.items()]
    for section, effective, said in places:
        for lower, upper in PAIRS:
            low, high = getattr(effective.limits, lower), getattr(effective.limits, upper)
            if low > high and (lower in said or upper in said):
                values = [shown(LIMIT_KEYS[key], value) for key, value in ((lower, low), (upper, high))]
                yield f"{section}: {lower} is {values[0]}, which {upper} = {values[1]} never lets anybody reach"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
