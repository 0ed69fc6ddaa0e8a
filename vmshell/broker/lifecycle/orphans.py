"""Jails of a session that nobody opens the start barrier for any more: found by the barrier that they hold, and ended.

A launcher that was killed between start and answer leaves one; so does a broker that was killed before it wrote down the process.
On a host the next launch of that number ends it, by its uid; a session's jails have the uid of a person's other programs.
Runs in: the broker, in session mode. Looks at /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal

BARRIER = "barrier"  # its name in a VM's run folder, from which it is removed as soon as it is open
_ROUNDS = 50


def end_waiting(folder: str) -> None:
    """Kill every process that holds a barrier made in *folder*, a VM's run folder. No guest of it has run."""
    link = f"{os.path.realpath(folder)}/{BARRIER} (deleted)"
    seen: set[int] = set()
    for _ in range(_ROUNDS):
        pids = {int(entry) for entry in os.listdir("/proc") if entry.isdecimal()} - {os.getpid()}
        killed = [pid for pid in pids if _killed(pid, link)]
        # A holder may have handed it on, and closed it, to a child that was not there when the list was read.
        if not killed and pids <= seen:
            return
        seen = pids


def _killed(pid: int, link: str) -> bool:
    """Kill *pid* if it holds *link*; the pidfd is opened before the look (R10)."""
    with contextlib.suppress(OSError):  # it has ended, or is none of ours to look at
        pidfd = os.pidfd_open(pid)
        try:
            if _holds(pid, link):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                return True
        finally:
            os.close(pidfd)
    return False


def _holds(pid: int, link: str) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed between the two looks
            if os.readlink(f"/proc/{pid}/fd/{fd}") == link:
                return True
    return False
