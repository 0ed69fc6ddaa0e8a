"""Start a launch plan by hand, as broker and launcher do: FIFOs, sockets, filter; nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes.serial import SerialPort, relays_side
from vmshell.broker.lifecycle import serial_port
from vmshell.launch import jail, seccomp
from vmshell.launch.devices import DiskPlan
from vmshell.launch.plan import LaunchPlan

PATIENCE = 60.0


class Jailed:
    """One jailed QEMU (or what stands in its place), with its monitor and its console; a context manager that kills it."""

    def __init__(
        self,
        folder: Path,
        *,
        uid: int | None,
        disks: tuple[tuple[Path, str, Path | None], ...] = (),
        kernel: Path | None = None,
        initrd: Path | None = None,
        change: Callable[[list[str]], list[str]] = list,
        qemu: str = "/usr/bin/qemu-system-x86_64",
        prefix: tuple[str, ...] = (),
        more: Callable[[Jailed], dict[str, Any]] | None = None,
        **values: Any,
    ) -> None:
        """*disks*: (path, format, raw base or None), on virtio, the boot order theirs. *more* opens and lends what else it
        wants (`open`, `listen`) and returns more values of the plan."""
        self.folder = folder
        self.given: dict[int, str] = {}  # descriptor → what /proc says of it
        self._opened: list[int] = []

        def disk(index: int, path: Path, format: str, base: Path | None) -> DiskPlan:
            below = ((self.open(base, os.O_RDONLY), "raw"),) if base else ()
            return DiskPlan(layers=((self.open(path), format), *below), bootindex=index + 1)

        try:
            values |= more(self) if more else {}
            values.setdefault("disks", tuple(disk(index, *words) for index, words in enumerate(disks)))
            info, info_writer = os.pipe()
            self.info = info
            filter_fd = os.memfd_create("filter")
            os.write(filter_fd, seccomp.program())
            os.lseek(filter_fd, 0, os.SEEK_SET)
            self.plan = LaunchPlan(
                number=7,
                accel="tcg",
                cpus=values.pop("cpus", 1),
                memory=values.pop("memory", 32),
                qmp_fd=self.listen("qmp"),
                info_fd=info_writer,
                seccomp_fd=filter_fd,
                kernel_fd=self.open(kernel, os.O_RDONLY) if kernel else None,
                initrd_fd=self.open(initrd, os.O_RDONLY) if initrd else None,
                uid=uid,
                gid=uid,
                file_size_max=1 << 30,
                **values,
            )
            words = change(jail.command(self.plan, qemu=qemu))
            with contextlib.ExitStack() as stack:
                stdin, stdout = serial_port.make(str(folder), stack)
                self.process = subprocess.Popen(
                    [*prefix, *words],
                    stdin=stdin,
                    stdout=stdout,
                    stderr=subprocess.PIPE,
                    pass_fds=self.plan.all_fds(),
                    env={"SECRET": "of the broker", "PATH": os.environ["PATH"]},
                )
            self.console = relays_side(str(folder))
            self._opened += [info_writer, filter_fd]
        finally:
            for fd in self._opened:
                os.close(fd)

    def open(self, path: Path, flags: int = os.O_RDWR) -> int:
        return self._lend(os.open(path, flags))

    def listen(self, name: str) -> int:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self.folder}/{name}.sock")
            listener.listen(1)
            return self._lend(listener.detach())

    def _lend(self, fd: int) -> int:
        self._opened.append(fd)
        self.given[fd] = os.readlink(f"/proc/self/fd/{fd}")
        return fd

    def __enter__(self) -> Jailed:
        return self

    def __exit__(self, *_: object) -> None:
        pid = self._pid_if_there()
        if pid:
            os.kill(pid, signal.SIGKILL)
        if self.process.poll() is None and not pid:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE)
        self.console.close()
        os.close(self.info)
        assert not pid or not os.path.exists(f"/proc/{pid}")

    def _pid_if_there(self) -> int:
        if self.process.poll() is not None:
            return 0
        return self.pid

    @property
    def pid(self) -> int:
        """The jailed process's number as this host sees it, from bwrap's --info-fd."""
        if not hasattr(self, "_pid"):
            text = b""
            while data := os.read(self.info, 4096):
                text += data
            self._pid = int(json.loads(text)["child-pid"]) if text else 0
        return self._pid

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def connect(self, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE)
        client.connect(f"{self.folder}/{name}.sock")
        return client

    def qmp(self) -> Qmp:
        return Qmp(self.connect("qmp"))

    def proc(self, name: str) -> bytes:
        return Path(f"/proc/{self.pid}/{name}").read_bytes()

    def status(self) -> dict[str, list[str]]:
        """/proc/PID/status, each line's words by its name."""
        lines = self.proc("status").decode().splitlines()
        return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


class Qmp:
    """A QMP client for tests: greeting and capabilities done, one command at a time, events passed over."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rwb")
        self.greeting = json.loads(self.file.readline())
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "event" not in answer:
                return answer["return"]

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def read_until(sock: socket.socket | SerialPort, wanted: bytes, seconds: float = PATIENCE) -> bytes:
    """What the console says until *wanted* is in it; what it said so far when that does not come."""
    said = b""
    deadline = time.monotonic() + seconds
    while wanted not in said and (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            data = sock.recv(4096)
        except TimeoutError:
            break
        if not data:
            break
        said += data
    return said
