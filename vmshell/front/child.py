"""One connection: a user's packets are read, checked and handed to the broker; its answers, with their descriptors, go back.

Whatever a user sends costs this process, and the time it has; when that is over, or anything is not as it should be, it ends by
`_exit`, which waits for nothing that lies in the socket.
Runs in: a front child, caged, without rights. Touches the three descriptors that the server gave it.
"""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections import Counter
from typing import NoReturn

from .. import wire
from ..encoding import FRAME_MAX, decode, encode
from ..errors import BadValue, Internal, ProtocolError, VmshellError, safe
from ..fields import request_id
from ..messages import Define, Explain, Request, parse_request
from ..model import definition as definitions
from ..refusals import AnswerTooLarge, BrokerDown, TooManyConnections, TooManyRequests, Upgraded
from . import cage

# What the server says, and the child between the two: when it holds what it was given, and when the server no longer does.
SERVE, MANY, FAST, DOWN = b"serve", b"many", b"fast", b"down"
HAVE, GO = b"have", b"go"
CONNECTIONS_MAX = 128  # of one user; the policy's limit, which is the broker's to hold, is lower
# A new connection costs a process. So many may one user make in a row, and then each second; the policy's limit is lower, too.
IN_A_ROW, EACH_SECOND = 1000, 50
BATCH = 250  # refused connections that one child drops
DESCRIPTORS_MAX = 2  # beside an answer
CPU_SECONDS, SECONDS = 2, 10  # for one request
LOOK, LOOK_MOST = 0.005, 0.2  # seconds between two looks whether the user has read, doubled each time


def run(control: socket.socket) -> NoReturn:
    """Wait for what the server has to do, do it, and end the process."""
    try:
        data, ancillary, _, _ = control.recvmsg(16, _socket.CMSG_SPACE(4 * BATCH), _socket.MSG_CMSG_CLOEXEC)
        fds = [fd for _, _, payload in ancillary for fd in struct.unpack(f"{len(payload) // 4}i", payload)]
        socks = [_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd) for fd in fds]
        if data:
            cage.enter()
            control.send(HAVE)
            # What comes is read only when nobody but this process would have to drop it.
            if control.recv(16) == GO:
                _work(data, socks, control)
    except OSError:
        pass  # somebody has gone
    except Exception as exc:
        report(f"{type(exc).__name__}: {exc}")
    finally:
        # Here, while `socks` is in reach: to close one of them may take as long as its sender likes.
        os._exit(0)


def _work(what: bytes, socks: list[_socket.socket], control: socket.socket) -> None:
    if what == SERVE:
        user, broker = socks
        Connection(user, broker, control).serve()
    elif what == MANY:
        _refuse(socks, TooManyRequests(count=CONNECTIONS_MAX, what="connections", limit=CONNECTIONS_MAX))
    elif what == FAST:
        _refuse(socks, TooManyConnections(limit=EACH_SECOND))
    elif what == DOWN:
        _refuse(socks, BrokerDown(problem="it is not running"))


def _refuse(socks: list[_socket.socket], error: VmshellError) -> None:
    """Say why to each of *socks*; all of them end with this process, which alone pays for what lies in them."""
    data = encode({"id": 0, "error": error.to_wire()})
    for sock in socks:
        try:
            sock.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError:
            continue


class Connection:
    """*control* ends with the server, and this with it."""

    def __init__(self, user: _socket.socket, broker: _socket.socket, control: socket.socket) -> None:
        self._user = user
        self._broker = broker
        self._control = control
        self._asked: Counter[int] = Counter()  # requests that are not answered yet, by number
        self._owed: int | None = None  # the one whose answer will bring descriptors
        self._given = False  # descriptors that the user may not have taken yet
        user.setblocking(False)
        broker.settimeout(SECONDS)

    def serve(self) -> None:
        """Serve until either side has gone, and what was given has been taken."""
        try:
            self._serve()
        finally:
            self._wait_until_taken()

    def _serve(self) -> None:
        user, broker = self._user.fileno(), self._broker.fileno()
        poll = select.poll()
        for fd in (user, broker, self._control.fileno()):
            poll.register(fd, select.POLLIN)
        calls = {user: self._from_user, broker: self._from_broker}
        while True:
            # What a user holds in flight is one answer's descriptors: nothing more is asked until that is given (N3).
            poll.modify(user, 0 if self._owed is not None else select.POLLIN)
            for fd, events in poll.poll():
                if not events & select.POLLIN or fd not in calls or not calls[fd]():
                    return

    def _from_user(self) -> bool:
        """Hand one request on, or answer what is wrong with it; False at the connection's end."""
        if self._owed is not None:
            return True
        self._wait_until_taken()
        _bound_time()
        try:
            data, flags = self._packet()
        except ConnectionResetError:
            # Gone, with an answer unread: the kernel says so before it gives out what came last.
            data, flags = self._packet()
        if not data and not flags & _socket.MSG_CTRUNC:
            return False
        going_on = self._request(data, flags)
        _unbound_time()
        return going_on

    def _packet(self) -> tuple[bytes, int]:
        # Without room for control data: a descriptor that comes along is never ours, and goes in the kernel.
        data, _, flags, _ = self._user.recvmsg(FRAME_MAX)
        return data, flags

    def _request(self, data: bytes, flags: int) -> bool:
        ident = 0
        try:
            if flags & _socket.MSG_CTRUNC:
                raise Upgraded()  # no request brings a descriptor (N2); those of the shells before the pipes did
            if flags & _socket.MSG_TRUNC:
                raise ProtocolError(problem=f"it was larger than {FRAME_MAX} bytes")
            body = decode(data)
            ident = request_id(body)
            request = _checked(body)
            if request.brings_fds() and self._asked[ident]:
                raise BadValue(field="id", value=ident, rule="another request of this number is not answered yet")
            if not self._hand_on({"id": ident, **request.to_body()}):
                return False
            self._asked[ident] += 1
            self._owed = ident if request.brings_fds() else None
        except VmshellError as exc:
            broken = ident == 0 and isinstance(exc, ProtocolError | Upgraded)
            self._answer({"id": ident, "error": exc.to_wire()})
            return not broken
        except OSError:
            raise
        except Exception as exc:
            reference = os.urandom(4).hex()
            report(f"{reference}: {type(exc).__name__}: {exc}")
            self._answer({"id": ident, "error": Internal(reference=reference).to_wire()})
        return True

    def _hand_on(self, body: dict[str, object]) -> bool:
        """Send *body* to the broker. If that has ended the connection, what it said last, why, is still there for the user."""
        try:
            self._broker.send(encode(body))
        except (BrokenPipeError, ConnectionResetError):
            while self._from_broker():
                pass
            return False
        return True

    def _from_broker(self) -> bool:
        packet = wire.recv(self._broker, fds_allowed=DESCRIPTORS_MAX)
        if packet is None:
            return False
        if packet.fds:
            self._wait_until_taken()
            self._given = True
        self._answer(packet.body, tuple(packet.fds))
        packet.close()
        if "progress" not in packet.body:
            self._answered(packet.body.get("id"))
        return True

    def _answered(self, ident: object) -> None:
        if isinstance(ident, int):
            self._asked -= Counter({ident: 1})  # which forgets those of which none is left
        if ident == self._owed:
            self._owed = None

    def _wait_until_taken(self) -> None:
        """Wait until the user has read the descriptors that were given, or has gone, or the server has, however long that takes.

        They are in flight until then at the cost of all fronts, and counted by this connection: so nothing that the user sends
        is read, which could end this process, and nothing else ends it (N3).
        """
        poll, wait = select.poll(), LOOK
        poll.register(self._control.fileno(), 0)
        while self._given and fcntl.ioctl(self._user.fileno(), cage.SIOCOUTQ, bytes(4)) != bytes(4):
            if poll.poll(wait * 1000):
                return
            wait = min(2 * wait, LOOK_MOST)
        self._given = False

    def _answer(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Send. Raises OSError for a user who has gone, or lets answers pile up, who is not worth a byte of anybody's memory."""
        try:
            wire.send(self._user, body, fds)
        except ProtocolError:
            wire.send(self._user, {"id": body.get("id", 0), "error": AnswerTooLarge().to_wire()})


def _checked(body: dict[str, object]) -> Request:
    """The request in *body* as the broker is to see it: checked, a definition's text in its one canonical form."""
    request = parse_request(body)
    if isinstance(request, Explain):
        # What is wrong in there is part of the answer, which the broker gives.
        with contextlib.suppress(VmshellError):
            request.request = _checked(request.request).to_body()
    elif isinstance(request, Define):
        request.text = definitions.to_toml(definitions.parse(request.text, request.vm))
    return request


def warm_up() -> None:
    """Import and make once what a child, which can open no file, could need: what is found out late would end it."""
    text = definitions.to_toml(definitions.parse('[[disk]]\npath = "a"\nsize = "1G"\n[[net]]\n', "a"))
    bodies: tuple[dict[str, object], ...] = (
        {"verb": "define", "vm": "a", "text": text},
        {"verb": "define", "vm": "a", "text": "["},
        {"verb": "none"},
    )
    for data in (*map(encode, bodies), b"{"):
        try:
            _checked(decode(data))
        except VmshellError as exc:
            exc.to_wire()


def _bound_time() -> None:
    """From now on there are CPU_SECONDS of calculating and SECONDS of time; then the kernel ends this process (N4)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime) + CPU_SECONDS, hard))
    signal.alarm(SECONDS)


def _unbound_time() -> None:
    """The request is done: what the broker sends, for hours perhaps, counts against no limit."""
    signal.alarm(0)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))


def report(text: str) -> None:
    """Write one escaped line to the journal."""
    try:
        os.write(sys.stderr.fileno(), f"front: {safe(text)}\n".encode())
    except OSError:
        pass
