"""dnsmasq as the broker configures it, beside a real tapnet: who gets which address, which names there are, who is the router."""

from __future__ import annotations

import ipaddress
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.frames import BROADCAST, dhcp, ethernet, icmp6, ip4, ip6, udp
from tests.process.tapnets import Namespace, Tapnet, mac, segment, unable
from vmshell.broker.composition import Parts
from vmshell.broker.host.processes import Host
from vmshell.broker.network.interfaces import Interface
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.vm.objects import Store
from vmshell.broker.vm.vm import Vm
from vmshell.dnsmasq.configuration import configuration
from vmshell.layout import Layout
from vmshell.messages import Port
from vmshell.model.definition import Definition, Nic
from vmshell.model.policy import parse
from vmshell.numbering import bridge_name

DNSMASQ = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin")
REASON = unable() or ("" if DNSMASQ else "dnsmasq-base is not installed")
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON or "-")]

POLICY = '[host]\nipv6_pool = "fd77::/48"\ndns_servers = ["192.0.2.1"]\n'


CHOSEN = "06:11:22:33:44:55"  # a MAC of its owner's choice


class Net:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, nic: Nic) -> None:
        monkeypatch.setattr("vmshell.broker.host.processes._relay_gid", os.getgid)
        self.space = Namespace()
        self.tapnet = Tapnet(self.space, folder / "tapnet")
        rules = parse(POLICY, "policy.toml")
        roots = {name: str(folder / name) for name in ("etc", "state", "run", "log")}
        for root in roots.values():
            os.makedirs(root)
        host = Host(embedded=False)
        host.systemd = False
        self.parts = Parts(Layout(**roots, embedded=False), rules, Loop(print), host)
        self.parts.addresses.load()
        self.parts.dnsmasq.begin()
        vm, interfaces = self.machine(1, "web1", nic)
        self.interface = interfaces[0]
        self.parts.dnsmasq.write(vm, interfaces, interfaces)
        assert self.parts.dnsmasq.entries(vm, interfaces)["hosts"].count("web1.alice.vm") == 2
        plan = self.parts.addresses.plan
        self.gateway = plan.gateway4(0).partition("/")[0]
        self.tapnet.settle(segment(0, gateway4=plan.gateway4(0), gateway6=plan.gateway6(0)))
        self.taps: list[int] = []
        self.tap = self.plug(1, self.interface)
        self.space.run("ip", "addr", "add", "127.77.0.53/32", "dev", "lo")
        conf = f"{folder}/conf"
        # As it is written, but for the uid: the namespace has one.
        Path(conf).write_text(configuration(rules.host, self.parts.layout.names) + "user=root\n")
        os.chmod(folder, 0o755)
        command = self.space.command(str(DNSMASQ), "--keep-in-foreground", f"--conf-file={conf}", "--pid-file=")
        self.server = subprocess.Popen([*command, "--log-facility=-"], stderr=subprocess.DEVNULL)
        time.sleep(0.5)

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        for tap in self.taps:
            os.close(tap)
        self.tapnet.close()
        self.space.close()

    def plug(self, number: int, interface: Interface) -> int:
        """A tap for *interface*, whose MAC the host knows: nobody answers its questions here."""
        port = Port(number=number, nic=0, segment=interface.segment, mac=interface.mac, create=True)
        port.address4, port.address6 = interface.address4, interface.address6
        tap = self.tapnet.plug(port)
        os.set_blocking(tap, False)
        self.taps.append(tap)
        self.space.run(
            "ip", "neigh", "replace", interface.address4, "lladdr", interface.mac, "dev", bridge_name(interface.segment)
        )
        return tap

    def to_gateway(self, interface: Interface, datagram: bytes) -> bytes:
        """The frame with *interface*'s datagram for its gateway."""
        bridge, plan = bridge_name(interface.segment), self.parts.addresses.plan
        hardware = self.space.run("cat", f"/sys/class/net/{bridge}/address").strip()
        gateway = plan.gateway4(interface.segment).partition("/")[0]
        return ethernet(hardware, interface.mac, 0x0800, ip4(interface.address4, gateway, 17, datagram))

    def machine(self, number: int, name: str, nic: Nic, uid: int = 1001, owner: str = "alice") -> tuple[Vm, list[Interface]]:
        """A VM of alice's, and its interfaces."""
        definition = Definition(name, nics=(nic,))
        vm = Vm(number, uid, owner, definition, 0, Store(f"{self.parts.layout.state}/none", name))
        return vm, self.parts.interfaces.of(vm, definition, give=True)

    def offer(self) -> bytes:
        """What its interface is offered by DHCP."""
        frame = ethernet(BROADCAST, self.interface.mac, 0x0800, discover(self.interface.mac))
        return self.answer(frame, lambda frame: frame[34:38] == b"\0\x43\0\x44")

    def neighbour(self) -> tuple[int, Interface]:
        """Bob's VM, on another segment: its tap and its interface."""
        vm, (interface,) = self.machine(7, "evil", Nic(), 1002, "bob")
        self.parts.dnsmasq.write(vm, [interface], [interface])
        plan = self.parts.addresses.plan
        self.tapnet.tell(
            segment(interface.segment, gateway4=plan.gateway4(interface.segment), gateway6=plan.gateway6(interface.segment))
        )
        tap = self.plug(7, interface)
        time.sleep(0.5)  # dnsmasq has to see the interface
        return tap, interface

    def answer(self, frame: bytes, wanted: Callable[[bytes], bool], seconds: float = 5.0, tap: int = -1) -> bytes:
        """Send *frame* again and again until something *wanted* comes; empty if nothing does."""
        end, tap = time.monotonic() + seconds, tap if tap >= 0 else self.tap
        while time.monotonic() < end:
            os.write(tap, frame)
            while select.select([tap], [], [], 0.5)[0]:
                got = os.read(tap, 1 << 16)
                if wanted(got):
                    return got
        return b""


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    made = Net(tmp_path, monkeypatch, Nic())
    yield made
    made.close()


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Net]:
    made = Net(tmp_path, monkeypatch, Nic(mac=CHOSEN))
    yield made
    made.close()


def discover(hardware: str) -> bytes:
    options = b"\x37\x06\x01\x03\x06\x0c\x0f\x1c\x0c\x04evil"
    return ip4("0.0.0.0", "255.255.255.255", 17, dhcp(hardware, 1, options))


def options_of(offer: bytes) -> dict[int, bytes]:
    found, rest = {}, offer[14 + 20 + 8 + 240 :]
    while rest and rest[0] != 255:
        if rest[0]:
            found[rest[0]], rest = rest[2 : 2 + rest[1]], rest[2 + rest[1] :]
        else:
            rest = rest[1:]
    return found


def test_a_card_gets_its_own_address_and_names(net: Net) -> None:
    offer = net.offer()
    assert offer, "no offer"
    assert str(ipaddress.IPv4Address(offer[58:62])) == net.interface.address4
    options, gateway = options_of(offer), ipaddress.IPv4Address(net.gateway).packed
    assert (options[1], options[3], options[6]) == (b"\xff\xff\xff\x00", gateway, gateway)
    assert (options[12], options[15].rstrip(b"\0")) == (b"web1", b"alice.vm") and 28 not in options


def test_nobody_else_gets_an_answer(net: Net) -> None:
    """Its client's address says another MAC than the frame's: the filter lets it by, dnsmasq knows nobody of that name."""
    frame = ethernet(BROADCAST, mac(1), 0x0800, discover("06:00:00:00:00:99"))
    assert net.answer(frame, lambda frame: frame[34:38] == b"\0\x43\0\x44", 2.0) == b""


def test_e33_who_has_chosen_the_same_mac_takes_no_address_away_while_it_is_off(chosen: Net) -> None:
    for number, name in ((2, "web2"), (3, "web0")):
        vm, interfaces = chosen.machine(number, name, Nic(mac=CHOSEN))
        assert interfaces[0].segment == chosen.interface.segment
        chosen.parts.dnsmasq.write(vm, interfaces)
    time.sleep(0.5)
    assert str(ipaddress.IPv4Address(chosen.offer()[58:62])) == chosen.interface.address4


def question(name: str, kind: int = 1, what: int = 1, ident: int = 7) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack("!HHHHHH", ident, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, what)


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [("web1.alice.vm", 1, True), ("web1.alice.vm", 28, True), ("evil.alice.vm", 1, False), ("evil", 1, False)],
)
def test_names_are_the_brokers_and_nobody_elses(net: Net, name: str, kind: int, found: bool) -> None:
    """What a guest calls itself (`evil`, in its DHCP request) is nobody's name."""
    net.answer(ethernet(BROADCAST, mac(1), 0x0800, discover(mac(1))), lambda frame: frame[34:38] == b"\0\x43\0\x44")
    frame = net.to_gateway(net.interface, udp(4000, 53, question(name, kind)))
    got = net.answer(frame, lambda frame: frame[34:36] == b"\0\x35", 4.0)
    assert got, "no answer at all"
    answers = int.from_bytes(got[48:50], "big")
    own = ipaddress.ip_address(net.interface.address4 if kind == 1 else net.interface.address6).packed
    assert (answers == 1 and got.endswith(own)) is found


def test_e13_a_name_that_a_client_gives_itself_takes_no_lease_away(net: Net) -> None:
    """Two guests made of one disk call themselves the same, and anybody may call himself what another does."""
    tap, interface = net.neighbour()
    name = b"\x3d\x07\x01" + bytes.fromhex(net.interface.mac.replace(":", ""))

    def asks(kind: int, who: Interface, tap: int, unicast: bool = False) -> int:
        options = name if unicast or kind == 1 else name + b"\x32\x04" + ipaddress.IPv4Address(who.address4).packed
        datagram = dhcp(who.mac, kind, options, who.address4 if unicast else "0.0.0.0")
        frame = ethernet(BROADCAST, who.mac, 0x0800, ip4("0.0.0.0", "255.255.255.255", 17, datagram))
        got = net.answer(net.to_gateway(who, datagram) if unicast else frame, lambda got: got[34:38] == b"\0\x43\0\x44", tap=tap)
        assert got, "no answer"
        return options_of(got)[53][0]

    offer, request, acknowledged = 2, 3, 5
    assert [asks(1, net.interface, net.tap), asks(request, net.interface, net.tap)] == [offer, acknowledged]
    assert [asks(1, interface, tap), asks(request, interface, tap)] == [offer, acknowledged]
    assert asks(request, net.interface, net.tap, unicast=True) == acknowledged, "his has ended hers"


def test_f08_names_that_nobody_answers_take_none_from_others(net: Net) -> None:
    """A guest asks for names whose server, its own, is silent; dnsmasq keeps each question for seconds."""
    tap, interface = net.neighbour()
    net.space.run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
    server = subprocess.Popen(net.space.command(sys.executable, "-c", UPSTREAM))
    try:
        time.sleep(0.5)
        for number in range(190):
            os.write(tap, net.to_gateway(interface, udp(5000 + number, 53, question(f"x{number}.slow", ident=100 + number))))
        time.sleep(0.3)
        frame = net.to_gateway(net.interface, udp(4000, 53, question("a.good")))
        got = net.answer(frame, lambda got: got[34:36] == b"\0\x35", 8.0)
        assert got and got[45] & 15 == 0 and got.endswith(bytes([1, 2, 3, 4]))
    finally:
        server.kill()
        server.wait()


UPSTREAM = r"""
import socket
sock = socket.socket(type=socket.SOCK_DGRAM)
sock.bind(("192.0.2.1", 53))
while True:
    asked, whom = sock.recvfrom(2000)
    if b"\x04good" in asked:
        end = asked.index(b"\x04good\0") + 10
        answer = b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x01\x02\x03\x04"
        sock.sendto(asked[:2] + b"\x81\x80\0\x01\0\x01\0\0\0\0" + asked[12:end] + answer, whom)
"""


def test_guests_do_not_learn_whom_the_host_asks(net: Net) -> None:
    """CHAOS TXT servers.bind, as dnsmasq answers it by itself."""
    frame = net.to_gateway(net.interface, udp(4000, 53, question("servers.bind", 16, 3)))
    got = net.answer(frame, lambda got: got[34:36] == b"\0\x35", 4.0)
    assert b"192.0.2.1" not in got


def test_the_router_is_us_and_gives_addresses_by_dhcp_only(net: Net) -> None:
    link = "fe80::400:ff:fe00:1"
    body = b"\0\0\0\0\x01\x01" + bytes.fromhex(mac(1).replace(":", ""))
    message = icmp6(133, body)
    pseudo = ipaddress.IPv6Address(link).packed + ipaddress.IPv6Address("ff02::2").packed + struct.pack("!II", len(message), 58)
    total = sum(struct.unpack(f"!{len(pseudo + message) // 2}H", pseudo + message))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    message = message[:2] + struct.pack("!H", ~total & 0xFFFF) + message[4:]
    frame = ethernet("33:33:00:00:00:02", mac(1), 0x86DD, ip6(link, "ff02::2", 58, message))
    advert = net.answer(frame, lambda got: got[12:14] == b"\x86\xdd" and got[54:55] == b"\x86", 10.0)
    assert advert, "no router advertisement"
    assert ipaddress.IPv6Address(advert[22:38]) == ipaddress.IPv6Address("fe80::1")
    assert advert[59] & 0x80, "managed: addresses are given by DHCP"
