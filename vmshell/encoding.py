"""A packet's bytes and the one JSON object in them. What comes in is hostile (rule R12): see `packets.py`.

Runs in: every process. Stdlib only, no I/O.
"""

from __future__ import annotations

# Not `json`, but the C module below it: that one brings `re` and `enum` (bench P1).
from _json import encode_basestring, encode_basestring_ascii, make_encoder, make_scanner

from .errors import ProtocolError

FRAME_MAX = 64 * 1024
DEPTH_MAX = 16
INT_MAX = 1 << 53


def encode(body: dict[str, object]) -> bytes:
    """Return the packet of *body*, or raise ProtocolError when it would be too large to receive."""
    data = "".join(_ASCII(body, 0)).encode("ascii")
    if len(data) > FRAME_MAX:
        raise ProtocolError(problem=f"it has {len(data)} bytes and the limit is {FRAME_MAX}")
    return data


def decode(data: bytes) -> dict[str, object]:
    """Return the object in *data*, or raise ProtocolError naming what is wrong with it."""
    if len(data) > FRAME_MAX:
        raise ProtocolError(problem=f"it is larger than {FRAME_MAX} bytes")
    try:
        text = data.decode("utf-8").strip(" \t\n\r")
        body, end = _scan(text, 0)
        if end != len(text):
            raise ValueError("something follows the object")
        if data.count(b"{") + data.count(b"[") > DEPTH_MAX and _depth(body) > DEPTH_MAX:
            raise ProtocolError(problem=f"it is nested deeper than {DEPTH_MAX}")
        if b"\\u" in data:
            # Escapes can smuggle in what UTF-8 cannot hold; encoding again finds it before it is stored anywhere.
            "".join(_UNICODE(body, 0)).encode("utf-8")
            if b"\\u0000" in data:
                raise ProtocolError(problem="it holds a NUL character")
    except (ValueError, RecursionError, StopIteration, SystemError) as exc:
        # SystemError: the scanner's way to be without `json.decoder`, whose exception it looks for in what is imported.
        raise ProtocolError(problem="it is not JSON as agreed") from exc
    if not isinstance(body, dict):
        raise ProtocolError(problem="it is not an object")
    return body


def _depth(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key stands there twice")
    return body


def _whole(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > INT_MAX:
        raise ValueError("an integer beyond 2**53")
    return int(text)


def _refuse(text: str) -> object:
    raise ValueError(f"{text[:20]} is no integer")


def _no_json(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no JSON")


class _Rules:
    """What the scanner reads from `json.JSONDecoder` otherwise."""

    strict = True
    object_hook = None
    object_pairs_hook = _no_duplicates
    parse_int = _whole
    parse_float = _refuse
    parse_constant = _refuse


_ASCII = make_encoder(None, _no_json, encode_basestring_ascii, None, ":", ",", False, False, True)
_UNICODE = make_encoder(None, _no_json, encode_basestring, None, ":", ",", False, False, True)
_scan = make_scanner(_Rules)  # type: ignore[arg-type]
