"""N7: a hostile broker speaks to a real tapnet. What concerns the host is for root's policy to say, and is refused otherwise.

In network namespaces of its own, with a host that has a bridge (docker0) and interfaces which the policy says nothing of.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.tapnets import (
    PATIENCE,
    POLICY,
    SETTINGS,
    Namespace,
    Tapnet,
    namespace,
    passes,
    port,
    segment,
    unable,
)
from vmshell.messages import Confine, Health, Open, Port, Segment, Settings, Settle, ToTapnet, Unplug

__all__ = ["namespace"]
REASON = unable()
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

STRICT = """\
[host]
ipv6_pool = "fd77::/48"
[defaults]
forward_ports = "8000-8099"
[group.web]
forward_ports = "9000-9009"
[networks.office]
kind = "bridged"
bridge = "host0"
[networks.lab]
kind = "bridged"
parent = "wire0"
vlan = 12
"""
OFFICE = Segment(segment=1 << 23, kind="bridged", bridge="host0")
LAB = Segment(segment=(1 << 23) + 1, kind="bridged", parent="wire0", vlan=12)
MOVED = STRICT.replace("[host]\n", '[host]\nipv4_pool = "10.99.0.0/16"\n')
BROKER, SERVICE = 64399, 64321  # uids


@pytest.fixture
def host(namespace: Namespace) -> Namespace:
    for bridge in ("docker0", "host0"):
        namespace.run("ip", "link", "add", bridge, "up", "type", "bridge")
    namespace.run("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
    return namespace


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def tapnet(host: Namespace, tmp_path: Path, journal: Path) -> Iterator[Tapnet]:
    with Tapnet(host, tmp_path / "t", policy=STRICT, journal=journal) as running:
        running.settle()
        yield running


def again(tapnet: Tapnet, policy: str) -> None:
    """Another policy, and another tapnet, to which the broker is still to say what there is."""
    tapnet.kill()
    tapnet.put_policy(policy)
    tapnet.start()


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


# --- what is refused --------------------------------------------------------------------------------------------------


def settings(pool4: str = SETTINGS.pool4, pool6: str = SETTINGS.pool6, confined: tuple[int, ...] = ()) -> Settings:
    return Settings(pool4=pool4, pool6=pool6, confined=list(confined))


def opening(host_port: int) -> Open:
    return Open(number=1, nic=0, openings=[{"port": 22, "host_port": host_port}])


AGAINST: dict[str, tuple[str, ToTapnet]] = {
    "a-bridge-of-somebodys": ("bridge", Segment(segment=9, kind="bridged", bridge="docker0")),
    "a-bridge-for-a-private-network": ("bridge", segment(9, bridge="docker0")),
    "a-bridge-of-the-policy-as-a-private-one": ("bridge", segment(9, bridge="host0")),
    "an-interface-of-somebodys": ("parent", Segment(segment=9, kind="bridged", parent="wire1", vlan=12)),
    "another-vlan": ("vlan", Segment(segment=9, kind="bridged", parent="wire0", vlan=13)),
    "a-vlan-for-a-private-network": ("vlan", segment(9, parent="wire0", vlan=12)),
    "an-address-on-a-bridge-of-the-hosts": (
        "gateway4",
        segment(9, kind="bridged", bridge="host0"),
    ),
    "anybodys-address": ("gateway4", segment(9, gateway4="8.8.8.8/8")),
    "a-shorter-prefix": ("gateway4", segment(9, gateway4="10.77.9.1/16")),
    "another-segments-gateway": ("gateway4", segment(9, gateway4="10.77.8.1/24")),
    "a-segment-beyond-the-pool": ("gateway4", segment(300, gateway4="10.78.44.1/24")),
    "anybodys-address-6": ("gateway6", segment(9, gateway6="2001:db8::1/64")),
    "further-out-than-any-network": ("outside", segment(9, outside="all")),
    "an-address-outside-of-the-segment": ("address4", port(2, address4="192.168.1.1")),
    "an-address-of-another-segment": ("address4", port(2, address4="10.77.2.2")),
    "the-gateways-own": ("address4", port(2, address4="10.77.1.1")),
    "an-address-6-outside": ("address6", port(2, address6="fd77:0:0:2::2")),
    "an-address-on-a-bridged-network": ("address4", port(2, segment=OFFICE.segment, address4="10.77.1.9")),
    "another-address-for-one-that-runs": ("address4", port(1, create=False, address4="10.0.0.1")),
    "all-the-world-as-pool": ("pool4", settings(pool4="0.0.0.0/0")),
    "another-pool-6": ("pool6", settings(pool6="2000::/3")),
    "no-pool-6": ("pool6", settings(pool6="")),
    "roots-sockets": ("confined", settings(confined=(0,))),
    "users-without-forwarding": ("confined", settings(confined=(1001,))),
    "more-users-without-forwarding": ("confined", Confine(uids=[1001])),
    "the-hosts-ssh": ("host_port", opening(22)),
    "a-port-beside-the-range": ("host_port", opening(8100)),
}


@pytest.mark.parametrize(("field", "message"), AGAINST.values(), ids=AGAINST)
def test_n7_what_the_policy_does_not_have_is_refused(
    tapnet: Tapnet, host: Namespace, journal: Path, field: str, message: ToTapnet
) -> None:
    tapnet.tell(segment(), OFFICE)
    one = tapnet.plug(port(1))
    before = host.links(), host.filter(), host.run("ip", "addr", "show", "dev", "vtb000001")
    said = tapnet.refused(message)
    assert field in said, said
    if isinstance(message, Port) and message.create:
        assert "vt000002n0" not in host.links()
    # Nor by a new connection that names it.
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.tell(SETTINGS, segment(), OFFICE)
    if not isinstance(message, Port) or not message.create:
        assert field in tapnet.refused(message)
        tapnet.tell(SETTINGS)
    tapnet.tell(port(1, create=False), Settle())
    assert (host.links(), host.filter(), host.run("ip", "addr", "show", "dev", "vtb000001")) == before
    close(one)
    assert f"tapnet: refused a request of the broker's: {said}\n" in journal.read_text()


def test_n7_uids_of_root_and_services_are_nobodys_to_confine(host: Namespace, tmp_path: Path) -> None:
    with Tapnet(host, tmp_path / "t") as tapnet:  # whose policy has ssh_forwarding
        for uids in ([0], [999], [4000, 0]):
            assert "confined: " in tapnet.refused(Settings(pool4=SETTINGS.pool4, pool6=SETTINGS.pool6, confined=uids))
        tapnet.settle()
        assert "confined: " in tapnet.refused(Confine(uids=[0]))
        tapnet.tell(Confine(uids=[4000]))
        assert "4000" in host.filter()


def test_n7_what_the_policy_has_is_made(tapnet: Tapnet, host: Namespace) -> None:
    tapnet.tell(segment(), OFFICE, segment(255, gateway6="fd77:0:0:ff::1/64", outside="none"))
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2, segment=OFFICE.segment, address4=""))
    for each in (8000, 8099, 9005):
        tapnet.tell(opening(each))
    assert "9005" in host.filter() and "master host0" in host.detail("vt000002n0")
    if tapnet.ask(Health())[0]["ok"]["features"]["vlan"]:
        tapnet.tell(LAB)
        close(tapnet.plug(port(3, segment=LAB.segment, address4="")))
    close(one, two)


# --- VMs that run, and a policy that has become another ---------------------------------------------------------------


def test_n7_who_runs_on_a_bridge_that_the_policy_no_longer_has_stays_there(tapnet: Tapnet, host: Namespace) -> None:
    tapnet.tell(segment(), OFFICE)
    one, two = (tapnet.plug(port(number, segment=OFFICE.segment, address4="")) for number in (1, 2))
    three = tapnet.plug(port(3))
    kept = [port(number, False, segment=OFFICE.segment, address4="") for number in (1, 2)]
    again(tapnet, POLICY.replace('bridge = "host0"', 'bridge = "host8"'))
    tapnet.tell(SETTINGS, segment(), OFFICE, *kept)
    moved = port(3, False, segment=OFFICE.segment, address4="")
    assert "bridge: no network is on the bridge host0" in tapnet.refused(moved), "only who is in it"
    tapnet.tell(port(3, False), Settle())
    assert passes(one, two, 1, 2) and "master host0" in host.detail("vt000001n0")
    new = port(4, segment=OFFICE.segment, address4="")
    assert "bridge: no network is on the bridge host0" in tapnet.refused(new)
    assert "bridge: no network is on the bridge docker0" in tapnet.refused(Segment(segment=9, kind="bridged", bridge="docker0"))
    tapnet.tell(port(1, False, segment=OFFICE.segment, address4="", rate=5000))  # what else holds for it may change
    # With the last of them it is over.
    close(one, two, three)
    tapnet.tell(Unplug(number=1, nic=0), Unplug(number=2, nic=0))
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.tell(SETTINGS)
    assert "bridge: no network is on the bridge host0" in tapnet.refused(OFFICE)


def test_n7_who_runs_on_a_vlan_that_the_policy_no_longer_has_stays_there(tapnet: Tapnet, host: Namespace) -> None:
    if not tapnet.ask(Health())[0]["ok"]["features"]["vlan"]:
        pytest.skip("this kernel has no VLANs (8021q)")
    tapnet.tell(LAB)
    fd = tapnet.plug(port(1, segment=LAB.segment, address4=""))
    again(tapnet, STRICT.replace("vlan = 12", "vlan = 14"))
    other = Segment(segment=LAB.segment, kind="bridged", parent="wire0", vlan=13)
    tapnet.tell(SETTINGS)
    assert "vlan: " in tapnet.refused(other)
    tapnet.tell(LAB, port(1, False, segment=LAB.segment, address4=""), Settle())
    assert "vlan protocol 802.1Q id 12" in host.detail("vmshell800001")
    assert "vlan: " in tapnet.refused(port(2, segment=LAB.segment, address4=""))
    close(fd)


def test_n7_who_runs_in_a_pool_that_the_policy_no_longer_has_stays_there(tapnet: Tapnet, host: Namespace) -> None:
    """[host] waits for the broker's restart, and tapnet may be restarted before: then all goes on, and nothing new is made."""
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    before = host.filter()
    again(tapnet, MOVED)
    assert "pool4: 10.0.0.0/8 is not ipv4_pool, which is 10.99.0.0/16" in tapnet.refused(settings(pool4="10.0.0.0/8"))
    tapnet.tell(SETTINGS, segment())
    assert "gateway4: " in tapnet.refused(segment(2)), "there is no such bridge"
    assert "gateway4: " in tapnet.refused(port(1, False, address4="10.77.1.9")), "it has another address"
    tapnet.tell(port(1, False), port(2, False), Settle())
    assert passes(one, two, 1, 2) and host.filter() == before
    said = tapnet.refused(port(3))
    assert "gateway4: 10.77.1.1/24 is not the gateway of segment 1" in said and "systemctl restart vmshell-broker" in said
    tapnet.tell(port(1, False, owner=4000))
    # The broker, started anew, has the new pool; VMs keep their addresses.
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.tell(settings(pool4="10.99.0.0/16"), segment(gateway4="10.99.1.1/24"), port(1, False), port(2, False), Settle())
    assert passes(one, two, 1, 2)
    three = tapnet.plug(port(3, address4="10.99.1.4"))
    close(one, two, three)


def test_n7_a_pool_that_becomes_another_meanwhile_changes_nothing_that_is(tapnet: Tapnet, host: Namespace) -> None:
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    tapnet.put_policy(MOVED.replace("[host]\n", "[host]\nssh_forwarding = true\n"))
    tapnet.tell(settings(confined=(4000,)), segment(), port(1, False, rate=5000), Settle())
    assert passes(one, two, 1, 2) and "10.77.0.0/16" in host.filter() and "4000" in host.filter()
    assert "gateway4: " in tapnet.refused(port(3))
    tapnet.put_policy(STRICT)
    three = tapnet.plug(port(3))
    close(one, two, three)


def test_n7_how_far_a_network_led_stays_and_goes_no_further(host: Namespace, tmp_path: Path) -> None:
    with Tapnet(host, tmp_path / "t") as tapnet:
        tapnet.settle(segment(outside="all"), segment(2))
        fds = [tapnet.plug(port(1)), tapnet.plug(port(2, segment=2))]
        again(tapnet, STRICT)
        tapnet.tell(SETTINGS, segment(outside="all"), port(1, False))
        assert "outside: no network leads as far as all" in tapnet.refused(segment(2, outside="all"))
        tapnet.tell(segment(2), port(2, False, segment=2), Settle())
        assert 'elements = { "vtb000001" }' in host.run("nft", "list", "set", "inet", "vmshell", "outside_all")
        assert "outside: " in tapnet.refused(port(3))
        tapnet.tell(segment())
        fds.append(tapnet.plug(port(3)))
        close(*fds)


def test_n7_who_is_confined_stays_so_when_forwarding_is_off(host: Namespace, tmp_path: Path) -> None:
    with Tapnet(host, tmp_path / "t") as tapnet:
        tapnet.tell(settings(confined=(4000, 4001)), Settle())
        again(tapnet, STRICT)
        assert "confined: " in tapnet.refused(settings(confined=(4000, 4002)))
        tapnet.tell(settings(confined=(4000, 4001)), Settle())
        tapnet.tell(settings())
        assert "4000" not in host.filter()


# --- the file ---------------------------------------------------------------------------------------------------------


def problems(tapnet: Tapnet) -> str:
    return "; ".join(tapnet.ask(Health())[0]["ok"]["problems"])


def wait_for(journal: Path, text: str) -> None:
    end = time.monotonic() + PATIENCE
    while text not in journal.read_text():
        assert time.monotonic() < end, text
        time.sleep(0.05)


def test_a_broken_policy_leaves_what_was_in_force(tapnet: Tapnet, journal: Path) -> None:
    tapnet.tell(segment())
    tapnet.put_policy("[host]\nnothing = 1\n")
    assert "[host] has no key nothing" in problems(tapnet) and "what was in force before is" in problems(tapnet)
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2, segment=1))
    tapnet.tell(OFFICE)
    assert "bridge: " in tapnet.refused(Segment(segment=9, kind="bridged", bridge="docker0"))
    wait_for(journal, "[host] has no key nothing")
    tapnet.put_policy(STRICT)
    assert problems(tapnet) == ""
    wait_for(journal, "everything is as it should be again")
    close(one, two)


def test_a_policy_that_was_always_broken_makes_nothing_new(tapnet: Tapnet, host: Namespace) -> None:
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    again(tapnet, "nonsense")
    assert "no new network can be made" in problems(tapnet)
    tapnet.settle(segment(), port(1, False), port(2, False))
    assert passes(one, two, 1, 2)
    assert "is not a valid policy" in tapnet.refused(segment(2)) and "is not a valid policy" in tapnet.refused(port(3))
    tapnet.put_policy(STRICT)
    tapnet.tell(segment(2))
    close(one, two, tapnet.plug(port(3)))


def test_n7_a_file_that_others_can_write_is_not_believed(tapnet: Tapnet) -> None:
    tapnet.put_policy(STRICT + '[networks.more]\nkind = "bridged"\nbridge = "docker0"\n')
    os.chmod(tapnet.layout.policy, 0o666)
    assert "must not be writable by others" in problems(tapnet)
    assert "bridge: " in tapnet.refused(Segment(segment=9, kind="bridged", bridge="docker0"))


# --- who may ask ------------------------------------------------------------------------------------------------------

ASK = """
import os, socket, sys
os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
s.settimeout(20)
try:
    s.send(b'{{"id":1,"verb":"health"}}')
    print(len(s.recv(65536)) > 0)
except (BrokenPipeError, ConnectionResetError):
    print(False)
"""


def test_n7_where_the_broker_has_an_account_root_is_not_it(host: Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/var/tmp"))  # not below tmp_path, which is closed to everybody else
    folder.chmod(0o755)
    os.chown(folder, SERVICE, SERVICE)
    accounts = folder / "passwd"
    accounts.write_text(Path("/etc/passwd").read_text() + f"vmshell-broker:x:{BROKER}:{BROKER}::/:/usr/sbin/nologin\n")
    accounts.chmod(0o644)
    mounted = ("unshare", "-m", "sh", "-c", f'mount --bind {accounts} /etc/passwd && exec "$@"', "sh")
    rights = [f"--{kind}=-all,+net_admin" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    who = (f"--reuid={SERVICE}", f"--regid={SERVICE}", "--clear-groups", "--no-new-privs", *rights)
    tapnet = Tapnet(host, folder, (*mounted, "setpriv", *who))  # root connects, and hears nothing
    try:
        for path in (tapnet.layout.run, tapnet.layout.tapnet_socket):
            os.chmod(path, 0o777)  # the permissions are one lock, the peer's uid is another
        for uid, may in ((BROKER, "True\n"), (0, "False\n"), (SERVICE + 1, "False\n"), (SERVICE, "True\n")):
            command = [sys.executable, "-c", ASK.format(uid=uid), tapnet.layout.tapnet_socket]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            assert done.stdout == may, (uid, done)
    finally:
        tapnet.close()
        shutil.rmtree(folder)
