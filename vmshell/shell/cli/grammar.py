"""One line of text to one request: words, quotes, options. Nothing is ever expanded and no other language is near (rule R20).

    line   = word { blank word }
    word   = { plain character | \\character | 'text' | "text" }     in "text" a backslash stands before " and \\ only

`;`, `|`, `&`, `$`, `*`, `~` mean nothing here: they are characters, and a word with them is no verb and no name.
Runs in: the shell. Pure functions.
"""

from __future__ import annotations

from ...errors import VmshellError, safe
from ...names import check_vm_ref, nearest
from ...refusals import BadName, UnknownVerb, Usage
from .values import CHECKS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..context import Context

LINE_MAX = 4096  # bytes (A29)
SHAPE = "VERB [NAME] [--OPTION VALUE]"


class Pointed(Usage):
    """{problem} (column {column})"""

    # Knows where in the line the trouble is, so that a terminal can be shown a `^` below it.
    def __init__(self, problem: str, column: int, usage: str = SHAPE) -> None:
        self.column = column
        super().__init__(problem=problem, column=column, usage=usage)


class UnknownVerbNear(UnknownVerb):
    """there is no verb {verb!r}"""

    hint = "did you mean `{near}`? `help` lists the verbs"


class Word:
    """One word of the line and the column (from 1) where it starts."""

    __slots__ = ("column", "text")

    def __init__(self, text: str, column: int) -> None:
        self.text = text
        self.column = column

    def __repr__(self) -> str:
        return f"Word({self.text!r}, {self.column})"


class Values:
    """The arguments and options of one request, already checked; options not given are absent."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values

    def text(self, name: str) -> str:
        return str(self._values[name])

    def optional(self, name: str) -> str | None:
        value = self._values.get(name)
        return value if isinstance(value, str) else None

    def number(self, name: str, default: int) -> int:
        value = self._values.get(name, default)
        assert isinstance(value, int)
        return value

    def flag(self, name: str) -> bool:
        return name in self._values

    def words(self, name: str) -> list[str]:
        """What stands for an argument that may come many times."""
        value = self._values.get(name, [])
        assert isinstance(value, list)
        return value


class Request:
    """A verb of the table and what it was given."""

    __slots__ = ("values", "verb")

    def __init__(self, verb: Verb, values: Values) -> None:
        self.verb = verb
        self.values = values


def words_of(line: str) -> list[Word]:
    """Split *line* into words, or raise Pointed at what is wrong."""
    size = len(line.encode("utf-8", "surrogatepass"))
    if size > LINE_MAX:
        raise Usage(problem=f"the request has {size} bytes and the limit is {LINE_MAX}", usage=SHAPE)
    words: list[Word] = []
    at = 0
    while at < len(line):
        if line[at] in " \t":
            at += 1
        else:
            text, end = _one_word(line, at)
            words.append(Word(text, at + 1))
            at = end
    return words


def _one_word(line: str, start: int) -> tuple[str, int]:
    parts: list[str] = []
    at = start
    while at < len(line) and line[at] not in " \t":
        char = line[at]
        if char in "\n\r":
            # `list\nrm web1` is not two requests, whatever put the line break there (A38).
            raise Pointed("a request is one line; here is a line break", at + 1)
        if char in "'\"":
            text, at = _quoted(line, at)
            parts.append(text)
        elif char == "\\":
            if at + 1 == len(line):
                raise Pointed("the line ends after a backslash", at + 1)
            parts.append(line[at + 1])
            at += 2
        else:
            parts.append(char)
            at += 1
    return "".join(parts), at


def _quoted(line: str, start: int) -> tuple[str, int]:
    quote = line[start]
    parts: list[str] = []
    at = start + 1
    while at < len(line):
        char = line[at]
        if char == quote:
            return "".join(parts), at + 1
        if char in "\n\r":
            raise Pointed("a request is one line; here is a line break", at + 1)
        if char == "\\" and quote == '"' and line[at + 1 : at + 2] in ('"', "\\"):
            at += 1
            char = line[at]
        parts.append(char)
        at += 1
    raise Pointed(f"the quote {quote} is not closed", start + 1)


def as_words(texts: list[str]) -> list[Word]:
    """Words that were already separate arguments of the program."""
    words = []
    column = 1
    for text in texts:
        words.append(Word(text, column))
        column += len(text) + 1
    if column - 1 > LINE_MAX:
        raise Usage(problem=f"the request has {column - 1} bytes and the limit is {LINE_MAX}", usage=SHAPE)
    return words


def parse(words: list[Word], verb: Verb) -> Request:
    """Check the words after the verb against its row of the table."""
    values: dict[str, object] = {}
    if verb.raw:
        # What follows has a grammar of its own (QEMU's options, another request): it is not ours to judge.
        return Request(verb, Values({verb.arguments[0].name: [word.text for word in words[1:]]}))
    given: list[Word] = []
    verbatim_after = len(verb.arguments) - 1 if verb.hands_on else LINE_MAX
    queue = words[1:]
    only_arguments = False
    while queue:
        word = queue.pop(0)
        if only_arguments or not word.text.startswith("-") or word.text == "-":
            given.append(word)
            only_arguments = only_arguments or len(given) > verbatim_after
        elif word.text == "--":
            only_arguments = True
        else:
            _option(word, queue, values, verb)
    _arguments(given, verb, values)
    for option in verb.options:
        if option.required and option.name not in values:
            raise Usage(problem=f"{verb.name} needs --{option.name} {option.metavar}", usage=verb.usage())
    return Request(verb, Values(values))


def _option(word: Word, queue: list[Word], values: dict[str, object], verb: Verb) -> None:
    text, equals, value = word.text.partition("=") if word.text.startswith("--") else (word.text, "", "")
    option = next((each for each in verb.options if text in each.spellings()), None)
    if option is None:
        near = nearest(text.removeprefix("--"), [each.name for each in verb.options])
        also = f"; did you mean --{near}?" if near else ""
        raise Pointed(f"{verb.name} has no option {safe(word.text, 40)}{also}", word.column, verb.usage())
    name = option.name
    if name in values:
        raise Pointed(f"--{name} stands there twice", word.column, verb.usage())
    if option.kind == "flag":
        if equals:
            raise Pointed(f"--{name} takes no value", word.column, verb.usage())
        values[name] = True
        return
    if not equals:
        if not queue:
            raise Pointed(f"--{name} needs a value", word.column, verb.usage())
        value = queue.pop(0).text
    values[name] = CHECKS[option.kind](value, f"--{name}")


def _arguments(given: list[Word], verb: Verb, values: dict[str, object]) -> None:
    last = verb.arguments[-1] if verb.arguments and verb.arguments[-1].many else None
    if last is not None:
        rest = given[len(verb.arguments) - 1 :]
        given = given[: len(verb.arguments)]
        values[last.name] = [CHECKS[last.kind](word.text, last.name) for word in rest]
    if len(given) > len(verb.arguments):
        extra = given[len(verb.arguments)]
        raise Pointed(f"{safe(extra.text, 40)!r} is one word too many for {verb.name}", extra.column, verb.usage())
    for argument, word in zip(verb.arguments, given, strict=False):
        if argument.many:
            continue
        values[argument.name] = CHECKS[argument.kind](word.text, argument.name)
    for argument in verb.arguments[len(given) :]:
        if not argument.optional:
            raise Usage(problem=f"{verb.name} needs {argument.metavar}", usage=verb.usage())


# --- rows of the table of verbs -----------------------------------------------------------------------------------------


class Argument:
    """A word that stands after the verb. *kind* is a row of `checks.CHECKS` (and tells completion what to offer).

    Only the last one may be *many*: one word or more.
    """

    __slots__ = ("kind", "many", "metavar", "name", "optional")

    def __init__(self, name: str, kind: str = "vm", *, metavar: str = "NAME", optional: bool = False, many: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.metavar = metavar + ("…" if many else "")
        self.optional = optional
        self.many = many


class Option:
    """`--name` (a flag), `--name VALUE` or `--name=VALUE`; with *short* also `-x` or `-x VALUE`."""

    __slots__ = ("help", "kind", "metavar", "name", "required", "short")

    def __init__(self, name: str, kind: str, metavar: str, help: str, *, required: bool = False, short: str = "") -> None:
        self.name = name
        self.kind = kind
        self.metavar = metavar
        self.help = help
        self.required = required
        self.short = short

    def spellings(self) -> list[str]:
        """How it may be written, the short way first."""
        return [*([f"-{self.short}"] if self.short else []), f"--{self.name}"]

    def usage(self) -> str:
        text = f"{self.spellings()[0]} {self.metavar}".rstrip()
        return text if self.required else f"[{text}]"


def flag(name: str, help: str, *, short: str = "") -> Option:
    return Option(name, "flag", "", help, short=short)


class Verb:
    """One row. *raw*: everything behind the verb is handed over as it is, as the one argument.

    With *hands_on* the last argument is somebody else's command: from its first word on nothing is an option of ours.
    """

    __slots__ = ("aliases", "arguments", "detail", "hands_on", "help", "hidden", "name", "options", "raw", "run")

    def __init__(
        self,
        name: str,
        aliases: str,
        arguments: tuple[Argument, ...],
        options: tuple[Option, ...],
        help: str,
        detail: str,
        run: Callable[[Context, Values], int],
        *,
        hidden: bool = False,
        raw: bool = False,
        hands_on: bool = False,
    ) -> None:
        self.name = name
        self.aliases = tuple(aliases.split())
        self.arguments = arguments
        self.options = options
        self.help = help
        self.detail = detail
        self.run = run
        self.hidden = hidden
        self.raw = raw
        self.hands_on = hands_on

    def usage(self) -> str:
        words = [self.name]
        words += [f"[{argument.metavar}]" if argument.optional else argument.metavar for argument in self.arguments]
        words += [option.usage() for option in sorted(self.options, key=lambda option: not option.required)]
        return " ".join(words)


def looks_like_vm(text: str) -> bool:
    """Whether a lone word may be meant as `console WORD`."""
    try:
        check_vm_ref(text)
    except (BadName, VmshellError):
        return False
    return True
