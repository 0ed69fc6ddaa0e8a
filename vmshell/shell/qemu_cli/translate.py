"""The secure wrapper: QEMU's options as people type them, of 2007 and of today, read into a definition.

Nothing that was typed ever reaches QEMU: each option is understood here, becomes keys of a `vm.toml`, and the broker checks that
like any other definition. What is not understood, or not a person's to say, is refused by name, with the reason and what there is
instead; every refusal is shown, and one is enough to stop.
Runs in: the shell, for the verb `kvm` alone (imported by it). Pure functions.
"""

from __future__ import annotations

from functools import partial

from ...errors import VmshellError, safe
from ...model.definition import from_table
from ...names import check_name, nearest
from ..cli.help import wrap
from .handlers import HANDLERS, Reading
from .options import ALLOWED, DENIED, OPTIONS, POSITIONAL, SHOWN, UNUSED, Option
from .words import Given, Refused, Row

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    Table = dict[str, object]

__all__ = ["Row", "Translation", "explain_table", "refusal_lines", "translate"]

UNKNOWN = "QEMU has no such option that this table knows"
IN_2007 = {
    DENIED: "within your limits; in 2007 the administrator's alone",
    UNUSED: "not used in 2007",
}
OPTION_SHOWN = 60  # characters of an option that a line shows


class Translation:
    """What a command line means: a definition's tables, a row for each option, and our own wishes (--save, --explain)."""

    __slots__ = ("explain", "implied", "name", "rows", "save", "table")

    def __init__(self) -> None:
        self.table: Table = {}
        self.rows: list[Row] = []
        self.save: str | None = None
        self.name = ""  # what -name or --name said
        self.explain = False
        self.implied: list[str] = []  # what QEMU, and so the definition, has without being told

    @property
    def refused(self) -> list[Row]:
        return [row for row in self.rows if row.refused]


def translate(words: list[str], resolve: Callable[[str], str], only: Collection[str] | None = None) -> Translation:
    """Read a command line. *resolve* makes an object's reference of a file's name as typed, or raises the error to show.

    *only* holds the options that the policy leaves to this user (None: all that are allowed here). Never raises for what was
    typed; with anything refused the table is empty, so that no half of a machine is ever made.
    """
    found = Translation()
    reading = Reading(resolve)
    givens = _split(words, found)
    for given in givens:
        reading.draft.attempt(given, partial(_read, reading, given, only))
    reading.draft.broken = any(given.refused for given in givens)
    table = reading.finish()
    found.implied, found.name = reading.implied, reading.called
    found.rows = [row for given in givens for row in given.rows()]
    if not found.refused:
        _check_whole(table, found)
    if not found.refused:
        found.table = table
    return found


def _read(reading: Reading, given: Given, only: Collection[str] | None) -> None:
    name = given.option.name
    if given.option in (OWN_SAVE, OWN_EXPLAIN):
        return
    if name not in HANDLERS:
        _refuse_whole(given)
        return
    HANDLERS[name](reading, given)
    if only is not None and not {name, {"-M": "-machine"}.get(name, name)} & set(only):
        raise Refused("this host's policy does not leave it to you", "ask the administrator")


def _check_whole(table: Table, found: Translation) -> None:
    """The rules between keys are the definition's own; here they become a line like any other."""
    try:
        from_table(table, found.save or found.name or "kvm")
    except VmshellError as exc:
        found.rows.append(Row("all together", DENIED, reason=exc.sentence(), instead=exc.advice()))


# --- words to options -------------------------------------------------------------------------------------------------

OWN_SAVE = Option("--save", "NAME", "", ALLOWED, "", "--save NAME")
OWN_EXPLAIN = Option("--explain", "", "", ALLOWED, "", "--explain")
TEXT_OPTIONS = ("-append",)  # their argument may start with a dash


def _split(words: list[str], found: Translation) -> list[Given]:
    """Options with their arguments, as QEMU pairs them; what cannot be paired is already refused."""
    queue = list(words)
    givens = []
    while queue:
        word = queue.pop(0)
        own = _own(word, queue, found)
        givens.append(own or (_option(word, queue) if word.startswith("-") and word.strip("-") else _bare(word)))
    return givens


def _own(word: str, queue: list[str], found: Translation) -> Given | None:
    """--save NAME, --save=NAME and --explain are ours."""
    if word == "--explain":
        found.explain = True
        given = Given(OWN_EXPLAIN, word)
        given.row.became = "shows this and starts nothing"
        return given
    name, equals, value = word.partition("=")
    if name != "--save":
        return None
    value = value if equals else _take(queue)
    given = Given(OWN_SAVE, "--save", value)
    try:
        found.save = check_name(value)
        given.row.became = f"kept as the VM {value}"
    except VmshellError as exc:
        given.row.refuse(Refused(exc.sentence(), "--save NAME"))
    return given


def _take(queue: list[str]) -> str:
    return queue.pop(0) if queue and not queue[0].startswith("-") else ""


def _bare(word: str) -> Given:
    given = Given(POSITIONAL, word or "''")
    hint = f"-hda {word}" if word.strip("-") else POSITIONAL.instead
    given.row.refuse(Refused(POSITIONAL.reason, hint, POSITIONAL.verdict))
    return given


def _option(word: str, queue: list[str]) -> Given:
    """QEMU takes `-opt` and `--opt` for the same, and an argument only as the next word."""
    name = word[1:] if word.startswith("--") else word
    option = OPTIONS.get(name)
    if option is None:
        return _unknown(word, name, queue)
    if not option.argument:
        return Given(option, word)
    if not queue or (queue[0].startswith("-") and len(queue[0]) > 1 and name not in TEXT_OPTIONS):
        given = Given(option, word)
        given.row.option = word
        if option.name in HANDLERS:
            given.row.refuse(Refused(f"it needs an argument, {option.argument}", f"{name} {option.argument}"))
        else:
            _refuse_whole(given)
        return given
    return Given(option, word, queue.pop(0))


def _unknown(word: str, name: str, queue: list[str]) -> Given:
    head, equals, tail = name.partition("=")
    given = Given(Option(word, "", "", DENIED, UNKNOWN, ""), word)
    if equals and head in OPTIONS:
        given.row.refuse(Refused("QEMU takes no = here; the argument is a word of its own", f"{head} {tail}"))
        return given
    near = nearest(name, (*OPTIONS, "-save", "-explain"))
    if near in ("-save", "-explain"):
        near = f"-{near}"
    given.row.refuse(Refused(UNKNOWN, f"did you mean {near}?" if near else "`help kvm` tells which there are"))
    argument = _take(queue)  # most likely its argument, and no disk image
    given.row.option = f"{word} {argument}".strip()
    return given


def _refuse_whole(given: Given) -> None:
    option = given.option
    given.row.refuse(Refused(option.reason, option.instead, option.verdict))


# --- for the terminal -------------------------------------------------------------------------------------------------


def refusal_lines(translation: Translation) -> list[str]:
    """One line for each refused option: `-smb /home: denied: it starts a file server on the host; instead: …`"""
    return [f"{_option_text(row)}: {SHOWN[row.kind]}: {_reason_text(row)}" for row in translation.refused]


def explain_table(translation: Translation, width: int) -> list[str]:
    """Lines of a table: every option, its class, and what it became or why it did not; what goes without saying comes last.

    *width* 0 is no limit.
    """
    width = width or 10_000
    cells = [(_option_text(row), SHOWN[row.kind], _meaning(row)) for row in translation.rows]
    cells += [("", "default", safe(text, 200)) for text in translation.implied if not translation.refused]
    first = min(max([len("OPTION"), *(len(cell[0]) for cell in cells)]), max(12, width // 3))
    lines = [f"{'OPTION'.ljust(first)}  {'CLASS':8}  MEANS"]
    for option, kind, meaning in cells:
        text = wrap(meaning, max(20, width - first - 12))
        if len(option) > first:
            lines.append(option)
            option = ""
        lines.append(f"{option.ljust(first)}  {kind:8}  {text[0]}".rstrip())
        lines += [" " * (first + 12) + line for line in text[1:]]
    return lines


def _option_text(row: Row) -> str:
    return safe(row.option, OPTION_SHOWN)


def _reason_text(row: Row) -> str:
    return safe(f"{row.reason}; instead: {row.instead}" if row.instead else row.reason, 600)


def _meaning(row: Row) -> str:
    if row.refused:
        return _reason_text(row)
    notes = [note for note in (row.reason, IN_2007.get(row.page, "")) if note]
    return safe(row.became + (f" ({'; '.join(notes)})" if notes else ""), 600)
