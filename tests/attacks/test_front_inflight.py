"""One user is given descriptors that they leave unread, or grows every pipe they get: another's work goes on, at its rate.

Rows N1, N3. alice hoards, bob works. What is measured is printed (`pytest -s`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.attacks.onhost import Program, put_programs
from tests.host.machine import Host

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

SOCKET = "/run/vmshell/broker.sock"
CONNECTIONS = 40
ALLOWED = 100  # connections of a user
POLICY = f"[host]\nconnections_max = {ALLOWED}\n"
ROUNDS = 2  # of bob's, before and meanwhile
SLOWER = 6  # times: a machine may be busier than it was a moment ago
CONSOLE: dict[str, object] = {"verb": "console", "vm": "web1", "consoles": "pipes"}
DISPLAY: dict[str, object] = {"verb": "display", "vm": "web1"}
BRINGING: list[dict[str, object]] = [
    CONSOLE,
    {"verb": "boot", "vm": "web2", "console": True, "consoles": "pipes"},
    {"verb": "put", "vm": "shelf", "object": "o.iso", "format": "file"},
    DISPLAY,
    {"verb": "define", "vm": "web3", "text": '[boot]\nimage = "echo"\n', "once": True, "consoles": "pipes"},
]


@pytest.fixture(scope="module")
def shared(host: Host) -> Host:
    """alice has a VM with a screen that runs and one that is off; of bob's one prints all the time and one is off."""
    for image in ("echo", "lines"):
        host.put_image(image)
    host.exec("tee", "/etc/vmshell/policy.toml", stdin=POLICY)
    host.sh("systemctl restart vmshell-broker")
    commands = {
        "alice": [
            "new web1 --image echo --memory 32M",
            "set web1 display=vnc",
            "new web2 --image echo --memory 32M",
            "boot web1",
        ],
        "bob": ["new lines1 --image lines --memory 32M", "new web2 --image echo --memory 32M", "boot lines1"],
    }
    for user, lines in commands.items():
        for line in lines:
            status, out, err = host.run(user, line)
            assert status == 0, (user, line, out, err)
    put_programs(host)
    return host


def hoarder(host: Host, way: str, *requests: dict[str, object], count: int = CONNECTIONS) -> Program:
    texts = [json.dumps({"id": 1, **request}) for request in requests]
    return Program(host, "alice", "tests.attacks.hoarder", socket=SOCKET, way=way, requests=texts, count=count)


@pytest.fixture(scope="module")
def bob(shared: Host) -> Iterator[Program]:
    with Program(shared, "bob", "tests.attacks.worker", socket=SOCKET) as program:
        yield program


@pytest.fixture(scope="module")
def before(bob: Program) -> dict[str, float]:
    """bob's figures while nobody else does anything."""
    return figures("before", bob, statistics.median)


def figures(when: str, bob: Program, choose: Callable[[list[float]], float]) -> dict[str, float]:
    rounds: list[dict[str, Any]] = [bob.said() for _ in range(ROUNDS)]
    lost = [said for said in rounds if "lost" in said]
    assert not lost, lost
    found = {what: [float(said[what]) for said in rounds] for what in rounds[0]}
    print(f"{when}:", {what: [round(value, 2) for value in values] for what, values in found.items()})
    return {what: choose(values) for what, values in found.items()}


def works_at_its_rate(before: dict[str, float], bob: Program, when: str) -> None:
    """Everything is done, and the best of some is no worse than it can be on a machine that has become busier."""
    bob.skip()
    meanwhile = figures(when, bob, max)
    assert {what for what in before if meanwhile[what] < before[what] / SLOWER} == set()


def test_n3_answers_that_nobody_reads(shared: Host, bob: Program, before: dict[str, float]) -> None:
    """By every request whose answer brings a descriptor: on each connection lie those of one answer, and others get theirs."""
    with hoarder(shared, "unread", *BRINGING) as alice:
        alice.said()
        works_at_its_rate(before, bob, "beside unread answers")
        (lay,) = alice.end()
    print(f"unread: {lay}")
    assert CONNECTIONS / len(BRINGING) <= lay["in all"] <= 2 * CONNECTIONS and lay["most"] <= 2


def test_n3_answers_that_nobody_reads_on_connections_given_up(shared: Host, bob: Program) -> None:
    """What lies in them counts until it is taken: a connection that has ended otherwise makes no room for another."""
    with hoarder(shared, "left", DISPLAY, count=2 * ALLOWED) as alice:
        alice.said()
        bob.skip()
        figures("beside connections given up", bob, max)
        (lay,) = alice.end()
    print(f"given up: {lay}")
    assert ALLOWED // 2 < lay["holding"] <= ALLOWED


def test_n1_pipes_grown_as_far_as_can_be(shared: Host, bob: Program, before: dict[str, float]) -> None:
    """What is grown is grown at its maker's cost, so others' new pipes are small: nothing of ours depends on large ones."""
    with hoarder(shared, "grown", CONSOLE) as alice:
        held = alice.said()
        print(f"grown: {held}")
        assert held["large"] > CONNECTIONS
        works_at_its_rate(before, bob, "beside grown pipes")
