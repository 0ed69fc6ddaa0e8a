"""What `vmshell-admin doctor` is made of: a finding, and the ways its checks ask programs.

Runs in: vmshell-admin.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"
ENV = {"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
PROGRAM_PATIENCE = 30.0  # seconds
ANSWER_PATIENCE = 10.0
SETTLING = ("activating", "deactivating", "reloading")
SETTLE = 5.0  # seconds for what is just being started, stopped or restarted
SETTLE_POLL = 0.1


@dataclass(frozen=True)
class Finding:
    level: str
    text: str
    cure: str = ""


def output(*argv: str) -> str:
    """What *argv* printed, standard error included; nothing if this host has no such program."""
    try:
        return _run(argv).stdout
    except OSError:
        return ""


def problem_of(*argv: str) -> str:
    """Empty if *argv* succeeds, else the last line it said."""
    try:
        done = _run(argv, PROGRAM_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return str(exc)
    return "" if done.returncode == 0 else (done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _run(argv: tuple[str, ...], patience: float | None = None) -> subprocess.CompletedProcess[str]:
    quiet, pipe, into = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    return subprocess.run(argv, stdin=quiet, stdout=pipe, stderr=into, text=True, env=ENV, timeout=patience)


def states(*units: str) -> dict[str, str]:
    """systemd's word for each unit: active, inactive, failed …; of one that is on its way, where it has arrived before long."""
    found: dict[str, str] = {}

    def settled() -> bool:
        found.update(zip(units, output("systemctl", "is-active", *units).split(), strict=False))
        return not any(word in SETTLING for word in found.values())

    before_long(settled)
    return found


def before_long(done: Callable[[], bool]) -> bool:
    """Whether *done* comes true within SETTLE seconds: what has only just been restarted is no fault."""
    until = time.monotonic() + SETTLE
    while not done():
        if time.monotonic() >= until:
            return False
        time.sleep(SETTLE_POLL)
    return True
