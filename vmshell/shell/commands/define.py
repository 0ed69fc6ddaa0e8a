"""The verbs that give a VM its definition: set, unset, define, kvm, import-libvirt.

Everything here runs with the user's rights; whatever it makes of what was typed, the broker judges as it judges any definition.
Runs in: the shell. Touches standard input.
"""

from __future__ import annotations

import os

from ... import messages
from ...errors import EX_DONE, EX_REFUSED, BadValue, safe
from ...refusals import NoSuchObject, Usage
from .storage import must_own_stdin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cli.grammar import Values
    from ..context import Context

XML_MAX = 256 * 1024


def set_keys(context: Context, values: Values) -> int:
    return _change(context, "set", values)


def unset_keys(context: Context, values: Values) -> int:
    return _change(context, "unset", values)


def _change(context: Context, verb: str, values: Values) -> int:
    from ..cli.requests import build

    answer = context.ask(build(verb, values))
    context.say(f"{safe(answer.get('name'))}: {safe(answer.get('state'))}")
    say_changes(context, answer)
    return EX_DONE


def say_changes(context: Context, answer: dict[str, object]) -> None:
    """What follows from a change: done live, waiting, missing."""
    for key, text in (
        ("now", "changed now: {}"),
        ("next_boot", "at the next boot: {}"),
        ("missing", "not there yet: {} (`put` brings objects in)"),
    ):
        names = answer.get(key)
        if isinstance(names, list) and names:
            context.note(text.format(", ".join(safe(name, 80) for name in names[:20])))
    problems = answer.get("problems")
    for sentence in problems if isinstance(problems, list) else []:
        context.note(f"not changed now, {safe(sentence)}")


def define(context: Context, values: Values) -> int:
    return _define(context, values.text("vm"), _standard_input(context, "define", messages.TEXT_MAX), new=False)


def new_from(context: Context, values: Values) -> int:
    """`new NAME --from -`."""
    given = next((name for name in ("image", "cpus", "memory", "disk") if values.flag(name)), "")
    if given:
        raise Usage(problem=f"--{given} stands in the definition that --from reads", usage="new NAME --from - < FILE")
    return _define(context, values.text("vm"), _standard_input(context, "new", messages.TEXT_MAX), new=True)


def _define(context: Context, vm: str, text: str, *, new: bool) -> int:
    answer = context.ask(messages.Define(vm=vm, text=text, new=new))
    context.say(f"{safe(answer.get('name'))}: {safe(answer.get('state'))}")
    say_changes(context, answer)
    return EX_DONE


def _standard_input(context: Context, verb: str, limit: int) -> str:
    """All of standard input as text; raises Usage or BadValue."""
    if context.terminal.stdin_tty:
        raise Usage(problem=f"{verb} reads a definition from standard input", usage=f"ssh HOST {verb} NAME … < FILE")
    must_own_stdin(context, verb)
    parts, size = [], 0
    while data := os.read(0, 65536):
        size += len(data)
        if size > limit:
            raise BadValue(field="standard input", value=f"more than {limit} bytes", rule="that is no definition")
        parts.append(data)
    try:
        return b"".join(parts).decode("utf-8")
    except UnicodeDecodeError:
        raise BadValue(field="standard input", value="not UTF-8", rule="a definition is text") from None


# --- the secure wrapper ----------------------------------------------------------------------------------------------


def kvm(context: Context, values: Values) -> int:
    return run_wrapper(context, values.words("words"))


def run_wrapper(context: Context, words: list[str]) -> int:
    """Translate QEMU's options into a definition; show it, keep it, or run it once."""
    from ...model.definition import emit
    from ..qemu_cli import translate
    from . import explain

    if not words:
        raise Usage(problem="kvm needs options", usage="kvm -hda DISK [-cdrom ISO] [-boot d] …  (--explain, --save NAME)")
    granted = context.ask(messages.Whoami()).get("wrapper_options")
    only = frozenset(map(str, granted)) if isinstance(granted, list) else None
    shelf = context.ask(messages.Objects(vm=messages.SHELF))
    translation = translate.translate(words, lambda word: _resolve(shelf, word), only)
    refused = translate.refusal_lines(translation)
    if translation.explain:
        for line in translate.explain_table(translation, context.terminal.columns() or 0):
            context.say(line)
    else:
        for line in refused:
            context.note(line)
    if refused:
        return EX_REFUSED
    text = emit(translation.table)
    name = translation.save or translation.name or "kvm"
    request = messages.Define(vm=name, text=text, new=True, once=not translation.save)
    if translation.explain:
        return explain.judge(context, request)
    if translation.save:
        answer = context.ask(request)
        context.say(f"{safe(answer.get('name'))}: {safe(answer.get('state'))}")
        say_changes(context, answer)
        return EX_DONE
    from .machines import make_attached

    return make_attached(context, request)


def _resolve(shelf: dict[str, object], word: str) -> str:
    """The object that a file's name means: on the user's shelf, else in the library."""
    from ..ui.output import rows

    if word in [row.get("name") for row in rows(shelf.get("objects"))]:
        return f"shelf:{word}"
    library = shelf.get("library")
    if isinstance(library, list) and word in library:
        return f"library:{word}"
    advice = f"`put shelf.{safe(word, 64)} < FILE` brings it in; `objects` lists what there is"
    raise NoSuchObject(where="neither your shelf nor the library", object=safe(word, 64), advice=advice)


def import_libvirt(context: Context, values: Values) -> int:
    """A libvirt domain's XML, read here, with the user's rights; only the definition made of it goes to the broker."""
    from ...model.definition import emit
    from ..libvirt import domain

    table, left_out, wanted = domain.read_domain(_standard_input(context, "import-libvirt", XML_MAX))
    vm = values.text("vm")
    table["name"] = vm
    status = _define(context, vm, emit(table), new=True)
    for line in left_out:
        context.note(f"left out: {safe(line, 200)}")
    for name in wanted:
        context.note(f"bring in: put {vm}.{safe(name, 64)} < FILE")
    return status
