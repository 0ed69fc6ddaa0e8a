"""What the broker does on the host itself, each a few lines: open, listen, start its own children, look at a process.

What it opens here is always a path that it made itself (R1); a descriptor is opened first and judged after (R2). Processes are
held by pidfd, never by a bare number (R10).
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Mapping, Sequence

from ... import spawn
from ...refusals import StorageFailed

RELAY_USER = "vmshell-relay"
ACCOUNTS_FILE = "/etc/passwd"
_LOOPBACK6 = "00000000000000000000000001000000"  # as /proc/net writes it
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Process:
    """A process held by pidfd. `ticks` is its start time (since boot, in clock ticks): pid and ticks together are unique."""

    __slots__ = ("child", "pid", "pidfd", "ticks")

    def __init__(self, pid: int, *, child: bool, pidfd: int = -1) -> None:
        self.pidfd = pidfd if pidfd >= 0 else os.pidfd_open(pid)
        self.pid = pid
        self.child = child
        self.ticks = start_ticks(pid)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int | None:
        """Close the handle of an ended process; returns its exit status (128 + signal), None if it was not our child."""
        try:
            info = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG) if self.child else None
        except ChildProcessError:
            info = None
        os.close(self.pidfd)
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status


class Host:
    """`apart`: every QEMU has a uid of its own. In session mode relay and jobs are oneself, also when that is root."""

    def __init__(self, *, embedded: bool) -> None:
        self.apart = not embedded or os.geteuid() == 0
        self.systemd = not embedded and os.path.isdir("/run/systemd/system")
        self.taps = not embedded  # is there a tapnet to make some?
        # Its group by the account, never by the uid's number: that number may be the group of somebody else.
        self._relay_gid = None if embedded else _relay_gid()

    # --- files and sockets --------------------------------------------------------------------------------------------

    def open_disk(self, path: str, *, writable: bool) -> int:
        """Open an object: a regular file of ours with one name. A fresh open each time, never a dup (R16)."""
        mode = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(path, mode | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise StorageFailed(problem=f"the VM's disk cannot be opened ({exc.strerror})") from exc
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
            os.close(fd)
            raise StorageFailed(problem="the VM's disk is not the file it should be")
        return fd

    def create_file(self, path: str) -> int:
        """Create a new file, 0600, that must not exist yet."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def listens(self, port: int, proto: str) -> bool:
        """Does a program of this host have *port*, on whatever address but the loopback's?"""
        listening = "0A" if proto == "tcp" else "07"  # TCP_LISTEN; UDP sockets are always as if closed
        for path in (f"/proc/net/{proto}", f"/proc/net/{proto}6"):
            try:
                with open(path, encoding="ascii") as file:
                    rows = [line.split() for line in file][1:]
            except OSError:
                continue
            for row in rows:
                address, _, number = row[1].partition(":")
                loopback = (len(address) == 8 and address.endswith("7F")) or address == _LOOPBACK6
                if int(number, 16) == port and row[3] == listening and not loopback:
                    return True
        return False

    def share_with_relay(self, path: str, mode: int) -> None:
        """Let the relay into *path* by its group, and nobody else."""
        if self._relay_gid is not None:
            os.chown(path, -1, self._relay_gid, follow_symlinks=False)
        os.chmod(path, mode)

    def listen_for_qemu(self, path: str) -> socket.socket:
        """The listening socket that QEMU inherits as its QMP monitor or for its guest's agent."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(path)
            self.share_with_relay(path, 0o660)
            sock.listen(1)
        except BaseException:
            sock.close()
            raise
        return sock

    # --- processes ----------------------------------------------------------------------------------------------------

    def spawn(self, argv: Sequence[str], fds: Mapping[int, int], *, stdout: int = -1, stderr: int = -1) -> Process:
        """Start a child of our own, with our own rights, which are none; raises OSError when it cannot be started."""
        return Process(spawn.spawn(argv, fds, stdout=stdout, stderr=stderr), child=True)


def _relay_gid() -> int:
    """The group of the relay's account, which `make install` makes in the file: here no directory is asked and waited for."""
    with open(ACCOUNTS_FILE, encoding="utf-8", errors="replace") as file:
        for line in file:
            fields = line.split(":")
            if fields[0] == RELAY_USER:
                return int(fields[3])
    raise OSError(f"there is no account {RELAY_USER} in {ACCOUNTS_FILE}; `make install` makes it")


def same_process(pid: object, ticks: object) -> Process | None:
    """The process that a record of ours names, or None if it has ended (its number may be another's by now)."""
    if type(pid) is not int or pid <= 0 or start_ticks(pid) != ticks:
        return None
    try:
        process = Process(pid, child=False)
    except ProcessLookupError:
        return None
    if process.ticks == ticks:
        return process
    process.reap()
    return None


def start_ticks(pid: int) -> int:
    """When *pid* was started, in clock ticks since boot; 0 if there is no such process (any more)."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def cpu_seconds(pid: int) -> float:
    """The CPU time that *pid* has used, user and system, in seconds."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def cpu_demand(pid: int) -> float:
    """The seconds in which the threads of *pid* ran or, on a busy host, waited for a CPU (proc(5), schedstat)."""
    spent = 0
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/schedstat", encoding="ascii") as file:
                spent += sum(int(field) for field in file.read().split()[:2])
    return spent / 1e9


def resident_bytes(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * _PAGE if fields else 0


def children(pid: int) -> list[int]:
    """The direct children of *pid*."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            # The name in brackets may hold anything, brackets and blanks too: the fields begin behind the last one.
            return file.read().rpartition(") ")[2].split()
    except OSError:
        return []
