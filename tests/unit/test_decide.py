"""The one decision: each rule just inside and just over, in numbers; no sum ever beyond its limit. Threat rows D17, F01, F18."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell.errors import EX_REFUSED, BadValue, VmshellError
from vmshell.model import policy
from vmshell.model.decide import Usage, Verdict, apply_fixed, decide, fits, refuse
from vmshell.model.definition import Definition, Disk, Forward, Geometry, Nic
from vmshell.model.limitkinds import FEATURES
from vmshell.model.limits import LIMIT_KEYS
from vmshell.model.policy import Effective, Limits
from vmshell.names import MIB
from vmshell.refusals import EX_LIMIT, OverLimit, PolicyDenied

WEB1 = Definition(name="web1")
ONE = Usage(vms=1, running=1, cpus=1, memory=512)
NOTHING = Usage()


def effective(text: str = "") -> Effective:
    # Ports are forwarded on a session's kind of network only.
    return policy.parse(f"{text}\n[networks.users]\nkind = 'user'\n", "/etc/vmshell/policy.toml").effective("alice", ())


def ask(
    text: str, definition: Definition, share: Usage = ONE, used: Usage = NOTHING, sizes: dict[str, int] | None = None
) -> list[Verdict]:
    return decide("web1", effective(text), definition, share, used, sizes or {})


def refusal(verdicts: list[Verdict]) -> VmshellError:
    """The one refusal among *verdicts*."""
    bad = [verdict for verdict in verdicts if not verdict.ok]
    assert len(bad) == 1, bad
    with pytest.raises(type(bad[0].error())) as caught:
        refuse(verdicts, "web1")
    found = caught.value
    assert isinstance(found, VmshellError)
    assert found.exit_status == (EX_LIMIT if isinstance(found, OverLimit) else EX_REFUSED)
    return found


def disks(count: int, **keys: object) -> tuple[Disk, ...]:
    return tuple(replace(Disk(f"d{number}"), **keys) for number in range(count))  # type: ignore[arg-type]


# --- numbers ----------------------------------------------------------------------------------------------------------

D = "[defaults]\n"
SUMS = [
    # the policy, the VM's share, what else is used: just inside; the share that is one too many; its sentence; what is allowed
    ("vms_max = 3", Usage(vms=1), Usage(vms=2), Usage(vms=2), "2 VMs; the limit is 3 and 2 are in use (vms_max", "1"),
    ("running_max = 2", ONE, Usage(running=1), replace(ONE, running=2),
     "2 running VMs; the limit is 2 and 1 are in use (running_max", "1"),
    ("cpus_max = 2", Usage(cpus=2), Usage(cpus=9), Usage(cpus=3),
     "3 CPUs for one VM; the limit is 2 and 0 are in use (cpus_max", "2"),
    ("user_cpus = 4", replace(ONE, cpus=1), Usage(running=2, cpus=3), replace(ONE, cpus=2),
     "2 CPUs in all; the limit is 4 and 3", "1"),
    ("memory_max = '1G'", Usage(memory=1024), Usage(memory=9), Usage(memory=1025),
     "1025M memory for one VM; the limit is 1G and 0", "1G"),
    ("user_memory = '3G'", replace(ONE, memory=1024), Usage(running=1, memory=2048), replace(ONE, memory=1025),
     "1025M memory in all; the limit is 3G and 2G are in use (user_memory", "1G"),
    ("disk_size_max = '10G'", Usage(disk=10240), Usage(disk=5), Usage(disk=10241),
     "10241M disk for one VM; the limit is 10G and 0", "10G"),
    ("user_disk = '10G'", Usage(disk=4096), Usage(disk=6144), Usage(disk=4097), "4097M disk in all; the limit is 10G and 6G",
     "4G"),
    ("snapshots_max = 2", Usage(snapshots=2), Usage(snapshots=9), Usage(snapshots=3),
     "3 snapshots of one VM; the limit is 2 and 0", "2"),
    ("user_snapshots = 5", Usage(snapshots=2), Usage(snapshots=3), Usage(snapshots=3),
     "3 snapshots in all; the limit is 5 and 3", "2"),
    ("user_nics = 5", Usage(nics=2), Usage(nics=3), Usage(nics=3), "3 network cards in all; the limit is 5 and 3", "2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "inside", "used", "over", "sentence", "allowed"), SUMS, ids=[row[0].split()[0] for row in SUMS])
def test_a_sum_up_to_its_limit_and_not_one_beyond(
    text: str, inside: Usage, used: Usage, over: Usage, sentence: str, allowed: str
) -> None:
    rule = text.split()[0]
    refuse(ask(D + text, WEB1, inside, used))
    error = refusal(ask(D + text, WEB1, over, used))
    assert isinstance(error, OverLimit)
    assert error.sentence().startswith(f"web1 asks for {sentence}")
    assert error.sentence().endswith(f" are in use ({rule} in [defaults])")
    assert error.advice() == f"allowed now: {allowed}"
    fits("shelf.x", effective(D + text), inside, used)
    with pytest.raises(OverLimit, match="^shelf.x asks for"):
        fits("shelf.x", effective(D + text), over, used)


def test_without_a_policy_the_sentence_names_the_built_in_limits() -> None:
    error = refusal(ask("", WEB1, replace(ONE, memory=2048), Usage(running=1, memory=3072)))
    assert (
        error.sentence()
        == "web1 asks for 2G memory in all; the limit is 4G and 3G are in use (user_memory in the built-in limits)"
    )
    assert error.advice() == "allowed now: 1G"


def test_what_does_not_run_needs_no_room_among_what_does() -> None:
    used = Usage(vms=4, running=4, cpus=4, memory=4096)
    assert all(verdict.ok for verdict in ask("", WEB1, Usage(vms=1, cpus=2, memory=2048), used))
    assert {verdict.rule for verdict in ask("", WEB1, ONE, used) if not verdict.ok} == {"running_max", "user_cpus", "user_memory"}


def test_a_share_of_zero_always_fits() -> None:
    """Somebody over a lowered limit may still list, stop and delete."""
    over = Usage(*[1 << 40 for _ in fields(Usage)])
    text = (
        D + "vms_max = 0\nrunning_max = 0\nuser_cpus = 0\nuser_memory = '0'\nuser_disk = '0'\nuser_snapshots = 0\nuser_nics = 0"
    )
    fits("web1", effective(text), NOTHING, over)
    assert all(verdict.ok for verdict in ask(text, WEB1, NOTHING, over))
    assert refusal(ask(D + "vms_max = 0", WEB1, Usage(vms=1), over)).advice() == "allowed now: 0"


KIB = 1024
COUNTS: list[tuple[str, Definition, Definition, dict[str, int], str, str]] = [
    ("disks_max = 2", replace(WEB1, disks=(*disks(2), Disk(type="cdrom"))), replace(WEB1, disks=disks(3)), {},
     "3 disks for one VM; the limit is 2", "2"),
    ("nics_max = 1", replace(WEB1, nics=(Nic(),)), replace(WEB1, nics=(Nic(), Nic())), {},
     "2 network cards for one VM; the limit is 1", "1"),
    ("option_roms_max = 1", replace(WEB1, option_roms=("a",)), replace(WEB1, option_roms=("a", "b")), {},
     "2 option ROMs; the limit is 1", "1"),
    ("scratch_max = '3G'", replace(WEB1, disks=(Disk("big", snapshot=True), Disk("huge"))),
     replace(WEB1, disks=disks(2, snapshot=True)),
     {"big": 3 << 30, "huge": 9 << 30, "d0": 3 << 30, "d1": 1}, "3073M disk to throw away; the limit is 3G", "3G"),
    ("scratch_max = '3G'", WEB1, replace(WEB1, disks=(Disk("new", snapshot=True, size=4 << 30),)), {},
     "4G disk to throw away; the limit is 3G", "3G"),
    ("kernel_size_max = '8M'", replace(WEB1, kernel="k"), replace(WEB1, kernel="shelf:k"),
     {"k": 8 << 20, "shelf:k": (8 << 20) + 1},
     "9M kernel; the limit is 8M", "8M"),
    ("initrd_size_max = '8M'", replace(WEB1, kernel="k", initrd="i"), replace(WEB1, kernel="k", initrd="library:i"),
     {"i": 8 << 20, "library:i": (8 << 20) + 1}, "9M initial RAM disk; the limit is 8M", "8M"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "inside", "over", "sizes", "sentence", "allowed"), COUNTS)
def test_a_count_up_to_its_limit_and_not_one_beyond(
    text: str, inside: Definition, over: Definition, sizes: dict[str, int], sentence: str, allowed: str
) -> None:
    refuse(ask(D + text, inside, sizes=sizes))
    error = refusal(ask(D + text, over, sizes=sizes))
    assert error.sentence() == f"web1 asks for {sentence} and 0 are in use ({text.split()[0]} in [defaults])"
    assert error.advice() == f"allowed now: {allowed}"


def test_an_initial_ram_disk_leaves_more_than_half_of_the_memory() -> None:
    direct = replace(WEB1, kernel="k", initrd="i", memory=256)
    refuse(ask("", direct, sizes={"i": 128 * MIB - 1}))
    error = refusal(ask("", direct, sizes={"i": 128 * MIB}))
    assert error.sentence() == (
        "web1 asks for 128M initial RAM disk; the limit is less than 128M and 0 are in use (half of memory.size in vm.toml)"
    )
    assert error.advice() == "allowed now: less than 128M, or memory.size = 257M"
    refuse(ask("", replace(direct, memory=257), sizes={"i": 128 * MIB}))


def test_memory_has_a_least() -> None:
    text = D + "memory_min = '128M'\nmemory_max = '1G'"
    refuse(ask(text, replace(WEB1, memory=128)))
    error = refusal(ask(text, replace(WEB1, memory=127)))
    assert isinstance(error, PolicyDenied)
    assert error.sentence() == "web1: memory of 127M is not allowed (memory_min in [defaults])"
    assert error.advice() == "allowed: from 128M to 1G"


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = [
    ("machines = ['q35']", replace(WEB1, machine="pc-q35-7.2"), replace(WEB1, machine="pc-i440fx-7.2"), "machine.type = pc",
     "q35"),
    ("cpu_models = ['host']", WEB1, replace(WEB1, cpu_model="qemu64"), "cpu.model = qemu64", "host"),
    ("firmware = ['bios']", WEB1, replace(WEB1, firmware="uefi"), "machine.firmware = uefi", "bios"),
    ("networks = []", WEB1, replace(WEB1, nics=(Nic(),)), "net0.network = users", "none"),
    ("nic_models = ['virtio', 'e1000']", replace(WEB1, nics=(Nic(model="e1000"),)),
     replace(WEB1, nics=(Nic(), Nic(model="rtl8139"))),
     "net1.model = rtl8139", "virtio, e1000"),
    ("video_models = ['std']", replace(WEB1, display="vnc"), replace(WEB1, video="cirrus"), "display.video = cirrus", "std"),
    ("video_models = []", replace(WEB1, display="vnc", video="none"), replace(WEB1, display="vnc"), "display.video = std",
     "none"),
    ("images = ['demo']", replace(WEB1, image="demo"), replace(WEB1, image="other"), "image other", "demo"),
    ("images = ['demo']", replace(WEB1, kernel="image:demo"), replace(WEB1, kernel="image:other"), "image other", "demo"),
    ("images = []", replace(WEB1, kernel="k"), replace(WEB1, disks=(Disk("d", base="image:demo"),)), "image demo", "no image"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "inside", "over", "what", "allowed"), NAMES)
def test_a_name_is_one_of_those_allowed(text: str, inside: Definition, over: Definition, what: str, allowed: str) -> None:
    refuse(ask(D + text, inside))
    error = refusal(ask(D + text, over))
    assert isinstance(error, PolicyDenied)
    assert error.sentence() == f"web1: {what} is not allowed ({text.split()[0]} in [defaults])"
    assert error.advice() == f"allowed: {allowed}"


@pytest.mark.parametrize(
    ("definition", "sentence"),
    [
        (replace(WEB1, nics=(Nic("lan"),)), "web1: net0.network = lan is not allowed (networks in the catalogue)"),
        (replace(WEB1, cpu_model="epyc"), "web1: cpu.model = epyc is not allowed (cpu_models in the catalogue)"),
        (replace(WEB1, machine="pc"), "web1: machine.type = pc is not allowed (machines in the catalogue)"),
    ],
)
def test_a_name_that_nobody_has_is_not_in_the_catalogue(definition: Definition, sentence: str) -> None:
    assert refusal(ask("[catalogue]\nmachines = ['q35']", definition)).sentence() == sentence


# --- features and grants ----------------------------------------------------------------------------------------------

PC = replace(WEB1, machine="pc")
HAVING = {
    "floppy": (replace(WEB1, disks=(Disk("f", type="floppy"),)),),
    "cdrom": (replace(WEB1, disks=(Disk(type="cdrom"),)),),
    "option_rom": (replace(WEB1, option_roms=("r",)),),
    "kernel": (replace(WEB1, kernel="k"), replace(WEB1, kernel="image:x", initrd="shelf:i")),
    "restore": (replace(WEB1, restore="before"),),
    "snapshot": (replace(WEB1, disks=(Disk("d", snapshot=True),)),),
    "vnc": (replace(WEB1, display="vnc"),),
    "agent": (replace(WEB1, agent=True),),
    "usb-storage": (replace(WEB1, disks=(Disk("d", bus="usb"),)),),
    "scsi": (replace(WEB1, disks=(Disk(type="cdrom", bus="scsi"),)),),
    "uefi": (replace(WEB1, firmware="uefi"),),
    "forward": (replace(WEB1, nics=(Nic(forward=(Forward("tcp", 2222, 22),)),)),),
    "geometry": (replace(PC, disks=(Disk("d", bus="ide", geometry=Geometry(100, 16, 63)),)),),
}
FORWARDING = "forward_ports = '2000-3000'\n"


def test_every_feature_is_tried() -> None:
    assert list(HAVING) == list(FEATURES)


@pytest.mark.parametrize(("feature", "definition"), [(name, each) for name, every in HAVING.items() for each in every])
def test_a_denied_feature_is_refused_and_no_other(feature: str, definition: Definition) -> None:
    others = [name for name in FEATURES if name not in (feature, "cdrom")]
    refuse(ask(f"{D}{FORWARDING}deny = {others}", definition))
    error = refusal(ask(f"{D}{FORWARDING}deny = ['{feature}']", definition))
    assert isinstance(error, PolicyDenied)
    what, instead = FEATURES[feature]
    assert error.sentence() == f"web1: {what} is not allowed (deny in [defaults])"
    assert error.advice() == f"allowed: {instead}"


def test_the_administrators_own_kernels_are_not_denied() -> None:
    for kernel, initrd in (("image:demo", ""), ("image:demo", "image:demo"), ("library:vmlinuz", "library:initrd")):
        refuse(ask(D + "deny = ['kernel']", replace(WEB1, kernel=kernel, initrd=initrd)))


def test_a_plain_vm_passes_a_policy_that_denies_everything() -> None:
    refuse(ask(f"{D}deny = {list(FEATURES)}", replace(WEB1, disks=disks(1), nics=(Nic(),))))


GRANTS = [
    ("allow_autostart = true", "allow_autostart = false", replace(WEB1, autostart=True), "autostart = true", "autostart = false"),
    ("mac_prefix = '06:aa'", "mac_prefix = '06:ab'", replace(WEB1, nics=(Nic(), Nic(mac="06:aa:00:00:00:01"))),
     "net1.mac = 06:aa:00:00:00:01", "one that begins with 06:ab:, or none"),
    ("mac_prefix = '06'", "mac_prefix = ''", replace(WEB1, nics=(Nic(mac="06:00:00:00:00:01"),)),
     "net0.mac = 06:00:00:00:00:01", "net0.mac left out"),
    ("mac_prefix = '06:00'", "mac_prefix = '06:00:0a'", replace(WEB1, nics=(Nic(mac="06:00:00:0a:00:01"),)),
     "net0.mac = 06:00:00:0a:00:01", "one that begins with 06:00:0a:, or none"),
    ("forward_ports = '80-90'", "forward_ports = '80-89'", replace(WEB1, nics=(Nic(forward=(Forward("tcp", 90, 5),)),)),
     "port 90 of the host", "80-89"),
    ("forward_ports = '80-90'", "forward_ports = '81-90'", replace(WEB1, nics=(Nic(forward=(Forward("udp", 80, 5),)),)),
     "port 80 of the host", "81-90"),
    ("forward_ports = '80-80'", "", replace(WEB1, nics=(Nic(forward=(Forward("udp", 80, 5),)),)), "port 80 of the host",
     "no port"),
]  # fmt: skip


@pytest.mark.parametrize(("granting", "refusing", "definition", "what", "allowed"), GRANTS)
def test_what_needs_a_grant(granting: str, refusing: str, definition: Definition, what: str, allowed: str) -> None:
    refuse(ask(D + granting, definition))
    error = refusal(ask(D + refusing, definition))
    section = "[defaults]" if refusing else "the built-in limits"
    assert error.sentence() == f"web1: {what} is not allowed ({granting.split()[0]} in {section})"
    assert error.advice() == f"allowed: {allowed}"


def test_ports_are_forwarded_on_networks_of_kind_user_only() -> None:
    definition = replace(WEB1, nics=(Nic("dead", forward=(Forward("tcp", 2222, 22),)),))
    error = refusal(ask(f"{D}{FORWARDING}[networks.dead]\nkind = 'none'", definition))
    assert error.sentence().startswith("web1: net0.forward on network dead (kind none) is not allowed (networks in")
    assert error.advice() == "allowed: on a network of kind user; `publish` opens ports on the others"


def test_a_network_for_others_is_refused_with_those_one_has() -> None:
    lan = "[networks.lan]\nkind = 'shared'\nmembers = ['bob', '@staff']"
    definition = replace(WEB1, nics=(Nic("lan"),))
    error = refusal(ask(lan, definition))
    assert error.sentence() == "web1: net0.network = lan is not allowed (networks in the members of [networks.lan])"
    assert error.advice() == "allowed: users"
    rules = policy.parse(lan, "/etc/vmshell/policy.toml")
    assert rules.has_groups
    found = {user: rules.networks_for(user, groups) for user, groups in (("alice", ()), ("bob", ()), ("carol", ("staff",)))}
    assert found == {"alice": ("users",), "bob": ("users", "lan"), "carol": ("users", "lan")}


def test_a_service_is_for_its_providers_too() -> None:
    text = "[networks.db]\nkind = 'service'\nproviders = ['dba', '@ops']\n"
    rules = policy.parse(text + "members = ['bob']\n", "/etc/vmshell/policy.toml")
    assert rules.has_groups, "or nobody's groups would be looked up"
    people = {"bob": (), "dba": (), "carol": ("ops",), "alice": ("users",)}
    assert [user for user, groups in people.items() if "db" in rules.networks_for(user, groups)] == ["bob", "dba", "carol"]
    everybody = policy.parse(text, "/etc/vmshell/policy.toml")
    assert all("db" in everybody.networks_for(user, groups) for user, groups in people.items())


def test_a_member_still_needs_the_limit_networks() -> None:
    text = "[networks.lan]\nkind = 'shared'\nmembers = ['alice', 'bob']\n[user.bob]\nnetworks = ['users']\n"
    rules = policy.parse(text, "/etc/vmshell/policy.toml")
    assert rules.effective("alice", ()).choices()["networks"] == ["users", "lan"]
    assert rules.effective("bob", ()).choices()["networks"] == ["users"]
    assert rules.effective("carol", ()).choices()["networks"] == ["users"]
    assert rules.effective("carol", ()).choices()["machines"] == ["q35", "pc"]


# --- fixed keys -------------------------------------------------------------------------------------------------------

FIXED = D + "fixed = { 'memory.size' = '196M', 'cpu.count' = 1, 'machine.type' = 'pc', 'console.serial' = true }"


def test_a_fixed_key_has_its_value_and_no_other() -> None:
    fitting = replace(WEB1, memory=196, machine="pc-i440fx-7.2")
    refuse(ask(FIXED, fitting))
    for keys, what, allowed in (
        ({"memory": 197}, "memory.size = 197M", "memory.size = 196M"),
        ({"cpus": 2}, "cpu.count = 2", "cpu.count = 1"),
        ({"machine": "q35"}, "machine.type = q35", "machine.type = pc"),
        ({"serial": False}, "console.serial = false", "console.serial = true"),
    ):
        error = refusal(ask(FIXED, replace(fitting, **keys)))
        assert error.sentence() == f"web1: {what} is not allowed (fixed in [defaults])"
        assert error.advice() == f"allowed: {allowed}"


def test_a_fixed_version_of_a_machine_is_that_version() -> None:
    text = D + "fixed = { 'machine.type' = 'pc-q35-7.2' }"
    refuse(ask(text, replace(WEB1, machine="pc-q35-7.2")))
    assert refusal(ask(text, WEB1)).advice() == "allowed: machine.type = pc-q35-7.2"


def test_fixed_keys_are_put_in() -> None:
    limits = effective(FIXED).limits
    assert apply_fixed(WEB1, limits) == replace(WEB1, memory=196, machine="pc")
    pinned = replace(WEB1, machine="pc-i440fx-7.2", memory=196)
    assert apply_fixed(pinned, limits) == pinned
    said = replace(WEB1, memory=1024, disks=disks(1), nics=(Nic(),), description="mine")
    assert apply_fixed(said, limits) == replace(said, memory=196, machine="pc")
    assert apply_fixed(said, limits, only_unsaid=True) == replace(said, machine="pc")
    assert refusal(ask(FIXED, apply_fixed(said, limits, only_unsaid=True))).sentence().startswith("web1: memory.size = 1G is not")
    assert apply_fixed(said, Limits()) is said
    with pytest.raises(BadValue, match="disk0.bus"):
        apply_fixed(replace(WEB1, disks=(Disk("d", bus="sata"),)), limits)


@given(st.integers(16, 4096), st.integers(1, 4), st.sampled_from(["q35", "pc", "pc-q35-7.2", "pc-i440fx-9.1"]), st.booleans())
def test_what_was_fixed_is_never_refused_for_it(memory: int, cpus: int, machine: str, serial: bool) -> None:
    made = apply_fixed(Definition("web1", memory=memory, cpus=cpus, machine=machine, serial=serial), effective(FIXED).limits)
    assert all(verdict.ok for verdict in ask(FIXED, made))


# --- the whole --------------------------------------------------------------------------------------------------------


def test_the_answers_have_one_order_and_name_only_rules_that_exist() -> None:
    full = replace(
        PC, agent=True, autostart=True, kernel="k", initrd="i", option_roms=("r",), restore="tag", display="vnc", image="demo",
        nics=(Nic(mac="06:00:00:00:00:01", forward=(Forward("tcp", 2222, 22),)),),
        disks=(Disk("d", bus="ide", geometry=Geometry(1, 1, 1), snapshot=True), Disk("u", bus="usb"), Disk("s", bus="scsi"),
               Disk(type="cdrom"), Disk("f", type="floppy")),
    )  # fmt: skip
    strict = ask(f"{FIXED}\ndeny = {list(FEATURES)}\nimages = []", full)
    assert [verdict.rule for verdict in strict] == [verdict.rule for verdict in ask(FIXED + "\ndeny = []", full)]
    assert {verdict.rule for verdict in strict} - {"half of memory.size"} <= set(LIMIT_KEYS)
    # Every key of the policy is asked about but for those that are not about a definition.
    rates = {f"{what}_per_minute" for what in ("changes", "boots", "consoles", "connections")}
    others = {"cpu_weight", "wrapper_options", "net_rate", "published_max", *rates}
    assert set(LIMIT_KEYS) - {verdict.rule for verdict in strict} == others
    for verdict in strict:
        assert verdict.nearest and verdict.asked and verdict.vm == "web1"
        assert verdict.error("x").sentence().isprintable() and verdict.error().sentence().startswith("web1")
    with pytest.raises(PolicyDenied, match="^alice/web1: image demo"):
        refuse([verdict for verdict in strict if verdict.rule == "images"], "alice/web1")


def test_the_session_lets_a_plain_desktop_of_a_vm_through() -> None:
    own = policy.built_in(session=True).effective("me", ())
    desktop = replace(
        WEB1, memory=32768, cpus=16, display="vnc", agent=True, firmware="uefi", disks=(Disk("d"), Disk("u", bus="usb")),
        nics=(Nic(forward=(Forward("tcp", 2222, 22),)),),
    )  # fmt: skip
    refuse(decide("x", own, desktop, Usage(1, 1, 16, 32768, 1 << 20, 3, 1), Usage(20, 20, 99, 1 << 20, 1 << 20, 99, 20), {}))


SHARES = st.builds(
    Usage,
    vms=st.integers(0, 2),
    running=st.integers(0, 1),
    cpus=st.integers(0, 4),
    memory=st.integers(0, 5000),
    disk=st.integers(0, 90_000),
    snapshots=st.integers(0, 7),
    nics=st.integers(0, 4),
)


@given(
    st.lists(SHARES, max_size=30), st.sampled_from(["", D + "user_memory = '1G'\nvms_max = 2\nuser_nics = 3\nuser_disk = '1G'"])
)
def test_what_is_let_in_never_exceeds_a_sum(shares: list[Usage], text: str) -> None:
    """D17: whatever is asked in whatever order."""
    rules, used = effective(text), NOTHING
    limits = rules.limits
    for share in shares:
        try:
            refuse(decide("web1", rules, WEB1, share, used, {}))
        except OverLimit as exc:
            assert exc.sentence().isprintable()
            continue
        used = Usage.total([used, share])
    assert used.vms <= limits.vms_max
    assert used.running <= limits.running_max
    assert used.cpus <= limits.user_cpus
    assert used.memory <= limits.user_memory
    assert used.disk <= limits.user_disk
    assert used.snapshots <= limits.user_snapshots
    assert used.nics <= limits.user_nics


@given(SHARES, st.lists(SHARES, max_size=5))
def test_the_nearest_that_is_offered_is_let_in(share: Usage, others: list[Usage]) -> None:
    used = Usage.total(others)
    for verdict in ask("", WEB1, share, used):
        if verdict.ok or verdict.rule not in ("user_disk", "vms_max", "user_nics", "user_snapshots"):
            continue
        name = {"user_disk": "disk", "vms_max": "vms", "user_nics": "nics", "user_snapshots": "snapshots"}[verdict.rule]
        nearest = int(LIMIT_KEYS[verdict.rule].kind.check(_toml(verdict.nearest, verdict.rule), ""))  # type: ignore[call-overload]
        again = ask("", WEB1, replace(NOTHING, **{name: nearest}), used)
        assert next(each for each in again if each.rule == verdict.rule).ok


def _toml(text: str, rule: str) -> object:
    return text if rule == "user_disk" else int(text)


def test_cpus_and_memory_count_where_something_runs() -> None:
    off, on = Usage(1, 0, 2, 512, 10, 1, 1), Usage(1, 1, 1, 256, 10, 0, 1)
    assert Usage.total([off, on, on]) == Usage(3, 2, 2, 512, 30, 1, 3)
    assert Usage.total([]) == NOTHING
