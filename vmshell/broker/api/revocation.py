"""Who may no longer be here: an account that left the group, or is gone, loses its connections and consoles. Its VMs run on.

Who has a connection or a console is asked about anew every few seconds (see `services/accounts.py`), once per user. That nobody
answers revokes nothing (G19): only an account of which all databases say what it is now, or that was found to be a member since
we were started, can lose what it has. Root loses nothing, nor does anybody in session mode.
Runs in: the broker, on an installed host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...messages import ALIVE, ATTACHED_IN_PART, ATTACHED_MAX, Attached, Detach
from ...refusals import AccessEnded
from ..runtime.call import label_of
from ..runtime.log import by_user, note
from ..services.accounts_helper import Question

if TYPE_CHECKING:
    from ... import wire
    from ...errors import VmshellError
    from ..runtime.loop import Loop
    from ..services.accounts import Accounts
    from ..services.relay import Relay
    from ..vm.registry import Registry
    from .server import Server

LOOK = 2.0  # seconds
User = tuple[int, str]  # uid and name


class Revocation:
    """Looks every few seconds who of those here may be here no longer."""

    def __init__(self, *, loop: Loop, group: str, accounts: Accounts, registry: Registry, relay: Relay, server: Server) -> None:
        self._loop = loop
        self._group = group
        self._accounts = accounts
        self._registry = registry
        self._relay = relay
        self._server = server
        self._viewers: list[User] = []  # who has consoles, as the relay said last: uid and label
        self._coming: list[User] | None = None  # what it has said of them so far
        self._members: set[User] = set()  # of those who are here: who was found to be one

    def begin(self) -> None:
        self._accounts.follow(self._present, self.look)
        self._look_again()

    def look(self) -> None:
        """End the connections and consoles of all who may no longer be here."""
        connected = self._server.users()
        for uid, user in connected:
            if why := self._why_out(uid, user):
                self._end(uid, user, why)
        self._members &= {*connected, *((uid, self._name(uid)) for uid, _ in self._viewers)}
        if self._coming is None:
            self._ask_relay()

    def _look_again(self) -> None:
        self._loop.after(LOOK, self._look_again)
        self.look()

    def _present(self) -> Iterator[Question]:
        """What is to be known of who is here."""
        for _, user in self._server.users():
            yield Question("user", user)
        for uid, _ in self._viewers:
            yield Question("uid", uid)
            if user := self._name(uid):
                yield Question("user", user)

    # --- who may be here ----------------------------------------------------------------------------------------------

    def _why_out(self, uid: int, user: str) -> str:
        """Why the account *user* may not be here; empty if it may, or nobody can say."""
        accounts, question = self._accounts, Question("user", user)
        if uid == 0 or not accounts.knows(question):
            return ""
        if accounts.uid_of(user) != uid:
            why = f"the account {user} is gone"
        elif self._group not in accounts.groups_of(user):
            why = f"you are no longer a member of the group {self._group}"
        else:
            self._members.add((uid, user))
            return ""
        return why if accounts.is_sure(question) or (uid, user) in self._members else ""

    def _why_detached(self, uid: int, label: str) -> str:
        """The same of a console's user, of whom the relay has only the label."""
        question, user = Question("uid", uid), self._name(uid)
        if uid == 0 or not self._accounts.knows(question):
            return ""
        if label_of(user) != label:
            return f"the account {label} is gone" if self._accounts.is_sure(question) else ""
        return self._why_out(uid, user)

    def _name(self, uid: int) -> str:
        return self._accounts.user_of(uid)

    # --- what ends ----------------------------------------------------------------------------------------------------

    def _end(self, uid: int, user: str, why: str) -> None:
        error = AccessEnded(why=why)
        count = self._server.revoke(uid, user, error)
        by_user(uid, "access-ended", user=user, connections=count, why=why)

    def _ask_relay(self) -> None:
        """Ask who has consoles, if any are attached; a relay that is away is asked again at the next look."""
        if not any(vm.viewers and vm.state in ALIVE for vm in self._registry):
            self._viewers = []
            return
        self._coming = []
        self._relay.request(Attached(), self._heard)

    def _heard(self, error: VmshellError | None, packet: wire.Packet) -> None:
        coming, self._coming = self._coming or [], None
        if error:
            return
        answer: Any = packet.body["ok"]
        part = [(int(uid), str(label)) for uid, label in answer["users"]]
        coming += part
        if len(part) == ATTACHED_IN_PART and len(coming) < ATTACHED_MAX:
            self._coming = coming
            self._relay.request(Attached(skip=len(coming)), self._heard)
            return
        self._viewers = coming
        for uid, label in coming:
            if why := self._why_detached(uid, label):
                self._detach(uid, label, why)

    def _detach(self, uid: int, label: str, why: str) -> None:
        error = AccessEnded(why=why)
        by_user(uid, "access-ended", user=label, consoles="all", why=why)

        def done(problem: VmshellError | None) -> None:
            if problem:
                note("not-detached", uid=uid, user=label, problem=problem)  # the next look tries it again

        self._relay.send(Detach(uid=uid, label=label, code=error.code, reason=error.sentence()), done)
