"""The disks that a definition asks for and that are not there yet: which they are, and making them by jobs.

Runs in: the broker; what is not simply a hole is written by a job.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import BadValue, VmshellError
from ...launcher_messages import STORAGE
from ...model.values import split_ref
from ...names import MIB, format_size
from ...refusals import StorageFailed
from ...spawn import FIRST_FD
from ..vm.objects import FILE, Object, Store

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..host.processes import Host
    from ..runtime.loop import Loop
    from ..services.jobs import Jobs
    from .images import Images

SMALLEST_DISK = MIB
Makes = dict[str, Object]  # by name
Done = Callable[[VmshellError | None], None]


class NewDisks:
    """Blank disks, and overlays over the disks of images."""

    def __init__(self, *, loop: Loop, host: Host, jobs: Jobs, images: Images) -> None:
        self._loop = loop
        self._host = host
        self._jobs = jobs
        self._images = images

    def to_make(self, store: Store, definition: Definition) -> Makes:
        """The VM's own objects that do not exist yet and say how to make them."""
        makes: Makes = {}
        for disk in definition.disks:
            if disk.path and not split_ref(disk.path)[0] and (disk.size or disk.base) and not store.find(disk.path):
                size, base = disk.size, split_ref(disk.base)[1]
                if base:
                    image = self._images.get(base)
                    if not image.disk:
                        raise BadValue(field="disk.base", value=disk.base, rule="that image has no disk")
                    if size and size < image.disk_size:
                        rule = f"image {base}'s disk has {format_size(image.disk_size)}; a VM's can only be larger"
                        raise BadValue(field="disk.size", value=format_size(size), rule=rule)
                    size = max(size, image.disk_size)
                if base and disk.format == "raw":
                    raise BadValue(field="disk.format", value="raw", rule="an overlay over an image is qcow2")
                makes[disk.path] = Object(disk.format or "qcow2", max(size, SMALLEST_DISK), base)
        return makes

    def make(self, store: Store, makes: Makes, done: Done) -> None:
        """Make blank disks and overlays, one job after the other; `done(None)`, or the error once none of them is left."""
        remaining = list(makes.items())
        begun: list[str] = []

        def failed(error: VmshellError) -> None:
            for name in begun:
                store.give_up(name)
            done(error)

        def step() -> None:
            if not remaining:
                done(None)
                return
            name, made = remaining.pop(0)

            def ended(status: int, answer: object) -> None:
                try:
                    if status:
                        raise StorageFailed(problem="the disk is full" if status == 2 else "the new disk cannot be written")
                    store.finish(name, made)
                    begun.remove(name)
                except VmshellError as exc:
                    failed(exc)
                else:
                    step()

            try:
                path = store.begin(name, made)
                begun.append(name)
                self._blank(path, made, ended)
            except VmshellError as exc:
                failed(exc)
            except OSError as exc:
                failed(StorageFailed(problem=exc.strerror or "the disk refused"))

        step()

    def _blank(self, path: str, made: Object, ended: Callable[[int, object], None]) -> None:
        """Make an empty disk at *path*: a hole, or a qcow2 file by a job; raises OSError."""
        assert made.format != FILE
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        fd = self._host.create_file(path)
        try:
            if made.format == "raw":
                os.ftruncate(fd, made.size)
                self._loop.after(0, lambda: ended(0, {}))
            else:
                self._jobs.start(STORAGE, ["create", str(made.size)], {FIRST_FD: fd}, ended)
        finally:
            os.close(fd)
