"""What of a guest's output reaches the terminal, byte for byte (rule R21; threats E01 to E05)."""

from __future__ import annotations

import random
import re

import pytest

from vmshell.shell.console.terminal_filter import DCS_MAX, STRING_MAX, Filter, plain

UNCHANGED = [
    b"plain text\r\n\ttab\b\a",
    "grüße ▓ 😀 日本".encode(),
    b"\x1b[0;1;31mred\x1b[m \x1b[38;5;208mx\x1b[38:2::1:2:3m",
    b"\x1b[H\x1b[2J\x1b[10;20H\x1b[3A\x1b[K\x1b[1P\x1b[2@\x1b[L\x1b[M\x1b[5X\x1b[3d\x1b[7G\x1b[f",
    b"\x1b[?1049h\x1b[?25l\x1b[?25h\x1b[?1049l\x1b[?7h\x1b[?1h\x1b=\x1b>",
    b"\x1b7\x1b8\x1bM\x1bD\x1bE\x1bc\x1b(0lqk\x1b(B\x1b)0\x0e\x0f",
    b"\x1b[1;24r\x1b[r\x1b[s\x1b[u\x1b[4h\x1b[4l\x1b[?2004h\x1b[!p\x1b[3b",
]

DROPPED = {
    "E01 title, icon": b"\x1b]0;owned\a\x1b]2;owned\x1b\\\x1b]1;x\x07",
    "E01 palette": b"\x1b]4;1;rgb:ff/00/00\a\x1b]10;?\a",
    "E02 clipboard": b"\x1b]52;c;cm0gLXJmIC8K\a\x1b]52;c;?\x1b\\",
    "E03 device attributes": b"\x1b[c\x1b[0c\x1b[>c\x1b[=c\x1b[>0q\x1bZ",
    "E03 status reports": b"\x1b[5n\x1b[6n\x1b[?6n\x1b[?15n",
    "E03 window reports": b"\x1b[18t\x1b[21t\x1b[14t\x1b[8;50;100t",
    "E03 answerback, DECRQSS, DECRQM": b'\x05\x1bP$q"p\x1b\\\x1b[?25$p\x1b[20$p\x1b[x\x1b[1x',
    "E04 device strings": b"\x1bPq#0;2;0;0;0#0~~\x1b\\\x1b_Gf=24;AAAA\x1b\\\x1b^x\x1b\\\x1bXx\x1b\\",
    "E04 printing": b"\x1b[4i\x1b[5i\x1b[?5i",
    "E04 8-bit controls, as UTF-8": "\x9b\x9d\x90\x9f\x85".encode(),
    "E05 mouse, focus, keyboard": b"\x1b[?1000h\x1b[?1003h\x1b[?1006h\x1b[?1004h\x1b[>4;2m\x1b[>1u\x1b[=1u\x1b[?3h",
    "keyboard lock, LEDs, 8-bit mode, UTF-8 off": b"\x1b[2h\x1b[20h\x1b[1q\x1b G\x1b%@\x1b#8\x1bn\x1bo\x1b}",
    "numbers out of all reason": b"\x1b[999999999b\x1b[123456A\x1b[99999b",
    "other controls": b"\x00\x01\x02\x7f\x0b\x0c\x11\x13\x18\x1a",
    "mouse highlight, side margins": b"\x1b[1;2;3;4;5T\x1b[1;10s",
}


@pytest.mark.parametrize("data", UNCHANGED)
def test_what_a_guest_needs_passes_unchanged(data: bytes) -> None:
    assert Filter().feed(data) == data


@pytest.mark.parametrize("what", DROPPED)
def test_what_could_harm_is_left_out(what: str) -> None:
    assert Filter().feed(b"a" + DROPPED[what] + b"z") == b"az"


@pytest.mark.parametrize("data", [*UNCHANGED, *DROPPED.values()])
def test_pieces_of_any_size_give_the_same(data: bytes) -> None:
    whole = Filter().feed(data + b"end")
    for size in (1, 2, 3, 5):
        piecewise = Filter()
        assert b"".join(piecewise.feed((data + b"end")[at : at + size]) for at in range(0, len(data) + 3, size)) == whole


def test_of_several_modes_those_allowed_remain() -> None:
    assert Filter().feed(b"\x1b[?1049;1000;25h") == b"\x1b[?1049;25h"


def test_raw_8_bit_bytes_never_pass() -> None:
    assert Filter().feed(b"a\x9b31m\x9d0;x\x07z").decode() == "a\ufffd31m\ufffd0;x\az"


def test_an_unterminated_string_swallows_one_line_or_a_bounded_length() -> None:
    assert Filter().feed(b"\x1b]0;never ends\r\nlogin: ") == b"\r\nlogin: "
    out = Filter().feed(b"\x1b]0;" + b"x" * (STRING_MAX + 100))
    assert 0 < len(out) <= 104
    out = Filter().feed(b"\x1bPq" + b"x\n" * DCS_MAX)
    assert 0 < len(out) <= DCS_MAX


def test_an_endless_control_sequence_ends() -> None:
    out = Filter().feed(b"\x1b[" + b"1;" * 10_000 + b"\r\nlogin: ")
    assert out.endswith(b"login: ")


def test_reset_undoes_what_was_left_on() -> None:
    one = Filter()
    one.feed(b"\x1b[?1049h\x1b[5;10r\x1b[?25l")
    reset = one.reset()
    assert b"\x1b[?1049l" in reset and b"\x1b[r" in reset and b"\x1b[?25h" in reset and b"\x1b[0m" in reset
    again = one.reset()
    assert b"1049" not in again and b"\x1b[r" not in again, "what is not on is not switched off: that would move the cursor"


def test_reset_ends_a_sequence_cut_in_the_middle() -> None:
    one = Filter()
    one.feed(b"\x1b]0;half")
    one.reset()
    assert one.feed(b"text") == b"text"


def test_plain_text_for_searching() -> None:
    assert plain(Filter().feed(b"\x1b[1;32mweb1\x1b[0m login\x1b[K:\x1b]0;t\a \r\n")) == "web1 login: \n"


ALLOWED = re.compile(
    "(?:[^\x00-\x06\x0b\x0c\x10-\x1f\x7f-\x9f]|\x1b\\[[0-9;:]*[@A-Za-z`]|\x1b\\[\\?[0-9;]+[hl]|\x1b\\[!p|\x1b[()][0AB12]|\x1b[78DEMHc=>])*"
)


def test_random_bytes_only_ever_give_the_allowed_grammar() -> None:
    chance = random.Random(7)
    pieces = [
        b"\x1b",
        b"[",
        b"]",
        b"P",
        b"_",
        b"?",
        b"\x9b",
        b"\xc2\x9b",
        b"6n",
        b"c",
        b"m",
        b"1;2",
        b"h",
        b"\a",
        b"\x1b\\",
        b"x",
        b"\xff",
        b"$q",
        b"\n",
    ]
    for _ in range(3000):
        one, out = Filter(), b""
        for _ in range(chance.randrange(1, 12)):
            out += one.feed(b"".join(chance.choices(pieces, k=chance.randrange(1, 8))))
        assert ALLOWED.fullmatch(out.decode("utf-8")), out
        for report in (b"\x1b[c", b"\x1b[6n", b"\x1b[5n", b"\x1b]", b"\x1bP", b"\x1b_", b"\x1bZ"):
            assert report not in out


def test_plain_output_takes_the_fast_path() -> None:
    data = b"x" * 65536
    assert Filter().feed(data) is data
