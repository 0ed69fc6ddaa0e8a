"""The launcher process: `… launcher LAYOUT [--connection-fd=N]`.

Runs as root with the rights to become somebody else and no others; in session mode as the person, as the broker's child with its
connection as descriptor N. The broker may ask it, by the account `vmshell-broker`; on a machine without that account whoever runs
this may. What it started goes on when it ends, and is found again by its successor.
"""

from __future__ import annotations

import os
import resource
import socket
import stat
import sys

from .. import brokeraccount, wire
from ..errors import VmshellError
from ..layout import PACKAGE_DIR, Layout
from ..servicemanager import notify, passed_socket
from .jobs import Jobs
from .policy import Policy
from .runs import Runs, SignalAll
from .server import Server
from .uids import Uids, is_ours, occupant, processes

SYSTEMD = "/run/systemd/system"
_CONNECTION = "--connection-fd="


def main(argv: list[str]) -> int:
    """Serve the broker for the layout in `argv[0]`; returns the exit status. Refusals to start are one sentence on stderr."""
    layout = Layout.from_args(argv[0])
    os.chdir("/")
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        server = _compose(layout, argv[1:])
    except (VmshellError, OSError) as exc:
        print(f"launcher: not started: {exc}", file=sys.stderr)
        return 1
    notify("READY=1")
    server.run()
    return 0


def _compose(layout: Layout, options: list[str]) -> Server:
    if not layout.embedded and (writable := writable_by_others(PACKAGE_DIR)):
        raise OSError(f"{writable} can be written by others than root, and root runs what is in it")
    policy = Policy(layout.policy)
    uids = Uids(policy.uid_base, embedded=layout.embedded)
    scopes = uids.helpers_apart and os.path.isdir(SYSTEMD)
    signal_all: SignalAll | None = None
    if uids.helpers_apart:
        from . import ending

        signal_all = ending.signal_all
    broker_uid = os.geteuid() if layout.embedded else brokeraccount.uid()
    runs = Runs(uids=uids, policy=policy, scopes=scopes, broker_uid=broker_uid, signal_all=signal_all)
    jobs = Jobs(uids=uids, signal_all=signal_all)
    listener, connection = _sockets(layout, options)
    server = Server(runs=runs, jobs=jobs, broker_uid=broker_uid, listener=listener, connection=connection)
    if uids.helpers_apart:
        _must_be_free(uids)
        _take_over(server, runs, jobs, uids, judge=scopes)
    return server


def writable_by_others(path: str) -> str:
    """The first folder from *path* up to / that is not root's, or writable by others (A18); empty if there is none."""
    while True:
        status = os.stat(path)
        if status.st_uid != 0 or (status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX):
            return path
        if path == "/":
            return ""
        path = os.path.dirname(path)


def _must_be_free(uids: Uids) -> None:
    """Refuse uids in which somebody else lives: a VM's QEMU would be able to do what they can."""
    if problem := occupant(uids.all):
        raise OSError(f"the uids {uids.all.start} to {uids.all.stop - 1} are for VMs and jobs, but {problem}; see uid_base")


def _take_over(server: Server, runs: Runs, jobs: Jobs, uids: Uids, *, judge: bool) -> None:
    """Find what an earlier launcher started. *judge*: the service manager's control groups tell whether it was one."""
    for pid, uid in processes(uids.all):
        if judge and not is_ours(pid):
            raise OSError(f"process {pid} has uid {uid}, which is for VMs and jobs of ours, and is none of them; see uid_base")
        try:
            if uid in uids.jobs:
                server.watch_process(pid, lambda uid=uid, pid=pid: jobs.ended(uid, pid))  # type: ignore[misc]
                jobs.found(uid, pid)
            else:
                number = uids.number_of(uid)
                server.watch_process(pid, lambda number=number, pid=pid: runs.ended(number, pid))  # type: ignore[misc]
                runs.found(number, pid)
        except ProcessLookupError:
            continue  # it has ended meanwhile


def _sockets(layout: Layout, options: list[str]) -> tuple[socket.socket | None, socket.socket | None]:
    """The listening socket, from the service manager or our own; or the one connection that there is."""
    for option in options:
        if option.startswith(_CONNECTION):
            fd = int(option.removeprefix(_CONNECTION))
            os.set_inheritable(fd, False)
            return None, socket.socket(fileno=fd)
    return passed_socket("launcher") or wire.listen(layout.launcher_socket, 0o600), None
