"""Networks beside ufw, firewalld, Docker's chains and plain nftables, opened as vmshell-admin(8) says; and systemd-resolved."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.host.guest import Connection, Guest
from tests.host.machine import TREE, Host
from tests.host.world import outside, said, tables, through

__all__ = ["outside"]

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

POLICY = """\
[host]
dns_servers = ["{outside}"]
ipv6_pool = "fd77:78::/48"
[user.alice]
forward_ports = "20000-20009"
"""
WORLD_PORT = 20001


@dataclass
class Neighbours:
    """alice has web1, with a port that is published to the world, and web2; bob has evil."""

    host: Host
    outside: str
    web1: Guest
    web2: Guest
    evil: Guest


@pytest.fixture(scope="module")
def near(host: Host, outside: str) -> Iterator[Neighbours]:
    host.put_image("netdemo")
    host.exec("tee", "/etc/vmshell/policy.toml", stdin=POLICY.format(outside=outside))
    host.sh("systemctl restart vmshell-broker")
    guests = [Guest(host, user, name).make().boot() for user, name in (("alice", "web1"), ("alice", "web2"), ("bob", "evil"))]
    for guest in guests:
        guest.ready()
    web1, web2, evil = guests
    for guest in (web1, web2):  # it has no DHCPv6 client
        guest.sh(f"ip -6 addr add {address6(guest)}/64 dev eth0")
    web1.sh("nc -ll -p 80 -e echo answer >/dev/null 2>&1 &")
    web1.vmshell(f"publish web1 80 --to world:{WORLD_PORT}")
    web2.sh("nc -ll -p 7 -e cat >/dev/null 2>&1 &")
    yield Neighbours(host, outside, web1, web2, evil)
    for guest in guests:
        guest.detach()


def address6(guest: Guest) -> str:
    found = re.search(r"fd77:[0-9a-f:]+", guest.vmshell(f"net {guest.name}"))
    assert found
    return found[0]


# --- firewalls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Firewall:
    """Another one: its program, what switches it on as it comes, loads it anew and takes it away, and what doctor calls it."""

    program: str
    on: str
    again: str
    off: str
    closed: tuple[str, ...]
    deaf: bool = True  # is it in the way of questions to the host, for addresses and names?


CHAINS = """\
table inet closed {
    chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iifname "lo" accept
        tcp dport 22 accept
    }
    chain forward { type filter hook forward priority 0; policy drop; ct state established,related accept; }
}
"""
FIREWALLS = {
    "ufw": Firewall(
        "ufw",
        "ufw allow 22/tcp && ufw --force enable",
        "ufw reload",
        "ufw --force reset; nft delete table ip filter; nft delete table ip6 filter",
        tuple(f"nftables chain {chain} of table {family} filter" for family in ("ip", "ip6") for chain in ("INPUT", "FORWARD")),
    ),
    "firewalld": Firewall(
        "firewall-cmd",
        "systemctl start firewalld && firewall-cmd --state || { journalctl -u firewalld -n 3 -o cat >&2; false; }",
        "firewall-cmd --reload",
        "systemctl stop firewalld; rm -f /etc/firewalld/zones/trusted.xml*",
        ("firewalld",),
    ),
    # Not Docker itself, which needs more of a kernel than a host here has: the chains that it makes, as it makes them.
    "Docker": Firewall(
        "iptables",
        "iptables -P FORWARD DROP && iptables -N DOCKER-USER && iptables -A FORWARD -j DOCKER-USER",
        "",
        "nft delete table ip filter",
        ("nftables chain FORWARD of table ip filter",),
        deaf=False,
    ),
    "nftables": Firewall(
        "nft",
        f"nft -f - <<'END'\n{CHAINS}END",
        "",
        "nft delete table inet closed",
        ("nftables chain input of table inet closed", "nftables chain forward of table inet closed"),
    ),
}


def opening(name: str) -> list[str]:
    """The commands that vmshell-admin(8) has for firewall *name*."""
    with open(f"{TREE}/etc/man/vmshell-admin.8", encoding="utf-8") as file:
        section = file.read().partition(f"\n.It {name}\n")[2].partition("\n.It ")[0].partition("\n.El\n")[0]
    found = [line.replace("\\(dq", '"') for line in re.findall(r"^\.Ql (.*)$", section, re.MULTILINE)]
    if name == "nftables":
        inwards, outwards = found
        places = (("input", inwards), ("forward", inwards), ("forward", outwards))
        return [f"nft add rule inet closed {chain} '{rule}'" for chain, rule in places]
    return found


@pytest.fixture(params=FIREWALLS)
def firewall(near: Neighbours, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a firewall that is on."""
    host, name = near.host, str(request.param)
    other = FIREWALLS[name]
    host.exec("which", other.program)
    started = host.exec("bash", "-c", other.on, check=False)
    if started.returncode != 0:
        host.sh(other.off, check=False)
        pytest.skip(f"{name} does not run in a container of this machine's: {started.stderr.strip()}")
    yield name
    host.sh(other.off)


def test_beside_another_firewall(near: Neighbours, firewall: str) -> None:
    """Closed it is in the way, and doctor says so; the lines of vmshell-admin(8) open it, and nothing that ours keeps closed."""
    host, web1, other = near.host, near.web1, FIREWALLS[firewall]
    assert not echoed(web1, near.outside, 2)
    assert leased(web1, 1) is not other.deaf
    assert in_the_way(host) == [f"{closed} drops what it does not know" for closed in other.closed]

    commands = opening(firewall)
    assert len(commands) >= 2
    for command in commands:
        host.sh(command)
    assert in_the_way(host) == []
    everything_works(near)
    everything_is_apart(near)
    if other.again:
        outlives(near, other.again)


def outlives(near: Neighbours, again: str) -> None:
    """The other firewall is loaded anew: our tables are not touched, connections go on, and all is as before."""
    host, web1 = near.host, near.web1
    connections = [Connection(web1, address) for address in (near.web2.address, near.outside)]
    for connection in connections:
        connection.carries("before")
    before = tables(host), numbers(host)
    host.sh(again)
    assert (tables(host), numbers(host)) == before
    for connection in connections:
        connection.carries("afterwards")
    web1.sh("killall sleep")
    everything_works(near)


def numbers(host: Host) -> str:
    """Our tables with the numbers that the kernel gave them: one that is made again has another."""
    return host.sh("nft -a list tables | grep vmshell")


def everything_works(near: Neighbours) -> None:
    host, web1 = near.host, near.web1
    assert leased(web1) and echoed(web1, "web2")
    assert echoed(web1, "outside.test") and echoed(near.evil, "outside.test")
    web1.sh(f"ping -6 -c 1 -W 5 {address6(near.web2)} && ping -6 -c 1 -W 5 fe80::1%eth0")
    assert said([*through(web1, "ssh"), "root@web1", "hostname"]) == (0, "web1\n")
    at_the_host = f"TCP:203.0.113.{host.number()}:{WORLD_PORT},connect-timeout=5"
    assert said(host.outside("socat", "-T", "10", "-", at_the_host)) == (0, "answer\n")


def everything_is_apart(near: Neighbours) -> None:
    web1, web2, evil = near.web1, near.web2, near.evil
    host = f"203.0.113.{near.host.number()}"
    from_web1 = [evil.address, gateway(evil), host, gateway(web1), "web2"]
    from_evil = [web1.address, web2.address, gateway(web1), host, gateway(evil)]
    with ThreadPoolExecutor() as pool:
        by_web1, by_evil = pool.map(reached, (web1, evil), (from_web1, from_evil))
    assert by_web1 == [f"{gateway(web1)} answers", "web2 answers", "web2 has SSH"]
    assert by_evil == [f"{gateway(evil)} answers"]


def reached(guest: Guest, others: list[str]) -> list[str]:
    """Which of *others* answer pings, and which have an sshd that does, all of them tried at the same time."""
    tries = [f"ping -c 1 -W 3 {other} | grep -q ttl= && echo {other} answers" for other in others]
    tries += [f"nc -w 3 {other} 22 </dev/null | grep -q SSH && echo {other} has SSH" for other in others]
    return sorted(guest.sh(f"({' & '.join(tries)} & wait) 2>/dev/null").splitlines())


def gateway(guest: Guest) -> str:
    return guest.address.rpartition(".")[0] + ".1"


def leased(guest: Guest, tries: int = 5) -> bool:
    """Does the DHCP server answer it?"""
    return "obtained" in guest.run(f"udhcpc -n -q -t {tries} -T 2 -i eth0 -s /bin/true")[1]


def echoed(guest: Guest, where: str, seconds: int = 10) -> bool:
    return guest.run(f"echo hello there | nc -w {seconds} {where} 7")[1] == "hello there\n"


def in_the_way(host: Host) -> list[str]:
    """The firewalls that doctor complains of, as it calls them."""
    return re.findall(r"^WARN +routing +(.*), and nothing there names our bridges", host.admin("doctor").stdout, re.MULTILINE)


# --- resolvers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def resolved(near: Neighbours) -> Iterator[Host]:
    """systemd-resolved, which asks a name server that knows nothing of VMs."""
    host = near.host
    host.sh("mkdir -p /etc/systemd/resolved.conf.d")
    host.exec("tee", "/etc/systemd/resolved.conf.d/own.conf", stdin=f"[Resolve]\nDNS={near.outside}\n")
    host.sh("systemctl start systemd-resolved")
    yield host
    host.sh("systemctl stop systemd-resolved; rm -r /etc/systemd/resolved.conf.d")


def resolved_commands() -> list[str]:
    """What the header of our example says is to be typed, at the place where the example is installed."""
    with open(f"{TREE}/etc/examples/resolved-vmshell.conf", encoding="utf-8") as file:
        lines = re.findall(r"^#     (mkdir .*|systemctl .*)$", file.read(), re.MULTILINE)
    return [line.replace("cp ", "cp /usr/local/share/vmshell/examples/") for line in lines]


def test_systemd_resolved_knows_the_names(near: Neighbours, resolved: Host) -> None:
    assert resolved.exec("resolvectl", "query", "web1.alice.vm", check=False).returncode != 0
    commands = resolved_commands()
    assert len(commands) == 2
    for command in commands:
        resolved.sh(command)
    answer = resolved.exec("resolvectl", "query", "web1.alice.vm").stdout
    assert near.web1.address in answer and address6(near.web1) in answer
    assert "web1.alice.vm" in resolved.exec("resolvectl", "query", near.web1.address).stdout
    assert near.outside in resolved.exec("resolvectl", "query", "outside.test").stdout
    assert "not found" in resolved.exec("resolvectl", "query", "nothing.alice.vm", check=False).stderr
