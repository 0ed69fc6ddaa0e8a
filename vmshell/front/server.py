"""Accepting: the kernel says who a user is, a child gets the connection, the broker the other end of that child's.

The server never reads from a user's socket, and never drops the last reference to one, also of a connection that it refuses:
whoever does pays for everything that lies in it, for as long as its sender likes. While there is no broker, connections wait
here, unread.
Runs in: the front. Holds a user's connection until a child has said that it holds it.
"""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import NoReturn

from .. import wire
from ..messages import Arrived
from . import zygote
from .child import BATCH, CONNECTIONS_MAX, DOWN, EACH_SECOND, FAST, GO, HAVE, IN_A_ROW, MANY, SERVE, report
from .rate import Rate

WAITING_MAX = 1024  # connections for which there is no broker, or no child
REFUSED_MAX = 4096  # refused connections of one user that wait for a child to drop them
BROKER_PATIENCE = 30.0  # seconds in which a broker that is away may come back, as at an upgrade
PACE = 0.2  # seconds for which nobody is accepted when there is no room
TRIES = 3  # for a connection whose child was killed before it had it
AT_ONCE = 64  # connections that are accepted before anything else is looked at
AGAIN = 0.02  # seconds until a broker that does not read is told again who has come
DROP = 0.02  # seconds that closing a connection may take
_SO_PASSRIGHTS = 83


class Server:
    """*users* and *control* listen, for users and for the broker, which *broker_uid* is."""

    def __init__(self, *, users: socket.socket, control: socket.socket, children: socket.socket, broker_uid: int) -> None:
        self._users = users
        self._control = control
        self._children = children
        self._broker_uid = broker_uid
        self._broker: socket.socket | None = None
        self._gone_at = monotonic()  # since when there is no broker
        self._spare = zygote.new_child(children)
        self._connections: Counter[int] = Counter()  # by user: those that wait and those that are served
        self._rate = Rate(IN_A_ROW, EACH_SECOND)
        # By user, whose turn is next first: connections, and how often each was given to a child.
        self._waiting: dict[int, deque[tuple[socket.socket, int]]] = {}
        self._refused: dict[tuple[int, bytes], list[socket.socket]] = {}
        self._refusing: set[tuple[int, bytes]] = set()  # for these a child is at work
        self._due: float | None = None
        self._poll = select.poll()
        self._calls: dict[int, Callable[[], None]] = {}
        # The zygote first, so that nobody is accepted whom no child can serve any more; then the broker: who comes with it is not
        # told that there is none.
        self._watch(children, self._lose_zygote)
        for sock, call in ((control, self._on_broker), (users, self._accept)):
            sock.setblocking(False)
            self._watch(sock, call)

    def run(self) -> NoReturn:
        """Serve for ever. Raises OSError when the zygote has ended: the service manager starts all of it anew."""
        signal.signal(signal.SIGALRM, lambda *_: None)  # it ends a wait, see `_drop`
        more = False
        while True:
            for fd, _ in self._poll.poll(0 if more else self._milliseconds()):
                call = self._calls.get(fd)
                if call is not None:
                    call()
            if self._due is not None and monotonic() >= self._due:
                self._due = None
                if self._users.fileno() not in self._calls:
                    self._watch(self._users, self._accept)
                for key in list(self._refused):
                    self._drop_refused(*key)
            more = self._serve_next()

    def _milliseconds(self) -> float | None:
        """How long nothing has to be done unless somebody says something."""
        return None if self._due is None else max(0.0, self._due - monotonic()) * 1000

    def _lose_zygote(self) -> None:
        # Now, and not when the next user has come, whose connection would be lost with it.
        raise OSError("the zygote has ended")

    def _later(self, seconds: float) -> None:
        """Look again in *seconds*, or sooner."""
        due = monotonic() + seconds
        self._due = due if self._due is None else min(due, self._due)

    # --- the broker ---------------------------------------------------------------------------------------------------

    def _on_broker(self) -> None:
        """A broker has come; it takes the place of the one before. Those whom that one served lose their connections with it."""
        try:
            sock, _ = self._control.accept()
        except OSError:
            return
        if wire.peer_uid(sock) != self._broker_uid:
            report(f"refused a connection of uid {wire.peer_uid(sock)}")
            sock.close()
            return
        self._lose_broker()
        sock.setblocking(False)
        self._broker = sock
        self._watch(sock, self._lose_broker)  # it says nothing: what can be read is its end

    def _lose_broker(self) -> None:
        if self._broker is not None:
            self._unwatch(self._broker)
            self._broker.close()
            self._broker = None
            self._gone_at = monotonic()

    # --- users --------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        """Take those who have connected out of the queue, where one user's would stand before everybody else's."""
        for _ in range(AT_ONCE):
            try:
                sock, _ = self._users.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                report(f"accepting failed: {exc}")
                self._pace()
                return
            self._admit(wire.peer_uid(sock), sock)
            if self._users.fileno() not in self._calls:
                return  # there is no room for more

    def _admit(self, uid: int, sock: socket.socket) -> None:
        if uid != 0 and (self._connections[uid] >= CONNECTIONS_MAX or not self._rate.allows(uid)):
            self._refuse(uid, MANY if self._connections[uid] >= CONNECTIONS_MAX else FAST, sock)
            return
        self._connections[uid] += 1
        self._wait(uid, sock, 0)
        if sum(map(len, self._waiting.values())) >= WAITING_MAX:
            self._pace()

    def _wait(self, uid: int, sock: socket.socket, tries: int) -> None:
        self._waiting.setdefault(uid, deque()).append((sock, tries))

    def _serve_next(self) -> bool:
        """Hand over one connection, of whoever's turn it is; are there more that can be?

        One at a time, for it takes a new child: meanwhile others may have come, who are not to wait for all of somebody else's.
        """
        if self._broker is None:
            self._refuse_waiting()
            return False
        if not self._waiting or not self._has_child():
            return False
        uid = next(iter(self._waiting))
        queue = self._waiting.pop(uid)
        served = self._serve(uid, *queue[0])
        if served:
            queue.popleft()
        if queue:
            self._waiting[uid] = queue  # behind everybody else
        return served and bool(self._waiting)

    def _refuse_waiting(self) -> None:
        """There is no broker: whoever has waited for one long enough is told so."""
        if not self._waiting:
            return
        left = BROKER_PATIENCE - (monotonic() - self._gone_at)
        if left > 0:
            self._later(left)
            return
        waiting, self._waiting = self._waiting, {}
        for uid, queue in waiting.items():
            for sock, _ in queue:
                self._left(uid)
                self._refuse(uid, DOWN, sock)

    def _has_child(self) -> bool:
        """Is there a child that waits for something to do?"""
        if self._spare is None:
            self._spare = zygote.new_child(self._children)
        if self._spare is None:
            report("this host allows no more processes")
            self._pace()
        return self._spare is not None

    def _serve(self, uid: int, sock: socket.socket, tries: int) -> bool:
        """Tell the broker who has come, and give the connection to a child; False if the broker cannot be told now."""
        assert self._broker is not None
        inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with inner, outer:
            _bring_no_descriptors(outer)
            try:
                wire.send(self._broker, Arrived(uid=uid).to_body(), (outer.fileno(),))
            except BlockingIOError:
                self._later(AGAIN)
                return False
            except OSError as exc:
                report(f"the broker takes no connections: {exc}")
                self._lose_broker()
                return False
            self._give(SERVE, [sock], (sock.fileno(), inner.fileno()), lambda had: self._served(uid, sock, tries, had=had))
        return True

    def _served(self, uid: int, sock: socket.socket, tries: int, *, had: bool) -> None:
        """A child has ended. If it never *had* the connection, another may."""
        if not had and tries + 1 < TRIES:
            self._wait(uid, sock, tries + 1)
            return
        self._left(uid)
        if not had:
            self._refuse(uid, DOWN, sock)

    def _left(self, uid: int) -> None:
        self._connections[uid] -= 1
        if not self._connections[uid]:
            del self._connections[uid]

    # --- children -----------------------------------------------------------------------------------------------------

    def _give(self, what: bytes, socks: list[socket.socket], fds: tuple[int, ...], ended: Callable[[bool], None]) -> None:
        """Have the spare child do *what* with *fds*; call *ended* at its end, with whether it ever had them.

        *socks* are those of them that users hold: kept until the child says that it has them, and told to go on afterwards. So it
        cannot have ended by itself when they are closed here.
        """
        assert self._spare is not None
        worker, self._spare = self._spare, zygote.new_child(self._children)

        def heard() -> None:
            if socks and _said(worker) == HAVE:
                _drop(socks)
                socks.clear()
                # What it says from now on is not its own any more, and could bring descriptors: it says nothing, it ends.
                worker.shutdown(socket.SHUT_RD)
                self._poll.modify(worker.fileno(), 0)
                _say(worker, GO)
                return
            self._unwatch(worker)
            worker.close()
            ended(not socks)

        self._watch(worker, heard)
        _say(worker, what, fds)

    # --- those who are refused ----------------------------------------------------------------------------------------

    def _refuse(self, uid: int, why: bytes, *socks: socket.socket) -> None:
        refused = self._refused.setdefault((uid, why), [])
        refused += socks
        if len(refused) >= REFUSED_MAX:
            report(f"uid {uid} makes connections beyond the limit faster than they end; nobody is accepted for a moment")
            self._pace()
        self._drop_refused(uid, why)

    def _drop_refused(self, uid: int, why: bytes) -> None:
        """One child at a time drops a user's refused connections: while it hangs, the others of that user wait."""
        key = uid, why
        refused = self._refused.get(key)
        if not refused:
            self._refused.pop(key, None)
        if not refused or key in self._refusing or not self._has_child():
            return
        self._refusing.add(key)
        batch = refused[:BATCH]
        del refused[:BATCH]

        def ended(had: bool) -> None:
            self._refusing.discard(key)
            self._refuse(uid, why, *([] if had else batch))

        self._give(why, list(batch), tuple(sock.fileno() for sock in batch), ended)

    def _pace(self) -> None:
        """Accept nobody for a while; they wait in the socket's queue."""
        self._unwatch(self._users)
        self._later(PACE)

    # --- what is waited for -------------------------------------------------------------------------------------------

    def _watch(self, sock: socket.socket, call: Callable[[], None]) -> None:
        self._calls[sock.fileno()] = call
        self._poll.register(sock.fileno(), select.POLLIN)

    def _unwatch(self, sock: socket.socket) -> None:
        if self._calls.pop(sock.fileno(), None) is not None:
            self._poll.unregister(sock.fileno())


def _said(worker: socket.socket) -> bytes:
    try:
        return worker.recv(16)
    except OSError:
        return b""


def _say(worker: socket.socket, what: bytes, fds: tuple[int, ...] = ()) -> None:
    """Tell a child *what*. One that cannot be told is told to end, if it has not; its end is heard next."""
    try:
        worker.sendmsg([what], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [], socket.MSG_NOSIGNAL)
    except OSError:
        # Also where too many descriptors are in flight on this host: it would wait for ever, and the user with it.
        with contextlib.suppress(OSError):
            worker.shutdown(socket.SHUT_RDWR)


def _drop(socks: Iterable[socket.socket]) -> None:
    """Close our copies of users' connections. A child killed at this moment leaves the last to us: a signal ends such a wait."""
    signal.setitimer(signal.ITIMER_REAL, DROP, DROP)
    for sock in socks:
        sock.close()
    signal.setitimer(signal.ITIMER_REAL, 0)


def _bring_no_descriptors(sock: socket.socket) -> None:
    """Have nobody send descriptors to *sock*, where the kernel can (6.16): a child that was taken over would send its user's."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
