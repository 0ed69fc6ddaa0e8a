"""What a guest prints, made safe for a person's terminal (rule R21, threats E01 to E05): a strict list of what may pass.

Passes: text (UTF-8), CR LF BS TAB BEL, shifts between two character sets, colours, cursor motion, erasing, scrolling,
margins, and a few modes (alternate screen, cursor, wrapping, keypad, bracketed paste). Everything else is left out: whatever
makes a terminal *type* an answer (DA, DSR, DECRQSS, ENQ, window reports), titles and clipboard (OSC), device strings (DCS, APC,
PM, SOS), printing, 8-bit control characters, mouse modes, keyboard locking. What passes as modes is remembered, for `reset`.
Runs in: the shell. Pure.
"""

from __future__ import annotations

import codecs
import re

_PLAIN = bytes(range(0x20, 0x7F)) + b"\a\b\t\n\r\x0e\x0f"
_TEXT = re.compile("[^\x00-\x1f\x7f-\x9f]+|[\a\b\t\n\r\x0e\x0f]+")
_CSI = re.compile("([<-?]?)([0-9:;]*)([ -/]*)([@-~])")

_CSI_FINALS = frozenset("@ABCDEFGHIJKLMPSTXZ`abdefgmrsu")
_MODES = frozenset(("1", "6", "7", "12", "25", "47", "66", "1047", "1048", "1049", "2004"))
_ALTERNATE = ("1049", "1047", "47")
_ESC_FINALS = frozenset("78DEMHc=>")
_CHARSETS = frozenset("0AB12")

CSI_MAX = 96  # characters of one control sequence
NUMBER_MAX = 5  # digits of a parameter: repeat this character 999999999 times, please
STRING_MAX = 4096  # characters an unterminated OSC, APC, PM or SOS may swallow
DCS_MAX = 65536

GROUND, ESCAPE, CHARSET, CSI, STRING = range(5)


class Filter:
    """`feed` bytes as they come, in pieces of any size; get back the bytes that may reach the terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole = True  # no half character in the decoder
        self._state = GROUND
        self._held = ""  # of the sequence that is not complete yet
        self._swallowed = 0
        self._string_max = STRING_MAX
        self.modes: set[str] = set()  # what was switched on and is still: DEC numbers, "margins", "insert", "keypad"

    def feed(self, data: bytes) -> bytes:
        if self._state == GROUND and self._whole and not data.translate(None, _PLAIN):
            return data
        text = self._decoder.decode(data)
        self._whole = not self._decoder.getstate()[0]
        out: list[str] = []
        at = 0
        while at < len(text):
            at = self._STEPS[self._state](self, text, at, out)
        return "".join(out).encode("utf-8")

    def reset(self) -> bytes:
        """What puts the terminal back to sane modes (E05), without moving the cursor where that can be helped."""
        off = "\x0f\x1b(B\x1b)B\x1b[0m\x1b[?25h\x1b[?7h\x1b[?1l\x1b>\x1b[4l\x1b[?2004l"
        if "margins" in self.modes or "6" in self.modes:
            off = "\x1b[?6l\x1b7\x1b[r\x1b8" + off
        for mode in _ALTERNATE:
            if mode in self.modes:
                off = f"\x1b[?{mode}l" + off
        self.modes.clear()
        self._state, self._held = GROUND, ""
        return off.encode("ascii")

    # --- one method per state; each takes what it can from text[at:] and returns where it stopped -------------------

    def _ground(self, text: str, at: int, out: list[str]) -> int:
        match = _TEXT.match(text, at)
        if match:
            out.append(match.group())
            return match.end()
        if text[at] == "\x1b":
            self._state = ESCAPE
        return at + 1  # every other control character is left out

    def _escape(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        self._state = GROUND
        if char == "[":
            self._state, self._held = CSI, ""
        elif char in "]PX^_":
            self._state, self._swallowed = STRING, 0
            self._held = char
            self._string_max = DCS_MAX if char == "P" else STRING_MAX
        elif " " <= char <= "/":
            self._state, self._held = CHARSET, char
        elif char in _ESC_FINALS:
            self._keypad(char)
            out.append("\x1b" + char)
        elif not "0" <= char <= "~":
            return at  # not part of a sequence: ESC alone is left out, the character stands for itself
        return at + 1

    def _keypad(self, char: str) -> None:
        if char == "=":
            self.modes.add("keypad")
        elif char == ">":
            self.modes.discard("keypad")
        elif char == "c":
            self.modes.clear()

    def _charset(self, text: str, at: int, out: list[str]) -> int:
        """`ESC ( B` and its kind; other intermediates (7/8-bit controls, UTF-8 off, double height) are left out."""
        char = text[at]
        if " " <= char <= "/" and len(self._held) < 4:
            self._held += char
            return at + 1
        self._state = GROUND
        if not "0" <= char <= "~":
            return at
        if self._held in ("(", ")") and char in _CHARSETS:
            out.append(f"\x1b{self._held}{char}")
        return at + 1

    def _csi(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        if "@" <= char <= "~":
            self._state = GROUND
            if len(self._held) < CSI_MAX:
                out.append(self._judge(self._held + char))
            return at + 1
        if not " " <= char <= "?" or len(self._held) > 8 * CSI_MAX:
            self._state = GROUND
            return at
        self._held += char
        return at + 1

    def _judge(self, sequence: str) -> str:
        """The sequence after `ESC [` if it may pass (of several modes: those that may), else nothing."""
        match = _CSI.fullmatch(sequence)
        if match is None:
            return ""
        private, parameters, intermediates, final = match.groups()
        numbers = parameters.replace(":", ";").split(";")
        if any(len(number) > NUMBER_MAX for number in numbers):
            return ""
        if private == "?" and not intermediates and final in "hl":
            return self._private_modes(parameters, final)
        if private:
            return ""
        if intermediates:
            return "\x1b[!p" if intermediates == "!" and final == "p" else ""
        if final in "hl":
            if parameters != "4":
                return ""
            self._remember("insert", final)
        elif final not in _CSI_FINALS or (final in "su" and parameters) or (final == "T" and len(numbers) > 1):
            return ""  # `s` with numbers sets side margins, `T` with five starts mouse tracking
        elif final == "b" and len(parameters) > 4:
            return ""
        elif final == "r":
            self._remember("margins", "h" if parameters.strip(";") else "l")
        return "\x1b[" + sequence

    def _private_modes(self, parameters: str, final: str) -> str:
        kept = [mode for mode in parameters.split(";") if mode in _MODES]
        for mode in kept:
            self._remember(mode, final)
        return f"\x1b[?{';'.join(kept)}{final}" if kept else ""

    def _remember(self, mode: str, final: str) -> None:
        if final == "h":
            self.modes.add(mode)
        else:
            self.modes.discard(mode)

    def _string(self, text: str, at: int, out: list[str]) -> int:
        """Inside OSC, DCS, APC, PM or SOS: nothing passes until it ends, or until it is clearly never going to."""
        char = text[at]
        self._swallowed += 1
        if char == "\x1b":
            self._state = ESCAPE  # `ESC \\` ends it (and is left out there); any other sequence ends it too
        elif char in "\a\x18\x1a\x9c" or self._swallowed > self._string_max:
            self._state = GROUND
        elif char in "\r\n" and self._held != "P":
            self._state = GROUND  # only a cut-off one meets a line end: do not swallow the lines that follow
            return at
        return at + 1

    _STEPS = (_ground, _escape, _charset, _csi, _string)


_SEQUENCE = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|[()][0-9A-B]|[0-~])|[\x00-\x08\x0b-\x1f\x7f]")


def plain(filtered: bytes) -> str:
    """The text alone of what a Filter let through: what `boot --wait` searches."""
    return _SEQUENCE.sub("", filtered.decode("utf-8", "replace"))
