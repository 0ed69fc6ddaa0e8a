"""The broker's pure parts: records, who may do what, images. Threat rows D15, D16, D22."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.fakes.parts import PartsWith
from vmshell import messages
from vmshell.broker.composition import Parts
from vmshell.broker.host.processes import Host
from vmshell.broker.lifecycle.runs import Run
from vmshell.broker.network import passt
from vmshell.broker.runtime.call import Peer
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.storage import image_catalogue, resources
from vmshell.broker.vm.access import authorise, visible
from vmshell.broker.vm.objects import Object
from vmshell.broker.vm.registry import Registry
from vmshell.broker.vm.vm import Vm
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.model.definition import Definition, Disk, Nic
from vmshell.model.policy import Policy
from vmshell.model.shapes import Forward
from vmshell.refusals import ImageDamaged, NoSuchImage, NoSuchObject, NoSuchVm, NotAllowed, NotConnected, VmBusy, VmExists

# --- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    layout = Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}/r", log=f"{tmp_path}/l", embedded=True)
    made = Registry(layout)
    assert made.load() == []
    return made


def define(registry: Registry, uid: int, owner: str, name: str) -> None:
    registry.finish_creation(registry.create(uid, owner, Definition(name=name, image="demo", disks=(Disk("root"),))))


def again(registry: Registry) -> Registry:
    made = Registry(registry._layout)
    made.load()
    return made


def test_records_are_read_again_and_numbers_never_come_back(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    define(registry, 1000, "alice", "web2")
    second = again(registry)
    assert [(vm.name, vm.number, vm.owner, vm.state) for vm in second.of(1000)] == [
        ("web1", 1, "alice", "off"),
        ("web2", 2, "alice", "off"),
    ]
    web2 = second.get(1000, "web2")
    assert web2 is not None
    second.set_aside(web2)
    second.forget(web2)
    third = again(second)
    define(third, 1000, "alice", "web2")
    replaced = third.get(1000, "web2")
    assert replaced is not None
    assert replaced.number == 3  # C24, D20: an old number never means a new VM


def test_an_interrupted_creation_leaves_nothing_but_a_leftover(registry: Registry) -> None:
    registry.create(1000, "alice", Definition(name="web1", image="demo"))
    second = Registry(registry._layout)
    leftovers = second.load()
    assert [os.path.basename(folder) for folder in leftovers] == [".new-1"]
    assert second.of(1000) == []


def test_one_name_one_vm(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    with pytest.raises(VmExists):
        registry.create(1000, "alice", Definition(name="web1", image="demo"))
    define(registry, 1001, "bob", "web1")


def test_a_definition_of_a_newer_version_is_kept_and_not_booted(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    path = Path(registry._layout.vm_state(1000, "web1"), "vm.toml")
    text = path.read_text() + '\n[future]\nkey = "x"\n'
    path.write_text(text)
    (vm,) = again(registry).of(1000)
    assert "newer version" in vm.unreadable
    assert (vm.state, vm.definition.disks) == (messages.FAILED, (Disk("root"),))
    assert path.read_text() == text
    assert registry.text(vm) == text


def test_run_state_of_another_boot_of_the_host_is_not_believed(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    vm = registry.get(1000, "web1")
    assert vm is not None
    registry.set_state(vm, messages.RUNNING)
    path = Path(registry._layout.vm_run(vm.number), "run.json")
    assert registry.saved_run(vm.number)["state"] == "running"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "another"}))
    assert registry.saved_run(vm.number) == {}


def test_a_shelf_is_an_accounts_and_counts_in_its_uids_limit(registry: Registry) -> None:
    """D22: whoever is given a used uid finds an empty shelf, and the room that is left."""
    old = registry.shelf(1000, "alice")
    path = old.begin("secret", Object("raw", 5 << 20))
    os.makedirs(old.folder)
    Path(path).write_bytes(b"x")
    old.finish("secret", Object("raw", 5 << 20))
    assert [name for name, _ in registry.shelf(1000, "mallory")] == []
    second = again(registry)
    assert [name for name, _ in second.shelf(1000, "alice")] == ["secret"]
    assert second.used(1000).disk == 5


def test_the_library_offers_files_that_all_may_read_and_no_links(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (tmp_path / "two/x.iso").write_bytes(b"iso")
    (tmp_path / "one/closed").touch(0o600)
    (tmp_path / "one/link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "one/fifo")
    policies: Any = SimpleNamespace(policy=SimpleNamespace(library=(str(tmp_path / "one"), str(tmp_path / "two"))))
    library = resources.Resources(host=Host(embedded=True), registry=cast(Any, None), policies=policies)
    fd = library.open_library("x.iso")
    assert os.read(fd, 9) == b"iso"
    os.close(fd)
    for name in ("closed", "link", "fifo", "missing"):
        with pytest.raises(NoSuchObject, match=f"the library has no {name}"):
            library.open_library(name)


# --- who may do what --------------------------------------------------------------------------------------------------

ALICE, BOB, ROOT = Peer(1000, "alice", admin=False), Peer(1001, "bob", admin=False), Peer(0, "root", admin=True)
RENAMED = Peer(1000, "mallory", admin=False)  # the same uid, given to another account


@pytest.mark.parametrize("verb", sorted(messages.REQUESTS))
def test_every_verb_for_every_identity(registry: Registry, verb: str) -> None:
    """D15, D16, D22: the owner and the administrator reach a VM; to everyone else it does not exist, in the same words."""
    define(registry, 1000, "alice", "web1")
    kind = messages.REQUESTS[verb]
    given = {"image": "demo", "text": "x", "request": {}, "tag": "t", "object": "o", "size": 1, "format": "raw", "port": 22}
    given |= {"put": 1, "bytes": 5, "sha256": "0" * 64}
    others = {key: value for key, value in given.items() if key in kind.fields}
    if not issubclass(kind, messages.VmRequest):
        name = {"vm": "x"} if "vm" in kind.fields else {}
        assert authorise(BOB, kind(**name, **others), registry) is None
        return
    if issubclass(kind, messages.StoreRequest):
        assert authorise(BOB, kind(vm="shelf", **others), registry) is None  # everybody's own

    def result(peer: Peer, ref: str) -> str:
        try:
            found = authorise(peer, kind(vm=ref, **others), registry)
        except NoSuchVm as exc:
            return exc.sentence()
        return found.name if found else ""

    assert result(ALICE, "web1") == result(ALICE, "alice/web1") == result(ROOT, "alice/web1") == "web1"
    for peer in (BOB, RENAMED):
        assert result(peer, "alice/web1") == "there is no VM named alice/web1"
        assert result(peer, "alice/none") == "there is no VM named alice/none"
        assert result(peer, "web1") == "there is no VM named web1"
    assert result(ROOT, "web1") == "there is no VM named web1"


def test_an_account_that_was_made_anew_reaches_its_own_vm_by_either_name(registry: Registry) -> None:
    """D22: the VM of the first alice, who had another uid, stands in the second one's way nowhere."""
    define(registry, 1000, "alice", "web1")
    define(registry, 1002, "alice", "web1")
    second = Peer(1002, "alice", admin=False)
    for ref in ("web1", "alice/web1"):
        found = authorise(second, messages.Info(vm=ref), registry)
        assert found is not None
        assert found.uid == 1002


def test_lists_show_ones_own(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    define(registry, 1001, "bob", "db")
    assert [vm.name for vm in visible(ALICE, registry, everyone=False)] == ["web1"]
    assert visible(RENAMED, registry, everyone=False) == []
    assert [vm.name for vm in visible(ROOT, registry, everyone=True)] == ["web1", "db"]
    with pytest.raises(NotAllowed):
        authorise(BOB, messages.List(all=True), registry)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, NoSuchImage),
        ("", ImageDamaged),
        ("x = ", ImageDamaged),
        ('[boot]\nkernel = "k"', ImageDamaged),
        ('[boot]\nkernel = "../k"\n[sha256]\n"../k" = "00"', ImageDamaged),
        ('[boot]\nkernel = 5\n[sha256]\nk = "00"', ImageDamaged),
        ('[disk]\nfile = "d"\nformat = "vmdk"\n[sha256]\nd = "00"', ImageDamaged),
        ('[disk]\nfile = "d"\nsize = -1\n[sha256]\nd = "00"', ImageDamaged),
    ],
)
def test_images_that_are_not_whole(tmp_path: Path, text: str | None, error: type[VmshellError]) -> None:
    if text is not None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x/image.toml").write_text(text)
    with pytest.raises(error):
        image_catalogue.load(str(tmp_path), "x")


def test_an_image_file_is_opened_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/image.toml").write_text('[boot]\nkernel = "k"\n[sha256]\nk = "00"')
    (tmp_path / "x/k").symlink_to("/etc/passwd")
    image = image_catalogue.load(str(tmp_path), "x")
    with pytest.raises(ImageDamaged):
        image.open("k")
    (tmp_path / "x/k").unlink()
    os.mkfifo(tmp_path / "x/k")
    with pytest.raises(ImageDamaged):  # C04: and it does not hang
        image.open("k")


# --- words of the relay -----------------------------------------------------------------------------------------------


@pytest.fixture
def parts(registry: Registry) -> Parts:
    """Of a session, with what *registry* holds."""
    loop = Loop(lambda exc: pytest.fail(str(exc)))
    return PartsWith(registry._layout, Policy(), loop, Host(embedded=True), registry=registry)


def test_a_guest_that_the_host_cannot_run_is_named_in_the_list(parts: Parts) -> None:
    """`internal-error` is QEMU's own name for it: the CPUs stand still, and the list says why until they run again."""
    define(parts.registry, 1000, "alice", "web1")
    (vm,) = parts.registry.of(1000)
    parts.runs.add(Run(vm))
    parts.registry.set_state(vm, messages.RUNNING)
    for word in ("paused", "internal-error"):
        parts.events.heard(messages.Event(number=vm.number, word=word))
    assert (vm.state, vm.note.split(":")[0]) == ("paused", "internal-error")
    parts.events.heard(messages.Event(number=vm.number, word="running"))
    assert (vm.state, vm.note) == ("running", "")
    parts.events.heard(messages.Event(number=vm.number + 1, word="paused"))
    assert vm.state == "running"


# --- reaching a guest -------------------------------------------------------------------------------------------------


class Answer:
    """A call whose peer is alice."""

    def __init__(self) -> None:
        self.peer = ALICE
        self.replies: list[dict[str, object]] = []

    def reply(self, answer: dict[str, object]) -> None:
        self.replies.append(answer)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """It has a port of the host's loopback, and does not listen yet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def forwarding(parts: Parts, port: int) -> Vm:
    """A VM that runs, with *port* leading to its sshd."""
    nics = (Nic(), Nic(forward=(Forward("udp", port, 22), Forward("tcp", port, 22))))
    vm = parts.registry.create(1000, "alice", Definition("web1", nics=nics))
    parts.registry.finish_creation(vm)
    parts.registry.set_state(vm, messages.RUNNING)
    return vm


def reached(parts: Parts, vm: Vm) -> dict[str, object]:
    call = Answer()
    parts.handlers[messages.Connect](call, messages.Connect(vm=vm.name, port=22), vm)
    (answer,) = call.replies
    return answer


@pytest.mark.parametrize(("program", "cure"), [("/bin/true", "boot it again"), ("/nonexistent", "apt-get install passt, then")])
def test_nobody_is_sent_to_a_port_that_no_passt_holds(
    parts: Parts, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, program: str, cure: str
) -> None:
    """In a session without passt, and where it has ended, the first who takes the port would be shown the password."""
    monkeypatch.setattr(passt, "PASST", program)
    port = listener.getsockname()[1]
    vm = forwarding(parts, port)
    with pytest.raises(NotConnected, match=f"no passt leads to it: {cure}"):
        reached(parts, vm)
    listener.listen()
    assert reached(parts, vm) == {"name": "web1", "address": "127.0.0.1", "port": port}
    listener.close()
    with pytest.raises(NotConnected, match="no passt leads to it"):
        reached(parts, vm)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
@pytest.mark.parametrize(("session", "other", "leads"), [(0, 12345, False), (0, 65534, True), (12345, 65534, False)])
def test_nobody_is_sent_to_somebody_elses_port(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, session: int, other: int, leads: bool
) -> None:
    """Started by root, passt makes itself nobody's; whoever else has nobody's port is not meant."""
    os.seteuid(other)
    try:
        sock = socket.create_server(("127.0.0.1", 0))
    finally:
        os.seteuid(0)
    with sock:
        vm = forwarding(parts, sock.getsockname()[1])
        monkeypatch.setattr(os, "geteuid", lambda: session)
        if leads:
            assert reached(parts, vm)["port"] == sock.getsockname()[1]
        else:
            with pytest.raises(NotConnected):
                reached(parts, vm)


def test_a_vm_in_the_making_has_no_host_keys_yet(parts: Parts) -> None:
    vm = parts.registry.create(1000, "alice", Definition("web1"))
    request = messages.HostKey(vm="web1", keys=["ssh-ed25519 AAAA"])
    with pytest.raises(VmBusy, match="web1 is creating"):
        parts.handlers[messages.HostKey](Answer(), request, vm)
    assert vm.host_keys == []
    parts.registry.finish_creation(vm)
    parts.handlers[messages.HostKey](Answer(), request, vm)
    assert vm.host_keys == request.keys
