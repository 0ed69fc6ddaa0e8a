"""The service manager's side: readiness, sockets it listens on for us, and descriptors it keeps while we restart.

Without a service manager everything here does nothing. Under systemd the unit needs `NotifyAccess=main` and a
`FileDescriptorStoreMax=` of two per VM and two per attached console.
Runs in: the relay. Touches NOTIFY_SOCKET and the LISTEN_* variables.
"""

from __future__ import annotations

import array
import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START


def take_fds() -> list[tuple[str, int]]:
    """The descriptors passed to this very process, with their names; they are made close-on-exec and the variables removed."""
    pid, count, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    named = names.split(":")
    taken = []
    for index in range(int(count)):
        fd = FIRST_FD + index
        os.set_inheritable(fd, False)
        taken.append((named[index] if index < len(named) else "", fd))
    return taken


class Service:
    """What we tell the service manager. Never blocks and never fails: a lost message costs a replay, not a VM."""

    def __init__(self, address: str) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None

    @property
    def keeps(self) -> bool:
        """Is there somebody to keep descriptors for us?"""
        return self._sock is not None

    def notify(self, text: str, fd: int = -1) -> None:
        if self._sock is None:
            return
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            self._sock.sendmsg([text.encode("ascii")], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL, self._address)
        except OSError:
            pass

    def store(self, name: str, fd: int) -> None:
        """Have *fd* kept under *name*, in place of whatever was kept under it."""
        self.remove(name)
        self.notify(f"FDSTORE=1\nFDNAME={name}", fd)

    def remove(self, name: str) -> None:
        self.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def barrier(self, fd: int) -> None:
        """Have *fd* closed once all that was said before has been done."""
        self.notify("BARRIER=1", fd)
