"""QEMUs: a request becomes a whole plan, its descriptors are looked at, leftovers of that number end, then the jail is started.

Runs in: the launcher. Starts processes; looks at /dev/kvm.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import time
from collections.abc import Callable, Sequence
from functools import partial

from .. import descriptors
from ..errors import LaunchRefused, VmshellError
from ..launch import plan as plans
from ..launch.jail import command
from ..launch.plan import LAUNCHERS_OWN, LaunchPlan
from ..launch.seccomp import program
from ..launcher_messages import KILL, Launch, Signal
from ..spawn import FIRST_FD, spawn
from .policy import Policy
from .uids import Uids

KVM = "/dev/kvm"
OOM_SCORE = 500  # when memory runs out, a guest goes before anything of the host
SIGNALS = {"term": signal.SIGTERM, "kill": signal.SIGKILL}
SignalAll = Callable[[int, range, int], None]
_NOTHING: tuple[object, set[int]] = (None, set())


class Runs:
    """*signal_all* ends VMs by their uid; None in session mode, where the broker holds its VMs by pidfd itself."""

    def __init__(self, *, uids: Uids, policy: Policy, scopes: bool, broker_uid: int, signal_all: SignalAll | None) -> None:
        self._uids = uids
        self._policy = policy
        self._scopes = scopes
        self._broker_uid = broker_uid
        self._signal_all = signal_all
        # By VM: who had it started (a connection; None: it was there before us), and the processes of it that are held.
        self._running: dict[int, tuple[object, set[int]]] = {}

    def found(self, number: int, pid: int) -> None:
        """A process of this VM was there when the launcher started."""
        self._running.setdefault(number, (None, set()))[1].add(pid)

    def ended(self, number: int, pid: int) -> None:
        """The process *pid* of this VM has ended."""
        pids = self._running.get(number, _NOTHING)[1]
        pids.discard(pid)
        if not pids:
            # Not forgotten: a jail's outer process may end before QEMU does, and then the next launch ends QEMU.
            self._running[number] = (None, set())

    def launch(self, message: Launch, fds: Sequence[int], connection: object) -> int:
        """Start the VM's QEMU, which waits at its start barrier; return the pid of its jail. Raises LaunchRefused or OSError."""
        starter, pids = self._running.get(message.number, _NOTHING)
        # The broker may have seen the end before we did.
        if starter is not None and starter is connection and not all(wait_for_end(pid, 0) for pid in pids):
            raise LaunchRefused(problem=f"number: VM {message.number} runs already")
        if len(fds) < FIRST_FD:
            raise LaunchRefused(problem="descriptors: standard input, output and error must be there")
        lent, standard = fds[:-FIRST_FD], fds[-FIRST_FD:]
        try:
            plan = self._plan(message, FIRST_FD + len(lent))
            self._check(plan, lent)
            _check_standard(standard)
        except (VmshellError, ValueError, OSError) as exc:
            raise LaunchRefused(problem=exc) from exc
        self._end_leftovers(message.number)
        pid = _start(plan, lent, standard)
        self._running[message.number] = (connection, {pid})
        return pid

    def forget(self, pid: int) -> None:
        """Kill the jail *pid*, only just started, of which nobody could be told: its barrier never opens."""
        # It may be the VM's uid already; then the next launch ends it. In its session there may be its child.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def signal(self, message: Signal) -> None:
        """Signal every process of the VM, in system mode."""
        if self._signal_all is None:
            raise LaunchRefused(problem="signal: in a session the broker signals its own VMs")
        starter, pids = self._running.get(message.number, _NOTHING)
        if message.signal == KILL and starter is not None:
            # Our child, on its way to the VM's uid, may still be root's: then only we may end it.
            for pid in pids:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        uid = self._uids.of_vm(message.number)
        if uid is not None:
            self._signal_all(uid, self._uids.all, SIGNALS[message.signal])

    def _plan(self, message: Launch, seccomp_fd: int) -> LaunchPlan:
        uid = self._uids.of_vm(message.number)
        for name in LAUNCHERS_OWN & message.plan.keys():
            raise ValueError(f"{name} is the launcher's own to say")
        plan = LaunchPlan(
            **message.plan,
            number=message.number,
            uid=uid,
            gid=uid,
            kvm_gid=kvm_group() if message.plan.get("accel") == "kvm" and uid is not None else None,
            seccomp_fd=seccomp_fd,
            # A name for each run: the last one's scope may be there until systemd has seen its end.
            scope=f"vmshell-vm-{message.number}-{time.time_ns() // 1_000_000}.scope" if self._scopes else None,
            oom_score_adj=OOM_SCORE,
        )
        if not self._policy.has_cpu_model(plan.cpu_model):
            raise ValueError("cpu_model must be one of the policy's")
        return plan

    def _check(self, plan: LaunchPlan, lent: Sequence[int]) -> None:
        """Raise ValueError unless each descriptor is of its kind, and none is left over or missing."""
        wanted = {number: (name, kind) for name, number, kind in plan.lent()}
        numbers = range(FIRST_FD, FIRST_FD + len(lent))
        if sorted(wanted) != list(numbers):
            raise ValueError(f"descriptors: the plan uses {sorted(wanted)}, and there are {len(lent)} from {FIRST_FD}")
        if plan.block_fd is None:
            raise ValueError("block_fd must be there")
        for number, fd in zip(numbers, lent, strict=True):
            name, kind = wanted[number]
            try:
                self._check_one(kind, fd)
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from exc

    def _check_one(self, kind: str, fd: int) -> None:
        name, _, tap = kind.partition(" ")
        checks: dict[str, Callable[[int], None]] = {
            plans.READ: partial(descriptors.check_read_file, owner=self._broker_uid),
            plans.WRITTEN: partial(descriptors.check_written_file, owner=self._broker_uid),
            plans.LISTENER: descriptors.check_listener,
            plans.STREAM: descriptors.check_stream,
            plans.BARRIER: partial(descriptors.check_pipe, mode=os.O_RDWR),
            plans.TAP: partial(descriptors.check_tap, name=tap),
        }
        checks[name](fd)

    def _end_leftovers(self, number: int) -> None:
        """What an earlier connection started or an earlier launcher left, nobody opens the barrier for any more."""
        if number not in self._running or self._signal_all is None:
            return
        self.signal(Signal(number=number, signal=KILL))
        if not all(wait_for_end(pid) for pid in self._running[number][1]):
            raise LaunchRefused(problem=f"number: the last run of VM {number} does not end")


def _check_standard(fds: Sequence[int]) -> None:
    """Raise ValueError unless *fds* are what QEMU's 0, 1 and 2 have to be."""
    for name, fd, mode in zip(("stdin", "stdout", "stderr"), fds, (os.O_RDWR, os.O_RDWR, os.O_WRONLY), strict=True):
        try:
            descriptors.check_pipe(fd, mode)
        except ValueError as exc:
            raise ValueError(f"{name}: {exc}") from exc


def kvm_group() -> int | None:
    """The group that may open KVM's device; None if there is none, for root's own is never lent."""
    try:
        status = os.stat(KVM)
    except OSError:
        return None
    return status.st_gid if stat.S_ISCHR(status.st_mode) and status.st_gid else None


def wait_for_end(pid: int, seconds: float = 2.0) -> bool:
    """Wait until *pid*, which was killed, has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def _start(plan: LaunchPlan, lent: Sequence[int], standard: Sequence[int]) -> int:
    with contextlib.ExitStack() as stack:
        filter_fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
        stack.callback(os.close, filter_fd)
        os.write(filter_fd, program())
        os.lseek(filter_fd, 0, os.SEEK_SET)
        return spawn(command(plan), dict(enumerate([*standard, *lent, filter_fd])))
