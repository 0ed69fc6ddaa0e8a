"""Catalogue images as the broker uses them: read anew each time, and checked against their hashes once per change of a file.

Hashing is a job without rights; the broker itself only compares what `fstat` says with what was found whole before.
Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from ...errors import VmshellError
from ...launcher_messages import STORAGE
from ...layout import Layout
from ...refusals import ImageDamaged
from ..services.jobs import Jobs
from . import image_catalogue
from .image_catalogue import Image

Done = Callable[[VmshellError | None], None]
_Stamp = tuple[int, int, int, str]


class Images:
    def __init__(self, jobs: Jobs, layout: Layout) -> None:
        self._jobs = jobs
        self._layout = layout
        self._whole: set[_Stamp] = set()

    def names(self) -> list[str]:
        return image_catalogue.names(self._layout.images)

    def get(self, name: str) -> Image:
        """The image *name*; raises NoSuchImage or ImageDamaged."""
        return image_catalogue.load(self._layout.images, name)

    def when_verified(self, images: Sequence[Image], done: Done) -> None:
        """Call `done(None)` once every file of *images* is known to be whole, or `done(error)` at the first that is not."""
        remaining = list(images)

        def step(error: VmshellError | None = None) -> None:
            if error or not remaining:
                done(error)
            else:
                self._verify(remaining.pop(0), step)

        step()

    def _verify(self, image: Image, done: Done) -> None:
        try:
            with ExitStack() as stack:
                fds: dict[int, int] = {}
                stamps = []
                for file in image.files():
                    fd = image.open(file)
                    stack.callback(os.close, fd)
                    stamp = _stamp(fd, image.sha256[file])
                    if stamp not in self._whole:
                        fds[3 + len(fds)] = fd
                        stamps.append(stamp)
                if not fds:
                    done(None)
                    return
                words = ["verify", *(stamp[3] for stamp in stamps)]
                self._jobs.start(STORAGE, words, fds, lambda status, answer: self._verified(image, stamps, status, done))
        except OSError as exc:
            done(ImageDamaged(image=image.name, problem=f"its files cannot be checked ({exc.strerror})"))
        except VmshellError as exc:
            done(exc)

    def _verified(self, image: Image, stamps: list[_Stamp], status: int, done: Done) -> None:
        if status == 0:
            self._whole.update(stamps)
            done(None)
        else:
            problem = "a file is not what its hash says" if status == 1 else f"its files cannot be checked (status {status})"
            done(ImageDamaged(image=image.name, problem=problem))


def _stamp(fd: int, sha256: str) -> _Stamp:
    status = os.fstat(fd)
    return status.st_ino, status.st_size, status.st_mtime_ns, sha256
