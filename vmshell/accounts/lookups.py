"""What the host's account databases say of a user or a group, and whether they said anything at all.

Where a name is unknown Python's own calls do not tell "there is none" from "the directory did not answer"; the C library does.
An outage is not a deletion (G19), so it is asked again there.
Runs in: the accounts helper. Reads: /etc/nsswitch.conf and what it names.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd

_LIBC = ctypes.CDLL(None)
# Larger than a struct passwd or a struct group is.
_ENTRY_SIZE = 256
_TEXT_SIZE = 1 << 16
_NOBODYS = b"vmshell-no-such-group"


class Silent(Exception):
    """A database that may know did not answer."""


def name_of(uid: int) -> str | None:
    """The name of the account with *uid*; None if there is none. Raises Silent."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        _must_know("getpwuid_r", ctypes.c_uint(uid))
        return None


def account(user: str) -> tuple[int, list[str]] | None:
    """The uid of *user* and the names of all groups that the account is in; None if there is none. Raises Silent."""
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        _must_know("getpwnam_r", user.encode())
        return None
    gids = os.getgrouplist(entry.pw_name, entry.pw_gid)
    names = {name for gid in gids if (name := _group_name(gid))}
    # The C library leaves out, without a word, the groups of a database that does not answer; for a name that no database has
    # it says so.
    _must_know("getgrnam_r", _NOBODYS)
    return entry.pw_uid, sorted(names)


def is_group(group: str) -> bool:
    """Is there such a group? Raises Silent."""
    try:
        grp.getgrnam(group)
    except KeyError:
        _must_know("getgrnam_r", group.encode())
        return False
    return True


def members(group: str) -> list[int] | None:
    """The uids of *group*'s members: of those it lists, and of accounts whose own group it is. None if there is no such group.

    Raises Silent. Takes long where a directory lists all its accounts.
    """
    try:
        found = grp.getgrnam(group)
    except KeyError:
        _must_know("getgrnam_r", group.encode())
        return None
    uids = {entry.pw_uid for entry in pwd.getpwall() if entry.pw_gid == found.gr_gid}
    for user in found.gr_mem:
        try:
            uids.add(pwd.getpwnam(user).pw_uid)
        except KeyError:
            _must_know("getpwnam_r", user.encode())
    return sorted(uids)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        _must_know("getgrgid_r", ctypes.c_uint(gid))
        return ""


def _must_know(function: str, key: object) -> None:
    """Raise Silent unless every database said that it knows *key*, or that it does not."""
    entry, text = ctypes.create_string_buffer(_ENTRY_SIZE), ctypes.create_string_buffer(_TEXT_SIZE)
    found = ctypes.c_void_p()
    if _LIBC[function](key, entry, text, _TEXT_SIZE, ctypes.byref(found)):
        raise Silent
