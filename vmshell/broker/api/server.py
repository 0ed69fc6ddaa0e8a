"""Connections, who they are, one packet in, one authorised call, one packet back.

On an installed host a child of the front is at the other end of each, and has checked what it hands on; in a session it is the
person's own shell. Either way a peer's bytes are hostile whatever program sent them (R12). A packet that is not understood is
answered with an error and the connection stays; one that breaks the framing closes it. A peer that does not read its answers is
closed, never waited for.
Runs in: the broker.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from ... import wire
from ...errors import ProtocolError, StrayDescriptors, VmshellError
from ...fields import request_id
from ...messages import Request, parse_request
from ...refusals import AnswerTooLarge, NotAllowed, TooManyRequests, Upgraded
from ..handlers.table import Handlers
from ..policies import Policies
from ..runtime import log
from ..runtime.call import Call, Peer
from ..runtime.loop import Loop
from ..services.accounts import Accounts
from ..services.accounts_helper import Question
from ..vm.access import authorise
from ..vm.registry import Registry
from .dispatch import RATES
from .rates import CONNECTIONS, Rates
from .turns import Turns

PENDING_MAX = 16  # calls of one connection that wait for something
CONNECTIONS_IN_ALL = 800
ACCEPT_AGAIN = 1.0  # seconds


class Client:
    """One connection."""

    def __init__(self, server: Server, sock: socket.socket, peer: Peer) -> None:
        self._server = server
        self._sock = sock
        self.peer = peer
        self.pending = 0
        self.open = True

    def readable(self) -> None:
        try:
            packet = wire.recv(self._sock)
        except BlockingIOError:
            return
        except StrayDescriptors:
            # No request brings one (N2); those of the shells before the pipes did.
            self._refuse_packet(Upgraded())
            return
        except ProtocolError as exc:
            self._refuse_packet(exc)
            return
        except OSError:
            self.close()
            return
        if packet is None:
            self.close()
            return
        self._take(packet.body)

    def _refuse_packet(self, error: VmshellError) -> None:
        log.by_user(self.peer.uid, "bad-packet", problem=error)
        self.refuse(error)

    def _take(self, body: dict[str, object]) -> None:
        try:
            ident = request_id(body)
        except VmshellError as exc:
            self.send({"id": 0, "error": exc.to_wire()})
            return
        self.pending += 1
        call = Call(self, ident)

        def answer() -> None:
            if self.pending > PENDING_MAX:
                raise TooManyRequests(count=self.pending, what="requests", limit=PENDING_MAX)
            self._server.answer(call, body)

        call.guard(answer)

    def send(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        if not self.open:
            return
        try:
            try:
                wire.send(self._sock, body, fds)
            except ProtocolError as exc:
                log.by_user(self.peer.uid, "answer-too-large", problem=exc)
                wire.send(self._sock, {"id": body.get("id", 0), "error": AnswerTooLarge().to_wire()})
        except OSError:
            # Gone, or it lets its answers pile up: either way it is not worth a byte of our memory.
            self.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    def refuse(self, error: VmshellError) -> None:
        self.send({"id": 0, "error": error.to_wire()})
        self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            self._server.dropped(self, self._sock.fileno())
            self._sock.close()


class Server:
    """*listener* is a session's own socket; on an installed host the front accepts, and says who has come (`admit`).

    `met` is called with the uid of each who comes, `left` with each connection that has ended.
    """

    def __init__(
        self,
        *,
        loop: Loop,
        embedded: bool,
        policies: Policies,
        accounts: Accounts,
        registry: Registry,
        rates: Rates,
        turns: Turns,
        handlers: Handlers,
        met: Callable[[int], None],
        left: Callable[[Client], None],
        listener: socket.socket | None,
    ) -> None:
        self._loop = loop
        self._embedded = embedded
        self._policies = policies
        self._accounts = accounts
        self._registry = registry
        self._rates = rates
        self._turns = turns
        self._handlers = handlers
        self._met = met
        self._left = left
        self._listener = listener
        self._clients: dict[int, set[Client]] = {}
        self.accepted = 0  # connections so far
        self._group = None if embedded else policies.host.group
        if listener is not None:
            listener.setblocking(False)
            self._listen()

    def _listen(self) -> None:
        assert self._listener is not None
        self._loop.watch(self._listener.fileno(), self._accept)

    def connected(self) -> int:
        return sum(len(clients) for clients in self._clients.values())

    def answer(self, call: Call, body: dict[str, object]) -> None:
        """Check, authorise, act; raises what the peer is to be told."""
        request = parse_request(body)
        vm = authorise(call.peer, request, self._registry)
        peer = call.peer
        wanted = [Question("uid", peer.uid), Question("user", peer.user)]
        if vm is not None and vm.owner != peer.user:
            wanted += [Question("uid", vm.uid), Question("user", vm.owner)]

        def act() -> None:
            call.guard(lambda: self._act(call, request))

        counted = RATES[type(request)] is not None
        self._accounts.when_known(wanted, (lambda: self._turns.enter(peer.uid, act)) if counted else act)

    def _act(self, call: Call, request: Request) -> None:
        """Do what is asked, if the peer still is who it was when it connected, and with the rights that it has now (D21, D22)."""
        if self._accounts.user_of(call.peer.uid) not in ("", call.peer.user):
            raise NotAllowed(what="this connection", who="the account that opened it")
        call.peer = self._identify(call.peer.uid)
        vm = authorise(call.peer, request, self._registry)  # again: time may have gone by
        if rate := RATES[type(request)]:
            self._rates.take(call.peer, rate)
        handler = self._handlers[type(request)]
        if vm is None:
            handler(call, request)
        else:
            handler(call, request, vm)

    def users(self) -> set[tuple[int, str]]:
        """Who is connected: uid and name; root and who has not been let in yet are not in it."""
        peers = [client.peer for clients in self._clients.values() for client in clients]
        return {(peer.uid, peer.user) for peer in peers if peer.uid and peer.user}

    def revoke(self, uid: int, user: str, error: VmshellError) -> int:
        """End all connections of *user*, with *error* as their last word; returns how many.

        It is said to the connection, not to a request: whoever waits for an answer has it by that.
        """
        theirs = [client for client in self._clients.get(uid, ()) if client.peer.user == user]
        for client in theirs:
            client.refuse(error)
        return len(theirs)

    def dropped(self, client: Client, fd: int) -> None:
        self._loop.unwatch(fd)
        self._left(client)
        clients = self._clients.get(client.peer.uid, set())
        clients.discard(client)
        if not clients:
            self._clients.pop(client.peer.uid, None)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            # Out of descriptors, say: the listener stays readable, so look away for a moment instead of spinning.
            log.note("accept-failed", problem=exc)
            self._loop.unwatch(self._listener.fileno())
            self._loop.after(ACCEPT_AGAIN, self._listen)
            return
        self.admit(wire.peer_uid(sock), sock)

    def admit(self, uid: int, sock: socket.socket) -> None:
        """Take over a connection of user *uid*."""
        self.accepted += 1
        sock.setblocking(False)
        client = Client(self, sock, Peer(uid, "", admin=False))
        count, limit = len(self._clients.get(uid, ())), self._policies.host.connections_max
        full = count >= limit or (self.connected() >= CONNECTIONS_IN_ALL and uid != 0)
        # It counts from now on, and is listened to when it is known who it is.
        self._clients.setdefault(uid, set()).add(client)
        if full:
            client.refuse(TooManyRequests(count=count, what="connections", limit=limit))
        else:
            self._accounts.when_peer_known(uid, lambda: self._admit(client))

    def _admit(self, client: Client) -> None:
        """Listen to *client*, or say why not."""
        if not client.open:
            return
        try:
            client.peer = self._identify(client.peer.uid)
            self._rates.take(client.peer, CONNECTIONS)
            self._met(client.peer.uid)
        except VmshellError as exc:
            client.refuse(exc)
        else:
            self._loop.watch(client.fileno(), client.readable)

    def _identify(self, uid: int) -> Peer:
        """Who *uid* is and whether it may be here at all, by what the host's accounts say of it (D21); else raises why not."""
        accounts, embedded = self._accounts, self._embedded
        user = accounts.user_of(uid)
        if uid == 0 and not embedded:
            return Peer(uid, user or "root", admin=True)  # also while nobody says who is who
        accounts.must_know(Question("uid", uid))
        if not user:
            raise NotAllowed(what="this service", who="accounts of this host")
        if embedded:
            if uid != os.geteuid():
                raise NotAllowed(what="this session", who="its owner")
        else:
            accounts.must_know(Question("user", user))
            if self._group not in accounts.groups_of(user):
                log.by_user(uid, "not-a-member", user=user)
                raise NotAllowed(what="this service", who=f"members of the group {self._group}")
        return Peer(uid, user, admin=False)
