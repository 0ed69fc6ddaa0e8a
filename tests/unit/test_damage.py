"""What cannot be read after a restart is there all the same: listed with the reason, counted, killed, removed; and nothing is
written that could not be read again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.fakes.broker import FakeBroker
from tests.unit.test_broker_guards import FakeClient
from vmshell import messages
from vmshell.admin.doctor_records import check_records
from vmshell.admin.findings import FAIL, WARN
from vmshell.admin.findings import OK as FINE
from vmshell.admin.verbs import Context as AdminContext
from vmshell.broker.composition import Parts
from vmshell.broker.handlers import storage
from vmshell.broker.host.processes import Host
from vmshell.broker.runtime import files
from vmshell.broker.runtime.call import Call, Peer
from vmshell.broker.runtime.files import read_text, write_fast, write_text
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.vm.access import authorise
from vmshell.broker.vm.objects import DAMAGED, FACTS, OBJECTS_MAX, Object, Store
from vmshell.broker.vm.registry import Registry
from vmshell.broker.vm.vm import Snapshot, Vm
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.messages import FAILED, OFF, RUNNING
from vmshell.model.definition import Definition, Disk
from vmshell.model.policy import Policy
from vmshell.refusals import CannotSnapshot, NoSuchVm, NotAllowed, StorageFailed, TooMany, from_wire

ALICE, ROOT = Peer(1000, "alice", admin=False), Peer(0, "root", admin=True)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}/r", log=f"{tmp_path}/l", embedded=False)


def broker(layout: Layout) -> Parts:
    """All of a broker that has just been started, without a client."""

    def raised(exc: BaseException) -> None:
        raise exc

    made = Parts(layout, Policy(), Loop(raised), Host(embedded=True))
    made.capabilities.known = True
    made.registry.load()
    made.addresses.load()
    cast(Any, made.jobs).own = lambda words, done: None  # deleting is a job's
    return made


@pytest.fixture
def parts(layout: Layout) -> Parts:
    made = broker(layout)
    for name in ("web1", "web2"):
        define(made.registry, 1000, "alice", name)
    return made


def define(registry: Registry, uid: int, owner: str, name: str) -> Vm:
    vm = registry.create(uid, owner, Definition(name=name, image="demo", disks=(Disk("root"),)))
    registry.finish_creation(vm)
    return vm


def file(layout: Layout, name: str) -> Path:
    return Path(layout.vm_state(1000, "web1"), name)


def only(registry: Registry, name: str) -> Vm:
    vm = registry.get(1000, name)
    assert vm is not None
    return vm


def ask(parts: Parts, peer: Peer, request: messages.Request) -> dict[str, Any]:
    """The answer; raises what was refused."""
    client = FakeClient()
    client.peer = peer
    call = Call(cast(Any, client), 1)
    vm = authorise(peer, request, parts.registry)
    parts.handlers[type(request)](call, request, *([vm] if vm else []))
    ((body, _),) = client.sent
    if "error" in body:
        raise from_wire(body["error"])
    ok = body["ok"]
    assert isinstance(ok, dict)
    return ok


# --- records ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "empty": "",
    "cut in the first line": "{",
    "another kind": "[]",
    "no owner": '{"number": 1}',
    "wrong kinds": '{"number": true, "owner": 3, "created": "x"}',
    "no text": "\xff\xfe",
    "grants of another shape": json.dumps({"number": 1, "owner": "alice", "created": 1, "published": [1]}),
    "too large": " " * (files.TEXT_MAX + 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_vm_with_a_damaged_record_is_listed_counted_and_removed(parts: Parts, layout: Layout, kind: str) -> None:
    text = DAMAGE[kind]
    file(layout, "record.json").write_text(text, "latin-1")
    second = broker(layout)
    vm = only(second.registry, "web1")
    assert vm.state == FAILED and vm.note.startswith("its record is damaged (") and layout.state not in vm.note
    assert (vm.owner, vm.number != only(second.registry, "web2").number) == ("alice", True)
    assert [row["name"] for row in ask(second, ALICE, messages.List())["vms"]] == ["web1", "web2"]
    assert ask(second, ALICE, messages.Info(vm="web1", toml=True))["state"] == FAILED
    assert second.registry.used(1000).vms == 2
    with pytest.raises(VmshellError, match="damaged"):
        ask(second, ALICE, messages.Boot(vm="web1"))
    define(second.registry, 1000, "alice", "web3")
    second.registry.save(vm)
    assert file(layout, "record.json").read_text("latin-1") == text, "what is there is the administrator's to look at"
    ask(second, ALICE, messages.Rm(vm="web1"))
    assert [vm.name for vm in broker(layout).registry.of(1000)] == ["web2", "web3"]


@pytest.mark.parametrize(
    "request_", [messages.HostKey(vm="web1", keys=["ssh-rsa A"]), messages.Publish(vm="web1", port=1, to="world")]
)
def test_what_would_have_to_be_written_into_a_damaged_record_is_refused(
    parts: Parts, layout: Layout, request_: messages.Request
) -> None:
    file(layout, "record.json").write_text("{")
    with pytest.raises(VmshellError, match="not understood"):
        ask(broker(layout), ALICE, request_)


def test_a_record_that_was_cut_keeps_number_owner_and_age(parts: Parts, layout: Layout) -> None:
    whole = file(layout, "record.json").read_text()
    file(layout, "record.json").write_text(whole[: whole.index('"images"')])
    was, now = only(parts.registry, "web1"), only(broker(layout).registry, "web1")
    assert (now.number, now.owner, now.created) == (was.number, was.owner, was.created)


def test_a_damaged_vm_that_runs_is_found_by_its_run_directory(parts: Parts, layout: Layout) -> None:
    vm = only(parts.registry, "web1")
    vm.pid, vm.pid_ticks = os.getpid(), 0
    parts.registry.set_state(vm, RUNNING)
    for name in ("web1", "web2"):
        Path(layout.vm_state(1000, name), "record.json").write_text("")
    second = broker(layout)
    assert (only(second.registry, "web1").number, only(second.registry, "web1").owner) == (vm.number, "alice")
    assert second.registry.saved_run(vm.number)["state"] == RUNNING
    # And when it has ended, it is what it was.
    second.registry.set_state(only(second.registry, "web1"), OFF)
    assert only(second.registry, "web1").state == FAILED


def test_d22_whose_vm_it_was_is_not_guessed_from_who_has_the_uid_now(layout: Layout) -> None:
    first = broker(layout)
    define(first.registry, 1000, "alice", "web1")
    file(layout, "record.json").write_text("")
    second = broker(layout)
    assert ask(second, ALICE, messages.List())["vms"] == []
    with pytest.raises(NoSuchVm):
        ask(second, ALICE, messages.Rm(vm="web1"))
    assert [row["owner"] for row in ask(second, ROOT, messages.List(all=True))["vms"]] == ["1000"]
    ask(second, ROOT, messages.Rm(vm="1000/web1"))
    assert broker(layout).registry.of(1000) == []


def test_two_records_with_one_number_are_two_vms(parts: Parts, layout: Layout) -> None:
    other = Path(layout.vm_state(1000, "web2"), "record.json")
    other.write_text(file(layout, "record.json").read_text())
    registry = broker(layout).registry
    assert {only(registry, name).state for name in ("web1", "web2")} == {OFF, FAILED}
    assert len({vm.number for vm in registry}) == 2


def test_what_is_no_vms_is_said_to_be_there(parts: Parts, layout: Layout) -> None:
    os.makedirs(layout.vm_state(1000, "Lost+Found"))
    registry = broker(layout).registry
    assert registry.unreadable() == ["1000/Lost+Found"]
    assert [vm.name for vm in registry.of(1000)] == ["web1", "web2"]


@pytest.mark.parametrize("damage", [None, "\xff\xfe", "x" * (files.TEXT_MAX + 1)])
def test_a_vm_without_a_readable_definition_keeps_its_record(parts: Parts, layout: Layout, damage: str | None) -> None:
    file(layout, "vm.toml").unlink()
    if damage is not None:
        file(layout, "vm.toml").write_text(damage, "latin-1")
    second = broker(layout)
    vm = only(second.registry, "web1")
    assert vm.state == FAILED and vm.note.startswith("its definition is damaged (") and not vm.record_stays
    with pytest.raises(StorageFailed):
        ask(second, ALICE, messages.Info(vm="web1", toml=True))
    ask(second, ALICE, messages.Rm(vm="web1"))


# --- objects ----------------------------------------------------------------------------------------------------------


def put(store: Store, name: str, size: int) -> None:
    made = Object("raw", size)
    path = store.begin(name, made)
    os.makedirs(store.folder, exist_ok=True)
    with open(path, "wb") as new:
        new.truncate(size)
    store.finish(name, made)


@pytest.fixture
def shelf(parts: Parts) -> Iterator[Store]:
    store = parts.registry.shelf(1000, "alice")
    put(store, "one.iso", 3 << 20)
    put(store, "two.iso", 5 << 20)
    yield store


FACTS_DAMAGE = [
    "",
    "{",
    "[]",
    '{"one.iso": 3}',
    '{"one.iso": {"format": "raw", "size": "x"}}',
    "\xff",
    " " * (files.TEXT_MAX + 1),
]


@pytest.mark.parametrize("text", FACTS_DAMAGE)
def test_a_damaged_shelf_is_shown_counted_and_emptied_by_its_owner(shelf: Store, layout: Layout, text: str) -> None:
    Path(shelf.folder, FACTS).write_text(text, "latin-1")
    Path(shelf.folder, ".new-half").write_bytes(b"x")
    second = broker(layout)
    assert second.registry.used(1000).disk == 8
    rows = ask(second, ALICE, messages.Objects(vm="shelf"))["objects"]
    assert [(row["name"], row["format"], row["size"]) for row in rows] == [
        ("one.iso", DAMAGED, 3 << 20),
        ("two.iso", DAMAGED, 5 << 20),
    ]
    with pytest.raises(VmshellError, match="the list of its objects is damaged"):
        ask(second, ALICE, messages.DiskAdd(vm="shelf", object="new", size=1))
    for name in ("one.iso", "two.iso"):
        ask(second, ALICE, messages.Drop(vm="shelf", object=name))
    store = second.registry.shelf(1000, "alice")
    put(store, "three.iso", 1 << 20)
    assert broker(layout).registry.used(1000).disk == 1


def test_a_vm_whose_objects_are_not_known_is_failed_and_removed(parts: Parts, layout: Layout) -> None:
    vm = only(parts.registry, "web1")
    put(vm.store, "root", 2 << 20)
    Path(vm.store.folder, FACTS).write_text("{")
    second = broker(layout)
    again = only(second.registry, "web1")
    assert (again.state, again.number) == (FAILED, vm.number) and "objects is damaged" in again.note
    assert Path(vm.store.folder, "root").exists() and second.registry.used(1000).disk == 2
    ask(second, ALICE, messages.Rm(vm="web1"))


# --- nothing is written that is not read ------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_fast, write_text])
def test_no_file_is_written_larger_than_it_is_read(tmp_path: Path, write: Any) -> None:
    path = str(tmp_path / "x")
    write(path, "é" * files.TEXT_MAX)
    assert read_text(path) == "é" * files.TEXT_MAX
    with pytest.raises(OSError, match="are the most"):
        write(path, "é" * (files.TEXT_MAX + 1))
    assert len(read_text(path)) == files.TEXT_MAX


def test_a_shelf_has_as_many_objects_as_its_list_can_hold(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "s"), "shelf")
    os.makedirs(store.folder)
    store._objects = {f"{'n' * 60}{index:04}": Object("qcow2", (16 << 40) - 1, "b" * 31) for index in range(OBJECTS_MAX - 1)}
    put(store, "last", 1)
    with pytest.raises(TooMany, match=f"^shelf has {OBJECTS_MAX} objects, and there is no room for more$"):
        store.begin("more", Object("raw", 1))
    again = Store(store.folder, "shelf")
    again.load()
    assert len(list(again)) == OBJECTS_MAX and not again.damaged
    store.remove("last")
    store.begin("more", Object("raw", 1))


def test_snapshots_have_as_much_room_as_a_record_can_hold(parts: Parts, layout: Layout) -> None:
    vm = only(parts.registry, "web1")
    text = "x" * 20_000
    with pytest.raises(CannotSnapshot, match=r"no room beside \d+ snapshots; delete one"):
        for number in range(1000):
            parts.registry.must_have_room(vm, text)
            vm.snapshots[f"t{number}"] = Snapshot(f"t{number}", number, 1, 1, text)
    vm.host_keys = [f"ssh-rsa {'A' * 1190}"] * 8
    parts.registry.save(vm)
    assert len(only(broker(layout).registry, "web1").snapshots) == len(vm.snapshots) > 30


def test_a_long_list_of_objects_is_told_in_a_packet(parts: Parts) -> None:
    shelf = parts.registry.shelf(1000, "alice")
    shelf._objects = {f"{'n' * 60}{index:04}": Object("qcow2", 1 << 40, "b" * 31) for index in range(OBJECTS_MAX)}
    rows = ask(parts, ALICE, messages.Objects(vm="shelf"))
    assert rows["more"] is True and storage.ROWS_MAX >= len(rows["objects"]) > 100


# --- doctor -----------------------------------------------------------------------------------------------------------


def doctor(parts: Parts) -> list[tuple[str, str]]:
    """What `vmshell-admin doctor` finds where the broker answers so."""
    answer = ask(parts, ROOT, messages.Unreadable())
    with FakeBroker(parts.layout) as fake:
        fake.answers["unreadable"] = answer
        return [(finding.level, finding.text) for finding in check_records(AdminContext(parts.layout))]


def test_doctor_says_what_cannot_be_read(parts: Parts, shelf: Store, layout: Layout) -> None:
    assert doctor(parts) == [(FINE, "all that the broker has written down can be read")]
    file(layout, "record.json").write_text("")
    Path(shelf.folder, FACTS).write_text("{")
    Path(layout.addresses).write_text("{")
    (vms, shelves, addresses) = doctor(broker(layout))
    assert vms == (FAIL, "what is written down about alice/web1 cannot be read")
    assert shelves == (FAIL, "the list of the objects on 1000/shelf cannot be read")
    assert addresses[0] == FAIL and addresses[1].startswith("the list of addresses cannot be used: ")


def test_doctor_without_a_broker_knows_nothing(layout: Layout) -> None:
    ((level, text),) = [(finding.level, finding.text) for finding in check_records(AdminContext(layout))]
    assert level == WARN and text.startswith("nobody can say whether all records are whole")


def test_d29_only_administrators_are_told_whose_records_are_damaged(parts: Parts) -> None:
    with pytest.raises(NotAllowed):
        ask(parts, ALICE, messages.Unreadable())
