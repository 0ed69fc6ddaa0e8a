"""kill -9 of the front's processes, `rounds` times, at moments that *seed* decides; after each somebody asks who they are.

A round kills the server, the zygote, one child or several, and says the `victim`, and how many seconds the next answer took.
Runs in: a host, as root, with the library that is installed there.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import select
import signal
import subprocess
import sys
import time

from vmshell import wire

PATIENCE = 60.0
SETTLE = 0.1  # seconds after an end in which others hear of it


def main() -> int:
    todo = json.loads(sys.stdin.readline())
    rng = random.Random(todo["seed"])
    for _ in range(todo["rounds"]):
        time.sleep(rng.uniform(0, 0.5))
        victim = rng.choice(todo["victims"])
        for pid in chosen(victim, rng):
            end(pid)
        time.sleep(SETTLE)
        print(json.dumps({"victim": victim, "next": answered(todo["socket"], todo["asks"])}), flush=True)
    return 0


def chosen(victim: str, rng: random.Random) -> list[int]:
    server = int(said("systemctl", "show", "-P", "MainPID", "vmshell-front"))
    zygotes = children_of(server)
    children = [pid for zygote in zygotes for pid in children_of(zygote)]
    if victim == "server":
        return [server] if server else []
    if victim == "zygote":
        return zygotes
    return rng.sample(children, min(len(children), 1 if victim == "child" else len(children)))


def children_of(pid: int) -> list[int]:
    return [int(word) for word in said("pgrep", "-P", str(pid)).split()] if pid else []


def said(*argv: str) -> str:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout


def end(pid: int) -> None:
    """Kill it, and wait until it has ended."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [])
    os.close(process)


def answered(path: str, user: str) -> float:
    """How many seconds `whoami` takes *user*, who has no second try."""
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            account = pwd.getpwnam(user)
            os.initgroups(user, account.pw_gid)
            os.setgid(account.pw_gid)
            os.setuid(account.pw_uid)
            with wire.connect(path, PATIENCE) as sock:
                wire.send(sock, {"id": 1, "verb": "whoami"})
                packet = wire.recv(sock)
                os._exit(0 if packet is not None and "ok" in packet.body else 1)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return time.monotonic() - begun if status == 0 else -1.0


if __name__ == "__main__":
    sys.exit(main())
