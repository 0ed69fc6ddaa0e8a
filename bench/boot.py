"""P4, P5, P13: how long a VM takes to start and to be made, beside the same QEMU started by hand.

By hand means: the very argument list of the launch line, with the same descriptors, but no jail, no uid of its own, no broker
and no relay; for P4 also without `-S`, so that the guest's CPUs run from the start.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figures import Row, Terminal, broker, compared, installed, place, skipped, spread
from tests.fakes.serial import relays_side
from tests.guests import disk_image, echo_image
from tests.images import install_images
from tests.session import Session
from vmshell.broker.lifecycle import serial_port
from vmshell.launch.argv import qemu_argv
from vmshell.launch.devices import DiskPlan, NicPlan
from vmshell.launch.plan import LaunchPlan
from vmshell.layout import Layout
from vmshell.messages import Boot, Kill, New, Rm

VM = "web1"
DETACH = b"\x1dd"


# --- by hand ----------------------------------------------------------------------------------------------------------


class ByHand:
    """One QEMU without anything around it; a context manager that kills it."""

    def __init__(self, session: Session, *, image: str, memory: int, paused: bool) -> None:
        layout = session.layout
        self._folder = Path(layout.run, "by-hand")
        self._folder.mkdir()
        with contextlib.ExitStack() as stack:

            def opened(path: str, flags: int) -> int:
                fd = os.open(path, flags | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                return fd

            files = Path(layout.images, image)
            disks: tuple[DiskPlan, ...] = ()
            if (files / "disk.raw").exists():
                own = opened(f"{layout.vm_state(os.geteuid(), VM)}/disks/root", os.O_RDWR)
                base = opened(str(files / "disk.raw"), os.O_RDONLY)
                disks = (DiskPlan(layers=((own, "qcow2"), (base, "raw")), bootindex=1),)
            boot = _boot_section(files / "image.toml")
            qmp = stack.enter_context(self._listen("qmp"))
            stdin, stdout = serial_port.make(str(self._folder), stack)
            self._console = relays_side(str(self._folder))
            plan = LaunchPlan(
                number=1,
                machine="q35",
                accel="tcg",
                cpus=1,
                memory=memory,
                kernel_fd=opened(str(files / boot["kernel"]), os.O_RDONLY) if boot else None,
                initrd_fd=opened(str(files / boot["initrd"]), os.O_RDONLY) if boot else None,
                cmdline=boot.get("cmdline", ""),
                disks=disks,
                nics=(NicPlan(mac="06:00:00:00:00:01"),),
                qmp_fd=qmp.fileno(),
                info_fd=opened(os.devnull, os.O_WRONLY),  # the jail's, and here nobody's
                seccomp_fd=opened(os.devnull, os.O_RDONLY),
                file_size_max=1 << 30,
                paused=paused,
            )
            self.began = time.perf_counter()
            self._process = subprocess.Popen(
                qemu_argv(plan), pass_fds=plan.all_fds(), stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL
            )

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._console.close()
        shutil.rmtree(self._folder)

    def first(self, name: str, complete: Callable[[bytes], bool]) -> tuple[bytes, float]:
        """Read from `console` or `qmp` until *complete*; returns what came and the seconds since the start."""
        with self._console if name == "console" else self._connected(name) as sock:
            sock.settimeout(120)
            got = b""
            while not complete(got):
                data = sock.recv(1 << 16)
                if not data:
                    raise RuntimeError(f"QEMU ended after {got!r}")
                got += data
            return got, time.perf_counter() - self.began

    def _connected(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._folder / name))
        return sock

    def _listen(self, name: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(self._folder / name))
        sock.listen(1)
        return sock


def _boot_section(path: Path) -> dict[str, str]:
    import tomllib

    section: dict[str, str] = tomllib.loads(path.read_text(encoding="utf-8")).get("boot", {})
    return section


# --- P4 ---------------------------------------------------------------------------------------------------------------


def first_lines() -> list[Row]:
    """P4, for a Linux guest; and for a boot sector, where nothing but our own share is left (no aim)."""
    what = "`boot --console` to the guest's first line, against QEMU by hand"
    found = []
    with prepared("echo", 32, echo_image) as session:
        found.append(_first_line("P4", f"{what}: boot sector", session, "echo", 32, None, 11))
    try:
        with prepared("demo", 256, install_images) as session:
            found.insert(0, _first_line("P4", f"{what}: Linux", session, "demo", 256, 1.05, 7))
    except (AssertionError, subprocess.CalledProcessError) as error:
        found.insert(0, skipped("P4", what, f"the demo image cannot be built ({str(error)[:80]})"))
    return found


def _first_line(identity: str, what: str, session: Session, image: str, memory: int, most: float | None, pairs: int) -> Row:
    with ByHand(session, image=image, memory=memory, paused=False) as qemu:
        line, _ = qemu.first("console", _has_line)
    marker = line.strip().split(b"\n")[0].strip()[-30:]
    with place() as folder:
        _, starter = installed(folder)

        def ours() -> float:
            terminal = Terminal([starter, "--layout", session.layout.to_args(), "boot", VM, "--console"])
            try:
                took = terminal.until(marker)
                terminal.type(DETACH)
                terminal.end()
            finally:
                terminal.kill()
            session.ask(Kill(vm=VM))
            return took

        def by_hand() -> float:
            with ByHand(session, image=image, memory=memory, paused=False) as qemu:
                return qemu.first("console", lambda got: marker in got)[1]

        return compared(identity, what, ours, by_hand, most, pairs)


def _has_line(got: bytes) -> bool:
    return b"\n" in got.lstrip(b"\r\n")


# --- P5 ---------------------------------------------------------------------------------------------------------------


def starts() -> list[Row]:
    what = "`boot` asked until it runs, against raw QEMU to its QMP greeting"
    with prepared("echo", 32, echo_image) as session, session.client() as client:

        def ours() -> float:
            began = time.perf_counter()
            client.ask(Boot(vm=VM))
            took = time.perf_counter() - began
            client.ask(Kill(vm=VM))
            return took

        def greeting() -> float:
            with ByHand(session, image="echo", memory=32, paused=True) as qemu:
                return qemu.first("qmp", lambda got: b"\n" in got)[1]

        def by_hand_running() -> float:
            with ByHand(session, image="echo", memory=32, paused=True) as qemu:
                return _until_running(qemu)

        return [
            compared("P5", what, ours, greeting, 2.5, 15),
            compared("P5", "the same, against raw QEMU told `cont` by hand and running", ours, by_hand_running, None, 15),
        ]


def _until_running(qemu: ByHand) -> float:
    """Greeting, capabilities, cont, and the event that says that the CPUs run."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(qemu._folder / "qmp"))
        got = sock.recv(1 << 16)
        sock.send(b'{"execute":"qmp_capabilities"}\n{"execute":"cont"}\n')
        while b'"RESUME"' not in got:
            got += sock.recv(1 << 16)
        return time.perf_counter() - qemu.began


# --- P13 --------------------------------------------------------------------------------------------------------------


def new_disks() -> list[Row]:
    """A new VM from a large base must not copy it. The base is a file with a hole: only its size matters."""
    size = 10 << 30
    with broker() as session:
        disk_image(session.layout, "small", b"")
        disk_image(session.layout, "large", b"")
        disk = Path(session.layout.images, "large/disk.raw")
        disk.chmod(0o644)
        os.truncate(disk, size)
        disk.chmod(0o444)
        toml = disk.with_name("image.toml")
        toml.write_text(toml.read_text().replace(f"size = {1 << 20}", f"size = {size}"))
        took: dict[str, list[float]] = {"large": [], "small": []}
        with session.client() as client:
            for _ in range(11):
                for image, seen in took.items():
                    began = time.perf_counter()
                    client.ask(New(vm=VM, image=image, memory=32))
                    seen.append((time.perf_counter() - began) * 1000)
                    client.ask(Rm(vm=VM))
    large, small = (spread(took[name]) for name in ("large", "small"))
    worst = sorted(took["large"])[len(took["large"]) // 2]
    figure = f"{large} against {small} ms with 1 MiB"
    return [("P13", "a new VM from a base of 10 GiB", figure, math.nan, "<= 100 ms", worst <= 100)]


@contextlib.contextmanager
def prepared(image: str, memory: int, put: Callable[[Layout], None]) -> Iterator[Session]:
    """A broker with one VM of *image*, which is not running and of which nothing is new."""
    with broker() as session:
        put(session.layout)
        session.ask(New(vm=VM, image=image, memory=memory))
        session.ask(Boot(vm=VM))  # the host is looked at and the image's hash is checked once, now
        session.ask(Kill(vm=VM))
        yield session
