"""Uploads through a real broker and its real jobs: what came and what was said must agree; whatever breaks off leaves nothing.

Issue 10, N2: no request brings a descriptor; `put` replies with the writing end of a pipe.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.shell import run, starter
from tests.session import Client, Session, descriptors_steady
from vmshell import wire
from vmshell.errors import VmshellError
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout
from vmshell.messages import Define, DiskAdd, Done, Drop, Objects, Put, Rm, Whoami

pytestmark = pytest.mark.slow

MIB = 1 << 20
OLD = "3e16c38"  # the last version whose shells send descriptors


@pytest.fixture(autouse=True)
def policy(layout: Layout) -> None:
    with open(layout.policy, "a", encoding="utf-8") as file:
        file.write("[defaults]\nuser_disk = '8M'\ndisk_size_max = '8M'\n")


class Sender:
    """An upload under way on a connection of its own; `put` is its request's number."""

    def __init__(self, session: Session, name: str = "x", vm: str = "shelf") -> None:
        self.client: Client = session.client()
        _, (self.pipe,) = self.client.ask_fds(Put(vm=vm, object=name, format="file"))
        self.put = 1
        self.sent = b""

    def send(self, data: bytes) -> None:
        os.write(self.pipe, data)
        self.sent += data

    def done(self, **otherwise: Any) -> dict[str, Any]:
        """Close the pipe and say what was sent, or something else."""
        self.close_pipe()
        truth = {"put": self.put, "bytes": len(self.sent), "sha256": hashlib.sha256(self.sent).hexdigest()}
        return self.client.ask(Done(**{**truth, **otherwise}))

    def close_pipe(self) -> None:
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def leave(self) -> None:
        self.client.close()

    def wait_hung_up(self) -> None:
        """Until nobody reads the pipe any more."""
        poll = select.poll()
        poll.register(self.pipe, 0)
        assert poll.poll(60_000), "the job still reads"


def objects(session: Session, where: str = "shelf") -> list[str]:
    return [row["name"] for row in session.ask(Objects(vm=where))["objects"]]


def files(session: Session) -> list[str]:
    """Of one's shelf, half-made ones too."""
    return sorted(path.name for path in Path(session.layout.state, "shelf").glob("*/*/*") if path.name != "objects.json")


def refusal(sender: Sender, **otherwise: Any) -> str:
    with pytest.raises(VmshellError) as caught:
        sender.done(**otherwise)
    assert caught.value.code == "upload-refused" and caught.value.advice() == "nothing was changed"
    return caught.value.sentence()


def test_what_came_and_what_was_said_agree(session: Session) -> None:
    assert session.broker is not None
    with descriptors_steady(session.broker.pid):
        sender = Sender(session)
        sender.send(b"hello")
        assert not objects(session)
        assert sender.done() == {"name": "shelf", "object": "x", "size": 5, "format": "file"}
        assert objects(session) == ["x"]
        sender.leave()
    (path,) = Path(session.layout.state, "shelf").glob("*/*/x")
    assert path.read_bytes() == b"hello"


def test_done_may_come_before_the_end_of_the_bytes(session: Session) -> None:
    """Somebody else still holds the pipe: the broker waits for both, in either order."""
    sender = Sender(session)
    other = os.dup(sender.pipe)
    sender.send(b"hel")
    sender.close_pipe()
    sender.client.send(Done(put=1, bytes=5, sha256=hashlib.sha256(b"hello").hexdigest()))
    assert not select.select([sender.client.sock], [], [], 0.5)[0]
    os.write(other, b"lo")
    os.close(other)
    assert sender.client.receive()[0]["size"] == 5


@pytest.mark.parametrize("said", [{"bytes": 4}, {"bytes": 6}, {"sha256": "0" * 64}, {"bytes": 0}])
def test_anything_else_is_an_upload_that_broke_off(session: Session, said: dict[str, object]) -> None:
    sender = Sender(session)
    sender.send(b"hello")
    assert refusal(sender, **said) == "shelf.x was not taken: what came is not what was sent"
    assert files(session) == []
    assert session.put("shelf.x", b"again")["size"] == 5, "its name and its owner's turn are free"


def test_a_connection_that_ends_before_done_gives_it_up(session: Session) -> None:
    for way in ("at once", "in the middle", "after all of it", "and the pipe stays"):
        sender = Sender(session)
        if way != "at once":
            sender.send(b"hello")
        if way == "after all of it":
            sender.close_pipe()
            time.sleep(0.5)
        sender.leave()
        if way == "and the pipe stays":
            sender.wait_hung_up()
        sender.close_pipe()
        session.wait_for(lambda: files(session) == [], f"nothing to be left of it ({way})", 60)
        assert session.put("shelf.y", b"mine", "file")["size"] == 4
        session.ask(Drop(vm="shelf", object="y"))


def test_done_is_said_once(session: Session) -> None:
    sender = Sender(session)
    other = os.dup(sender.pipe)
    sender.send(b"hello")
    sender.close_pipe()
    said = Done(put=1, bytes=5, sha256=hashlib.sha256(b"hello").hexdigest())
    sender.client.send(said)
    with pytest.raises(VmshellError, match="its end was said before"):
        sender.client.ask(said)  # the answer to the second comes first: the first still waits for the bytes' end
    os.close(other)
    assert sender.client.receive()[0]["size"] == 5
    with pytest.raises(VmshellError, match="its end was said before"):
        sender.client.ask(said)
    assert objects(session) == ["x"]


def test_done_is_for_ones_own(session: Session) -> None:
    sender = Sender(session)
    sender.send(b"hello")
    with session.client() as other, pytest.raises(VmshellError, match="no upload was begun here as request 1"):
        other.ask(Done(put=1, bytes=5, sha256=hashlib.sha256(b"hello").hexdigest()))
    assert "no upload was begun here as request 7" in refusal(sender, put=7)
    assert sender.done()["size"] == 5


def test_one_upload_at_a_time(session: Session) -> None:
    sender = Sender(session)
    sender.send(b"hello")
    for client in (sender.client, session.client()):
        with pytest.raises(VmshellError, match="you have 2 uploads open and the limit is 1"):
            client.ask(Put(vm="shelf", object="y", format="file"))
    assert sender.done()["size"] == 5
    sender.client.ask_fds(Put(vm="shelf", object="y", format="file"))


def test_a_refusal_of_the_jobs_is_the_answer(session: Session) -> None:
    """C07: it hangs up at the limit, and `done` says why."""
    sender = Sender(session)
    with pytest.raises(BrokenPipeError):
        while True:
            sender.send(bytes(MIB))
    assert "at most 8388608 are allowed here" in refusal(sender)
    sender = Sender(session)
    assert refusal(sender) == "shelf.x was not taken: it is empty"


def test_what_has_come_counts_while_it_comes(session: Session) -> None:
    def used() -> int:
        return int(session.ask(Whoami())["used"]["disk"])

    sender = Sender(session)
    sender.send(bytes(5 * MIB))
    session.wait_for(lambda: used() == 5, "what has come to count", 60)
    with pytest.raises(VmshellError, match="disk in all"):
        session.ask(DiskAdd(vm="shelf", object="mine", size=4))
    session.ask(DiskAdd(vm="shelf", object="mine", size=3))
    sender.send(b"x")
    sender.wait_hung_up()
    with pytest.raises(VmshellError, match="disk in all") as caught:
        sender.done()
    assert caught.value.code == "over-limit"
    assert used() == 3 and files(session) == ["mine"]


def test_an_upload_into_a_vm_that_is_removed_ends(session: Session) -> None:
    session.ask(Define(vm="web1", text="", new=True))
    sender = Sender(session, vm="web1")
    sender.send(b"hello")
    session.ask(Rm(vm="web1"))
    sender.wait_hung_up()
    assert refusal(sender) == "web1.x was not taken: its VM was deleted meanwhile"


def test_a_broker_that_is_killed_ends_its_uploads(session: Session) -> None:
    sender = Sender(session)
    sender.send(b"hello")
    session.kill_broker()
    sender.wait_hung_up()
    session.start_broker()
    assert files(session) == []
    sender.leave()


def test_whatever_is_done_to_the_pipe_is_its_senders_trouble(session: Session) -> None:
    """N1: grown, shrunk, made packets of, filled by splice."""
    sender = Sender(session)
    for size in (1 << 20, 4096):
        fcntl.fcntl(sender.pipe, fcntl.F_SETPIPE_SZ, size)
    fcntl.fcntl(sender.pipe, fcntl.F_SETFL, os.O_DIRECT | os.O_ASYNC)
    for _ in range(100):
        sender.send(b"a packet")
    memory = os.memfd_create("spliced")
    os.write(memory, b"s" * 1000)
    os.lseek(memory, 0, os.SEEK_SET)
    assert os.splice(memory, sender.pipe, 1000) == 1000
    sender.sent += b"s" * 1000
    assert sender.done()["size"] == 1800


def test_two_hundred_uploads_that_break_off_leave_nothing(session: Session) -> None:
    assert session.broker is not None
    with descriptors_steady(session.broker.pid):
        for number in range(200):
            sender = Sender(session)
            if number % 3:
                sender.send(b"hello")
            if number % 2:
                sender.close_pipe()
            sender.leave()
            sender.close_pipe()
        session.wait_for(lambda: files(session) == [], "nothing to be left", 60)
    assert session.put("shelf.x", b"fine")["size"] == 4
    assert "unexpected" not in session.errors()


# --- the shell --------------------------------------------------------------------------------------------------------


def test_the_shell_puts(session: Session, short_tmp: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    done = run(short_tmp, session.layout, "put", "shelf.x", input=data)
    assert (done.returncode, done.stdout) == (0, b"shelf.x: 3M file\n"), done.stderr
    (path,) = Path(session.layout.state, "shelf").glob("*/*/x")
    assert path.read_bytes() == data
    again = run(short_tmp, session.layout, "put", "shelf.x", input=data)
    assert again.returncode == 4 and b"shelf already has x" in again.stderr
    large = run(short_tmp, session.layout, "put", "shelf.y", input=bytes(20 * MIB))
    assert large.returncode == 1 and b"are allowed here" in large.stderr


def test_a_shell_that_is_killed_leaves_nothing(session: Session, short_tmp: Path) -> None:
    command = [starter(short_tmp), "--layout", session.layout.to_args(), "put", "shelf.x"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(b"half of it")
        child.stdin.flush()
        session.wait_for(lambda: files(session) != [], "the upload to begin", 60)
        child.kill()
    session.wait_for(lambda: files(session) == [], "nothing to be left", 60)


# --- shells of before -------------------------------------------------------------------------------------------------


@pytest.fixture
def old_shell(session: Session, short_tmp: Path) -> Any:
    """Run the shell as it was before the pipes, logged in while the broker was upgraded."""
    repository = Path(PACKAGE_DIR).parent
    archive = subprocess.run(["git", "-C", str(repository), "archive", OLD, "vmshell"], capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"the history does not reach back to {OLD}")
    folder = short_tmp / "old"
    folder.mkdir()
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)

    def ask(*words: str, given: bytes = b"") -> Any:
        shell = ["/usr/bin/python3", "-IS", f"{folder}/vmshell/__main__.py", "shell", "--layout", session.layout.to_args()]
        return subprocess.run([*shell, *words], input=given, capture_output=True, timeout=120, check=False)

    return ask


def test_an_old_shell_is_told_to_log_in_again(session: Session, old_shell: Any) -> None:
    session.ask(Define(vm="web1", text="", new=True))
    assert b"web1" in old_shell("list").stdout, "what has not changed goes on"
    for words in (("console", "web1"), ("boot", "web1", "--console"), ("boot", "web1", "--wait", "x"), ("put", "shelf.x")):
        done = old_shell(*words, given=bytes(100_000))
        assert (done.returncode, done.stdout) == (1, b""), words
        assert b"vmshell: vmshell was upgraded: log in again\n" in done.stderr, words
    assert files(session) == []


def test_a_request_with_a_descriptor_is_never_looked_at(session: Session) -> None:
    """N2: whatever the request; one of before is told why."""
    for body in ({"verb": "put", "vm": "shelf", "object": "x", "format": "file"}, {"verb": "whoami"}):
        sock = wire.connect(session.layout.broker_socket, 60)
        with sock, open(os.devnull, "rb") as file:
            wire.send(sock, {"id": 1, **body}, (file.fileno(),))
            packet = wire.recv(sock)
            assert packet is not None and packet.body["id"] == 0
            assert packet.body["error"]["code"] == "upgraded"  # type: ignore[index]
            assert wire.recv(sock) is None
