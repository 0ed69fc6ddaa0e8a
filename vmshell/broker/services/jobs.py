"""Whatever takes long runs as a job: a short-lived process, started by the launcher, whose answer calls back.

A job's answer is the last line of what it prints, and it is over when nobody holds the other end of its output any more: nobody
may be left to read an exit status. So a job outlives the launcher that started it, and one that never started is known by having
said nothing.
Runs in: the broker.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from ...errors import VmshellError
from ...numbering import JOBS_MAX
from ...refusals import LauncherDown
from ...spawn import FIRST_FD
from ..host.processes import Host
from ..runtime.log import note
from ..runtime.loop import Loop
from .launcher import Launcher

OUTPUT_MAX = 1 << 16
AGAIN = 0.2  # seconds between two tries, while there is no launcher
ENDING = 1.0  # seconds in which a job that was abandoned still has its uid
FAILED = 3  # the status of a job that said nothing, or that could not be started
Done = Callable[[int, dict[str, Any]], None]  # its status, 0 if it is done; everything it answered


class Jobs:
    """At most as many at a time as there are uids for them; the others wait their turn."""

    def __init__(self, loop: Loop, host: Host, launcher: Launcher) -> None:
        self._loop = loop
        self._host = host
        self._launcher = launcher
        self._waiting: deque[_Job] = deque()
        self.running = 0

    def start(self, kind: str, words: Sequence[str], fds: Mapping[int, int], done: Done) -> Callable[[], None]:
        """Start a job with *fds*, numbered from 3 (they stay open here); `done(status, answer)` is called once.

        Returns what to call if nobody wants its answer any more: a `put` notices that, and ends.
        """
        assert list(fds) == list(range(FIRST_FD, FIRST_FD + len(fds)))
        job = _Job(self._loop, self._launcher, kind, list(words), _duplicates(fds.values()), self._over(done))
        self._waiting.append(job)
        self._admit()
        return job.abandon

    def own(self, argv: Sequence[str], done: Callable[[int], None]) -> None:
        """Start a child of our own; `done(status)` when it has ended. Raises OSError when it cannot be started."""
        process = self._host.spawn(argv, {}, stderr=2)
        self.running += 1

        def ended() -> None:
            self.running -= 1
            self._loop.unwatch(process.pidfd)
            done(process.reap() or 0)

        self._loop.watch(process.pidfd, ended)

    def _over(self, done: Done) -> Done:
        def over(status: int, answer: dict[str, Any]) -> None:
            self.running -= 1
            self._admit()
            done(status, answer)

        return over

    def _admit(self) -> None:
        while self._waiting and self.running < JOBS_MAX:
            self.running += 1
            self._waiting.popleft().begin()


class _Job:
    """One job on its way: asked for, started, heard out."""

    def __init__(self, loop: Loop, launcher: Launcher, kind: str, words: list[str], fds: list[int], done: Done) -> None:
        self._loop = loop
        self._launcher = launcher
        self._kind = kind
        self._words = words
        self._fds = fds
        self._done = done
        self._output = b""
        self._reader = -1
        self._lost = False  # the launcher went away before it said whether the job was started
        self._abandoned = False
        self._answers = 2  # of the launcher's, and the end of the output

    def begin(self) -> None:
        if self._abandoned:
            self._end()
            return
        self._lost, self._answers = False, 2
        try:
            self._reader, writer = os.pipe2(os.O_CLOEXEC)
        except OSError as exc:
            # No descriptors left: others' uploads end, and it has its turn.
            note("job-waits", kind=self._kind, problem=exc)
            self._loop.after(AGAIN, self.begin)
            return
        os.set_blocking(self._reader, False)
        self._loop.watch(self._reader, self._hear)
        try:
            self._launcher.job(self._kind, self._words, (*self._fds, writer), self._answered)
        finally:
            os.close(writer)

    def abandon(self) -> None:
        """Listen no more; its end is that of a job that said nothing."""
        self._abandoned = True
        if self._reader >= 0:
            self._output = b""
            self._loop.after(ENDING, self._one_less)
            self._close()

    def _answered(self, error: VmshellError | None) -> None:
        if isinstance(error, LauncherDown):
            self._lost = True
        elif error:
            note("job-refused", kind=self._kind, problem=error)
        self._one_less()

    def _hear(self) -> None:
        try:
            data = os.read(self._reader, OUTPUT_MAX)
        except BlockingIOError:
            return
        if data and len(self._output) < OUTPUT_MAX:
            self._output += data
        if data:
            return
        self._close()
        self._one_less()

    def _close(self) -> None:
        self._loop.unwatch(self._reader)
        os.close(self._reader)
        self._reader = -1

    def _one_less(self) -> None:
        self._answers -= 1
        if self._answers:
            return
        if self._lost and not self._output:
            self._loop.after(AGAIN, self.begin)
            return
        self._end()

    def _end(self) -> None:
        for fd in self._fds:
            os.close(fd)
        answer = _last_line(self._output)
        status = answer.get("status", 0)
        self._done(status if type(status) is int else FAILED, answer)


def _duplicates(fds: Iterable[int]) -> list[int]:
    with ExitStack() as stack:
        made = []
        for fd in fds:
            made.append(os.dup(fd))
            stack.callback(os.close, made[-1])
        stack.pop_all()
    return made


def _last_line(output: bytes) -> dict[str, Any]:
    """What the last line of a job's output says; `{"status": 3}` if it says nothing that could be understood."""
    lines = output.decode("utf-8", "replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"status": FAILED}
