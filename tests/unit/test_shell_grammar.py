"""The grammar: words, quotes, columns, options; and that no line on earth makes it do anything but refuse."""

from __future__ import annotations

import random

import pytest

from vmshell.errors import BadValue, VmshellError
from vmshell.names import nearest
from vmshell.refusals import BadName, Usage
from vmshell.shell.cli import grammar, verbs
from vmshell.shell.cli.grammar import Pointed


def texts(line: str) -> list[str]:
    return [word.text for word in grammar.words_of(line)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", []),
        ("  \t ", []),
        ("list", ["list"]),
        (" boot  web1 --wait 'login: $' ", ["boot", "web1", "--wait", "login: $"]),
        ('a "b c" d', ["a", "b c", "d"]),
        (r'"a\"b\\c\d"', ['a"b\\c\\d']),
        (r"'a\b'", [r"a\b"]),
        (r"a\ b \'x", ["a b", "'x"]),
        ("x'y z'w", ["xy zw"]),
        ("''", [""]),
        ("$HOME `id` $(id) ~ * ; | &", ["$HOME", "`id`", "$(id)", "~", "*", ";", "|", "&"]),
        ("caf\udce9", ["caf\udce9"]),
    ],
)
def test_words(line: str, expected: list[str]) -> None:
    assert texts(line) == expected


@pytest.mark.parametrize(
    ("line", "column"), [("new 'web1", 5), ('say "x', 5), ("list\nrm web1", 5), ("'a\nb'", 3), ("boot web1\\", 10), ("a\rb", 2)]
)
def test_what_cannot_be_split_is_pointed_at(line: str, column: int) -> None:
    with pytest.raises(Pointed) as caught:
        grammar.words_of(line)
    assert caught.value.column == column
    assert f"column {column}" in caught.value.sentence()


def test_a_line_is_at_most_4096_bytes() -> None:
    assert texts("x" * 4096) == ["x" * 4096]
    with pytest.raises(Usage, match="4097 bytes"):
        grammar.words_of("x" * 4097)
    with pytest.raises(Usage, match="4098 bytes"):
        grammar.words_of("ü" * 2049)
    with pytest.raises(Usage, match="limit is 4096"):
        grammar.as_words(["x" * 5000])


def parsed(line: str) -> grammar.Request:
    words = grammar.words_of(line)
    return grammar.parse(words, verbs.BY_WORD[words[0].text])


def test_options_with_blank_or_equals_sign_in_any_order() -> None:
    for line in ("new web1 --image demo --memory 1G --cpus=2", "new --memory=1024M --cpus 2 --image=demo web1"):
        values = parsed(line).values
        assert (values.text("vm"), values.text("image"), values.number("memory", 0), values.number("cpus", 0)) == (
            "web1",
            "demo",
            1024,
            2,
        )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("disk add web1 data", "--size"),
        ("new web1 --image demo --image demo", "twice"),
        ("new web1 --image", "needs a value"),
        ("new web1 --imagee demo", "did you mean --image"),
        ("boot web1 --console=yes", "takes no value"),
        ("boot web1 web2", "one word too many"),
        ("boot", "needs NAME"),
        ("boot -x web1", "no option -x"),
        ("list --al", "did you mean --all"),
    ],
)
def test_usage_errors_say_what_and_how(line: str, problem: str) -> None:
    with pytest.raises(Usage) as caught:
        parsed(line)
    assert problem in caught.value.sentence()
    assert caught.value.advice().startswith("usage: ")


@pytest.mark.parametrize(
    "line",
    [
        "new web1 --image demo --memory 512",
        "new web1 --image demo --cpus two",
        "boot web1 --wait x --timeout 0",
        "console web1 --escape x",
    ],
)
def test_bad_values(line: str) -> None:
    with pytest.raises(BadValue):
        parsed(line)


@pytest.mark.parametrize("name", ["Web1", "-web", "../../x", "/x", "a/b/c", "x" * 32, "wéb", "a b", "web\x1b[2J", "1web"])
def test_bad_names_are_refused_before_anything_is_sent(name: str) -> None:
    words = [grammar.Word("boot", 1), grammar.Word("--", 6), grammar.Word(name, 9)]
    with pytest.raises(BadName):
        grammar.parse(words, verbs.BY_WORD["boot"])


def test_escape_keys() -> None:
    assert parsed("console web1 --escape ^A").values.number("escape", 0) == 1
    assert parsed("console web1 --escape ^]").values.number("escape", 0) == 0x1D
    assert parsed("console web1 --escape=^a").values.number("escape", 0) == 1


def test_short_options_are_the_long_ones() -> None:
    assert parsed("net web1 -f").values.flag("follow") and parsed("net --follow web1").values.flag("follow")
    assert parsed("ssh -l bob web1").values.text("login") == parsed("ssh web1 --login=bob").values.text("login") == "bob"
    for line in ("net web1 -f --follow", "net web1 --f", "net web1 -follow", "net web1 ---f", "ssh web1 -l"):
        with pytest.raises(Usage):
            parsed(line)


def test_a_command_for_a_guest_keeps_its_options() -> None:
    values = parsed("ssh web1 -t ls -l --json -- 'a b'").values
    assert values.flag("tty") and values.words("command") == ["ls", "-l", "--json", "--", "a b"]
    assert parsed("ssh web1 -- -x").values.words("command") == ["-x"]
    assert parsed("ssh web1").values.words("command") == []
    assert verbs.wants_help(grammar.words_of("--help"), verbs.BY_WORD["ssh"])
    assert not verbs.wants_help(grammar.words_of("web1 ls --help"), verbs.BY_WORD["ssh"])
    assert verbs.wants_help(grammar.words_of("web1 --help"), verbs.BY_WORD["boot"])


def test_nearest() -> None:
    words = list(verbs.BY_WORD)
    assert nearest("lsit", words) == "list"
    assert nearest("shutdwn", words) == "shutdown"
    assert nearest("consloe", words) == "console"
    assert nearest("id", words) == ""
    assert nearest("sftp-server", words) == ""


ALPHABET = [
    *"abcdefghijklmnopqrstuvwxyz0123456789-_=./;|&$`'\"\\~*?!<>(){}[]#%^@:, \t\n\r\0\x1b\x7f\x9b",
    "ü",
    "\u202e",
    "\udcff",
    "😀",
]


def random_line(chance: random.Random) -> str:
    if chance.random() < 0.5:
        return "".join(chance.choices(ALPHABET, k=chance.randrange(60)))
    words = [
        chance.choice([*verbs.BY_WORD, "web1", "--image", "--image=demo", "--json", "--", "-", "--wait", "", "'a", "^]"])
        for _ in range(chance.randrange(7))
    ]
    return " ".join(words)


def test_ten_thousand_random_lines_are_understood_or_refused() -> None:
    """Nothing but our own errors, each with a sentence of printable characters (A26, A30, A38)."""
    chance = random.Random(20261123)
    understood = 0
    for _ in range(10_000):
        line = random_line(chance)
        try:
            words = grammar.words_of(line)
            if words and words[0].text in verbs.BY_WORD:
                grammar.parse(words, verbs.BY_WORD[words[0].text])
                understood += 1
        except VmshellError as error:
            assert error.exit_status == 2, line
            assert error.sentence().isprintable() and error.advice().isprintable(), line
    assert understood > 100
