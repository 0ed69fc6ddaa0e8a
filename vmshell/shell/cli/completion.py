"""What TAB offers: verbs, options, own VMs, images, networks, published ports, from the table of verbs and the broker.

Runs in: the shell.
"""

from __future__ import annotations

from ... import messages
from ...errors import VmshellError
from ..ui.output import number, rows
from . import verbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..context import Context
    from .grammar import Verb


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
    for option in verb.options:
        if words[-1] in option.spellings() and option.kind != "flag":
            return _of_kind(context, option.kind, [], word)
    options = [f"--{option.name}" for option in verb.options if not set(option.spellings()) & set(words)]
    given = _arguments_given(verb, words[1:])
    if word.startswith("-") or (len(given) >= len(verb.arguments) and not (verb.arguments and verb.arguments[-1].many)):
        return options
    if verb.name == "help":
        return [each.name for each in verbs.visible()]
    return _of_kind(context, verb.arguments[min(len(given), len(verb.arguments) - 1)].kind, given, word)


def _of_kind(context: Context, kind: str, given: list[str], word: str) -> list[str]:
    """The values there are of a kind of `checks.CHECKS`; *given*: the arguments before."""
    if kind in ("vm", "place", "login-at"):
        return vm_names(context)
    if kind == "image":
        return image_names(context)
    if kind == "grantee":
        return ["world"]
    if kind in ("port", "tcp-port") and given:
        return _published_ports(context, given[0], with_proto=kind == "port")
    key, equals, _ = word.partition("=")
    if kind == "assignment" and equals and key.startswith("net") and (key.endswith(".network") or "." not in key):
        return [f"{key}={name}" for name in _names(context, messages.Networks(), "networks")]
    return []


def _published_ports(context: Context, vm: str, *, with_proto: bool) -> list[str]:
    try:
        answer, _ = context.broker.call(messages.Net(vm=vm))
    except VmshellError:
        return []
    found = [(str(number(row.get("port"))), str(row.get("proto"))) for row in rows(answer.get("published"))]
    return [f"{port}/{proto}" if with_proto else port for port, proto in found if with_proto or proto == "tcp"]


def _arguments_given(verb: Verb, words: list[str]) -> list[str]:
    takes_value = {text for option in verb.options if option.kind != "flag" for text in option.spellings()}
    found, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in takes_value:
            skip = True
        elif not word.startswith("-"):
            found.append(word)
    return found


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
