"""Of all processes of one's own only those that hold the barrier of that run folder are ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vmshell.broker.lifecycle.orphans import BARRIER, end_waiting

FORKS = "import os, time\nprint(1, flush=True)\nfor _ in range(9):\n time.sleep(0.01)\n if os.fork(): break\ntime.sleep(3600)\n"
WAITS = "import time\nprint(1, flush=True)\ntime.sleep(3600)\n"


@contextlib.contextmanager
def barrier(folder: Path, *, removed: bool = True) -> Iterator[int]:
    """What `start.py` makes of a run folder: a FIFO, open and without a name."""
    folder.mkdir(exist_ok=True)
    path = folder / BARRIER
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    if removed:
        path.unlink()
    yield fd
    os.close(fd)


def holder(code: str, *fds: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-IS", "-c", code], pass_fds=fds, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_whoever_holds_the_barrier_is_ended_and_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with barrier(tmp_path / "7") as ours, barrier(tmp_path / "77") as other, barrier(tmp_path / "8", removed=False) as named:
        waiting = [holder(WAITS, ours), holder(FORKS, ours)]
        others = [holder(WAITS, other), holder(WAITS, named), holder(WAITS)]
        try:
            end_waiting(str(tmp_path / "link" / "7"))
            assert [process.wait(60) for process in waiting] == [-9, -9]
            left = [pid for pid in os.listdir("/proc") if pid.isdecimal() and int(pid) != os.getpid() and _holds(pid, ours)]
            assert left == []
            end_waiting(str(tmp_path / "8"))  # it still has its name: somebody has made it, and has not let go of it
            assert [process.poll() for process in others] == [None] * 3
        finally:
            for process in (*waiting, *others):
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()


def _holds(pid: str, fd: int) -> bool:
    wanted = os.fstat(fd)
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{name}")
                if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    return False
