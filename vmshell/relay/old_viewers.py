"""Viewers' sockets that a relay from before the pipes left in the service manager's descriptor store.

Whoever closes the last reference to such a socket also closes whatever a user has put into it, and can be made to wait for that
as long as the user likes: so neither we nor the service manager may be the last. A process of its own is, which ends by `_exit`:
a process that ends does not wait.
Runs in: the relay, at its start, and that process. Reads nothing from the sockets.
"""

from __future__ import annotations

import os
import select
import signal
import stat

from .service import Service

PATIENCE = 60.0  # seconds for the service manager to let go of its references


def let_go(service: Service, passed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return *passed* without the sockets of viewers, which are gone once everybody's references are."""
    old: list[tuple[str, int]] = []
    others: list[tuple[str, int]] = []
    for name, fd in passed:
        is_old = name.startswith("viewer-") and stat.S_ISSOCK(os.fstat(fd).st_mode)
        (old if is_old else others).append((name, fd))
    if old:
        others_are_done, we_are_done = os.pipe()
        try:
            child = os.fork()
        except OSError:
            return others  # open, and never looked at, for as long as we live
        if not child:
            _outlive(others_are_done, [we_are_done, *(fd for _, fd in others)])
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody need wait for it
        os.close(others_are_done)
        for name in {name for name, _ in old}:
            service.remove(name)
        service.barrier(we_are_done)
        for _, fd in old:
            os.close(fd)
        os.close(we_are_done)
    return others


def _outlive(others_are_done: int, not_ours: list[int]) -> None:
    """Hold the old sockets until nobody else does: until nobody holds the pipe's other end any more."""
    try:
        for fd in not_ours:
            os.close(fd)
        poll = select.poll()
        poll.register(others_are_done, 0)
        poll.poll(PATIENCE * 1000)
    finally:
        os._exit(0)
