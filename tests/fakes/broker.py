"""A scripted broker at the wire's seam, and the relay's ends of a console: for tests of the shell that need no guest.

    with FakeBroker(layout) as broker:
        broker.answers["list"] = {"vms": [], "more": False}
        broker.answers["console"] = broker.console     # hands out two pipes; the test holds the other ends

An answer is a dict, an error to raise, or a function of the request's body returning either, or `(dict, fds)`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from vmshell import wire
from vmshell.consoles import CELL, CONTROL, DATA, DATA_MAX, NOTICE, frame, open_cells
from vmshell.errors import VmshellError
from vmshell.layout import Layout

# One row of `list`, as the broker sends it.
ROW: dict[str, object] = {
    "name": "web1",
    "owner": "alice",
    "state": "running",
    "note": "",
    "cpus": 1,
    "memory": 512,
    "image": "demo",
    "address": "",
    "uptime": 3700,
    "viewers": 1,
}

Answer = Any


class ConsoleEnd:
    """The relay's ends of one console's two pipes."""

    def __init__(self) -> None:
        self._keys, typed = os.pipe()
        shown, self._output = os.pipe()
        self.others = (shown, typed)
        self._open = True

    def hello(self, **changes: object) -> None:
        self.notice(**{"notice": "hello", "pen": True, "holder": None, "viewers": 1, "quiet_s": 3, "state": "running", **changes})

    def notice(self, **body: object) -> None:
        os.write(self._output, frame(NOTICE, json.dumps(body).encode()))

    def data(self, data: bytes) -> None:
        for at in range(0, len(data), DATA_MAX):
            os.write(self._output, frame(DATA, data[at : at + DATA_MAX]))

    def keys(self, count: int) -> bytes:
        """The next *count* bytes typed, whatever cells they come in."""
        got = b""
        while len(got) < count:
            tag, payload = self._cell()
            if tag == DATA:
                got += payload
        return got

    def control(self) -> str:
        """The next control, skipping keys."""
        while True:
            tag, payload = self._cell()
            if tag == CONTROL:
                return str(json.loads(payload)["do"])

    def gone(self) -> bool:
        """Wait until the viewer has closed its ends."""
        while self._read():
            pass
        return True

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._keys)
            os.close(self._output)

    def _cell(self) -> tuple[bytes, bytes]:
        data = self._read()
        assert data, "the viewer has gone"
        return next(open_cells(data))

    def _read(self) -> bytes:
        assert select.select([self._keys], [], [], 20)[0], "nothing came from the viewer"
        return os.read(self._keys, CELL)


class FakeBroker:
    """Listens at the layout's broker socket in a thread of its own."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.answers: dict[str, Answer] = {}
        self.requests: list[dict[str, object]] = []
        self.consoles: list[ConsoleEnd] = []
        self.replays: list[bytes] = []
        self._end, self._stop = socket.socketpair()  # a byte ends the thread
        os.makedirs(layout.run, exist_ok=True)
        self._listener = wire.listen(layout.broker_socket, 0o600)
        self._clients: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> FakeBroker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.send(b"x")
        self._thread.join()
        for sock in [self._end, self._stop, self._listener, *self._clients]:
            sock.close()
        for console in self.consoles:
            console.close()

    def console(self, body: dict[str, object]) -> tuple[dict[str, object], tuple[int, ...]]:
        """An answer that brings a console; the relay's ends are the newest in `consoles`."""
        end = ConsoleEnd()
        self.consoles.append(end)
        return {"name": body["vm"], "state": "running", "accel": "kvm"}, end.others

    def next_console(self, number: int = 0) -> ConsoleEnd:
        until = time.monotonic() + 60
        while len(self.consoles) <= number:
            assert time.monotonic() < until, "nobody asked for a console"
            time.sleep(0.01)
        return self.consoles[number]

    def verbs(self) -> list[object]:
        return [body["verb"] for body in self.requests]

    def drop_clients(self) -> None:
        """As if the broker had been restarted: every connection is lost."""
        for sock in self._clients:
            sock.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        while True:
            readable, _, _ = select.select([self._end, self._listener, *self._clients], [], [])
            if self._end in readable:
                return
            for sock in readable:
                if sock is self._listener:
                    self._clients.append(self._listener.accept()[0])
                else:
                    self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        try:
            packet = wire.recv(sock)
        except OSError:
            packet = None
        if packet is None:
            self._clients.remove(sock)
            sock.close()
            return
        self.requests.append(packet.body)
        answer = self.answers.get(str(packet.body["verb"]), {"name": packet.body.get("vm", ""), "state": "done"})
        try:
            found = answer(packet.body) if isinstance(answer, Callable) else answer  # type: ignore[arg-type]
            if isinstance(found, VmshellError):
                raise found
            ok, fds = found if isinstance(found, tuple) else (found, ())
            wire.send(sock, {"id": packet.body["id"], "ok": ok}, fds)
            for fd in fds:
                os.close(fd)
        except VmshellError as error:
            wire.send(sock, {"id": packet.body["id"], "error": error.to_wire()})
        except OSError:
            pass
