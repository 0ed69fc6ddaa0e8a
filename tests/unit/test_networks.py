"""What the broker decides about networks: addresses for good, who may reach what, what dnsmasq and tapnet are told."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.accounts import People
from tests.fakes.parts import PartsWith
from tests.fakes.tapnet import Tapnet
from tests.unit.test_live import held
from vmshell import wire
from vmshell.broker.composition import Parts
from vmshell.broker.host.processes import Host
from vmshell.broker.network import attachments as networks_module
from vmshell.broker.network import passt, tapnet_sync
from vmshell.broker.network.addresses import WITHOUT_SUBNET, Addresses
from vmshell.broker.network.attached import Running
from vmshell.broker.network.interfaces import Interface
from vmshell.broker.network.openings import Openings
from vmshell.broker.network.taps import close
from vmshell.broker.runtime import log
from vmshell.broker.runtime.call import Peer
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.vm.access import authorise
from vmshell.broker.vm.objects import Store
from vmshell.broker.vm.vm import Published, Vm
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.messages import OPENINGS_MAX, RUNNING, Connect, Publish, Rm
from vmshell.model.addressing import Plan
from vmshell.model.definition import Definition, Nic
from vmshell.model.policy import parse
from vmshell.numbering import bridge_name
from vmshell.refusals import BadName, NetworkFailed, NoAddress, NoSuchVm, PortTaken, StorageFailed, TooOften

ALICE, BOB = (1001, "alice"), (1002, "bob")
POLICY = """
[defaults]
forward_ports = "2000-8999"
[networks.lan]
kind = "shared"
isolated = true
[networks.db]
kind = "service"
providers = ["carol"]
[networks.office]
kind = "bridged"
bridge = "br0"
[networks.off]
kind = "none"
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parts]:
    roots = {name: str(tmp_path / name) for name in ("etc", "state", "run", "log")}
    for root in roots.values():
        os.makedirs(root)
    monkeypatch.setattr("vmshell.broker.host.processes._relay_gid", lambda: os.getgid())
    monkeypatch.setattr(networks_module, "DNSMASQ", "/bin/true")
    layout = Layout(**roots, embedded=False)
    rules = parse(POLICY, "policy.toml")
    names = {"alice": 1001, "bob": 1002, "carol": 1003, "dave": 1004}
    host = Host(embedded=False)

    def raises(exc: BaseException) -> None:
        raise exc

    host.systemd = False
    people = People(names, {"staff": {"bob", "dave"}})
    made = PartsWith(layout, rules, Loop(raises), host, accounts=people)
    made.addresses.load()
    made.dnsmasq.begin()
    yield made
    made.tapnet.close()


def machine(parts: Parts, number: int, owner: str, *nics: Nic) -> Vm:
    uid = parts.accounts.uid_of(owner)
    assert uid is not None
    definition = Definition(f"web{number}", nics=nics)
    return Vm(number, uid, owner, definition, 0, Store(f"{parts.layout.state}/none", "x"))


def register(parts: Parts, *vms: Vm) -> None:
    for vm in vms:
        parts.registry.add(vm)


# --- addresses --------------------------------------------------------------------------------------------------------


def test_an_address_is_for_good(tmp_path: Path) -> None:
    path, plan = str(tmp_path / "addresses.json"), Plan("10.77.0.0/16", "", 24)
    first = Addresses(path, plan)
    alice, bob = first.segment("users", ALICE, subnet=True), first.segment("users", BOB, subnet=True)
    assert alice != bob
    hosts = [first.host("users", alice, number, 0) for number in (1, 2, 3)]
    assert len(set(hosts)) == 3
    again = Addresses(path, plan)
    again.load()
    assert again.segment("users", ALICE, subnet=True) == alice
    assert [again.host("users", alice, number, 0) for number in (1, 2, 3)] == hosts
    again.release(2)
    assert again.host("users", alice, 3, 0) == hosts[2]


def test_what_is_given_back_rests_and_then_is_there_for_others(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path / "a.json"), Plan("10.77.0.0/24", "", 29))
    segment = addresses.segment("users", ALICE, subnet=True)
    hosts = [addresses.host("users", segment, number, 0) for number in (1, 2)]
    addresses.release(2)
    assert addresses.host("users", segment, 3, 0) not in hosts
    given = [addresses.host("users", segment, number, 0) for number in range(4, 4 + addresses.plan.hosts - 2)]
    assert hosts[1] in given and len({*given, hosts[0]}) == addresses.plan.hosts - 1


def test_what_cannot_be_written_is_not_believed(tmp_path: Path) -> None:
    """An address that a broker after us does not know of would be given out twice."""
    folder = tmp_path / "state"
    addresses = Addresses(str(folder / "a.json"), Plan("10.77.0.0/16", "", 24))
    with pytest.raises(StorageFailed):
        addresses.segment("users", ALICE, subnet=True)
    assert addresses.known("users", ALICE, subnet=True) is None
    folder.mkdir()
    segment = addresses.segment("users", ALICE, subnet=True)
    addresses.host("users", segment, 1, 0)
    folder.rename(tmp_path / "away")
    with pytest.raises(StorageFailed):
        addresses.host("users", segment, 2, 0)
    with pytest.raises(StorageFailed):
        addresses.release(1)
    assert addresses.known_host(segment, 2, 0) is None and addresses.known_host(segment, 1, 0) is not None


def test_a_segment_without_cards_is_given_back(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path / "a.json"), Plan("10.77.0.0/16", "", 24))
    segment = addresses.segment("users", ALICE, subnet=True)
    addresses.host("users", segment, 1, 0)
    addresses.release(1)
    assert addresses.known("users", ALICE, subnet=True) is None and addresses.private() == {}


def test_a_pool_that_is_exhausted_says_so(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path / "a.json"), Plan("10.77.0.0/24", "", 29))
    segments = [addresses.segment("users", (uid, "x"), subnet=True) for uid in range(32)]
    assert len(set(segments)) == 32
    with pytest.raises(NoAddress, match="32 segments"):
        addresses.segment("users", (99, "x"), subnet=True)
    assert addresses.segment("office", None, subnet=False) >= WITHOUT_SUBNET, "a bridge without addresses of ours needs none"
    for number in range(1, addresses.plan.hosts + 1):
        addresses.host("users", segments[0], number, 0)
    with pytest.raises(NoAddress, match=f"{addresses.plan.hosts} addresses"):
        addresses.host("users", segments[0], 100, 0)


def test_no_address_is_outside_of_a_pool_that_has_become_another(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    wide = Addresses(path, Plan("10.77.0.0/16", "", 24))
    for uid in range(20):
        wide.host("users", wide.segment("users", (uid, "x"), subnet=True), uid + 1, 0)
    office = wide.segment("office", None, subnet=False)
    for number in range(30, 60):
        wide.host("users", wide.segment("users", (0, "x"), subnet=True), number, 0)
    narrow = Addresses(path, Plan("10.99.0.0/20", "", 28))
    narrow.load()
    with pytest.raises(NoAddress):
        for uid in range(300):
            assert narrow.segment("users", (uid, "x"), subnet=True) < narrow.plan.segments
    small = narrow.segment("users", (0, "x"), subnet=True)
    assert narrow.known_host(small, 59, 0) is None and narrow.known_host(small, 1, 0) == 2
    with pytest.raises(NoAddress):
        narrow.host("users", small, 59, 0)
    # The same name, another kind: neither has the other's number.
    assert wide.known("office", None, subnet=True) is None and wide.segment("office", None, subnet=True) < 256 <= office


def test_what_cards_stand_on_is_given_to_nobody_else_whatever_becomes_of_the_pool(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    wide, narrow = (Addresses(path, Plan(pool, "", 28)) for pool in ("10.77.0.0/24", "10.77.0.0/26"))
    for uid in range(6):
        wide.host("users", wide.segment("users", (uid, "x"), subnet=True), uid + 1, 0)
    wide.release(1)  # which ran on the first
    narrow.load()
    assert narrow.segment("users", (5, "x"), subnet=True) == 0  # VM 6 runs on, on what was the sixth
    wide.load()
    for uid in range(10, 15):
        assert wide.segment("users", (uid, "x"), subnet=True) != 5
    wide.release(6)
    assert wide.segment("users", (16, "x"), subnet=True) == 5, "nothing of it is left"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "segments": 3, "cards": {}}'])
def test_a_damaged_list_of_addresses_is_no_empty_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    addresses = Addresses(str(path), Plan("10.77.0.0/16", "", 24))
    addresses.load()
    with pytest.raises(StorageFailed, match="list of addresses cannot be used"):
        addresses.segment("users", ALICE, subnet=True)
    assert path.read_text() == text


# --- interfaces ------------------------------------------------------------------------------------------------------------


def test_cards_by_kind(parts: Parts) -> None:
    vm = machine(parts, 7, "alice", Nic(), Nic("lan"), Nic("office"), Nic("off"), Nic("db"))
    own, lan, office, off, db = parts.interfaces.of(vm, vm.definition, give=True)
    assert own.address4 and lan.address4 and db.address4 and not office.address4 and not off.address4
    assert len({own.segment, lan.segment, office.segment, db.segment}) == 4 and off.segment == -1
    assert (own.mac, lan.mac) == ("06:00:00:00:00:07", "06:01:00:00:00:07")
    isolated = [parts.interfaces.port_message(vm, interface, create=True).isolated for interface in (own, lan, office, db)]
    assert isolated == [False, True, False, True]
    assert parts.interfaces.segment_message(office).bridge == "br0"
    assert parts.interfaces.segment_message(own).gateway4.startswith("10.77.")
    carols = machine(parts, 8, "carol", Nic("db"))
    (provider,) = parts.interfaces.of(carols, carols.definition, give=True)
    assert provider.provides and not parts.interfaces.port_message(carols, provider, create=True).isolated
    assert provider.segment == db.segment


def test_two_users_of_one_private_network_share_no_segment(parts: Parts) -> None:
    (alices,) = parts.interfaces.of(machine(parts, 1, "alice", Nic()), Definition("a", nics=(Nic(),)), give=True)
    (bobs,) = parts.interfaces.of(machine(parts, 2, "bob", Nic()), Definition("b", nics=(Nic(),)), give=True)
    assert alices.segment != bobs.segment
    assert alices.address4.rpartition(".")[0] != bobs.address4.rpartition(".")[0]


def test_no_two_have_one_segment_when_a_network_becomes_another(parts: Parts) -> None:
    """Whoever runs stays where he is, alone with those of his network; and there is again what there was before."""

    def segment(number: int, owner: str, network: str, text: str = POLICY) -> int:
        parts.policies.policy = parse(text, "policy.toml")
        vm = machine(parts, number, owner, Nic(network))
        return parts.interfaces.of(vm, vm.definition, give=True)[0].segment

    shared, bridged = segment(1, "alice", "lan"), segment(2, "alice", "office")
    text = '[networks.lan]\nkind = "bridged"\nbridge = "br1"\n[networks.office]\nkind = "shared"\n'
    others = [segment(3, "bob", "lan", text), segment(4, "bob", "users", text), segment(5, "bob", "office", text)]
    assert len({shared, bridged, *others}) == 5
    assert segment(6, "carol", "office", POLICY.replace("br0", "br1")) == others[0], "one bridge of the host is one segment"
    vlan = POLICY.replace('bridge = "br0"', 'parent = "br0"\nvlan = 7')
    vlans = [segment(number, "dave", "office", vlan.replace("7", str(number))) for number in (7, 8)]
    assert len({shared, bridged, *others, *vlans}) == 7
    assert [segment(1, "alice", "lan"), segment(2, "alice", "office"), segment(9, "dave", "lan")] == [shared, bridged, shared]


def test_a_network_that_is_gone(parts: Parts) -> None:
    vm = machine(parts, 1, "alice", Nic("gone"))
    with pytest.raises(NetworkFailed, match="no network gone any more"):
        parts.interfaces.of(vm, vm.definition, give=True)


# --- what is open -----------------------------------------------------------------------------------------------------


def ways(parts: Parts, vm: Vm, interface: Interface, running: Running) -> set[tuple[object, ...]]:
    found = parts.openings(running).to(vm, interface)
    return {(way["source"], way["proto"], way["port"], way["host_port"]) for way in found}


def test_openings_follow_from_what_is_published(parts: Parts) -> None:
    alice = machine(parts, 1, "alice", Nic())
    bob, dave = machine(parts, 2, "bob", Nic()), machine(parts, 3, "dave", Nic())
    running = [(vm, parts.interfaces.of(vm, vm.definition, give=True)) for vm in (alice, bob, dave)]
    bridges = {vm.owner: f"vtb{interfaces[0].segment:06x}" for vm, interfaces in running}
    interface = running[0][1][0]
    assert ways(parts, alice, interface, running) == set()
    alice.published = [Published(80, "tcp", "bob"), Published(53, "udp", "@staff"), Published(22, "tcp", "world", 2222)]
    assert ways(parts, alice, interface, running) == {
        (bridges["bob"], "tcp", 80, 0),
        (bridges["bob"], "udp", 53, 0),
        (bridges["dave"], "udp", 53, 0),
        ("", "tcp", 22, 2222),
    }


def test_what_the_policy_no_longer_grants_is_closed(parts: Parts) -> None:
    alice, bob = machine(parts, 1, "alice", Nic()), machine(parts, 2, "bob", Nic())
    running = [(vm, parts.interfaces.of(vm, vm.definition, give=True)) for vm in (alice, bob)]
    interface = running[0][1][0]
    alice.published = [Published(80, "tcp", "bob"), Published(22, "tcp", "world", 2222)]
    assert len(ways(parts, alice, interface, running)) == 2
    parts.policies.policy = parse(POLICY.replace("2000-8999", "3000-3001"), "policy.toml")
    assert {port for _, _, port, _ in ways(parts, alice, interface, running)} == {80}
    parts.policies.policy = parse(POLICY.replace("[defaults]", "[defaults]\npublished_max = 1"), "policy.toml")
    assert {port for _, _, port, _ in ways(parts, alice, interface, running)} == {80}
    parts.policies.policy = parse(POLICY.replace("[defaults]", "[defaults]\npublished_max = 0"), "policy.toml")
    assert ways(parts, alice, interface, running) == set()


def test_providers_of_a_service_are_let_to_each_other_by_what_they_publish(parts: Parts) -> None:
    parts.policies.policy = parse(POLICY.replace('["carol"]', '["carol", "dave"]'), "policy.toml")
    carol, dave = machine(parts, 1, "carol", Nic("db")), machine(parts, 2, "dave", Nic("db"))
    running = [(vm, parts.interfaces.of(vm, vm.definition, give=True)) for vm in (carol, dave)]
    carol.published = [Published(5432, "tcp", "dave")]
    assert ways(parts, carol, running[0][1][0], running) == {("vt000002n0", "tcp", 5432, 0)}


def test_d22_the_uid_of_an_account_that_is_gone_brings_nothing_along(parts: Parts) -> None:
    """carl has bob's uid now: he is in none of bob's segments, and his sockets reach none of bob's VMs."""
    bob = machine(parts, 1, "bob", Nic())
    (old,) = parts.interfaces.of(bob, bob.definition, give=True)
    people = cast(Any, parts.accounts)
    names = {"alice": 1001, "carl": 1002}
    people.uid_of, people.user_of = names.get, lambda uid: next((name for name in names if names[name] == uid), "")
    carl = machine(parts, 2, "carl", Nic())
    (new,) = parts.interfaces.of(carl, carl.definition, give=True)
    assert new.segment != old.segment
    assert parts.interfaces.port_message(bob, old, create=False).owner == 0
    assert parts.interfaces.port_message(carl, new, create=False).owner == 1002
    alice = machine(parts, 3, "alice", Nic())
    alice.published = [Published(80, "tcp", "bob"), Published(81, "tcp", "carl")]
    running = [(vm, parts.interfaces.of(vm, vm.definition, give=True)) for vm in (alice, bob, carl)]
    assert {(source, port) for source, _, port, _ in ways(parts, alice, running[0][1][0], running)} == {
        (bridge_name(new.segment), 81)
    }


def made_anew(parts: Parts) -> tuple[Vm, Vm]:
    """web1 of the bob who is gone, and web1 of the bob who came after him with another uid."""
    old, new = machine(parts, 1, "bob", Nic(), Nic("lan")), machine(parts, 2, "bob", Nic(), Nic("lan"))
    old.uid, new.definition = 1500, old.definition
    register(parts, old, new)
    return old, new


def test_d22_an_account_that_was_made_anew_has_names_of_its_own(parts: Parts) -> None:
    old, new = made_anew(parts)
    people = cast(Any, parts.accounts)
    now, people.uid_of = people.uid_of, lambda user: 1500
    hosts = Path(parts.layout.names, "hosts")
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        plug_in(parts, tapnet, old)
        assert [line.split()[1] for line in (hosts / "1").read_text().splitlines()] == ["web1.bob.vm", "net1.web1.bob.vm"]
        people.uid_of = lambda user: None
        assert parts.interfaces.domain_of("bob", 1500) == "bob.vm", "the directory does not answer"
        people.uid_of = now
        plug_in(parts, tapnet, new)
    assert [line.split()[1] for line in (hosts / "2").read_text().splitlines()] == ["web1.bob.vm", "net1.web1.bob.vm"]
    assert [line.split()[1] for line in (hosts / "1").read_text().splitlines()] == ["web1.u1500.vm", "net1.web1.u1500.vm"]
    assert "bob.vm" not in Path(parts.layout.names, "dhcp-opts", "1").read_text()


def test_d22_an_administrator_says_which_account_he_means(parts: Parts) -> None:
    old, new = made_anew(parts)
    root, registry = Peer(0, "root", admin=True), cast(Any, [old, new])
    with pytest.raises(BadName, match="several accounts were called bob; say whose by uid, 1500/web1 or 1002/web1"):
        authorise(root, Rm(vm="bob/web1"), registry)
    assert authorise(root, Rm(vm="1500/web1"), registry) is old and authorise(root, Rm(vm="1002/web1"), registry) is new
    assert authorise(root, Rm(vm="bob/web1"), cast(Any, [old])) is old
    with pytest.raises(NoSuchVm):
        authorise(root, Rm(vm="1001/web1"), registry)


def test_on_a_service_network_consumers_are_let_in_one_by_one(parts: Parts) -> None:
    carol = machine(parts, 1, "carol", Nic("db"))
    bob, alice = machine(parts, 2, "bob", Nic("db")), machine(parts, 3, "alice", Nic("db"))
    running = [(vm, parts.interfaces.of(vm, vm.definition, give=True)) for vm in (carol, bob, alice)]
    interface = running[0][1][0]
    carol.published = [Published(5432, "tcp", "bob")]
    assert {source for source, *_ in ways(parts, carol, interface, running)} == {"vt000002n0"}
    carol.published = [Published(5432, "tcp", "world", 5432)]
    assert {source for source, *_ in ways(parts, carol, interface, running)} == {"vt000002n0", "vt000003n0"}
    bob.published = [Published(80, "tcp", "world", 8080)]
    assert ways(parts, bob, running[1][1][0], running) == set(), "a consumer offers nothing"


class Answer:
    """A call whose peer is alice."""

    def __init__(self) -> None:
        self.peer = Peer(1001, "alice", admin=False)
        self.replies: list[dict[str, object]] = []

    def reply(self, answer: dict[str, object]) -> None:
        self.replies.append(answer)

    def guard(self, action: Callable[[], None]) -> None:
        action()


def publish(parts: Parts, vm: Vm, **more: Any) -> list[dict[str, object]]:
    call = Answer()
    parts.handlers[Publish](call, Publish(vm=vm.name, **more), vm)
    return call.replies


@pytest.fixture
def alices(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Vm:
    """A VM of hers that is off, saved by nobody."""
    vm = machine(parts, 1, "alice", Nic())
    register(parts, vm)
    monkeypatch.setattr(parts.registry, "of", lambda uid: [vm])
    monkeypatch.setattr(parts.registry, "save", lambda vm: None)
    monkeypatch.setattr(log, "_buckets", {})
    return vm


def test_a_port_that_the_host_listens_on_is_not_led_elsewhere(parts: Parts, alices: Vm) -> None:
    host = parts.host
    for address, proto, taken in (("0.0.0.0", "tcp", True), ("127.0.0.1", "tcp", False), ("0.0.0.0", "udp", True)):
        with socket.socket(type=socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
            if proto == "tcp":
                sock.listen()
            assert host.listens(sock.getsockname()[1], proto) is taken, (address, proto)
            port = sock.getsockname()[1]
        assert not host.listens(port, proto)
    with socket.create_server(("0.0.0.0", 0)) as sock:
        port = sock.getsockname()[1]
        parts.policies.policy = parse(POLICY.replace("2000-8999", f"{port}-{port}"), "policy.toml")
        with pytest.raises(PortTaken, match=str(port)):
            publish(parts, alices, port=80, to="world", host_port=port)
        assert alices.published == []
    assert publish(parts, alices, port=80, to="world", host_port=port)[0]["pending"] == ""


def test_what_cannot_be_saved_is_not_published(parts: Parts, alices: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(parts, alices, port=80, to="bob")

    def full(vm: Vm) -> None:
        raise StorageFailed(problem="the disk is full")

    before = list(alices.published)
    monkeypatch.setattr(parts.registry, "save", full)
    for more in ({"port": 81, "to": "@staff"}, {"port": 80, "to": "bob", "remove": True}):
        with pytest.raises(StorageFailed):
            publish(parts, alices, **more)
    assert alices.published == before


def test_nothing_is_published_without_a_line_in_the_journal(parts: Parts, alices: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(log.BURST):
        publish(parts, alices, port=80, to="bob")
    with pytest.raises(TooOften, match="publish came more often than 60 times"):
        publish(parts, alices, port=81, to="bob")
    assert {item.port for item in alices.published} == {80}
    publish(parts, alices, port=80, to="bob", remove=True)  # to close is another share
    lines = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert lines.count("publish") == log.BURST and lines[-1] == "unpublish"


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_dnsmasq_reads(parts: Parts) -> None:
    vm = machine(parts, 7, "alice", Nic(), Nic("lan"))
    interfaces = parts.interfaces.of(vm, vm.definition, give=True)
    texts = parts.dnsmasq.entries(vm, interfaces)
    assert texts["hosts"] == f"{interfaces[0].address4} web7.alice.vm\n{interfaces[1].address4} net1.web7.alice.vm\n"
    bridge = bridge_name(interfaces[0].segment)
    assert texts["dhcp-hosts"].splitlines()[0] == f"06:00:00:00:00:07,tag:{bridge},set:v7c0,{interfaces[0].address4}"
    assert "tag:v7c0,option:domain-search,alice.vm\n" in texts["dhcp-opts"] and "tag:v7c1,12,web7\n" in texts["dhcp-opts"]
    assert ",3\n" not in texts["dhcp-opts"], "a router for each"
    carol = machine(parts, 8, "carol", Nic("db"))
    carols = parts.interfaces.of(carol, carol.definition, give=True)
    assert "tag:v8c0,3\n" not in parts.dnsmasq.entries(carol, carols)["dhcp-opts"]
    parts.dnsmasq.write(vm, interfaces)
    path = Path(parts.layout.names, "hosts", "7")
    assert path.read_text() == texts["hosts"] and path.stat().st_mode & 0o777 == 0o644
    parts.dnsmasq.forget(vm)
    assert not path.exists()


def test_the_names_of_all_vms_ask_about_each_owner_once(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker writes them before it is ready, and a directory may take its time."""
    parts.policies.policy = parse(POLICY.replace('"carol"', '"@staff"'), "policy.toml")
    owners = ("alice", "bob", "bob", "alice", "alice")
    vms = [machine(parts, number, owner, Nic(), Nic("db")) for number, owner in enumerate(owners, 1)]
    register(parts, *vms)
    for vm in vms:
        parts.interfaces.of(vm, vm.definition, give=True)
    asked: list[str] = []
    uid_of = parts.accounts.uid_of

    def ask(user: str) -> int | None:
        asked.append(user)
        return uid_of(user)

    monkeypatch.setattr(parts.accounts, "uid_of", ask)
    monkeypatch.setattr(parts.accounts, "groups_of", ask)
    parts.dnsmasq.begin()
    assert sorted(asked) == ["alice", "bob"]
    assert Path(parts.layout.names, "hosts", "2").read_text().split()[1::2] == ["web2.bob.vm", "net1.web2.bob.vm"]
    asked.clear()
    parts.dnsmasq.write(vms[0], parts.interfaces.known(vms[0]))
    assert asked == ["alice"]


def test_the_broker_writes_data_and_no_configuration(parts: Parts) -> None:
    assert sorted(os.listdir(parts.layout.names)) == ["dhcp-hosts", "dhcp-opts", "hosts"]
    assert not os.path.exists(parts.layout.dnsmasq_conf)


# --- tapnet -----------------------------------------------------------------------------------------------------------


def plug(parts: Parts, vm: Vm) -> list[tuple[VmshellError | None, dict[int, int]]]:
    found: list[tuple[VmshellError | None, dict[int, int]]] = []
    parts.network.attach(vm, lambda error, taps: found.append((error, taps)))
    return found


def plug_in(parts: Parts, tapnet: Tapnet, vm: Vm) -> None:
    found = plug(parts, vm)
    tapnet.turn(parts.loop, lambda: found)
    assert found[0][0] is None
    close(found[0][1])


def leases(parts: Parts, vm: Vm) -> list[str]:
    """To which MACs of *vm*'s dnsmasq gives which addresses."""
    path = Path(parts.layout.names, "dhcp-hosts", str(vm.number))
    rows = [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []
    return [f"{row[0]} {row[-1]}" for row in rows]


def test_e33_a_mac_of_ones_own_choice_has_an_address_while_its_card_is_plugged_in(parts: Parts) -> None:
    """Whoever else has chosen it takes nobody's address away: not refused, not off, not by what he has only defined."""
    chosen = Nic("lan", mac="06:11:22:33:44:55")
    alice, bob = machine(parts, 1, "alice", chosen), machine(parts, 2, "bob", Nic("lan"), chosen)
    register(parts, alice, bob)
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        plug_in(parts, tapnet, alice)
        (interface,) = parts.attached.of(alice)
        with pytest.raises(NetworkFailed, match="another interface on this network has the MAC 06:11:22:33:44:55"):
            plug(parts, bob)
        assert leases(parts, alice) == [f"{interface.mac} {interface.address4}"] and leases(parts, bob) == []
        parts.dnsmasq.begin()
        assert len(leases(parts, alice)) == 1 and len(leases(parts, bob)) == 1, "that of its other card"
        parts.attachments.ended(alice)
        assert leases(parts, alice) == []
        plug_in(parts, tapnet, bob)
        assert len(leases(parts, bob)) == 2
        parts.attachments.remove(bob, {1})
        assert len(leases(parts, bob)) == 1
        tapnet.refuse_nic = 0
        found = plug(parts, alice)
        tapnet.turn(parts.loop, lambda: found)
        assert found[0][0] is not None and leases(parts, alice) == []


def test_a_card_that_is_added_leaves_its_vms_others_as_they_run(parts: Parts) -> None:
    vm = machine(parts, 1, "alice", Nic("lan"))
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        plug_in(parts, tapnet, vm)
        vm.booted, vm.definition = vm.definition, Definition("web1", nics=(Nic("lan", mac="06:11:22:33:44:55"), Nic()))
        found: list[VmshellError | None] = []

        def added(error: VmshellError | None, taps: dict[int, int]) -> None:
            close(taps)
            found.append(error)

        parts.attachments.add(vm, 1, added)
        tapnet.turn(parts.loop, lambda: found)
        assert found == [None]
        interfaces = parts.attached.of(vm)
        assert [interface.mac for interface in interfaces] == ["06:00:00:00:00:01", "06:01:00:00:00:01"]
        assert leases(parts, vm) == [f"{interface.mac} {interface.address4}" for interface in interfaces]


@pytest.mark.parametrize(
    ("first", "then", "now", "told"),
    [
        ("all", "none", "none", "none"),
        ("none", "all", "all", "all"),
        ("internet", "none", "all", "none"),
        ("all", "internet", "none", "internet"),
        ("all", "all", "none", "all"),
    ],
)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_segment_does_not_become_what_its_network_was(
    parts: Parts, first: str, then: str, now: str, told: str, order: tuple[int, int]
) -> None:
    """Two VMs run since different policies, and a new broker finds them in any order."""

    def says(outside: str) -> None:
        parts.policies.policy = parse(f'[networks.lan]\nkind = "shared"\noutside = "{outside}"\n', "policy.toml")

    vms = [machine(parts, 1, "alice", Nic("lan")), machine(parts, 2, "bob", Nic("lan"))]
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        for vm, outside in zip(vms, (first, then), strict=True):
            says(outside)
            plug_in(parts, tapnet, vm)
        says(now)
        rows = [json.loads(json.dumps(vm.attached)) for vm in vms]
        for vm in vms:
            parts.attached.keep(vm, [])
        for index in order:
            parts.attachments.adopt(vms[index], rows[index])
        tapnet.seen.clear()
        tapnet.hang_up()
        tapnet.turn(parts.loop, lambda: tapnet.connections == 2 and "settle" in tapnet.verbs())
        assert [body.get("outside", "none") for body in tapnet.seen if body["verb"] == "segment"] == [told]


class Answers:
    """In the place of the connection to tapnet: who asks waits until the test answers, in any order."""

    def __init__(self, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Any, Any]] = []
        monkeypatch.setattr(parts.attachments, "_tapnet", self)
        monkeypatch.setattr(parts.tapnet_sync, "_tapnet", self)

    def request(self, message: Any, answered: Any) -> None:
        self.asked.append((message, answered))

    def close(self) -> None:
        pass

    def verbs(self) -> list[str]:
        """What was asked about taps."""
        return [message.verb for message, _ in self.asked if message.verb in ("port", "unplug")]

    def make(self, number: int) -> None:
        """Make the tap that was asked for as *number*th."""
        packet = wire.Packet({"ok": {}}, [os.open(os.devnull, os.O_RDWR)])
        [answered for message, answered in self.asked if message.verb == "port"][number](None, packet)
        packet.close()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1), (0, 2, 3, 1)])
def test_taps_of_a_run_that_has_ended_are_not_those_of_the_next(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    """The plug is pulled before tapnet has answered, and the VM is booted again: what comes late is nobody's."""
    tapnet, vm = Answers(parts, monkeypatch), machine(parts, 1, "alice", Nic(), Nic("lan", mac="06:11:22:33:44:55"))
    before = held()
    first = plug(parts, vm)
    parts.attachments.ended(vm)
    assert tapnet.verbs() == ["port"] * 2 + ["unplug"] * 2 and len(leases(parts, vm)) == 1, "it may be another's again"
    second = plug(parts, vm)
    for number in order:
        tapnet.make(number)
    ((error, taps),) = first
    assert error is not None and error.code == "vm-stopped" and taps == {}
    ((error, taps),) = second
    assert error is None and sorted(taps) == [0, 1]
    close(taps)
    assert held() == before
    assert tapnet.verbs() == ["port"] * 2 + ["unplug"] * 2 + ["port"] * 2, "one for each that was asked for, and before the next"
    assert [interface.index for interface in parts.attached.of(vm)] == [0, 1] and len(leases(parts, vm)) == 2
    parts.attachments.ended(vm)
    assert tapnet.verbs()[-2:] == ["unplug"] * 2 and parts.attached.of(vm) == []


def test_a_card_that_leaves_a_running_vm_leaves_its_name(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.registry, "set_state", lambda vm, state: None)
    monkeypatch.setattr(parts.runs, "order", lambda run, what, answered, **more: answered(None))
    vm = machine(parts, 1, "alice", Nic(), Nic("lan"))
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        plug_in(parts, tapnet, vm)
        parts.runs.begin(vm, vm.definition)
        vm.state, vm.added, vm.definition = RUNNING, {1}, Definition("web1", nics=(Nic(),))
        said: list[tuple[list[str], list[str]]] = []
        parts.live_update.follow(vm, lambda now, problems: said.append((now, problems)))
        tapnet.turn(parts.loop, lambda: "unplug" in tapnet.verbs())
    assert said == [(["net1"], [])] and vm.booted == vm.definition
    (interface,) = parts.attached.of(vm)
    assert Path(parts.layout.names, "hosts", "1").read_text() == f"{interface.address4} web1.alice.vm\n"
    assert leases(parts, vm) == [f"{interface.mac} {interface.address4}"]


def test_a_start_without_tapnet_is_refused(parts: Parts) -> None:
    ((error, taps),) = plug(parts, machine(parts, 1, "alice", Nic()))
    assert error is not None and error.code == "tapnet-down" and not taps


def test_taps_come_from_tapnet_and_all_of_it_is_told_again(parts: Parts) -> None:
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        vm = machine(parts, 1, "alice", Nic(), Nic("lan"))
        found = plug(parts, vm)
        tapnet.turn(parts.loop, lambda: found)
        error, taps = found[0]
        assert error is None and sorted(taps) == [0, 1]
        close(taps)
        assert tapnet.verbs()[:1] == ["settings"] and "settle" in tapnet.verbs() and tapnet.verbs().count("port") == 2
        tapnet.hang_up()
        tapnet.turn(parts.loop, lambda: tapnet.verbs()[-1:] == ["settle"] and tapnet.connections == 2)
        second = len(tapnet.verbs()) - tapnet.verbs()[::-1].index("settings")
        again = [body for body in tapnet.seen[second:] if body["verb"] == "port"]
        assert [body.get("create", False) for body in again] == [False, False]
        parts.attachments.ended(vm)
        tapnet.turn(parts.loop, lambda: tapnet.verbs().count("unplug") == 2)


def test_one_bad_card_and_the_start_has_none(parts: Parts) -> None:
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        tapnet.refuse_nic = 1
        found = plug(parts, machine(parts, 1, "alice", Nic(), Nic("lan")))
        tapnet.turn(parts.loop, lambda: found and "unplug" in tapnet.verbs())
        error, taps = found[0]
        assert error is not None and error.code == "network" and not taps
        assert tapnet.verbs().count("unplug") == 2


def test_more_openings_than_a_message_holds_hurt_nobody(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{"source": "", "proto": "tcp", "port": 80, "host_port": port} for port in range(1, 1000)]
    monkeypatch.setattr(Openings, "to", lambda ways, vm, interface: many)
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        found = plug(parts, machine(parts, 1, "alice", Nic()))
        tapnet.turn(parts.loop, lambda: found and "open" in tapnet.verbs())
        assert found[0][0] is None
        close(found[0][1])
        assert len(tapnet.seen[-1]["openings"]) == OPENINGS_MAX


def test_a_tapnet_that_says_nothing_is_not_waited_for(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks_module, "ANSWER_TIMEOUT", 0.1)
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        tapnet.silent = True
        found = plug(parts, machine(parts, 1, "alice", Nic()))
        tapnet.turn(parts.loop, lambda: found)
        error, taps = found[0]
        assert error is not None and error.code == "tapnet-down" and not taps


def test_a_vm_keeps_its_taps_over_a_broker_and_a_policy(parts: Parts) -> None:
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        vm = machine(parts, 1, "alice", Nic("lan"), Nic())
        found = plug(parts, vm)
        tapnet.turn(parts.loop, lambda: found)
        close(found[0][1])
        rows = json.loads(json.dumps(vm.attached))
        before = parts.attached.of(vm)
        parts.attachments.ended(vm)
        assert vm.attached == [] and parts.attached.of(vm) == []
        gone = machine(parts, 1, "alice", Nic("gone"), Nic())
        parts.attachments.adopt(gone, rows)
        after = parts.attached.of(gone)
        assert [parts.interfaces.port_message(gone, interface, create=False).to_body() for interface in after] == [
            parts.interfaces.port_message(vm, interface, create=False).to_body() for interface in before
        ]
        parts.attachments.adopt(gone, [{"index": "x"}])  # a damaged record costs this VM its taps, and nobody else anything


def test_what_runs_keeps_names_and_addresses_over_a_definition_and_a_policy(parts: Parts) -> None:
    """A broker that starts again writes for dnsmasq what a VM runs with, not what it will boot with."""
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        vm = machine(parts, 1, "alice", Nic())
        found = plug(parts, vm)
        tapnet.turn(parts.loop, lambda: found)
        close(found[0][1])
        (interface,) = parts.attached.of(vm)
        vm.booted, vm.definition = vm.definition, Definition("web1", nics=(Nic("gone"),))
        parts.policies.policy = parse(POLICY.replace("lan", "other"), "policy.toml")
        assert [known.address4 for known in parts.interfaces.known(vm)] == [interface.address4]
        vm.booted = Definition("web1", nics=(Nic("gone"), Nic("gone")))
        assert parts.interfaces.known(vm) == [interface]
        parts.registry.add(vm)
        parts.dnsmasq.begin()
        assert interface.address4 in Path(parts.layout.names, "dhcp-hosts", "1").read_text()


def test_a_way_that_tapnet_refuses_to_close_is_closed_later(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapnet_sync, "RETRY", 0.05)
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        vm = machine(parts, 1, "alice", Nic())
        vm.published = [Published(22, "tcp", "world", 2222)]
        found = plug(parts, vm)
        tapnet.turn(parts.loop, lambda: found and "open" in tapnet.verbs())
        close(found[0][1])
        vm.published, tapnet.refuse_verb = [], "open"
        said: list[VmshellError | None] = []
        parts.tapnet_sync.open_ports(said.append)
        tapnet.turn(parts.loop, lambda: tapnet.verbs().count("open") >= 3)
        assert said[0] is not None and said[0].code == "network"
        tapnet.refuse_verb = ""
        count = tapnet.verbs().count("open")
        tapnet.turn(parts.loop, lambda: tapnet.verbs().count("open") > count)
        assert "openings" not in tapnet.seen[-1]
        parts.tapnet_sync.open_ports(said.append)
        assert said[1:] == [None], "there is nothing to tell any more"


def test_a06_members_are_confined_whenever_they_join(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapnet_sync, "NUMBERS_MAX", 3)
    parts.policies.policy = parse(POLICY + "[host]\nssh_forwarding = true\n", "policy.toml")
    people = cast(Any, parts.accounts)
    members = [0, 998, 1001, 1002, 1003, 1004]  # root and a service are nobody's to confine
    people.members = lambda group: sorted(members)
    people.groups_of = lambda user: frozenset({parts.policies.policy.host.group})
    with Tapnet(parts.layout.tapnet_socket) as tapnet:

        def confined() -> list[int]:
            last = len(tapnet.seen) - 1 - tapnet.verbs()[::-1].index("settings")
            return [uid for body in tapnet.seen[last:] for uid in (*body.get("confined", []), *body.get("uids", []))]

        parts.tapnet.connect()
        tapnet.turn(parts.loop, lambda: "settle" in tapnet.verbs())
        assert confined() == [1001, 1002, 1003, 1004], "more than a message holds"
        members.append(1005)
        parts.refresh()
        tapnet.turn(parts.loop, lambda: tapnet.verbs().count("settings") == 2 and len(confined()) == 5)
        parts.tapnet_sync.meet(4_294_967_290)  # whom the directory does not list
        tapnet.turn(parts.loop, lambda: tapnet.verbs().count("settings") == 3 and len(confined()) == 6)
        parts.tapnet_sync.meet(4_294_967_290)
        parts.tapnet_sync.meet(0)
        people.groups_of = lambda user: frozenset()
        parts.refresh()
        tapnet.turn(parts.loop, lambda: tapnet.verbs().count("settings") == 4 and len(confined()) == 5)


def test_n6_connect_says_where_the_guest_is_and_opens_no_socket(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an installed host the one file of the broker's with sockets of a network has no part: in no boot, nor in `connect`."""
    replies: list[dict[str, object]] = []
    call = SimpleNamespace(peer=SimpleNamespace(uid=1001), reply=replies.append)
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        vm = machine(parts, 1, "alice", Nic())
        for owner, name in ((passt.Passt, "start_all"), (passt, "leads"), (passt, "available")):
            monkeypatch.setattr(owner, name, None)
        plug_in(parts, tapnet, vm)
        vm.state = RUNNING
        parts.handlers[Connect](call, Connect(vm="web1", port=22), vm)
        assert replies == [{"name": vm.ref, "address": parts.attached.of(vm)[0].address4, "port": 22}]


def test_a_rate_follows_the_policy_and_is_shown_as_it_is(parts: Parts) -> None:
    with Tapnet(parts.layout.tapnet_socket) as tapnet:
        vm = machine(parts, 1, "alice", Nic())
        found = plug(parts, vm)
        tapnet.turn(parts.loop, lambda: found)
        close(found[0][1])
        (interface,) = parts.attached.of(vm)
        parts.policies.policy = parse(POLICY.replace("[defaults]", "[defaults]\nnet_rate = 5000"), "policy.toml")
        assert parts.tapnet_sync.rate(vm, interface) == 0
        parts.refresh()
        tapnet.turn(parts.loop, lambda: tapnet.seen[-1].get("rate") == 5000)
        assert parts.tapnet_sync.rate(vm, interface) == 5000
        count = len(tapnet.seen)
        parts.refresh()
        assert len(tapnet.seen) == count, "nothing is told twice"


def test_a_card_has_an_address_of_its_segment(tmp_path: Path) -> None:
    addresses = Addresses(str(tmp_path / "a.json"), Plan("10.77.0.0/16", "", 24))
    addresses.host("users", addresses.segment("users", (5, "x"), subnet=True), 1, 0)
    assert socket.inet_aton(addresses.plan.address4(0, 2))
