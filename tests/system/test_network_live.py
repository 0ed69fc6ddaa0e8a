"""Networks of a VM that runs: its cable, a card that comes and goes, figures and limits; networks that are gone or full."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from tests.host.guest import Guest
from tests.host.machine import Host
from tests.host.world import wait_for
from vmshell.refusals import NoAddress

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

POLICY = """\
[networks.lan]
kind = "shared"
members = ["alice"]
[networks.office]
kind = "bridged"
bridge = "br9"
[user.alice]
nics_max = 4
user_nics = 12
vms_max = 20
"""


@pytest.fixture(scope="module")
def web1(host: Host) -> Iterator[Guest]:
    host.put_image("netdemo")
    load(host, POLICY)
    guest = Guest(host, "alice", "web1").make().boot().ready()
    yield guest
    guest.detach()


def load(host: Host, policy: str) -> None:
    host.exec("tee", "/etc/vmshell/policy.toml", stdin=policy)
    host.admin("policy", "load")


def cards(guest: Guest) -> dict[str, dict[str, object]]:
    return {card["name"]: card for card in json.loads(guest.vmshell(f"net {guest.name} --json"))["cards"]}


def changes(guest: Guest, command: str) -> str:
    """What is said about a change, on either stream."""
    status, out, err = guest.host.run(guest.user, command, timeout=120)
    assert status == 0, out + err
    return out + err


def test_the_guest_sees_its_cable_pulled(web1: Guest) -> None:
    assert web1.sh("cat /sys/class/net/eth0/carrier") == "1\n"
    web1.vmshell("set web1 net0.link=down")
    wait_for(lambda: web1.sh("cat /sys/class/net/eth0/carrier") == "0\n")
    web1.vmshell("set web1 net0.link=up")
    wait_for(lambda: web1.sh("cat /sys/class/net/eth0/carrier") == "1\n")


def test_a_card_comes_and_goes_while_it_runs(web1: Guest) -> None:
    said = changes(web1, "set web1 net1=lan")
    assert "changed now: net1" in said, said
    wait_for(lambda: web1.run("test -e /sys/class/net/eth1")[0] == 0)
    web1.sh("ip link set eth1 up; udhcpc -n -q -i eth1 -s /etc/udhcpc.script")
    address = str(cards(web1)["net1"]["address"])
    assert address in web1.sh("ip addr show eth1") and address.rpartition(".")[0] != web1.address.rpartition(".")[0]
    assert web1.reaches(address.rpartition(".")[0] + ".1")
    tap = str(cards(web1)["net1"]["tap"])
    web1.host.exec("test", "-e", f"/sys/class/net/{tap}")

    said = changes(web1, "unset web1 net1")
    assert "changed now: net1" in said, said
    wait_for(lambda: web1.run("test -e /sys/class/net/eth1")[0] != 0)
    wait_for(lambda: web1.host.exec("test", "-e", f"/sys/class/net/{tap}", check=False).returncode != 0)
    wait_for(lambda: tap not in web1.host.sh("nft list ruleset"))  # the count of its broadcasts is kept for seconds
    assert web1.reaches("10.77.0.1"), "the other card is not affected"


def test_a_card_of_the_launch_line_waits_for_the_next_boot(web1: Guest) -> None:
    """q35 holds it in a place that nothing can be pulled out of: the VM is told so, and keeps it whole."""
    said = changes(web1, "unset web1 net0")
    assert said == "web1: running\nat the next boot: net0\n"
    assert web1.reaches("10.77.0.1")
    web1.vmshell("set web1 net0=users")


def test_another_network_at_the_next_boot(web1: Guest) -> None:
    """Until then everything is as it was: the segment, the address, the name."""
    moved = Guest(web1.host, "alice", "moved").make().boot().ready()
    old = moved.address
    said = changes(moved, "set moved net0.network=lan")
    assert said.startswith("moved: running\nat the next boot: net0"), said
    assert cards(moved)["net0"]["network"] == "users" and cards(moved)["net0"]["address"] == old
    assert moved.reaches("web1", 1)
    assert f"Address: {old}" in web1.sh("nslookup moved.alice.vm 10.77.0.1")

    moved.detach()
    moved.vmshell("kill moved")
    moved.boot().ready()
    assert cards(moved)["net0"]["network"] == "lan" and cards(moved)["net0"]["address"] == moved.address
    assert moved.address.rpartition(".")[0] != old.rpartition(".")[0]
    assert moved.reaches(moved.address.rpartition(".")[0] + ".1", 1) and not moved.reaches(web1.address, 1)
    answer = web1.sh("nslookup moved.alice.vm 10.77.0.1")
    assert f"Address: {moved.address}" in answer and old not in answer
    assert "moved.alice.vm" in web1.sh(f"nslookup {moved.address} 10.77.0.1")
    assert "moved.alice.vm" not in web1.run(f"nslookup {old} 10.77.0.1")[1]
    moved.detach()
    moved.vmshell("kill moved")
    moved.vmshell("rm moved --yes")


def test_figures_and_the_rate(web1: Guest) -> None:
    before = cards(web1)["net0"]
    web1.sh("ping -c 20 -i 0.1 -s 1000 10.77.0.1 >/dev/null || ping -c 5 -s 1000 10.77.0.1")
    after = cards(web1)["net0"]
    for figure in ("rx_bytes", "tx_bytes"):
        assert int(str(after[figure])) > int(str(before[figure])) + 4000, figure
    assert before["rate"] == 0

    load(web1.host, POLICY + "net_rate = 800\n")
    web1.vmshell("kill web1")
    web1.detach()
    assert cards(web1)["net0"]["address"] == web1.address, "an address is for good"
    web1.boot().ready()
    assert cards(web1)["net0"]["rate"] == 800
    # 100 kB/s towards the guest: a megabyte takes ten seconds, less what the bucket holds.
    web1.sh("nc -l -p 9 >/dev/null &")
    time.sleep(1)
    start = time.monotonic()
    web1.host.sh(f"head -c 1000000 /dev/zero | nc -N {web1.address} 9", timeout=120)
    assert time.monotonic() - start > 4
    load(web1.host, POLICY)


# --- what is gone, full or somebody else's ----------------------------------------------------------------------------


def refusal(guest: Guest, command: str) -> str:
    status, out, err = guest.host.run(guest.user, command, timeout=120)
    assert status != 0, out
    return err


def test_a_bridge_of_the_hosts_that_is_not_there(web1: Guest) -> None:
    other = Guest(web1.host, "alice", "web2").make("net0.network=office")
    assert "br9" in refusal(other, "boot web2")
    web1.host.sh("ip link add br9 type bridge; ip link set br9 up")
    other.boot()
    tap = str(cards(other)["net0"]["tap"])
    assert web1.host.sh(f"basename $(readlink /sys/class/net/{tap}/master)").strip() == "br9"
    other.vmshell("kill web2")
    web1.host.sh("ip link del br9")


def test_a_network_that_the_policy_no_longer_has(web1: Guest) -> None:
    """Running VMs keep it; the next boot says what there is."""
    other = Guest(web1.host, "alice", "web3").make("net0.network=lan").boot().ready()
    load(web1.host, POLICY.replace("networks.lan", "networks.lan2"))
    assert other.reaches(other.address.rpartition(".")[0] + ".1")
    web1.host.sh("systemctl kill -s KILL vmshell-broker; systemctl kill -s KILL vmshell-tapnet")
    wait_for(lambda: web1.host.run("alice", "list", timeout=60)[0] == 0)
    web1.host.sh("sleep 2")
    assert other.reaches(other.address.rpartition(".")[0] + ".1"), "also with another broker and another tapnet"
    other.detach()
    other.vmshell("kill web3")
    assert "lan" in refusal(other, "boot web3")
    load(web1.host, POLICY)


def test_bob_is_not_a_member(web1: Guest) -> None:
    bobs = Guest(web1.host, "bob", "web1").make()
    said = refusal(bobs, "set web1 net0.network=lan")
    assert "not allowed" in said and "users" in said


def test_an_interface_of_the_same_name(web1: Guest) -> None:
    number = json.loads(Guest(web1.host, "alice", "web4").make().vmshell("info web4 --json"))["number"]
    web1.host.sh(f"ip link add vt{number:06x}n0 type bridge")
    said = refusal(web1, "boot web4")
    assert f"vt{number:06x}n0" in said, said
    web1.host.sh(f"ip link del vt{number:06x}n0")
    web1.vmshell("boot web4")
    web1.vmshell("kill web4")


def test_without_tapnet_nothing_starts_and_what_runs_goes_on(web1: Guest) -> None:
    host = web1.host
    host.sh("systemctl stop vmshell-tapnet.socket vmshell-tapnet.service")
    try:
        assert "network service does not answer" in refusal(web1, "boot web4")
        assert web1.reaches("10.77.0.1")
    finally:
        host.sh("systemctl start vmshell-tapnet.socket vmshell-tapnet.service")
    wait_for(lambda: host.run("alice", "boot web4", timeout=60)[0] == 0)
    web1.vmshell("kill web4")


def test_dnsmasq_is_missing(web1: Guest) -> None:
    host = web1.host
    host.sh("mv /usr/sbin/dnsmasq /usr/sbin/dnsmasq.away")
    try:
        assert "apt-get install dnsmasq-base" in refusal(web1, "boot web4")
    finally:
        host.sh("mv /usr/sbin/dnsmasq.away /usr/sbin/dnsmasq")


def test_nothing_is_left_of_vms_that_have_ended(web1: Guest) -> None:
    """No tap, no element of a set, no file of dnsmasq's."""
    web1.vmshell("boot web4")
    number = json.loads(web1.vmshell("info web4 --json"))["number"]
    web1.vmshell("kill web4")
    web1.vmshell("rm web4 --yes")
    tap = f"vt{number:06x}n0"
    wait_for(lambda: tap not in web1.host.sh("nft list ruleset; ip link"))
    assert str(number) not in web1.host.sh("ls /run/vmshell/names/hosts /run/vmshell/names/dhcp-hosts").split()


SMALL = """\
[host]
ipv4_pool = "10.78.0.0/28"
segment_prefix = 29
"""


def test_a_pool_that_is_full(web1: Guest) -> None:
    """Two segments of five addresses each. The last test of this host: it takes all VMs of those before away."""
    host = web1.host
    web1.detach()
    for user in ("alice", "bob"):
        for vm in json.loads(host.run(user, "list --json")[1])["vms"]:
            host.run(user, f"kill {vm['name']}")
            assert host.run(user, f"rm {vm['name']} --yes")[0] == 0
    host.exec("tee", "/etc/vmshell/policy.toml", stdin=SMALL + POLICY)
    host.sh("systemctl restart vmshell-broker")

    first = Guest(host, "alice", "web1").make().boot()
    second = Guest(host, "alice", "web2").make("net1=users", "net2=users", "net3=users").boot()
    bobs = Guest(host, "bob", "web1").make().boot()
    second.vmshell("kill web2")  # an address is for good, not for as long as a VM runs
    bobs.vmshell("kill web1")
    last = Guest(host, "alice", "web3").make()
    no_address = NoAddress(network="users", size="5 addresses")
    status, _, said = host.run("alice", "boot web3")
    assert status == no_address.exit_status and no_address.sentence() in said and no_address.hint in said
    last.vmshell("set web3 net0.network=lan")
    assert NoAddress(network="lan", size="2 segments").sentence() in refusal(last, "boot web3")
    assert first.ready().address == "10.78.0.2"
    assert first.reaches("10.78.0.1") and "obtained" in first.sh("udhcpc -n -q -t 5 -T 3 -i eth0 -s /bin/true 2>&1")
    first.detach()

    bobs.vmshell("rm web1 --yes")
    last.boot()
    assert IPv4Address(cards(last)["net0"]["address"]) in IPv4Network("10.78.0.8/29")
