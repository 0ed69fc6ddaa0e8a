"""The administrator's `policy.toml` as text: read only if nobody but root, or oneself, can have written it.

Runs in: the launcher, the broker, tapnet, vmshell-admin. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import os
import stat

from .errors import BadPolicy

SIZE_MAX = 1 << 20  # bytes; a policy for thousands of users has less


def read(path: str, *, trusted: bool = True) -> str:
    """The text of the file; raises BadPolicy, or FileNotFoundError. *trusted*: only if root or oneself alone can write it."""
    try:
        # O_NONBLOCK: a FIFO in its place must not hang the broker.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
            _judge(path, os.fstat(file.fileno()), trusted=trusted)
            data = file.read(SIZE_MAX + 1)
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise BadPolicy(path=path, problem=exc.strerror or str(exc)) from exc
    if len(data) > SIZE_MAX:
        raise BadPolicy(path=path, problem="it is larger than 1M")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise BadPolicy(path=path, problem=f"what stands at line {line} is not UTF-8 text") from None


def _judge(path: str, status: os.stat_result, *, trusted: bool) -> None:
    """By the open file, not its name: nobody can exchange it between the look and the reading."""
    if not stat.S_ISREG(status.st_mode):
        raise BadPolicy(path=path, problem="it is not a regular file")
    if trusted and status.st_mode & 0o022:
        raise BadPolicy(path=path, problem=f"it must not be writable by others: `chmod go-w {path}`")
    if trusted and status.st_uid not in (0, os.geteuid()):
        raise BadPolicy(path=path, problem=f"it belongs to uid {status.st_uid} and must be root's: `chown root {path}`")
