"""Definitions: what is written is read again, and every key says what it cannot be."""

from __future__ import annotations

import random

import pytest

from vmshell.errors import BadValue, VmshellError
from vmshell.model import definition as d
from vmshell.model.keys import DISK_KEYS, KEYS, NET_KEYS, Key
from vmshell.model.values import (
    Bool,
    Catalogued,
    Choice,
    Device,
    Int,
    Kind,
    ListOf,
    Mac,
    Machine,
    Name,
    Port,
    Ref,
    Size,
    Table,
    Tag,
    Text,
)
from vmshell.refusals import BadName, UnknownKey

BASE = '[[disk]]\npath = "root"\n[[net]]\nnetwork = "users"\n'
# What is wrong for every kind of value, as TOML. Where a kind takes one of them, it is listed below.
WRONG = {
    "float": "1.5",
    "nan": "nan",
    "infinite": "inf",
    "date": "2026-11-22",
    "time": "10:30:00",
    "table": "{ a = 1 }",
    "nested": "[[1]]",
    "numbers": "[1, 2]",
    "huge": "9223372036854775807",
    "negative": "-1",
    "zero": "0",
    "control": '"a\\u0007b"',
    "newline": '"a\\nb"',
    "bidi": '"a\\u202eb"',
    "fullwidth": '"\uff11\uff12"',
    "cyrillic": '"\u0430\u0441pi"',
    "long": '"' + "x" * 5000 + '"',
    "path": '"/etc/passwd"',
    "up": '"../../x"',
    "json": '"json:{}"',
    "comma": '"a,file=b"',
}
TAKES: dict[type[Kind], set[str]] = {
    Text: {"fullwidth", "cyrillic", "path", "up", "json", "comma"},
    Table: set(),
}
GOOD: dict[type[Kind], str] = {Bool: "true", Int: "2", Size: '"64M"', ListOf: "[]", Table: "{ cyls = 5, heads = 4, secs = 17 }"}


def keys() -> list[tuple[str, Key]]:
    found = [("", key) for key in KEYS.values()]
    found += [("disk", key) for key in DISK_KEYS.values()] + [("net", key) for key in NET_KEYS.values()]
    return found


def document(where: str, key: Key, value: str) -> str:
    if where:
        return (
            f'name = "a"\n[[{where}]]\n'
            + ("" if key.name == "path" or where == "net" else 'path = "root"\n')
            + f"{key.name} = {value}\n"
        )
    section, _, word = key.name.rpartition(".")
    return f'name = "a"\n[{section}]\n{word} = {value}\n' if section else f'name = "a"\n{word} = {value}\n'


@pytest.mark.parametrize(("where", "key"), keys(), ids=lambda value: getattr(value, "name", value) or "vm")
def test_every_key_refuses_what_it_cannot_be(where: str, key: Key) -> None:
    """One sentence that names the key, the value, and what is allowed."""
    for name, value in WRONG.items():
        if name in TAKES.get(type(key.kind), ()):
            d.parse(document(where, key, value)) if key.name != "boot.cmdline" else None
            continue
        with pytest.raises((BadValue, BadName)) as caught:
            d.parse(document(where, key, value))
        sentence = caught.value.sentence()
        assert "\n" not in sentence and sentence.isprintable() and len(sentence) < 700, (name, sentence)
        if isinstance(caught.value, BadValue):
            assert caught.value.fields["field"].startswith((f"{where}." if where else "") + key.name), (name, sentence)
            assert caught.value.fields["rule"]


@pytest.mark.parametrize(("where", "key"), keys(), ids=lambda value: getattr(value, "name", value) or "vm")
def test_no_key_stands_twice(where: str, key: Key) -> None:
    text = document(where, key, "true")
    line = text.rstrip().splitlines()[-1]
    with pytest.raises(BadValue, match="not TOML"):
        d.parse(f"{text}{line}\n")


@pytest.mark.parametrize(
    "words",
    [
        {"memory": "1.5G"}, {"memory": "nan"}, {"memory": "-1"}, {"memory": "\uff15\uff11\uff12M"}, {"memory": "513K"},
        {"memory": ""}, {"cpus": "0"}, {"cpus": "256"}, {"cpus": "1e3"}, {"cpus": "two"}, {"cpus": "99999999999999999999"},
        {"acpi": "maybe"},
        {"clock": "UTC"}, {"boot.order": "disk9"}, {"boot.order": "disk0,disk0"}, {"boot.order": "eth0"}, {"disk0.bus": "ide"},
        {"disk0.geometry": "1,2"}, {"disk0.geometry": "10,17,63"}, {"disk0": "a b"}, {"disk0": "/x"}, {"disk0": "image:demo"},
        {"net0.mac": "01:00:00:00:00:01"}, {"net0.mac": "zz"}, {"net0.forward": "tcp:22:22"}, {"net0.forward": "sctp:2000:1"},
        {"machine": "isapc"}, {"machine": "pc-q35-7.2,accel=tcg"}, {"keymap": "/etc/passwd"}, {"keymap": "xx"}, {"initrd": "x"},
        {"append": "x"}, {"restore": "1"}, {"restore": "a b"}, {"description": "a\x1bb"}, {"disk5": "x"}, {"cdrom1": "x"},
        {"name": "other"}, {"disk0.size": "1"}, {"option_rom": "library:x"}, {"disk0.path": ""}, {"floppy0.format": "qcow2"},
    ],
    ids=str,
)  # fmt: skip
def test_words_that_set_refuses(words: dict[str, str]) -> None:
    before = d.parse('name = "a"\n' + BASE)
    with pytest.raises(VmshellError) as caught:
        d.change(before, words, [])
    assert caught.value.sentence().isprintable()
    assert caught.value.exit_status == 2


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    for text, near in (
        ("[machine]\nacpy = true", "machine.acpi"),
        ("[memory]\nsiez = 1", "memory.size"),
        ("[[net]]\nmodle = 1", "net.model"),
    ):
        with pytest.raises(UnknownKey) as caught:
            d.parse(f'name = "a"\n{text}')
        assert caught.value.advice() == f"did you mean {near}?"
    with pytest.raises(UnknownKey) as caught:
        d.change(d.parse('name = "a"'), {"memroy": "1G"}, [])
    assert "memory" in caught.value.advice()


# --- there and back ---------------------------------------------------------------------------------------------------

NAMES = ("root", "data.img", "shelf:x", "library:debian-12.iso")


def some(kind: Kind, rng: random.Random) -> object:
    """A value that *kind* takes, as TOML gives it."""
    if isinstance(kind, Choice):
        return rng.choice(kind.allowed)
    if isinstance(kind, Int):
        return rng.randint(kind.low, kind.high)
    if isinstance(kind, Size):
        return f"{rng.randint(16, 4096)}M"
    if isinstance(kind, ListOf):
        return [] if isinstance(kind.kind, Device) else [some(kind.kind, rng)]
    if isinstance(kind, Table):
        return {name: some(inner, rng) for name, inner in kind.fields.items()}
    plain: dict[type[Kind], object] = {
        Bool: rng.random() < 0.5,
        Text: "".join(rng.choices("ab \"\\=,\u00fc\u732b\U0001f600'#", k=12)),
        Name: "demo",
        Catalogued: "users",
        Machine: rng.choice(["q35", "pc", "pc-q35-7.2", "pc-i440fx-10.0"]),
        Ref: "image:demo" if getattr(kind, "origins", ()) == ("image",) else "root",
        Mac: "06:00:00:00:00:2a",
        Tag: "before-upgrade",
        Port: "tcp:20022:22",
    }
    return plain[type(kind)]


def random_definition(rng: random.Random) -> d.Definition:
    """Valid keys at random; what only the whole forbids is tried again."""
    while True:
        table: dict[str, object] = {}
        for key in KEYS.values():
            if rng.random() < 0.3:
                section, _, word = key.name.rpartition(".")
                place = table.setdefault(section, {}) if section else table
                place[word] = some(key.kind, rng)  # type: ignore[index]
        disks = []
        for path in rng.sample(NAMES, rng.randint(0, 3)):
            disks.append(
                {"path": path}
                | {key.name: some(key.kind, rng) for key in DISK_KEYS.values() if key.name != "path" and rng.random() < 0.2}
            )
        if disks:
            table["disk"] = disks
        nets = [
            {"network": "users"} | {key.name: some(key.kind, rng) for key in NET_KEYS.values() if rng.random() < 0.3}
            for _ in range(rng.randint(0, 2))
        ]
        if nets:
            table["net"] = nets
        try:
            return d.from_table(table, "vm")
        except VmshellError:
            continue


def test_what_is_written_is_read_again() -> None:
    rng = random.Random(20261124)
    for _ in range(300):
        made = random_definition(rng)
        text = d.to_toml(made)
        assert d.parse(text) == made
        assert d.read_stored(text, "vm") == (made, "")
        assert d.differences(made, made) == []
        other = random_definition(rng)
        for key in d.differences(made, other):
            if "." in key and not key.startswith(("disk", "cdrom", "floppy", "net", "boot", "display.", "machine.type")):
                changed = d.with_key_of(made, other, key)
                assert key not in d.differences(changed, other)


@pytest.mark.parametrize(("key", "nic"), [("link", d.Nic(link="down")), ("forward", d.Nic(forward=(d.Forward("tcp", 80, 80),)))])
def test_a_card_differs_in_what_was_set_alone(key: str, nic: d.Nic) -> None:
    """A card that is nothing but defaults is written with its network, for people to see; that is no key that was set."""
    plain = d.Definition("a", nics=(d.Nic(),))
    assert "[[net]]\nnetwork = " in d.to_toml(plain)
    assert d.differences(plain, d.Definition("a", nics=(nic,))) == [f"net0.{key}"]
    assert d.differences(plain, d.Definition("a")) == ["net0"]


def test_set_and_unset_undo_each_other() -> None:
    made = d.parse('name = "a"\n' + BASE)
    for key, word in (
        ("machine.acpi", "no"),
        ("cdrom0", "shelf:x.iso"),
        ("net0.link", "down"),
        ("boot.order", "disk0"),
        ("disk1", "more"),
    ):
        changed = d.change(made, {key: word}, [])
        assert changed != made
        assert d.change(changed, {}, [key]) == made


@pytest.mark.parametrize("extra", ["version = 2\n", "[future]\nkey = 1\n", "[cpu]\nsockets = 2\n"])
def test_what_a_newer_version_wrote_is_kept_and_not_booted(extra: str) -> None:
    text = 'name = "a"\n[memory]\nsize = "64M"\n'
    text = extra + text if extra.startswith("version") else text + extra
    found, problem = d.read_stored(text, "a")
    assert found.memory == 64 and "newer version" in problem
    with pytest.raises(VmshellError):
        d.parse(text)


def test_the_rules_between_keys() -> None:
    for text, part in (
        ('[[disk]]\npath = "a"\n[[disk]]\npath = "a"\n', "another disk of this VM"),
        ('[[disk]]\ntype = "floppy"\n', "only a CD drive may be empty"),
        ('[[disk]]\npath = "library:x"\nformat = "raw"\n', "the library is read-only"),
        ('[[disk]]\npath = "a"\nbus = "sata"\nreadonly = true\n', "not on ide or sata"),
        ('[[disk]]\npath = "a"\nreadonly = true\nsnapshot = true\n', "can be written"),
        ('[display]\nkeymap = "de"\n', "display.type = vnc"),
        ('[boot]\ncmdline = "x"\n', "only with boot.kernel"),
        ("".join(f'[[disk]]\ntype = "floppy"\npath = "f{n}"\n' for n in range(3)), "2 devices fit"),
    ):
        with pytest.raises(BadValue, match=part):
            d.parse(f'name = "a"\n{text}')
