"""What takes longer than an answer may: QEMU's jobs, asked about until they have concluded, and devices that guests let go.

Saving a snapshot stops all of QEMU, its monitor included, for as long as the guest's memory takes to be written: while a job
runs, its answers may be late. Of what QEMU says about it only two things count: `concluded`, and whether an error stands there.
Runs in: the relay. Touches QEMU by its monitor.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .loop import Loop
    from .qmp import Monitor

JOB_TIME = 600.0
LOOK = 0.2  # seconds between two questions

CONCLUDED = "concluded"


def run_job(loop: Loop, monitor: Monitor, command: str, arguments: dict[str, object], done: Callable[[bool], None]) -> None:
    """Run the job that *command* starts and *arguments* name (`job-id`); *done(ok)* is called once."""
    _Job(loop, monitor, str(arguments["job-id"]), done).start(command, arguments)


class _Job:
    __slots__ = ("_done", "_loop", "_monitor", "_name", "_until")

    def __init__(self, loop: Loop, monitor: Monitor, name: str, done: Callable[[bool], None]) -> None:
        self._loop = loop
        self._monitor = monitor
        self._name = name
        self._done = done
        self._until = loop.now + JOB_TIME

    def start(self, command: str, arguments: dict[str, object]) -> None:
        self._monitor.excuse(self._until)
        self._monitor.execute(command, arguments, self._started)

    def broken(self, exc: Exception) -> None:
        self._end(False)

    def _started(self, ok: bool, body: object) -> None:
        if ok:
            self._look()
        else:
            self._end(False)

    def _look(self) -> None:
        self._monitor.execute("query-jobs", {}, self._seen)

    def _seen(self, ok: bool, body: object) -> None:
        job = _find(body, self._name) if ok else None
        if job is None or self._loop.now >= self._until:
            self._end(False)
        elif job.get("status") == CONCLUDED:
            good = "error" not in job
            self._monitor.execute("job-dismiss", {"id": self._name}, lambda ok, body: self._end(good))
        else:
            self._loop.after(LOOK, self._look, self)

    def _end(self, ok: bool) -> None:
        self._monitor.excuse(0.0)
        self._done(ok)


GONE_TIME = 15.0  # seconds a guest gets to let a device go


def run_until_gone(
    loop: Loop, monitor: Monitor, command: str, arguments: dict[str, object], done: Callable[[bool], None]
) -> None:
    """Have *command* ask the guest for the device `id` of *arguments*; *done(ok)* is called once, when it is gone or too late."""
    _Leaving(loop, monitor, str(arguments["id"]), done).start(command, arguments)


class _Leaving:
    __slots__ = ("_done", "_loop", "_monitor", "_name", "_until")

    def __init__(self, loop: Loop, monitor: Monitor, name: str, done: Callable[[bool], None]) -> None:
        self._loop = loop
        self._monitor = monitor
        self._name = name
        self._done = done
        self._until = loop.now + GONE_TIME

    def start(self, command: str, arguments: dict[str, object]) -> None:
        # A no may mean that it is gone, or that it was asked before: what counts is whether it is there.
        self._monitor.execute(command, arguments, lambda ok, body: self._look())

    def broken(self, exc: Exception) -> None:
        self._done(False)

    def _look(self) -> None:
        self._monitor.execute("qom-list", {"path": "/machine/peripheral"}, self._seen)

    def _seen(self, ok: bool, body: object) -> None:
        there = isinstance(body, list) and any(isinstance(item, dict) and item.get("name") == self._name for item in body)
        if not ok or (there and self._loop.now >= self._until):
            self._done(False)
        elif there:
            self._loop.after(LOOK, self._look, self)
        else:
            self._done(True)


def _find(jobs: object, name: str) -> dict[str, object] | None:
    if isinstance(jobs, list):
        for job in jobs:
            if isinstance(job, dict) and job.get("id") == name:
                return job
    return None
