"""Has somebody else changed our tables (`nft flush ruleset`), or taken away what taps are in? The kernel says so at once.

Every transaction of nftables has a number, one more than the last. Those of ours we know; one that is not ours and names our
tables is somebody else's. A transaction whose notice never came (the socket's buffer was full) leaves a gap in the numbers.
Runs in: tapnet.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from .netlink import DUMP, Channel, attribute, attributes, message, split

TABLE = b"vmshell\0"

_NETFILTER, _SOL_NETLINK, _ADD_MEMBERSHIP = 12, 270, 1
_GROUP = 7  # NFNLGRP_NFTABLES
_GETRULE, _NEWGEN, _GETGEN = 10 << 8 | 7, 10 << 8 | 15, 10 << 8 | 16
_FAMILIES = (7, 1)  # bridge, inet
_GEN_ID = 1
_TABLE_NAME = 1  # the same number in messages about tables, chains, rules, sets, elements and objects
_HEADER = 4  # struct nfgenmsg
_LINKS = 1  # RTMGRP_LINK
_DELLINK = 17  # RTM_DELLINK; of family bridge when a port leaves one
_IFINFO, _IFNAME = 16, 3  # struct ifinfomsg, IFLA_IFNAME


class Watch:
    """`own()` around every transaction of ours; `disturbed()` when `fileno()` is readable and from time to time."""

    def __init__(self) -> None:
        self._notices = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
        self._notices.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._notices.bind((0, 0))
        self._notices.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
        self._notices.setblocking(False)
        self._channel = Channel(_NETFILTER)
        self._own: set[int] = set()
        self._seen = self.generation()
        self._awaited = 0
        self._touched = False

    def fileno(self) -> int:
        return self._notices.fileno()

    def awaits(self) -> bool:
        """Has the kernel counted a transaction whose notice has not come? It comes at once, or was lost."""
        return self._awaited > self._seen

    def generation(self) -> int:
        """The number of the last transaction."""
        body = self._channel.ask(message(_GETGEN, 0, bytes(_HEADER)))
        return _number(body)

    def has_tables(self) -> bool:
        """Are both of our tables there, with rules in them?"""
        name = attribute(_TABLE_NAME, TABLE)
        return all(self._channel.count(message(_GETRULE, DUMP, bytes([family, 0, 0, 0]) + name)) for family in _FAMILIES)

    def own(self, before: int) -> None:
        """A transaction of ours has been made since number *before*. With another one beside it we cannot tell which is whose."""
        after = self.generation()
        if after == before + 1:
            self._own.add(after)

    def disturbed(self) -> bool:
        """Did somebody else change our tables, or may it be so?"""
        foreign = self._read()
        now = self.generation()
        if self.awaits():  # since the last look, which is no moment any more
            foreign, self._seen = True, now
        self._awaited = now  # the kernel counts first and gives notice then
        self._own = {number for number in self._own if number > self._seen}
        return foreign

    def _read(self) -> bool:
        foreign = False
        while True:
            try:
                data = self._notices.recv(1 << 16)
            except BlockingIOError:
                return foreign
            except OSError:  # ENOBUFS: notices were lost
                self._touched = foreign = True
                continue
            for kind, _, body in split(data):
                if kind != _NEWGEN:
                    self._touched = self._touched or attributes(body[_HEADER:]).get(_TABLE_NAME) == TABLE
                    continue
                number = _number(body)
                # A gap in the numbers is transactions whose notices were lost.
                lost = number > self._seen + 1 and not self._own.issuperset(range(self._seen + 1, number))
                foreign = foreign or lost or (self._touched and number not in self._own)
                self._seen = max(self._seen, number)
                self._touched = False


class Departures:
    """Interfaces that have gone, or have left their bridge. `fileno()` is readable when there may be any."""

    def __init__(self) -> None:
        self._notices = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._notices.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._notices.bind((0, _LINKS))
        self._notices.setblocking(False)

    def fileno(self) -> int:
        return self._notices.fileno()

    def any(self, wanted: Callable[[str], bool]) -> bool:
        """Is any of those since the last look *wanted*, by its name? Also if notices were lost."""
        names, lost = set(), False
        while True:
            try:
                data = self._notices.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS
                lost = True
                continue
            for kind, _, body in split(data):
                if kind == _DELLINK:
                    names.add(attributes(body[_IFINFO:]).get(_IFNAME, b"").rstrip(b"\0").decode("ascii", "replace"))
        return lost or any(map(wanted, names))


def _number(body: bytes) -> int:
    return int(struct.unpack(">I", attributes(body[_HEADER:])[_GEN_ID])[0])
