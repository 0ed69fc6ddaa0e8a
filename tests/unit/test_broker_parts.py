"""The broker's pure parts: definitions, policy, records, who may do what. Threat rows D15-D17, D22."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell import messages
from vmshell.broker import catalogue, definition, policy
from vmshell.broker.access import Peer, authorise, visible
from vmshell.broker.context import Context
from vmshell.broker.definition import Definition, Disk
from vmshell.broker.fleet import Live
from vmshell.broker.host import Host
from vmshell.broker.loop import Loop
from vmshell.broker.policy import Limits, Usage, decide
from vmshell.broker.vms import Registry
from vmshell.errors import BadPolicy, BadValue, ImageDamaged, NoSuchImage, NoSuchVm, NotAllowed, OverLimit, VmExists, VmshellError
from vmshell.layout import Layout

NAME = st.from_regex(r"[a-z][a-z0-9-]{0,30}", fullmatch=True)
DEFINITIONS = st.builds(
    Definition,
    name=NAME,
    image=NAME,
    cpus=st.integers(1, 255),
    memory=st.integers(16, 1 << 24),
    machine=st.sampled_from(["q35", "pc"]),
    kernel=NAME | st.just(""),
    disks=st.lists(st.builds(Disk, name=NAME, size=st.integers(1, 1 << 50), base=NAME | st.just("")), max_size=3).map(tuple),
)


@given(DEFINITIONS)
def test_a_definition_is_read_as_it_was_written(made: Definition) -> None:
    assert definition.parse(made.to_toml()) == made


@pytest.mark.parametrize(
    "text",
    [
        "name = ",
        'name = "a"',
        'name = "a"\nimage = "b"\nextra = 1',
        'name = "a"\nimage = "b"\n[cpu]\ncount = 0',
        'name = "a"\nimage = "b"\n[cpu]\ncount = 2.0',
        'name = "a"\nimage = "b"\n[memory]\nsize = 512',
        'name = "a"\nimage = "b"\n[memory]\nsize = "nanM"',
        'name = "a"\nimage = "b"\n[boot]\nkernel = "/etc/passwd"',
        'name = "a"\nimage = "b"\n[[disk]]\nname = "x"\nformat = "vmdk"\nsize = 5',
        'name = "a"\nimage = "b"\n[[disk]]\nname = "../x"\nformat = "qcow2"\nsize = 5',
        'name = "a"\nimage = "b"\ndisk = 5',
        'name = "a"\nimage = "b"\nmachine = 2026-11-22',
    ],
)
def test_a_wrong_definition_names_its_key(text: str) -> None:
    with pytest.raises(VmshellError) as caught:
        definition.parse(text)
    assert caught.value.code in ("bad-value", "bad-name")


# --- policy -----------------------------------------------------------------------------------------------------------


def write_policy(tmp_path: Path, text: str) -> str:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return str(path)


def test_without_a_file_the_defaults_are_in_force(tmp_path: Path) -> None:
    assert policy.load(str(tmp_path / "none"), Limits()).defaults == Limits()


def test_a_policy_is_read(tmp_path: Path) -> None:
    rules = policy.load(
        write_policy(tmp_path, '[host]\naccel = "tcg"\nlog_size_max = "2M"\n[defaults]\nmemory_max = "3G"\nvms_max = 1\n'),
        Limits(),
    )
    assert (rules.host.accel, rules.host.log_size_max) == ("tcg", 2 << 20)
    assert (rules.defaults.memory_max, rules.defaults.vms_max, rules.defaults.cpus_max) == (3072, 1, 2)


def test_the_shipped_policy_is_valid_also_with_every_comment_taken_off(tmp_path: Path) -> None:
    shipped = Path(__file__).parents[2].joinpath("etc/policy.toml").read_text()
    assert policy.load(write_policy(tmp_path, shipped), Limits()) == policy.Policy()
    lines = [line.removeprefix("# ") if " = " in line else line for line in shipped.splitlines()]
    assert policy.load(write_policy(tmp_path, "\n".join(lines)), Limits()) == policy.Policy()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[defaults]\nvms_max = \n", "line 2"),
        ("[defaults]\nvms = 1", "vms"),
        ("[default]\nvms_max = 1", "[default]"),
        ("defaults = 1", "[defaults]"),
        ("[defaults]\nvms_max = true", "vms_max"),
        ("[defaults]\nvms_max = -1", "vms_max"),
        ("[defaults]\nvms_max = nan", "vms_max"),
        ('[defaults]\nvms_max = "9"', "vms_max"),
        ("[defaults]\nmemory_max = 5", "memory_max"),
        ("[defaults]\nvms_max = 1\nvms_max = 2\n", "line 3"),
        ('[host]\naccel = "hvf"', "accel"),
        ("[defaults]\nvms_max = 2026-11-22", "vms_max"),
    ],
)
def test_a_wrong_policy_says_where(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises((BadPolicy, BadValue), match="(?s).*" + named.replace("[", r"\[")):
        policy.load(write_policy(tmp_path, text), Limits())


def test_a_policy_that_others_can_write_is_refused(tmp_path: Path) -> None:
    path = write_policy(tmp_path, "")
    os.chmod(path, 0o666)
    with pytest.raises(BadPolicy, match="writable"):
        policy.load(path, Limits())


@given(
    st.lists(
        st.builds(
            Usage,
            vms=st.just(1),
            running=st.integers(0, 1),
            cpus=st.integers(0, 4),
            memory=st.integers(0, 5000),
            disk=st.integers(0, 90000),
        ),
        max_size=20,
    )
)
def test_what_decide_lets_in_never_exceeds_a_limit(shares: list[Usage]) -> None:
    """D17: whatever is asked in whatever order, the sums stay within the limits."""
    limits, used = Limits(), Usage()
    for share in shares:
        try:
            decide("x", limits, share, used)
        except OverLimit as exc:
            assert exc.sentence()
            continue
        used = Usage.total([used, share])
    assert used.vms <= limits.vms_max
    assert used.running <= limits.running_max
    assert used.disk <= limits.user_disk


def test_a_refusal_says_the_rule_and_every_number() -> None:
    with pytest.raises(OverLimit) as caught:
        decide("web1", Limits(), Usage(vms=1, running=1, cpus=1, memory=2048), Usage(running=1, memory=3072))
    assert caught.value.sentence() == "web1 asks for 2G memory in all; the limit is 4G and 3G are in use (user_memory)"
    assert caught.value.advice() == "allowed now: 1G"


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    layout = Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}/r", log=f"{tmp_path}/l", embedded=True)
    made = Registry(layout)
    assert made.load() == []
    return made


def define(registry: Registry, uid: int, owner: str, name: str) -> None:
    vm, folder = registry.create(uid, owner, Definition(name=name, image="demo", disks=(Disk("root", 1 << 30),)))
    registry.finish_creation(vm, folder)


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


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"number": "1"}', '{"number": true, "owner": "a", "created": 1}', "\xff\xfe"])
def test_a_damaged_record_hides_only_its_own_vm(registry: Registry, damage: str) -> None:
    define(registry, 1000, "alice", "web1")
    define(registry, 1000, "alice", "web2")
    Path(registry._layout.vm_state(1000, "web1"), "record.json").write_text(damage, "latin-1")
    second = again(registry)
    assert [vm.name for vm in second.of(1000)] == ["web2"]
    define(second, 1000, "alice", "web3")
    assert os.path.isdir(registry._layout.vm_state(1000, "web1"))


def test_a_definition_of_a_newer_version_is_kept_and_not_booted(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    path = Path(registry._layout.vm_state(1000, "web1"), "vm.toml")
    text = path.read_text() + '\n[future]\nkey = "x"\n'
    path.write_text(text)
    (vm,) = again(registry).of(1000)
    assert vm.unreadable
    assert vm.state == messages.FAILED
    assert path.read_text() == text


def test_run_state_of_another_boot_of_the_host_is_not_believed(registry: Registry) -> None:
    define(registry, 1000, "alice", "web1")
    vm = registry.get(1000, "web1")
    assert vm is not None
    registry.set_state(vm, messages.RUNNING)
    path = Path(registry._layout.vm_run(vm.number), "run.json")
    assert registry.saved_run(vm.number)["state"] == "running"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boot_id": "another"}))
    assert registry.saved_run(vm.number) == {}


# --- who may do what --------------------------------------------------------------------------------------------------

ALICE, BOB, ROOT = Peer(1000, "alice", admin=False), Peer(1001, "bob", admin=False), Peer(0, "root", admin=True)
RENAMED = Peer(1000, "mallory", admin=False)  # the same uid, given to another account


@pytest.mark.parametrize("verb", sorted(messages.REQUESTS))
def test_every_verb_for_every_identity(registry: Registry, verb: str) -> None:
    """D15, D16, D22: the owner and the administrator reach a VM; to everyone else it does not exist, in the same words."""
    define(registry, 1000, "alice", "web1")
    kind = messages.REQUESTS[verb]
    if not issubclass(kind, messages.VmRequest):
        assert (
            authorise(
                BOB, kind(**{key: value for key, value in {"vm": "x", "image": "demo"}.items() if key in kind.fields}), registry
            )
            is None
        )
        return

    def result(peer: Peer, ref: str) -> str:
        try:
            found = authorise(peer, kind(vm=ref), registry)
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
        catalogue.load(str(tmp_path), "x")


def test_an_image_file_is_opened_without_following_links(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/image.toml").write_text('[boot]\nkernel = "k"\n[sha256]\nk = "00"')
    (tmp_path / "x/k").symlink_to("/etc/passwd")
    image = catalogue.load(str(tmp_path), "x")
    with pytest.raises(ImageDamaged):
        image.open("k")
    (tmp_path / "x/k").unlink()
    os.mkfifo(tmp_path / "x/k")
    with pytest.raises(ImageDamaged):  # C04: and it does not hang
        image.open("k")


# --- words of the relay -----------------------------------------------------------------------------------------------


def test_a_guest_that_the_host_cannot_run_is_named_in_the_list(tmp_path: Path) -> None:
    """`internal-error` is QEMU's own name for it: the CPUs stand still, and the list says why until they run again."""
    layout = Layout(etc=f"{tmp_path}/e", state=f"{tmp_path}/s", run=f"{tmp_path}/r", log=f"{tmp_path}/l", embedded=True)
    loop = Loop(lambda exc: pytest.fail(str(exc)))
    context = Context(layout, policy.Policy(), loop, Host(policy.HostPolicy(), embedded=True))
    context.registry.load()
    define(context.registry, 1000, "alice", "web1")
    (vm,) = context.registry.of(1000)
    context.machines._fleet.add(Live(vm))
    context.registry.set_state(vm, messages.RUNNING)
    for word in ("paused", "internal-error"):
        context.machines.heard(messages.Event(number=vm.number, word=word))
    assert (vm.state, vm.note.split(":")[0]) == ("paused", "internal-error")
    context.machines.heard(messages.Event(number=vm.number, word="running"))
    assert (vm.state, vm.note) == ("running", "")
    context.machines.heard(messages.Event(number=vm.number + 1, word="paused"))
    assert vm.state == "running"
