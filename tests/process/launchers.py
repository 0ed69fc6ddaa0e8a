"""A real launcher process, root with the rights that its unit leaves it, for a broker of another uid; and a plan with every
device, its descriptors real.

Nothing here meets another run of these tests, or a VM of this machine: each launcher has a range of uids of its own, and what is
left in it at the end is killed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.process.relays import _STARTER as STARTER
from tests.process.relays import PATIENCE, until
from vmshell import wire
from vmshell.broker.lifecycle import serial_port
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.launcher.uids import processes
from vmshell.layout import Layout
from vmshell.numbering import JOBS_MAX, NUMBER_MAX, tap_name, uids_of_jobs

BROKER = 64_901  # the uid of the account `vmshell-broker` for those launchers
SOMEBODY = 64_902
BASES = range(100_000_000, 2_000_000_000, 20_000_000)  # away from the default, which this machine's own VMs may have
RIGHTS = ("setpriv", "--bounding-set=-all,+setuid,+setgid,+setpcap", "--inh-caps=-all", "--no-new-privs", "--")
# The account of the broker, and the folder by which a service manager is known, seen by the launcher alone; its pid stays.
_ACCOUNT = 'mount --bind "$0" /etc/passwd && exec "$@"'
_MANAGED = f"mount -t tmpfs none /run && mkdir -p /run/systemd/system && {_ACCOUNT}"
_COUNTER = itertools.count()

Answer = dict[str, Any]


class Launcher:
    """The process, and the broker's connection to it; a context manager that ends all processes of its uids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = {name: str(folder / name) for name in ("etc", "state", "run", "log")}
        self.layout = Layout(**parts, embedded=False)
        for path in (self.layout.etc, self.layout.run):
            os.makedirs(path, exist_ok=True)
        self.accounts = folder / "passwd"
        self.accounts.write_text(Path("/etc/passwd").read_text("utf-8") + f"vmshell-broker:x:{BROKER}:{BROKER}::/:/bin/false\n")
        self.accounts.chmod(0o644)
        self.use(BASES[(os.getpid() * 7 + next(_COUNTER)) % len(BASES)])
        self.listener = wire.listen(self.layout.launcher_socket, 0o600)  # as the service manager's, which outlives the process
        self._ids = itertools.count(1)
        self.events: list[Answer] = []

    def use(self, base: int) -> None:
        """Have the uids that begin with *base*."""
        self.base = base
        self.uids = range(base, base + NUMBER_MAX + 1 + JOBS_MAX)
        self.jobs = uids_of_jobs(base)
        self.set_policy("")

    def set_policy(self, text: str) -> None:
        """Write root's policy, as an editor does that exchanges the file."""
        new = Path(f"{self.layout.policy}.new")
        new.write_text(f"[host]\nuid_base = {self.base}\n{text}", encoding="utf-8")
        new.rename(self.layout.policy)

    def start(self) -> Launcher:
        """Start the process and connect as the broker."""
        self.spawn()
        self.broker = self.connect()
        return self

    def spawn(self, *, managed: bool = False) -> None:
        """Start the process; *managed*: as if under a service manager, whose control groups tell who started what."""
        code = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/launcher/__main__.py", self.layout.policy]
        with open(self.folder / "journal", "ab") as journal:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-IS", "-c", STARTER, "launcher", str(self.listener.fileno())),
                    *(
                        "/usr/bin/unshare",
                        "-m",
                        "sh",
                        "-c",
                        _MANAGED if managed else _ACCOUNT,
                        str(self.accounts),
                        *RIGHTS,
                        *code,
                    ),
                ],
                pass_fds=(self.listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
            )

    def not_started(self, *, managed: bool = False) -> str:
        """The one sentence with which the process refuses to start."""
        before = len(self.journal())
        self.spawn(managed=managed)
        assert self.process.wait(PATIENCE) == 1
        (line,) = self.journal()[before:].splitlines()
        return line

    def connect(self, uid: int = BROKER) -> wire.Socket:
        """A connection that *uid* makes: the kernel remembers who connected."""
        os.chown(self.layout.launcher_socket, uid, -1)
        os.seteuid(uid)
        try:
            return wire.connect(self.layout.launcher_socket, PATIENCE)
        finally:
            os.seteuid(0)

    def journal(self) -> str:
        path = self.folder / "journal"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    # --- requests -----------------------------------------------------------------------------------------------------

    def ask(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> tuple[Answer, int]:
        """The answer to *body* and its descriptor (-1: none); events that come before it are kept."""
        ident = next(self._ids)
        wire.send(self.broker, {"id": ident, **body}, fds)
        while True:
            answer, fd = self.receive()
            if answer.get("verb") == "ended":
                self.events.append(answer)
                continue
            assert answer["id"] == ident
            return answer, fd

    def receive(self) -> tuple[Answer, int]:
        packet = wire.recv(self.broker, fds_allowed=1)
        assert packet is not None, f"the launcher has closed the connection: {self.journal()[-2000:]}"
        return packet.body, packet.take_fd() if packet.fds else -1

    def refused(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> str:
        """The sentence with which *body* is refused; it stands in the journal, too."""
        answer, fd = self.ask(body, fds)
        assert fd == -1 and "error" in answer, (body, answer)
        text: str = answer["error"]["text"]
        assert "\n" not in text and len(text) < 400, text
        assert text[:300] in self.journal(), text
        return text

    def started(self, body: dict[str, Any], fds: tuple[int, ...]) -> tuple[int, int]:
        """Pid and pidfd of what *body* starts."""
        answer, fd = self.ask(body, fds)
        assert "ok" in answer and fd >= 0, answer
        return answer["ok"]["pid"], fd

    def signal(self, number: int, word: str = "kill") -> None:
        answer, fd = self.ask({"verb": "signal", "number": number, "signal": word})
        assert answer["ok"] == {} and fd == -1

    def end(self, number: int) -> None:
        """Kill VM *number* and wait until nothing of its uid is left."""
        self.signal(number)
        # What was only just started is still root's.
        until(lambda: not self.of(self.base + number) and 0 not in self.children().values(), f"the end of VM {number}")

    # --- what there is ------------------------------------------------------------------------------------------------

    def of(self, uid: int) -> list[int]:
        """The processes of *uid* that have not ended."""
        return processes_of(uid)

    def running(self) -> list[tuple[int, int]]:
        """Pid and uid of every process in the launcher's range."""
        return [(pid, uid) for pid, uid in processes(self.uids) if not _ended(pid)]

    def children(self) -> dict[int, int]:
        """Every descendant of the launcher: the pid and its real uid."""
        found: dict[int, int] = {}
        waiting = [self.process.pid]
        while waiting:
            pid = waiting.pop()
            with contextlib.suppress(OSError):
                for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                    if not _ended(int(child)):
                        found[int(child)] = status(int(child), "Uid")[0]
                        waiting.append(int(child))
        return found

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    # --- its end ------------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.broker.close()
        self.process.kill()
        self.process.wait(PATIENCE)

    def __enter__(self) -> Launcher:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.listener.close()
        until(self._killed, "the end of all processes of its uids")

    def _killed(self) -> bool:
        left = self.running()
        for pid, _ in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left


def status(pid: int, name: str, base: int = 10) -> list[int]:
    """The numbers in the line *name* of /proc/PID/status."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return [int(word, base) for word in line.split()[1:]]


def processes_of(uid: int) -> list[int]:
    """The processes of *uid* that have not ended."""
    return [pid for pid, _ in processes(range(uid, uid + 1)) if not _ended(pid)]


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True


# --- a plan with everything -------------------------------------------------------------------------------------------

_OPEN_TAP = """
import fcntl, os, socket, struct, sys
fd = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), int(sys.argv[2])))
socket.send_fds(socket.socket(fileno=0), [b"t"], [fd])
"""
TAP, TUN = 0x0002 | 0x1000 | 0x4000, 0x0001 | 0x1000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR; IFF_TUN


def tap(name: str, flags: int = TAP) -> int:
    """The descriptor of an interface *name* in a network namespace of its own, which lives as long as it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        opener = [sys.executable, "-IS", "-c", _OPEN_TAP, name, str(flags)]
        subprocess.run(["unshare", "-n", *opener], stdin=theirs.fileno(), check=True)
        return socket.recv_fds(ours, 1, 1)[1][0]


class Lent:
    """A plan and its descriptors, in the order of their numbers, the last three QEMU's 0, 1 and 2. All closes with `close`."""

    def __init__(self, folder: Path, owner: int = BROKER) -> None:
        self.folder = folder / f"lent{next(_COUNTER)}"
        self.folder.mkdir()
        self.owner = owner
        self.stack = contextlib.ExitStack()
        self.fds: list[int] = []
        self._names = itertools.count()
        reader, writer = os.pipe()
        self.errors = writer
        self.said = reader
        self.stack.callback(os.close, reader)
        self.stack.callback(os.close, writer)
        self.console = serial_port.make(str(self.folder), self.stack)

    def file(self, flags: int, *, mode: int = 0o600, owner: int = -1, size: int = 1 << 20) -> int:
        """A descriptor of a new file of *owner*'s, or of the broker's."""
        path = self.folder / f"file{next(self._names)}"
        path.touch()
        os.truncate(path, size)
        fd = self.keep(os.open(path, flags))
        os.chown(path, *([self.owner if owner < 0 else owner] * 2))
        os.chmod(path, mode)
        return fd

    def listener(self, backlog: int = 1) -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"{self.folder}/s{next(self._names)}")
            sock.listen(backlog)
            return self.keep(sock.detach())

    def stream(self) -> int:
        ours, theirs = socket.socketpair()
        self.keep(theirs.detach())
        return self.keep(ours.detach())

    def barrier(self) -> int:
        """A start barrier; a byte into `gate` opens it."""
        path = self.folder / f"fifo{next(self._names)}"
        os.mkfifo(path)
        self.gate = self.keep(os.open(path, os.O_RDWR))
        return self.gate

    def keep(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd

    def add(self, fd: int) -> int:
        """Lend *fd*; returns the number that QEMU will see."""
        self.fds.append(fd)
        return len(self.fds) + 2

    def request(self, number: int, plan: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        return {"verb": "launch", "number": number, "plan": plan}, (*self.fds, *self.console, self.errors)

    def close(self) -> None:
        self.stack.close()

    def __enter__(self) -> Lent:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def small_plan(lent: Lent) -> dict[str, Any]:
    """The least that a launch takes."""
    return {
        "accel": "tcg",
        "cpus": 1,
        "memory": 16,
        "qmp_fd": lent.add(lent.listener()),
        "block_fd": lent.add(lent.barrier()),
        "file_size_max": 1 << 30,
    }


def full_plan(lent: Lent, number: int) -> dict[str, Any]:
    """Every device and every kind of descriptor that there is."""

    def layers(count: int, *, readonly: bool = False) -> list[list[Any]]:
        flags = os.O_RDONLY if readonly else os.O_RDWR
        upper = [[lent.add(lent.file(flags if not depth else os.O_RDONLY)), "qcow2"] for depth in range(count - 1)]
        return [*upper, [lent.add(lent.file(flags if count == 1 else os.O_RDONLY)), "raw"]]

    return {
        **small_plan(lent),
        "kernel_fd": lent.add(lent.file(os.O_RDONLY)),
        "initrd_fd": lent.add(lent.file(os.O_RDONLY)),
        "cmdline": "console=ttyS0",
        "option_rom_fds": [lent.add(lent.file(os.O_RDONLY)) for _ in range(2)],
        "firmware": [lent.add(lent.file(os.O_RDONLY)), lent.add(lent.file(os.O_RDWR))],
        "agent_fd": lent.add(lent.listener()),
        "display": "vnc",
        "video": "std",
        "keymap": "de",
        "tablet": True,
        "cpu_model": "qemu64,svm=off",
        "disks": [
            {"layers": layers(1), "bootindex": 1},
            {"layers": layers(2), "bus": "sata"},
            {"layers": layers(3), "bus": "scsi"},
            {"layers": layers(2, readonly=True), "bus": "usb", "readonly": True},
            {"layers": layers(1, readonly=True), "kind": "cdrom", "bus": "sata"},
            {"layers": [], "kind": "cdrom", "bus": "sata"},
            {"layers": layers(1), "kind": "floppy", "bus": "fdc"},
        ],
        "nics": [
            {"mac": "06:00:00:00:00:01", "tap_fd": lent.add(lent.keep(tap(tap_name(number, 0))))},
            {"mac": "06:00:00:00:00:02", "stream_fd": lent.add(lent.stream()), "model": "e1000"},
            {"mac": "06:00:00:00:00:03", "forwards": [["tcp", 2222, 22]], "bootindex": 2},
            {"mac": "06:00:00:00:00:04", "connected": False},
        ],
    }


# --- jobs -------------------------------------------------------------------------------------------------------------


def begun(pid: int) -> None:
    """Wait until the job is our own program, and no longer setpriv on its way there."""
    until(lambda: "python" in os.path.basename(os.readlink(f"/proc/{pid}/exe")), "the job to begin")


@contextlib.contextmanager
def uploads(launcher: Launcher, lent: Lent, count: int) -> Iterator[dict[int, int]]:
    """So many jobs that wait for a user's bytes: the pid of each and its uid."""
    with contextlib.ExitStack() as stack:
        found: dict[int, int] = {}
        for _ in range(count):
            out, into = os.pipe()
            stack.callback(os.close, into)
            file = lent.file(os.O_RDWR, size=0)
            request = {"verb": "job", "kind": "storage", "words": ["put", "file", "1048576"]}
            pid, pidfd = launcher.started(request, (file, out, lent.errors))
            os.close(out)
            os.close(pidfd)
            begun(pid)
            found[pid] = status(pid, "Uid")[0]
        yield found
    until(lambda: not any(map(processes_of, found.values())), "the jobs to end")
