"""P15: what a start pays for a launcher of its own: from the request to the pidfd of the jail that it started.

As on a host: a launcher that is root with its unit's rights and a broker of another uid; without systemd's scope, which costs
what it cost before. Nothing runs: each jail waits at its start barrier and is ended.
"""

from __future__ import annotations

import math
import os
import statistics
import time

from bench.figures import Row, place, skipped, spread
from tests.process.launchers import Launcher, Lent, small_plan

COUNT = 50
MOST = 5.0  # ms


def rows() -> list[Row]:
    what = "launch request to pidfd"
    if os.geteuid() != 0:
        return [skipped("P15", what, "needs root to be a launcher")]
    with place() as folder, Launcher(folder) as launcher:
        times = [_one(launcher, number) for number in range(1, COUNT + 2)][1:]  # the first one fills the caches
    return [("P15", what, f"{spread(times)} ms", math.nan, f"<= {MOST:g} ms", statistics.median(times) <= MOST)]


def _one(launcher: Launcher, number: int) -> float:
    """Milliseconds that the start of VM *number* takes."""
    with Lent(launcher.folder) as lent:
        body, fds = lent.request(number, small_plan(lent))
        began = time.perf_counter()
        _, pidfd = launcher.started(body, fds)
        took = time.perf_counter() - began
        os.close(pidfd)
        launcher.end(number)
    return took * 1000
