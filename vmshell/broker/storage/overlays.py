"""Overlays for disks whose changes are thrown away: files without a name, gone with the last process that holds them.

Runs in: the broker; the empty overlays are made by jobs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...launcher_messages import STORAGE
from ...refusals import StorageFailed
from ...spawn import FIRST_FD
from ..runtime.files import storage

if TYPE_CHECKING:
    from ..host.processes import Host
    from ..services.jobs import Jobs
    from .resolve import Resolved

Made = dict[int, int]  # descriptors by the disk's place in the definition


class Overlays:
    """Empty overlays, made by jobs one after the other."""

    def __init__(self, *, host: Host, jobs: Jobs) -> None:
        self._host = host
        self._jobs = jobs

    def make(self, resolved: Resolved, done: Callable[[VmshellError | None, Made], None]) -> None:
        """Make an overlay for each disk with `snapshot`; `done(error, made)` is called once. The descriptors close after it."""
        wanted = [(index, disk.path) for index, disk in enumerate(resolved.definition.disks) if disk.snapshot]
        made: Made = {}

        def finish(error: VmshellError | None) -> None:
            try:
                done(error, made)
            finally:
                for fd in made.values():
                    os.close(fd)

        def step(status: int = 0, answer: object = None) -> None:
            if status:
                finish(StorageFailed(problem="the disk is full" if status == 2 else "the scratch disk cannot be written"))
            elif not wanted:
                finish(None)
            else:
                try:
                    begin(*wanted.pop(0))
                except VmshellError as exc:
                    finish(exc)

        def begin(index: int, path: str) -> None:
            size = resolved.object(path).size
            beside = f"{resolved.vm.store.folder}/.scratch"
            with storage():
                made[index] = self._host.create_file(beside)
                os.unlink(beside)
                self._jobs.start(STORAGE, ["create", str(size)], {FIRST_FD: made[index]}, step)

        step()
