"""The relay process: `… relay LAYOUT [--listen-fd=N]`.

Runs as its own unprivileged uid (in session mode: as the person). Takes its listening socket and any connections kept over a
restart from the service manager, or its socket as descriptor N from the broker, or makes the socket itself; then serves until
SIGTERM, or, embedded, until nobody needs it.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket

from .. import servicemanager, wire
from ..layout import Layout
from ..numbering import NUMBER_MAX
from .control import Control
from .loop import IN, Loop
from .old_viewers import let_go
from .port import KINDS, UNLOGGED
from .service import Service
from .vm import Kept

_LISTEN = "--listen-fd="
RESTARTING = "the console service is restarting; attach again"


class _Signals:
    """SIGTERM and SIGINT as an event of the loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        loop.add(self._read.fileno(), IN, self._on_event, self)

    def _on_event(self, events: int) -> None:
        self._loop.stopping = True

    def broken(self, exc: Exception) -> None:
        self._loop.stopping = True


def main(argv: list[str]) -> int:
    """Serve; *argv* is the layout as one argument, and perhaps the number of the listening socket."""
    layout = Layout.from_args(argv[0])
    passed = servicemanager.passed()
    service = Service(os.environ.pop("NOTIFY_SOCKET", ""), [name for name, _ in passed])
    passed = let_go(service, passed)
    os.umask(0o027)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    loop = Loop()
    _Signals(loop)
    passed += [("relay", int(option.removeprefix(_LISTEN))) for option in argv[1:] if option.startswith(_LISTEN)]
    listener = next((socket.socket(fileno=fd) for name, fd in passed if name == "relay"), None)
    own = listener is None
    if listener is None:
        os.makedirs(layout.run, 0o755, exist_ok=True)
        listener = wire.listen(layout.relay_socket, 0o600)
    control = Control(loop, layout, service, listener)
    _restore(control, passed)
    # What is alive now stays alive; collections that look at the rest take microseconds and disturb no echo.
    gc.collect()
    gc.freeze()
    service.notify("READY=1")
    loop.run()
    service.notify("STOPPING=1")
    control.stop(RESTARTING)
    if own:
        try:
            os.unlink(layout.relay_socket)
        except OSError:
            pass
    return 0


def _restore(control: Control, passed: list[tuple[str, int]]) -> None:
    """Sort what the descriptor store kept to its VMs, and close whatever is of none.

    There are `input-<n>` and `output-<n>`, or `console-<n>` (see `port.py`), `stderr-<n>` and `viewer-<n>-…`.
    """
    table: dict[int, Kept] = {}
    for name, fd in passed:
        kind, _, rest = name.partition("-")
        digits = rest.partition("-")[0]
        number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 8 else 0
        if name == "relay":
            continue
        if kind not in (*KINDS, "stderr", "viewer") or not 1 <= number <= NUMBER_MAX:
            os.close(fd)
            continue
        kept = table.setdefault(number, Kept())
        if kind == "viewer":
            kept.viewers.append((name, fd))
        elif kind in KINDS and kind not in kept.port:
            kept.port[kind] = fd
            kept.logged = kept.logged and not rest.endswith(UNLOGGED)
        elif kind == "stderr" and kept.stderr < 0:
            kept.stderr = fd
        else:
            os.close(fd)
    for number, kept in table.items():
        control.resume(number, kept)
