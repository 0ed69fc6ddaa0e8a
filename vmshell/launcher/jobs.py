"""Jobs: our own storage workers and probes, each under a uid out of a pool, so that none can meet another.

Runs in: the launcher. Starts processes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial

from .. import descriptors
from ..errors import LaunchRefused
from ..launcher_messages import PROBE, Job
from ..spawn import FIRST_FD, python, spawn
from .runs import kvm_group
from .uids import Uids


class Jobs:
    """The jobs that have a uid of their own; in session mode none has."""

    def __init__(self, uids: Uids) -> None:
        self._uids = uids
        self._taken: dict[int, set[int]] = {}  # by uid: the processes of its job that are held

    def found(self, uid: int, pid: int) -> None:
        """A job of an earlier launcher is still at work."""
        self._taken.setdefault(uid, set()).add(pid)

    def start(self, message: Job, fds: Sequence[int]) -> tuple[int, Callable[[], None]]:
        """Start a job; its pid, and what to call when it has ended. Raises LaunchRefused or OSError."""
        if not fds:
            raise LaunchRefused(problem="output: there is no descriptor for it")
        *lent, output = fds
        try:
            descriptors.check_pipe(output, os.O_WRONLY)
        except ValueError as exc:
            raise LaunchRefused(problem=f"output: {exc}") from exc
        uid = self._free() if self._uids.helpers_apart else None
        group = kvm_group() if uid is not None and message.kind == PROBE else None
        # In root's own session the probe itself is root; its guests never are.
        guests = [str(self._uids.jobs.start)] if message.kind == PROBE and self._uids.apart and uid is None else []
        argv = python(message.kind, *message.words, *guests, uid=uid, group=group)
        pid = spawn(argv, dict(enumerate(lent, FIRST_FD)), stdout=output, stderr=2)
        if uid is None:
            return pid, lambda: None
        self._taken[uid] = {pid}
        return pid, partial(self.ended, uid, pid)

    def ended(self, uid: int, pid: int) -> None:
        """The job of this uid has ended; its uid is free again once nothing else of it is there."""
        self._taken[uid].discard(pid)
        if not self._taken[uid]:
            if self._uids.signal_all is not None:
                self._uids.signal_all(uid, signal.SIGKILL)
            del self._taken[uid]

    def _free(self) -> int:
        uid = next((uid for uid in self._uids.jobs if uid not in self._taken), None)
        if uid is None:
            raise LaunchRefused(problem=f"kind: all {len(self._uids.jobs)} uids of jobs are in use")
        return uid
