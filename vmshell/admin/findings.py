"""What `vmshell-admin doctor` is made of: a finding, and the ways its checks ask programs.

Runs in: vmshell-admin.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

OK, WARN, FAIL = "OK", "WARN", "FAIL"
ENV = {"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
PROGRAM_PATIENCE = 30.0  # seconds
ANSWER_PATIENCE = 10.0


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
    """systemd's word for each unit: active, inactive, failed …"""
    return dict(zip(units, output("systemctl", "is-active", *units).split(), strict=False))
