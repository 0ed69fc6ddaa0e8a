"""One VM's serial console: bytes from QEMU into the ring, to the viewers and into the log; keys the other way.

Per round at most one read of at most 64 KiB, so that a flooding guest delays another one's echo by one read and no more.
Reading waits only for viewers with patience (see `viewers.py`); keys wait for the guest in a bounded place, and the one
who types waits with them, never anybody else.
Runs in: the relay. Touches the two descriptors of one serial port (see `port.py`) and the VM's log.
"""

from __future__ import annotations

import os
import time

from .loop import IN, OUT
from .ring import Ring
from .viewers import Audience

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from .logfile import Log, NoLog
    from .loop import Loop, Timer
    from .port import Port
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

# A serial port under emulation speaks byte by byte. Many small reads in a row that no key has asked for are gathered: they
# lie in the FIFO meanwhile, the host saves most of the work, and a viewer sees the text a few milliseconds later.
CRUMB = 16 * 1024
CRUMBS = 16
CRUMB_GAP = 0.005
NAP = 0.005
SOCKET_NAP = 0.002  # a socket is full with 278 single bytes, and then the guest waits
NAP_FOR_OTHERS = 0.02  # while somebody types on another console; at 1.4 MB/s half of a FIFO
AFTER_KEYS = 0.1

# While somebody types, on whichever console, a flood gives way: 64 KiB a millisecond is still more than a guest can say.
BULK = 32 * 1024
BULK_NAP = 0.001


class Console:
    """Outlives its port: after a loss the VM brings a new one with `connect`. The port's descriptors stay the VM's to close."""

    def __init__(self, loop: Loop, log: Log | NoLog, machine: Machine, service: Service, number: int) -> None:
        self.ring = Ring()
        self.audience = Audience(loop, self.ring, self, service, f"viewer-{number}")
        self.seen = False  # has the guest said anything since it was started?
        self.log = log
        self._loop = loop
        self._machine = machine
        self._port: Port | None = None
        self._keys = bytearray()
        self._held = False
        self._timer: Timer | None = None
        self._heard_at = -1.0
        self._typed_until = 0.0
        self._crumbs = 0
        self._crumb_until = 0.0

    # --- the port ---

    @property
    def connected(self) -> bool:
        return self._port is not None

    def connect(self, port: Port) -> None:
        """Read and write *port* from now on."""
        self._port = port
        self._held = False
        self._loop.add(port.output_fd, IN, self._on_output, self)
        self._loop.add(port.input_fd, 0, self._on_room, self)

    def remember(self, since: float) -> None:
        """After a restart: refill the ring from the log; *since* (seconds since the epoch) is when the VM was started."""
        self.ring.fill(self.log.tail(self.ring.size))
        changed = self.log.changed()
        if changed >= since > 0.0:
            self.seen = True
            self._heard_at = self._loop.now - max(0.0, time.time() - changed)

    def disconnect(self) -> None:
        if self._port is None:
            return
        self._loop.drop(self._port.output_fd)
        self._loop.drop(self._port.input_fd)
        self._port = None
        self._wake()
        self._held = False
        self.audience.release()
        self._keys.clear()
        self.audience.keys_wanted()

    def finish(self) -> None:
        """The VM is gone: take its last words, waiting for nobody, and disconnect."""
        self._wake()
        for _ in range(DRAIN_ROUNDS):
            if not self._read(self.ring.size):
                break
        self.disconnect()

    def broken(self, exc: Exception) -> None:
        self._machine.broken(exc)

    def _on_output(self, events: int) -> None:
        room = self.audience.room() if self.audience.blocked else self.ring.size
        if room < MIN_ROOM:
            self._hold()
        else:
            self._read(room)

    def _listen(self) -> None:
        if self._port is not None:
            self._loop.want(self._port.output_fd, 0 if self._held or self._timer is not None else IN)
            self._loop.want(self._port.input_fd, OUT if self._keys else 0)

    # --- from the guest ---

    def _read(self, room: int) -> bool:
        """Read once and hand it round; False when there was nothing."""
        if self._port is None:
            return False
        try:
            size = os.readv(self._port.output_fd, self.ring.space(room))
        except BlockingIOError:
            self._pace(0)  # a QEMU that reads its own words could else keep us busy for nothing
            return False
        except OSError:
            size = 0
        if not size:
            self.disconnect()
            self._machine.console_lost()
            return False
        parts = self.ring.advance(size)
        self.audience.deliver()
        self._heard_at = self._loop.now
        self.log.write(parts, size, self._heard_at)
        if not self.seen:
            self.seen = True
            self._machine.first_output()
        self._pace(size)
        return True

    def _pace(self, size: int) -> None:
        """After a read of *size* bytes: is it to be a while until the next?"""
        now = self._loop.now
        if size < CRUMB and now < self._crumb_until:
            self._crumbs += 1
            if self._crumbs > CRUMBS and now > self._typed_until:
                nap = self._nap_time(now)
                self._crumb_until = now + nap + CRUMB_GAP
                self._nap(nap)
                return
        elif size >= BULK and now < self._loop.typing_until:
            self._nap(BULK_NAP)
        elif self._crumbs:
            self._crumbs = 0
        self._crumb_until = now + CRUMB_GAP

    def _nap_time(self, now: float) -> float:
        if self._port is None or not self._port.lasting:
            return SOCKET_NAP
        return NAP_FOR_OTHERS if now < self._loop.typing_until else NAP

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
        if self._port is None:
            return True
        self._typed_until = self._loop.typing_until = self._loop.now + AFTER_KEYS
        if not self._keys:
            try:
                sent = os.write(self._port.input_fd, keys)
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

    def _on_room(self, events: int) -> None:
        """The guest takes keys again."""
        if self._port is None or not self._keys:
            return
        try:
            sent = os.write(self._port.input_fd, self._keys)
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
