"""A program of a user's own in a host of tests/attacks/test_turns.py: it speaks to the broker's socket from scratch (A37).

turns_client.py ask REQUEST...          each on one connection; prints the answers
turns_client.py boot VM...              all at once on one connection; ends when two of them run
turns_client.py storm KIND SECONDS      four processes that ask for KIND without a pause; prints what they were told
turns_client.py look SECONDS            `whoami` every few milliseconds; prints how long each took
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

SOCKET = "/run/vmshell/broker.sock"
AT_ONCE = 4


class Connection:
    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(120)
        self.sock.connect(SOCKET)

    def send(self, verb: str, **fields: object) -> None:
        try:
            self.sock.send(json.dumps({"id": 1, "verb": verb, **fields}).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused at once: what was said then is still there

    def receive(self) -> dict[str, Any]:
        """The next answer. What it brings is closed: a console is left as soon as it is there."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 2)
            except ConnectionResetError:
                continue  # closed before it read what we had sent: what it said comes next
            for fd in fds:
                os.close(fd)
            answer: dict[str, Any] = json.loads(data)
            if "progress" not in answer:
                return answer

    def ask(self, verb: str, **fields: object) -> dict[str, Any]:
        self.send(verb, **fields)
        return self.receive()


def changes(connection: Connection, name: str) -> list[dict[str, Any]]:
    return [connection.ask("new", vm=name, image="echo", memory=16), connection.ask("rm", vm=name)]


def boots(connection: Connection, name: str) -> list[dict[str, Any]]:
    answer = connection.ask("boot", vm=name)
    connection.ask("kill", vm=name)
    return [answer]


def consoles(connection: Connection, name: str) -> list[dict[str, Any]]:
    return [connection.ask("console", vm="run0", consoles="pipes")]


def connections(connection: Connection, name: str) -> list[dict[str, Any]]:
    connection.sock.close()
    connection.__init__()  # type: ignore[misc]
    return [connection.ask("whoami")]


STORMS: dict[str, Callable[[Connection, str], list[dict[str, Any]]]] = {
    made.__name__: made for made in (changes, boots, consoles, connections)
}


def storm(kind: str, seconds: float) -> None:
    """Print a line for each process: how many answers of each code, one sentence of a refusal, and how long it all took."""
    began = time.monotonic()
    for index in range(AT_ONCE):
        if os.fork():
            continue
        connection, told, said = Connection(), Counter[str](), ""
        while time.monotonic() < began + seconds:
            for answer in STORMS[kind](connection, f"{kind}{index}"):
                error = answer.get("error", {"code": "done", "text": ""})
                told[error["code"]] += 1
                said = error["text"] if error["code"] == "too-fast" else said
        line = json.dumps({"told": told, "said": said, "seconds": time.monotonic() - began})
        os.write(1, f"{line}\n".encode())
        os._exit(0)
    for _ in range(AT_ONCE):
        os.wait()


def look(seconds: float) -> None:
    connection, took = Connection(), []
    until = time.monotonic() + seconds
    while (began := time.monotonic()) < until:
        assert "ok" in connection.ask("whoami")
        took.append(time.monotonic() - began)
        time.sleep(0.005)
    print(json.dumps(took))


def boot(names: list[str]) -> None:
    connection = Connection()
    for name in names:
        connection.send("boot", vm=name)
    for _ in range(2):
        print(json.dumps(connection.receive()))


def main(what: str, *words: str) -> None:
    if what == "ask":
        connection = Connection()
        for word in words:
            print(json.dumps(connection.ask(**json.loads(word))))
    elif what == "boot":
        boot(list(words))
    elif what == "storm":
        storm(words[0], float(words[1]))
    else:
        look(float(words[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
