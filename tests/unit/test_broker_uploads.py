"""What an upload waits for, and for how long; and what is left of one that fails at any step."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fakes.parts import PartsWith
from vmshell.broker.composition import Parts
from vmshell.broker.host.processes import Host
from vmshell.broker.runtime.call import Call, Peer
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services import jobs as jobs_module
from vmshell.broker.services.jobs import Jobs
from vmshell.broker.storage import uploads as uploads_module
from vmshell.layout import Layout
from vmshell.messages import Done, Put
from vmshell.model.policy import Policy
from vmshell.refusals import LauncherDown, StorageFailed, TooManyRequests

SHA = "0" * 64


class IdleJobs:
    """Jobs that do nothing by themselves."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.abandoned: list[int] = []

    def start(self, kind: str, words: list[str], fds: dict[int, int], done: Any) -> Any:
        self.heard.append(done)
        number = len(self.heard) - 1
        return lambda: self.abandoned.append(number)


class Connection:
    """A connection of alice's."""

    def __init__(self) -> None:
        self.peer = Peer(1000, "alice", admin=False)
        self.pending = 0
        self.sent: list[dict[str, Any]] = []
        self.pipes: list[int] = []

    def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        self.sent.append(body)
        self.pipes += [os.dup(fd) for fd in fds]

    def call(self, ident: int) -> Call:
        return Call(cast(Any, self), ident)

    def error(self) -> str:
        return str(self.sent[-1]["error"]["text"])


class Bench:
    def __init__(self, parts: Parts, jobs: IdleJobs) -> None:
        self.parts = parts
        self.jobs = jobs
        self.connections: list[Connection] = []

    def put(self, name: str = "x", connection: Connection | None = None, ident: int = 1) -> Connection:
        if connection is None:
            connection = Connection()
            self.connections.append(connection)
        self.parts.handlers[Put](connection.call(ident), Put(vm="shelf", object=name, format="file"))
        return connection

    def done(self, connection: Connection, **said: Any) -> None:
        call = connection.call(2)
        said = {"put": 1, "bytes": 5, "sha256": SHA, **said}
        call.guard(lambda: self.parts.handlers[Done](call, Done(**said)))

    def job_ends(self, number: int = 0, **answer: Any) -> None:
        self.jobs.heard[number](0, {"status": 0, "size": 5, "bytes": 5, "sha256": SHA, **answer})

    def file(self, name: str = "x") -> Path:
        return Path(self.store._half_made(name))

    @property
    def store(self) -> Any:
        return self.parts.registry.shelf(1000, "alice")

    def turn(self, seconds: float = 0.05) -> None:
        loop = self.parts.loop
        loop.after(seconds, loop.stop)
        loop.run()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    def raised(exc: BaseException) -> None:
        raise exc

    layout = Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}/r", log=f"{tmp_path}/l", embedded=False)
    jobs = IdleJobs()
    parts = PartsWith(layout, Policy(), Loop(raised), Host(embedded=True), jobs=jobs)
    parts.registry.load()
    made = Bench(parts, jobs)
    yield made
    for connection in made.connections:
        for fd in connection.pipes:
            os.close(fd)


def test_the_jobs_answer_first(bench: Bench) -> None:
    sender = bench.put()
    bench.job_ends()
    assert len(sender.sent) == 1
    bench.done(sender)
    assert sender.sent[-1]["ok"] == {"name": "shelf", "object": "x", "size": 5, "format": "file"}
    assert bench.store.get("x").size == 5 and bench.jobs.abandoned == []


def test_the_senders_word_first(bench: Bench) -> None:
    sender = bench.put()
    bench.done(sender)
    assert len(sender.sent) == 1
    bench.job_ends()
    assert sender.sent[-1]["ok"]["size"] == 5


def test_a_sender_that_has_said_it_may_leave(bench: Bench) -> None:
    sender = bench.put()
    bench.done(sender)
    bench.parts.uploads.left(cast(Any, sender))
    bench.job_ends()
    assert bench.store.get("x").size == 5


def test_a_sender_that_says_nothing_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads_module, "DONE_WITHIN", 0.01)
    sender = bench.put()
    bench.job_ends()
    bench.turn()
    assert not bench.file().exists()
    bench.done(sender)
    assert sender.error() == "shelf.x was not taken: nobody said that this was all"


def test_a_stalled_upload_makes_room_for_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.put()
    with pytest.raises(TooManyRequests):
        bench.put("y")
    monkeypatch.setattr(uploads_module, "STALLED", 0.0)
    second = bench.put()  # under the same name, too
    assert bench.jobs.abandoned == [0]
    bench.done(first)
    assert first.error() == "shelf.x was not taken: nothing came any more, and another upload took its place"
    bench.jobs.heard[0](3, {"status": 3})  # its job has ended by now: nobody's news
    bench.done(second)
    bench.job_ends(1)
    assert second.sent[-1]["ok"]["size"] == 5
    monkeypatch.undo()
    bench.put("z")


def test_an_upload_that_grows_is_not_stalled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.put()
    (upload,) = bench.parts.uploads._of.values()
    upload._moved -= 100
    os.truncate(bench.file(), 1)
    with pytest.raises(TooManyRequests):
        bench.put("y")
    upload._moved -= 100
    bench.put("y")


def test_more_than_was_said_is_noticed_before_its_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody kept the pipe and goes on writing: the request does not wait for that."""
    monkeypatch.setattr(uploads_module, "LOOK", 0.01)
    sender = bench.put()
    bench.done(sender)
    os.truncate(bench.file(), 6)
    bench.turn()
    assert sender.error() == "shelf.x was not taken: more came than was sent"
    assert bench.jobs.abandoned == [0]


def test_a_connection_begins_another_when_the_first_has_failed(bench: Bench) -> None:
    sender = bench.put()
    bench.jobs.heard[0](1, {"status": 1, "problem": "it is empty"})
    bench.put("y", sender, ident=2)
    bench.done(sender, put=1)
    assert "no upload was begun here as request 1" in sender.error()
    bench.done(sender, put=2)
    bench.job_ends(1)
    assert sender.sent[-1]["ok"]["object"] == "y"


@pytest.mark.parametrize("step", ["create_file", "pipe2", "start", "fchmod"])
def test_a_step_that_fails_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fails(*_: object) -> None:
        raise OSError(24, "Too many open files")

    thing: Any = {"create_file": bench.parts.host, "start": bench.jobs}.get(step, os)
    with monkeypatch.context() as patch:
        patch.setattr(thing, step, fails)
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(StorageFailed, match="Too many open files"):
            bench.put()
        assert set(os.listdir("/proc/self/fd")) <= before
    assert not bench.file().exists()
    assert not bench.parts.uploads._of and not bench.parts.uploads._on
    bench.put()


def test_a_reply_that_nobody_takes_leaves_nothing(bench: Bench) -> None:
    class Gone(Connection):
        def send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
            bench.parts.uploads.left(cast(Any, self))

    bench.put(connection=Gone())
    assert not bench.parts.uploads._of and not bench.parts.uploads._on
    assert bench.jobs.abandoned == [0] and not bench.file().exists()


# --- jobs that nobody waits for ---------------------------------------------------------------------------------------


class Launcher:
    """Says yes to every job, or that there is no launcher; keeps where the answer goes."""

    def __init__(self) -> None:
        self.outputs: list[int] = []
        self.down = False

    def job(self, kind: str, words: list[str], fds: tuple[int, ...], answered: Any) -> None:
        self.outputs.append(os.dup(fds[-1]))
        answered(LauncherDown() if self.down else None)


@pytest.fixture
def jobs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Jobs, Launcher, Bench]]:
    monkeypatch.setattr(jobs_module, "ENDING", 0.0)
    monkeypatch.setattr(jobs_module, "AGAIN", 0.0)
    launcher = Launcher()
    yield Jobs(bench.parts.loop, bench.parts.host, cast(Any, launcher)), launcher, bench
    for fd in launcher.outputs:
        os.close(fd)


def test_a_job_that_is_abandoned_sees_it_and_is_over(jobs: tuple[Jobs, Launcher, Bench]) -> None:
    made, launcher, bench = jobs
    ended: list[int] = []
    before = len(os.listdir("/proc/self/fd"))
    abandon = made.start("storage", ["put"], {3: 0}, lambda status, answer: ended.append(status))
    assert os.write(launcher.outputs[0], b'{"sta') == 5
    bench.turn()
    abandon()
    with pytest.raises(BrokenPipeError):
        os.write(launcher.outputs[0], b"x")
    bench.turn()
    assert ended == [jobs_module.FAILED] and made.running == 0
    assert len(os.listdir("/proc/self/fd")) == before + 1, "all but the job's own end"


def test_an_abandoned_job_is_not_begun_again(jobs: tuple[Jobs, Launcher, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    made, launcher, bench = jobs
    ended: list[int] = []
    launcher.down = True
    abandon = made.start("storage", ["put"], {3: 0}, lambda status, answer: ended.append(status))
    abandon()
    bench.turn()
    assert ended == [jobs_module.FAILED] and len(launcher.outputs) == 1
    # Neither is one that still waited for its turn.
    monkeypatch.setattr(jobs_module, "JOBS_MAX", 0)
    made.start("storage", ["put"], {3: 0}, lambda status, answer: ended.append(status))()
    monkeypatch.setattr(jobs_module, "JOBS_MAX", 1)
    made._admit()
    assert ended == [jobs_module.FAILED] * 2 and len(launcher.outputs) == 1 and made.running == 0


def test_without_descriptors_a_job_waits(jobs: tuple[Jobs, Launcher, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it was never begun and its place never given back."""
    made, launcher, bench = jobs

    def none_left(flags: int) -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe2", none_left)
        made.start("storage", ["verify"], {3: 0}, lambda status, answer: None)
        assert made.running == 1 and launcher.outputs == []
    until = time.monotonic() + 20
    while not launcher.outputs:
        assert time.monotonic() < until
        bench.turn()
