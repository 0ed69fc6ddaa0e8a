"""The orders: what the broker may have QEMU do, as QMP commands whose arguments are numbers and names of ours.

A plan is one step or several, taken one by one, each after QEMU has said yes to the one before. When one is refused, what the
earlier ones brought about is undone, last one first, and the order has failed; nobody asks QEMU why (threat B46). Plans
of one step go out at once; of the longer ones only one is on its way at a time, so that no two meet in one CD drive.
Nothing here outlives its monitor connection: ids are drawn at random and node names are fixed, so an order after a restart of
the relay cannot stumble over one from before it.
Runs in: the relay. Touches QEMU by its monitor.
"""

from __future__ import annotations

import os
from collections import deque

from ..messages import Order
from .jobs import run_job, run_until_gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop
    from .qmp import Monitor

    Arguments = dict[str, object]
    Done = Callable[[bool], None]

SERIAL = "ser0"  # the launch line's names: the serial port's character device, `nic0` on `n0`, `port0`, `cd0` and `disk0`
NIC_DRIVERS = {"virtio": "virtio-net-pci", "e1000e": "e1000e", "e1000": "e1000", "rtl8139": "rtl8139"}

WAITING_MAX = 16
# A set of our own for each file: in a paused VM a set that was removed stays, and would give its old file out again.
# QEMU reads the number as an int; the launch line has the small ones.
FDSET_FIRST, FDSET_LAST = 1 << 16, (1 << 31) - 1


class Given:
    """What an order brings for its steps: the numbers of the message, a card, and a number drawn at random."""

    __slots__ = ("disks", "mac", "model", "port", "serial", "value")

    def __init__(self, order: Order) -> None:
        self.value = order.value
        self.disks = order.disks
        self.mac = order.mac
        self.model = order.model
        self.port = order.port
        self.serial = FDSET_FIRST + int.from_bytes(os.urandom(6), "big") % (FDSET_LAST - FDSET_FIRST)


class Step:
    """One command. *undo* takes its effect back; *may_fail*: a refusal is no news; *fd*: the order's descriptor goes beside it;
    *job*, *leaves*: QEMU's yes only means that it has begun, with a job, or with a device that the guest is asked to let go."""

    __slots__ = ("arguments", "command", "fd", "job", "leaves", "may_fail", "undo")

    def __init__(
        self,
        command: str,
        arguments: Callable[[Given], Arguments] | None = None,
        *,
        undo: Step | None = None,
        may_fail: bool = False,
        fd: bool = False,
        job: bool = False,
        leaves: bool = False,
    ) -> None:
        self.command = command
        self.arguments = arguments or _nothing
        self.undo = undo
        self.may_fail = may_fail
        self.fd = fd
        self.job = job
        self.leaves = leaves


# --- arguments --------------------------------------------------------------------------------------------------------


def _nothing(given: Given) -> Arguments:
    return {}


def _bytes(given: Given) -> Arguments:
    return {"value": given.value << 20}


def _link(up: bool) -> Callable[[Given], Arguments]:
    return lambda given: {"name": f"nic{given.value}", "up": up}


def _drive(**more: object) -> Callable[[Given], Arguments]:
    return lambda given: {"id": f"cd{given.value}", **more}


def _set(given: Given) -> Arguments:
    return {"fdset-id": given.serial}


def _disc(given: Given) -> str:
    return f"cd{given.value}-disc"


def _disc_file(given: Given) -> str:
    return f"cd{given.value}-disc-file"


def _file_node(given: Given) -> Arguments:
    node: Arguments = {"driver": "file", "node-name": _disc_file(given), "filename": f"/dev/fdset/{given.serial}"}
    return {**node, "read-only": True, "auto-read-only": False}


def _raw_node(given: Given) -> Arguments:
    return {"driver": "raw", "node-name": _disc(given), "file": _disc_file(given), "read-only": True}


def _medium(given: Given) -> Arguments:
    return {"id": f"cd{given.value}", "node-name": _disc(given)}


def _client_name(given: Given) -> Arguments:
    return {"fdname": f"vnc{given.serial}"}


def _client(given: Given) -> Arguments:
    # The broker has decided who may look; a password of QEMU's would be a second, weaker one.
    return {"protocol": "vnc", **_client_name(given), "skipauth": True}


def _tap_name(given: Given) -> Arguments:
    return {"fdname": f"tap{given.serial}"}


def _netdev(given: Given) -> Arguments:
    return {"type": "tap", "id": f"n{given.value}", "fd": f"tap{given.serial}", "vhost": False}


def _card(given: Given) -> Arguments:
    place = {"bus": f"port{given.value}"} if given.port else {}
    card = {"driver": NIC_DRIVERS[given.model], "id": f"nic{given.value}", "netdev": f"n{given.value}", "mac": given.mac}
    return {**card, "romfile": "", **place}


def _job(given: Given) -> Arguments:
    return {"id": f"snap{given.value}"}


def _delete(given: Given) -> Arguments:
    devices = [f"disk{index}" for index in range(given.disks.bit_length()) if given.disks >> index & 1]
    return {"job-id": f"snap{given.value}", "tag": f"s{given.value}", "devices": devices}


def _save(given: Given) -> Arguments:
    lowest = (given.disks & -given.disks).bit_length() - 1
    return {**_delete(given), "vmstate": f"disk{lowest}"}


# --- the table --------------------------------------------------------------------------------------------------------

_OPEN_TRAY = Step("blockdev-open-tray", _drive(force=True), undo=Step("blockdev-close-tray", _drive()))
_REMOVE_MEDIUM = Step("blockdev-remove-medium", _drive())
_CLOSE_TRAY = Step("blockdev-close-tray", _drive())
_FORGET_DISC = Step("blockdev-del", lambda given: {"node-name": _disc(given)})
_FORGET_FILE = Step("blockdev-del", lambda given: {"node-name": _disc_file(given)})
# The nodes of the disc that was there before, if it was one of ours: what the launch line brought has other names and stays.
_FORGET_OLD = (
    Step(_FORGET_DISC.command, _FORGET_DISC.arguments, may_fail=True),
    Step(_FORGET_FILE.command, _FORGET_FILE.arguments, may_fail=True),
)
_UNPLUG = Step("netdev_del", lambda given: {"id": f"n{given.value}"}, may_fail=True)
# Whatever an earlier order left: guests let a card go when nobody waits for it any more, and answers may be lost.
_CARD_GONE = (Step("device_del", lambda given: {"id": f"nic{given.value}"}, leaves=True), _UNPLUG)
# A job of that name can only be what was left when we were restarted in the middle of it.
_FORGET_JOB = Step("job-dismiss", _job, may_fail=True)

PLANS: dict[str, tuple[Step, ...]] = {
    "cont": (Step("cont"),),
    "powerdown": (Step("system_powerdown"),),
    "reset": (Step("system_reset"),),
    "quit": (Step("quit"),),
    "break": (Step("chardev-send-break", lambda given: {"id": SERIAL}),),
    "balloon": (Step("balloon", _bytes),),
    "link-up": (Step("set_link", _link(True)),),
    "link-down": (Step("set_link", _link(False)),),
    "insert": (
        Step("add-fd", _set, fd=True, undo=Step("remove-fd", _set)),
        _OPEN_TRAY,
        _REMOVE_MEDIUM,
        *_FORGET_OLD,
        Step("blockdev-add", _file_node, undo=_FORGET_FILE),
        Step("blockdev-add", _raw_node, undo=_FORGET_DISC),
        Step("blockdev-insert-medium", _medium, undo=_REMOVE_MEDIUM),
        _CLOSE_TRAY,
        # The node has a duplicate; with the set's own descriptor gone, the set goes when the node does.
        Step("remove-fd", _set, may_fail=True),
    ),
    "eject": (_OPEN_TRAY, _REMOVE_MEDIUM, *_FORGET_OLD, _CLOSE_TRAY),
    "display": (
        Step("getfd", _client_name, fd=True, undo=Step("closefd", _client_name)),
        Step("add_client", _client),
    ),
    "nic-add": (
        *_CARD_GONE,
        Step("getfd", _tap_name, fd=True, undo=Step("closefd", _tap_name)),
        Step("netdev_add", _netdev, undo=_UNPLUG),
        Step("device_add", _card),
    ),
    "nic-remove": _CARD_GONE,
    "snapshot-save": (_FORGET_JOB, Step("snapshot-save", _save, job=True)),
    "snapshot-delete": (_FORGET_JOB, Step("snapshot-delete", _delete, job=True)),
}


def brings_fd(what: str) -> bool:
    """Does a descriptor come with this order?"""
    return any(step.fd for step in PLANS.get(what, ()))


# --- carrying them out ------------------------------------------------------------------------------------------------


class Orders:
    """The orders on one monitor connection. `in_job`: QEMU may stop the CPUs and start them again for reasons of ours."""

    def __init__(self, loop: Loop, monitor: Monitor) -> None:
        self.in_job = False
        self.loop = loop
        self.monitor = monitor
        self._queue: deque[_Run] = deque()  # the first one is on its way

    def give(self, order: Order, fd: int, done: Done) -> None:
        """Carry out *order*; *done(ok)* is called once. The closing of *fd* (or -1) is ours from here on."""
        self._give(PLANS[order.what], Given(order), fd, done)

    def send_break(self, number: int) -> None:
        """A break on the serial line: a viewer's to ask for, not the broker's."""
        self._give(PLANS["break"], Given(Order(number=number, what="cont")), -1, lambda ok: None)

    def _give(self, plan: tuple[Step, ...], given: Given, fd: int, done: Done) -> None:
        run = _Run(self, plan, given, fd, done)
        if len(plan) == 1:
            run.start()
        elif len(self._queue) > WAITING_MAX:
            run.end(False)
        else:
            self._queue.append(run)
            if len(self._queue) == 1:
                run.start()

    def ended(self, run: _Run) -> None:
        if self._queue and self._queue[0] is run:
            self._queue.popleft()
            if self._queue:
                # In the next round: a lost connection ends all that wait, and not each inside the one before.
                self.loop.after(0.0, self._queue[0].start, self)

    def job_ended(self) -> None:
        self.in_job = False
        self.monitor.ask_status()

    def broken(self, exc: Exception) -> None:
        runs, self._queue = self._queue, deque()
        for run in runs:
            run.end(False)


class _Run:
    """One order on its way."""

    __slots__ = ("_at", "_done", "_fd", "_given", "_orders", "_plan", "_undo")

    def __init__(self, orders: Orders, plan: tuple[Step, ...], given: Given, fd: int, done: Done) -> None:
        self._orders = orders
        self._plan = plan
        self._given = given
        self._fd = fd
        self._done: Done | None = done
        self._at = 0
        self._undo: list[Step] = []

    def start(self) -> None:
        step = self._plan[self._at]
        arguments = step.arguments(self._given)
        if step.job:
            self._orders.in_job = True
            run_job(self._orders.loop, self._orders.monitor, step.command, arguments, self._job_ended)
        elif step.leaves:
            run_until_gone(self._orders.loop, self._orders.monitor, step.command, arguments, self._left)
        elif step.fd:
            self._orders.monitor.execute(step.command, arguments, self._answered, self._fd)
            self._close_fd()  # what was sent is QEMU's
        else:
            self._orders.monitor.execute(step.command, arguments, self._answered)

    def end(self, ok: bool) -> None:
        self._close_fd()
        done, self._done = self._done, None
        if done is not None:
            self._orders.ended(self)
            done(ok)

    def _answered(self, ok: bool, body: object) -> None:
        step = self._plan[self._at]
        if not ok and not step.may_fail:
            self._take_back()
            return
        if step.undo is not None:
            self._undo.append(step.undo)
        self._at += 1
        if self._at < len(self._plan):
            self.start()
        else:
            self.end(True)

    def _job_ended(self, ok: bool) -> None:
        self._orders.job_ended()
        self._answered(ok, None)

    def _left(self, ok: bool) -> None:
        self._answered(ok, None)

    def _take_back(self) -> None:
        if not self._undo:
            self.end(False)
            return
        step = self._undo.pop()
        self._orders.monitor.execute(step.command, step.arguments(self._given), lambda ok, body: self._take_back())

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
