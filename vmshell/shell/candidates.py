"""What TAB offers: verbs, options, own VMs, images, from the table of verbs and the broker.

Runs in: the shell.
"""

from __future__ import annotations

from .. import messages
from ..errors import VmshellError
from . import verbs
from .show import rows

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .context import Context
    from .verbs import Verb


def complete(context: Context, before: str) -> tuple[int, list[str]]:
    """Where the word before the cursor starts, and what it may become (with a blank after it)."""
    start = before.rfind(" ") + 1
    word = before[start:]
    words = before[:start].split()
    found = _verbs_and_vms(context) if not words else _for_verb(context, words, word)
    return start, [f"{text} " for text in sorted(set(found)) if text.startswith(word)]


def _verbs_and_vms(context: Context) -> list[str]:
    return [verb.name for verb in verbs.visible()] + vm_names(context)


def _for_verb(context: Context, words: list[str], word: str) -> list[str]:
    verb = verbs.BY_WORD.get(words[0])
    if verb is None or verb.hidden:
        return []
    last = words[-1].removeprefix("--") if words[-1].startswith("--") else ""
    for option in verb.options:
        if option.name == last and option.kind != "flag":
            return image_names(context) if option.kind == "image" else []
    if word.startswith("-"):
        return [f"--{option.name}" for option in verb.options if f"--{option.name}" not in words]
    if _arguments_given(verb, words[1:]) < len(verb.arguments):
        kind = verb.arguments[0].kind
        if verb.name == "help":
            return [each.name for each in verbs.visible()]
        return vm_names(context) if kind == "vm" else []
    return [f"--{option.name}" for option in verb.options if f"--{option.name}" not in words]


def _arguments_given(verb: Verb, words: list[str]) -> int:
    takes_value = {f"--{option.name}" for option in verb.options if option.kind != "flag"}
    count, skip = 0, False
    for word in words:
        if skip:
            skip = False
        elif word in takes_value:
            skip = True
        elif not word.startswith("--"):
            count += 1
    return count


def vm_names(context: Context) -> list[str]:
    """One's own VMs (the first page: nobody completes among more)."""
    return _names(context, messages.List(), "vms")


def image_names(context: Context) -> list[str]:
    return _names(context, messages.Images(), "images")


def _names(context: Context, request: messages.Request, key: str) -> list[str]:
    # Asked anew each time: the round trip is a millisecond, and another session may just have made the VM.
    try:
        answer, _ = context.broker.call(request)
    except VmshellError:
        return []
    return [str(row.get("name")) for row in rows(answer.get(key))]
