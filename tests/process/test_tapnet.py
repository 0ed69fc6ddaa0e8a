"""tapnet against a real kernel: plugging, undoing, putting right, watching. In network namespaces of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.tapnets import (
    PATIENCE,
    SETTINGS,
    Namespace,
    Tapnet,
    Thief,
    datagram,
    mac,
    namespace,
    passes,
    payloads,
    port,
    segment,
    unable,
)
from vmshell import wire
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.messages import Health, Open, Segment, Settings, Settle, Unplug

__all__ = ["namespace"]
REASON = unable()
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

NOBODY = 64321  # a uid that owns nothing


@pytest.fixture
def tapnet(namespace: Namespace, tmp_path: Path) -> Iterator[Tapnet]:
    with Tapnet(namespace, tmp_path / "t") as running:
        running.settle()
        yield running


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A folder of NOBODY's; not below tmp_path, which is closed to everybody else."""
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/var/tmp"))
    folder.chmod(0o755)
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)


# --- plug and unplug --------------------------------------------------------------------------------------------------


def test_a_port_passes_frames_and_leaves_nothing(tapnet: Tapnet, namespace: Namespace) -> None:
    empty = namespace.filter()
    tapnet.tell(segment())
    assert namespace.links() == {}  # a bridge is made with its first port
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    assert set(namespace.links()) == {"vtb000001", "vt000001n0", "vt000002n0"}
    assert passes(one, two, 1, 2) and passes(two, one, 2, 1)
    assert not passes(one, two, 3, 2, 0.5)  # with an address of somebody else's
    close(one, two)
    tapnet.tell(Unplug(number=1, nic=0), Unplug(number=2, nic=0), Unplug(number=9, nic=9))
    assert namespace.links() == {}
    tapnet.tell(SETTINGS)
    assert "vt000001n0" not in namespace.filter()
    assert namespace.filter().count("\n") <= empty.count("\n") + 20  # the segment may be known still, the ports are not


def test_what_a_tap_and_a_bridge_are_held_to(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    fd = tapnet.plug(port(1, isolated=True, rate=2000))
    tap, bridge = namespace.detail("vt000001n0"), namespace.detail("vtb000001")
    for wanted in ("isolated on", "learning off", "flood off", "guard on", "persist off", "user root group root", "vnet_hdr off"):
        assert wanted in tap, wanted
    assert "multi_queue" not in tap.replace("multi_queue off", "")
    for wanted in ("06:ff:00:00:00:01", "stp_state 0", "mcast_snooping 0", "alias vmshell"):
        assert wanted in bridge, wanted
    assert f"{mac(1)} dev vt000001n0 master vtb000001 static" in namespace.run("bridge", "fdb", "show")
    assert "rate 2Mbit" in namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
    # E14, E20, E21: the host has no IPv6 there and answers for one address only.
    assert "inet6 fe80" not in namespace.run("ip", "addr", "show")
    for path, value in (
        ("ipv4/conf/vtb000001/arp_ignore", "1"),
        ("ipv4/conf/vtb000001/rp_filter", "1"),
        ("ipv4/ip_forward", "1"),
    ):
        assert namespace.run("cat", f"/proc/sys/net/{path}").strip() == value
    close(fd)


def test_a_router_for_ipv6_has_the_addresses_it_was_given(tapnet: Tapnet, namespace: Namespace) -> None:
    namespace.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1")
    tapnet.tell(segment(gateway6="fd77:0:0:1::1/64"))
    fd = tapnet.plug(port(1, address6="fd77:0:0:1:400:ff:fe00:1"))
    end = time.monotonic() + PATIENCE
    while "tentative" in (shown := namespace.run("ip", "-6", "-o", "addr", "show", "dev", "vtb000001")):
        assert time.monotonic() < end  # the kernel says it of every new address, also where it does not ask (accept_dad)
        time.sleep(0.01)
    found = {line.split()[3] for line in shown.splitlines()}
    assert found == {"fe80::1/64", "fd77:0:0:1::1/64"}
    assert namespace.run("ip", "-6", "addr", "show", "dev", "vt000001n0") == ""
    read = {
        path: namespace.run("cat", f"/proc/sys/net/ipv6/conf/{path}").strip()
        for path in ("all/forwarding", "vtb000001/accept_ra", "vtb000001/accept_dad")
    }
    assert read == {"all/forwarding": "1", "vtb000001/accept_ra": "0", "vtb000001/accept_dad": "0"}
    # The host's own interface listens to its router as before, although the host is one itself now.
    assert namespace.run("cat", "/proc/sys/net/ipv6/conf/up0/accept_ra").strip() == "2"
    close(fd)


def test_a_tap_dies_with_its_holder_and_can_be_made_again(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    fd = tapnet.plug(port(1))
    assert "its QEMU has to end first" in tapnet.refused(port(1))  # the broker asks twice
    assert passes_alone(tapnet, fd)
    close(fd)
    assert "vt000001n0" not in namespace.links()
    close(tapnet.plug(port(1)))


def passes_alone(tapnet: Tapnet, fd: int) -> bool:
    """Is VM 1 reachable still? A second VM is plugged to see."""
    other = tapnet.plug(port(2))
    try:
        return passes(fd, other, 1, 2)
    finally:
        close(other)
        tapnet.tell(Unplug(number=2, nic=0))


def test_the_filter_comes_before_the_bridge_and_up_comes_last(namespace: Namespace) -> None:
    """A port is looked at from outside at each step of its way."""
    script = """
import os, subprocess, sys
sys.path[:0] = sys.argv[1:]
from tapnet import network
from tests.process.tapnets import SETTINGS, port, segment
from tapnet.rootpolicy import RootPolicy
from tapnet.state import State

def look(step):
    link = subprocess.run(["ip", "-o", "link", "show", "dev", "vt000001n0"], capture_output=True, text=True).stdout
    rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True).stdout
    quiet = open("/proc/sys/net/ipv6/conf/vt000001n0/disable_ipv6").read().strip()
    print(step, "up" if ",UP" in link else "down", "bridged" if "master" in link else "alone",
          "filtered" if '"vt000001n0"' in rules else "bare", quiet)

made = network.Network(RootPolicy("/nonexistent"))
made.settle(State(SETTINGS))
made.change([segment()])
run, plug = made.nft.run, made.links.plug
def loading(text): look("before-filter"); run(text); look("after-filter")
def plugging(ports, segments): look("before-plug"); plug(ports, segments); look("after-plug")
made.nft.run, made.links.plug = loading, plugging
answer, = made.change([port(1)])
assert answer.error is None, answer.error
"""
    root = str(Path(__file__).resolve().parents[2])
    done = namespace.run(sys.executable, "-c", script, root)
    assert done.splitlines() == [
        "before-filter down alone bare 1",
        "after-filter down alone filtered 1",
        "before-plug down alone filtered 1",
        "after-plug up bridged filtered 1",
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_interfaces_of_somebody_else_are_left_alone(tapnet: Tapnet, namespace: Namespace) -> None:
    namespace.run("ip", "tuntap", "add", "vt000001n0", "mode", "tap", "user", str(NOBODY))
    namespace.run("ip", "link", "add", "vtb000002", "type", "bridge")
    tapnet.tell(segment())
    assert "vt000001n0 already, and it is not ours" in tapnet.refused(port(1))
    assert "vtb000002 already, and it is not ours" in tapnet.refused(segment(2))
    assert set(namespace.links()) == {"vt000001n0", "vtb000002"}
    assert '"vt000001n0"' not in namespace.filter()
    # Nor does settling touch them, or take them for what it looks after.
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.tell(SETTINGS, segment())
    assert "not ours" in tapnet.refused(port(1, create=False))
    tapnet.tell(Settle())
    assert set(namespace.links()) == {"vt000001n0", "vtb000002"}


def test_an_address_that_is_taken(tapnet: Tapnet, namespace: Namespace) -> None:
    namespace.run("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
    namespace.run("ip", "addr", "add", "10.77.1.200/16", "dev", "wire0")
    namespace.run("ip", "addr", "add", "10.77.2.1/24", "dev", "wire1")
    tapnet.tell(segment(), segment(2), segment(3))
    assert "10.77.1.200 of wire0 is in 10.77.1.0/24; take another pool" in tapnet.refused(port(1))
    assert "10.77.2.1 of wire1" in tapnet.refused(port(1, segment=2))
    assert set(namespace.links()) == {"wire0", "wire1"}
    close(tapnet.plug(port(1, segment=3)))


def test_names_of_sixteen_characters_and_other_nonsense(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    for body in (
        {"verb": "segment", "segment": 2, "kind": "bridged", "bridge": "sixteen-letters1"},
        {"verb": "segment", "segment": 2, "kind": "bridged", "bridge": "br%d"},
        {"verb": "port", "number": 1 << 24, "nic": 0, "segment": 1, "mac": mac(1), "create": True},
        {"verb": "port", "number": 1, "nic": 16, "segment": 1, "mac": mac(1), "create": True},
        {"verb": "port", "number": 1, "nic": 0, "segment": 1, "mac": "01:00:00:00:00:01", "create": True},
        {"verb": "port", "number": 1, "nic": 0, "segment": 1, "mac": "", "create": True},
        {"verb": "port", "number": 1, "nic": 0, "segment": 7, "mac": mac(1), "create": True},
        {"verb": "port", "number": 1, "nic": 0, "segment": 1, "mac": mac(1), "address4": "1.2.3", "create": True},
        {"verb": "port", "number": 1, "nic": 0, "segment": 1, "mac": mac(1), "address4": "fd00::1", "create": True},
        {"verb": "port", "number": 1, "nic": 0, "segment": 1, "mac": mac(1)},
        {"verb": "segment", "segment": 3, "kind": "bridged"},
        {"verb": "segment", "segment": 3, "gateway4": "10.77.3.1/99"},
        {"verb": "settings", "pool4": "nowhere"},
        {"verb": "format-disk"},
    ):
        wire.send(tapnet.broker, {"id": 5, **body})
        number, answer, fd = tapnet.receive()
        assert number == 5 and "error" in answer and fd == -1, body
        assert answer["error"]["code"] != "internal", (body, answer)
    assert namespace.links() == {}


def test_tun_closed_to_us(namespace: Namespace, tmp_path: Path, nobodys: Path) -> None:
    with Tapnet(namespace, tmp_path / "t", mounted(Path("/dev/null"))) as tapnet:
        tapnet.settle(segment())
        health = tapnet.ask(Health())[0]["ok"]
        assert any("/dev/net/tun" in problem or "tap" in problem for problem in health["problems"])
        assert "vt000001n0" in tapnet.refused(port(1)) or "/dev/net/tun" in tapnet.refused(port(1))
    # A device node that only root may open, which is Debian's own.
    tun = tun_for(nobodys)
    os.chown(tun, 0, 0)
    with Tapnet(namespace, nobodys, (*mounted(tun), *setpriv())) as tapnet:
        tapnet.settle(segment())
        assert "/dev/net/tun cannot be opened: Permission denied" in tapnet.refused(port(1))
    assert namespace.links() == {}


def test_without_its_one_right_it_says_so_and_ends(namespace: Namespace, nobodys: Path) -> None:
    code = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "tapnet", ":".join([str(nobodys)] * 4 + ["0"])]
    done = subprocess.run(namespace.command(*setpriv(""), *code), capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "tapnet: it cannot start without CAP_NET_ADMIN: Operation not permitted\n"


def setpriv(right: str = ",+net_admin") -> tuple[str, ...]:
    """The command that goes on as NOBODY with *right* and no other."""
    caps = [f"--{kind}-caps=-all{right}" for kind in ("inh", "ambient")]
    who = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs", f"--bounding-set=-all{right}"]
    return ("setpriv", *who, *caps)


def mounted(tun: Path) -> tuple[str, ...]:
    """The command that goes on with *tun* in the place of /dev/net/tun."""
    return ("unshare", "-m", "sh", "-c", f'mount --bind {tun} /dev/net/tun && exec "$@"', "sh")


def test_no_nftables_library_means_no_port(namespace: Namespace, tmp_path: Path) -> None:
    import ctypes.util

    name = ctypes.util.find_library("nftables")
    assert name is not None
    found = next(path for path in Path("/usr/lib").glob(f"**/{name}"))
    hidden = ("unshare", "-m", "sh", "-c", f'mount --bind /dev/null {found.resolve()} && exec "$@"', "sh")
    with Tapnet(namespace, tmp_path / "t", hidden) as tapnet:
        tapnet.tell(SETTINGS, segment())
        assert "install the package nftables" in tapnet.refused(Settle())
        assert "install the package nftables" in "".join(tapnet.ask(Health())[0]["ok"]["problems"])
        assert "error" in tapnet.ask(port(1))[0]
        assert namespace.links() == {}


def test_one_bad_port_fails_alone(tapnet: Tapnet, namespace: Namespace) -> None:
    """Seven requests in one go, two of which cannot be: by a name that is taken, and by a bridge that takes no taps."""
    namespace.run("ip", "tuntap", "add", "vt000003n0", "mode", "tap")
    namespace.run("ip", "link", "add", "host0", "type", "bridge")
    tapnet.tell(segment(), Segment(segment=2, kind="bridged", bridge="host0"))
    namespace.run("ip", "link", "delete", "host0")
    namespace.run("ip", "link", "add", "host0", "type", "veth", "peer", "name", "host1")
    wanted = [port(1), port(2), port(3), port(4), port(5, segment=2, address4=""), port(6)]
    idents = [tapnet.send(one) for one in wanted]
    answers = [tapnet.receive() for _ in idents]
    assert [ident for ident, _, _ in answers] == idents
    assert ["ok" in body for _, body, _ in answers] == [True, True, False, True, False, True]
    assert "host0 of the host is no bridge" in answers[4][1]["error"]["text"]
    assert passes(answers[0][2], answers[5][2], 1, 6)
    assert "vt000005n0" not in namespace.links() and "vt000005n0" not in namespace.filter()
    assert "vt000003n0" not in namespace.filter()
    close(*(fd for _, _, fd in answers if fd >= 0))


def test_a_port_that_fails_late_is_undone(tapnet: Tapnet, namespace: Namespace) -> None:
    """The tap is there and the filter loaded when the bridge refuses (it takes 1023 ports). The rest of the batch is made."""
    namespace.run("sh", "-c", "for n in $(seq 1022); do echo link add d$n type veth peer name e$n; done | ip -batch -")
    tapnet.tell(segment())
    first = tapnet.plug(port(1))
    namespace.run("sh", "-c", "for n in $(seq 1021); do echo link set d$n master vtb000001; done | ip -batch -")
    idents = [tapnet.send(port(2)), tapnet.send(port(3))]
    answers = [tapnet.receive() for _ in idents]
    assert ["ok" in body for _, body, _ in answers] == [True, False], answers
    assert "vt000003n0" not in namespace.links() and "vt000003n0" not in namespace.filter()
    assert passes(first, answers[0][2], 1, 2)
    close(first, answers[0][2])


def test_a_bridge_of_the_host(tapnet: Tapnet, namespace: Namespace) -> None:
    namespace.run("ip", "link", "add", "host0", "type", "bridge")
    namespace.run("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
    assert "the host has no bridge host9" in tapnet.refused(Segment(segment=2, kind="bridged", bridge="host9"))
    assert "wire0 of the host is no bridge" in tapnet.refused(Segment(segment=2, kind="bridged", bridge="wire0"))
    before = namespace.detail("host0")
    tapnet.tell(Segment(segment=2, kind="bridged", bridge="host0"))
    fd = tapnet.plug(port(1, segment=2, address4=""))
    assert "master host0" in namespace.detail("vt000001n0")
    close(fd)
    tapnet.tell(Unplug(number=1, nic=0))
    assert settled(namespace.detail("host0")) == settled(before)
    namespace.run("ip", "link", "delete", "host0")
    assert "the host has no bridge host0" in tapnet.refused(port(2, segment=2, address4=""))
    assert set(namespace.links()) == {"wire0", "wire1"}


def settled(detail: str) -> list[str]:
    """What somebody has set on a bridge: everything but its timers and what follows its ports."""
    return [word for word in detail.split("numtxqueues")[0].split() if ":" not in word and "." not in word]


def test_nobody_gets_the_hosts_mac_on_its_own_network(tapnet: Tapnet, namespace: Namespace) -> None:
    """E33: what is for the host would be the VM's, and nobody's once the VM has ended."""
    namespace.run("ip", "link", "add", "host0", "address", "06:11:22:33:44:55", "up", "type", "bridge")
    tapnet.tell(segment(), Segment(segment=2, kind="bridged", bridge="host0"))
    before = namespace.run("bridge", "fdb", "show", "br", "host0")
    said = tapnet.refused(port(1, segment=2, address4="", mac="06:11:22:33:44:55"))
    assert "host0 of this host has the MAC 06:11:22:33:44:55; the card needs another" in said
    assert namespace.run("bridge", "fdb", "show", "br", "host0") == before and "vt000001n0" not in namespace.links()
    close(tapnet.plug(port(1, address4="10.77.1.2", mac="06:11:22:33:44:55")))  # elsewhere it is in nobody's way


def test_the_hosts_bridge_keeps_its_mac(tapnet: Tapnet, namespace: Namespace) -> None:
    """E29: a bridge takes the lowest MAC of its ports; ours are the highest there are."""
    namespace.run("ip", "link", "add", "host0", "type", "bridge")
    namespace.run("ip", "link", "add", "wire0", "address", "52:54:00:00:00:01", "type", "veth", "peer", "name", "wire1")
    namespace.run("ip", "link", "set", "wire0", "master", "host0", "up")
    tapnet.tell(Segment(segment=2, kind="bridged", bridge="host0"))
    fd = tapnet.plug(port(1, segment=2, address4=""))
    assert "link/ether 52:54:00:00:00:01" in namespace.run("ip", "link", "show", "dev", "host0")
    close(fd)


def test_a_vlan_of_the_hosts_interface(tapnet: Tapnet, namespace: Namespace) -> None:
    namespace.run("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
    wanted = Segment(segment=2, kind="bridged", parent="wire0", vlan=12)
    assert "no interface wire9" in tapnet.refused(Segment(segment=2, kind="bridged", parent="wire9", vlan=12))
    tapnet.tell(wanted)
    vlan = port(1, segment=2, address4="")
    if not tapnet.ask(Health())[0]["ok"]["features"]["vlan"]:
        # A kernel without VLANs says so, and nothing is left.
        assert "VLAN 12 of wire0 cannot be made" in tapnet.refused(vlan)
        assert set(namespace.links()) == {"wire0", "wire1"}
        return
    fd = tapnet.plug(vlan)
    assert "vlan protocol 802.1Q id 12" in namespace.detail("vmshell000002")
    assert "master vtb000002" in namespace.detail("vmshell000002")
    # The interface was down, which keeps no VM from starting.
    assert "UP" not in namespace.links()["vmshell000002"].split(",")
    for name in ("wire0", "wire1"):
        namespace.run("ip", "link", "set", name, "up")
    assert "UP" in namespace.links()["vmshell000002"].split(",")
    close(fd)
    tapnet.tell(Unplug(number=1, nic=0))
    assert set(namespace.links()) == {"wire0", "wire1"}


# --- putting right ----------------------------------------------------------------------------------------------------


class Stream:
    """Numbered datagrams from VM 1 to VM 2, one every few milliseconds, from the making of this until `lost` is asked."""

    def __init__(self, source: int, target: int) -> None:
        self.sent = 0
        self.seen: set[int] = set()
        self._source, self._target = source, target
        self._ending = False
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._receive)]
        for thread in self._threads:
            thread.start()
        end = time.monotonic() + 60
        while len(self.seen) < 5:
            assert time.monotonic() < end or self.lost() < 0, "nothing passes"
            time.sleep(0.01)

    def lost(self) -> int:
        self._ending = True
        for thread in self._threads:
            thread.join(PATIENCE)
        return self.sent - len(self.seen)

    def _send(self) -> None:
        while not self._ending:
            os.write(self._source, datagram(1, 2, self.sent.to_bytes(8, "big")))
            self.sent += 1
            time.sleep(0.002)

    def _receive(self) -> None:
        def ended() -> bool:
            return self._ending and len(self.seen) == self.sent

        for payload in payloads(self._target, PATIENCE, ended):
            self.seen.add(int.from_bytes(payload, "big"))
            if self._ending and not self._threads[0].is_alive() and len(self.seen) == self.sent:
                return


def test_killed_and_started_again_it_loses_no_packet(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment(), segment(2))
    one, two, gone = tapnet.plug(port(1)), tapnet.plug(port(2)), tapnet.plug(port(3, segment=2, address4="10.77.2.9"))
    rules = namespace.filter()
    stream = Stream(one, two)
    tapnet.kill()
    # While it is away: an orphan, and things that are not as they should be.
    namespace.run("ip", "link", "set", "vt000002n0", "type", "bridge_slave", "isolated", "on", "learning", "on", "flood", "on")
    namespace.run("ip", "link", "set", "vt000002n0", "type", "bridge_slave", "isolated", "off")
    time.sleep(0.3)
    tapnet.start()
    tapnet.tell(SETTINGS, segment(), port(1, create=False), port(2, create=False))
    assert set(namespace.links()) == {"vtb000001", "vtb000002", "vt000001n0", "vt000002n0", "vt000003n0"}
    tapnet.tell(Settle())
    time.sleep(0.3)
    assert stream.lost() == 0 and stream.sent > 50
    assert set(namespace.links()) == {"vtb000001", "vt000001n0", "vt000002n0"}
    assert "learning off flood off" in namespace.detail("vt000002n0")
    assert '"vt000003n0"' not in namespace.filter() and '"vt000003n0"' in rules
    # Ports can be changed and made as before.
    assert passes_alone_with(tapnet, one)
    close(one, two, gone)


def passes_alone_with(tapnet: Tapnet, fd: int) -> bool:
    other = tapnet.plug(port(7))
    try:
        return passes(fd, other, 1, 7)
    finally:
        close(other)


def test_settling_puts_back_elements_and_bridges_that_are_missing(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    rules = namespace.filter()
    tapnet.kill()
    namespace.run("nft", "delete", "table", "bridge", "vmshell")
    namespace.run("ip", "link", "delete", "vtb000001")
    namespace.run("ip", "link", "set", "vt000001n0", "down")
    tapnet.start()
    tapnet.settle(segment(), port(1, create=False), port(2, create=False))
    assert namespace.filter() == rules
    assert passes(one, two, 1, 2)
    # A VM that ended meanwhile is an error of its own; the rest is settled.
    close(two)
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.tell(SETTINGS, segment(), port(1, create=False))
    assert "the tap vt000002n0 is gone" in tapnet.refused(port(2, create=False))
    tapnet.tell(Settle())
    assert '"vt000002n0"' not in namespace.filter()
    close(one)


def test_what_is_missing_is_put_back_on_demand(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    one, two, three = tapnet.plug(port(1)), tapnet.plug(port(2)), tapnet.plug(port(3, rate=5000))
    before = [sorted(namespace.run("bridge", "fdb", "show").splitlines()), namespace.run("tc", "qdisc", "show")]
    stream = Stream(one, two)
    namespace.run("tc", "qdisc", "del", "dev", "vt000003n0", "root")
    namespace.run("tc", "qdisc", "add", "dev", "vt000001n0", "root", "tbf", "rate", "8mbit", "burst", "64kb", "latency", "50ms")
    namespace.set("ipv4/conf/vtb000001/arp_ignore", "0")
    namespace.run("ip", "link", "set", "vt000002n0", "type", "bridge_slave", "isolated", "on")
    namespace.run("ip", "tuntap", "add", "vt00000an0", "mode", "tap", "user", "0", "group", "0")
    tapnet.tell(Settle())
    assert stream.lost() == 0
    namespace.run("bridge", "fdb", "del", mac(2), "dev", "vt000002n0", "master")
    assert not passes(one, two, 1, 2, 0.3)  # nothing is flooded to a guest
    tapnet.tell(Settle())
    assert passes(one, two, 1, 2)
    after = [sorted(namespace.run("bridge", "fdb", "show").splitlines()), namespace.run("tc", "qdisc", "show")]
    assert [settled(text) for text in map(str, after)] == [settled(text) for text in map(str, before)]
    assert "vt00000an0" not in namespace.links()
    assert "isolated off" in namespace.detail("vt000002n0")
    assert namespace.run("cat", "/proc/sys/net/ipv4/conf/vtb000001/arp_ignore").strip() == "1"
    close(one, two, three)


def test_a_bridge_that_somebody_removed_is_back_at_once(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    namespace.run("ip", "link", "delete", "vtb000001")
    assert passes_soon(one, two, 2)
    namespace.run("ip", "link", "set", "vt000002n0", "nomaster")
    assert passes_soon(one, two, 2)
    close(one, two)


def passes_soon(one: int, two: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not passes(one, two, 1, 2, 0.2):
        if time.monotonic() > end:
            return False
    return True


def test_a_hosts_bridge_that_is_gone_costs_nobody_a_tap(tapnet: Tapnet, namespace: Namespace) -> None:
    """tapnet starts while a bridge of the host is missing: VMs keep their taps, others go on, and it heals by itself."""
    namespace.run("ip", "link", "add", "host0", "up", "type", "bridge")
    bridged = Segment(segment=2, kind="bridged", bridge="host0")
    tapnet.tell(segment(), bridged)
    one, two = (tapnet.plug(port(number, segment=2, address4="")) for number in (1, 2))
    tapnet.kill()
    namespace.run("ip", "link", "delete", "host0")
    tapnet.start()
    tapnet.tell(SETTINGS, segment(), bridged, *(port(number, False, segment=2, address4="") for number in (1, 2)))
    assert "the host has no bridge host0" in tapnet.refused(Settle())
    assert {"vt000001n0", "vt000002n0"} <= set(namespace.links())
    assert any("host0" in problem for problem in tapnet.ask(Health())[0]["ok"]["problems"])
    other, another = tapnet.plug(port(3)), tapnet.plug(port(4))
    assert passes(other, another, 3, 4)
    namespace.run("ip", "link", "add", "host0", "up", "type", "bridge")
    assert passes_soon(one, two, 12)
    assert tapnet.ask(Health())[0]["ok"]["problems"] == []
    namespace.run("ip", "link", "delete", "host0")
    namespace.run("ip", "link", "add", "host0", "up", "type", "bridge")
    assert passes_soon(one, two, 12)
    close(one, two, other, another)


def test_a_port_that_cannot_be_taken_keeps_its_tap(tapnet: Tapnet, namespace: Namespace) -> None:
    """Whoever names it has a VM that runs on it."""
    tapnet.tell(segment())
    fd = tapnet.plug(port(1))
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.tell(SETTINGS)
    assert "was not named" in tapnet.refused(port(1, create=False))
    tapnet.tell(Settle())
    assert "vt000001n0" in namespace.links() and '"vt000001n0"' not in namespace.filter()
    tapnet.tell(Unplug(number=1, nic=0), Settle())
    assert "vt000001n0" not in namespace.links()
    close(fd)


def test_a_ruleset_flushed_while_it_was_away_lets_nothing_through(tapnet: Tapnet, namespace: Namespace) -> None:
    """Started again, it knows of no port before the broker comes: until then every tap is mute."""
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    tapnet.kill()
    namespace.run("nft", "flush ruleset")
    assert passes(one, two, 1, 2)  # there is no filter
    tapnet.start()
    assert "ok" in tapnet.ask(Health())[0]
    assert not passes(one, two, 1, 2, 0.5) and not passes(one, two, 9, 2, 0.5)
    tapnet.settle(segment(), port(1, create=False), port(2, create=False))
    assert passes(one, two, 1, 2) and not passes(one, two, 9, 2, 0.5)
    close(one, two)


def test_tables_that_could_not_be_loaded_at_first(namespace: Namespace, tmp_path: Path) -> None:
    """The broker has said it all by then, and need not say it again."""
    thief = Thief(namespace)
    with Tapnet(namespace, tmp_path / "t") as tapnet:
        tapnet.tell(SETTINGS, segment())
        assert "nftables refused the filter" in tapnet.refused(Settle())
        assert "nftables refused the filter" in tapnet.refused(port(1))
        thief.leave()
        one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
        assert passes(one, two, 1, 2)
        assert tapnet.ask(Health())[0]["ok"]["problems"] == []
        close(one, two)


def test_a_flushed_ruleset_is_back_at_once(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    rules = namespace.filter()
    for change in ("flush ruleset", "delete table inet vmshell", "flush table bridge vmshell"):
        namespace.run("nft", change)
        began = time.monotonic()
        while namespace.filter() != rules:
            assert time.monotonic() - began < 2, change
        assert passes(one, two, 1, 2)
    # Somebody else's tables are somebody else's.
    namespace.run("nft", "add table inet other; add chain inet other c")
    time.sleep(0.2)
    assert "table inet other" in namespace.filter()
    assert namespace.filter().replace(namespace.run("nft", "-s", "list", "table", "inet", "other"), "") == rules
    close(one, two)


def test_where_the_filter_cannot_be_restored_no_tap_is_up(namespace: Namespace, tmp_path: Path) -> None:
    with Tapnet(namespace, tmp_path / "t") as tapnet:
        tapnet.settle(segment())
        one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
        thief = Thief(namespace)
        wait(namespace, "vt000001n0", up=False, seconds=2)
        wait(namespace, "vt000002n0", up=False, seconds=2)
        assert "error" in tapnet.ask(port(3))[0]
        assert tapnet.ask(Health())[0]["ok"]["problems"]
        # Removing works meanwhile, and once the thief has gone everything is as it was.
        thief.leave()
        wait(namespace, "vt000001n0", up=True, seconds=10)
        wait(namespace, "vt000002n0", up=True, seconds=2)
        assert passes(one, two, 1, 2)
        assert tapnet.ask(Health())[0]["ok"]["problems"] == []
        close(one, two)


def wait(namespace: Namespace, name: str, up: bool, seconds: float) -> None:
    end = time.monotonic() + seconds
    while ("UP" in namespace.links()[name].split(",")) is not up:
        assert time.monotonic() < end, (name, namespace.links())


# --- changes ----------------------------------------------------------------------------------------------------------


def test_elements_that_somebody_took_away_hinder_nobody(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    one = tapnet.plug(port(1))
    tapnet.process.send_signal(signal.SIGSTOP)  # so that it has not noticed yet
    namespace.run("nft", "flush set bridge vmshell macs")
    idents = [tapnet.send(Unplug(number=1, nic=0)), tapnet.send(port(2))]
    tapnet.process.send_signal(signal.SIGCONT)
    answers = [tapnet.receive() for _ in idents]
    assert ["ok" in body for _, body, _ in answers] == [True, True], answers
    assert '"vt000001n0"' not in namespace.filter() and '"vt000002n0"' in namespace.filter()
    close(one, answers[1][2])


def test_a_broker_that_dies_while_it_names_takes_nothing_along(tapnet: Tapnet, namespace: Namespace) -> None:
    """Its packets wait, and it is gone when they are read: a half-told story is no reason to remove what is not in it."""
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    tapnet.kill()
    tapnet.start()  # which knows nothing now
    first = tapnet.broker
    tapnet.process.send_signal(signal.SIGSTOP)
    tapnet.broker = tapnet.connect()
    for message in (SETTINGS, segment(), port(1, create=False), port(2, create=False), Settle()):
        tapnet.send(message)
    tapnet.broker.close()
    first.close()
    tapnet.process.send_signal(signal.SIGCONT)
    time.sleep(0.5)  # it is read before the next one comes
    tapnet.broker = tapnet.connect()
    tapnet.settle(segment(), port(1, create=False), port(2, create=False))
    assert passes(one, two, 1, 2)
    close(one, two)


def test_while_there_is_no_filter_no_change_brings_a_tap_up(tapnet: Tapnet, namespace: Namespace) -> None:
    """E31."""
    tapnet.tell(segment())
    fds = [tapnet.plug(port(number)) for number in (1, 2)]
    names = [f"vt00000{number}n0" for number in (1, 2)]

    def up() -> list[bool]:
        return ["UP" in namespace.links()[name].split(",") for name in names]

    def wait_until(wanted: bool) -> None:
        end = time.monotonic() + PATIENCE
        while up() != [wanted] * 2:
            assert time.monotonic() < end
            time.sleep(0.02)

    thief = Thief(namespace)
    wait_until(False)
    tapnet.tell(port(1, create=False, rate=5000), port(2, create=False, owner=4000))
    assert up() == [False, False]
    thief.leave()
    wait_until(True)
    end = time.monotonic() + PATIENCE
    while "rate 5Mbit" not in namespace.run("tc", "qdisc", "show", "dev", names[0]):
        assert time.monotonic() < end
        time.sleep(0.02)
    close(*fds)


def test_a_segment_that_cannot_change_stays_what_it_was(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    fd = tapnet.plug(port(1))
    before = namespace.run("ip", "-o", "addr", "show", "dev", "vtb000001")
    assert "10.77.1.1/24" in before
    for command in ("wire0 type veth peer name wire1", "vmshell000001 type bridge"):
        namespace.run("ip", "link", "add", *command.split())
    said = tapnet.refused(Segment(segment=1, kind="bridged", parent="wire0", vlan=12))  # by the last step of many
    assert "vmshell000001 already, and it is not ours" in said
    assert namespace.run("ip", "-o", "addr", "show", "dev", "vtb000001") == before
    assert tapnet.ask(Health())[0]["ok"]["problems"] == []
    close(fd)


def test_what_nobody_thought_of_fails_alone(tapnet: Tapnet, namespace: Namespace) -> None:
    """A batch that no broker sends: what is made and changed in one breath. Each of it comes about by itself."""
    tapnet.process.send_signal(signal.SIGSTOP)
    idents = [tapnet.send(message) for message in (segment(), port(1), port(1, create=False, rate=5000), port(2))]
    tapnet.process.send_signal(signal.SIGCONT)
    answers = [tapnet.receive() for _ in idents]
    assert ["ok" in body for _, body, _ in answers] == [True, True, True, True], answers
    assert "rate 5Mbit" in namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
    assert passes(answers[1][2], answers[3][2], 1, 2)
    close(*(fd for _, _, fd in answers if fd >= 0))


@pytest.mark.parametrize("then", ["nothing", "one of ours", "somebody's in another table"])
def test_a_notice_that_is_lost_is_missed(namespace: Namespace, then: str) -> None:
    code = f"""
import subprocess, sys
sys.path[:0] = {sys.path!r}
from tapnet.watch import Watch
def nft(text):
    subprocess.run(["nft", text], check=True)
nft("add table bridge vmshell; add table inet vmshell; add table inet other")
watch = Watch()
assert not watch.disturbed()
watch._notices.setsockopt(270, 2, 7)  # out of the group, and in again
nft("delete table bridge vmshell")
watch._notices.setsockopt(270, 1, 7)
watch.disturbed()
if {then!r} == "one of ours":
    before = watch.generation()
    nft("add chain inet vmshell c")
    watch.own(before)
elif {then!r} != "nothing":
    nft("add chain inet other c")
print(watch.disturbed(), watch.disturbed(), watch.disturbed())
"""
    done = subprocess.run(namespace.command(sys.executable, "-c", code), capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_who_receives_at_his_limit_has_a_queue_for_each_flow(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    fd = tapnet.plug(port(1, rate=1000))
    for rate, target in ((1000, "18.2ms"), (5000, "5ms")):
        tapnet.tell(port(1, create=False, rate=rate))  # the second time the queues are there
        shown = namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
        assert f"rate {rate // 1000}Mbit" in shown
        if tapnet.ask(Health())[0]["ok"]["features"]["tc-fq_codel"]:
            assert "qdisc fq_codel" in shown and "parent 1:1 limit 1000p" in shown and f"target {target}" in shown
        else:
            assert shown.count("qdisc") == 1
    tapnet.tell(port(1, create=False))
    assert "tbf" not in namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
    close(fd)


def test_settings_segments_ports_and_openings_change(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    one, two = tapnet.plug(port(1)), tapnet.plug(port(2))
    tapnet.tell(port(1, create=False, rate=5000, owner=4000))
    assert "rate 5Mbit" in namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
    tapnet.tell(port(1, create=False, rate=6000, owner=4000))
    assert "rate 6Mbit" in namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
    tapnet.tell(port(1, create=False, owner=4000))  # not without loss: the kernel changes the queue
    assert "tbf" not in namespace.run("tc", "qdisc", "show", "dev", "vt000001n0")
    stream = Stream(one, two)
    tapnet.tell(Settings(pool4=SETTINGS.pool4, pool6=SETTINGS.pool6, confined=[4000, 4001]))
    tapnet.tell(segment(outside="none", gateway4="", gateway6="fd77:0:0:1::1/64"))
    shown = namespace.run("ip", "-o", "addr", "show", "dev", "vtb000001")
    assert "fd77:0:0:1::1/64" in shown and "10.77.1.1/24" not in shown
    tapnet.tell(segment(outside="none"))
    shown = namespace.run("ip", "-o", "addr", "show", "dev", "vtb000001")
    assert "fd77:0:0:1::1/64" not in shown and "10.77.1.1/24" in shown
    before = namespace.filter()
    tapnet.tell(Open(number=1, nic=0, openings=[{"source": "vtb000002", "port": 8443}]))
    assert "8443" in namespace.filter()
    tapnet.tell(Open(number=1, nic=0))
    assert namespace.filter() == before
    assert stream.lost() == 0
    tapnet.tell(port(1, create=False, isolated=True), port(2, create=False, isolated=True))
    assert not passes(one, two, 1, 2, 0.5)
    assert "another MAC" in tapnet.refused(port(1, create=False, mac=mac(9)))
    close(one, two)


def test_five_hundred_ports(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(*(segment(number) for number in range(1, 4)))
    wanted = [port(number, segment=1 + number // 250) for number in range(1, 501)]
    for one in wanted:
        tapnet.send(one)
    fds = []
    for _ in wanted:
        _, body, fd = tapnet.receive()
        assert "ok" in body, body
        fds.append(fd)
    assert len([name for name in namespace.links() if "n0" in name]) == 500
    assert passes(fds[0], fds[100], 1, 101) and passes(fds[300], fds[301], 301, 302)
    close(*fds)
    for one in wanted:
        tapnet.send(Unplug(number=one.number, nic=0))
    for _ in wanted:
        assert "ok" in tapnet.receive()[1]
    assert namespace.links() == {} and "n0" not in namespace.filter()


# --- who may, and what they send --------------------------------------------------------------------------------------


def test_only_root_and_itself_may_ask(namespace: Namespace, nobodys: Path) -> None:
    script = """
import socket, sys
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
s.connect(sys.argv[1])
s.settimeout(20)
try:
    s.send(b'{"id":1,"verb":"health"}')
    print(len(s.recv(100)))
except (BrokenPipeError, ConnectionResetError):
    print(0)
"""
    with Tapnet(namespace, nobodys) as tapnet:
        path = tapnet.layout.tapnet_socket
        assert os.stat(path).st_mode & 0o777 == 0o600
        for folder in (path, tapnet.layout.run):
            os.chmod(folder, 0o777)  # the permissions are one lock, the peer's uid is another
        done = subprocess.run([*setpriv(""), sys.executable, "-c", script, path], capture_output=True, text=True)
        assert done.stdout == "0\n", done
        assert "ok" in tapnet.ask(Health())[0]


def test_garbage_changes_nothing(tapnet: Tapnet, namespace: Namespace) -> None:
    tapnet.tell(segment())
    fd = tapnet.plug(port(1))
    for packet in (b"{", b"\0", b"[]", b'{"id":1.5,"verb":"health"}', b"x" * 70_000, b'{"id":3,"verb":["port"]}', b'{"verb":7}'):
        tapnet.broker.send(packet)
        assert "error" in tapnet.receive()[1]
    read, write = os.pipe()
    wire.send(tapnet.broker, {"id": 1, "verb": "health"}, (read, write))
    assert "error" in tapnet.receive()[1]
    close(read, write)
    assert passes_alone(tapnet, fd)
    close(fd)


def test_nothing_happens_before_settle(namespace: Namespace, tmp_path: Path) -> None:
    with Tapnet(namespace, tmp_path / "t") as tapnet:
        assert "`settings` come first" in tapnet.refused(Settle())
        tapnet.tell(SETTINGS, segment())
        assert "before `settle`" in tapnet.refused(port(1))
        assert namespace.links() == {} and '"vt000' not in namespace.filter()
        tapnet.tell(Settle())
        close(tapnet.plug(port(1)))


def test_a_newer_broker_takes_the_place_of_the_old_one(tapnet: Tapnet) -> None:
    old = tapnet.broker
    tapnet.broker = tapnet.connect()
    assert "ok" in tapnet.ask(Health())[0]
    with contextlib.suppress(ConnectionResetError):
        assert wire.recv(old) is None
    old.close()


def test_brokers_that_come_and_go_before_they_are_looked_at(tapnet: Tapnet) -> None:
    tapnet.process.send_signal(signal.SIGSTOP)
    callers = [tapnet.connect() for _ in range(5)]
    for caller in callers:
        wire.send(caller, {"id": 1, "verb": "health"})
        caller.close()
    tapnet.broker.close()
    tapnet.broker = tapnet.connect()
    tapnet.process.send_signal(signal.SIGCONT)
    assert "ok" in tapnet.ask(Health())[0]


def test_a_broker_that_does_not_read_gets_everything_later(tapnet: Tapnet) -> None:
    for _ in range(2000):
        with contextlib.suppress(BlockingIOError):
            tapnet.broker.settimeout(0)
            tapnet.send(Health())
    tapnet.broker.settimeout(1)
    count = 0
    with contextlib.suppress(TimeoutError):
        while True:
            assert "ok" in tapnet.receive()[1]
            count += 1
    assert count > 100
    tapnet.broker.settimeout(PATIENCE)
    assert "ok" in tapnet.ask(Health())[0]


def test_with_net_admin_and_no_other_right(namespace: Namespace, nobodys: Path) -> None:
    """As the service runs: a uid of its own with CAP_NET_ADMIN."""
    with Tapnet(namespace, nobodys, (*mounted(tun_for(nobodys)), *setpriv())) as tapnet:
        status = Path(f"/proc/{tapnet.process.pid}/status").read_text()
        assert f"Uid:\t{NOBODY}\t{NOBODY}" in status and "CapEff:\t0000000000001000" in status
        tapnet.settle(segment(gateway6="fd77:0:0:1::1/64"))
        assert tapnet.ask(Health())[0]["ok"]["problems"] == []
        one, two = tapnet.plug(port(1, rate=100_000)), tapnet.plug(port(2, isolated=False))
        assert passes(one, two, 1, 2)
        namespace.run("nft", "flush ruleset")
        time.sleep(0.5)
        assert '"vt000001n0"' in namespace.filter()
        close(one, two)
        tapnet.tell(Unplug(number=1, nic=0), Unplug(number=2, nic=0))
        assert namespace.links() == {}


def tun_for(folder: Path) -> Path:
    """A device node like /dev/net/tun that NOBODY may open, as the installed host's is by its group."""
    node = folder / "tun"
    os.mknod(node, 0o020600, os.stat("/dev/net/tun").st_rdev)
    os.chown(node, NOBODY, NOBODY)
    return node
