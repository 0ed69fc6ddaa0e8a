"""The viewer's end of a console socket, as a test holds it: keys in, guest bytes and notices out."""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class Viewer:
    def __init__(self, fd: int) -> None:
        self.sock = socket.socket(fileno=fd)
        self.sock.settimeout(1.0)
        self.output = b""
        self.notices: list[dict[str, Any]] = []
        self.closed = False

    def type(self, keys: str) -> None:
        self.sock.send(b"d" + keys.encode())

    def control(self, **what: object) -> None:
        self.sock.send(b"c" + json.dumps(what).encode())

    def read_some(self) -> None:
        """Take what comes within a second."""
        try:
            packet = self.sock.recv(1 << 17)
        except TimeoutError:
            return
        except ConnectionError:
            packet = b""
        if not packet:
            self.closed = True
        elif packet[:1] == b"d":
            self.output += packet[1:]
        else:
            self.notices.append(json.loads(packet[1:]))

    def wait_output(self, text: str, seconds: float = 120) -> str:
        """Read until *text* has come; returns all output so far."""
        return self._wait(lambda: text.encode() in self.output, f"output {text!r}", seconds)

    def wait_notice(self, kind: str, seconds: float = 60) -> dict[str, Any]:
        self._wait(lambda: any(notice.get("notice") == kind for notice in self.notices), f"notice {kind!r}", seconds)
        return next(notice for notice in self.notices if notice.get("notice") == kind)

    def _wait(self, done: Any, what: str, seconds: float) -> str:
        until = time.monotonic() + seconds
        while not done():
            assert not self.closed, f"the console closed while waiting for {what}; got {self.output[-500:]!r} {self.notices}"
            assert time.monotonic() < until, f"waited {seconds} s for {what}; got {self.output[-500:]!r} {self.notices}"
            self.read_some()
        return self.output.decode("utf-8", "replace")

    def close(self) -> None:
        self.sock.close()
