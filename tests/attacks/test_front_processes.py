"""The front's processes on a host: which hold users' connections, and with what rights; what becomes of all when one is killed.

VMSHELL_ROUNDS (5) says how many random rounds of kill -9 there are, VMSHELL_SEED (9) which ones. N1, N5, N8.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.attacks.onhost import PATIENCE, Program, put_programs
from tests.host.machine import Host

ROUNDS = int(os.environ.get("VMSHELL_ROUNDS", "5"))
SEED = int(os.environ.get("VMSHELL_SEED", "9"))
SOCKET = "/run/vmshell/broker.sock"
LOOKS = 5  # at bob's work after each kill

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(600 + 20 * ROUNDS)]


@pytest.fixture(scope="module")
def shared(host: Host) -> Iterator[Host]:
    """A host on which alice's and bob's VMs run until the end."""
    host.put_image("echo")
    for user in ("alice", "bob"):
        assert host.run(user, "new web1 --image echo --memory 32M")[0] == 0
        assert host.run(user, "boot web1")[0] == 0
    put_programs(host)
    guests = host.sh("pgrep qemu-system")
    yield host
    assert host.sh("pgrep qemu-system") == guests
    journal = host.sh("journalctl -b --no-pager -o cat -u 'vmshell*'")
    assert "Traceback" not in journal, journal[-3000:]


class Front:
    """The front as it is now, by pid."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.server = host.sh("systemctl show -P MainPID vmshell-front").strip()
        (self.zygote,) = self._children_of(self.server)
        self.children = self._children_of(self.zygote)

    def _children_of(self, pid: str) -> list[str]:
        return self._host.sh(f"pgrep -P {pid}", check=False).split()

    def is_all_there_is(self) -> bool:
        """Are there no processes of the front but these?"""
        found = self._host.sh("pgrep -u vmshell-front").split()
        return set(found) <= {self.server, self.zygote, *self.children, *self._children_of(self.zygote)}


def holders(host: Host, users: tuple[str, ...]) -> set[str]:
    """Pids of processes of ours that hold a socket whose other end a process of *users* holds."""
    held: dict[str, set[str]] = {}  # pids, by the socket's inode
    peers: dict[str, str] = {}
    for line in host.sh("ss -xapn").splitlines():
        found = re.search(r"\s(\d+)\s+\S+\s+(\d+)\s+(?:users:\((.*)\))?\s*$", line)
        if found:
            held[found[1]] = set(re.findall(r"pid=(\d+)", found[3] or ""))
            peers[found[1]] = found[2]
    theirs = {pid for user in users for pid in host.sh(f"pgrep -u {user}").split()}
    ours = set(host.sh("pgrep -f /vmshell/__main__.py; pgrep -u vmshell-front,vmshell-broker,vmshell-relay").split())
    return {pid for inode, pids in held.items() if pids & theirs for pid in held.get(peers[inode], ()) if pid in ours - theirs}


def status(host: Host, pid: str) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in host.exec("cat", f"/proc/{pid}/status").stdout.splitlines() if ":\t" in line)


def test_n1_only_children_hold_users_connections(shared: Host) -> None:
    """With consoles open and uploads under way: caged, without a right, and nobody of the same uid can look into them."""
    with ExitStack() as stack:
        for user in ("alice", "bob"):
            stack.enter_context(Program(shared, user, "tests.attacks.neighbour", socket=SOCKET, stays=True)).said()
        front, found = Front(shared), holders(shared, ("alice", "bob"))
        assert len(found) == 2 and found <= set(front.children)
        uid = shared.uid("vmshell-front")
        for pid in found:
            says = status(shared, pid)
            assert says["Uid"].split() == [str(uid)] * 4
            assert {says[key].strip("0") for key in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")} == {""}
            assert (says["Seccomp"], says["NoNewPrivs"]) == ("2", "1")
            assert shared.exec("stat", "-c", "%u", f"/proc/{pid}/mem").stdout.strip() == "0"  # not dumpable
            kept = shared.sh(f"readlink /proc/{pid}/fd/*").split()
            assert sum(link.startswith("socket:") for link in kept) <= 5, kept
        listening = set(re.findall(r"pid=(\d+)", shared.sh("ss -xlpn | grep -E '/run/vmshell/(broker|front).sock'")))
        assert listening == {front.server, "1"}


def test_n8_killed_at_random_while_bob_works(shared: Host) -> None:
    """Connections in flight end, the next works, and nothing of the front is left behind."""
    victims = ["server", "zygote", "child", "children"]
    with Program(shared, "bob", "tests.attacks.neighbour", socket=SOCKET) as bob:
        todo = {"socket": SOCKET, "asks": "bob", "victims": victims, "rounds": ROUNDS, "seed": SEED}
        with Program(shared, "root", "tests.attacks.killer", **todo) as killer:
            for _ in range(ROUNDS):
                killed = killer.said()
                until = time.monotonic() + PATIENCE
                bob.skip()
                rounds = [bob.said() for _ in range(LOOKS)]
                while any("lost" in said for said in rounds[-LOOKS:]):
                    assert time.monotonic() < until, (killed, rounds[-LOOKS:])
                    rounds.append(bob.said())
                print(killed, f"lost afterwards: {sum('lost' in said for said in rounds)}")
    settled(shared)


@pytest.mark.parametrize("victim", ["server", "zygote", "children"])
def test_n8_the_request_after_a_kill_works(shared: Host, victim: str) -> None:
    """Nobody asks meanwhile who could make the front notice: it does by itself."""
    todo = {"socket": SOCKET, "asks": "bob", "victims": [victim], "rounds": 2, "seed": SEED}
    with Program(shared, "root", "tests.attacks.killer", **todo) as killer:
        said = [killer.said(), killer.said()]
    print(said)
    assert all(0 < round["next"] < PATIENCE for round in said), said
    settled(shared)


def settled(host: Host) -> None:
    until = time.monotonic() + PATIENCE
    while not Front(host).is_all_there_is():
        assert time.monotonic() < until, host.sh("ps -u vmshell-front -f")
        time.sleep(0.2)
