"""How many guests boot at a time, and which of them never came up.

Fifty guests booting at once on two cores take longer than fifty in turn, and some hang for good. So a boot takes a place (one
per core by default) until its guest has printed something and become idle, or has had its time. The same look at CPU time finds
the guest that spins without ever printing a byte: measured in CPU seconds, which a busy host does not stretch.
Runs in: the broker.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .host import cpu_seconds
from .loop import Loop
from .vms import Vm

TICK = 0.25  # seconds between two looks
SAMPLE = 0.5  # seconds over which a guest's idleness is judged
IDLE = 0.15  # of one core; a booting TCG guest uses all of it, one at its login prompt 0.002
SILENT_TIME_MAX = 60.0  # seconds after which a place is free though the guest has printed nothing
BUSY_TIME_MAX = 20.0  # seconds after its first byte; some guests never become idle
SILENT_CPU = 20.0  # CPU seconds without a byte of output


class _Boot:
    __slots__ = ("began", "sampled", "spoke", "used", "vm")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.began = self.sampled = time.monotonic()
        self.spoke: float | None = None
        self.used = 0.0


class Admission:
    """First come, first served. `pid_of` gives a VM's QEMU, 0 while there is none."""

    def __init__(self, loop: Loop, places: int, pid_of: Callable[[Vm], int]) -> None:
        self._loop = loop
        self._places = places
        self._pid_of = pid_of
        self._queue: list[tuple[Vm, Callable[[], None]]] = []
        self._booting: dict[int, _Boot] = {}
        self._silent: dict[int, Vm] = {}
        self._ticking = False

    def enter(self, vm: Vm, start: Callable[[], None]) -> None:
        """Call *start* when it is *vm*'s turn: at once if a place is free."""
        self._queue.append((vm, start))
        self._admit()

    def ahead(self, vm: Vm) -> int:
        """How many boots are before *vm*'s."""
        return len(self._booting) + [entry[0] for entry in self._queue].index(vm) if self.queued(vm) else 0

    def queued(self, vm: Vm) -> bool:
        return any(entry[0] is vm for entry in self._queue)

    def leave(self, vm: Vm) -> None:
        """*vm* has ended or will not boot: give back its turn or its place. Harmless if it has none."""
        self._queue = [entry for entry in self._queue if entry[0] is not vm]
        self._silent.pop(vm.number, None)
        if self._booting.pop(vm.number, None):
            # In a turn of its own: a hundred boots that fail at once would otherwise fail inside each other.
            self._loop.after(0, self._admit)

    def _admit(self) -> None:
        while self._queue and len(self._booting) < self._places:
            vm, start = self._queue.pop(0)
            self._booting[vm.number] = _Boot(vm)
            self._silent[vm.number] = vm
            start()
        self._tick_later()

    def _tick_later(self) -> None:
        if not self._ticking and (self._booting or self._silent):
            self._ticking = True
            self._loop.after(TICK if self._booting else 4 * TICK, self._tick)

    def _tick(self) -> None:
        self._ticking = False
        now = time.monotonic()
        over = [boot.vm for boot in self._booting.values() if self._is_over(boot, now)]
        for vm in over:
            self._booting.pop(vm.number, None)
        for vm in list(self._silent.values()):
            self._look_for_silence(vm)
        self._admit()

    def _is_over(self, boot: _Boot, now: float) -> bool:
        if now - boot.began > SILENT_TIME_MAX:
            return True
        if boot.vm.seen_output and boot.spoke is None:
            boot.spoke = now
        if boot.spoke is not None and now - boot.spoke > BUSY_TIME_MAX:
            return True
        if now - boot.sampled < SAMPLE:
            return False
        used = cpu_seconds(self._pid_of(boot.vm))
        load = (used - boot.used) / (now - boot.sampled)
        boot.used, boot.sampled = used, now
        return boot.vm.seen_output and load < IDLE

    def _look_for_silence(self, vm: Vm) -> None:
        if vm.seen_output:
            self._silent.pop(vm.number, None)
            vm.note = "" if vm.note.startswith("silent") else vm.note
        elif (used := cpu_seconds(self._pid_of(vm))) >= SILENT_CPU and (not vm.note or vm.note.startswith("silent")):
            vm.note = f"silent: {used:.0f} s of CPU and no output"
