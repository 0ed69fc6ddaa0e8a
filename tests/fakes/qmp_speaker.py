"""Something in QEMU's place: has a serial port, listens at `qmp.sock` and speaks as much QMP as the relay needs."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.fakes.serial import SerialPort, guests_side

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}\r\n'


class Refusal(Exception):
    """Raised in an answer: QEMU says no."""


class HangUp(Exception):
    """Raised in an answer: QEMU drops the connection."""


class QmpSpeaker:
    """*script*, when given, is called with each monitor connection in place of the polite conversation.

    Its serial port is a pair of FIFOs; with *old* it is a socket, as that of a QEMU that an earlier version started.
    `answers` has, by command, what returns its answer or raises one of the above. Descriptors that came are in `fds`, each with
    the command it came beside; they are closed at the end.
    """

    def __init__(
        self,
        run_dir: str,
        status: str = "prelaunch",
        script: Callable[[socket.socket], None] | None = None,
        *,
        old: bool = False,
    ) -> None:
        os.makedirs(run_dir, exist_ok=True)
        self.status = status
        self.commands: list[dict[str, Any]] = []
        self.answers: dict[str, Callable[[dict[str, Any]], object]] = {}
        self.fds: list[tuple[str, int]] = []
        self.connections = 0
        self._closed = False
        self._script = script
        self._console_listener = _listen(f"{run_dir}/console.sock") if old else None
        self._monitor_listener = _listen(f"{run_dir}/qmp.sock")
        self._monitor: socket.socket | None = None
        self._consoles: list[socket.socket | SerialPort] = [] if old else [guests_side(run_dir)]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def console(self, timeout: float = 60) -> socket.socket | SerialPort:
        """The guest's end of its serial port; of an old one, that of the next connection."""
        if self._console_listener is None:
            return self._consoles[0]
        self._console_listener.settimeout(timeout)
        sock, _ = self._console_listener.accept()
        sock.settimeout(timeout)
        self._consoles.append(sock)
        return sock

    def event(self, name: str, **data: object) -> None:
        assert self._monitor is not None
        self._monitor.sendall(json.dumps({"event": name, "data": data, "timestamp": {"seconds": 1}}).encode() + b"\r\n")

    def names(self, start: str) -> list[str]:
        """The commands from the last *start* on."""
        names = [command["execute"] for command in self.commands]
        return names[len(names) - 1 - names[::-1].index(start) :]

    def wait_command(self, name: str, timeout: float = 60) -> dict[str, Any]:
        until = time.monotonic() + timeout
        while not any(command.get("execute") == name for command in self.commands):
            assert time.monotonic() < until, f"no {name} in {self.commands}"
            time.sleep(0.01)
        return next(command for command in self.commands if command.get("execute") == name)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for listener in (self._console_listener, self._monitor_listener):
            if listener is not None:
                # shutdown wakes the accept in the thread; close alone would not.
                listener.shutdown(socket.SHUT_RDWR)
                listener.close()
        self.hang_up()
        for console in self._consoles:
            console.close()
        for _, fd in self.fds:
            os.close(fd)
        self._thread.join(30)
        assert not self._thread.is_alive()

    def hang_up(self) -> None:
        """Drop the monitor connection."""
        monitor = self._monitor
        if monitor is not None:
            try:
                monitor.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _serve(self) -> None:
        while True:
            try:
                self._monitor, _ = self._monitor_listener.accept()
            except OSError:
                return
            self.connections += 1
            with self._monitor:
                try:
                    (self._script or self._converse)(self._monitor)
                except OSError:
                    pass

    def _converse(self, sock: socket.socket) -> None:
        sock.sendall(GREETING)
        for line, fds in _lines(sock):
            command = json.loads(line)
            name = command["execute"]
            self.fds += [(name, fd) for fd in fds]
            self.commands.append(command)
            result: dict[str, Any] = {"return": {}}
            if name in self.answers:
                try:
                    result = {"return": self.answers[name](command)}
                except Refusal as exc:
                    result = {"error": {"class": "GenericError", "desc": str(exc)}}
                except HangUp:
                    return
            elif name == "query-status":
                result = {"return": {"status": self.status, "singlestep": False, "running": self.status == "running"}}
            sock.sendall(json.dumps({**result, "id": command["id"]}).encode() + b"\r\n")
            if name == "cont":
                self.status = "running"
                self.event("RESUME")


def _lines(sock: socket.socket) -> Iterator[tuple[bytes, list[int]]]:
    """Each line with the descriptors that came beside it."""
    data = b""
    fds: list[int] = []
    while True:
        while b"\n" in data:
            line, data = data.split(b"\n", 1)
            yield line, fds
            fds = []
        # The kernel ends a read before data that brings other descriptors.
        more, came, _, _ = socket.recv_fds(sock, 65536, 4)
        if not more:
            return
        data += more
        fds += came


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    if os.path.lexists(path):
        os.unlink(path)
    sock.bind(path)
    sock.listen(1)
    return sock
