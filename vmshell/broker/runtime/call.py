"""One request that is being answered, and who asks.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from ...errors import Internal, VmshellError
from ...messages import LABEL_MAX
from . import log


class Peer:
    """Who is at the other end of a connection, as the kernel says it."""

    __slots__ = ("admin", "uid", "user")

    def __init__(self, uid: int, user: str, *, admin: bool) -> None:
        self.uid = uid
        self.user = user
        self.admin = admin

    @property
    def label(self) -> str:
        """How other viewers of a console see this peer."""
        return label_of(self.user)


def label_of(user: str) -> str:
    """As much of the name *user* as the relay keeps whole: in whatever letters, LABEL_MAX bytes."""
    return user.encode()[:LABEL_MAX].decode("utf-8", "ignore")


class Connection(Protocol):
    """What a call needs of the connection that it came by."""

    peer: Peer
    pending: int

    def send(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None: ...


class Call:
    """One request that is being answered. Exactly one of reply/fail gets through; what comes later is ignored."""

    __slots__ = ("_client", "_fds", "connection", "ident", "peer")

    def __init__(self, client: Connection, ident: int) -> None:
        self._client: Connection | None = client
        self._fds: tuple[int, ...] = ()
        self.connection = client
        self.ident = ident
        self.peer = client.peer

    def keep_fds(self, fds: tuple[int, ...]) -> None:
        """Keep descriptors that the reply will bring (ours to close from now on: at once, if they come after the reply)."""
        self._close_fds()
        self._fds = fds
        if self._client is None:
            self._close_fds()

    def reply(self, ok: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        """Answer, with *fds* beside it, which stay open here, or with those that were kept."""
        self._finish({"id": self.ident, "ok": ok}, fds or self._fds)

    def fail(self, error: VmshellError) -> None:
        self._finish({"id": self.ident, "error": error.to_wire()})

    def guard(self, action: Callable[[], None]) -> None:
        """Do what had to wait; whatever it raises is the answer."""
        try:
            action()
        except VmshellError as exc:
            self.fail(exc)
        except Exception as exc:
            self.fail(Internal(reference=log.unexpected(exc)))

    def progress(self, sentence: str) -> None:
        if self._client is not None:
            self._client.send({"id": self.ident, "progress": sentence})

    def _finish(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.pending -= 1
            client.send(body, fds)
        self._close_fds()

    def _close_fds(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = ()
