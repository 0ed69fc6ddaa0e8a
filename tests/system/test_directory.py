"""Accounts of a real LDAP directory, asked through nslcd: an outage of its server is told from the end of an account (G19)."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host.directory import Directory, why_not

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow]
LAYOUT = "/etc/vmshell:/var/lib/vmshell:/run/vmshell:/var/log/vmshell:0"
ANN, BOB, STRANGER = 20001, 1002, 20100
LOOK_UP = """
import json, sys
sys.path.insert(0, "/opt")
from vmshell.accounts.main import answers
for line in sys.stdin:
    packets = list(answers(json.loads(line)))
    groups = [name for body in packets for name in body.get("groups", [])]
    print(json.dumps([packets[-1]["ok"].get("exists", False), groups, packets[-1]["ok"].get("whole", True)]))
"""
QUESTIONS: dict[str, dict[str, object]] = {
    "ann": {"verb": "user", "user": "ann"},
    "bob": {"verb": "user", "user": "bob"},
    "nobody there": {"verb": "user", "user": "zoe"},
    "uid": {"verb": "uid", "uid": ANN},
    "local uid": {"verb": "uid", "uid": BOB},
    "group": {"verb": "group", "group": "staff2"},
    "no group": {"verb": "group", "group": "staff3"},
    "members": {"verb": "members", "group": "staff2"},
}


@pytest.fixture(scope="module")
def image() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def directory(image: None, short_tmp: Path) -> Iterator[Directory]:
    made = Directory(short_tmp)
    # Here the directory's group is the one whose members may use the service.
    made._write("var/lib/vmshell/version", "state 2\n")
    made._write("etc/vmshell/policy.toml", '[host]\naccel = "tcg"\ngroup = "staff2"\n')
    with made:
        yield made


def look_up(directory: Directory) -> dict[str, Any]:
    """By question: does it exist, its groups, is that all?"""
    text = "".join(json.dumps({"id": 1, **question}) + "\n" for question in QUESTIONS.values())
    command = directory.command("python3", "-IS", "-c", LOOK_UP)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240, check=True)
    return dict(zip(QUESTIONS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_an_answer_that_is_not_whole_says_so(directory: Directory) -> None:
    nothing = [False, [], False]
    assert look_up(directory) == {
        "ann": [True, ["staff2"], True],
        "bob": [True, ["bob", "staff2"], True],
        "nobody there": [False, [], True],
        "uid": [True, [], True],
        "local uid": [True, [], True],
        "group": [True, [], True],
        "no group": [False, [], True],
        "members": [True, [], True],
    }
    silent = dict.fromkeys(QUESTIONS, nothing) | {"bob": [True, ["bob"], False], "local uid": [True, [], True]}
    directory.run("pkill", "-KILL", "-x", "slapd")
    assert look_up(directory) == silent
    directory.run("pkill", "-KILL", "-x", "nslcd")
    assert look_up(directory) == silent


SOCKET = "/run/vmshell/broker.sock"
CONNECT = """
import json, os, sys
sys.path.insert(0, "/opt")
from vmshell import wire
os.setgroups([]), os.setgid(int(sys.argv[1])), os.setuid(int(sys.argv[1]))
with wire.connect("/run/vmshell/broker.sock", 60) as sock:
    wire.send(sock, {"id": 1, "verb": sys.argv[2]})
    body = wire.recv(sock).body
print(body["error"]["code"] if "error" in body else body["ok"].get("user", "done"))
"""


class Broker:
    """A broker on that host with its front, and its users' connections."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        directory.run("rm", "-f", SOCKET)
        self._front = subprocess.Popen(self._command("front"))
        self._process = subprocess.Popen(self._command("broker"), stderr=subprocess.PIPE, text=True)

    def _command(self, name: str) -> list[str]:
        return self._directory.command("python3", "-IS", "/opt/vmshell/__main__.py", name, LAYOUT)

    def __enter__(self) -> Broker:
        assert self._process.stderr is not None
        while '"started"' not in (line := self._process.stderr.readline()):
            assert line, "the broker ended"
        self._directory.run("sh", "-c", f"until test -S {SOCKET}; do sleep 0.1; done")
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.run("pkill", "-KILL", "-f", "__main__.py (broker|front)")
        self._process.communicate(timeout=60)
        self._front.wait(60)

    def begin(self, uid: int, verb: str = "whoami") -> subprocess.Popen[str]:
        command = self._directory.command("python3", "-IS", "-c", CONNECT, str(uid), verb)
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def ask(self, uid: int, verb: str = "whoami") -> str:
        """Who that is, or the error."""
        return self.begin(uid, verb).communicate(timeout=120)[0].strip()


def test_g19_a_directory_server_that_hangs_stops_nobody_but_strangers(directory: Directory) -> None:
    with Broker(directory) as broker:
        assert [broker.ask(uid) for uid in (ANN, BOB, STRANGER)] == ["ann", "bob", "not-allowed"]
        directory.run("pkill", "-STOP", "-x", "slapd")
        time.sleep(2.1)  # what is known is no longer fresh
        stranger = broker.begin(STRANGER + 1)
        assert [broker.ask(uid) for uid in (ANN, BOB)] == ["ann", "bob"]
        assert stranger.poll() is None, "he still waits"
        assert broker.ask(0, "list") == "done"
        assert stranger.communicate(timeout=60)[0].strip() == "accounts-silent"
        assert [broker.ask(uid) for uid in (ANN, BOB)] == ["ann", "bob"]
        directory.run("pkill", "-CONT", "-x", "slapd")
        until = time.monotonic() + 120
        while (answer := broker.ask(STRANGER + 1)) == "accounts-silent":
            assert time.monotonic() < until
        assert answer == "not-allowed"
        assert [broker.ask(uid) for uid in (ANN, BOB)] == ["ann", "bob"]


def test_g19_a_broker_that_is_started_while_the_server_is_down_lets_in_whom_it_knew(directory: Directory) -> None:
    with Broker(directory) as broker:
        assert [broker.ask(uid) for uid in (ANN, BOB)] == ["ann", "bob"]
        until = time.monotonic() + 60
        while "staff2" not in directory.run("sh", "-c", "cat /run/vmshell/broker/accounts.json || true"):
            assert time.monotonic() < until
    directory.run("pkill", "-KILL", "-x", "slapd")
    with Broker(directory) as broker:
        assert [broker.ask(uid) for uid in (ANN, BOB)] == ["ann", "bob"]
        assert broker.ask(STRANGER) == "accounts-silent"
