"""How many guests boot at a time, whose turn is next, and which of them never came up.

Fifty guests booting at once on two cores take longer than fifty in turn, and some hang for good. So a boot takes a place (one
per core by default) until its guest is idle after it has printed something, or has had its time. One that prints nothing keeps
its place no longer than it keeps a CPU busy, and that for SILENT_CPU at most: the same look at CPU time finds the guest that
spins without ever printing a byte. It is measured in CPU seconds, which a busy host does not stretch.
Runs in: the broker.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from ...messages import QUEUED, STARTING
from ..host.processes import cpu_demand, cpu_seconds
from ..runtime.loop import Loop
from ..vm.vm import Vm

TICK = 0.25  # seconds between two looks
SAMPLE = 0.5  # seconds over which a guest's idleness is judged
IDLE = 0.15  # of one core; a booting TCG guest uses all of it, one at its login prompt 0.002
SILENT_TIME_MAX = 60.0  # seconds after which a place is free though the guest has printed nothing
BUSY_TIME_MAX = 20.0  # seconds after its first byte; some guests never become idle
SILENT_CPU = 20.0  # CPU seconds without a byte of output
USERS_AT_ONCE = 2  # so many users boot at a time, also where there are fewer places

Entry = tuple[Vm, Callable[[], None]]


class _Boot:
    __slots__ = ("began", "ran", "sampled", "spoke", "used", "vm", "wanted")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.began = self.sampled = time.monotonic()
        self.ran = False  # when the present sample began
        self.spoke: float | None = None
        self.used = 0.0  # of CPU time, by the beginning of the present sample
        self.wanted = 0.0  # with the time in which there was no CPU for it


class BootQueue:
    """Turns go round by user: the next one is that of the user with the fewest boots in progress; of several, in rotation.

    One user may have all places as long as nobody else waits. Another, of whom nothing boots, need not wait until that one's are
    over: as long as fewer users boot than there are places, the first boot of a further one takes a place beyond them. So fewer
    than twice as many guests boot as there are places (of one place: two), and share the CPUs.
    `pid_of` gives a VM's QEMU, 0 while there is none.
    """

    def __init__(self, loop: Loop, places: int, pid_of: Callable[[Vm], int]) -> None:
        self._loop = loop
        self._places = places
        self._pid_of = pid_of
        self._queues: dict[int, dict[int, Entry]] = {}  # by uid and VM's number; users in the order of their next turns
        self._booting: dict[int, _Boot] = {}
        self._silent: dict[int, Vm] = {}
        self._ticking = False

    def enter(self, vm: Vm, start: Callable[[], None]) -> None:
        """Call *start* when it is *vm*'s turn: at once if a place is free."""
        self._queues.setdefault(vm.uid, {})[vm.number] = (vm, start)
        self._admit()

    def ahead(self, vm: Vm) -> int:
        """How many boots are before *vm*'s: those in progress, and those whose turn is earlier by what is known now."""
        if not self.queued(vm):
            return 0
        own = list(self._queues[vm.uid]).index(vm.number)
        in_turn = self._in_turn()
        place = in_turn.index(vm.uid)
        # Until its turn every other user has as many as its own, and those who come before its own one more.
        others = [min(own + (index < place), len(self._queues[uid])) for index, uid in enumerate(in_turn) if uid != vm.uid]
        return len(self._booting) + own + sum(others)

    def queued(self, vm: Vm) -> bool:
        return vm.number in self._queues.get(vm.uid, {})

    def leave(self, vm: Vm) -> None:
        """*vm* has ended or will not boot: give back its turn or its place. Harmless if it has none."""
        self._take_out(vm)
        self._silent.pop(vm.number, None)
        if self._booting.pop(vm.number, None):
            # In a turn of its own: a hundred boots that fail at once would otherwise fail inside each other.
            self._loop.after(0, self._admit)

    def _take_out(self, vm: Vm) -> None:
        queue = self._queues.get(vm.uid, {})
        queue.pop(vm.number, None)
        if not queue:
            self._queues.pop(vm.uid, None)

    # --- turns --------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (uid := self._next()) is not None:
            vm, start = next(iter(self._queues[uid].values()))
            self._take_out(vm)
            if queue := self._queues.pop(uid, None):
                self._queues[uid] = queue  # whoever had a turn waits for the others' now
            self._booting[vm.number] = _Boot(vm)
            self._silent[vm.number] = vm
            start()
        self._tick_later()

    def _next(self) -> int | None:
        """The user who may boot now, if there is one."""
        if not self._queues:
            return None
        users = self._users()
        uid = self._in_turn()[0]
        if len(self._booting) < self._places:
            return uid
        beyond = not users[uid] and len(users) < max(self._places, USERS_AT_ONCE)
        return uid if beyond else None

    def _users(self) -> Counter[int]:
        """How many boots each user has in progress."""
        return Counter(boot.vm.uid for boot in self._booting.values())

    def _in_turn(self) -> list[int]:
        """The users who wait, the next one first."""
        users = self._users()
        return sorted(self._queues, key=lambda uid: users[uid])

    # --- how far they are ---------------------------------------------------------------------------------------------

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
        pid = self._pid_of(boot.vm)
        used, wanted = cpu_seconds(pid), cpu_demand(pid)
        # A silent one that waits for a CPU is not idle. One that has printed may only wake up now and then, and wait each time.
        busy = used - boot.used if boot.vm.seen_output else max(used - boot.used, wanted - boot.wanted)
        load = busy / (now - boot.sampled)
        # Before its first instruction every guest is silent and idle: of a silent one no sample counts in which it began to run.
        judged = boot.vm.seen_output or boot.ran
        boot.used, boot.wanted, boot.sampled = used, wanted, now
        boot.ran = boot.vm.state not in (QUEUED, STARTING)
        return (judged and load < IDLE) or (boot.spoke is None and used >= SILENT_CPU)

    def _look_for_silence(self, vm: Vm) -> None:
        if vm.seen_output:
            self._silent.pop(vm.number, None)
            vm.note = "" if vm.note.startswith("silent") else vm.note
        elif (used := cpu_seconds(self._pid_of(vm))) >= SILENT_CPU and (not vm.note or vm.note.startswith("silent")):
            vm.note = f"silent: {used:.0f} s of CPU and no output"
