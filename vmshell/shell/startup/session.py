"""Session mode: start this person's own broker when it does not answer.

The only process that the shell starts besides `commands/ssh.py`'s: our own broker, by its fixed path, with a clean environment
and signals.
Runs in: the shell in session mode. Touches the run directory of the layout.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

from ... import wire
from ...errors import safe
from ...installed import PACKAGE_DIR, PYTHON_FLAGS
from ...refusals import BrokerDown
from .process import PATH, SESSION_VARIABLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...layout import Layout

PATIENCE = 5.0  # seconds until a broker that was started must answer


def start_broker(layout: Layout) -> None:
    """Return once a broker answers at the layout's socket; two shells that come at once start one. Raises BrokerDown."""
    try:
        _private_directory(layout.run)
        lock = os.open(f"{layout.run}/starting.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise BrokerDown(problem=f"its directory cannot be used: {(error.strerror or str(error)).lower()}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(layout):
            _spawn_and_wait(layout)
    finally:
        os.close(lock)


def _private_directory(path: str) -> None:
    os.makedirs(path, 0o700, exist_ok=True)
    if os.stat(path).st_uid != os.geteuid():
        raise PermissionError(0, "it belongs to somebody else")


def _answers(layout: Layout) -> bool:
    try:
        wire.connect(layout.broker_socket, timeout=2).close()
    except OSError:
        return False
    return True


def _spawn_and_wait(layout: Layout) -> None:
    errors_path = f"{layout.run}/broker.err"
    pid = _spawn(layout, errors_path)
    until = time.monotonic() + PATIENCE
    while not _answers(layout):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            problem = f"it ended with status {os.waitstatus_to_exitcode(status)}"
            raise BrokerDown(problem=f"{problem}: {_last_line(errors_path)}")
        if time.monotonic() > until:
            raise BrokerDown(problem=f"it was started but took no connection within {PATIENCE:.0f} s")
        time.sleep(0.02)


def _spawn(layout: Layout, errors_path: str) -> int:
    environment = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    environment.update({name: os.environ[name] for name in SESSION_VARIABLES if name in os.environ})
    command = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "broker", layout.to_args()]
    null = "/dev/null"
    return os.posix_spawn(
        sys.executable,
        command,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, null, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, null, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, errors_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600),
        ],
        # It outlives this terminal, and must not inherit what a login shell ignores.
        setsid=True,
        setsigmask=[],
        setsigdef=[number for number in signal.valid_signals() if number not in (signal.SIGKILL, signal.SIGSTOP)],
    )


def _last_line(path: str) -> str:
    try:
        with open(path, "rb") as file:
            lines = file.read(8192).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        lines = []
    return safe(lines[-1], 200) if lines else "it said nothing"
