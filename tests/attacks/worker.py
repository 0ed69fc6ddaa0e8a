"""Somebody who does on the host what takes descriptors: uploads a file, boots a VM, and reads what another says, again and again.

Runs in: a host, as a user, with the library that is installed there. Says how many mebibytes a second were uploaded and read,
and how many boots there would be in a second; or what was `lost`.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
import time
from typing import Any

from tests.consoles import Viewer
from vmshell import wire

MIB = 1 << 20
SIZE = 8 * MIB  # of the file
READS = 1.0  # seconds
PATIENCE = 120.0
STREAM = "lines1"  # a VM that prints ten mebibytes after each reset
BOOTED = "web2"


def main() -> int:
    todo = json.loads(sys.stdin.readline())
    while not select.select([sys.stdin], [], [], 0)[0]:
        try:
            with wire.connect(todo["socket"], PATIENCE) as sock:
                said: dict[str, object] = {"upload": upload(sock), "boot": boot(sock), "output": output(sock)}
        except (OSError, AssertionError) as exc:
            said = {"lost": f"{type(exc).__name__}: {exc}"[:300]}
        print(json.dumps(said), flush=True)
    return 0


def upload(sock: Any) -> float:
    data = os.urandom(SIZE)
    begun = time.monotonic()
    (pipe,) = ask(sock, id=1, verb="put", vm="shelf", object="o.iso", format="file")
    with open(pipe, "wb") as stream:
        stream.write(data)
    ask(sock, id=2, verb="done", put=1, bytes=SIZE, sha256=hashlib.sha256(data).hexdigest())
    taken = time.monotonic() - begun
    ask(sock, id=3, verb="drop", vm="shelf", object="o.iso")
    return SIZE / taken / MIB


def boot(sock: Any) -> float:
    begun = time.monotonic()
    viewer = Viewer(ask(sock, id=4, verb="boot", vm=BOOTED, console=True, consoles="pipes"))
    viewer.wait_output("echo guest ready", PATIENCE)
    taken = time.monotonic() - begun
    viewer.close()
    ask(sock, id=5, verb="kill", vm=BOOTED)
    return 1 / taken


def output(sock: Any) -> float:
    ask(sock, id=6, verb="reset", vm=STREAM)
    viewer = Viewer(ask(sock, id=7, verb="console", vm=STREAM, consoles="pipes", replay=False))
    viewer.wait_output("00000000", PATIENCE)
    before, begun = len(viewer.output), time.monotonic()
    while time.monotonic() < begun + READS:
        viewer.read_some()
    rate = (len(viewer.output) - before) / (time.monotonic() - begun)
    viewer.close()
    return rate / MIB


def ask(sock: Any, **body: object) -> tuple[int, ...]:
    wire.send(sock, body)
    while True:
        packet = wire.recv(sock, fds_allowed=2)
        assert packet is not None, "the connection was closed"
        if "progress" not in packet.body:
            break
    assert "ok" in packet.body, packet.body
    return wire.take_fds(packet)


if __name__ == "__main__":
    sys.exit(main())
