"""Names, sizes, errors, messages, and what travels on a console. Threat rows C14-C18, D04, D12, A30."""

from __future__ import annotations

import select

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell import consoles, errors, fields, messages, names, numbering, refusals
from vmshell.errors import BadValue, ProtocolError, VmshellError
from vmshell.refusals import BadName, UnknownVerb, Upgraded

BAD_NAMES = [
    "", ".", "..", "a/b", "/etc/passwd", "a\n", "\na", "a\0", "-x", "--", "-snapshot", "1a", "A", "aB", "web_1", "web.1", "web 1",
    "w\x1b[2J", "w\u0435b", "\uff57eb", "\u017f", "\u212a", "\u2025", "a\u202eb", "\u00e9", "a" * 32, "a" * 300,
    "json:{}", "nbd:1", "/proc/self/fd/3", "%d", "$x", "a;b", "a,b=c",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_are_none(name: str) -> None:
    """C14-C18: one rule, ASCII, lower case; the refusal itself is fit for a terminal."""
    with pytest.raises(BadName) as caught:
        names.check_name(name)
    assert caught.value.sentence().isprintable()


@pytest.mark.parametrize("value", [None, 1, True, ["a"], {"a": 1}, b"a"])
def test_names_are_text(value: object) -> None:
    with pytest.raises(BadName):
        names.check_name(value)


@given(st.from_regex(r"[a-z][a-z0-9-]{0,30}", fullmatch=True))
def test_every_name_of_the_rule_is_one(name: str) -> None:
    assert names.check_name(name) == name


@pytest.mark.parametrize(
    ("ref", "ok"),
    [
        ("web1", True),
        ("alice/web1", True),
        ("a b/web1", False),
        ("/web1", False),
        ("alice/", False),
        ("a/b/c", False),
        ("ä/web1", False),
    ],
)
def test_references(ref: str, ok: bool) -> None:
    if ok:
        assert names.check_vm_ref(ref) == ref
    else:
        with pytest.raises(BadName):
            names.check_vm_ref(ref)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1", 1), ("512M", 512 << 20), ("1g", 1 << 30), ("2GiB", 2 << 30), ("4KB", 4096), ("1T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert names.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "1 G", "1E", "１G", "0x10", "1e3", "nan", "1_000", "9" * 30, None, 5, "1MM", "1GG"]
)
def test_sizes_that_are_none(text: object) -> None:
    with pytest.raises(BadValue):
        names.parse_size(text)


@given(st.integers(1, numbering.NUMBER_MAX), st.integers(0, 15))
def test_what_follows_from_a_number_is_unique_and_short(number: int, nic: int) -> None:
    """E25: no interface name is ever cut, and every MAC is unicast and locally administered."""
    assert len(numbering.tap_name(number, nic)) < 16
    octets = [int(octet, 16) for octet in numbering.mac_address(number, nic).split(":")]
    assert octets[0] & 3 == 2
    assert octets[3] << 16 | octets[4] << 8 | octets[5] == number


@given(st.integers(0, 1 << 50))
def test_sizes_are_shown_within_a_tenth(size: int) -> None:
    shown = names.format_size(size)
    number = float(shown.rstrip("KMGT")) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(shown[-1], 1)
    assert abs(number - size) <= size * 0.1


def test_every_error_has_a_code_a_sentence_and_a_status() -> None:
    for code, kind in refusals.REGISTRY.items():
        assert code == kind.code
        assert kind.__doc__
        assert 1 <= kind.exit_status < 256
        assert not kind.__doc__.strip().endswith(".")


def test_an_error_survives_the_wire_and_nothing_in_it_reaches_a_terminal_raw() -> None:
    told = refusals.from_wire(refusals.NoSuchVm(vm="\x1b]0;x\x07\n").to_wire())
    assert told.code == "no-such-vm"
    assert told.exit_status == refusals.EX_NO_SUCH
    assert told.sentence() == "there is no VM named \\x1b]0;x\\x07\\x0a"
    assert told.advice() == "`list` shows yours"


@pytest.mark.parametrize("error", [None, [], {}, {"code": 1, "text": None}, {"code": "nonsense", "text": "x{y}", "hint": "{0}"}])
def test_a_malformed_error_is_a_plain_refusal(error: object) -> None:
    assert refusals.from_wire(error).code == "refused"


@given(st.text())
def test_safe_text_is_printable_and_bounded(text: str) -> None:
    shown = errors.safe(text, 50)
    assert shown.isprintable()
    assert len(shown) <= 50 * 10


@pytest.mark.parametrize(
    "body",
    [
        {"verb": "boot"},
        {"verb": "boot", "vm": "web1", "uid": 0},  # D12
        {"verb": "boot", "vm": "web1", "owner": "root"},
        {"verb": "boot", "vm": "web1", "console": 1},
        {"verb": "boot", "vm": ["web1"]},
        {"verb": "new", "vm": "a", "image": "b", "cpus": True},  # D04
        {"verb": "new", "vm": "a", "image": "b", "cpus": 0},
        {"verb": "new", "vm": "a", "image": "b", "cpus": -1},
        {"verb": "new", "vm": "a", "image": "b", "memory": "512M"},
        {"verb": "new", "vm": "bob/a", "image": "b"},
        {"verb": "list", "after": "x" * 129},
        {"verb": "list", "all": "yes"},
        {"verb": "shutdown", "vm": "a", "timeout": 0},
    ],
)
def test_requests_with_a_wrong_field_are_refused(body: dict[str, object]) -> None:
    with pytest.raises((BadValue, BadName)):
        messages.parse_request(body)


@pytest.mark.parametrize("verb", [None, "", 1, "destroy", "BOOT", "__init__", {"a": 1}])
def test_unknown_verbs(verb: object) -> None:
    with pytest.raises(UnknownVerb):
        messages.parse_request({"verb": verb, "vm": "a"})


def test_requests_go_there_and_back() -> None:
    for kind in messages.REQUESTS.values():
        needed: dict[str, object] = {"vm": "web1", "image": "demo", "text": "x", "request": {}, "tag": "t", "object": "o"}
        needed |= {"size": 1, "format": "raw", "port": 22, "put": 1, "bytes": 5, "sha256": "0" * 64}
        request = kind(**{name: needed[name] for name, spec in kind.fields.items() if name in needed})
        assert repr(messages.parse_request({"id": 3, **request.to_body()})) == repr(request)


def test_request_ids_are_numbers() -> None:
    for bad in ("1", -1, True, None, 1 << 60):
        with pytest.raises(VmshellError):
            fields.request_id({"id": bad})


@pytest.mark.parametrize(
    "request_",
    [
        messages.Console(vm="web1"),
        messages.Boot(vm="web1", console=True),
        messages.Define(vm="web1", text="", new=True, once=True),
    ],
)
def test_who_asks_for_a_console_says_that_it_knows_what_one_is(request_: messages.Request) -> None:
    body = request_.to_body()
    assert type(messages.parse_request(body)) is type(request_)
    del body["consoles"]
    with pytest.raises(Upgraded, match="upgraded: log in again"):
        messages.parse_request(body)


def test_a_boot_without_a_console_is_what_it_was() -> None:
    assert messages.Boot(vm="web1").to_body() == {"verb": "boot", "vm": "web1"}
    assert messages.parse_request({"verb": "boot", "vm": "web1"}).to_body() == {"verb": "boot", "vm": "web1"}


# --- what travels on a console ----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([b"d", b"n"]), st.binary(max_size=consoles.DATA_MAX))), st.integers(1, 5000))
def test_frames_are_the_same_however_they_are_delivered(said: list[tuple[bytes, bytes]], step: int) -> None:
    stream = b"".join(consoles.frame(tag, data) for tag, data in said)
    frames = consoles.Frames()
    heard = [item for at in range(0, len(stream), step) for item in frames.feed(stream[at : at + step])]
    assert heard == said


@given(st.binary(max_size=1000))
def test_cells_hold_what_was_typed_and_have_one_length(typed: bytes) -> None:
    stream = consoles.cells(consoles.DATA, typed)
    assert len(stream) == consoles.CELL * -(-len(typed) // consoles.CELL_MAX)
    assert b"".join(payload for _, payload in consoles.open_cells(stream)) == typed


@pytest.mark.parametrize("stream", [b"\0\0dx", b"\xff\xffd", b"\x0f\xffd", consoles.frame(b"d", b"ok") + b"\0\0d"])
def test_what_is_no_frame_is_an_error(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        consoles.Frames().feed(stream)
    with pytest.raises(ProtocolError):
        consoles.frame(b"d", bytes(consoles.DATA_MAX + 1))


def test_a_frame_is_what_a_pipe_takes_whole() -> None:
    assert select.PIPE_BUF == consoles.FRAME
    assert len(consoles.frame(b"d", bytes(consoles.DATA_MAX))) == consoles.FRAME
