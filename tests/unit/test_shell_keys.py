"""The console's keys, and what the relay's notices look like."""

from __future__ import annotations

from vmshell.shell.console import notices
from vmshell.shell.console.keys import COMMANDS, Keys, show_key
from vmshell.shell.console.viewer import fit


def feed(*chunks: bytes, escape: int = 0x1D) -> list[bytes | str]:
    keys = Keys(escape)
    return [item for chunk in chunks for item in keys.feed(chunk)]


def test_what_is_typed_goes_to_the_guest() -> None:
    assert feed(b"ls\r", b"\x03\x1a\x1c") == [b"ls\r", b"\x03\x1a\x1c"]


def test_all_three_ways_to_detach() -> None:
    for key in (b".", b"d", b"q", b"D", b"\x04", b"\x11"):
        assert feed(b"\x1d", key) == ["detach"]
    assert feed(b"\x1d.") == ["detach"]


def test_commands() -> None:
    for key, command in COMMANDS.items():
        assert feed(b"\x1d", bytes([key])) == [command]


def test_the_escape_key_twice_is_the_key_itself() -> None:
    assert feed(b"\x1d", b"\x1d") == [b"\x1d"]
    assert feed(b"a\x1d\x1db") == [b"a\x1db"]


def test_another_escape_key() -> None:
    assert feed(b"\x1d.", b"\x01d", escape=1) == [b"\x1d.", "detach"]
    assert feed(b"\x01", b"\x01", escape=1) == [b"\x01"]
    assert show_key(1) == "^A" and show_key(0x1D) == "^]"


def test_no_two_keys_are_power() -> None:
    """Whatever follows the escape key, no power command comes of one key (only the menu, which asks)."""
    for key in range(256):
        for item in feed(b"\x1d", bytes([key])):
            assert item in ("detach", "help", "pen", "who", "break", "power", "size", "cancel", "unknown") or isinstance(
                item, bytes
            )


def test_an_escape_key_inside_pasted_text_is_data() -> None:
    pasted = b"some text that was pasted \x1d. and goes on for a while"
    assert feed(pasted) == [pasted]


def test_an_escape_key_typed_right_behind_other_keys_counts() -> None:
    assert feed(b"exit\r\x1d.") == [b"exit\r", "detach"]
    assert feed(b"a long line that came in one packet\r\x1d.") == [b"a long line that came in one packet\r", "detach"]


def test_what_follows_the_detach_key_belongs_to_the_prompt() -> None:
    assert feed(b"\x1d.list\r") == ["detach", b"list\r"]


def test_notices_escape_what_others_chose() -> None:
    evil = "bob\x1b]0;x\a\nroot"
    lines = [
        notices.banner("web1", "^]", {"notice": "hello", "pen": False, "holder": evil}, readonly=False),
        notices.text("web1", "^]", {"notice": "pen", "pen": False, "holder": evil}),
        notices.text("web1", "^]", {"notice": "who", "viewers": [{"label": evil, "pen": True}]}),
        notices.text("web1", "^]", {"notice": "refused", "why": evil}),
        notices.text("web1", "^]", {"notice": "state", "state": evil}),
        notices.ended("web1", {"reason": evil}),
        notices.silence("web1", evil, 4),
    ]
    for line in lines:
        assert line and line.isprintable(), line


def test_notices_survive_nonsense() -> None:
    nonsense: tuple[object, ...] = (None, 7, "x", [], [1], {})
    for word in ("hello", "pen", "refused", "who", "gap", "state", "end", "new-thing", None):
        for junk in nonsense:
            notice: dict[str, object] = {
                "notice": word,
                "viewers": junk,
                "holder": junk,
                "bytes": junk,
                "why": junk,
                "state": junk,
            }
            assert isinstance(notices.text("web1", "^]", notice), str)
            assert isinstance(notices.banner("web1", "^]", notice, readonly=False), str)


def test_a_replay_after_a_restart_is_fitted_to_what_was_shown() -> None:
    assert fit(b"", b"all") == b"all"
    assert fit(b"...login: ", b"boot...login: root\r\n") == b"root\r\n"
    assert fit(b"x" * 500 + b"seen", b"seen and new") == b"seen and new", "too short to be sure"
    assert fit(b"unseen", b"other") == b"other"
