"""What the service manager hands to a process of ours, and what it is told: sockets by their names, and that we are ready.

Without a service manager nothing is handed over, and nobody is told.
Runs in: the launcher, the front, the broker, the relay, tapnet. Stdlib only, no I/O at import.
"""

from __future__ import annotations

import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START


def passed() -> list[tuple[str, int]]:
    """The descriptors passed to this very process, with their names; they are made close-on-exec and the variables removed."""
    pid, count, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = list(zip([*names.split(":"), *[""] * int(count)], range(FIRST_FD, FIRST_FD + int(count)), strict=False))
    for _, fd in found:
        os.set_inheritable(fd, False)
    return found


def passed_socket(name: str) -> socket.socket | None:
    """The one socket that a service with one gets, by its unit's FileDescriptorName; None without a service manager."""
    return next((socket.socket(fileno=fd) for each, fd in passed() if each == name), None)


def notify(state: str) -> None:
    """Say *state* (`READY=1`), if there is anybody to hear it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            pass  # whoever has gone needs no word
