"""The administrator's policy: what is read, what is refused and in which words, which section wins. Threat rows D14, D17, R23."""

from __future__ import annotations

import dataclasses
import getpass
import itertools
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.images import admin_command
from vmshell.errors import BadPolicy
from vmshell.layout import Layout
from vmshell.model import policy
from vmshell.model.catalogues import NETWORK_KINDS, OVMF
from vmshell.model.limits import HOST_KEYS, LIMIT_KEYS, PolicyKey, shown
from vmshell.model.policy import SESSION_LIMITS, Catalogues, Firmware, HostPolicy, Limits, Network, Policy
from vmshell.model.values import Int, Size

TREE = Path(__file__).parents[2]
SHIPPED = (TREE / "etc/policy.toml").read_text(encoding="utf-8")
STRICT = (TREE / "etc/examples/strict-2007.toml").read_text(encoding="utf-8")


def parse(text: str) -> Policy:
    return policy.parse(text, "/etc/vmshell/policy.toml")


def refusal(text: str) -> str:
    """Why *text* is no policy: one sentence, fit for a terminal."""
    with pytest.raises(BadPolicy) as caught:
        parse(text)
    sentence = caught.value.sentence()
    assert sentence.startswith("/etc/vmshell/policy.toml is not a valid policy: ")
    assert sentence.isprintable() and len(sentence) < 500
    return sentence


def without_comments(text: str) -> str:
    """The shipped file with every comment taken off that hides a key; the examples at its end stay what they are."""
    return re.sub(r"^# ([a-z_0-9]+ = )", r"\1", text, flags=re.MULTILINE)


# --- the table of keys ------------------------------------------------------------------------------------------------


def test_every_limit_has_a_row_and_a_built_in_value_that_its_row_takes() -> None:
    assert list(LIMIT_KEYS) == [item.name for item in dataclasses.fields(Limits)]
    assert list(HOST_KEYS) == [item.name for item in dataclasses.fields(HostPolicy)]
    for model, keys in ((Limits(), LIMIT_KEYS), (SESSION_LIMITS, LIMIT_KEYS), (HostPolicy(), HOST_KEYS)):
        for name, key in keys.items():
            value = getattr(model, name)
            assert key.kind.check(key.kind.raw(value), name) == value, name
            assert shown(key, value).isprintable() and shown(key, value)


def test_the_shipped_file_shows_every_key_with_its_built_in_value() -> None:
    assert parse(SHIPPED) == Policy()
    opened = without_comments(SHIPPED)
    assert parse(opened) == Policy()
    document = tomllib.loads(opened)
    assert set(document["defaults"]) == set(LIMIT_KEYS)
    assert set(document["host"]) == set(HOST_KEYS)
    assert set(document) == set(policy.SECTIONS) - {"group", "user"}
    assert parse(opened).said == set(LIMIT_KEYS)


def test_the_examples_in_the_shipped_file_are_a_policy() -> None:
    examples = re.sub(r"^#     ", "", SHIPPED, flags=re.MULTILINE)
    made = parse(examples)
    assert set(made.users) == {"alice", "bob.b"} and set(made.groups) == {"staff"}


def test_the_manual_page_names_every_key_and_its_examples_are_a_policy() -> None:
    page = (TREE / "etc/man/vmshell-policy.5").read_text(encoding="utf-8")
    for name in (*LIMIT_KEYS, *HOST_KEYS, "code", "vars", "kind", "directories"):
        assert re.search(rf"[ \[]{name}\b", page), name
    for section in policy.SECTIONS.values():
        assert section in page
    example = page.split(".Bd -literal -offset indent\n")[1].split(".Ed")[0]
    made = parse(example)
    assert made.effective("alice", ["students"]).limits.fixed == {}
    assert made.effective("bob", ["students"]).limits.fixed == {"memory.size": "196M", "cpu.count": 1}


def test_the_strict_example_is_the_page_of_2007() -> None:
    """Its 17 options, and nothing that the page's wrapper did not give."""
    limits = parse(STRICT).effective("anybody", ()).limits
    options = "-fda -fdb -hda -hdb -cdrom -boot -snapshot -no-acpi -no-reboot -localtime -loadvm -vnc -option-rom"
    assert set(limits.wrapper_options or ()) == {*options.split(), "-kernel", "-append", "-initrd", "-hdachs"}
    assert len(limits.wrapper_options or ()) == 17
    assert {"memory.size", "cpu.count", "machine.type"} <= set(limits.fixed)
    assert set(limits.deny) == {"forward", "agent", "usb-storage", "scsi", "uefi"}
    assert (limits.mac_prefix, limits.forward_ports, limits.nics_max) == ("", "", 1)


# --- good and bad values ----------------------------------------------------------------------------------------------

ALWAYS_BAD = [
    "nan",
    "inf",
    "-inf",
    "1.5",
    "1e3",
    "2026-11-22",
    "12:30:00",
    "2026-11-22T12:30:00Z",
    "[[]]",
    "{ a = 1 }",
    "[1, [2]]",
]
BAD_NUMBERS = [*ALWAYS_BAD, "-1", "true", '""', '"7"', '"٣"', "99999999999999999999999", "[]", "0x1_0000_0000_0000"]
BAD_SIZES = [
    *ALWAYS_BAD,
    "5",
    "true",
    '""',
    '"-1M"',
    '"1.5G"',
    '"٣G"',
    '"1 G"',
    '"G"',
    '"1E"',
    '"9999999999T"',
    '"1\\u0000M"',
    "[]",
]
BAD_BOOLS = [*ALWAYS_BAD, "0", "1", '"true"', '"yes"', "[]"]
BAD_NAMES = [*ALWAYS_BAD, "true", '"q35"', '["../x"]', '["a b"]', '["\\u001b[2J"]', '[""]', "[true]", '["users", "users"]']
BAD_VALUES = {
    "allow_autostart": BAD_BOOLS,
    "mac_prefix": [
        *ALWAYS_BAD, "6", "true", '"0"', '"06:"', '"060"', '"zz"', '"01"', '"06:00:00:00:00:00"', '"٣٣"', '"06-00"',
    ],
    "forward_ports": [
        *ALWAYS_BAD, "80", "true", '"80"', '"0-1"', '"2-1"', '"1-65536"', '"a-b"', '"-5"', '"1-2-3"', '"1 - 2"', '"٣-٤"',
    ],
    "deny": [*ALWAYS_BAD, "true", '"vnc"', '["everything"]', '["*"]', '["VNC"]', '["vnc", "vnc"]', "[1]"],
    "fixed": [
        *ALWAYS_BAD, "true", '"memory"', "[]", '{ name = "x" }', '{ "memory.siez" = "1G" }', '{ "memory.size" = 512 }',
        '{ "memory.size" = "1.5G" }', '{ "cpu.count" = true }', '{ "cpu.count" = 0 }', '{ "disk.bus" = "ide" }',
        '{ memory = "1G" }', '{ memory = { size = "no" } }', '{ "display.type" = "spice" }', '{ "boot.cmdline" = "a\\nb" }',
        '{ "machine.type" = "isapc" }',
    ],
    "wrapper_options": [
        *ALWAYS_BAD, "true", '"-hda"', '["-hda x"]', '["-"]', '["--hda"]', '["-HDA"]', '["-a\\u0007"]', '["-hda", "-hda"]',
    ],
    "accel": [*ALWAYS_BAD, "true", '""', '"hvf"', '"KVM"', "[]"],
    "group": [*ALWAYS_BAD, "true", "5", '""', '"a/b"', '"a:b"', '"a\\nb"', f'"{"x" * 65}"'],
    "ipv4_pool": [
        *ALWAYS_BAD, "true", '""', '"10.77.0.0"', '"10.77.0.1/16"', '"10.0.0.0/7"', '"10.0.0.0/29"', '"0.0.0.0/8"',
        '"127.0.0.0/8"', '"169.254.0.0/16"', '"169.254.9.0/24"', '"224.0.0.0/8"', '"240.0.0.0/8"',
        '"fd00::/48"', '"١٠.0.0.0/8"', '"10.77.0.0/16; drop"',
    ],
    "ipv6_pool": [
        *ALWAYS_BAD, '"fd00::"', '"fd00::/64"', '"fd00::/31"', '"fe80::/48"', '"ff00::/48"', '"10.77.0.0/16"', '"fd00::1/48"',
        '"::/48"', '"fec0::/48"', '"fd00::%eth0/48"', '"fd00::/57"',
    ],
    "dns_domain": [
        *ALWAYS_BAD, "true", '""', '"."', '".vm"', '"a..b"', '"VM"', '"-vm"', '"vm-"', '"v m"', '"vm\\n"', '"vm/x"', "[]",
    ],
    "dns_servers": [
        *ALWAYS_BAD, "true", '"192.0.2.1"', '["dns"]', '["192.0.2"]', '["192.0.2.1#53"]', '["::1", "::1"]', "[1]",
        '["0.0.0.0"]', '["::"]', '["224.0.0.251"]', '["fe80::1%eth0"]', '["fe80::1%x\\nlog-queries"]',
    ],
    "ssh_forwarding": BAD_BOOLS,
}  # fmt: skip
GOOD_VALUES: dict[str, list[tuple[str, object]]] = {
    "allow_autostart": [("true", True), ("false", False)],
    "mac_prefix": [
        ('""', ""), ('"06"', "06"), ('"52:54:00"', "52:54:00"), ('"0A:bC"', "0a:bc"), ('"06:01:02:03:04"', "06:01:02:03:04"),
    ],
    "forward_ports": [('""', ""), ('"1-65535"', "1-65535"), ('"8080-8080"', "8080-8080"), ('"00080-99"', "80-99")],
    "deny": [("[]", ()), ('["uefi", "vnc"]', ("vnc", "uefi"))],
    "fixed": [
        ("{}", {}),
        ('{ "memory.size" = "196M", "cpu.count" = 1 }', {"memory.size": "196M", "cpu.count": 1}),
        ('{ memory.size = "196M", console.serial = true }', {"memory.size": "196M", "console.serial": True}),
        ('{ autostart = false, "boot.order" = ["disk0"] }', {"autostart": False, "boot.order": ["disk0"]}),
    ],
    "wrapper_options": [('["*"]', None), ("[]", ()), ('["-hda", "cdrom", "-no-acpi"]', ("-hda", "-cdrom", "-no-acpi"))],
    "accel": [('"kvm"', "kvm"), ('"tcg"', "tcg"), ('"auto"', "auto")],
    "group": [('"vmusers"', "vmusers"), ('"domain users"', "domain users"), ('"DOM\\\\vm"', "DOM\\vm")],
    "ipv4_pool": [('"10.0.0.0/8"', "10.0.0.0/8"), ('"192.168.0.0/23"', "192.168.0.0/23"), ('"172.16.0.0/12"', "172.16.0.0/12"),
                  ('"100.64.0.0/10"', "100.64.0.0/10"), ('"198.18.0.0/23"', "198.18.0.0/23")],
    "ipv6_pool": [('""', ""), ('"fd12:3456:789A::/48"', "fd12:3456:789a::/48"), ('"2001:db8::/32"', "2001:db8::/32")],
    "dns_domain": [('"vm"', "vm"), ('"vm.example.org"', "vm.example.org")],
    "dns_servers": [("[]", ()), ('["192.0.2.53", "2001:DB8::53"]', ("192.0.2.53", "2001:db8::53"))],
    "ssh_forwarding": [("true", True), ("false", False)],
    "images": [('["demo"]', ("demo",)), ("[]", ()), ('["demo", "*"]', ("*",))],
}  # fmt: skip


def bad_values(key: PolicyKey) -> list[str]:
    if isinstance(key.kind, Int):
        return [*BAD_NUMBERS, str(key.kind.low - 1), str(key.kind.high + 1)]
    if isinstance(key.kind, Size):
        step = key.kind.unit
        return [
            *BAD_SIZES,
            f'"{(key.kind.high + 1) * step}"',
            '"1000001"',
            *([f'"{(key.kind.low - 1) * step}"'] if key.kind.low else []),
        ]
    return BAD_VALUES.get(key.name, BAD_NAMES)


def good_values(key: PolicyKey) -> list[tuple[str, object]]:
    if key.name == "segment_prefix":  # longer than the pool's
        return [("17", 17), ("30", 30)]
    if isinstance(key.kind, Int):
        return [(str(value), value) for value in (key.kind.low, key.kind.high)]
    if isinstance(key.kind, Size):
        return [(f'"{value * key.kind.unit}"', value) for value in (key.kind.low, key.kind.high)]
    if key.name in policy.ALLOW_LISTS:
        last = Catalogues().names(key.name)[-1]
        return [('["*"]', ("*",)), ("[]", ()), (f'["{last}"]', (last,))]
    return GOOD_VALUES[key.name]


SECTIONED = [("[defaults]", key) for key in LIMIT_KEYS.values()] + [("[host]", key) for key in HOST_KEYS.values()]


@pytest.mark.parametrize(("section", "key"), SECTIONED, ids=lambda value: getattr(value, "name", value))
def test_each_key_takes_what_it_says_and_refuses_the_rest_by_name(section: str, key: PolicyKey) -> None:
    """D14: no bool for a number, no NaN, nothing negative, no date, no digit of another script."""
    for text, value in good_values(key):
        made = parse(f"{section}\n{key.name} = {text}\n")
        assert getattr(made.host if section == "[host]" else made.defaults, key.name) == value
    for text in bad_values(key):
        said = refusal(f"{section}\n{key.name} = {text}\n")
        assert f"{section} {key.name}" in said, (text, said)


@pytest.mark.parametrize("name", LIMIT_KEYS)
def test_groups_and_users_have_the_same_keys(name: str) -> None:
    text, value = good_values(LIMIT_KEYS[name])[0]
    for section in ("[group.staff]", "[user.alice]"):
        made = parse(f"{section}\n{name} = {text}\n").effective("alice", ["staff"])
        assert (getattr(made.limits, name), made.source[name]) == (value, section)
        assert f"{section} {name}" in refusal(f"{section}\n{name} = {bad_values(LIMIT_KEYS[name])[0]}\n")


@given(st.text(max_size=60))
def test_whatever_stands_there_it_is_a_policy_or_a_sentence(text: str) -> None:
    for whole in (text, f"[defaults]\nvms_max = {text}", f'[user."{text}"]\nvms_max = 1', f"[cpu_models]\nx = '{text}'"):
        try:
            parse(whole)
        except BadPolicy as exc:
            assert exc.sentence().isprintable()


@given(st.integers(0, len(SHIPPED)))
def test_half_a_file_is_a_policy_or_names_a_line_or_key(length: int) -> None:
    try:
        parse(without_comments(SHIPPED)[:length])
    except BadPolicy as exc:
        assert re.search(r"line \d+|\[[a-z_.]+\] |section \[|key ", exc.sentence())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[defaults]\nvms_max = ", "at line 2"),
        ("[defaults]\nvms_max = \n\n", "at line 2"),
        ("[defaults]\nvms_max = 1\nvms_max = 2\n", "at line 3"),
        ("[defaults]\n\n[defaults]\n", "at line 3"),
        ("x = [[[[", "at line 1"),
        ("x = " + "[" * 100_000, "nested too deeply"),
        ("[defaults]\nvms_max = " + "9" * 5000, "thousands of digits"),
        ("[defaults]\nvms = 1", "[defaults] has no key vms; did you mean vms_max"),
        ("[defaults]\nmemroy_max = 1", "did you mean memory_max?"),
        ("[defaults]\nmemory = 1", "did you mean memory_min or memory_max or user_memory?"),
        ("[defaults]\nwhatever = 1", "[defaults] has no key whatever; vmshell-policy(5) lists its keys"),
        ("[defaults]\naccel = 'kvm'", "[defaults] has no key accel; it belongs into [host]"),
        ("[host]\nvms_max = 1", "[host] has no key vms_max; it belongs into [defaults]"),
        ("[host]\nxyz = 1", "vmshell-policy(5) lists its keys"),
        ("[default]\nvms_max = 1", "no section [default]; did you mean [defaults]?"),
        ("[xyz]\nvms_max = 1", "no section [xyz]; the sections are [host] [defaults] [group.NAME]"),
        ("vms_max = 1", "no key vms_max outside of the sections"),
        ("defaults = 1", "defaults is 1: a section [defaults]"),
        ("user = 1", "user is 1: a section [user.NAME]"),
        ("[user]\nalice = 1", "[user] alice is 1: a section [user.NAME]"),
        ("[user]\nvms_max = 1", "[user] vms_max is 1: a section [user.NAME]"),
        ("[user.a.b]\nvms_max = 1", '[user.a.b] is [user."a.b"]'),
        ('[user.""]\nvms_max = 1', "[user.NAME]"),
        ('[group."a/b"]\nvms_max = 1', "[group.NAME]"),
        ("[user.alice]\nvmsmax = 1", "[user.alice] has no key vmsmax; did you mean vms_max?"),
        ('[user."b c"]\nvms_max = -1', '[user."b c"] vms_max is -1: a whole number from 0 to 1000000; nearest is 0'),
        ("[defaults]\nmemory_max = '1M'", "[defaults] memory_max is 1M: whole MiB from 16M to 16T, written like 512M or 2G;"),
        ('[defaults]\ndeny = ["vncc"]', "[defaults] deny is vncc: one of floppy, cdrom"),
        ('[user.alice]\nfixed = { "memroy.size" = "1G" }', "[user.alice] fixed memroy.size"),
        ('[user.alice]\nfixed = { "memroy.size" = "1G" }', "did you mean memory.size?"),
        ('[user.alice]\nnetworks = ["user"]', "[user.alice] networks: the catalogue has no user; nearest is users"),
        ('[group.staff]\nmachines = ["isapc"]', "[group.staff] machines: the catalogue has no isapc; there are q35, pc"),
        ('[catalogue]\nmachines = ["pc"]\n[defaults]\nmachines = ["q35"]', "machines: the catalogue has no q35; there are pc"),
    ],
)  # fmt: skip
def test_a_wrong_policy_says_where_and_what_would_be_right(text: str, words: str) -> None:
    assert words in refusal(text)


def test_every_problem_is_found_in_one_go() -> None:
    text = "[host]\naccel = 5\n[defaults]\nvms_max = -1\nmemory_max = '2G'\n[user.alice]\nx = 1\n[networks.lan]\n"
    made, problems = policy.examine(text)
    assert [problem.split()[0] for problem in problems] == ["[host]", "[defaults]", "[user.alice]", "[networks.lan]"]
    assert made.defaults.memory_max == 2048
    assert refusal(text).endswith("(and 3 more: `vmshell-admin policy check` lists them)")


# --- catalogues -------------------------------------------------------------------------------------------------------


def test_catalogues_are_added_to_what_is_built_in() -> None:
    found = parse(
        '[cpu_models]\nepyc = "EPYC,svm=off,+aes"\nqemu64 = "qemu64"\n'
        '[firmware.signed]\ncode = "/srv/fw/code.fd"\nvars = "/srv/fw/vars.fd"\n[firmware.uefi]\nvars = "/srv/fw/own.fd"\n'
        '[networks.nowhere]\nkind = "none"\n[library]\ndirectories = ["/srv/iso", "/srv/more iso"]\n'
        '[catalogue]\nmachines = ["q35"]\nvideo_models = []\n'
    )
    assert found.catalogues == Catalogues(
        machines=("q35",),
        cpu_models={"host": "", "qemu64": "qemu64", "epyc": "EPYC,svm=off,+aes"},
        firmware={
            "bios": Firmware(),
            "uefi": Firmware(OVMF.code, "/srv/fw/own.fd"),
            "signed": Firmware("/srv/fw/code.fd", "/srv/fw/vars.fd"),
        },
        networks={"users": Network(), "nowhere": Network("none")},
        video_models=(),
        library=("/srv/iso", "/srv/more iso"),
    )
    assert found.library == ("/srv/iso", "/srv/more iso")
    assert found.names_for(Limits(networks=("users",), machines=()))["networks"] == ["users"]
    assert found.names_for(Limits(networks=("users",), machines=()))["machines"] == []


VLAN_TWICE = "".join(f'[networks.{name}]\nkind = "bridged"\nparent = "eth0"\nvlan = 5\n' for name in "ab")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("catalogue = 1", "catalogue is 1: a section [catalogue]"),
        ('[catalogue]\nmachines = ["isapc"]', "[catalogue] machines is isapc: one of q35, pc"),
        ("[catalogue]\nmachines = true", "[catalogue] machines"),
        ("[catalogue]\nmachine = []", "[catalogue] has no key machine; did you mean machines?"),
        ("[cpu_models]\nx = 5", "[cpu_models] x"),
        ('[cpu_models]\nx = "host,vmx=on -daemonize"', "[cpu_models] x"),
        ('[cpu_models]\nx = "a\\nb"', "[cpu_models] x"),
        ('[cpu_models]\nx = "-cpu"', "[cpu_models] x"),
        ('[cpu_models]\nx = "ｈost"', "[cpu_models] x"),
        (f'[cpu_models]\nx = "{"a" * 257}"', "[cpu_models] x"),
        ('[cpu_models]\n"a b" = "host"', "[cpu_models] 'a b': a name is"),
        ('[cpu_models]\n"\\u001b[2J" = "host"', "[cpu_models]"),
        ("[firmware]\nuefi = 1", "[firmware] uefi is 1: a section [firmware.NAME]"),
        ('[firmware.bios]\ncode = "/x"', "[firmware.bios] is QEMU's own"),
        ('[firmware.x]\ncode = "/x"', "[firmware.x] vars is missing"),
        ('[firmware.x]\ncode = "x"\nvars = "/y"', "[firmware.x] code is x: an absolute path"),
        ('[firmware.x]\ncode = "/a/../b"\nvars = "/y"', "[firmware.x] code"),
        ('[firmware.x]\ncode = "/a//b"\nvars = "/y"', "[firmware.x] code"),
        ('[firmware.x]\ncode = "/a\\nb"\nvars = "/y"', "[firmware.x] code"),
        ('[firmware.uefi]\nvar = "/y"', "[firmware.uefi] has no key var; did you mean vars?"),
        ("[networks.lan]\n", "[networks.lan] kind is missing: one of private, shared, service, bridged, none, user"),
        ('[networks.lan]\nkind = "bridge"', "[networks.lan] kind is bridge: one of private, shared"),
        ("[networks.lan]\nkind = 2026-11-22", "[networks.lan] kind"),
        ('[networks.lan]\nkind = "user"\nbridge = "br0"', "[networks.lan] bridge means nothing to a network of kind user"),
        ('[networks.lan]\nkind = "shared"\nprovider = ["bob"]', "[networks.lan] has no key provider; did you mean providers?"),
        ('[networks.lan]\nkind = "bridged"', "[networks.lan] kind bridged needs either bridge, or parent and vlan"),
        ('[networks.lan]\nkind = "bridged"\nparent = "eth0"', "[networks.lan] kind bridged needs either"),
        ('[networks.lan]\nkind = "bridged"\nbridge = "sixteen-chars-xx"', "[networks.lan] bridge is sixteen-chars-xx: a network"),
        ('[networks.lan]\nkind = "bridged"\nbridge = "br%d"', "[networks.lan] bridge is br%d: a network interface's name"),
        ('[networks.lan]\nkind = "bridged"\nbridge = "br0"\nparent = "eth0"', "[networks.lan] kind bridged needs either"),
        ('[networks.lan]\nkind = "bridged"\nbridge = "br0"\nvlan = 5', "[networks.lan] kind bridged needs either"),
        ('[networks.lan]\nkind = "bridged"\nbridge = "br0"\nparent = "eth0"\nvlan = 5', "[networks.lan] kind bridged needs"),
        ('[networks.lan]\nkind = "bridged"\nbridge = "vtb000001"', "[networks.lan] bridge is vtb000001: an interface of the"),
        (VLAN_TWICE, "[networks.b] is the VLAN of [networks.a] again; it can have one name only"),
        ('[networks.lan]\nkind = "bridged"\nparent = "eth0"\nvlan = 0', "[networks.lan] vlan is 0"),
        ('[networks.lan]\nkind = "bridged"\nparent = "eth0"\nvlan = 4095', "[networks.lan] vlan is 4095"),
        ('[networks.lan]\nkind = "shared"\nmembers = ["a b:c"]', "[networks.lan] members"),
        ('[networks.lan]\nkind = "shared"\nmembers = ["@"]', "[networks.lan] members"),
        ('[networks.lan]\nkind = "private"\noutside = "world"', "[networks.lan] outside is world"),
        ("[host]\nsegment_prefix = 16", "[host] segment_prefix is 16: 17 to 30, longer than the pool's, which is /16"),
        ("[library]\ndirectories = '/srv'", "[library] directories"),
        ("[library]\ndirectories = ['srv']", "[library] directories is srv: an absolute path"),
        ("[library]\ndirectories = ['/srv/']", "[library] directories"),
        ("[library]\ndirectories = ['/']", "[library] directories"),
    ],
)  # fmt: skip
def test_a_wrong_catalogue_says_where(text: str, words: str) -> None:
    assert words in refusal(text)


USEFUL = {"bridge": '"br0"', "parent": '"eth0"', "vlan": "7", "outside": '"all"', "isolated": "true", "providers": '["bob"]'}


@pytest.mark.parametrize("kind", NETWORK_KINDS)
@pytest.mark.parametrize("key", USEFUL)
def test_a_key_that_a_kind_of_network_has_no_use_for_is_refused(kind: str, key: str) -> None:
    text = f'[networks.lan]\nkind = "{kind}"\n{key} = {USEFUL[key]}\n'
    if key in NETWORK_KINDS[kind]:
        # A network without it has another of the keys that a bridged one needs.
        text += {"parent": "vlan = 7\n", "vlan": 'parent = "eth0"\n'}.get(key, "")
        made = parse(text).catalogues.networks["lan"]
        assert made != Network(kind) and made.kind == kind
    else:
        assert f"[networks.lan] {key} means nothing to a network of kind {kind}" in refusal(text)


def test_the_vlans_of_two_interfaces_and_two_vlans_of_one_are_no_twins() -> None:
    rows = [("a", "eth0", 5), ("b", "eth0", 6), ("c", "eth1", 5)]
    text = "".join(f'[networks.{name}]\nkind = "bridged"\nparent = "{parent}"\nvlan = {vlan}\n' for name, parent, vlan in rows)
    found = parse(text + '[networks.d]\nkind = "bridged"\nbridge = "br0"\n[networks.e]\nkind = "bridged"\nbridge = "br0"\n')
    assert {(each.parent, each.vlan) for each in found.catalogues.networks.values()} == {("", 0), *((p, v) for _, p, v in rows)}


def test_what_is_built_in_is_ones_own_segment_or_ones_own_sockets() -> None:
    text = '[networks.users]\nmembers = ["@staff"]\n'
    for session, kind in ((False, "private"), (True, "user")):
        assert policy.built_in(session=session).catalogues.networks == {"users": Network(kind)}
        assert policy.parse(text, "p", session=session).catalogues.networks == {"users": Network(kind, members=("@staff",))}


# --- which section wins -----------------------------------------------------------------------------------------------

LAYERED = """
[defaults]
vms_max = 20
cpus_max = 3
[group.second]
vms_max = 30
cpus_max = 4
deny = ["vnc"]
[group.first]
vms_max = 40
running_max = 5
deny = []
[user.alice]
vms_max = 50
[user.bob]
"""


@pytest.mark.parametrize(
    ("user", "groups", "key", "value", "source"),
    [
        ("alice", (), "vms_max", 50, "[user.alice]"),
        ("alice", ("first", "second"), "vms_max", 50, "[user.alice]"),
        ("alice", ("first", "second"), "cpus_max", 4, "[group.second]"),
        ("alice", ("first",), "cpus_max", 3, "[defaults]"),
        ("alice", (), "running_max", 4, "built in"),
        ("alice", ("other",), "cpus_max", 3, "[defaults]"),
        ("bob", ("first", "second"), "vms_max", 30, "[group.second]"),
        ("bob", ("second", "first"), "vms_max", 30, "[group.second]"),
        ("bob", ("first",), "vms_max", 40, "[group.first]"),
        ("bob", ("second", "first"), "running_max", 5, "[group.first]"),
        ("bob", ("second", "first"), "deny", ("vnc",), "[group.second]"),
        ("bob", ("first",), "deny", (), "[group.first]"),
        ("bob", (), "deny", ("usb-storage",), "built in"),
        ("carol", (), "vms_max", 20, "[defaults]"),
        ("carol", ("second",), "memory_max", 2048, "built in"),
        ("first", (), "vms_max", 20, "[defaults]"),  # a user named like a group is not in it
    ],
)
def test_the_narrowest_section_wins_key_by_key(user: str, groups: tuple[str, ...], key: str, value: object, source: str) -> None:
    made = parse(LAYERED)
    for _ in range(2):  # the second answer is a remembered one
        effective = made.effective(user, groups)
        assert (getattr(effective.limits, key), effective.source[key]) == (value, source)
        assert effective.section(key) == ("the built-in limits" if source == "built in" else source)
        assert set(effective.source) == set(LIMIT_KEYS)


def test_what_is_remembered_does_not_grow_with_users() -> None:
    made = parse(LAYERED)
    answers = {id(made.effective(f"user{number}", ["staff", f"user{number}"])) for number in range(100)}
    assert len(answers) == 1
    assert made.effective("bob", ["first"]) is made.effective("bob", ["users", "first"])
    assert made.effective("alice", ()) is not made.effective("bob", ())
    assert made.has_groups and not parse("[user.x]\n").has_groups
    assert dataclasses.replace(made, host=HostPolicy(accel="tcg")).effective("alice", ()).limits.vms_max == 50


@given(st.permutations(["a", "b", "c"]), st.sets(st.sampled_from(["a", "b", "c", "d"])), st.booleans(), st.booleans())
def test_precedence_is_that_order_whatever_stands_in_the_file(order: list[str], groups: set[str], said: bool, own: bool) -> None:
    text = "[defaults]\nvms_max = 1\n" * said + "".join(f"[group.{name}]\nvms_max = {ord(name)}\n" for name in order)
    text += "[user.u]\nvms_max = 7\n" * own
    wanted = 7 if own else next((ord(name) for name in order if name in groups), 1 if said else 10)
    assert parse(text).effective("u", groups).limits.vms_max == wanted


def test_lists_and_tables_are_replaced_not_added_to() -> None:
    made = parse(
        '[defaults]\ndeny = ["vnc"]\n[defaults.fixed]\ncpu.count = 1\n[user.a]\ndeny = ["agent"]\nfixed.memory.size = "1G"'
    )
    limits = made.effective("a", ()).limits
    assert (limits.deny, limits.fixed) == (("agent",), {"memory.size": "1G"})


def test_names_to_choose_from_are_those_of_the_catalogue_that_are_allowed() -> None:
    made = parse(
        '[networks.lan]\nkind = "none"\n[user.a]\nnetworks = ["lan"]\n[user.b]\nnetworks = ["*"]\n[user.c]\nnetworks = []\n'
    )
    assert [made.effective(user, ()).names("networks") for user in "abcd"] == [("lan",), ("users", "lan"), (), ("users", "lan")]


def test_numbers_are_numbers() -> None:
    numbers = parse("").effective("a", ()).numbers()
    assert numbers["memory_max"] == 2048 and "allow_autostart" not in numbers and "deny" not in numbers
    assert all(type(value) is int for value in numbers.values())


def test_the_session_keeps_its_own_limits_below_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[defaults]\nvms_max = 3\n")
    assert policy.load(path, session=True).defaults == dataclasses.replace(SESSION_LIMITS, vms_max=3)
    assert policy.load(path, session=True).effective("x", ()).section("cpus_max") == "the built-in limits"


# --- the file ---------------------------------------------------------------------------------------------------------


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "policy.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o644)
    return str(path)


def loading(path: str) -> str:
    with pytest.raises(BadPolicy) as caught:
        policy.load(path, session=False)
    assert caught.value.sentence().startswith(f"{path} is not a valid policy: ")
    return caught.value.sentence().partition("policy: ")[2]


def test_without_a_file_the_built_in_limits_are_in_force(tmp_path: Path) -> None:
    assert policy.load(f"{tmp_path}/none", session=False) == Policy()
    assert policy.load(f"{tmp_path}/none", session=True) == policy.built_in(session=True)
    with pytest.raises(BadPolicy, match="there is no such file"):
        policy.load(f"{tmp_path}/none", session=False, required=True)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, '[host]\naccel = "tcg"\nlog_size_max = "2M"\r\n[defaults]\nmemory_max = "3G"\n')
    made = policy.load(path, session=False)
    assert (made.host.accel, made.host.log_size_max, made.defaults.memory_max) == ("tcg", 2 << 20, 3072)


@pytest.mark.parametrize("mode", [0o646, 0o664, 0o666, 0o622])
def test_a_file_that_others_can_write_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, "")
    os.chmod(path, mode)
    assert loading(path) == f"it must not be writable by others: `chmod go-w {path}`"
    os.chmod(path, mode & ~0o022)
    policy.load(path, session=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
def test_a_file_of_somebody_else_is_refused_with_the_cure(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    os.chown(path, 65534, 65534)
    assert loading(path) == f"it belongs to uid 65534 and must be root's: `chown root {path}`"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming somebody else needs root")
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "[defaults]\nvms_max = 1\n")
    os.chmod(path, 0)
    for folder in itertools.takewhile(lambda folder: folder != Path("/tmp"), tmp_path.parents):
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    pid = os.fork()
    if not pid:
        os.setresuid(65534, 65534, 65534)
        try:
            policy.load(path, session=False)
        except BadPolicy as exc:
            os._exit(0 if exc.sentence().endswith("valid policy: Permission denied") else 2)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    assert loading(write(tmp_path, b"[defaults]\n\nvms_max = 1 # \xff\n")) == "what stands at line 3 is not UTF-8 text"
    assert "at line 1" in loading(write(tmp_path, b"\0\0\0\0"))
    assert loading(write(tmp_path, b"#" * ((1 << 20) + 1))) == "it is larger than 1M"
    os.unlink(f"{tmp_path}/policy.toml")
    os.mkfifo(f"{tmp_path}/policy.toml")  # C04: and it does not hang
    assert loading(f"{tmp_path}/policy.toml") == "it is not a regular file"
    assert loading(str(tmp_path)) in ("it is not a regular file", "Is a directory")


# --- vmshell-admin policy ---------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(etc=f"{tmp_path}/etc", state=f"{tmp_path}/state", run=f"{tmp_path}/run", log=f"{tmp_path}/log", embedded=True)
    os.mkdir(made.etc)
    return made


def admin(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(admin_command(layout, *words), capture_output=True, text=True, timeout=120, check=False)


def test_check_says_that_a_file_is_fine_and_what_is_odd_about_it(layout: Layout, tmp_path: Path) -> None:
    me = getpass.getuser()
    path = write(
        tmp_path,
        f"[user.{me}]\nvms_max = 1\n[user.nobody-there]\n[group.none-such]\nuser_memory = '1G'\nmemory_max = '2G'\n"
        "[library]\ndirectories = ['/nowhere/iso']\n[firmware.x]\ncode = '/nowhere/c'\nvars = '/nowhere/v'\n",
    )
    os.chmod(path, 0o666)  # a draft may be anybody's
    done = admin(layout, "policy", "check", path)
    assert (done.returncode, done.stdout) == (0, f"{path}: fine: 2 users, 1 group\n")
    assert done.stderr.splitlines() == [
        f"{path}: warning: [user.nobody-there]: this host has no such account",
        f"{path}: warning: [group.none-such]: this host has no such group",
        f"{path}: warning: [firmware.x]: there is no file /nowhere/c",
        f"{path}: warning: [firmware.x]: there is no file /nowhere/v",
        f"{path}: warning: [library] directories: there is no directory /nowhere/iso",
        f"{path}: warning: [group.none-such]: memory_max is 2G, which user_memory = 1G never lets anybody reach",
        f"{path}: warning: [user.{me}]: running_max is 500, which vms_max = 1 never lets anybody reach",
    ]


def test_check_says_whom_and_what_of_networks_the_host_lacks(layout: Layout, tmp_path: Path) -> None:
    me = getpass.getuser()
    path = write(
        tmp_path,
        f"[networks.lan]\nkind = 'shared'\nmembers = ['{me}', 'nobody-there', '@none-such', '@root']\n"
        "[networks.db]\nkind = 'service'\nproviders = ['nobody-else']\n[networks.empty]\nkind = 'service'\n"
        "[networks.office]\nkind = 'bridged'\nbridge = 'br-none'\n[networks.loop]\nkind = 'bridged'\nparent = 'lo'\nvlan = 5\n",
    )
    done = admin(layout, "policy", "check", path)
    assert (done.returncode, done.stdout) == (0, f"{path}: fine: 0 users, 0 groups\n")
    assert done.stderr.splitlines() == [
        f"{path}: warning: [networks.lan]: this host has no account nobody-there",
        f"{path}: warning: [networks.lan]: this host has no group @none-such",
        f"{path}: warning: [networks.db]: this host has no account nobody-else",
        f"{path}: warning: [networks.empty]: without providers nobody can offer anything there",
        f"{path}: warning: [networks.office]: this host has no interface br-none",
    ]


def test_show_leaves_out_the_networks_of_others(layout: Layout) -> None:
    me = getpass.getuser()
    group = subprocess.run(["id", "-gn"], capture_output=True, text=True, check=True).stdout.strip()
    Path(layout.policy).write_text(
        f"[networks.mine]\nkind = 'none'\nmembers = ['{me}']\n[networks.ours]\nkind = 'none'\nmembers = ['@{group}']\n"
        "[networks.theirs]\nkind = 'none'\nmembers = ['somebody', '@none-such']\n"
    )
    rows = [re.split(r"  +", line) for line in admin(layout, "policy", "show", me).stdout.splitlines()]
    assert ["networks", "users, mine, ours", "built in"] in rows


def test_check_lists_every_problem(layout: Layout, tmp_path: Path) -> None:
    path = write(tmp_path, "[defaults]\nvms_max = -1\ncpus = 1\n[host]\naccel = 'x'\n")
    done = admin(layout, "policy", "check", path)
    assert (done.returncode, done.stdout) == (BadPolicy.exit_status, "")
    assert [line.partition("policy.toml: ")[2].split()[0] for line in done.stderr.splitlines()] == [
        "[host]",
        "[defaults]",
        "[defaults]",
    ]
    done = admin(layout, "policy", "check", f"{tmp_path}/none")
    assert done.returncode == BadPolicy.exit_status and "there is no such file" in done.stderr


def test_check_without_a_file_looks_at_the_one_in_force(layout: Layout) -> None:
    Path(layout.policy).write_text("[defaults]\nvms_max = 1\nrunning_max = 1\n")
    assert admin(layout, "policy", "check").stdout == f"{layout.policy}: fine: 0 users, 0 groups\n"
    os.chmod(layout.policy, 0o666)
    assert f"chmod go-w {layout.policy}" in admin(layout, "policy", "check").stderr


def test_show_says_every_key_its_value_and_where_it_comes_from(layout: Layout) -> None:
    me = getpass.getuser()
    group = subprocess.run(["id", "-gn"], capture_output=True, text=True, check=True).stdout.strip()
    Path(layout.policy).write_text(
        f'[defaults]\nmemory_max = "1536M"\nnetworks = []\n[group."{group}"]\ncpus_max = 9\n'
        f'[user."{me}"]\nallow_autostart = true\nfixed = {{ "memory.size" = "196M", "machine.acpi" = false }}\n'
    )
    done = admin(layout, "policy", "show", me)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row[0]: tuple(row[1:]) for row in (re.split(r"  +", line) for line in done.stdout.splitlines())}
    assert list(rows)[1:] == list(LIMIT_KEYS)
    assert rows["KEY"] == ("VALUE", "FROM")
    assert rows["memory_max"] == ("1536M", "[defaults]")
    assert rows["networks"] == ("none", "[defaults]")
    assert rows["cpus_max"] == ("9", policy.header("group", group))
    assert rows["allow_autostart"] == ("true", policy.header("user", me))
    assert rows["fixed"] == ("memory.size = 196M, machine.acpi = false", policy.header("user", me))
    assert rows["machines"] == ("q35, pc", "built in")
    assert rows["images"] == rows["wrapper_options"] == ("all", "built in")
    assert rows["disk_size_max"] == ("16T", "built in")


def test_show_of_nobody_and_of_a_broken_file(layout: Layout) -> None:
    done = admin(layout, "policy", "show", "no-such-account")
    assert done.returncode != 0 and "there is no account no-such-account on this host" in done.stderr
    Path(layout.policy).write_text("[defaults]\nvms_max = \n")
    done = admin(layout, "policy", "show", getpass.getuser())
    assert done.returncode == BadPolicy.exit_status and "at line 2" in done.stderr
