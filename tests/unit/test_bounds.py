"""How much a definition's text may hold: counted before it is read, in one pass that nothing in the text leads astray."""

from __future__ import annotations

import contextlib
import importlib
import tomllib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell import encoding
from vmshell.errors import BadValue
from vmshell.messages import TEXT_MAX
from vmshell.model import bounds
from vmshell.model.bounds import check_bounds
from vmshell.model.definition import Definition, Disk, Forward, Geometry, Nic, parse, read_stored, to_toml

parser: Any = importlib.import_module("tomllib._parser")
LARGE = TEXT_MAX // 8
SHAPES: dict[str, Callable[[int], str]] = {
    "dotted key": lambda n: "a." * n + "a = 1",
    "dotted header": lambda n: f"[{'a.' * n}a]",
    "dotted quoted key": lambda n: '"a" . ' * n + "a = 1",
    "dotted key of an inline table": lambda n: f"a = {{ {'a.' * n}a = 1 }}",
    "sections": lambda n: "".join(f"[s{index}]\n" for index in range(n)),
    "rows": lambda n: "[[disk]]\n" * n,
    "keys": lambda n: "".join(f"k{index} = 1\n" for index in range(n)),
    "keys of a section": lambda n: "[cpu]\n" + "".join(f"k{index} = 1\n" for index in range(n)),
    "keys of an inline table": lambda n: f"a = {{ {', '.join(f'k{index} = 1' for index in range(n))} }}",
    "lists in lists": lambda n: "a = " + "[" * n + "]" * n,
    "inline tables in inline tables": lambda n: "a = " + "{ a = " * n + "1" + " }" * n,
    "digits": lambda n: f"[memory]\nsize = {'1' * n}",
    "hexadecimal digits": lambda n: f"[cpu]\ncount = 0x{'f' * n}",
    "digits of an exponent": lambda n: f"[cpu]\ncount = 1e{'1' * n}",
    "long key": lambda n: f"{'k' * n} = 1",
    "lines": lambda n: "\n" * (n * 2),
    "lines of a text": lambda n: f'a = """{"x" * 8}{chr(10) * n * 2}"""',
}


@pytest.mark.parametrize("shape", SHAPES)
def test_more_than_any_definition_needs_is_refused_with_its_line_and_the_number(shape: str) -> None:
    with pytest.raises(BadValue, match=r"^line \d+ of vm.toml is too much: .* has more than \d+ [a-z ]+$"):
        parse(SHAPES[shape](LARGE), "web1")


def test_the_line_is_the_one_meant() -> None:
    text = 'name = "web1"\n# a.b.c.d.e.f.g.h.i.j\ndescription = """\n\n"""\n' + "a." * 20 + "a = 1\n"
    with pytest.raises(BadValue, match="^line 6 of vm.toml is too much: a key there has more than 8 parts$"):
        check_bounds(text)


@pytest.mark.parametrize(
    "hidden",
    [
        'a = "x" # "\n',
        "a = 'x' # '\n",
        'a = """x""""\n',  # four and five quotes end a long string, too
        'a = """x"""""\n',
        "a = '''x''''\n",
        "a = '''x'''''\n",
        'a = "\\""\n',
        'a = "\\\\"\n',
        "a = '\\'\n",
        'a = """\\""""\n',
        'a = """""" # """\n',
        'a = ""\n',
        "a = ''\n",
        '"b#" = 1\n',
        "a = [ # ]\n ]\n",
    ],
)
def test_no_quote_or_comment_hides_what_comes_behind_it(hidden: str) -> None:
    tomllib.loads(hidden)
    with pytest.raises(BadValue, match="parts"):
        check_bounds(hidden + "a." * 20 + "b = 1\n")


PIECES = st.sampled_from(
    [*"\n#\"'\\[]{}=.,a1 -", '"""', "'''", '\\"', "a = ", "[a]\n", "[[a]]\n", "a.a", "a.a.a.a.a = 1\n", '"x"', "'x'", "\r\n", "b"]
)


@given(st.lists(PIECES, max_size=60))
def test_whatever_the_text_the_reader_sees_no_key_that_was_not_counted(pieces: list[str]) -> None:
    """What passes is small to the reader, also where the two would not agree on what is TOML."""
    text = "".join(pieces)
    longest = 0
    real = parser.parse_key

    def watched(src: str, pos: int) -> Any:
        nonlocal longest
        end, key = real(src, pos)
        longest = max(longest, len(key))
        return end, key

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(BadValue, tomllib.TOMLDecodeError):
        patch.setattr(parser, "parse_key", watched)
        patch.setattr(bounds, "PARTS_MAX", 3)
        check_bounds(text)
        tomllib.loads(text)
    assert longest <= 3


def largest() -> Definition:
    """A definition with as much of everything as its keys allow."""
    geometry = Geometry(65535, 16, 255, "rechs")
    names = [f"{'n' * 62}{index:02}" for index in range(32)]
    base = "image:" + "i" * 31
    disks = tuple(Disk(name, bus="ide", format="qcow2", size=1 << 40, base=base, geometry=geometry) for name in names)
    ports = tuple(Forward("tcp", 65000 + port, 65000 + port) for port in range(16))
    nic = Nic("n" * 64, "e1000e", "06:01:00:00:00:2a", ports, "down")
    return Definition(
        "n" * 31,
        description="é" * 512,
        image="i" * 31,
        autostart=True,
        agent=True,
        machine="pc-i440fx-99.99",
        firmware="f" * 64,
        acpi=False,
        clock="localtime",
        on_reboot="stop",
        cpus=255,
        cpu_model="c" * 64,
        memory=1 << 24,
        boot_order=tuple(f"disk{index}" for index in range(32)),
        boot_menu=True,
        kernel="shelf:" + "k" * 64,
        initrd="shelf:" + "i" * 64,
        cmdline="é" * 1023,
        option_roms=tuple(f"shelf:{'r' * 63}{index}" for index in range(8)),
        restore="t" * 63,
        display="vnc",
        video="virtio",
        keymap="fr-be",
        tablet=False,
        serial=False,
        log=False,
        disks=disks,
        nics=(nic,) * 32,
    )


def test_the_largest_definition_there_can_be_is_written_read_and_told_in_one_packet() -> None:
    definition = largest()
    text = to_toml(definition)
    assert len(text) < TEXT_MAX
    check_bounds(text)
    encoding.encode({"id": encoding.INT_MAX, "ok": {"toml": text}})
    fitting = replace(definition, disks=tuple(replace(disk, bus="virtio", geometry=None) for disk in definition.disks[:16]))
    fitting = replace(fitting, boot_order=fitting.boot_order[:16])
    text = to_toml(fitting)
    assert parse(text) == fitting and read_stored(text, fitting.name) == (fitting, "")


def test_a_thousand_unknown_keys_are_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is meant by a key takes long to find out: it is asked for the one that is told."""
    asked: list[str] = []
    real = parse.__globals__["unknown_key"]

    def counted(name: str, keys: list[str]) -> Exception:
        asked.append(name)
        return real(name, keys)  # type: ignore[no-any-return]

    monkeypatch.setitem(parse.__globals__, "unknown_key", counted)
    with pytest.raises(Exception, match="memor0"):
        parse('name = "web1"\n' + "".join(f"memor{index} = 1\n" for index in range(100)))
    assert asked == ["memor0"]
