"""One line of text to one request: words, quotes, options. Nothing is ever expanded and no other language is near (rule R20).

    line   = word { blank word }
    word   = { plain character | \\character | 'text' | "text" }     in "text" a backslash stands before " and \\ only

`;`, `|`, `&`, `$`, `*`, `~` mean nothing here: they are characters, and a word with them is no verb and no name.
Runs in: the shell. Pure functions.
"""

from __future__ import annotations

from ..errors import BadName, BadValue, UnknownVerb, Usage, VmshellError, safe
from ..names import MIB, check_name, check_object, check_vm_ref, nearest, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .verbs import Option, Verb

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
    options = {option.name: option for option in verb.options}
    queue = words[1:]
    only_arguments = False
    while queue:
        word = queue.pop(0)
        if only_arguments or not word.text.startswith("-") or word.text == "-":
            given.append(word)
        elif word.text == "--":
            only_arguments = True
        else:
            _option(word, queue, options, values, verb)
    _arguments(given, verb, values)
    for option in verb.options:
        if option.required and option.name not in values:
            raise Usage(problem=f"{verb.name} needs --{option.name} {option.metavar}", usage=verb.usage())
    return Request(verb, Values(values))


def _option(word: Word, queue: list[Word], options: dict[str, Option], values: dict[str, object], verb: Verb) -> None:
    name, equals, value = word.text.removeprefix("--").partition("=")
    option = options.get(name) if word.text.startswith("--") else None
    if option is None:
        near = nearest(name, options)
        also = f"; did you mean --{near}?" if near else ""
        raise Pointed(f"{verb.name} has no option {safe(word.text, 40)}{also}", word.column, verb.usage())
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


# --- values ----------------------------------------------------------------------------------------------------------


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise BadValue(field=name, value=safe(text, 40), rule="a whole number")
    return int(text)


def _seconds(text: str, name: str) -> int:
    number = _number(text.removesuffix("s"), name)
    if not 1 <= number <= 3600:
        raise BadValue(field=name, value=safe(text, 40), rule="seconds from 1 to 3600")
    return number


def _mebibytes(text: str, name: str) -> int:
    size = parse_size(text, name)
    if size % MIB:
        raise BadValue(field=name, value=safe(text, 40), rule="whole mebibytes, like 512M or 2G")
    return size // MIB


def escape_key(text: str, name: str = "--escape") -> int:
    """The byte of `^X` (or of that very control character)."""
    if len(text) == 2 and text[0] == "^" and "@" <= text[1].upper() <= "_":
        return ord(text[1].upper()) & 0x1F
    if len(text) == 1 and text < " ":
        return ord(text)
    raise BadValue(field=name, value=safe(text, 40), rule="a control key like ^A or ^]")


def _vm(text: str, name: str) -> str:
    return check_vm_ref(text)


def _new_vm(text: str, name: str) -> str:
    return check_name(text)


def _image(text: str, name: str) -> str:
    return check_name(text, "image")


def _text(text: str, name: str) -> str:
    return text


def _assignment(text: str, name: str) -> str:
    if not text.partition("=")[1]:
        raise BadValue(field=safe(text, 60), value="a key alone", rule="KEY=VALUE, like memory=1G")
    return text


def split_object(text: str) -> tuple[str, str]:
    """`web1.kernel` as VM (or `shelf`) and object; the VM's part may have its owner before it."""
    where, dot, name = text.partition(".")
    if not dot:
        raise BadValue(field="OBJECT", value=safe(text, 60), rule="VM.OBJECT or shelf.OBJECT, like web1.kernel")
    return check_vm_ref(where), check_object(name)


def _object(text: str, name: str) -> str:
    split_object(text)
    return text


def _vm_or_object(text: str, name: str) -> str:
    return _object(text, name) if "." in text else check_vm_ref(text)


def _object_name(text: str, name: str) -> str:
    return check_object(text)


def _add(text: str, name: str) -> str:
    if text != "add":
        raise BadValue(field="disk", value=safe(text, 40), rule="`disk add NAME OBJECT --size SIZE` is what there is")
    return text


def _dash(text: str, name: str) -> str:
    if text != "-":
        raise BadValue(field=name, value=safe(text, 40), rule="-, which is standard input; vmshell opens no files")
    return text


CHECKS: dict[str, Callable[[str, str], object]] = {
    "vm": _vm,
    "new-vm": _new_vm,
    "image": _image,
    "number": _number,
    "seconds": _seconds,
    "mebibytes": _mebibytes,
    "key": escape_key,
    "assignment": _assignment,
    "object": _object,
    "object-name": _object_name,
    "vm-or-object": _vm_or_object,
    "add": _add,
    "dash": _dash,
    "text": _text,
}


def looks_like_vm(text: str) -> bool:
    """Whether a lone word may be meant as `console WORD`."""
    try:
        check_vm_ref(text)
    except (BadName, VmshellError):
        return False
    return True
