"""What a packet costs a front's child, from its bytes to those for the broker: linear in its size, counted in steps (N4).

The requests are those of `test_costs.py`, made from the table of verbs and the table of keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from tests.unit.costs import steps
from tests.unit.test_bounds import SHAPES
from tests.unit.test_costs import FIXED, LINEAR, SIZE, Make, growing, plain, texts, with_field, words
from vmshell.encoding import FRAME_MAX, decode, encode
from vmshell.errors import VmshellError
from vmshell.front import child
from vmshell.messages import REQUESTS, TEXT_MAX

pytestmark = pytest.mark.slow

NO_REQUESTS: dict[str, Callable[[int], bytes]] = {
    "opening brackets": lambda n: b"[" * n,
    "brackets side by side": lambda n: b'{"a":[' + b"[]," * (n // 3) + b"[]]}",
    "brackets in a text": lambda n: b'{"a":"' + b"[{" * (n // 2) + b'"}',
    "quotes": lambda n: b'"' * n,
    "backslashes": lambda n: b'{"a":"' + b"\\\\" * (n // 2) + b'"}',
    "escapes": lambda n: b'{"a":"' + b"\\u00e9" * (n // 6) + b'"}',
    "digits": lambda n: b'{"a":' + b"9" * n + b"}",
    "numbers": lambda n: b'{"a":[' + b"1," * (n // 2) + b"1]}",
    "keys": lambda n: b"{" + b",".join(b'"%d":1' % number for number in range(n // 8)) + b"}",
    "keys of a request": lambda n: b'{"verb":"list",' + b",".join(b'"%d":1' % number for number in range(n // 8)) + b"}",
    "blanks": lambda n: b" " * n + b"{}",
    "zeros": lambda n: bytes(n),
    "no UTF-8": lambda n: b"\xff" * n,
}


def everything() -> Iterator[tuple[str, Make]]:
    """All that a request can hold, each growing in one place, with what that is."""
    define, change = plain(REQUESTS["define"]), plain(REQUESTS["set"])
    for verb, kind in REQUESTS.items():
        for what, make in growing(kind):
            yield f"{verb} {what}", make
            yield f"explain {verb} {what}", partial(with_field, {"verb": "explain"}, "request", make)
    for what, text in (*texts(), *SHAPES.items()):
        yield f"define {what}", partial(with_field, define, "text", text)
    for what, word in words():
        yield f"set {what}", partial(with_field, change, "set", word)


def cost(data: bytes) -> int:
    """The steps from a packet's bytes to those that the broker gets, or to the refusal."""

    def handed_on() -> None:
        try:
            encode(child._checked(decode(data)).to_body())
        except VmshellError as exc:
            encode({"error": exc.to_wire()})

    return steps(handed_on)


def test_a_packet_twice_as_large_takes_twice_as_long() -> None:
    for what, make in everything():
        once, twice = (cost(encode(make(size))) for size in (SIZE, 2 * SIZE))
        assert twice <= LINEAR * once + FIXED, f"{what}: {once} steps, and {twice} for twice as much"


def test_so_does_one_that_is_no_request() -> None:
    for what, shape in NO_REQUESTS.items():
        once, twice = (cost(shape(size)) for size in (SIZE, 2 * SIZE))
        assert twice <= LINEAR * once + FIXED, f"{what}: {once} steps, and {twice} for twice as much"


def test_the_worst_that_fits_into_a_packet_is_checked_in_two_million_steps() -> None:
    """A fifth of a second, of the two that a child has."""
    for what, make in SHAPES.items():
        size = 1
        while len(make(2 * size)) <= TEXT_MAX and len(json.dumps(make(2 * size))) < FRAME_MAX - 1000:
            size *= 2
        found = cost(encode({**plain(REQUESTS["define"]), "text": make(size)}))
        assert found < 2_000_000, f"{what}: {found} steps"
    for what, shape in NO_REQUESTS.items():
        size = 1
        while len(shape(2 * size)) <= FRAME_MAX:
            size *= 2
        assert cost(shape(size)) < 2_000_000, what
