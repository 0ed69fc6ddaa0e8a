"""Whatever takes long runs as a job: a short-lived process of its own, whose end calls back. The loop never waits for it.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from .host import Host, Process
from .loop import Loop

OUTPUT_MAX = 4096
Done = Callable[[int, str], None]  # exit status, first bytes of standard output


class Jobs:
    def __init__(self, loop: Loop, host: Host) -> None:
        self._loop = loop
        self._host = host
        self.running = 0

    def start(self, argv: Sequence[str], fds: Mapping[int, int], done: Done) -> Process:
        """Start *argv* and call `done(status, output)` when it has ended. Raises OSError when it cannot be started."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            process = self._host.spawn(argv, fds, stdout=write_end, stderr=2)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.running += 1
        self._loop.watch(process.pidfd, lambda: self._ended(process, read_end, done))
        return process

    def _ended(self, process: Process, read_end: int, done: Done) -> None:
        self.running -= 1
        self._loop.unwatch(process.pidfd)
        status = process.reap()
        try:
            # What the job printed waits in the pipe; a job that printed more than fits has been killed by it, which is fine.
            output = os.read(read_end, OUTPUT_MAX).decode("utf-8", "replace")
        except BlockingIOError:
            output = ""
        finally:
            os.close(read_end)
        done(1 if status is None else status, output)
