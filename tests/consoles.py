"""The viewer's ends of a console's two pipes, as a test holds them: keys in, guest bytes and notices out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from typing import Any

from vmshell.consoles import CONTROL, DATA, NOTICE, Frames, cells


class Viewer:
    def __init__(self, fds: tuple[int, ...]) -> None:
        self.shown, self.typed = fds
        self.output = b""
        self.notices: list[dict[str, Any]] = []
        self.closed = False
        self._frames = Frames()

    def type(self, keys: str) -> None:
        os.write(self.typed, cells(DATA, keys.encode()))

    def control(self, **what: object) -> None:
        os.write(self.typed, cells(CONTROL, json.dumps(what).encode()))

    def read_some(self, seconds: float = 1.0) -> None:
        """Take what comes within *seconds*."""
        if not select.select([self.shown], [], [], seconds)[0]:
            return
        data = os.read(self.shown, 1 << 16)
        self.closed = not data
        frames = self._frames.feed(data)
        self.output += b"".join(payload for tag, payload in frames if tag == DATA)
        self.notices += [json.loads(payload) for tag, payload in frames if tag == NOTICE]

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
        for fd in (self.shown, self.typed):
            with contextlib.suppress(OSError):
                os.close(fd)
