"""The launcher process: `… POLICY [CONNECTION]`, root's policy and, in session mode, the number of the connection.

Runs as root with the rights to become somebody else and no others, on the service manager's socket; in session mode as the
person, the broker's child. The broker may ask it, by the account `vmshell-broker`; on a machine without that account whoever runs
this may. What it started goes on when it ends, and is found again by its successor.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import stat
import sys
from functools import partial
from pathlib import Path

from .. import brokeraccount
from ..errors import VmshellError
from ..installed import PACKAGE_DIR
from ..servicemanager import notify, passed_socket
from .jobs import Jobs
from .policy import Policy
from .runs import Runs
from .server import Server
from .uids import Uids, is_ours, occupant, processes


def main(argv: list[str]) -> int:
    """Serve the broker; returns the exit status. Refusals to start are one sentence on stderr."""
    os.chdir("/")
    os.umask(0o077)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        server = compose(*argv)
    except (VmshellError, OSError) as exc:
        print(f"launcher: not started: {exc}", file=sys.stderr)
        return 1
    notify("READY=1")
    server.run()
    return 0


def compose(policy_path: str, connection: str = "") -> Server:
    """Build every part; *connection* is the number of a session's one connection, empty in system mode."""
    if not connection and (writable := writable_by_others(PACKAGE_DIR)):
        raise OSError(f"{writable} can be written by others than root, and root runs what is in it")
    policy = Policy(policy_path)
    uids = Uids(policy.uid_base, session=bool(connection))
    broker_uid = os.geteuid() if connection else brokeraccount.uid()
    runs = Runs(uids=uids, policy=policy, broker_uid=broker_uid)
    jobs = Jobs(uids)
    server = Server(runs=runs, jobs=jobs, broker_uid=broker_uid)
    if connection:
        server.serve(socket.socket(fileno=int(connection)))
    elif listener := passed_socket("launcher"):
        server.listen(listener)
    else:
        raise OSError("it has no socket to listen at: systemctl start vmshell-launcher.socket")
    if uids.helpers_apart:
        _take_over(server, runs, jobs, uids)
    return server


def writable_by_others(path: str) -> str:
    """The first folder from *path* up to / that is not root's, or writable by others (A18); empty if there is none."""
    for folder in (Path(path), *Path(path).parents):
        status = folder.stat()
        if status.st_uid != 0 or (status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX):
            return str(folder)
    return ""


def _take_over(server: Server, runs: Runs, jobs: Jobs, uids: Uids) -> None:
    """Find what an earlier launcher started. Raises OSError where somebody else lives: QEMU would be able to do what they can."""
    if problem := occupant(uids.all):
        raise OSError(f"the uids {uids.all.start} to {uids.all.stop - 1} are for VMs and jobs, but {problem}; see uid_base")
    for pid, uid in processes(uids.all):
        if uids.managed and not is_ours(pid):
            raise OSError(f"process {pid} has uid {uid}, which is for VMs and jobs of ours, and is none of them; see uid_base")
        holder: Runs | Jobs = jobs if uid in uids.jobs else runs
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            server.watch_process(pid, partial(holder.ended, uid, pid))
            holder.found(uid, pid)
