"""One VM's serial console: bytes from QEMU into the ring, to the viewers and into the log; keys the other way.

Per round at most one read of at most 64 KiB, so that a flooding guest delays another one's echo by one read and no more.
Reading waits only for viewers with patience (see `viewers.py`); keys wait for the guest in a bounded place, and the one
who types waits with them, never anybody else.
Runs in: the relay. Touches one `console.sock` and the VM's log.
"""

from __future__ import annotations

import os
import time

from .loop import IN, OUT
from .ring import Ring
from .viewers import Audience

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Protocol

    from .logfile import Log, NoLog
    from .loop import Loop, Timer
    from .service import Service

    class Machine(Protocol):
        """Whose console it is."""

        def console_lost(self) -> None: ...
        def first_output(self) -> None: ...
        def send_break(self) -> None: ...
        def viewers_changed(self, count: int) -> None: ...
        def state_shown(self) -> str: ...
        def broken(self, exc: Exception) -> None: ...


MIN_ROOM = 16 * 1024  # below this, waiting is cheaper than reading in crumbs
KEYS_MAX = 128 * 1024
DRAIN_ROUNDS = 16  # 1 MiB of last words

# A serial port under emulation speaks byte by byte. Many such reads in a row that no key has asked for are gathered:
# the guest does not notice, the host saves most of the work, and a viewer sees the text a millisecond later.
CRUMB = 2048
CRUMBS = 16
CRUMB_GAP = 0.001
NAP = 0.002
AFTER_KEYS = 0.1

# While somebody types, on whichever console, a flood gives way: 64 KiB a millisecond is still more than a guest can say.
BULK = 32 * 1024
BULK_NAP = 0.001


class Console:
    """Outlives its connection: after a loss the VM brings a new one with `connect`."""

    def __init__(self, loop: Loop, log: Log | NoLog, machine: Machine, service: Service, number: int) -> None:
        self.ring = Ring()
        self.audience = Audience(loop, self.ring, self, service, f"viewer-{number}")
        self.seen = False  # has the guest said anything since it was started?
        self.log = log
        self._loop = loop
        self._machine = machine
        self._sock: socket.socket | None = None
        self._fd = -1
        self._keys = bytearray()
        self._held = False
        self._timer: Timer | None = None
        self._heard_at = -1.0
        self._typed_until = 0.0
        self._crumbs = 0
        self._crumb_until = 0.0

    # --- the connection ---

    @property
    def connected(self) -> bool:
        return self._fd >= 0

    def fileno(self) -> int:
        return self._fd

    def connect(self, sock: socket.socket) -> None:
        """Take over the connection to QEMU's serial port."""
        self._sock = sock
        self._fd = sock.fileno()
        self._held = False
        self._loop.add(self._fd, IN, self._on_event, self)

    def remember(self, since: float) -> None:
        """After a restart: refill the ring from the log; *since* (seconds since the epoch) is when the VM was started."""
        self.ring.fill(self.log.tail(self.ring.size))
        changed = self.log.changed()
        if changed >= since > 0.0:
            self.seen = True
            self._heard_at = self._loop.now - max(0.0, time.time() - changed)

    def disconnect(self) -> None:
        if self._sock is None:
            return
        self._loop.drop(self._fd)
        self._sock.close()
        self._sock, self._fd = None, -1
        self._wake()
        self._held = False
        self.audience.release()
        self._keys.clear()
        self.audience.keys_wanted()

    def finish(self) -> None:
        """The VM is gone: take its last words, waiting for nobody, and disconnect."""
        self._wake()
        for _ in range(DRAIN_ROUNDS):
            if self._fd < 0 or not self._read(self.ring.size):
                break
        self.disconnect()

    def broken(self, exc: Exception) -> None:
        self._machine.broken(exc)

    def _on_event(self, events: int) -> None:
        if events & OUT and self._keys:
            self._send_keys()
        if events & ~OUT:
            if self._held:
                # Only keys were waited for and QEMU has gone; what it left is read when the viewers are ready for it.
                self._keys.clear()
                self._listen()
                return
            room = self.audience.room() if self.audience.blocked else self.ring.size
            if room < MIN_ROOM:
                self._hold()
            else:
                self._read(room)

    def _listen(self) -> None:
        if self._fd >= 0:
            self._loop.want(self._fd, (0 if self._held or self._timer is not None else IN) | (OUT if self._keys else 0))

    # --- from the guest ---

    def _read(self, room: int) -> bool:
        """Read once and hand it round; False when there was nothing."""
        try:
            size = os.readv(self._fd, self.ring.space(room))
        except BlockingIOError:
            return False
        except OSError:
            size = 0
        if not size:
            self.disconnect()
            self._machine.console_lost()
            return False
        parts = self.ring.advance(size)
        self.audience.deliver()
        self._heard_at = now = self._loop.now
        self.log.write(parts, size, now)
        if not self.seen:
            self.seen = True
            self._machine.first_output()
        if size < CRUMB and now < self._crumb_until:
            self._crumbs += 1
            if self._crumbs > CRUMBS and now > self._typed_until:
                self._crumb_until = now + 3 * NAP
                self._nap(NAP)
                return True
        elif size >= BULK and now < self._loop.typing_until:
            self._nap(BULK_NAP)
        elif self._crumbs:
            self._crumbs = 0
        self._crumb_until = now + CRUMB_GAP
        return True

    def _nap(self, seconds: float) -> None:
        """Read no more for so long."""
        if self._timer is None:
            self._timer = self._loop.after(seconds, self._wake, self)
            self._listen()

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._listen()

    def _hold(self) -> None:
        self._held = True
        self._listen()
        self.audience.charge(MIN_ROOM)
        self._go_on()

    def review(self) -> None:
        """A viewer has read, left or run out of patience: perhaps reading can go on."""
        if self._held:
            self.audience.charge(MIN_ROOM)
            self._go_on()

    def _go_on(self) -> None:
        if self.audience.room() >= MIN_ROOM:
            self._held = False
            self.audience.release()
            self._listen()

    # --- to the guest ---

    def type(self, keys: bytes) -> bool:
        """Send *keys*; False when the guest does not take them all just now (they are kept, up to a limit)."""
        if self._fd < 0:
            return True
        self._typed_until = self._loop.typing_until = self._loop.now + AFTER_KEYS
        if not self._keys:
            try:
                sent = os.write(self._fd, keys)
            except BlockingIOError:
                sent = 0
            except OSError:
                return True  # QEMU is going; reading will notice
            if sent == len(keys):
                return True
            keys = keys[sent:]
        if len(self._keys) + len(keys) <= KEYS_MAX:
            self._keys += keys
        self._listen()
        return False

    def _send_keys(self) -> None:
        try:
            sent = os.write(self._fd, self._keys)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._keys)
        del self._keys[:sent]
        if not self._keys:
            self._listen()
            self.audience.keys_wanted()

    # --- for the audience ---

    def send_break(self) -> None:
        self._machine.send_break()

    def viewers_changed(self, count: int) -> None:
        self._machine.viewers_changed(count)

    def describe(self) -> dict[str, object]:
        quiet = max(0, int(self._loop.now - self._heard_at)) if self.seen else None
        return {"quiet_s": quiet, "state": self._machine.state_shown()}
