"""Networks on an installed host, with real guests: what finds each other, who can do nothing to whom, what outlives a kill."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.host.guest import PATIENCE, Connection, Guest
from tests.host.world import (
    World,
    address_hex,
    bridge_of,
    colons,
    hardware,
    outside,
    private,
    said,
    tables,
    tap_of,
    wait_for,
    world,
)

__all__ = ["outside", "world"]

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

SERVICES = ("vmshell-tapnet", "vmshell-names", "vmshell-broker")


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
    world.host.exec("nc", "-z", "-w", "5", private(world.host), "7")
    assert not world.web1.reaches("private.test")
    assert world.web1.run("nc -w 3 private.test 7 </dev/null")[0] != 0


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


def seen(watcher: Guest, seconds: int, meanwhile: Callable[[], object], card: str = "eth0") -> list[str]:
    """The frames that reach *watcher* while *meanwhile* happens, in hex."""
    watcher.sh(f"frames watch {card} {seconds} >/tmp/seen &")
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


def forged(mine: str, my_ip: str, hers: str, her_ip: str, gateway: str) -> dict[str, str]:
    """Frames that no guest may send, in hex; *mine*: the sender's own MAC."""
    all_, arp = "ffffffffffff", "0806" + "0001080006040002"
    advert = "86dd6000000000183afffe80" + "00" * 13 + "01ff02" + "00" * 13 + "018600000040000708" + "00" * 8 + "0101" + mine
    return {
        "her MAC": all_ + hers + arp + hers + her_ip + all_ + her_ip,
        "her address": all_ + mine + arp + mine + her_ip + all_ + her_ip,
        "her address in an answer to her": hers + mine + arp + mine + gateway + hers + her_ip,
        "the gateway's address": all_ + mine + arp + mine + gateway + all_ + gateway,
        "another MAC within ARP": all_ + mine + arp + hers + my_ip + all_ + my_ip,
        "a VLAN": all_ + mine + "8100000a" + arp + mine + my_ip + all_ + my_ip,
        "spanning tree": "0180c2000000" + mine + "0026424203" + "00" * 35,
        "LLDP": "0180c200000e" + mine + "88cc0207040000" + "00" * 20,
        "a router advertisement": "333300000001" + mine + advert,
        "her address in IP": hers + mine + "0800" + datagram(her_ip, her_ip),
        "an answer by DHCP": all_ + mine + "0800" + datagram(my_ip, "ffffffff", "00430044"),
    }


def datagram(source: str, to: str, ports: str = "00350035") -> str:
    """An IPv4 packet with an empty UDP datagram, in hex."""
    head = bytes.fromhex("4500001c00004000401100" + "00" + source + to)
    total = sum(int.from_bytes(head[at : at + 2], "big") for at in range(0, 20, 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:10].hex() + f"{~total & 0xFFFF:04x}" + head[12:].hex() + ports + "00080000"


def test_no_forged_frame_gets_anywhere(world: World) -> None:
    """E10 to E18 from a real guest; the tests of tapnet try many more, frame by frame."""
    evil = world.evil
    gateway = ".".join([*evil.address.split(".")[:3], "1"])
    mine, my_ip = hardware(evil), address_hex(evil.address)
    frames = forged(mine, my_ip, hardware(world.web1), address_hex(world.web1.address), address_hex(gateway))
    routes = world.host.sh("ip route; ip -6 route")
    addresses = world.host.sh("ip -6 addr")
    for watcher in (world.web1, world.web2):
        received = seen(watcher, 10, lambda: send(evil, "eth0", frames))
        assert not [frame for frame in received if mine in frame], received
    assert world.host.sh("ip route; ip -6 route") == routes and world.host.sh("ip -6 addr") == addresses
    neighbours = world.host.sh("ip neigh")
    assert f"{world.web1.address} dev {bridge_of(world, evil)}" not in neighbours and f"{gateway} dev" not in neighbours


def test_no_forged_frame_gets_to_a_neighbour_on_a_service_network(world: World) -> None:
    """The same on a bridge that bob shares with alice: a legal frame gets to the provider, none to another user."""
    db, web2, evil = world.db, world.web2, world.evil
    for guest in (web2, evil):
        second_card(guest)
    gateway = ".".join([*db.address.split(".")[:3], "1"])
    mine, her_ip = evil.sh("cat /sys/class/net/eth1/address").strip().replace(":", ""), second_address(web2)
    my_ip, hers = second_address(evil), web2.sh("cat /sys/class/net/eth1/address").strip().replace(":", "")
    frames = forged(mine, address_hex(my_ip), hers, address_hex(her_ip), address_hex(gateway))
    question = "08060001080006040001" + mine + address_hex(my_ip) + "00" * 6 + address_hex(db.address)
    frames["an honest question"] = "ffffffffffff" + mine + question
    at_db = seen(db, 10, lambda: send(evil, "eth1", frames))
    assert [frame[:84] for frame in at_db if mine in frame] == [frames["an honest question"]]
    at_web2 = seen(web2, 10, lambda: send(evil, "eth1", frames), "eth1")
    assert not [frame for frame in at_web2 if mine in frame], at_web2


def send(guest: Guest, card: str, frames: dict[str, str]) -> None:
    assert guest.sh(f"frames send {card} {' '.join(frames.values())}") == f"sent {len(frames)}\n"


# --- a service for all ------------------------------------------------------------------------------------------------


def test_a_service_is_used_by_both_and_its_users_do_not_meet(world: World) -> None:
    db, web2, evil = world.db, world.web2, world.evil
    for guest in (web2, evil):
        second_card(guest)
    addresses = {guest.name: second_address(guest) for guest in (web2, evil)}
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
    db.vmshell("unpublish db 5432 --to bob")
    assert evil.run(f"echo query | nc -w 3 {db.address} 5432")[1] != "query\n"
    assert web2.sh(f"echo query | nc -w 5 {db.address} 5432") == "query\n"


def second_card(guest: Guest) -> None:
    guest.sh("ip link set eth1 up; ip addr show eth1 | grep -q 'inet ' || udhcpc -n -q -i eth1 -s /etc/udhcpc.script")


def second_address(guest: Guest) -> str:
    return guest.sh("ip -4 -o addr show eth1").split()[3].partition("/")[0]


# --- what outlives a kill ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_connections_outlive(world: World, service: str) -> None:
    """kill -9: between guests and through NAT the connection goes on, and what depends on the service works again."""
    host, web1, web2 = world.host, world.web1, world.web2
    web2.run("killall nc")
    web2.sh("nc -ll -p 7 -e cat >/dev/null 2>&1 &")
    connections = [Connection(web1, web2.address), Connection(web1, world.outside)]
    for connection in connections:
        connection.carries("before")
    pid = host.sh(f"systemctl show -P MainPID {service}")
    host.sh(f"systemctl kill -s KILL --kill-whom=main {service}")
    for connection in connections:
        connection.carries("during")
    wait_for(lambda: host.sh(f"systemctl show -P MainPID {service}") not in (pid, "0\n"))
    wait_for(lambda: "FAIL" not in host.admin("doctor", check=False).stdout)
    for connection in connections:
        connection.carries("afterwards")
    web1.run("killall nc sleep")
    assert web1.reaches("web2") and web1.reaches("outside.test")
    assert not world.evil.reaches(web1.address)
    assert world.web2.sh("udhcpc -n -q -t 5 -T 3 -i eth0 -s /bin/true 2>&1 | grep -c obtained") == "1\n"


def test_network_repair(world: World) -> None:
    """What somebody took away, and nobody noticed: by the administrator's verb, on demand."""
    host, web1, web2 = world.host, world.web1, world.web2
    tap, mac = tap_of(world, web2), colons(hardware(web2))
    host.sh(f"bridge fdb del {mac} dev {tap} master; ip tuntap add vt00ffffn0 mode tap user 0 group 0")
    assert not web1.reaches("web2", 1)
    done = host.admin("network", "repair")
    assert "the network is as it should be" in done.stdout + done.stderr
    assert web1.reaches("web2") and host.exec("ip", "link", "show", "vt00ffffn0", check=False).returncode != 0


def test_a_flushed_ruleset_is_back_within_two_seconds(world: World) -> None:
    host = world.host
    before = tables(host)
    assert any("vt000001n0" in line for line in before)
    host.sh("nft flush ruleset")
    wait_for(lambda: tables(host) == before, 2.0)
    assert world.web1.reaches("web2") and not world.evil.reaches(world.web1.address)
    host.sh("nft delete table bridge vmshell")
    wait_for(lambda: tables(host) == before, 2.0)


def test_as_after_a_suspend(world: World) -> None:
    """What a container can show of one: our services stand still, the rules are lost meanwhile, the services go on."""
    host, web1, web2 = world.host, world.web1, world.web2
    web2.run("killall nc")
    web2.sh("nc -ll -p 7 -e cat >/dev/null 2>&1 &")
    connections = [Connection(web1, web2.address), Connection(web1, world.outside)]
    for connection in connections:
        connection.carries("before")
    web1.sh("rm -f /run/lease")
    before, processes = tables(host), host.sh(f"systemctl show -P MainPID {' '.join(SERVICES)}")
    host.sh(f"systemctl kill -s STOP --kill-whom=main {' '.join(SERVICES)}")
    host.sh("nft flush ruleset; sleep 1")
    assert not tables(host)
    host.sh(f"systemctl kill -s CONT --kill-whom=main {' '.join(SERVICES)}")
    wait_for(lambda: tables(host) == before, 2.0)
    for connection in connections:
        connection.carries("afterwards")
    web1.sh("killall -USR1 udhcpc")  # renew
    wait_for(lambda: f"ip={web1.address}" in web1.run("cat /run/lease")[1].split())
    assert web1.reaches("web2", 1) and not world.evil.reaches(web1.address, 1)
    assert host.sh(f"systemctl show -P MainPID {' '.join(SERVICES)}") == processes
    web1.run("killall nc sleep")


# --- what comes back with the host, last ------------------------------------------------------------------------------


def test_autostart_and_published_ports_come_back_with_the_host(world: World) -> None:
    """Nobody logs in or connects to the broker: the VM boots, and whoever knocks at its published port is let in."""
    host, web1 = world.host, world.web1
    host.sh("echo 'allow_autostart = true' >>/etc/vmshell/policy.toml; systemctl reload vmshell-broker")
    web1.vmshell("set web1 autostart=true")
    web1.vmshell("publish web1 22 --to world:20001")
    for guest in (web1, world.web2, world.evil, world.db):
        guest.detach()
    host.reboot()
    asked = host.outside("socat", "-T", "10", "-", f"TCP:203.0.113.{host.number()}:20001,connect-timeout=5")
    wait_for(lambda: "SSH-2.0-dropbear" in said(asked)[1], PATIENCE)
    running = host.sh("systemctl list-units --plain --no-legend 'vmshell-vm-*.scope'").splitlines()
    assert len(running) == 1 and not host.sh("journalctl -b -u ssh -o cat --no-pager | grep 'Accepted' || true")
    assert host.exec("systemctl", "is-active", *SERVICES).stdout.split() == ["active"] * len(SERVICES)
