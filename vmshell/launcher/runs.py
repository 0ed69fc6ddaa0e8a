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
from ..launch.seccomp import program
from ..launcher_messages import KILL, Launch, Signal
from ..spawn import FIRST_FD, spawn
from .policy import Policy
from .uids import Uids

KVM = "/dev/kvm"
OOM_SCORE = 500  # when memory runs out, a guest goes before anything of the host
SIGNALS = {"term": signal.SIGTERM, "kill": signal.SIGKILL}
# QEMU's own three, as `LaunchPlan.lent` says it of the others.
STANDARD = (("stdin", 0, plans.PIPE), ("stdout", 1, plans.PIPE), ("stderr", 2, plans.OUTPUT))
_NOTHING: tuple[object, set[int]] = (None, set())


class Runs:
    """The VMs that run, by the uids that are theirs, also in session mode, where nobody gets them."""

    def __init__(self, *, uids: Uids, policy: Policy, broker_uid: int) -> None:
        self._uids = uids
        self._policy = policy
        self._broker_uid = broker_uid
        # Who had it started (a connection; None: it was there before us), and the processes of it that are held.
        self._running: dict[int, tuple[object, set[int]]] = {}

    def found(self, uid: int, pid: int) -> None:
        """A process of this VM was there when the launcher started."""
        self._running.setdefault(uid, (None, set()))[1].add(pid)

    def ended(self, uid: int, pid: int) -> None:
        """The process *pid* of this VM has ended."""
        # The VM is not forgotten: a jail's outer process may end before QEMU does, and then the next launch ends QEMU.
        self._running[uid][1].discard(pid)

    def launch(self, message: Launch, fds: Sequence[int], connection: object) -> tuple[int, Callable[[], None]]:
        """Start the VM's QEMU, which waits at its start barrier; its jail's pid, and what to call when that has ended.

        Raises LaunchRefused or OSError.
        """
        uid = self._uids.of_vm(message.number)
        starter, pids = self._running.get(uid, _NOTHING)
        # The broker may have seen the end before we did.
        if starter is connection and not all(wait_for_end(pid, 0) for pid in pids):
            raise LaunchRefused(problem=f"number: VM {message.number} runs already")
        if len(fds) < FIRST_FD:
            raise LaunchRefused(problem="descriptors: standard input, output and error must be there")
        fds = [*fds[-FIRST_FD:], *fds[:-FIRST_FD]]  # by the numbers that QEMU sees
        try:
            plan = self._plan(message, len(fds))
            self._check(plan, fds)
        except (VmshellError, ValueError, OSError) as exc:
            raise LaunchRefused(problem=exc) from exc
        self._end_leftovers(message.number)
        pid = _start(plan, fds)
        self._running[uid] = (connection, {pid})
        return pid, partial(self.ended, uid, pid)

    def kill_child(self, pid: int) -> None:
        """Kill our child, only just started, with what is in its session; what has the VM's uid by now is not ours to kill."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def signal(self, message: Signal) -> None:
        """Signal every process of the VM, in system mode."""
        if self._uids.signal_all is None:
            raise LaunchRefused(problem="signal: in a session the broker signals its own VMs")
        uid = self._uids.of_vm(message.number)
        starter, pids = self._running.get(uid, _NOTHING)
        if message.signal == KILL and starter is not None:
            # Our child, on its way to the VM's uid, may still be root's: then only we may end it.
            for pid in pids:
                self.kill_child(pid)
        self._uids.signal_all(uid, SIGNALS[message.signal])

    def _plan(self, message: Launch, seccomp_fd: int) -> plans.LaunchPlan:
        uid = self._uids.of_vm(message.number) if self._uids.apart else None
        for name in plans.LAUNCHERS_OWN & message.plan.keys():
            raise ValueError(f"{name} is the launcher's own to say")
        plan = plans.LaunchPlan(
            **message.plan,
            number=message.number,
            uid=uid,
            gid=uid,
            kvm_gid=kvm_group(),
            seccomp_fd=seccomp_fd,
            # A name for each run: the last one's scope may be there until systemd has seen its end.
            scope=f"vmshell-vm-{message.number}-{time.time_ns() // 1_000_000}.scope" if self._uids.managed else None,
            oom_score_adj=OOM_SCORE,
        )
        if plan.cpu_model is not None and plan.cpu_model not in self._policy.cpu_models():
            raise ValueError("cpu_model must be one of the policy's")
        return plan

    def _check(self, plan: plans.LaunchPlan, fds: Sequence[int]) -> None:
        """Raise ValueError unless each descriptor is of its kind, and none is left over or missing."""
        wanted = {number: (name, kind) for name, number, kind in (*STANDARD, *plan.lent())}
        if sorted(wanted) != list(range(len(fds))):
            used = sorted(wanted)[FIRST_FD:]
            raise ValueError(f"descriptors: the plan uses {used}, and there are {len(fds) - FIRST_FD} from {FIRST_FD}")
        if plan.block_fd is None:
            raise ValueError("block_fd must be there")
        checks: dict[str, Callable[..., None]] = {
            plans.READ: partial(descriptors.check_read_file, owner=self._broker_uid),
            plans.WRITTEN: partial(descriptors.check_written_file, owner=self._broker_uid),
            plans.LISTENER: descriptors.check_listener,
            plans.STREAM: descriptors.check_stream,
            plans.PIPE: partial(descriptors.check_pipe, mode=os.O_RDWR),
            plans.OUTPUT: partial(descriptors.check_pipe, mode=os.O_WRONLY),
            plans.TAP: descriptors.check_tap,
        }
        for number, (name, kind) in wanted.items():
            word, *tap = kind.split()
            try:
                checks[word](fds[number], *tap)
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from exc

    def _end_leftovers(self, number: int) -> None:
        """What an earlier connection started or an earlier launcher left, nobody opens the barrier for any more."""
        uid = self._uids.of_vm(number)
        if uid not in self._running or self._uids.signal_all is None:
            return
        self.signal(Signal(number=number, signal=KILL))
        if not all(wait_for_end(pid) for pid in self._running[uid][1]):
            raise LaunchRefused(problem=f"number: the last run of VM {number} does not end")


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
        with open(os.pidfd_open(pid), "rb", buffering=0) as pidfd:
            return bool(select.select([pidfd], [], [], seconds)[0])
    except ProcessLookupError:
        return True


def _start(plan: plans.LaunchPlan, fds: Sequence[int]) -> int:
    with open(os.memfd_create("seccomp"), "w+b", buffering=0) as filter:
        filter.write(program())
        filter.seek(0)
        return spawn(command(plan), dict(enumerate([*fds, filter.fileno()])))
