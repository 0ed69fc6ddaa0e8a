"""One attached shell: what it still has to get, and what it says. The protocol is described in `viewers.py`.

Runs in: the relay. Touches one viewer's socket; viewers are hostile (any program of the user's may hold that end).
"""

from __future__ import annotations

import json
import socket

from .. import encoding
from ..errors import ProtocolError
from .loop import GONE, IN, OUT, PEER_CLOSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .viewers import Audience

PAYLOAD_MAX = 64 * 1024
CONTROL_MAX = 1024
PATIENCE = 0.2  # seconds
FLOOR = 1_000_000  # bytes a second; twice what a serial port under emulation can say
IDLE_PACKETS_PER_SECOND = 1000  # controls, and keys without the pen: more than a person or a paste makes
LINGER = 5.0  # seconds a slow viewer has left to read the end

DATA = b"d"
NOTICE = b"n"
KEYS_TAG = ord("d")
CONTROL_TAG = ord("c")

# Packets are read into one place: each is dealt with before the next is read. One byte more than allowed, to see excess.
_packet = memoryview(bytearray(1 + PAYLOAD_MAX + 1))


class Viewer:
    """One attached shell."""

    __slots__ = (
        "audience", "blocked", "closed", "ending", "fd", "forfeit", "kept", "label", "notices", "noise", "noise_since",
        "patience", "paused", "position", "readonly", "refused_at", "since", "sock",
    )  # fmt: skip

    def __init__(self, audience: Audience, sock: socket.socket, label: str, readonly: bool, position: int) -> None:
        self.audience = audience
        self.sock = sock
        self.fd = sock.fileno()
        self.label = label
        self.kept = ""  # its name in the service manager's descriptor store
        self.readonly = readonly
        self.position = position
        self.blocked = False  # its socket is full; EPOLLOUT is awaited
        self.forfeit = False  # its patience is used up: nothing waits for it until it has caught up
        self.patience = PATIENCE
        self.since = 0.0  # since when reading from the VM waits for it, 0.0 when it does not
        self.paused = False  # the guest takes no more keys, so none are read
        self.notices: dict[str, bytes] = {}  # by kind, a later one in place of an earlier one: bounded by the kinds
        self.refused_at = -10.0
        self.noise = 0
        self.noise_since = 0.0
        self.ending = False
        self.closed = False

    # --- towards the viewer ---

    def tell(self, kind: str, **fields: object) -> None:
        """Send a notice as soon as the viewer takes it."""
        self.notices.pop(kind, None)
        self.notices[kind] = NOTICE + json.dumps({"notice": kind, **fields}, separators=(",", ":")).encode("ascii")
        if not self.blocked:
            self.pump()

    def pump(self) -> None:
        """Send what there is until the socket is full."""
        ring = self.audience.ring
        try:
            while self.notices:
                kind, packet = next(iter(self.notices.items()))
                if kind == "end" and self.position < ring.head:
                    break
                self.sock.send(packet)
                del self.notices[kind]
            while self.position < ring.head:
                lost = ring.start - self.position
                if lost > 0:
                    self.position = ring.start
                    self.notices["gap"] = NOTICE + b'{"notice":"gap","bytes":%d}' % lost
                    self.sock.send(self.notices["gap"])
                    del self.notices["gap"]
                parts = ring.since(self.position)
                size = ring.head - self.position
                self.sock.sendmsg([DATA, *parts])
                self.took(size)
            if self.ending:
                if "end" in self.notices:
                    self.sock.send(self.notices.pop("end"))
                self.close()
                return
        except BlockingIOError:
            self.block()
            return
        except OSError:
            self.close()
            return
        self.forfeit = False
        if self.blocked:
            self.blocked = False
            self.audience.unblocked()
            self.listen()

    def took(self, size: int) -> None:
        """Count *size* bytes as sent, and as patience earned."""
        self.position += size
        if self.patience < PATIENCE:
            self.patience = min(PATIENCE, self.patience + size / FLOOR)

    def block(self) -> None:
        if not self.blocked:
            self.blocked = True
            self.audience.blocked += 1
            self.listen()

    def listen(self) -> None:
        mask = PEER_CLOSED if self.paused or self.ending else IN
        self.audience.loop.want(self.fd, mask | OUT if self.blocked else mask)

    # --- from the viewer ---

    def on_event(self, events: int) -> None:
        if events & OUT and self.blocked:
            self.pump()
            self.audience.host.review()
        if self.closed:
            return
        if events & IN:
            self.read()
        elif events & (GONE | PEER_CLOSED):
            self.close()

    def read(self) -> None:
        """Take one packet; the next one waits its turn behind the other peers."""
        try:
            size = self.sock.recv_into(_packet, len(_packet), socket.MSG_TRUNC)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not 1 <= size <= 1 + PAYLOAD_MAX:
            self.close()
            return
        tag = _packet[0]
        if tag == KEYS_TAG and size > 1:
            self.audience.keys(self, bytes(_packet[1:size]))
        elif self.noisy():
            return
        elif tag == CONTROL_TAG and size <= 1 + CONTROL_MAX:
            try:
                what = encoding.decode(bytes(_packet[1:size])).get("do")
            except ProtocolError:
                return
            self.audience.control(self, what)

    def noisy(self) -> bool:
        """Count a packet that leads to nothing; True when there were so many that the viewer has been closed."""
        now = self.audience.loop.now
        if now - self.noise_since >= 1.0:
            self.noise, self.noise_since = 0, now
        self.noise += 1
        if self.noise <= IDLE_PACKETS_PER_SECOND:
            return False
        self.close()
        return True

    def refuse(self, why: str) -> None:
        """Say why keys or a control led to nothing, at most once a second."""
        now = self.audience.loop.now
        if now - self.refused_at >= 1.0:
            self.refused_at = now
            self.tell("refused", why=why)

    # --- the end ---

    def end(self, reason: str) -> None:
        """Say goodbye once everything before it has been read, and wait for that only a while."""
        self.ending = True
        self.tell("end", reason=reason)
        if not self.closed:
            self.listen()
            self.audience.loop.after(LINGER, self.close, self)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.audience.loop.drop(self.fd)
        self.sock.close()
        # As long as the service manager holds a copy, the other end sees no end.
        self.audience.service.remove(self.kept)
        if self.blocked:
            self.blocked = False
            self.audience.unblocked()
        self.audience.left(self)

    def broken(self, exc: Exception) -> None:
        self.close()
