"""Who may reach what in the long run: groups larger than the room there is, grants that end, names that others have now."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fakes.accounts import People
from tests.fakes.tapnet import Tapnet
from tests.unit import test_networks
from tests.unit.test_networks import Answer, machine, plug, publish, ways
from vmshell import encoding
from vmshell.broker.composition import Parts
from vmshell.broker.network import tapnet_sync
from vmshell.broker.network.attached import Running
from vmshell.broker.network.taps import close
from vmshell.broker.vm.registry import Registry
from vmshell.broker.vm.vm import Published, Vm
from vmshell.errors import BadValue
from vmshell.messages import CREATING, OPENINGS_MAX, Info, Net
from vmshell.model.addressing import Plan
from vmshell.model.definition import Definition, Nic
from vmshell.model.policy import parse
from vmshell.numbering import bridge_name
from vmshell.refusals import VmBusy

parts, alices = test_networks.parts, test_networks.alices
GRANTS = """
[defaults]
forward_ports = "5000-6000"
[networks.db]
kind = "service"
providers = ["@staff"]
members = ["alice"]
"""


@pytest.fixture
def tapnet(parts: Parts) -> Iterator[Tapnet]:
    with Tapnet(parts.layout.tapnet_socket) as made:
        yield made


def people(parts: Parts, names: dict[str, int], groups: dict[str, set[str]]) -> None:
    """Whom the host knows from now on."""
    cast(People, cast(Any, parts.accounts)).__init__(names, groups)  # type: ignore[misc]


def crowd(parts: Parts, count: int) -> None:
    """A group of *count* users who all have a segment, and bob, who is in none."""
    members = {f"m{number}": 5000 + number for number in range(count)}
    people(parts, {"alice": 1001, "bob": 1002, **members}, {"staff": set(members)})
    segments = {f"users/{uid}/{name}": uid for name, uid in members.items()}
    Path(parts.layout.addresses).parent.mkdir(parents=True, exist_ok=True)
    Path(parts.layout.addresses).write_text(json.dumps({"version": 1, "segments": segments, "cards": {}}))
    parts.addresses.plan = Plan("10.0.0.0/8", "", 24)
    parts.addresses.load()


def run(parts: Parts, *vms: Vm) -> Running:
    return [(vm, parts.interfaces.of(vm, vm.definition, give=True)) for vm in vms]


def start(parts: Parts, tapnet: Tapnet, vm: Vm) -> None:
    found = plug(parts, vm)
    tapnet.turn(parts.loop, lambda: found)
    assert found[0][0] is None
    close(found[0][1])


def told(tapnet: Tapnet, vm: Vm) -> list[dict[str, Any]]:
    """The ways to *vm* that tapnet was told last."""
    opens = [body for body in tapnet.seen if body["verb"] == "open" and body["number"] == vm.number]
    return list(opens[-1].get("openings", [])) if opens else []


# --- more ways than there is room for ---------------------------------------------------------------------------------


def test_a_group_leaves_room_for_a_user_who_is_named_and_the_answer_says_who_waits(
    parts: Parts, tapnet: Tapnet, alices: Vm
) -> None:
    crowd(parts, OPENINGS_MAX - 1)
    start(parts, tapnet, machine(parts, 2, "bob", Nic()))
    start(parts, tapnet, alices)

    def published(**more: Any) -> object:
        replies = publish(parts, alices, **more)
        tapnet.turn(parts.loop, lambda: replies)
        return replies[0]["pending"]

    assert published(port=80, to="@staff") == ""
    assert published(port=22, to="bob") == "", "this is as many as there is room for"
    parts.policies.policy = parse('[defaults]\nforward_ports = "5000-6000"\n', "policy.toml")
    pending = f"256 of {OPENINGS_MAX + 1} ways to net0 are open, single users' before groups'; the rest waits"
    assert published(port=5000, to="world") == pending
    assert published(port=5000, to="world") == pending, "to say it again changes nothing"
    ports = collections.Counter(way["port"] for way in told(tapnet, alices))
    assert ports == {22: 1, 5000: 1, 80: OPENINGS_MAX - 2}
    assert published(port=5000, to="world", remove=True) == ""
    assert collections.Counter(way["port"] for way in told(tapnet, alices)) == {22: 1, 80: OPENINGS_MAX - 1}


def test_what_waits_is_nobody_elses_news(parts: Parts, tapnet: Tapnet, alices: Vm) -> None:
    crowd(parts, OPENINGS_MAX + 1)
    bobs = machine(parts, 2, "bob", Nic())
    bobs.published = [Published(80, "tcp", "@staff")]
    start(parts, tapnet, bobs)
    start(parts, tapnet, alices)
    replies = publish(parts, alices, port=80, to="bob")
    tapnet.turn(parts.loop, lambda: replies)
    assert replies[0]["pending"] == "" and parts.tapnet_sync.waits(bobs)


def test_on_a_service_network_the_world_is_a_group(parts: Parts) -> None:
    carol, bob = machine(parts, 1, "carol", Nic("db")), machine(parts, 2, "bob", Nic("db"))
    alice = machine(parts, 3, "alice", Nic("db"))
    running = run(parts, carol, alice, bob)
    carol.published = [Published(80, "tcp", "world", 5000), Published(22, "tcp", "bob")]
    parts.policies.policy = parse(GRANTS.replace("@staff", "carol").replace('members = ["alice"]', ""), "policy.toml")
    found = parts.openings(running).to(carol, running[0][1][0])
    assert [(way["source"], way["port"]) for way in found] == [("vt000002n0", 22), ("vt000003n0", 80), ("vt000002n0", 80)]


# --- grants that end --------------------------------------------------------------------------------------------------


def test_a_service_ends_with_the_role_of_him_who_offers_it(parts: Parts, tapnet: Tapnet) -> None:
    groups = {"staff": {"bob"}}
    people(parts, {"alice": 1001, "bob": 1002}, groups)
    parts.policies.policy = parse(GRANTS, "policy.toml")
    bobs, client = machine(parts, 1, "bob", Nic("db")), machine(parts, 2, "alice", Nic("db"))
    bobs.published = [Published(5432, "tcp", "world", 5432)]
    start(parts, tapnet, bobs)
    start(parts, tapnet, client)
    tapnet.turn(parts.loop, lambda: told(tapnet, bobs))
    groups["staff"].clear()
    parts.refresh()
    tapnet.turn(parts.loop, lambda: not told(tapnet, bobs))
    groups["staff"].add("bob")
    parts.refresh()
    tapnet.turn(parts.loop, lambda: told(tapnet, bobs))


@pytest.mark.parametrize("rule", ['members = ["carol"]', '[user.alice]\nnetworks = ["users"]'])
def test_a_service_ends_for_whom_the_network_is_no_longer(parts: Parts, rule: str) -> None:
    policy = GRANTS.replace("@staff", "bob")
    parts.policies.policy = parse(policy, "policy.toml")
    bobs, client = machine(parts, 1, "bob", Nic("db")), machine(parts, 2, "alice", Nic("db"))
    running = run(parts, bobs, client)
    bobs.published = [Published(5432, "tcp", "alice"), Published(80, "tcp", "world", 5000)]
    assert len(ways(parts, bobs, running[0][1][0], running)) == 2
    parts.policies.policy = parse(policy.replace('members = ["alice"]', rule), "policy.toml")
    assert ways(parts, bobs, running[0][1][0], running) == set()


@pytest.mark.parametrize("now", ["", '[networks.db]\nkind = "shared"\n'])
def test_a_service_network_that_the_policy_has_no_more_goes_on_for_those_on_it(parts: Parts, now: str) -> None:
    parts.policies.policy = parse(GRANTS.replace("@staff", "bob"), "policy.toml")
    bobs, client = machine(parts, 1, "bob", Nic("db")), machine(parts, 2, "alice", Nic("db"))
    running = run(parts, bobs, client)
    bobs.published = [Published(5432, "tcp", "alice")]
    parts.policies.policy = parse(now, "policy.toml")
    assert ways(parts, bobs, running[0][1][0], running) == {("vt000002n0", "tcp", 5432, 0)}


# --- names that are somebody else's now -------------------------------------------------------------------------------


def old_and_new_bob(parts: Parts, network: str) -> tuple[Vm, Vm]:
    """Two VMs: of a bob whose account is gone, and of another who has his name."""
    new = machine(parts, 3, "bob", Nic(network))
    old = Vm(2, 1500, "bob", Definition("web", nics=(Nic(network),)), 0, new.store)
    return old, new


@pytest.mark.parametrize("to", ["bob", "@staff", "world"])
def test_d22_a_service_is_not_for_the_vms_of_an_account_that_is_gone(parts: Parts, to: str) -> None:
    carol = machine(parts, 1, "carol", Nic("db"))
    running = run(parts, carol, *old_and_new_bob(parts, "db"))
    carol.published = [Published(5432, "tcp", to, 5432)]
    assert {source for source, *_ in ways(parts, carol, running[0][1][0], running)} == {"vt000003n0"}


def test_d22_a_grant_is_to_the_account_and_not_to_the_next_of_its_name(parts: Parts, alices: Vm) -> None:
    running = run(parts, alices, *old_and_new_bob(parts, "users"))
    new = (bridge_name(running[2][1][0].segment), "tcp", 80, 0)
    publish(parts, alices, port=80, to="bob")
    assert alices.published == [Published(80, "tcp", "bob", 0, 1002)]
    assert ways(parts, alices, running[0][1][0], running) == {new}
    alices.published = [Published(80, "tcp", "bob", 0, 1500)]
    assert ways(parts, alices, running[0][1][0], running) == set(), "neither the old bob nor the new one"
    alices.published = [Published(80, "tcp", "bob", 0)]
    assert ways(parts, alices, running[0][1][0], running) == {new}, "a record of before says no uid"
    publish(parts, alices, port=80, to="bob", remove=True)
    assert alices.published == []
    for to in ("@staff", "world"):
        publish(parts, alices, port=2000, to=to)
    assert {item.uid for item in alices.published} == {0}
    for to in ("nobody", "@nobody"):
        with pytest.raises(BadValue, match="a user of this host"):
            publish(parts, alices, port=80, to=to)


def test_grants_are_on_disk_with_the_uid_and_without_it(parts: Parts) -> None:
    parts.registry.load()
    vm = parts.registry.create(1001, "alice", Definition("web1"))
    parts.registry.finish_creation(vm)
    vm.published = [Published(80, "tcp", "bob", 0, 1002)]
    parts.registry.save(vm)
    path = Path(parts.layout.vm_state(1001, "web1"), "record.json")
    for uid in (1002, 0):
        again = Registry(parts.layout)
        again.load()
        assert [loaded.published for loaded in again] == [[Published(80, "tcp", "bob", 0, uid)]]
        record = json.loads(path.read_text())
        record["published"][0].pop("uid", None)
        path.write_text(json.dumps(record))


@pytest.mark.parametrize("to", ["alice", "world"])
def test_a_directory_that_is_silent_for_a_while_closes_no_service(parts: Parts, to: str) -> None:
    """Nobody would open it again: provider and consumer stay what they were when their interfaces were attached."""
    names, groups = {"alice": 1001, "bob": 1002}, {"staff": {"bob"}, "users": {"alice"}}
    people(parts, names, groups)
    parts.policies.policy = parse(GRANTS.replace('"alice"', '"@users", "@staff"'), "policy.toml")
    bobs, client = machine(parts, 1, "bob", Nic("db")), machine(parts, 2, "alice", Nic("db"))
    running = run(parts, bobs, client)
    bobs.published = [Published(5432, "tcp", to, 5432, 1001 if to == "alice" else 0)]
    opened = {("vt000002n0", "tcp", 5432, 0)}
    assert ways(parts, bobs, running[0][1][0], running) == opened
    people(parts, {}, {})
    assert ways(parts, bobs, running[0][1][0], running) == opened
    bobs.published = [Published(5432, "tcp", "@users")]
    assert ways(parts, bobs, running[0][1][0], running) == set(), "whom nobody knows is in no group"
    bobs.published = [Published(5432, "tcp", to, 5432)]
    for others in ({"carl": 1001}, {"alice": 1009}):
        people(parts, others, {"users": {"carl", "alice"}})
        assert ways(parts, bobs, running[0][1][0], running) == set(), "his uid or his name is another's"
    people(parts, names, {"staff": {"bob"}})
    assert ways(parts, bobs, running[0][1][0], running) == set(), "the directory knows her, and she may no more"


@pytest.mark.parametrize("known", [{"alice": 1001, "bob": 1002}, {}, {"bob": 1009, "alice": 1001}])
def test_a_directory_that_is_silent_for_a_while_closes_no_private_network(parts: Parts, alices: Vm, known: Any) -> None:
    running = run(parts, alices, machine(parts, 2, "bob", Nic()))
    publish(parts, alices, port=80, to="bob")
    people(parts, known, {})
    opened = {(bridge_name(running[1][1][0].segment), "tcp", 80, 0)}
    assert ways(parts, alices, running[0][1][0], running) == (set() if 1009 in known.values() else opened)


# --- what it costs ----------------------------------------------------------------------------------------------------


def count(monkeypatch: pytest.MonkeyPatch, *things: tuple[object, str]) -> collections.Counter[tuple[object, ...]]:
    """How often each of these methods is asked what, from now on."""
    asked: collections.Counter[tuple[object, ...]] = collections.Counter()

    def counted(thing: object, name: str) -> None:
        real = getattr(thing, name)

        def ask(*what: object) -> object:
            asked[name, *what] += 1
            return real(*what)

        monkeypatch.setattr(thing, name, ask)

    for thing, name in things:
        counted(thing, name)
    return asked


def test_a_look_asks_once_about_everybody(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every start and end of a VM all of it is worked out anew, and meanwhile nobody is answered."""
    parts.policies.policy = parse(GRANTS.replace('members = ["alice"]', "") + "[group.staff]\ncpus_max = 2\n", "policy.toml")
    vms = [machine(parts, number, owner, Nic(), Nic("db")) for number, owner in enumerate(("alice", "bob", "carol", "dave"), 1)]
    for vm in vms:
        vm.published = [Published(port, "tcp", to) for port in range(80, 84) for to in ("@staff", "bob", "dave")]
    running = run(parts, *vms)
    known, registry = parts.accounts, parts.registry
    asked = count(monkeypatch, (known, "user_of"), (known, "uid_of"), (known, "groups_of"), (registry, "of"))
    counted = count(monkeypatch, (parts.addresses, "private"))
    look = parts.openings(running)
    offering = [(vm, it) for vm, interfaces in running for it in interfaces if it.network.kind == "private" or it.provides]
    assert all(look.to(vm, interface) for vm, interface in offering)
    assert len(asked) == 3 * 4 and set(asked.values()) == {1} and set(counted.values()) == {1}, (asked, counted)


def test_a_list_of_published_ports_asks_once_about_its_owner(parts: Parts, alices: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.policies.policy = parse("[defaults]\npublished_max = 20\n[group.staff]\ncpus_max = 2\n", "policy.toml")
    bobs = machine(parts, 2, "bob", *[Nic()] * 8)
    run(parts, alices, bobs)
    alices.published = [Published(port, "tcp", "bob") for port in range(80, 110)]
    asked = count(monkeypatch, (parts.accounts, "uid_of"), (parts.accounts, "groups_of"))
    for vm, opened in ((alices, [True] * 20 + [False] * 10), (bobs, [])):
        call = Answer()
        parts.handlers[Net](call, Net(vm=vm.name), vm)
        assert [row["open"] for row in cast(Any, call.replies[0]["published"])] == opened
    assert asked["uid_of", "alice"] == asked["uid_of", "bob"] == 1 and asked["groups_of", "alice"] <= 2, (
        asked
    )  # once for its rate


def test_whatever_tapnet_refuses_is_tried_again_once_in_a_while(
    parts: Parts, tapnet: Tapnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tapnet_sync, "RETRY", 0.1)
    tapnet.refuse_verb = "open"
    for number in range(1, 9):
        vm = machine(parts, number, "alice", Nic())
        vm.published = [Published(22, "tcp", "world", 2000 + number)]
        start(parts, tapnet, vm)
    rounds = []

    def counted() -> None:
        rounds.append(tapnet.verbs().count("open"))
        look()

    look = parts.tapnet_sync.open_ports
    monkeypatch.setattr(parts.tapnet_sync, "open_ports", counted)
    tapnet.turn(parts.loop, lambda: len(rounds) >= 5)
    assert {after - before for before, after in zip(rounds[1:], rounds[2:], strict=False)} == {8}, rounds


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bob", "b" * 64, "ö" * 64, "𝔟" * 64], ids=["short", "long", "of two", "of four"])
def test_what_is_published_of_a_vm_fits_into_an_answer(
    parts: Parts, alices: Vm, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("vmshell.broker.handlers.publish.has_share", lambda uid, what: True)
    monkeypatch.setattr("vmshell.broker.handlers.publish.by_user", lambda *what, **more: None)
    parts.policies.policy = parse("[defaults]\npublished_max = 4096\n", "policy.toml")
    people(parts, {name: (1 << 32) - 2}, {})
    alices.definition = Definition("web1", nics=(Nic(),) * 16)
    alices.host_keys = ["ssh-rsa " + "A" * 1190] * 8
    with pytest.raises(BadValue, match=r"web1 has published \d+ ports, and its list is full"):
        for port in range(10_000, 14_097):
            publish(parts, alices, port=port, to=name)
    assert len(alices.published) >= {3: 400, 64: 34}[len(name)]
    for request in (Net(vm="web1"), Info(vm="web1")):
        call = Answer()
        parts.handlers[type(request)](call, request, alices)
        assert len(encoding.encode({"id": encoding.INT_MAX, "ok": call.replies[0]})) < encoding.FRAME_MAX * 0.85
    publish(parts, alices, port=10_000, to=name, remove=True)


def test_a_vm_in_the_making_publishes_nothing_yet(parts: Parts, alices: Vm) -> None:
    alices.state = CREATING
    with pytest.raises(VmBusy, match="creating"):
        publish(parts, alices, port=22, to="bob")
    assert alices.published == []
