"""Descriptors whose closing waits, wherever a packet of a user's can come to lie: nobody else waits, nor does PID 1.

Rows R1, R12, C19; N1, N2. alice sends them, bob works. What is measured is printed (`pytest -s`); that nothing hangs must hold.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.attacks.onhost import Program, put_programs, seconds
from tests.host.machine import Host
from tests.unit.test_costs import plain
from vmshell import encoding
from vmshell.messages import REQUESTS

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600)]

SOCKET = "/run/vmshell/broker.sock"
EACH = [encoding.encode(plain(kind)).decode() for kind in REQUESTS.values()]
HANGS = 20.0  # seconds: a machine may be busy, and what a poisoned descriptor holds up is held up for ten minutes
ROUNDS = 15  # of bob's
FEW = 6  # processes of the front when only bob is there: server, zygote, one to spare, and those that come and go
CROWD = 2500  # connections of each kind


@pytest.fixture(scope="module")
def shared(host: Host) -> Host:
    """A host on which bob's VM runs."""
    if host.exec("test", "-c", "/dev/fuse", check=False).returncode:
        reason = "this machine has no /dev/fuse, of which tests make files that never answer"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    host.put_image("echo")
    assert host.run("bob", "new web1 --image echo --memory 32M")[0] == 0
    assert host.run("bob", "boot web1")[0] == 0
    put_programs(host)
    return host


@pytest.fixture
def bob(shared: Host) -> Iterator[Program]:
    with Program(shared, "bob", "tests.attacks.neighbour", socket=SOCKET) as program:
        figures("before", [program.said() for _ in range(ROUNDS)])
        yield program


def poisoners(host: Host, way: str, count: int = CROWD) -> list[Program]:
    """alice's two, a kind of descriptor each."""
    return [
        Program(host, "alice", "tests.attacks.poisoner", socket=SOCKET, way=way, kind=kind, requests=EACH, count=count)
        for kind in ("socket", "file")
    ]


def figures(when: str, rounds: list[dict[str, Any]]) -> None:
    """Print how long bob's answers took; a failure for one that took too long or did not come."""
    lost = [said for said in rounds if "lost" in said]
    assert not lost, lost[:3]
    for what in ("whoami", "console", "echo"):
        times = [said[what] for said in rounds]
        print(f"{when}: {what} median {1000 * statistics.median(times):.0f} ms, at most {1000 * max(times):.0f}, of {len(times)}")
        assert max(times) < HANGS


def manager_answers(host: Host, when: str) -> None:
    times = [seconds(host, "systemctl", "show", "-P", "Version", timeout=HANGS) for _ in range(10)]
    print(f"{when}: systemctl show median {1000 * statistics.median(times):.0f} ms, at most {1000 * max(times):.0f}")


def services_restart(host: Host, when: str) -> None:
    """Each by itself, whatever lies in the sockets of its users."""
    units = host.sh("systemctl list-units --plain --no-legend 'vmshell*.service'").splitlines()
    assert len(units) >= 6
    for unit in (line.split()[0] for line in units):
        print(f"{when}: systemctl restart {unit} {seconds(host, 'systemctl', 'restart', unit, timeout=HANGS):.2f} s")


def zygote_ends(host: Host, when: str) -> None:
    """Three times, and with it the server, which holds connections at that time: it does not wait for what lies in them."""
    todo = {"socket": SOCKET, "asks": "bob", "victims": ["zygote"], "rounds": 3, "seed": 1}
    with Program(host, "root", "tests.attacks.killer", **todo) as killer:
        print(f"{when}: after kill -9 of the zygote {[round(killer.said(HANGS)['next'], 2) for _ in range(3)]}")


def works_again(bob: Program) -> None:
    """What was under way while services restarted may have been lost; what is asked afterwards is answered."""
    until = time.monotonic() + 60
    bob.skip()
    while "lost" in bob.said():
        assert time.monotonic() < until, "bob is not answered after the restarts"


def under_attack(host: Host, bob: Program, way: str) -> None:
    attacks = poisoners(host, way)
    try:
        for attack in attacks:  # all of it has happened once
            attack.said()
        bob.skip()
        figures(way, [bob.said() for _ in range(ROUNDS)])
        manager_answers(host, way)
        services_restart(host, way)
        zygote_ends(host, when=way)
        works_again(bob)
        figures(f"{way}, after restarts", [bob.said() for _ in range(ROUNDS)])
    finally:
        sent = [attack.end()[-1] for attack in attacks]
    print(f"{way}: {sent}")
    assert all(count["sent"] > len(EACH) for count in sent)
    figures(f"after the {way}", [bob.said() for _ in range(ROUNDS)])


def test_r1_poison_beside_every_request(shared: Host, bob: Program) -> None:
    """R1, R12, N2: read, unread and behind others, on connections kept, closed at once, and beyond the limit."""
    under_attack(shared, bob, "storm")


def test_c19_five_thousand_poisoned_connections_beyond_the_limit(shared: Host, bob: Program) -> None:
    """C19, N1: the server drops none of them, so it waits for none."""
    under_attack(shared, bob, "crowd")


def test_n1_the_users_socket_is_taken_away(shared: Host, bob: Program) -> None:
    """At the end of the host, say: what lies in its queue, which nobody has accepted, is not the service manager's to drop."""
    server = shared.sh("systemctl show -P MainPID vmshell-front").strip()
    shared.sh(f"kill -STOP {server}")  # so that all that alice sends lies there
    attacks = poisoners(shared, "crowd", 100)
    try:
        for attack in attacks:
            attack.said()
        ending = threading.Thread(target=shared.exec, args=("systemctl", "stop", "vmshell-broker.socket"))
        begun = time.monotonic()
        ending.start()
        manager_answers(shared, "while the socket ends")
        ending.join(HANGS)
        print(f"systemctl stop vmshell-broker.socket {time.monotonic() - begun:.2f} s")
        assert not ending.is_alive()
    finally:
        for attack in attacks:
            attack.end()
    shared.sh("systemctl start vmshell-broker.socket vmshell-front vmshell-broker")
    works_again(bob)


def test_nothing_is_left_of_it(shared: Host, bob: Program) -> None:
    """No traceback, nothing killed for its memory, and no more processes and descriptors of the front than bob needs."""
    journal = shared.sh("journalctl -b --no-pager -o cat -u 'vmshell*'")
    assert "Traceback" not in journal and "oom-kill" not in journal, journal[-3000:]
    server = shared.sh("systemctl show -P MainPID vmshell-front").strip()
    until = time.monotonic() + 60
    while True:
        processes = int(shared.sh("pgrep -cu vmshell-front"))
        descriptors = len(shared.sh(f"ls /proc/{server}/fd").split())
        if processes <= FEW and descriptors <= 3 * FEW:
            break
        assert time.monotonic() < until, f"{processes} processes, {descriptors} descriptors"
        time.sleep(0.5)
