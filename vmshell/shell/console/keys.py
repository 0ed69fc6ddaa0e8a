"""The keys typed at a console: what goes to the guest, and what is a command after the escape key.

Runs in: the shell. Pure.
"""

from __future__ import annotations

# A long run of bytes that came at once was pasted, or is a terminal's answer: an escape key inside it is data (E09).
# Its end is not: on a slow line the escape key may come in one packet with what was typed just before.
TYPED_MAX = 16

DETACH = frozenset(b".dq")
COMMANDS = {
    ord("?"): "help",
    ord("h"): "help",
    ord("r"): "pen",
    ord("w"): "who",
    ord("b"): "break",
    ord("p"): "power",
    ord("s"): "size",
}


def show_key(key: int) -> str:
    """A control character as people write it: `^]`."""
    return f"^{chr(key ^ 0x40)}" if key < 0x20 else chr(key)


class Keys:
    """`feed` bytes; get back a list of data (bytes) and commands (str), in the order typed."""

    def __init__(self, escape: int) -> None:
        self.escape = escape
        self.after_escape = False

    def feed(self, chunk: bytes) -> list[bytes | str]:
        result: list[bytes | str] = []
        data = bytearray()
        last_possible = 0 if len(chunk) <= TYPED_MAX else len(chunk) - 2
        for index, key in enumerate(chunk):
            if self.after_escape:
                self.after_escape = False
                command = self._command(key)
                if command is None:
                    data.append(key)
                    continue
                if data:
                    result.append(bytes(data))
                    data.clear()
                result.append(command)
                if command == "detach":
                    # What follows was typed for the prompt.
                    rest = chunk[index + 1 :]
                    return [*result, rest] if rest else result
            elif key == self.escape and index >= last_possible:
                self.after_escape = True
            else:
                data.append(key)
        if data:
            result.append(bytes(data))
        return result

    def _command(self, key: int) -> str | None:
        """The command of a key, `unknown` for a key that is none, None for the escape key itself (data)."""
        if key == self.escape:
            return None
        if key == 0x1B or key >= 0x80:
            return "cancel"
        lower = ord(chr(key).lower())
        # The same keys with Ctrl still held down: `^A ^D` is what fingers do.
        plain_key = key | 0x60 if key < 0x20 else lower
        if plain_key in DETACH:
            return "detach"
        return COMMANDS.get(plain_key, "unknown")
