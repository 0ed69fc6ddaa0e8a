"""In tapnet's place: answers every message with yes, hands out descriptors of /dev/null, and remembers what it was told."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from vmshell import wire
from vmshell.broker.runtime.loop import Loop
from vmshell.refusals import NetworkFailed


class Tapnet:
    def __init__(self, path: str) -> None:
        self._listener = wire.listen(path, 0o600)
        self._sock: socket.socket | None = None
        self.seen: list[dict[str, Any]] = []
        self.connections = 0
        self.refuse_nic = -1
        self.refuse_verb = ""
        self.silent = False
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Tapnet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._thread.is_alive():  # it may be accepting one just now
            with contextlib.suppress(OSError):
                self.hang_up()
            self._thread.join(0.05)

    def verbs(self) -> list[str]:
        return [str(body["verb"]) for body in self.seen]

    def hang_up(self) -> None:
        if self._sock is not None:
            self._sock.shutdown(socket.SHUT_RDWR)

    def turn(self, loop: Loop, done: Callable[[], Any], seconds: float = 10) -> None:
        """Let the broker's *loop* work until *done*."""
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.seen
            loop.after(0.01, loop.stop)
            loop.run()

    def _serve(self) -> None:
        while True:
            try:
                self._sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with self._sock as sock:
                while packet := self._next(sock):
                    try:
                        self._answer(sock, packet.body)
                    except OSError:
                        break  # the broker is gone

    def _next(self, sock: socket.socket) -> wire.Packet | None:
        try:
            return wire.recv(sock)
        except OSError:
            return None

    def _answer(self, sock: socket.socket, body: dict[str, Any]) -> None:
        self.seen.append(body)
        if self.silent:
            return
        if body.get("create") and body["nic"] == self.refuse_nic:
            wire.send(sock, {"id": body["id"], "error": NetworkFailed(problem="it is that card").to_wire()})
        elif body["verb"] == self.refuse_verb:
            wire.send(sock, {"id": body["id"], "error": NetworkFailed(problem="it is that verb").to_wire()})
        elif body.get("create"):
            fd = os.open(os.devnull, os.O_RDWR)
            wire.send(sock, {"id": body["id"], "ok": {}}, (fd,))
            os.close(fd)
        else:
            wire.send(sock, {"id": body["id"], "ok": {}})
