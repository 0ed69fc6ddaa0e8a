"""Somebody who works on the host: asks who they are, and types at the console of their VM, again and again.

With `stays` they have a console open, and an upload under way, and do nothing else.
Runs in: a host, as a user, with the library that is installed there. Says how many seconds each answer took, or what was `lost`.
"""

from __future__ import annotations

import json
import select
import sys
import time
from typing import Any

from tests.consoles import Viewer
from vmshell import wire

VM = "web1"
PATIENCE = 60.0
PAUSE = 0.12  # seconds between two rounds: a user may connect ten times a second, and is refused beyond it


def main() -> int:
    todo = json.loads(sys.stdin.readline())
    if todo.get("stays"):
        return stay(todo["socket"])
    number = 0
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        number += 1
        try:
            said: dict[str, object] = dict(work(todo["socket"], f"w{number}."))
        except (OSError, AssertionError) as exc:
            said = {"lost": f"{type(exc).__name__}: {exc}"[:300]}
        print(json.dumps(said), flush=True)
    return 0


def stay(path: str) -> int:
    with wire.connect(path, PATIENCE) as sock:
        ask(sock, {"id": 1, "verb": "console", "vm": VM, "consoles": "pipes"})
        ask(sock, {"id": 2, "verb": "put", "vm": "shelf", "object": "o.iso", "format": "file"})
        print(json.dumps({"there": True}), flush=True)
        sys.stdin.read()
    return 0


def work(path: str, word: str) -> dict[str, float]:
    """One round on a new connection."""
    times = {}
    begun = time.monotonic()
    with wire.connect(path, PATIENCE) as sock:
        ask(sock, {"id": 1, "verb": "whoami"})
        times["whoami"] = time.monotonic() - begun
        begun = time.monotonic()
        fds = ask(sock, {"id": 2, "verb": "console", "vm": VM, "replay": False, "consoles": "pipes"})
    viewer = Viewer(fds)
    try:
        times["console"] = time.monotonic() - begun
        begun = time.monotonic()
        wait_for_pen(viewer)
        viewer.type(word)
        viewer.wait_output(word, PATIENCE)
        times["echo"] = time.monotonic() - begun
    finally:
        viewer.close()
    return times


def wait_for_pen(viewer: Viewer) -> None:
    """Whoever was at the console before may not have been seen to leave; what is typed before that is refused."""
    until = time.monotonic() + PATIENCE
    while not any(notice.get("pen") is True for notice in viewer.notices):
        assert time.monotonic() < until and not viewer.closed, viewer.notices
        viewer.read_some()


def ask(sock: Any, body: dict[str, object]) -> tuple[int, ...]:
    wire.send(sock, body)
    packet = wire.recv(sock, fds_allowed=2)
    assert packet is not None, "the connection was closed"
    assert "ok" in packet.body, packet.body
    return wire.take_fds(packet)


if __name__ == "__main__":
    sys.exit(main())
