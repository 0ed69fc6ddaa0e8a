"""A signal to every process of one uid, by becoming that uid: no capability to kill, no pid that could be somebody else's by now.

Not imported in session mode, where VMs have the uid of a person whose other programs they must not meet.
Runs in: the launcher, in system mode.
"""

from __future__ import annotations

import os


def signal_all(uid: int, uids: range, number: int) -> None:
    """Send signal *number* to all processes of *uid*, which must lie in *uids*; that there are none is no error.

    The first of *uids* is nobody's (VMs are numbered from 1). As its real uid the sender cannot be signalled by whom it signals:
    stopped before it has sent anything, it would never be waited for to the end.
    """
    nobody = uids.start
    if uid not in uids or uid in (nobody, *os.getresuid()):
        raise ValueError(f"uid {uid} is none of ours to signal")
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(nobody, uid, nobody)
            # The kernel leaves out whoever asks, and lets an unprivileged asker meet nobody but his own.
            os.kill(-1, number)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
