"""The wire: what a packet may hold, and that everything else is one ProtocolError and no leak. Threat rows D01-D08."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmshell import encoding, packets, wire
from vmshell.errors import ProtocolError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        yield left, right


def test_the_documented_packet_is_what_is_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    wire.send(pair[0], {"id": 1, "verb": "boot", "vm": "web1"})
    documented = [line.strip() for line in (packets.__doc__ or "").splitlines() if line.strip().startswith("7b 22")]
    assert pair[1].recv(100) == bytes.fromhex("".join(documented))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="D04-not-an-object"),
        pytest.param(b'{"a":NaN}', id="D04-nan"),
        pytest.param(b'{"a":Infinity}', id="D04-infinity"),
        pytest.param(b'{"a":1e999}', id="D04-overflowing-float"),
        pytest.param(b'{"a":1.5}', id="D04-float"),
        pytest.param(b'{"a":' + b"9" * 5000 + b"}", id="D04-5000-digits"),
        pytest.param(b'{"a":9007199254740993}', id="D04-beyond-2**53"),
        pytest.param(b'{"a":1_000}', id="D04-underscore"),
        pytest.param('{"a":１２}'.encode(), id="D04-fullwidth-digits"),
        pytest.param(b'{"a":1,"a":2}', id="D05-twice"),
        pytest.param(b'{"b":{"a":1,"a":2}}', id="D05-twice-inside"),
        pytest.param(b'{"a":"\\ud800"}', id="D06-half-a-surrogate-pair"),
        pytest.param(b'{"a":"\\u0000"}', id="D06-escaped-nul"),
        pytest.param(b'{"a":"\x00"}', id="D06-nul"),
        pytest.param(b'{"a":"\xff"}', id="D06-not-utf8"),
        pytest.param(b"[" * 60_000, id="D03-deep-open"),
        pytest.param(b'{"a":' + b"[" * 17 + b"]" * 17 + b"}", id="D03-17-deep"),
        pytest.param(b'{"a":"' + b"x" * encoding.FRAME_MAX + b'"}', id="D01-oversized"),
        pytest.param(b'{"a":1} {', id="trailing"),
    ],
)
def test_hostile_packets_are_protocol_errors(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        encoding.decode(data)


def test_brackets_inside_strings_are_not_depth() -> None:
    assert encoding.decode(b'{"a":"' + b"[{" * 500 + b'\\"["}')["a"] == "[{" * 500 + '"['


def test_sixteen_deep_is_allowed() -> None:
    assert encoding.decode(b'{"a":' + b"[" * 15 + b"]" * 15 + b"}")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('abc\\"é', max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text("xyz", max_size=3), JSON, max_size=5))
def test_what_is_encoded_is_decoded(body: dict[str, object]) -> None:
    data = json.dumps(body).encode()
    if encoding._depth(data) <= encoding.DEPTH_MAX:
        assert encoding.decode(encoding.encode(body)) == body


@settings(max_examples=2000)
@given(st.binary(max_size=200) | st.text('{}[]",:\\u0129eE.-+ntf ', max_size=60).map(str.encode))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    try:
        assert isinstance(encoding.decode(data), dict)
    except ProtocolError:
        pass


def test_a_stray_descriptor_is_closed_and_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """D07, D08: not asked for, so closed; asked for, so close-on-exec."""
    with open(os.devnull, "rb") as file:
        before = set(os.listdir("/proc/self/fd"))
        wire.send(pair[0], {"a": 1}, (file.fileno(), file.fileno()))
        with pytest.raises(ProtocolError):
            wire.recv(pair[1])
        assert set(os.listdir("/proc/self/fd")) == before
        wire.send(pair[0], {"a": 1}, (file.fileno(),))
        packet = wire.recv(pair[1], fds_allowed=1)
        assert packet is not None
        taken = packet.take_fd()
        assert not os.get_inheritable(taken)
        os.close(taken)


def test_a_flood_of_descriptors_is_cut_and_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """D07: more than fit beside a packet sets MSG_CTRUNC; none of those that did fit stays open."""
    with open(os.devnull, "rb") as file:
        before = len(os.listdir("/proc/self/fd"))
        many = array.array("i", [file.fileno()] * 200)
        pair[0].sendmsg([b"{}"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
        with pytest.raises(ProtocolError):
            wire.recv(pair[1], fds_allowed=1)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_packet_larger_than_the_buffer_is_refused_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].send(b'{"a":"' + b"x" * (encoding.FRAME_MAX + 10) + b'"}')
    with pytest.raises(ProtocolError):
        wire.recv(pair[1])
    wire.send(pair[0], {"next": 1})
    packet = wire.recv(pair[1])
    assert packet is not None
    assert packet.body == {"next": 1}


def test_the_peer_is_who_the_kernel_says(pair: tuple[socket.socket, socket.socket]) -> None:
    assert wire.peer_uid(pair[0]) == os.geteuid()


def test_too_large_an_answer_is_refused_before_it_is_sent() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        encoding.encode({"a": "x" * encoding.FRAME_MAX})


def test_a_process_without_the_json_module_refuses_the_same() -> None:
    """Our processes import the scanner below `json`, not `json`; its errors must not depend on who else imported that."""
    frames = ['{"a":"\x01"}', "{", '{"a":00}', '{"a":1', '{"a" 1}', '{"a":"\\x"}', '{"a":"', "[", '{"a":1,}', "nul"]
    program = (
        f"import sys; sys.path.insert(0, {os.path.dirname(os.path.dirname(wire.__file__))!r})\n"
        "from vmshell import encoding\n"
        "from vmshell.errors import ProtocolError\n"
        "assert 'json' not in sys.modules\n"
        f"for frame in {frames!r}:\n"
        "    try: encoding.decode(frame.encode())\n"
        "    except ProtocolError: continue\n"
        "    raise AssertionError(frame)\n"
    )
    subprocess.run([sys.executable, "-IS", "-c", program], check=True, timeout=60)


def test_what_a_peer_said_before_it_hung_up_is_heard(pair: tuple[socket.socket, socket.socket]) -> None:
    """A refusal at accept: the peer closes with our request unread, which the kernel reports as a reset first."""
    wire.send(pair[0], {"id": 1, "verb": "list"})
    wire.send(pair[1], {"id": 0, "error": {"code": "not-allowed"}})
    pair[1].close()
    packet = wire.recv(pair[0])
    assert packet is not None
    assert packet.body["id"] == 0
    assert wire.recv(pair[0]) is None
