"""The accounts helper: `… accounts LAYOUT`, with the broker's questions as descriptor 3.

One question after the other, for as long as each takes: the broker, which serves everybody, never waits for a directory. It keeps
nothing in mind, and ends with the broker's end of the socket. (LAYOUT only says in `ps` whose helper it is.)

    {"id": 7, "verb": "user", "user": "alice"}
    {"verb": "part", "groups": ["alice", "students"]}     none or several
    {"id": 7, "ok": {"verb": "found", "exists": true, "uid": 1001}}

Runs in: a process of its own under the broker's uid, without rights of its own. Touches: what /etc/nsswitch.conf names.
"""

from __future__ import annotations

import ctypes
import signal
import socket
from collections.abc import Iterator

from .. import wire
from ..fields import request_id
from ..messages import (
    GROUPS_IN_PART,
    NUMBERS_MAX,
    UID_MAX,
    AboutGroup,
    AboutMembers,
    AboutUid,
    AboutUser,
    Found,
    Part,
    ToAccounts,
    parse_to_accounts,
)
from . import lookups

_SOCKET = 3
_NAME_MAX = 256
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Answer until the broker is gone."""
    # A directory may not answer for an hour: the helper of a broker that was killed does not wait for it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with socket.socket(fileno=_SOCKET) as sock:
        while packet := wire.recv(sock):
            for body in answers(packet.body):
                wire.send(sock, body)
    return 0


def answers(body: dict[str, object]) -> Iterator[dict[str, object]]:
    """Every packet that answers the question *body*."""
    ident = request_id(body)
    try:
        parts, found = _answer(parse_to_accounts(body))
    except lookups.Silent:
        parts, found = [], Found(whole=False)
    for part in parts:
        yield part.to_body()
    yield {"id": ident, "ok": found.to_body()}


def _answer(question: ToAccounts) -> tuple[list[Part], Found]:
    if isinstance(question, AboutUid):
        name = lookups.name_of(question.uid)
        return [], Found(exists=True, user=name) if name and _fits(name) else Found()
    if isinstance(question, AboutUser):
        return _account(question.user)
    if isinstance(question, AboutGroup):
        return [], Found(exists=lookups.is_group(question.group))
    assert isinstance(question, AboutMembers)
    return _members(question.group)


def _account(user: str) -> tuple[list[Part], Found]:
    account = lookups.account(user)
    if account is None or account[0] > UID_MAX:
        return [], Found()
    uid, groups, whole = account
    groups = [name for name in groups if _fits(name)]
    parts = [Part(groups=groups[at : at + GROUPS_IN_PART]) for at in range(0, len(groups), GROUPS_IN_PART)]
    return parts, Found(exists=True, uid=uid, whole=whole)


def _members(group: str) -> tuple[list[Part], Found]:
    members = lookups.members(group)
    if members is None:
        return [], Found()
    uids = [uid for uid in members[0] if uid <= UID_MAX]
    return [Part(uids=uids[at : at + NUMBERS_MAX]) for at in range(0, len(uids), NUMBERS_MAX)], Found(
        exists=True, whole=members[1]
    )


def _fits(name: str) -> bool:
    """Can a message hold *name*? Whoever is called otherwise is nobody to us: he could not be named in a policy either."""
    return len(name) <= _NAME_MAX and name.isprintable()
