"""Whatever a packet makes the broker do takes time linear in its size, and hardly any for what others have: steps are counted.

The requests are made from the table of verbs and the table of keys, so a new verb or key is tried without anybody thinking of it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.costs import ALICE, ROOT, Bench, steps
from tests.unit.test_bounds import SHAPES
from vmshell import encoding, fields
from vmshell.broker.network import attachments
from vmshell.errors import VmshellError
from vmshell.messages import PIPES, REQUESTS, TEXT_MAX, BringsConsole, Request, StoreRequest, VmRequest
from vmshell.model.definition import toml_value
from vmshell.model.keys import ALIASES, DISK_KEYS, KEYS, NET_KEYS, SECTIONS

pytestmark = pytest.mark.slow  # half a minute of counting

Make = Callable[[int], dict[str, object]]
SIZE = 3000  # characters of what grows; twice as much fits into a packet whatever it is made of
LINEAR, FIXED = 2.5, 3000  # twice the size is at most so much more work, beside so many steps that have nothing to do with it
HARDLY = 400  # steps that 200 more VMs of others may take: two for each
# What an administrator asks may look at everybody's; and a port for the world is compared with all that are given away.
OF_EVERYBODYS = {"image-users", "owned", "unreadable", "net-health", "reload", "publish"}


@pytest.fixture(autouse=True)
def memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a disk does takes no steps of ours."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(attachments, "DNSMASQ", "/bin/true")


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Generator[Path, None, None]]:
    """Empty folders, one after the other, of which only the last is there."""

    def numbered() -> Generator[Path, None, None]:
        for number in itertools.count():
            folder = tmp_path / str(number)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder)

    made = numbered()
    yield made
    made.close()


# --- requests that grow -----------------------------------------------------------------------------------------------

TEXTS: dict[str, Callable[[int], str]] = {
    "letters": lambda n: "a" * n,
    "dots": lambda n: "a." * (n // 2),
    "commas": lambda n: "a," * (n // 2),
    "colons": lambda n: "a:" * (n // 2),
    "slashes": lambda n: "a/" * (n // 2),
    "digits": lambda n: "1" * n,
    "blanks": lambda n: " " * n,
    "controls": lambda n: "\x1b" * n,
    "beyond ASCII": lambda n: "é" * (n // 6),
    "quotes": lambda n: "'\"" * (n // 3),
    "brackets": lambda n: "[" * n,
}
SHAPES_OF: dict[str, Callable[[int], object]] = {
    **TEXTS,
    "words": lambda n: [f"w{index}" for index in range(n // 8)],
    "as many words as there may be": lambda n: ["a" * (n // 64)] * 64,
    "numbers": lambda n: list(range(n // 8)),
    "tables": lambda n: [{"port": 1}] * (n // 12),
    "table": lambda n: {f"k{index}": "v" for index in range(n // 12)},
    "table of long words": lambda n: {f"k{index}": "v" * (n // 64) for index in range(60)},
    "table of one long key": lambda n: {"k" * n: "v"},
    "every key": lambda n: dict.fromkeys([*KEYS, *(f"disk0.{key}" for key in DISK_KEYS)], "a" * (n // 64)),
    "whole number": lambda n: min(n, encoding.INT_MAX),
}
LIKELY: tuple[object, ...] = ("web1", "shelf", "demo", "o1.iso", "raw", "alice", [], {}, 64, 1, False)
KNOWN: dict[str, object] = {
    **{"port": 7, "vm": "web1", "image": "demo", "text": 'name = "web1"\n', "request": {"verb": "list"}},
    "sha256": "0" * 64,
}


def plain(kind: type[Request], **known: object) -> dict[str, object]:
    """A request of *kind* in which every field that must be there is let through: as it is *known*, or the first LIKELY one."""
    body: dict[str, object] = {"id": 1, "verb": kind.verb, **{name: known[name] for name in kind.fields if name in known}}
    if issubclass(kind, BringsConsole):
        body["consoles"] = PIPES
    for name, field in kind.fields.items():
        if name not in body and not has_default(kind, name):
            body[name] = next((value for value in (KNOWN.get(name), *LIKELY) if is_let_through(field, name, value)), None)
            assert body[name] is not None, f"{kind.verb}: no value for {name} is known to this test: add one to LIKELY"
    return body


def has_default(kind: type[Request], name: str) -> bool:
    return kind.fields[name].default is not fields._REQUIRED


def is_let_through(field: fields.Field, name: str, value: object) -> bool:
    try:
        field.check(value, name)
    except VmshellError:
        return False
    return True


def growing(kind: type[Request]) -> Iterator[tuple[str, Make]]:
    """Requests of *kind*, each of which grows in one place; with what that is."""
    base = plain(kind)
    for name in (*kind.fields, "unknown"):
        for shape, made in SHAPES_OF.items():
            yield f"{name}: {shape}", partial(with_field, base, name, made)
    yield "unknown fields", lambda size: {**base, **{f"k{index}": 1 for index in range(size // 12)}}


def with_field(base: dict[str, object], name: str, made: Callable[[int], object], size: int) -> dict[str, object]:
    return {**base, name: made(size)}


def texts() -> Iterator[tuple[str, Callable[[int], str]]]:
    """Definitions that grow in one place, the value of a key."""
    heads = {name: f"[{section}]\n{key}" if section else key for name in KEYS for section, _, key in [name.rpartition(".")]}
    heads |= {f"disk.{key}": f"[[disk]]\n{key}" for key in DISK_KEYS} | {f"net.{key}": f"[[net]]\n{key}" for key in NET_KEYS}
    values = {**TEXTS, **{name: SHAPES_OF[name] for name in ("words", "table", "table of one long key")}}
    for name, head in heads.items():
        for shape, made in values.items():
            yield f"{name}: {shape}", partial(with_value, head, made)


def with_value(head: str, made: Callable[[int], object], size: int) -> str:
    return f'name = "web1"\n{head} = {toml_value(made(size))}\n'


def words() -> Iterator[tuple[str, Callable[[int], dict[str, str]]]]:
    """What `set` may be told: each key, with each kind of word; and keys that there are not."""
    names = [*KEYS, *ALIASES, *SECTIONS, *(f"disk0.{key}" for key in DISK_KEYS), *(f"net0.{key}" for key in NET_KEYS), "net", "x"]
    for name in names:
        for shape, made in TEXTS.items():
            yield f"{name}: {shape}", partial(with_word, name, made)


def with_word(name: str, made: Callable[[int], str], size: int) -> dict[str, str]:
    return {name: made(size)}


def cost(bench: Bench, body: dict[str, object], peer: Any = ALICE) -> int:
    """The steps of a request, from its packet to where it is answered or waits for somebody."""
    return steps(lambda: bench.ask(body, peer))


def must_be_linear(folders: Iterator[Path], what: str, make: Callable[[int], dict[str, object]], peer: Any = ALICE) -> None:
    once, twice = (cost(Bench(next(folders)), make(size), peer) for size in (SIZE, 2 * SIZE))
    assert twice <= LINEAR * once + FIXED, f"{what}: {once} steps, and {twice} for twice as much"


@pytest.mark.parametrize("verb", REQUESTS)
def test_a_request_twice_as_large_takes_twice_as_long(folders: Iterator[Path], verb: str) -> None:
    for what, make in growing(REQUESTS[verb]):
        must_be_linear(folders, what, make)
        if "vm" not in REQUESTS[verb].fields:
            must_be_linear(folders, f"{what}, for root", make, ROOT)


@pytest.mark.parametrize("verb", [verb for verb, kind in REQUESTS.items() if "vm" in kind.fields])
def test_so_it_does_for_a_vm_that_runs(folders: Iterator[Path], verb: str) -> None:
    for what, make in growing(REQUESTS[verb]):
        if not what.startswith("vm:"):
            must_be_linear(folders, what, lambda size, make=make: {**make(size), "vm": "run1"})  # type: ignore[misc]


def test_so_does_every_shape_of_a_definition(folders: Iterator[Path]) -> None:
    for what, make in SHAPES.items():
        must_be_linear(folders, what, lambda size, make=make: {**plain(REQUESTS["define"]), "text": make(size)})  # type: ignore[misc]


def test_so_does_every_value_of_every_key_of_a_definition(folders: Iterator[Path]) -> None:
    for what, make in texts():
        must_be_linear(folders, what, lambda size, make=make: {**plain(REQUESTS["define"]), "text": make(size)})  # type: ignore[misc]


def test_so_does_every_key_that_is_set_to_every_kind_of_word(folders: Iterator[Path]) -> None:
    for what, make in words():
        must_be_linear(folders, what, lambda size, make=make: {**plain(REQUESTS["set"]), "set": make(size)})  # type: ignore[misc]


def test_so_does_one_that_is_only_to_be_explained(folders: Iterator[Path]) -> None:
    base = {"id": 1, "verb": "explain"}
    for verb, kind in REQUESTS.items():
        for what, make in growing(kind):
            explained = partial(with_field, base, "request", make)
            must_be_linear(folders, f"{verb} {what}", explained)


def test_the_worst_that_fits_into_a_packet_is_answered_in_a_million_steps(folders: Iterator[Path]) -> None:
    """In a tenth of a second, that is, where a key of 16,000 parts took 5 s."""
    for shape, make in SHAPES.items():
        size = 1
        while len(make(2 * size)) <= TEXT_MAX and len(json.dumps(make(2 * size))) < encoding.FRAME_MAX - 1000:
            size *= 2
        found = cost(Bench(next(folders)), {**plain(REQUESTS["define"]), "text": make(size)})
        assert found < 1_000_000, f"{shape}: {found} steps"


# --- what there is grows ----------------------------------------------------------------------------------------------


def requests_of(verb: str) -> Iterator[dict[str, object]]:
    """Requests that get as far as they can: about each VM and the shelf, with what there is and what there is not."""
    kind = REQUESTS[verb]
    named = ("web1", "run1") if issubclass(kind, VmRequest) else ("web1", "new1")
    for vm in (*named, "shelf") if issubclass(kind, StoreRequest) else named:
        for known in (
            {},
            {"object": "o1.iso"},
            {"object": "fresh"},
            {"to": "@staff"},
            {"to": "u2000"},
            {"to": "world", "port": 2500},
        ):
            for more in ({}, {"once": True}, {"toml": True}, {"remove": True}, {"format": "qcow2"}, {"set": {"memory": "64M"}}):
                body = plain(kind, **{"vm": vm, **known, **more})
                if all(name in kind.fields for name in (*known, *more)) and ("vm" in kind.fields or vm == "web1"):
                    yield body


@pytest.mark.parametrize("verb", REQUESTS)
def test_what_others_have_costs_nothing(folders: Iterator[Path], verb: str) -> None:
    for body in requests_of(verb):
        few, many = (cost(Bench(next(folders), own=5, objects=10, grants=5, others=count), body) for count in (100, 300))
        most = 2 * LINEAR * few + FIXED if verb in OF_EVERYBODYS else few + HARDLY
        assert many <= most, f"{body}: {few} steps beside 100 VMs of others, {many} beside 300"


@pytest.mark.parametrize("verb", REQUESTS)
def test_what_one_has_oneself_costs_as_much_as_it_is(folders: Iterator[Path], verb: str) -> None:
    """All of it grows at once: VMs compared with objects, or with each other, would take four times as long."""
    for body in requests_of(verb):
        few, many = (cost(Bench(next(folders), own=count, objects=count, grants=count), body) for count in (40, 80))
        assert many <= LINEAR * few + FIXED, f"{body}: {few} steps with 40 VMs, objects and grants, and {many} with 80"
