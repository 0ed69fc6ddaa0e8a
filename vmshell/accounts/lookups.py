"""What the host's account databases say of a user or a group, and whether they said anything at all.

Where a name is unknown Python's own calls do not tell "there is none" from "the directory did not answer"; the C library does.
An outage is not a deletion (G19), so it is asked again there.
Runs in: the accounts helper. Reads: /etc/nsswitch.conf and what it names.
"""

from __future__ import annotations

import contextlib
import ctypes
import grp
import os
import pwd

_LIBC = ctypes.CDLL(None)
# Larger than a struct passwd or a struct group is.
_ENTRY_SIZE = 256
_TEXT_SIZE = 1 << 16
_NOBODYS = b"vmshell-nobody-has-this"


class Silent(Exception):
    """A database that may know did not answer."""


def name_of(uid: int) -> str | None:
    """The name of the account with *uid*; None if there is none. Raises Silent."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        _must_know("getpwuid_r", ctypes.c_uint(uid))
        return None


def account(user: str) -> tuple[int, list[str], bool] | None:
    """The uid of *user*, the names of the account's groups, and whether these are all; None if there is none. Raises Silent."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        _must_know("getpwnam_r", user.encode())
        return None
    names = {_group_name(gid) for gid in os.getgrouplist(entry.pw_name, entry.pw_gid)} - {""}
    return entry.pw_uid, sorted(names), _answers("getgrnam_r")


def is_group(group: str) -> bool:
    """Is there such a group? Raises Silent."""
    return _group(group) is not None


def members(group: str) -> tuple[list[int], bool] | None:
    """The uids of *group*'s members, and whether these are all: of those it lists, and of accounts whose own group it is.

    None if there is no such group. Raises Silent. Takes long where a directory lists all its accounts.
    """
    found = _group(group)
    if found is None:
        return None
    uids = {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == found.gr_gid}
    for user in found.gr_mem:
        with contextlib.suppress(KeyError):
            uids.add(pwd.getpwnam(user).pw_uid)
    return sorted(uids), _answers("getgrnam_r") and _answers("getpwnam_r")


def _group(name: str) -> grp.struct_group | None:
    try:
        return grp.getgrnam(name)
    except KeyError:
        _must_know("getgrnam_r", name.encode())
        return None


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return ""


def _must_know(function: str, key: object) -> None:
    if not _answers(function, key):
        raise Silent


def _answers(function: str, key: object = _NOBODYS) -> bool:
    """Did every database say that it knows *key*, or that it does not?

    Of a name that nobody has it tells whether all of them answer: a list is made without a word of those that do not.
    """
    entry, text = ctypes.create_string_buffer(_ENTRY_SIZE), ctypes.create_string_buffer(_TEXT_SIZE)
    found = ctypes.c_void_p()
    return int(_LIBC[function](key, entry, text, _TEXT_SIZE, ctypes.byref(found))) == 0
