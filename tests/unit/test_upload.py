"""The shell's side of `put`: bytes and their sum, a job that hangs up, and what a person sees meanwhile."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmshell.refusals import Usage
from vmshell.shell.commands import upload
from vmshell.shell.ui.terminal import Terminal

MIB = 1 << 20


class Job:
    """The other end: takes everything, or hangs up after *patience* bytes."""

    def __init__(self, patience: int = 1 << 40) -> None:
        self._out, self.pipe = os.pipe()
        self.data = b""
        self._patience = patience
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while len(self.data) < self._patience and (got := os.read(self._out, 65536)):
            self.data += got
        os.close(self._out)

    def came(self) -> tuple[bytes, tuple[int, str]]:
        """Everything that came, until the sender closed, and what it should say of that."""
        os.close(self.pipe)
        self._thread.join(60)
        return self.data, (len(self.data), hashlib.sha256(self.data).hexdigest())


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def silent(sent: int) -> None:
    pass


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 3 * MIB + 17])
def test_a_file_is_sent_whole_and_summed(tmp_path: Path, size: int) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(size))
    job = Job()
    seen: list[int] = []
    with file.open("rb") as stream:
        assert upload.size_of(stream.fileno()) == size
        said = upload.send(job.pipe, stream.fileno(), seen.append)
    assert job.came() == (file.read_bytes(), said)
    assert said[0] == size
    assert seen == sorted(seen)
    assert seen[-1:] == ([size] if size else [])


def test_the_rest_of_a_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    with file.open("rb", buffering=0) as stream:
        stream.seek(900)
        assert upload.size_of(stream.fileno()) == 100
        stream.seek(2000)
        assert upload.size_of(stream.fileno()) == 0


@pytest.mark.slow
def test_a_pipe_is_sent_as_it_comes(pipe: tuple[int, int]) -> None:
    out, into = pipe
    job = Job()
    assert upload.size_of(out) is None
    os.set_blocking(out, False)

    def write() -> None:
        for _ in range(3):
            os.write(into, b"part")
            time.sleep(0.7)  # longer than a turn of the loop
        os.close(into)

    writer = threading.Thread(target=write)
    writer.start()
    ticks: list[int] = []
    said = upload.send(job.pipe, out, ticks.append)
    writer.join()
    assert job.came() == (b"part" * 3, said)
    assert ticks.count(4) > 1  # the meter is told while nothing comes, too


def test_a_job_that_refuses_early_ends_the_sending(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    job = Job(patience=100_000)
    with file.open("rb") as stream:
        assert upload.send(job.pipe, stream.fileno(), silent)[0] < 64 * MIB
    job.came()


def test_a_job_that_refuses_is_seen_while_standard_input_is_silent(pipe: tuple[int, int]) -> None:
    job = Job(patience=0)
    begun = time.monotonic()
    assert upload.send(job.pipe, pipe[0], silent)[0] == 0
    assert time.monotonic() - begun < 20
    job.came()


def test_an_interrupted_upload_says_nothing(pipe: tuple[int, int]) -> None:
    job = Job()
    os.write(pipe[1], b"half of it")

    def interrupt(sent: int) -> None:
        if sent:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload.send(job.pipe, pipe[0], interrupt)
    assert job.came()[0] == b"half of it"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    job = Job()
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(Usage, match="cannot be read \\(is a directory\\)"):
        upload.send(job.pipe, folder, silent)
    os.close(folder)
    assert job.came()[0] == b""


# --- what a person sees -----------------------------------------------------------------------------------------------


def terminal(*, stdin: bool = False, stderr: bool = False, kind: str = "xterm") -> Terminal:
    made = Terminal.__new__(Terminal)
    made.stdin_tty, made.stderr_tty, made.stdout_tty, made.kind, made.dumb = stdin, stderr, False, kind, kind == "dumb"
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(upload, "monotonic", lambda: now[0])
    return now


def test_a_terminal_at_standard_input_is_told_how_it_is_done() -> None:
    with pytest.raises(Usage) as caught:
        upload.check_stdin(terminal(stdin=True), "web1.kernel")
    assert caught.value.sentence() == "put reads the file from standard input"
    assert caught.value.advice() == "usage: ssh HOST put web1.kernel < FILE"
    upload.check_stdin(terminal(), "web1.kernel")


def test_a_second_passes_in_silence(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (terminal(stderr=True), terminal()):
        for total in (MIB, None):
            meter = upload.Meter(kind, total)
            clock[0] += 0.9
            meter(MIB)
            meter.clear()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_that_goes_away(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    meter = upload.Meter(terminal(stderr=True), 100 * MIB)
    clock[0] += 2
    meter(50 * MIB)
    meter(51 * MIB)  # too soon
    assert capsys.readouterr().err == "\r[##########          ] 50 %, 50M of 100M, 25M/s, 3 s left\x1b[K"
    clock[0] += 2
    meter(100 * MIB)
    meter.clear()
    assert capsys.readouterr().err == "\r[####################] 100 %, 100M of 100M, 25M/s\x1b[K\r\x1b[K"


def test_a_log_has_ten_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for kind in (terminal(), terminal(stderr=True, kind="dumb")):
        meter = upload.Meter(kind, 1000 * MIB)
        for sent in range(1, 1001):
            clock[0] += 1
            meter(sent * MIB)
        meter.clear()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 10
        assert lines[4] == "50 %, 500M of 1000M, 1M/s, 8 min left"


def test_without_a_known_end_a_line_per_ten_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    meter = upload.Meter(terminal(), None)
    for sent in range(1, 31):
        clock[0] += 1
        meter(sent * MIB)
    assert capsys.readouterr().err.splitlines() == ["1M sent, 1M/s", "11M sent, 1M/s", "21M sent, 1M/s"]


def test_a_file_that_grows_or_is_empty_breaks_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for total, sent in ((MIB, 3 * MIB), (0, 0), (0, 5), (MIB, 0)):
        meter = upload.Meter(terminal(stderr=True), total)
        clock[0] += 2
        meter(sent)
        assert "%" in capsys.readouterr().err
