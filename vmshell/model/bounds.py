"""How much of everything the text of a definition may hold, looked at in one pass before anybody reads it as TOML.

A person sends up to 32 KiB, and Python's reader takes time that grows with the square of the parts of a dotted key (5 s for one
of 16,000), and stack for nesting. So each is counted first, and refused with its line. The pass follows strings and comments as
TOML does, else a quote would hide what comes behind it; what is no TOML at all is left to the reader to say.
Used by: broker, shell, admin. Pure.
"""

from __future__ import annotations

import re

from ..errors import BadValue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

LINES_MAX = 4096
TABLES_MAX = 128  # [sections], [[disk]]s and [[net]]s
KEYS_MAX = 128  # of one table
PARTS_MAX = 8  # of a dotted key
DEPTH_MAX = 8  # of lists and inline tables within each other
WORD_MAX = 64  # characters of a number or a key without quotes

_TOKEN = re.compile(r"""[\n#"'\[\]{}.=,]|[^\s#"'\[\]{}.=,]+""")
_END_OF_BASIC = re.compile(r'\\.|["\n]', re.DOTALL)
_END_OF_LONG_BASIC = re.compile(r'\\.|"""', re.DOTALL)


def check_bounds(text: str) -> None:
    """Raise BadValue, with its line, if *text* holds more than a definition ever needs."""
    _Pass(text).run()


class _Pass:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0  # the character to look at next
        self._line = 1
        self._tables = 0
        self._keys = [0]  # of the section, and of each list and inline table that is open in it
        self._parts = 1
        self._in_value = False

    def run(self) -> None:
        while token := _TOKEN.search(self._text, self._at):
            self._at = token.end()
            found = token[0]
            if found in "\"'":
                self._skip_string(token.start(), found)
            elif found == "#":
                self._skip_to(self._text.find("\n", self._at))
            elif found == ".":
                self._count("a key there", self._parts + 1, PARTS_MAX, "parts")
                self._parts += 1
            elif len(found) > 1 or found not in "\n[]{}=,":
                self._count("a number or key there", len(found), WORD_MAX, "characters")
            else:
                self._parts = 1
                self._take_mark(found)

    def _take_mark(self, mark: str) -> None:
        if mark == "\n":
            self._line += 1
            self._count("the text", self._line, LINES_MAX, "lines")
            self._in_value = self._in_value and len(self._keys) > 1
        elif mark == "=":
            self._keys[-1] += 1
            self._count("its table", self._keys[-1], KEYS_MAX, "keys")
            self._in_value = True
        elif mark == "[" and not self._in_value:
            self._begin_section()
        elif mark in "[{":
            self._keys.append(0)
            self._count("a value there", len(self._keys) - 1, DEPTH_MAX, "levels of nesting")
        elif mark in "]}" and len(self._keys) > 1:
            self._keys.pop()

    def _begin_section(self) -> None:
        self._at += self._text.startswith("[", self._at)
        self._tables += 1
        self._count("the text", self._tables, TABLES_MAX, "sections")
        self._keys = [0]

    def _skip_string(self, start: int, quote: str) -> None:
        """Go behind the string that begins at *start*; one that does not end is the reader's to refuse, who stops there."""
        text, long = self._text, self._text.startswith(quote * 3, start)
        begin = start + (3 if long else 1)
        if quote == "'":
            end = text.find("'''" if long else "'", begin)
            end += 0 if end < 0 else 3 if long else 1
        else:
            marks = (_END_OF_LONG_BASIC if long else _END_OF_BASIC).finditer(text, begin)
            end = next((mark.end() for mark in marks if mark[0][0] != "\\"), -1)
        for _ in range(2):  # of four or five quotes at the end one or two are in the string
            end += long and end >= 0 and text.startswith(quote, end)
        newlines = text.count("\n", start, end if end >= 0 else len(text))
        if newlines and not long:
            end = -1
        self._line += newlines
        self._count("the text", self._line, LINES_MAX, "lines")
        self._skip_to(end)

    def _skip_to(self, at: int) -> None:
        self._at = at if at >= 0 else len(self._text)

    def _count(self, what: str, number: int, most: int, of: str) -> None:
        if number > most:
            self._refuse(f"{what} has more than {most} {of}")

    def _refuse(self, rule: str) -> NoReturn:
        raise BadValue(field=f"line {self._line} of vm.toml", value="too much", rule=rule)
