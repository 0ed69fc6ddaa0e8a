"""A real broker in a temporary layout, for tests and benchmarks: start it, ask it, kill it, count what is left."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vmshell import wire
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout
from vmshell.messages import Done, Put, Request, Whoami
from vmshell.refusals import from_wire

PATIENCE = 120.0  # seconds; TCG guests on a shared machine


class Client:
    """One connection to the broker, speaking the wire itself (rule R12: nothing but the socket is trusted)."""

    def __init__(self, layout: Layout, timeout: float = PATIENCE) -> None:
        self.sock = wire.connect(layout.broker_socket, timeout)
        self.progress: list[str] = []
        self._id = 0

    def send(self, request: Request) -> int:
        self._id += 1
        wire.send(self.sock, {"id": self._id, **request.to_body()})
        return self._id

    def receive(self) -> tuple[dict[str, Any], tuple[int, ...]]:
        """The next answer and its descriptors; raises what the broker refused with."""
        while True:
            packet = wire.recv(self.sock, fds_allowed=2)
            assert packet is not None, "the broker closed the connection"
            if "progress" in packet.body:
                self.progress.append(str(packet.body["progress"]))
                continue
            if "error" in packet.body:
                raise from_wire(packet.body["error"])
            ok: Any = packet.body["ok"]
            return ok, wire.take_fds(packet)

    def ask(self, request: Request) -> dict[str, Any]:
        self.send(request)
        ok, fds = self.receive()
        for fd in fds:
            os.close(fd)
        return ok

    def ask_fds(self, request: Request) -> tuple[dict[str, Any], tuple[int, ...]]:
        self.send(request)
        return self.receive()

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """`with Session(layout) as session:` runs a broker; at the end nothing of it may be left."""

    def __init__(self, layout: Layout, *wrap: str) -> None:
        """*wrap*: words before the broker's command, for one that is to see another host."""
        self.layout = layout
        self.wrap = wrap
        self.broker: subprocess.Popen[bytes] | None = None
        self.front: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Session:
        if not self.layout.embedded:
            self.front = self._start("front")
        self.start_broker()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self, name: str, *wrap: str) -> subprocess.Popen[bytes]:
        os.makedirs(self.layout.run, exist_ok=True)
        with open(f"{self.layout.run}/{name}.err", "ab") as errors:
            return subprocess.Popen(
                [*wrap, sys.executable, "-IS", f"{PACKAGE_DIR}/__main__.py", name, self.layout.to_args()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )

    def start_broker(self) -> None:
        self.broker = self._start("broker", *self.wrap)
        self.wait_for(lambda: self._answers(), "the broker to answer", 60)

    def _answers(self) -> bool:
        assert self.broker is not None
        if self.broker.poll() is not None:
            raise AssertionError(f"the broker ended: {self.errors()[-2000:]}")
        try:
            # A whole answer: for a moment a child of a killed broker may still hold the old socket, and connecting works.
            with self.client(1) as client:
                client.ask(Whoami())
        except (OSError, AssertionError):
            return False
        return True

    def errors(self) -> str:
        """What broker and relay wrote for the administrator."""
        names = ("broker.err", "front.err", "relay.err", "launcher.err")
        return "".join(
            Path(self.layout.run, name).read_text("utf-8", "replace") for name in names if Path(self.layout.run, name).exists()
        )

    def client(self, timeout: float = PATIENCE) -> Client:
        return Client(self.layout, timeout)

    def ask(self, request: Request) -> dict[str, Any]:
        with self.client() as client:
            return client.ask(request)

    def put(self, ref: str, data: bytes, format: str = "file", **said: Any) -> dict[str, Any]:
        """Bring *data* in as the object *ref* (`web1.kernel`, `shelf.x`); *said*: what `done` says otherwise than is so."""
        where, _, name = ref.partition(".")
        with self.client() as client:
            _, (pipe,) = client.ask_fds(Put(vm=where, object=name, format=format))
            with open(pipe, "wb", buffering=0) as stream, contextlib.suppress(BrokenPipeError):
                # Refused before the end: the answer says why.
                view = memoryview(data)
                while view:
                    view = view[stream.write(view) :]
            truth = {"put": 1, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            return client.ask(Done(**{**truth, **said}))

    def kill_broker(self) -> None:
        assert self.broker is not None
        self.broker.kill()
        self.broker.wait()

    def pids(self, word: str = "") -> list[int]:
        """Every process of this session: ours by the layout in its arguments (the launcher by the policy), QEMU and its jail
        by the broker's records."""
        layout, policy = self.layout.to_args(), self.layout.policy
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal():
                with contextlib.suppress(OSError):
                    arguments = Path("/proc", entry, "cmdline").read_bytes().decode(errors="replace").split("\0")
                    if policy in arguments and f"{PACKAGE_DIR}/launcher/__main__.py" in arguments:
                        arguments += [layout, "launcher"]
                    if layout in arguments and word in arguments:
                        found.append(int(entry))
        return found

    def holders(self) -> list[int]:
        """Processes other than this one that have a file of the run directory open, gone or not."""
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdecimal() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    links = [os.readlink(f"/proc/{entry}/fd/{fd}") for fd in os.listdir(f"/proc/{entry}/fd")]
                    if any(link.startswith(f"{self.layout.run_vms}/") for link in links):
                        found.append(int(entry))
        return found

    def relay_pid(self) -> int:
        (pid,) = self.pids("relay")
        return pid

    def qemu_pids(self) -> list[int]:
        """The QEMUs that the records name and that are alive."""
        import json

        pids = []
        for path in Path(self.layout.run_vms).glob("*/run.json"):
            run = json.loads(path.read_text())
            pids += [pid for pid in (run["qemu_pid"], run["pid"]) if pid and os.path.exists(f"/proc/{pid}")]
        return pids

    def wait_for(self, done: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
        """Poll until *done*; an AssertionError naming *what* after *seconds*."""
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, f"waited {seconds} s for {what}\n{self.errors()[-3000:]}"
            time.sleep(0.02)

    def stop(self) -> None:
        """End everything: QEMUs, broker, relay; by the pids we know to be ours."""
        qemus = self.qemu_pids()
        for pid in [*self.pids("front"), *self.pids("broker"), *self.pids("launcher"), *qemus, *self.pids("relay")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in (self.broker, self.front):
            if process is not None:
                process.wait()
        # A jail that was started and not written down yet: the next broker would find it, and there is none.
        for pid in self.holders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait_for(lambda: not self.pids() and not any(_alive(pid) for pid in qemus), "every process to end", 60)


def _alive(pid: int) -> bool:
    try:
        state = Path("/proc", str(pid), "stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"


@contextlib.contextmanager
def descriptors_steady(pid: int, slack: int = 2) -> Iterator[None]:
    """Fail if process *pid* holds more descriptors afterwards than before."""
    before = len(os.listdir(f"/proc/{pid}/fd"))
    yield
    until = time.monotonic() + 60
    while len(os.listdir(f"/proc/{pid}/fd")) > before + slack:
        assert time.monotonic() < until, f"{before} descriptors before, {len(os.listdir(f'/proc/{pid}/fd'))} now"
        time.sleep(0.05)
