"""The front process: `… front LAYOUT`.

Runs as its own uid without rights. Takes two listening sockets from the service manager: the users', and the broker's, by their
names (`broker` and `front`). What children need is imported before the first of them is forked, so that they share it.
Runs in: the front.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import stat
from typing import NoReturn

from .. import brokeraccount, wire
from ..layout import Layout
from ..servicemanager import notify, passed
from . import child, zygote
from .server import Server


def main(argv: list[str]) -> NoReturn:
    """Serve for the layout in `argv[0]` until the service manager ends it."""
    layout = Layout.from_args(argv[0])
    os.umask(0o077)
    os.chdir("/")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    child.warm_up()
    gc.collect()
    gc.freeze()  # what is here now is shared with every child, and no collection writes into it
    given = {name: socket.socket(fileno=fd) for name, fd in passed()}
    users = given.get("broker") or wire.listen(layout.broker_socket, 0o666)
    control = given.get("front") or wire.listen(layout.front_socket, 0o600)
    children = zygote.start(users, control)
    signal.signal(signal.SIGTERM, lambda number, frame: _leave(users, layout.broker_socket))
    try:
        server = Server(users=users, control=control, children=children, broker_uid=brokeraccount.uid())
        notify("READY=1")
        server.run()
    except Exception as exc:
        child.report(f"it ends: {type(exc).__name__}: {exc}")
        os._exit(1)  # while what the failed calls held is in reach, see below
    finally:
        # Python would close users' connections one by one, which may take as long as they like; the end of a process waits for
        # nothing in them.
        os._exit(1)


def _leave(users: socket.socket, path: str) -> None:
    """End, as the service manager says. Where nobody may connect any more, nobody will come after us to take who waits.

    It has closed the way in because the socket goes, too. It closes that next, and with it everything that lies in its queue,
    which may take as long as users like: so that ends with this process.
    """
    waited = []
    try:
        while stat.S_IMODE(os.stat(path).st_mode) == 0:
            waited.append(users.accept())
    except OSError:
        pass  # nobody is left
    os._exit(0)
