"""Networks on an installed host, with real guests: what finds each other, who can do nothing to whom, and what outlives a kill.

The host's kernel sends bridged frames through IP filters (br_netfilter), as it does wherever Docker has been; nothing here turns
that off. `outside` is this machine, beside the host in the hosts' own network.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.host.guest import Guest
from tests.host.machine import Host

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

PRIVATE = "192.168.77.1"  # beside the host as well, but not the internet
POLICY = """\
[host]
dns_servers = ["{outside}"]
[networks.users]
kind = "private"
[networks.db]
kind = "service"
outside = "none"
providers = ["carl"]
"""
SERVICES = ("vmshell-tapnet", "vmshell-names", "vmshell-broker")


@dataclass
class World:
    """alice has web1 and web2, bob has evil, carl has db on a service network that web2 and evil use."""

    host: Host
    outside: str
    web1: Guest
    web2: Guest
    evil: Guest
    db: Guest


@pytest.fixture(scope="module")
def outside(host: Host) -> Iterator[str]:
    """The address of a machine beyond the host, that answers pings, names in outside.test and, on port 7, every byte."""
    address = f"203.0.113.{100 + host.number()}"
    subprocess.run(host.outside("ip", "addr", "add", f"{address}/32", "dev", "lan0"), check=True)
    subprocess.run(host.outside("ip", "addr", "replace", f"{PRIVATE}/32", "dev", "lan0"), check=True)
    resolver = ["dnsmasq", "-d", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces"]
    names = ["--except-interface=lo", f"--listen-address={address}", f"--address=/outside.test/{address}", f"--address=/private.test/{PRIVATE}"]
    echo = ["socat", f"TCP-LISTEN:7,bind={address},fork,reuseaddr", "EXEC:cat"]
    programs = [subprocess.Popen(host.outside(*argv), stderr=subprocess.DEVNULL) for argv in ([*resolver, *names], echo)]
    host.sh(f"ip route add {PRIVATE}/32 dev lan0")
    yield address
    for program in programs:
        program.terminate()
        program.wait(20)
    subprocess.run(host.outside("ip", "addr", "del", f"{address}/32", "dev", "lan0"), check=True)


@pytest.fixture(scope="module")
def world(host: Host, outside: str) -> Iterator[World]:
    host.add_user("carl")
    host.put_image("netdemo")
    host.exec("tee", "/etc/vmshell/policy.toml", stdin=POLICY.format(outside=outside))
    host.sh("systemctl restart vmshell-broker")
    if __import__("os").environ.get("TMP_NOBR"): host.sh("echo 0 >/proc/sys/net/bridge/bridge-nf-call-iptables")
    web1 = Guest(host, "alice", "web1").make()
    web2 = Guest(host, "alice", "web2").make("net1.network=db")
    evil = Guest(host, "bob", "evil").make("net1.network=db")
    db = Guest(host, "carl", "db").make("net0.network=db")
    for guest in (web1, web2, evil, db):
        guest.boot()
    for guest in (web1, web2, evil, db):
        guest.ready()
    yield World(host, outside, web1, web2, evil, db)
    for guest in (web1, web2, evil, db):
        guest.detach()


# --- what finds each other --------------------------------------------------------------------------------------------


def test_own_vms_find_each_other_by_name(world: World) -> None:
    assert world.web1.reaches("web2") and world.web2.reaches("web1")
    assert world.web1.reaches("web2.alice.vm")
    assert "web2.alice.vm" in world.web1.sh(f"nslookup {world.web2.address}")
    assert world.web1.sh("hostname") == "web1\n"


def test_the_outside_by_name(world: World) -> None:
    assert world.web1.reaches("outside.test") and world.evil.reaches("outside.test")
    assert world.web1.sh("echo hello there | nc -w 5 outside.test 7") == "hello there\n"


def test_the_outside_is_not_a_private_network(world: World) -> None:
    assert world.host.exec("ping", "-c", "1", "-W", "5", PRIVATE).returncode == 0
    assert not world.web1.reaches("private.test")


def test_the_host_resolves_the_names(world: World) -> None:
    world.host.sh("cp /etc/resolv.conf /root/; echo nameserver 127.77.0.53 >/etc/resolv.conf")
    try:
        assert world.host.exec("getent", "ahostsv4", "web1.alice.vm").stdout.split()[0] == world.web1.address
        assert "web1.alice.vm" in world.host.exec("getent", "hosts", world.web1.address).stdout
        assert world.host.exec("getent", "ahostsv4", "outside.test").stdout.split()[0] == world.outside
    finally:
        world.host.sh("cp /root/resolv.conf /etc/")


def test_a_guest_reaches_no_service_of_the_host(world: World) -> None:
    """E19, E20: sshd listens on every address of the host."""
    host_addresses = world.host.sh("ip -4 -o addr show scope global | awk '{print $4}' | cut -d/ -f1").split()
    assert len(host_addresses) >= 3
    for address in host_addresses:
        assert world.web1.run(f"nc -w 3 {address} 22")[0] != 0, address
    assert world.web1.run("nc -w 3 127.77.0.53 53")[0] != 0
    world.web1.sh("nslookup web2.alice.vm")  # which is what the gateway is for


def test_doctor_is_content(world: World) -> None:
    text = world.host.admin("doctor", check=False).stdout
    assert "FAIL" not in text, text
    for subject in ("network", "names", "routing"):
        assert f"OK    {subject}" in text, text


# --- what can do nothing to whom --------------------------------------------------------------------------------------


def test_bob_does_not_reach_alices_vms(world: World) -> None:
    for target in (world.web1, world.web2):
        target.sh("nc -ll -p 80 -e cat >/dev/null 2>&1 &")
        assert not world.evil.reaches(target.address)
        assert world.evil.run(f"nc -w 3 {target.address} 80 </dev/null")[0] != 0
        assert world.evil.run(f"nc -w 3 {target.address} 22 </dev/null")[0] != 0
        target.run("killall nc")


def seen(watcher: Guest, seconds: int, meanwhile: Callable[[], object]) -> list[str]:
    """The frames that reach *watcher* while *meanwhile* happens, in hex."""
    watcher.sh(f"frames watch eth0 {seconds} >/tmp/seen &")
    wait_for(lambda: "watching" in watcher.run("cat /tmp/seen")[1])
    meanwhile()
    wait_for(lambda: "watched" in watcher.run("tail -n 1 /tmp/seen")[1])
    return watcher.sh("cat /tmp/seen").split("\n")[1:-2]


def test_bob_sees_no_frame_of_alices(world: World) -> None:
    def talk() -> None:
        world.web1.sh("ip neigh flush dev eth0; ping -c 3 web2; arping -c 2 -I eth0 10.77.250.1 || true")

    frames = seen(world.evil, 15, talk)
    for guest in (world.web1, world.web2):
        assert not [frame for frame in frames if hardware(guest) in frame or address_hex(guest.address) in frame]
    # The same program sees such frames where they may be seen.
    assert [frame for frame in seen(world.web2, 15, talk) if hardware(world.web1) in frame]


def test_bob_cannot_be_alices_vm(world: World) -> None:
    """With her addresses, with her MAC, with both; for the gateway, for the host, for her other VM, and for the DHCP server."""
    evil, web1, host = world.evil, world.web1, world.host
    own = hardware(evil)
    evil.sh("killall udhcpc; ip addr save dev eth0 2>/dev/null; true")
    for change in (
        f"ip addr add {web1.address}/24 dev eth0",
        f"ip link set eth0 down; ip link set eth0 address {colons(hardware(web1))}; ip link set eth0 up",
    ):
        evil.sh(change)
        evil.run(f"arping -c 3 -U -I eth0 {web1.address}")
        evil.run(f"ping -c 2 -W 1 -I {web1.address} 10.77.0.1; ping -c 2 -W 1 -I {web1.address} {world.web2.address}")
        lease = evil.run("udhcpc -n -q -t 3 -T 2 -i eth0 -s /bin/true")
        assert "obtained" not in lease[1] or world.evil.address in lease[1]
        neighbours = host.sh("ip neigh; bridge fdb show")
        assert f"{web1.address} dev {bridge_of(world, evil)}" not in neighbours
        assert f"{colons(hardware(web1))} dev {tap_of(world, evil)}" not in neighbours
        assert world.web2.reaches("web1") and web1.reaches("outside.test")
    evil.sh(f"ip link set eth0 down; ip link set eth0 address {colons(own)}; ip addr flush dev eth0; ip link set eth0 up")
    evil.sh("udhcpc -b -S -i eth0 -s /etc/udhcpc.script >/dev/null 2>&1 &")
    evil.ready()
    assert evil.reaches("outside.test")


def forged(world: World) -> dict[str, str]:
    """Frames in hex that no guest may send: to web2, or to everybody."""
    mine, hers, all_ = hardware(world.evil), hardware(world.web1), "ffffffffffff"
    victim, gateway = hardware(world.web2), address_hex("10.77.1.1")
    her_ip, my_ip = address_hex(world.web1.address), address_hex(world.evil.address)
    arp = "0806" + "0001080006040002"
    fe80 = "fe80" + "00" * 13 + "01"
    advert = "86dd6000000000183aff" + fe80 + "ff02" + "00" * 13 + "01" + "8600000040000708" + "00" * 8 + "0101" + mine
    return {
        "her-mac": all_ + hers + arp + hers + her_ip + all_ + her_ip,
        "her-ip-by-arp": all_ + mine + arp + mine + her_ip + all_ + her_ip,
        "gateway-by-arp": all_ + mine + arp + mine + gateway + all_ + gateway,
        "vlan": all_ + mine + "8100000a" + arp + mine + my_ip + all_ + my_ip,
        "bpdu": "0180c2000000" + mine + "0026424203" + "00" * 35,
        "lldp": "0180c200000e" + mine + "88cc" + "0207040000" + "00" * 20,
        "router-advertisement": "333300000001" + mine + advert,
        "to-her-mac": victim + mine + arp + mine + my_ip + victim + my_ip,
    }


def test_no_forged_frame_gets_anywhere(world: World) -> None:
    """E10 to E18 from a real guest; the tests of tapnet try many more, frame by frame."""
    frames = forged(world)
    routes = world.host.sh("ip route; ip -6 route; ip neigh")

    def attack() -> None:
        assert world.evil.sh(f"frames send eth0 {' '.join(frames.values())}") == f"sent {len(frames)}\n"

    for watcher in (world.web1, world.web2):
        received = seen(watcher, 12, attack)
        assert not [frame for frame in received if hardware(world.evil) in frame], received
    now = world.host.sh("ip route; ip -6 route; ip neigh")
    assert [line for line in now.splitlines() if "ra" in line.split() and line not in routes] == []
    assert f"10.77.1.1 dev {bridge_of(world, world.evil)}" not in now
    assert f"{world.web1.address} dev {bridge_of(world, world.evil)}" not in now
    assert "fe80" not in world.host.sh("ip -6 addr show | grep -A3 vt", check=False)


# --- a service for all ------------------------------------------------------------------------------------------------


def test_a_service_is_used_by_both_and_its_users_do_not_meet(world: World) -> None:
    db, web2, evil = world.db, world.web2, world.evil
    for guest in (web2, evil):
        guest.sh("ip link set eth1 up; udhcpc -n -i eth1 -s /etc/udhcpc.script >/dev/null 2>&1")
    addresses = {guest.name: guest.sh("ip -4 -o addr show eth1").split()[3].partition("/")[0] for guest in (web2, evil)}
    db.sh("nc -ll -p 5432 -e cat >/dev/null 2>&1 &")
    db.sh("nc -ll -p 5433 -e cat >/dev/null 2>&1 &")
    for guest in (web2, evil):
        assert guest.run(f"echo query | nc -w 3 {db.address} 5432")[1] != "query\n"  # nothing is published yet
    db.vmshell("publish db 5432 --to alice")
    db.vmshell("publish db 5432 --to bob")
    for guest in (web2, evil):
        assert guest.sh(f"echo query | nc -w 5 {db.address} 5432") == "query\n"
        assert guest.run(f"echo query | nc -w 3 {db.address} 5433")[1] != "query\n"
    web2.sh("nc -ll -p 5432 -e cat >/dev/null 2>&1 &")
    assert not evil.reaches(addresses["web2"]) and not web2.reaches(addresses["evil"])
    assert evil.run(f"echo query | nc -w 3 {addresses['web2']} 5432")[1] != "query\n"
    # Nor by way of the gateway, which would have to send it back where it came from.
    gateway = ".".join([*db.address.split(".")[:3], "1"])
    evil.sh(f"ip route add {addresses['web2']}/32 via {gateway} dev eth1")
    assert not evil.reaches(addresses["web2"])
    assert evil.run(f"echo query | nc -w 3 {addresses['web2']} 5432")[1] != "query\n"
    db.vmshell("publish db 5432 --to bob --remove")
    assert evil.run(f"echo query | nc -w 3 {db.address} 5432")[1] != "query\n"
    assert web2.sh(f"echo query | nc -w 5 {db.address} 5432") == "query\n"


# --- what outlives a kill ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_connections_outlive(world: World, service: str) -> None:
    """kill -9: between guests and through NAT the connection goes on, and what depends on the service works again."""
    host, web1, web2 = world.host, world.web1, world.web2
    web2.run("killall nc")
    web2.sh("nc -ll -p 7 -e cat >/dev/null 2>&1 &")
    peers = {"neighbour": web2.address, "outside": world.outside}
    for name, address in peers.items():
        web1.sh(f"rm -f /tmp/{name}.*; mkfifo /tmp/{name}.in; sleep 600 >/tmp/{name}.in & ")
        web1.sh(f"nc {address} 7 </tmp/{name}.in >/tmp/{name}.out 2>&1 &")
        web1.sh(f"echo before >/tmp/{name}.in")
        wait_for_words(web1, name, "before")
    pid = host.sh(f"systemctl show -P MainPID {service}")
    host.sh(f"systemctl kill -s KILL --kill-whom=main {service}")
    for name in peers:
        web1.sh(f"echo during >/tmp/{name}.in")
        wait_for_words(web1, name, "before during")
    wait_for(lambda: host.sh(f"systemctl show -P MainPID {service}") not in (pid, "0\n"))
    wait_for(lambda: "FAIL" not in host.admin("doctor", check=False).stdout)
    for name in peers:
        web1.sh(f"echo afterwards >/tmp/{name}.in")
        wait_for_words(web1, name, "before during afterwards")
    web1.run("killall nc sleep")
    assert web1.reaches("web2") and web1.reaches("outside.test")
    assert not world.evil.reaches(web1.address)
    assert world.web2.sh("udhcpc -n -q -t 5 -T 3 -i eth0 -s /bin/true 2>&1 | grep -c obtained") == "1\n"


def wait_for_words(guest: Guest, name: str, words: str) -> None:
    """What came back on the connection *name*."""
    wait_for(lambda: guest.run(f"cat /tmp/{name}.out")[1].split() == words.split())


def test_a_flushed_ruleset_is_back_within_two_seconds(world: World) -> None:
    host = world.host
    before = tables(host)
    assert "vt000001n0" in before
    host.sh("nft flush ruleset")
    wait_for(lambda: tables(host) == before, 2.0)
    assert world.web1.reaches("web2") and not world.evil.reaches(world.web1.address)
    host.sh("nft delete table bridge vmshell")
    wait_for(lambda: tables(host) == before, 2.0)


def tables(host: Host) -> str:
    """Our two tables without what changes by itself."""
    text = host.sh("nft -s list table inet vmshell; nft -s list table bridge vmshell", check=False)
    lines = [line for line in text.splitlines() if "expires" not in line and "elements = { " not in line or "vt" in line]
    return "\n".join(sorted(line.strip() for line in lines if "expires" not in line))


# --- helpers ----------------------------------------------------------------------------------------------------------


def hardware(guest: Guest) -> str:
    """The MAC of its first card, as it is in frames."""
    return guest.host.sh(f"cat /run/vmshell/names/dhcp-hosts/* | grep -w {guest.address}").split(",")[0].replace(":", "")


def colons(mac: str) -> str:
    return ":".join(mac[at : at + 2] for at in range(0, 12, 2))


def address_hex(address: str) -> str:
    return bytes(map(int, address.split("."))).hex()


def tap_of(world: World, guest: Guest) -> str:
    row = world.host.sh(f"bridge fdb show | grep '{colons(hardware(guest))} .* static'")
    return row.split()[2]


def bridge_of(world: World, guest: Guest) -> str:
    return world.host.sh(f"basename $(readlink /sys/class/net/{tap_of(world, guest)}/master)").strip()


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
