"""Uploads: `put` opens a pipe that a job without rights reads, `done` says what was sent, and what came must be the same.

The sender's word and the job's answer come in either order; whichever is first waits for the other, for a bounded time. Anything
else is an upload that broke off, of which nothing stays: a connection that ends before `done`, another count or sum, a VM that is
removed, no more room. What has come counts against the owner's limit meanwhile.
Runs in: the broker. Sees no byte of what is sent; only sizes and a sum come back.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ...errors import VmshellError
from ...launcher_messages import STORAGE
from ...messages import Done, Put
from ...model.decide import Usage, fits
from ...names import MIB
from ...refusals import StorageFailed, TooManyRequests, UploadRefused
from ...spawn import FIRST_FD
from ..runtime.log import by_user
from ..vm.objects import Object, Store, mebibytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...model.policy import Effective
    from ..host.processes import Host
    from ..policies import Policies
    from ..runtime.call import Call, Connection
    from ..runtime.loop import Loop, Timer
    from ..services.jobs import Jobs
    from ..vm.registry import Registry
    from ..vm.vm import Vm

UPLOADS_MAX = 1  # of one user: an upload may take all the room that is left, so two would take it twice
STALLED = 30.0  # seconds without a byte, after which another upload may take its place
DONE_WITHIN = 60.0  # seconds from the end of what came to the sender's word
LOOK = 2.0  # seconds between two looks at how much has come
READ_ONLY = ("file", "rom")


class Uploads:
    """One under way for each user, and for each connection the last one that it began."""

    def __init__(self, *, loop: Loop, host: Host, jobs: Jobs, registry: Registry, policies: Policies) -> None:
        self._loop = loop
        self._host = host
        self._jobs = jobs
        self._registry = registry
        self._policies = policies
        self._of: dict[int, Upload] = {}
        self._on: dict[Connection, Upload] = {}

    def begin(self, call: Call, request: Put, vm: Vm | None, store: Store) -> None:
        """Reply with the writing end of a pipe whose other end a new job reads. Raises VmshellError."""
        uid = call.peer.uid if vm is None else vm.uid
        before = {self._of.get(uid), self._on.get(call.connection)}
        for upload in before:
            if upload is not None and not upload.over:
                if not upload.stalled():
                    raise TooManyRequests(count=UPLOADS_MAX + 1, what="uploads", limit=UPLOADS_MAX)
                upload.fail(UploadRefused(object=upload.ref, problem="nothing came any more, and another upload took its place"))
        effective = self._policies.effective(call.peer.user if vm is None else vm.owner)
        upload = Upload(
            call,
            request,
            vm,
            store,
            effective=effective,
            loop=self._loop,
            host=self._host,
            jobs=self._jobs,
            registry=self._registry,
            ended=lambda: self._of.pop(uid, None),
        )
        upload.begin(call)
        self._of[uid] = self._on[call.connection] = upload
        call.reply({"name": request.vm, "object": request.object})

    def done(self, call: Call, request: Done) -> None:
        """The sender's word; the reply comes when the upload has become an object. Raises VmshellError."""
        upload = self._on.get(call.connection)
        if upload is None or upload.ident != request.put:
            raise UploadRefused(object="it", problem=f"no upload was begun here as request {request.put}")
        upload.said(call, request)

    def left(self, connection: Connection) -> None:
        """The connection has ended."""
        upload = self._on.pop(connection, None)
        if upload is not None:
            upload.left()

    def removed(self, vm: Vm) -> None:
        """The VM is gone, and so is the place for what comes."""
        for upload in tuple(self._of.values()):
            if upload.vm is vm:
                upload.fail(UploadRefused(object=upload.ref, problem="its VM was deleted meanwhile"))


class Upload:
    """One file on its way; `over` once it is an object or has failed, when *ended* is called."""

    def __init__(
        self,
        call: Call,
        request: Put,
        vm: Vm | None,
        store: Store,
        *,
        effective: Effective,
        loop: Loop,
        host: Host,
        jobs: Jobs,
        registry: Registry,
        ended: Callable[[], object],
    ) -> None:
        self.ident = call.ident
        self.ref = f"{request.vm}.{request.object}"
        self.vm = vm
        self.over = False
        self._loop = loop
        self._host = host
        self._jobs = jobs
        self._registry = registry
        self._request = request
        self._store = store
        self._ended = ended
        self._uid = call.peer.uid if vm is None else vm.uid
        self._effective = effective
        self._said: tuple[Call, Done] | None = None
        self._came: dict[str, Any] | None = None  # what the job says
        self._why: VmshellError | None = None  # it failed
        self._size = 0  # how much had come when we last looked, and when that was more than before
        self._moved = time.monotonic()
        self._timer: Timer | None = None
        self._abandon_job: Callable[[], None] | None = None

    def begin(self, call: Call) -> None:
        """Start the job; *call* keeps the end of its pipe that is to be written. Raises VmshellError."""
        limits, used = self._effective.limits, self._registry.used(self._uid)
        room = min(limits.user_disk - used.disk, limits.disk_size_max)
        if room <= 0:
            fits(self.ref, self._effective, Usage(disk=1), used)
        path = self._store.begin(self._request.object, Object(self._request.format, 0))
        try:
            call.keep_fds((self._start(path, room),))
        except OSError as exc:
            self._store.give_up(self._request.object)
            raise StorageFailed(problem=exc.strerror or "the disk refused") from exc
        self._look_again()

    def stalled(self) -> bool:
        """Has nothing come for a while?"""
        self._look()
        return time.monotonic() - self._moved >= STALLED

    def said(self, call: Call, said: Done) -> None:
        """The sender says that this was all. Raises VmshellError: what it failed for, if it has."""
        if self._why is not None:
            raise self._why
        if self._said is not None:
            raise UploadRefused(object=self.ref, problem="its end was said before")
        self._said = call, said
        self._compare()

    def left(self) -> None:
        """The sender has gone."""
        if self._said is None:
            self.fail(UploadRefused(object=self.ref, problem="the upload broke off"))

    def fail(self, why: VmshellError) -> None:
        """It broke off: leave nothing of it, and tell the sender, now or when it says `done`."""
        if self.over:
            return
        self._why = why
        self._store.give_up(self._request.object)
        self._end()
        if self._said is not None:
            self._said[0].fail(why)

    def _end(self) -> None:
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._abandon_job is not None:
            self._abandon_job()
        self._ended()

    # --- the job ------------------------------------------------------------------------------------------------------

    def _start(self, path: str, room: int) -> int:
        """Start the job that reads; returns the end of the pipe that is to be written. Raises OSError."""
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        file = self._host.create_file(path)
        try:
            if self._request.format in READ_ONLY:
                # QEMU opens these anew under its own uid; the folder above lets nobody else come near.
                os.fchmod(file, 0o444)
            out, into = os.pipe2(os.O_CLOEXEC)
            try:
                words = ["put", self._request.format, str(room * MIB)]
                fds = {FIRST_FD: file, FIRST_FD + 1: out}
                self._abandon_job = self._jobs.start(STORAGE, words, fds, self._heard)
            except BaseException:
                os.close(into)
                raise
            finally:
                os.close(out)
        finally:
            os.close(file)
        return into

    def _heard(self, status: int, answer: dict[str, Any]) -> None:
        """The job has ended."""
        self._abandon_job = None
        if self.over:
            return
        if status:
            self.fail(self._refusal(status, answer))
            return
        self._came = answer
        self._compare()
        if not self.over:
            self._wait(DONE_WITHIN, lambda: self.fail(UploadRefused(object=self.ref, problem="nobody said that this was all")))

    def _refusal(self, status: int, answer: dict[str, Any]) -> VmshellError:
        if status == 2:
            return StorageFailed(problem="the disk is full")
        problem = answer.get("problem")
        return UploadRefused(object=self.ref, problem=problem if isinstance(problem, str) else f"it failed (status {status})")

    # --- meanwhile ----------------------------------------------------------------------------------------------------

    def _look_again(self) -> None:
        """Look how much has come by now, and see that it still fits."""
        try:
            self._look()
            self._fits(self._size)
            if self._said is not None and self._size > self._said[1].bytes:
                raise UploadRefused(object=self.ref, problem="more came than was sent")
        except VmshellError as exc:
            self.fail(exc)
        else:
            self._wait(LOOK, self._look_again)

    def _look(self) -> None:
        size = self._store.grown(self._request.object)
        if size > self._size:
            self._size, self._moved = size, time.monotonic()

    def _fits(self, size: int) -> None:
        """Count *size* bytes; raises OverLimit if there is no room for them (any more)."""
        self._store.count(self._request.object, 0)
        used = self._registry.used(self._uid)
        self._store.count(self._request.object, size)
        fits(self.ref, self._effective, Usage(disk=mebibytes(size)), used)

    def _wait(self, seconds: float, action: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.after(seconds, action)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        """Make it an object if both have been heard and say the same."""
        if self._came is None or self._said is None:
            return
        call, said = self._said
        try:
            if (said.bytes, said.sha256) != (self._came.get("bytes"), self._came.get("sha256")):
                raise UploadRefused(object=self.ref, problem="what came is not what was sent")
            made = self._made(self._came.get("size"))
        except VmshellError as exc:
            self.fail(exc)
            return
        self._end()
        by_user(self._uid, "put", object=self.ref, size=made.size, format=made.format)
        call.reply({"name": self._request.vm, "object": self._request.object, "size": made.size, "format": made.format})

    def _made(self, size: object) -> Object:
        if type(size) is not int or size <= 0:
            raise UploadRefused(object=self.ref, problem="it has no size")
        if self.vm is not None and self._registry.get(self.vm.uid, self.vm.name) is not self.vm:
            raise UploadRefused(object=self.ref, problem="its VM was deleted meanwhile")
        made = Object(self._request.format, size)
        self._fits(size)
        self._store.finish(self._request.object, made)
        return made
