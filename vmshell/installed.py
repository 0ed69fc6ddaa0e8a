"""Where our code is, how the interpreter is started on it, and how a process keeps it there.

Runs in: every process. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import fcntl
import os

PACKAGE_DIR = os.path.dirname(os.path.abspath(__file__))

# What the starters (`vmshell/__main__.py` says why) run every process with.
PYTHON_FLAGS = "-IS"


def hold_code(folder: str) -> None:
    """Keep *folder*, which our code is in, open for the life of this process: what is held an upgrade does not remove.

    It shows in /proc/PID/fd. Never as 0, 1 or 2: where one of these is closed, somebody else has to fill it.
    """
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
