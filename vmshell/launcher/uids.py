"""Which uids are ours to give: one for each VM, and a pool for jobs; and who else lives among them.

Runs in: the launcher. Reads the account files and /proc, once at the start.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from ..numbering import JOBS_MAX, NUMBER_MAX, uids_of_jobs

# Behind the name and the password: of an account its uid and its group, of a group its gid. Subordinate ids are ranges.
_ACCOUNTS = {"/etc/passwd": slice(1, 3), "/etc/group": slice(1, 2)}
_RANGES = ("/etc/subuid", "/etc/subgid")
SYSTEMD = "/run/systemd/system"


class Uids:
    """The uids of VMs and of jobs, and who gets one: QEMU if `apart`, which takes root; jobs, too, if `helpers_apart`.

    `managed`: a service manager gives each VM a scope, and its control groups tell what a launcher started. `signal_all` signals
    all processes of a uid; in a session, where that may be a person with other programs, there is none.
    """

    def __init__(self, base: int, *, session: bool) -> None:
        self.apart = os.geteuid() == 0
        self.helpers_apart = self.apart and not session
        self.managed = self.helpers_apart and os.path.isdir(SYSTEMD)
        self.all = range(base, base + NUMBER_MAX + 1 + JOBS_MAX)
        self.jobs = uids_of_jobs(base)
        self.signal_all: Callable[[int, int], None] | None = None
        if self.helpers_apart:
            from .ending import signal_all

            self.signal_all = lambda uid, number: signal_all(uid, self.all, number)

    def of_vm(self, number: int) -> int:
        """The uid of VM *number*'s QEMU, if it gets one of its own."""
        return self.all.start + number


def occupant(uids: range, root: str = "") -> str:
    """Who else has an id in *uids* by the files of accounts below *root*, as a clause; empty if nobody has."""
    for path, columns in _ACCOUNTS.items():
        for name, row in _rows(root + path):
            for number in row[columns]:
                if number.isdecimal() and int(number) in uids:
                    return f"{name} in {path} has id {number}"
    for path in _RANGES:
        for name, row in _rows(root + path):
            if len(row) > 1 and row[0].isdecimal() and row[1].isdecimal():
                first, count = int(row[0]), int(row[1])
                if count and first < uids.stop and first + count > uids.start:
                    return f"{name} in {path} has the ids from {first} to {first + count - 1}"
    return ""


def _rows(path: str) -> Iterator[tuple[str, list[str]]]:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, *row = line.strip().split(":")
            yield name, row


def processes(uids: range) -> Iterator[tuple[int, int]]:
    """The pid and real uid of every process of *uids*."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if entry.isdecimal() and (uid := _real_uid(entry)) in uids:
                yield int(entry), uid


def is_ours(pid: int) -> bool:
    """Was *pid* started by a launcher: does its control group lie in a unit of ours?"""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            return any("/vmshell" in line for line in file)
    except OSError:
        return True  # it has ended


def _real_uid(pid: str) -> int:
    # Not the owner of /proc/PID: that is root for processes that may not be dumped.
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Uid:"))
