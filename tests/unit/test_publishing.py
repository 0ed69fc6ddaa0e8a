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
from vmshell.broker.api.dispatch import handle_info
from vmshell.broker.context import Context
from vmshell.broker.handlers.network import handle_net
from vmshell.broker.network import attachments as networks_module
from vmshell.broker.network import tapnet_sync
from vmshell.broker.network.interfaces import cards_of
from vmshell.broker.network.openings import Published, Running, Ways
from vmshell.broker.vm.registry import Registry, Vm
from vmshell.errors import BadValue
from vmshell.messages import CREATING, OPENINGS_MAX, Info, Net
from vmshell.model.addressing import Plan
from vmshell.model.definition import Definition, Nic
from vmshell.model.policy import parse
from vmshell.numbering import bridge_name
from vmshell.refusals import VmBusy

context, alices = test_networks.context, test_networks.alices
GRANTS = """
[defaults]
forward_ports = "5000-6000"
[networks.db]
kind = "service"
providers = ["@staff"]
members = ["alice"]
"""


@pytest.fixture
def tapnet(context: Context) -> Iterator[Tapnet]:
    with Tapnet(context.layout.tapnet_socket) as made:
        yield made


def people(context: Context, names: dict[str, int], groups: dict[str, set[str]]) -> None:
    """Whom the host knows from now on."""
    context.accounts = cast(Any, People(names, groups))


def crowd(context: Context, count: int) -> None:
    """A group of *count* users who all have a segment, and bob, who is in none."""
    members = {f"m{number}": 5000 + number for number in range(count)}
    people(context, {"alice": 1001, "bob": 1002, **members}, {"staff": set(members)})
    segments = {f"users/{uid}/{name}": uid for name, uid in members.items()}
    Path(context.layout.addresses).parent.mkdir(parents=True, exist_ok=True)
    Path(context.layout.addresses).write_text(json.dumps({"version": 1, "segments": segments, "cards": {}}))
    context.addresses.plan = Plan("10.0.0.0/8", "", 24)
    context.addresses.load()


def run(context: Context, *vms: Vm) -> Running:
    return [(vm, cards_of(context, vm, vm.definition, give=True)) for vm in vms]


def start(context: Context, tapnet: Tapnet, vm: Vm) -> None:
    found = plug(context, vm)
    tapnet.turn(context.loop, lambda: found)
    assert found[0][0] is None
    networks_module.close(found[0][1])


def told(tapnet: Tapnet, vm: Vm) -> list[dict[str, Any]]:
    """The ways to *vm* that tapnet was told last."""
    opens = [body for body in tapnet.seen if body["verb"] == "open" and body["number"] == vm.number]
    return list(opens[-1].get("openings", [])) if opens else []


# --- more ways than there is room for ---------------------------------------------------------------------------------


def test_a_group_leaves_room_for_a_user_who_is_named_and_the_answer_says_who_waits(
    context: Context, tapnet: Tapnet, alices: Vm
) -> None:
    crowd(context, OPENINGS_MAX - 1)
    start(context, tapnet, machine(context, 2, "bob", Nic()))
    start(context, tapnet, alices)

    def published(**more: Any) -> object:
        replies = publish(context, alices, **more)
        tapnet.turn(context.loop, lambda: replies)
        return replies[0]["pending"]

    assert published(port=80, to="@staff") == ""
    assert published(port=22, to="bob") == "", "this is as many as there is room for"
    context.policy = parse('[defaults]\nforward_ports = "5000-6000"\n', "policy.toml")
    pending = f"256 of {OPENINGS_MAX + 1} ways to net0 are open, single users' before groups'; the rest waits"
    assert published(port=5000, to="world") == pending
    assert published(port=5000, to="world") == pending, "to say it again changes nothing"
    ports = collections.Counter(way["port"] for way in told(tapnet, alices))
    assert ports == {22: 1, 5000: 1, 80: OPENINGS_MAX - 2}
    assert published(port=5000, to="world", remove=True) == ""
    assert collections.Counter(way["port"] for way in told(tapnet, alices)) == {22: 1, 80: OPENINGS_MAX - 1}


def test_what_waits_is_nobody_elses_news(context: Context, tapnet: Tapnet, alices: Vm) -> None:
    crowd(context, OPENINGS_MAX + 1)
    bobs = machine(context, 2, "bob", Nic())
    bobs.published = [Published(80, "tcp", "@staff")]
    start(context, tapnet, bobs)
    start(context, tapnet, alices)
    replies = publish(context, alices, port=80, to="bob")
    tapnet.turn(context.loop, lambda: replies)
    assert replies[0]["pending"] == "" and context.networks.upkeep.waits(bobs)


def test_on_a_service_network_the_world_is_a_group(context: Context) -> None:
    carol, bob = machine(context, 1, "carol", Nic("db")), machine(context, 2, "bob", Nic("db"))
    alice = machine(context, 3, "alice", Nic("db"))
    running = run(context, carol, alice, bob)
    carol.published = [Published(80, "tcp", "world", 5000), Published(22, "tcp", "bob")]
    context.policy = parse(GRANTS.replace("@staff", "carol").replace('members = ["alice"]', ""), "policy.toml")
    found = Ways(context, running).to(carol, running[0][1][0])
    assert [(way["source"], way["port"]) for way in found] == [("vt000002n0", 22), ("vt000003n0", 80), ("vt000002n0", 80)]


# --- grants that end --------------------------------------------------------------------------------------------------


def test_a_service_ends_with_the_role_of_him_who_offers_it(context: Context, tapnet: Tapnet) -> None:
    groups = {"staff": {"bob"}}
    people(context, {"alice": 1001, "bob": 1002}, groups)
    context.policy = parse(GRANTS, "policy.toml")
    bobs, client = machine(context, 1, "bob", Nic("db")), machine(context, 2, "alice", Nic("db"))
    bobs.published = [Published(5432, "tcp", "world", 5432)]
    start(context, tapnet, bobs)
    start(context, tapnet, client)
    tapnet.turn(context.loop, lambda: told(tapnet, bobs))
    groups["staff"].clear()
    context.networks.refresh()
    tapnet.turn(context.loop, lambda: not told(tapnet, bobs))
    groups["staff"].add("bob")
    context.networks.refresh()
    tapnet.turn(context.loop, lambda: told(tapnet, bobs))


@pytest.mark.parametrize("rule", ['members = ["carol"]', '[user.alice]\nnetworks = ["users"]'])
def test_a_service_ends_for_whom_the_network_is_no_longer(context: Context, rule: str) -> None:
    policy = GRANTS.replace("@staff", "bob")
    context.policy = parse(policy, "policy.toml")
    bobs, client = machine(context, 1, "bob", Nic("db")), machine(context, 2, "alice", Nic("db"))
    running = run(context, bobs, client)
    bobs.published = [Published(5432, "tcp", "alice"), Published(80, "tcp", "world", 5000)]
    assert len(ways(context, bobs, running[0][1][0], running)) == 2
    context.policy = parse(policy.replace('members = ["alice"]', rule), "policy.toml")
    assert ways(context, bobs, running[0][1][0], running) == set()


@pytest.mark.parametrize("now", ["", '[networks.db]\nkind = "shared"\n'])
def test_a_service_network_that_the_policy_has_no_more_goes_on_for_those_on_it(context: Context, now: str) -> None:
    context.policy = parse(GRANTS.replace("@staff", "bob"), "policy.toml")
    bobs, client = machine(context, 1, "bob", Nic("db")), machine(context, 2, "alice", Nic("db"))
    running = run(context, bobs, client)
    bobs.published = [Published(5432, "tcp", "alice")]
    context.policy = parse(now, "policy.toml")
    assert ways(context, bobs, running[0][1][0], running) == {("vt000002n0", "tcp", 5432, 0)}


# --- names that are somebody else's now -------------------------------------------------------------------------------


def old_and_new_bob(context: Context, network: str) -> tuple[Vm, Vm]:
    """Two VMs: of a bob whose account is gone, and of another who has his name."""
    new = machine(context, 3, "bob", Nic(network))
    old = Vm(2, 1500, "bob", Definition("web", nics=(Nic(network),)), 0, new.store)
    return old, new


@pytest.mark.parametrize("to", ["bob", "@staff", "world"])
def test_d22_a_service_is_not_for_the_vms_of_an_account_that_is_gone(context: Context, to: str) -> None:
    carol = machine(context, 1, "carol", Nic("db"))
    running = run(context, carol, *old_and_new_bob(context, "db"))
    carol.published = [Published(5432, "tcp", to, 5432)]
    assert {source for source, *_ in ways(context, carol, running[0][1][0], running)} == {"vt000003n0"}


def test_d22_a_grant_is_to_the_account_and_not_to_the_next_of_its_name(context: Context, alices: Vm) -> None:
    running = run(context, alices, *old_and_new_bob(context, "users"))
    new = (bridge_name(running[2][1][0].segment), "tcp", 80, 0)
    publish(context, alices, port=80, to="bob")
    assert alices.published == [Published(80, "tcp", "bob", 0, 1002)]
    assert ways(context, alices, running[0][1][0], running) == {new}
    alices.published = [Published(80, "tcp", "bob", 0, 1500)]
    assert ways(context, alices, running[0][1][0], running) == set(), "neither the old bob nor the new one"
    alices.published = [Published(80, "tcp", "bob", 0)]
    assert ways(context, alices, running[0][1][0], running) == {new}, "a record of before says no uid"
    publish(context, alices, port=80, to="bob", remove=True)
    assert alices.published == []
    for to in ("@staff", "world"):
        publish(context, alices, port=2000, to=to)
    assert {item.uid for item in alices.published} == {0}
    for to in ("nobody", "@nobody"):
        with pytest.raises(BadValue, match="a user of this host"):
            publish(context, alices, port=80, to=to)


def test_grants_are_on_disk_with_the_uid_and_without_it(context: Context) -> None:
    context.registry.load()
    vm = context.registry.create(1001, "alice", Definition("web1"))
    context.registry.finish_creation(vm)
    vm.published = [Published(80, "tcp", "bob", 0, 1002)]
    context.registry.save(vm)
    path = Path(context.layout.vm_state(1001, "web1"), "record.json")
    for uid in (1002, 0):
        again = Registry(context.layout)
        again.load()
        assert [loaded.published for loaded in again] == [[Published(80, "tcp", "bob", 0, uid)]]
        record = json.loads(path.read_text())
        record["published"][0].pop("uid", None)
        path.write_text(json.dumps(record))


@pytest.mark.parametrize("to", ["alice", "world"])
def test_a_directory_that_is_silent_for_a_while_closes_no_service(context: Context, to: str) -> None:
    """Nobody would open it again: provider and consumer stay what they were when their cards were plugged in."""
    names, groups = {"alice": 1001, "bob": 1002}, {"staff": {"bob"}, "users": {"alice"}}
    people(context, names, groups)
    context.policy = parse(GRANTS.replace('"alice"', '"@users", "@staff"'), "policy.toml")
    bobs, client = machine(context, 1, "bob", Nic("db")), machine(context, 2, "alice", Nic("db"))
    running = run(context, bobs, client)
    bobs.published = [Published(5432, "tcp", to, 5432, 1001 if to == "alice" else 0)]
    opened = {("vt000002n0", "tcp", 5432, 0)}
    assert ways(context, bobs, running[0][1][0], running) == opened
    people(context, {}, {})
    assert ways(context, bobs, running[0][1][0], running) == opened
    bobs.published = [Published(5432, "tcp", "@users")]
    assert ways(context, bobs, running[0][1][0], running) == set(), "whom nobody knows is in no group"
    bobs.published = [Published(5432, "tcp", to, 5432)]
    for others in ({"carl": 1001}, {"alice": 1009}):
        people(context, others, {"users": {"carl", "alice"}})
        assert ways(context, bobs, running[0][1][0], running) == set(), "his uid or his name is another's"
    people(context, names, {"staff": {"bob"}})
    assert ways(context, bobs, running[0][1][0], running) == set(), "the directory knows her, and she may no more"


@pytest.mark.parametrize("known", [{"alice": 1001, "bob": 1002}, {}, {"bob": 1009, "alice": 1001}])
def test_a_directory_that_is_silent_for_a_while_closes_no_private_network(context: Context, alices: Vm, known: Any) -> None:
    running = run(context, alices, machine(context, 2, "bob", Nic()))
    publish(context, alices, port=80, to="bob")
    people(context, known, {})
    opened = {(bridge_name(running[1][1][0].segment), "tcp", 80, 0)}
    assert ways(context, alices, running[0][1][0], running) == (set() if 1009 in known.values() else opened)


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


def test_a_look_asks_once_about_everybody(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every start and end of a VM all of it is worked out anew, and meanwhile nobody is answered."""
    context.policy = parse(GRANTS.replace('members = ["alice"]', "") + "[group.staff]\ncpus_max = 2\n", "policy.toml")
    vms = [machine(context, number, owner, Nic(), Nic("db")) for number, owner in enumerate(("alice", "bob", "carol", "dave"), 1)]
    for vm in vms:
        vm.published = [Published(port, "tcp", to) for port in range(80, 84) for to in ("@staff", "bob", "dave")]
    running = run(context, *vms)
    known, registry = context.accounts, context.registry
    asked = count(monkeypatch, (known, "user_of"), (known, "uid_of"), (known, "groups_of"), (registry, "of"))
    counted = count(monkeypatch, (context.addresses, "private"))
    look = Ways(context, running)
    assert all(look.to(vm, card) for vm, cards in running for card in cards if card.network.kind == "private" or card.provides)
    assert len(asked) == 3 * 4 and set(asked.values()) == {1} and set(counted.values()) == {1}, (asked, counted)


def test_a_list_of_published_ports_asks_once_about_its_owner(
    context: Context, alices: Vm, monkeypatch: pytest.MonkeyPatch
) -> None:
    context.policy = parse("[defaults]\npublished_max = 20\n[group.staff]\ncpus_max = 2\n", "policy.toml")
    bobs = machine(context, 2, "bob", *[Nic()] * 8)
    run(context, alices, bobs)
    alices.published = [Published(port, "tcp", "bob") for port in range(80, 110)]
    asked = count(monkeypatch, (context.accounts, "uid_of"), (context.accounts, "groups_of"))
    for vm, opened in ((alices, [True] * 20 + [False] * 10), (bobs, [])):
        call = Answer()
        handle_net(cast(Any, context), cast(Any, call), Net(vm=vm.name), vm)
        assert [row["open"] for row in cast(Any, call.replies[0]["published"])] == opened
    assert asked["uid_of", "alice"] == asked["uid_of", "bob"] == 1 and asked["groups_of", "alice"] <= 2, (
        asked
    )  # once for its rate


def test_whatever_tapnet_refuses_is_tried_again_once_in_a_while(
    context: Context, tapnet: Tapnet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tapnet_sync, "RETRY", 0.1)
    tapnet.refuse_verb = "open"
    for number in range(1, 9):
        vm = machine(context, number, "alice", Nic())
        vm.published = [Published(22, "tcp", "world", 2000 + number)]
        start(context, tapnet, vm)
    rounds = []

    def counted() -> None:
        rounds.append(tapnet.verbs().count("open"))
        look()

    look = context.networks.upkeep.open_ports
    monkeypatch.setattr(context.networks.upkeep, "open_ports", counted)
    tapnet.turn(context.loop, lambda: len(rounds) >= 5)
    assert {after - before for before, after in zip(rounds[1:], rounds[2:], strict=False)} == {8}, rounds


# --- the list ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bob", "b" * 64, "ö" * 64, "𝔟" * 64], ids=["short", "long", "of two", "of four"])
def test_what_is_published_of_a_vm_fits_into_an_answer(
    context: Context, alices: Vm, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("vmshell.broker.network.openings.has_share", lambda uid, what: True)
    monkeypatch.setattr("vmshell.broker.network.openings.by_user", lambda *what, **more: None)
    context.policy = parse("[defaults]\npublished_max = 4096\n", "policy.toml")
    people(context, {name: (1 << 32) - 2}, {})
    alices.definition = Definition("web1", nics=(Nic(),) * 16)
    alices.host_keys = ["ssh-rsa " + "A" * 1190] * 8
    with pytest.raises(BadValue, match=r"web1 has published \d+ ports, and its list is full"):
        for port in range(10_000, 14_097):
            publish(context, alices, port=port, to=name)
    assert len(alices.published) >= {3: 400, 64: 34}[len(name)]
    for handle, request in ((handle_net, Net(vm="web1")), (handle_info, Info(vm="web1"))):
        call = Answer()
        handle(cast(Any, context), cast(Any, call), cast(Any, request), alices)
        assert len(encoding.encode({"id": encoding.INT_MAX, "ok": call.replies[0]})) < encoding.FRAME_MAX * 0.85
    publish(context, alices, port=10_000, to=name, remove=True)


def test_a_vm_in_the_making_publishes_nothing_yet(context: Context, alices: Vm) -> None:
    alices.state = CREATING
    with pytest.raises(VmBusy, match="creating"):
        publish(context, alices, port=22, to="bob")
    assert alices.published == []
