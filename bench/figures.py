"""What the benchmarks share: rows of the table, pairs and their ratio, a program on a terminal, a broker in a temporary place."""

from __future__ import annotations

import contextlib
import math
import os
import pty
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from tests.session import Session  # noqa: E402
from vmshell.layout import Layout  # noqa: E402

PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
PAIRS = 11
# Installed hosts take prompt_toolkit from Debian's packages; where those are missing it is the one of this interpreter.
DISTDIRS = ("/usr/lib/python3/dist-packages", *(path for path in sys.path if path.endswith("site-packages")))

# id, what, figure, ratio (NaN: there is none), aim, is the aim met (None: not measured, the figure says why)
Row = tuple[str, str, str, float, str, bool | None]


def skipped(identity: str, what: str, reason: str) -> Row:
    return (identity, what, f"skipped: {reason}", math.nan, "", None)


def compared(
    identity: str,
    what: str,
    ours: Callable[[], float],
    other: Callable[[], float],
    most: float | None,
    pairs: int = PAIRS,
    unit: str = "ms",
) -> Row:
    """Time *ours* and *other* (each returns seconds) in turn; the ratio is the median of the pairs' ratios. No *most*: no aim."""
    ours(), other()  # once for the caches
    seen = []
    for index in range(pairs):
        # Each goes first in half of the pairs: whoever follows finds warmer caches.
        if index % 2:
            second = other()
            seen.append((ours(), second))
        else:
            first = ours()
            seen.append((first, other()))
    ratio = statistics.median(mine / theirs for mine, theirs in seen)
    scale = 1000.0 if unit == "ms" else 1.0
    figure = " against ".join(spread([value * scale for value in column]) for column in zip(*seen, strict=True)) + f" {unit}"
    return (identity, what, figure, ratio, f"<= {most:g}" if most else "", ratio <= most if most else True)


def spread(values: list[float]) -> str:
    """`median (min-max)`."""
    digits = 0 if min(values) >= 100 else 1
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


# --- a place of one's own ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def place(parent: str = "/var/tmp") -> Iterator[Path]:
    """A temporary folder that other users can pass through, with a short path; on a real disk if not said otherwise."""
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def layout_in(folder: Path, *, run: str = "", embedded: bool = True) -> Layout:
    """A layout below *folder*. TCG is set: looking whether KVM works is nothing to measure here."""
    parts = {name: f"{folder}/{name}" for name in ("etc", "state", "run", "log")}
    layout = Layout(etc=parts["etc"], state=parts["state"], run=run or parts["run"], log=parts["log"], embedded=embedded)
    os.makedirs(layout.etc)
    Path(layout.policy).write_text('[host]\naccel = "tcg"\nconnections_max = 600\nboots_at_once = 8\n', encoding="utf-8")
    return layout


@contextlib.contextmanager
def broker() -> Iterator[Session]:
    """A running broker and relay in session mode; the run directory is in memory, as it is on any host."""
    with place() as folder, place("/dev/shm") as memory, Session(layout_in(folder, run=f"{memory}/run")) as session:
        yield session


def installed(folder: Path) -> tuple[str, str]:
    """A byte-compiled copy of the code as `make install` lays it out; returns its folder and the login shell's starter."""
    library = folder / "lib"
    shutil.copytree(f"{ROOT}/vmshell", library / "vmshell", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([PYTHON, "-IS", "-m", "compileall", "-q", str(library)], check=True, stdout=subprocess.DEVNULL)
    distdir = next((path for path in DISTDIRS if os.path.isdir(f"{path}/prompt_toolkit")), "/nonexistent")
    text = Path(ROOT, "etc/bin/vmshell").read_text(encoding="utf-8")
    starter = folder / "vmshell"
    starter.write_text(text.replace("@LIBDIR@", str(library)).replace("@DISTDIR@", distdir), encoding="utf-8")
    starter.chmod(0o755)
    return str(library), str(starter)


# --- a program on a terminal ------------------------------------------------------------------------------------------


class Terminal:
    """A program on a pty of its own. `began` is when it was started."""

    def __init__(self, argv: list[str]) -> None:
        self.output = b""
        self.began = time.perf_counter()
        self.pid, self.fd = pty.fork()
        if not self.pid:
            with contextlib.suppress(OSError):
                os.execve(
                    argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "xterm", "LANG": "C.UTF-8", "HOME": "/"}
                )
            os._exit(127)

    def until(self, text: bytes, seconds: float = 120) -> float:
        """Read until *text* has come; returns the seconds since the start."""
        while text not in self.output:
            if not self._read(seconds):
                raise RuntimeError(f"the program ended before {text!r}: {self.output[-300:]!r}")
        return time.perf_counter() - self.began

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def end(self, seconds: float = 120) -> tuple[int, float]:
        """Read to the end; returns the exit status and the seconds since the start."""
        while self._read(seconds):
            pass
        took = time.perf_counter() - self.began
        os.close(self.fd)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status), took

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.close(self.fd)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def _read(self, seconds: float) -> bool:
        if not select.select([self.fd], [], [], seconds)[0]:
            self.kill()
            raise RuntimeError(f"nothing came for {seconds:.0f} s: {self.output[-300:]!r}")
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # EIO: the other side is closed
            data = b""
        self.output += data
        return bool(data)
