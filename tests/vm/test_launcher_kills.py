"""kill -9 of a session's launcher and its broker, at every moment: no VM ends, nothing is left behind, the next request works.

VMSHELL_ROUNDS (5) says how many random rounds there are, VMSHELL_SEED (9) which ones,
VMSHELL_VMS (12) how many VMs boot at once. Rows D23, C16, N8.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.consoles import Viewer
from tests.guests import READY, echo_image
from tests.session import PATIENCE, Session, descriptors_steady
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.messages import Boot, Console, Done, Info, Kill, List, New, Put, Rm, Whoami

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = int(os.environ.get("VMSHELL_ROUNDS", "5"))
SEED = int(os.environ.get("VMSHELL_SEED", "9"))
MANY = int(os.environ.get("VMSHELL_VMS", "12"))
VM = "web1"


@pytest.fixture
def sentinel() -> Iterator[None]:
    """A program of the same user that has nothing to do with VMs: it outlives everything that a session does (C16)."""
    with subprocess.Popen(["sleep", "100000"]) as process:
        yield
        assert process.poll() is None, "a session has ended somebody's other program"
        process.kill()


@pytest.fixture
def many(layout: Layout, sentinel: None) -> Iterator[Session]:
    """A session with one VM that runs, and room for many."""
    policy = Path(layout.policy)
    policy.write_text(policy.read_text() + "boots_at_once = 4\n")
    with Session(layout) as session:
        echo_image(layout)
        session.ask(New(vm=VM, image="echo", memory=16))
        session.ask(Boot(vm=VM))
        yield session
        assert session.broker is not None and session.broker.poll() is None


@pytest.fixture
def guest(many: Session) -> Iterator[Guest]:
    running = Guest(many)
    yield running
    running.close()


class Guest:
    """The guest that runs all the while: its console goes on echoing, its QEMU stays."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pid = session.ask(Info(vm=VM))["pid"]
        self._viewer = self._attached()
        self._viewer.wait_output(READY)

    def goes_on(self, word: str) -> None:
        """Type *word* and see it come back; on a new console if the last one went away with its broker."""
        until = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, AssertionError):
                self._viewer.type(word)
                self._viewer.wait_output(word, 10)
                break
            assert time.monotonic() < until, f"no console after {word}\n{self._session.errors()[-2000:]}"
            self._viewer.close()
            with contextlib.suppress(OSError, VmshellError, AssertionError):
                self._viewer = self._attached()
        assert self._session.ask(Info(vm=VM))["pid"] == self._pid
        assert os.path.exists(f"/proc/{self._pid}")

    def close(self) -> None:
        self._viewer.close()

    def _attached(self) -> Viewer:
        with self._session.client() as client:
            return Viewer(client.ask_fds(Console(vm=VM))[1])


def launcher_pids(session: Session) -> list[int]:
    """Its pid; in the moment of a start perhaps none, or the last one's beside it."""
    return session.pids("launcher")


def kill_launcher(session: Session) -> None:
    for pid in launcher_pids(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def state_of(session: Session, name: str) -> str:
    return str(next(vm["state"] for vm in session.ask(List())["vms"] if vm["name"] == name))


def nothing_is_left(session: Session, running: int = 1) -> None:
    """Of *running* VMs there are the jail and QEMU, and their run folders; of all others nothing."""
    session.wait_for(lambda: len(list(Path(session.layout.run_vms).iterdir())) == running, "the run folders to go")
    session.wait_for(lambda: len(session.qemu_pids()) == 2 * running, "two processes for each VM")
    session.wait_for(lambda: not strangers(session), "processes that nobody knows of to end")
    session.wait_for(lambda: len(launcher_pids(session)) <= 1, "one launcher")


def strangers(session: Session) -> list[int]:
    """Processes with a barrier or a disk of the session that it does not know: a jail or a QEMU that nobody would end."""
    found = []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            links = [os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")]
            if any(link.startswith((f"{session.layout.run_vms}/", f"{session.layout.vms}/")) for link in links):
                found.append(int(entry))
    return sorted({*found} - {*session.qemu_pids(), *session.pids(), os.getpid()})


class Boots:
    """VMs asked for at once, from a thread each; what became of each is heard or its connection broke."""

    def __init__(self, session: Session, names: list[str]) -> None:
        self.said: dict[str, str] = {}
        self._session = session
        self._threads = [threading.Thread(target=self._boot, args=(name,), daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def _boot(self, name: str) -> None:
        try:
            self.said[name] = str(self._session.ask(Boot(vm=name))["state"])
        except VmshellError as exc:
            self.said[name] = exc.sentence()
        except (OSError, AssertionError) as exc:
            self.said[name] = f"lost: {exc}"  # the broker was killed meanwhile

    def settled(self) -> dict[str, str]:
        """Wait for all answers and for all VMs to run or not."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        self._session.wait_for(
            lambda: {state_of(self._session, name) for name in self.said} <= {"running", "off", "failed"}, "all boots to settle"
        )
        return self.said


def names_of(session: Session, count: int) -> list[str]:
    names = [f"vm{index}" for index in range(count)]
    for name in names:
        session.ask(New(vm=name, image="echo", memory=16))
    return names


def test_killed_before_its_answer(many: Session, guest: Guest) -> None:
    """Stopped, asked, killed: the request lies in its socket, and is asked anew."""
    (name,) = names_of(many, 1)
    for turn in range(3):
        (pid,) = launcher_pids(many)
        os.kill(pid, signal.SIGSTOP)
        boots = Boots(many, [name])
        many.wait_for(lambda: state_of(many, name) == "starting", "the start")
        os.kill(pid, signal.SIGKILL)
        assert boots.settled() == {name: "running"}
        guest.goes_on(f"before{turn}")
        nothing_is_left(many, 2)
        many.ask(Kill(vm=name))
    nothing_is_left(many)


def test_killed_between_start_and_answer(many: Session, guest: Guest) -> None:
    """What it started waits at a barrier that nobody opens. It is ended, and the VM runs all the same."""
    (name,) = names_of(many, 1)
    seen = 0
    for turn in range(4):
        (pid,) = launcher_pids(many)
        boots = Boots(many, [name])
        # The moment in which it has a child and has not answered is short; whichever moment it is, the end is the same.
        until = time.monotonic() + PATIENCE
        while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) and time.monotonic() < until:
            pass
        os.kill(pid, signal.SIGKILL)
        seen += bool(children)
        assert boots.settled() == {name: "running"}, many.errors()[-2000:]
        guest.goes_on(f"between{turn}")
        nothing_is_left(many, 2)
        many.ask(Kill(vm=name))
    assert seen
    nothing_is_left(many)


def test_killed_after_its_answer(many: Session, guest: Guest) -> None:
    """The next request works, and a VM that an earlier launcher started ends without a wait for what that one would have said."""
    assert many.broker is not None
    (name,) = names_of(many, 1)
    many.ask(Boot(vm=name))
    many.ask(Kill(vm=name))
    with descriptors_steady(many.broker.pid):
        for turn in range(3):
            many.ask(Boot(vm=name))
            kill_launcher(many)
            guest.goes_on(f"after{turn}")
            many.ask(Kill(vm=name))
            nothing_is_left(many)


def test_killed_while_many_boot(many: Session, guest: Guest) -> None:
    names, rng = names_of(many, MANY), random.Random(SEED)
    boots = Boots(many, names)
    while any(state_of(many, name) in ("queued", "starting") for name in names) or len(boots.said) < MANY:
        kill_launcher(many)
        time.sleep(rng.uniform(0.1, 1.5))
    assert set(boots.settled().values()) == {"running"}, boots.said
    guest.goes_on("many")
    nothing_is_left(many, 1 + MANY)
    for name in names:
        many.ask(Kill(vm=name))
        many.ask(Rm(vm=name))
    nothing_is_left(many)


def test_an_upload_outlives_the_launcher_that_started_it(many: Session, guest: Guest) -> None:
    data = random.Random(SEED).randbytes(1 << 20)
    with uploading(many, "shelf", "one") as (part, finish):
        for start in range(0, len(data), 1 << 18):
            part(data[start : start + (1 << 18)])
            kill_launcher(many)
            guest.goes_on(f"upload{start}")
        assert finish()["size"] == len(data)
    many.put(f"{VM}.two", data)  # the next one works
    nothing_is_left(many)


@contextlib.contextmanager
def uploading(
    session: Session, where: str, name: str
) -> Iterator[tuple[Callable[[bytes], None], Callable[[], dict[str, object]]]]:
    """An upload by parts: a function that sends one, and one that ends it and returns what the broker says."""
    whole = b""
    with session.client() as client:
        _, (pipe,) = client.ask_fds(Put(vm=where, object=name, format="file"))
        with open(pipe, "wb") as stream:

            def part(data: bytes) -> None:
                nonlocal whole
                whole += data
                stream.write(data)
                stream.flush()

            def finish() -> dict[str, object]:
                stream.close()
                return client.ask(Done(put=1, bytes=len(whole), sha256=hashlib.sha256(whole).hexdigest()))

            yield part, finish


def test_launcher_and_broker_in_turn_and_at_random_under_load(many: Session, guest: Guest) -> None:
    """D23: every boot ends in running or in a clear error, and afterwards boots."""
    names, rng = names_of(many, 4), random.Random(SEED)
    for turn in range(ROUNDS):
        boots = Boots(many, names)
        for victim in rng.choices(("launcher", "broker", "both"), k=3):
            time.sleep(rng.uniform(0, 0.3))
            if victim != "broker":
                kill_launcher(many)
            if victim != "launcher":
                many.kill_broker()
                many.start_broker()
        said = boots.settled()
        assert all(text == "running" or text.startswith("lost: ") or " " in text for text in said.values()), said
        guest.goes_on(f"round{turn}")
        for name in names:
            if state_of(many, name) != "running":
                assert many.ask(Boot(vm=name))["state"] == "running"
        nothing_is_left(many, 1 + len(names))
        for name in names:
            many.ask(Kill(vm=name))
        nothing_is_left(many)
    assert many.ask(Whoami())["user"]


def test_a_session_has_no_code_that_signals_by_uid(session: Session) -> None:
    """C16: what would end all of a person's programs is not even loaded; nor may a session's launcher be asked for it."""
    code = (
        "import sys; from vmshell.launcher.main import compose\n"
        "import socket; ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
        "compose(sys.argv[1], str(theirs.detach()))\n"
        "print('vmshell.launcher.runs' in sys.modules, 'vmshell.launcher.ending' in sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    words = ["python3", "-c", code, session.layout.policy]
    done = subprocess.run(words, env={"PYTHONPATH": root, "PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
