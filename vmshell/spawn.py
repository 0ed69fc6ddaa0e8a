"""How every process of ours is started: exactly the descriptors it is given, a session and an environment of its own.

Runs in: the launcher, the broker. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from .installed import PACKAGE_DIR, PYTHON_FLAGS

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
FIRST_FD = 3
# Python ignores SIGPIPE and a supervisor may block signals; a child starts as if from a clean login.
_RESET = [signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, signal.SIGXFSZ]
_FIRST_SPARE_FD = 200


def spawn(argv: Sequence[str], fds: Mapping[int, int], *, stdout: int = -1, stderr: int = -1) -> int:
    """Start *argv* with exactly the descriptors *fds* (number there → number here); return its pid.

    Of 0, 1 and 2 those that are not among them are closed off, everything else that we hold is close-on-exec. Raises OSError when
    the program cannot be started.
    """
    with contextlib.ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        actions = []
        for target, source in {0: null, 1: null if stdout < 0 else stdout, 2: null if stderr < 0 else stderr, **fds}.items():
            # Two steps, so that no target number is also a source that a later dup2 still needs.
            spare = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _FIRST_SPARE_FD)
            stack.callback(os.close, spare)
            actions.append((os.POSIX_SPAWN_DUP2, spare, target))
        return os.posix_spawnp(
            argv[0], list(argv), ENVIRONMENT, file_actions=actions, setsid=True, setsigmask=[], setsigdef=_RESET
        )


def python(*arguments: str, uid: int | None = None, group: int | None = None, starter: str = "__main__.py") -> list[str]:
    """Return the command of one of our own processes: isolated interpreter, no privileges, no way to new ones.

    With *uid* it runs as that, with *group* besides; None is whoever starts it. *starter* is where the process begins.
    """
    words = ["setpriv", "--no-new-privs", "--inh-caps=-all"]
    if uid is not None:
        groups = "--clear-groups" if group is None else f"--groups={group}"
        words += [f"--reuid={uid}", f"--regid={uid}", groups, "--bounding-set=-all"]
    return [*words, "--", sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/{starter}", *arguments]
