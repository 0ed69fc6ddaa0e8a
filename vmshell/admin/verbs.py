"""A verb of `vmshell-admin`: one row says its words, arguments, help and function; parsing and help come from the row.

An argument line reads as it is printed: `IMAGE` must be given, `[NAME]` may be, `[NAME…]` any number of them,
`[--as NAME]` is an option with a value, `[--yes]` one without.
Runs in: vmshell-admin. Touches nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import safe
from ..layout import Layout
from ..refusals import NotRoot, Usage


@dataclass(frozen=True)
class Context:
    """What a verb works on."""

    layout: Layout

    def say(self, text: str) -> None:
        """One line of progress; standard output stays for the answer."""
        print(safe(text), file=sys.stderr, flush=True)

    def must_be_root(self, what: str) -> None:
        """Refuse early where only root can succeed; one's own layout (`--session`) never needs root."""
        if not self.layout.embedded and os.geteuid() != 0:
            raise NotRoot(what=what)


class Arguments:
    """What was typed after a verb's words."""

    def __init__(self) -> None:
        self._values: dict[str, list[str]] = {}

    def add(self, name: str, value: str) -> None:
        self._values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> str:
        """A required argument, or the last value of an option known to be there."""
        return self._values[name][-1]

    def get(self, name: str, default: str = "") -> str:
        return self._values.get(name, [default])[-1]

    def all(self, name: str) -> list[str]:
        return self._values.get(name, [])

    def flag(self, name: str) -> bool:
        return name in self._values


@dataclass(frozen=True)
class Verb:
    words: str
    line: str
    summary: str
    run: Callable[[Context, Arguments], int | None] = field(compare=False)

    @property
    def usage(self) -> str:
        return f"vmshell-admin {self.words} {self.line}".rstrip()

    def parse(self, args: list[str]) -> Arguments:
        """Return *args* by the names in the argument line, or raise Usage."""
        shape = _Shape(self.line)
        found = Arguments()
        places = list(shape.places)
        only_places = False
        waiting = list(args)
        while waiting:
            word = waiting.pop(0)
            if word == "--" and not only_places:
                only_places = True
            elif word.startswith("--") and not only_places:
                self._option(shape, found, word, waiting)
            elif places:
                found.add(places[0], word)
                if places[0] != shape.many:
                    del places[0]
            else:
                raise Usage(problem=f"{word!r} is one argument too many", usage=self.usage)
        missing = [name for name in shape.required if not found.flag(name)]
        if missing:
            raise Usage(problem=f"{missing[0]} is missing", usage=self.usage)
        return found

    def _option(self, shape: _Shape, found: Arguments, word: str, waiting: list[str]) -> None:
        name, equals, value = word.partition("=")
        if name not in shape.options:
            raise Usage(problem=f"there is no option {name!r} here", usage=self.usage)
        if shape.options[name]:
            if not equals and not waiting:
                raise Usage(problem=f"{name} needs a value", usage=self.usage)
            found.add(name, value if equals else waiting.pop(0))
        elif equals:
            raise Usage(problem=f"{name} takes no value", usage=self.usage)
        else:
            found.add(name, "")


class _Shape:
    """An argument line taken apart."""

    def __init__(self, line: str) -> None:
        self.places: list[str] = []
        self.required: list[str] = []
        self.options: dict[str, bool] = {}  # does it take a value?
        self.many = ""
        for part in line.replace("[--", "\0--").replace("]", "\0").split("\0"):
            if part.strip().startswith("--"):
                name, _, value = part.strip().partition(" ")
                self.options[name] = bool(value)
                continue
            for word in part.split():
                name = word.strip("[]…")
                self.places.append(name)
                if word.endswith("…"):
                    self.many = name
                if not word.startswith("["):
                    self.required.append(name)
