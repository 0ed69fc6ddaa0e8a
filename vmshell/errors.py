"""The one family of errors: what a person reads, what a script matches, what `ssh host VERB` returns.

The first paragraph of a class's docstring *is* the sentence shown (its `{fields}` are filled in by the raiser), `code`
is what stands on the wire and never changes, `exit_status` is what a shell sees, `hint` says what to do next.
Here are the family and what root's processes raise; all the others are in `refusals.py`.
Runs in: every process. Stdlib only, no I/O at import.
"""

from __future__ import annotations

# 3 to 6 and 8 are in `refusals.py`, whose classes alone have them.
EX_DONE = 0
EX_REFUSED = 1
EX_USAGE = 2
EX_VM_FAILED = 7
EX_UNAVAILABLE = 69
EX_INTERNAL = 70
EX_INTERRUPTED = 130


def safe(text: object, limit: int = 400) -> str:
    """Return *text* fit for a terminal and a log line: printable characters only, the rest as `\\xNN`.

    Everything that a user, a guest or another machine chose goes through here before a person sees it
    (escape sequences, newlines, bidirectional overrides and lone surrogates become visible text).
    Longer than *limit* characters is cut with `…`.
    """
    shown = [char if char.isprintable() else _escaped(char) for char in str(text)[: limit + 1]]
    return "".join(shown) if len(shown) <= limit else "".join(shown[:limit]) + "…"


def _escaped(char: str) -> str:
    return f"\\x{ord(char):02x}" if char.isascii() else char.encode("ascii", "backslashreplace").decode("ascii")


class VmshellError(Exception):
    """the request was refused"""

    code = "refused"
    exit_status = EX_REFUSED
    hint = ""

    def __init__(self, **fields: object) -> None:
        self.fields = {key: safe(value) for key, value in fields.items()}
        super().__init__(self.sentence())

    def sentence(self) -> str:
        """The one sentence a person reads, its fields escaped."""
        paragraph = (type(self).__doc__ or "").split("\n\n")[0]
        return " ".join(paragraph.split()).format_map(self.fields)

    def advice(self) -> str:
        """What to do next, or an empty string."""
        return self.hint.format_map(self.fields)

    def to_wire(self) -> dict[str, object]:
        """The error as it stands in a reply: `{"code", "text", "hint"}`."""
        return {"code": self.code, "text": self.sentence(), "hint": self.advice()}


class BadValue(VmshellError):
    """{field} is {value}: {rule}"""

    code = "bad-value"
    exit_status = EX_USAGE


class LaunchRefused(VmshellError):
    """the launcher refused it: {problem}"""

    code = "launch-refused"
    exit_status = EX_VM_FAILED
    hint = "the administrator finds the same line in the journal of vmshell-launcher"


class BadPolicy(VmshellError):
    """{path} is not a valid policy: {problem}"""

    code = "bad-policy"
    exit_status = EX_UNAVAILABLE


class ProtocolError(VmshellError):
    """the message was not understood: {problem}"""

    code = "protocol"
    exit_status = EX_INTERNAL


class StrayDescriptors(ProtocolError):
    """the message was not understood: it brings descriptors that nobody asked for"""


class Internal(VmshellError):
    """something went wrong inside vmshell (reference {reference})"""

    code = "internal"
    exit_status = EX_INTERNAL
    hint = "nothing was lost; give the administrator the reference"
