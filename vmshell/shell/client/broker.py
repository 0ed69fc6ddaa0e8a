"""The way to the broker: one connection, one request at a time, errors raised as the classes everybody knows.

Runs in: the shell. Touches the broker's socket only.
"""

from __future__ import annotations

import os
import select
import time

from ... import wire
from ...errors import ProtocolError, VmshellError
from ...refusals import BrokerDown, from_wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...layout import Layout
    from ...messages import Request
    from ..ui.progress import Progress

    Answer = tuple[dict[str, object], tuple[int, ...]]  # what was answered, and the descriptors beside it

FDS_MAX = 2  # descriptors that an answer can bring

# Verbs that change nothing: asked again when the broker went away before it answered.
REPEATABLE = frozenset(("list", "info", "images", "whoami", "version", "console", "networks", "net"))
RESTART_PATIENCE = 3.0  # seconds in which a broker that was just there may come back


class Pending:
    """A request under way. `fileno` can be polled; `receive` takes one packet."""

    def __init__(self, sock: wire.Socket, number: int) -> None:
        self.sock = sock
        self.number = number

    def fileno(self) -> int:
        return self.sock.fileno()

    def ask(self, request: Request) -> None:
        """Send *request*, whose answer is waited for from now on. Raises BrokerDown."""
        self.number += 1
        try:
            try:
                wire.send(self.sock, {"id": self.number, **request.to_body()})
            except BrokenPipeError:
                self.receive()  # it may have said why it closed
                raise
        except OSError as error:
            raise BrokerDown(problem=_reason(error)) from error

    def receive(self) -> str | Answer | None:
        """A progress sentence, or the answer and its descriptors, or None for a packet that is not for us.

        Raises the error the broker answered with, or ConnectionResetError when it has gone.
        """
        packet = wire.recv(self.sock, fds_allowed=FDS_MAX)
        if packet is None:
            raise ConnectionResetError("the broker closed the connection")
        try:
            body = packet.body
            # Number 0: said to the connection, not to a request ("you have 8 connections open").
            if body.get("id") != self.number and not (body.get("id") == 0 and "error" in body):
                return None
            if isinstance(body.get("progress"), str):
                return str(body["progress"])
            if "error" in body:
                raise from_wire(body["error"])
            answer = body.get("ok")
            if not isinstance(answer, dict):
                raise ProtocolError(problem="the answer is neither a result nor an error")
            return answer, wire.take_fds(packet)
        finally:
            packet.close()

    def close(self) -> None:
        self.sock.close()


class Broker:
    """The broker as the shell sees it. *start* (session mode) is called when nobody answers."""

    def __init__(self, layout: Layout, start: Callable[[], None] | None = None) -> None:
        self._layout = layout
        self._start = start
        self._sock: wire.Socket | None = None
        self._number = 0
        self._was_there = False

    def call(self, request: Request, progress: Progress | None = None, *, fds: int = 0) -> Answer:
        """Send *request* and return the answer and the *fds* descriptors beside it. Raises VmshellError."""
        try:
            got = self._call(request, progress, again=True)
        except VmshellError:
            raise
        except BaseException:
            self.close()  # interrupted in the middle: a late answer must not meet the next request
            raise
        return _with_fds(got, fds)

    def begin(self, request: Request) -> Pending:
        """Send *request* on a connection of its own, for a caller that goes on doing other things."""
        pending = Pending(self._connect(), 0)
        try:
            pending.ask(request)
        except BrokerDown:
            pending.close()
            raise
        return pending

    def finish(self, pending: Pending, progress: Progress | None = None, *, fds: int = 0) -> Answer:
        """The answer to *pending*, with *fds* descriptors. Raises VmshellError."""
        try:
            return _with_fds(self.wait(pending, progress), fds)
        except OSError as error:
            raise BrokerDown(problem="it went away while at work on this; look with `list`") from error

    def answer_soon(self, request: Request, seconds: float) -> dict[str, object] | None:
        """The answer if the broker is there and gives it within *seconds*, else None. Nothing is started. Raises VmshellError."""
        try:
            sock = self._open()
        except OSError as error:
            raise BrokerDown(problem=_reason(error)) from error
        pending = Pending(sock, 1)
        try:
            wire.send(sock, {"id": 1, **request.to_body()})
            while select.select([pending], [], [], seconds)[0]:
                got = pending.receive()
                if isinstance(got, tuple):
                    self._sock, self._number = sock, 1  # a connection that has shown to work is kept
                    return got[0]
        except OSError:
            pass
        finally:
            if self._sock is not sock:
                sock.close()
        return None

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _call(self, request: Request, progress: Progress | None, *, again: bool) -> Answer:
        if self._sock is None:
            self._sock = self._connect()
        self._number += 1
        pending = Pending(self._sock, self._number)
        sent = False
        try:
            try:
                wire.send(self._sock, {"id": self._number, **request.to_body()})
                sent = True
            except BrokenPipeError:
                pending.receive()  # it may have said why it closed: raises that, or that it is gone
                raise
            return self.wait(pending, progress)
        except OSError as error:
            self.close()
            if not again or (sent and request.verb not in REPEATABLE):
                what = "it went away while at work on this; look with `list`" if sent else _reason(error)
                raise BrokerDown(problem=what) from error
            return self._call(request, progress, again=False)

    def wait(self, pending: Pending, progress: Progress | None) -> Answer:
        """The answer to *pending*; raises VmshellError, or OSError when the broker has gone."""
        poll = select.poll()
        poll.register(pending, select.POLLIN)
        while True:
            if not poll.poll(500):
                if progress is not None:
                    progress.tick()
                continue
            got = pending.receive()
            if isinstance(got, str):
                if progress is not None:
                    progress.update(got)
            elif got is not None:
                return got

    def _connect(self) -> wire.Socket:
        until = time.monotonic() + (RESTART_PATIENCE if self._was_there else 0)
        while True:
            try:
                return self._open()
            except OSError as error:
                if self._start is not None:
                    self._start()
                    try:
                        return self._open()
                    except OSError as still:
                        raise BrokerDown(problem=_reason(still)) from still
                if time.monotonic() >= until:
                    raise BrokerDown(problem=_reason(error)) from error
            time.sleep(0.05)

    def _open(self) -> wire.Socket:
        sock = wire.connect(self._layout.broker_socket, timeout=5)
        sock.settimeout(None)
        # Whoever could put a socket there first would read requests and answer them with descriptors of their own (D24).
        expected = os.geteuid() if self._layout.embedded else 0
        if wire.peer_uid(sock) != expected:
            sock.close()
            raise PermissionError("somebody else listens in its place")
        self._was_there = True
        return sock


def _with_fds(answer: Answer, count: int) -> Answer:
    """*answer*, which must bring *count* descriptors."""
    fds = answer[1]
    if len(fds) != count:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(problem=f"it should bring {count} descriptors and brings {len(fds)}")
    return answer


def _reason(error: OSError) -> str:
    if isinstance(error, PermissionError) and error.errno is None:
        return str(error)
    if isinstance(error, TimeoutError):
        return "it takes no connections"
    return (error.strerror or str(error) or "no answer").lower()
