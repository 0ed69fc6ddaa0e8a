"""Programs of users' own on a host: put there, started as a user, heard line by line, ended with their input.

    with Program(host, "alice", "tests.attacks.poisoner", way="storm") as attack: attack.said(); …

A program gets what it is to do as one line of JSON on its input, says one JSON object a line, and ends when its input does.
"""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import threading
import time
from typing import Any

from tests.host.machine import SCRIPT, TREE, Host

FOLDER = "/opt/attacks"
PARTS = {
    "tests": ("consoles.py",),
    "tests/fakes": ("poison.py",),
    "tests/attacks": ("poisoner.py", "neighbour.py", "killer.py", "hoarder.py", "worker.py"),
}
LIBRARY = "/usr/local/lib/vmshell/current"
PATIENCE = 120.0  # seconds, on a busy machine


def put_programs(host: Host) -> None:
    for folder, names in PARTS.items():
        host.put(f"{FOLDER}/{folder}", *(f"{TREE}/{folder}/{name}" for name in names))


def as_user(user: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]


class Program:
    """*module* of those that `put_programs` put there, run by *user*."""

    def __init__(self, host: Host, user: str, module: str, **todo: object) -> None:
        words = [*as_user(user), "env", f"PYTHONPATH={FOLDER}:{LIBRARY}", "PYTHONDONTWRITEBYTECODE=1"]
        # As many descriptors as the host lets anybody have.
        line = f"ulimit -n $(ulimit -Hn); exec {shlex.join([*words, 'python3', '-m', module])}"
        self._name = f"{module} of {user}"
        self._process = subprocess.Popen(
            [SCRIPT, "exec", host.name, "bash", "-c", line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(todo) + "\n")
        self._process.stdin.flush()
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def said(self, seconds: float = PATIENCE) -> dict[str, Any]:
        """The next line; a failure if none comes within *seconds*."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"{self._name} has said nothing for {seconds} s") from None
        if line is None:
            assert self._process.stderr is not None
            raise AssertionError(f"{self._name} has ended: {self._process.stderr.read()[-2000:]}")
        return line

    def skip(self) -> list[dict[str, Any]]:
        """What has come so far, now taken."""
        lines = []
        while not self._lines.empty():
            line = self._lines.get()
            if line is None:
                self._lines.put(None)
                break
            lines.append(line)
        return lines

    def end(self) -> list[dict[str, Any]]:
        """End it; what it said that nobody has taken yet."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return [line for line in self._lines.queue if line is not None]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end()
        finally:
            self._process.kill()


def seconds(host: Host, *argv: str, timeout: float = PATIENCE) -> float:
    """How long *argv* takes, as root in the host."""
    begun = time.monotonic()
    host.exec(*argv, timeout=timeout)
    return time.monotonic() - begun
