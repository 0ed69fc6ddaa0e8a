"""The service manager's side: readiness, sockets it listens on for us, and descriptors it keeps while we restart.

Without a service manager everything here does nothing. Under systemd the unit needs `NotifyAccess=main` and a
`FileDescriptorStoreMax=` of three per VM and two per attached console.
Runs in: the relay. `servicemanager.py` says what is passed at the start.
"""

from __future__ import annotations

import array
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Service:
    """What we tell the service manager. Never blocks and never fails: a lost message costs a replay, not a VM.

    It takes in only so many messages at a time, so none is sent that says nothing: *kept* are the names it has at the start.
    """

    def __init__(self, address: str, kept: Iterable[str] = ()) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        self._kept = set(kept)

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
        self._kept.add(name)
        self.notify(f"FDSTORE=1\nFDNAME={name}", fd)

    def remove(self, name: str) -> None:
        if name in self._kept:
            self._kept.remove(name)
            self.notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def barrier(self, fd: int) -> None:
        """Have *fd* closed once all that was said before has been done."""
        self.notify("BARRIER=1", fd)
