"""P21: what the front costs a user, beside the same broker that answers by itself.

The broker is a thread that answers at once, in both cases; the front is a real one, without rights. Memory is what a child has
for itself after its first request.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.figures import Row, place, skipped, spread
from tests.process.fronts import Front
from vmshell import wire
from vmshell.messages import Arrived

COUNT = 60
FIRST_MOST, LATER_MOST, MEMORY_MOST = 3.0, 0.1, 2.0  # ms, ms, MiB
WHAT = ("first answer on a new connection, more than the broker's own", "a later answer, more than the broker's own")


def rows() -> list[Row]:
    if os.geteuid() != 0:
        return [skipped("P21", WHAT[0], "needs root to be a front of another uid")]
    with place() as folder, Front(folder) as front, _answering(front), _alone(folder) as alone:
        pairs = [(_times(str(front.layout.broker_socket)), _times(alone)) for _ in range(COUNT + 5)][5:]
        memory = _private(front)
    found: list[Row] = []
    for index, most in enumerate((FIRST_MOST, LATER_MOST)):
        more = [through[index] - direct[index] for through, direct in pairs]
        found.append(("P21", WHAT[index], f"{spread(more)} ms", math.nan, f"<= {most:g} ms", statistics.median(more) <= most))
    found.append(
        ("P21", "a connection's own memory", f"{memory:.2f} MiB", math.nan, f"<= {MEMORY_MOST:g} MiB", memory <= MEMORY_MOST)
    )
    return found


def _times(path: str) -> tuple[float, float]:
    """Milliseconds for the first answer, with the connection, and for a later one: the median of ten."""
    began = time.perf_counter()
    with wire.connect(path, 30) as sock:
        later = []
        for number in range(11):
            wire.send(sock, {"id": number, "verb": "whoami"})
            wire.recv(sock)
            later.append((time.perf_counter() - began) * 1000)
            began = time.perf_counter()
    return later[0], statistics.median(later[1:])


def _private(front: Front) -> float:
    with front.connect() as sock:
        wire.send(sock, {"id": 1, "verb": "whoami"})
        wire.recv(sock)
        rollup = Path(f"/proc/{front.child()}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")) / 1024


def _answer(sock: wire.Socket) -> None:
    with contextlib.closing(sock), contextlib.suppress(OSError):
        while (packet := wire.recv(sock)) is not None:
            wire.send(sock, {"id": packet.body["id"], "ok": {"user": "alice", "uid": 1000}})


def _start(sock: wire.Socket) -> None:
    threading.Thread(target=_answer, args=(sock,), daemon=True).start()


@contextlib.contextmanager
def _answering(front: Front) -> Iterator[None]:
    """A broker behind the front."""
    broker = front.broker()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while (packet := wire.recv(broker.sock, fds_allowed=1)) is not None:
                assert Arrived.from_body(packet.body)
                _start(wire.Socket(fileno=packet.take_fd()))

    threading.Thread(target=serve, daemon=True).start()
    with broker:
        yield


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[str]:
    """The same broker at a socket of its own."""
    path = f"{folder}/alone.sock"
    listener = wire.listen(path, 0o600)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                _start(wire.Socket(fileno=sock.detach()))

    threading.Thread(target=serve, daemon=True).start()
    with listener:
        yield path
