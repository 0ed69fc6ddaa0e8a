"""Help and the verb section of the man page, both made from the table of verbs.

Runs in: the shell. Pure functions.
"""

from __future__ import annotations

from ...errors import safe
from ...names import nearest
from ...refusals import REGISTRY, Usage
from . import verbs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .grammar import Verb

EXIT_STATUSES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "refused"),
    (2, "the request was not understood: no such verb or option, a bad name or value"),
    (3, "no such VM or image (somebody else's looks the same)"),
    (4, "not possible in the VM's present state"),
    (5, "over a limit"),
    (6, "busy with another request"),
    (7, "the VM failed to start, or ended before that was done"),
    (8, "not done in time"),
    (69, "the VM service, the host's storage or QEMU is not available"),
    (70, "a fault inside vmshell"),
    (130, "interrupted by Ctrl-C"),
)

KEYS: tuple[tuple[str, str], ...] = (
    (". d q", "leave the console; the VM runs on"),
    ("?", "these keys"),
    ("r", "take the pen, the right to type (one viewer has it at a time)"),
    ("w", "who is attached"),
    ("b", "send a break"),
    ("p", "power menu: shut down, reboot, reset, kill"),
    ("s", "type this terminal's size to the guest (`stty rows R cols C`)"),
    ("^]", "send a ^] to the guest"),
)

QUOTING = (
    "A request is one line of at most 4096 bytes: a verb, names, options. Blanks separate words. '...' and \"...\" keep blanks "
    'together, a backslash keeps the next character (in "..." only before " and \\). Nothing is expanded and there is no '
    "shell behind this: ; | & $ * have no meaning."
)


def topic(name: str | None, width: int = 80) -> str:
    """The text of `help` or of `help NAME`; raises Usage when there is no such topic."""
    if name is None:
        return overview(width)
    if name in ("exit-status", "status-codes"):
        lines = [f"  {status:>3}  {text}" for status, text in EXIT_STATUSES]
        return "\n".join(["Exit statuses, also of `ssh HOST VERB`:", *lines])
    if name in ("keys", "^]"):
        return keys(width=width)
    if name == "quoting":
        return "\n".join(wrap(QUOTING, width))
    if name in ("keys-of-vm", "vm.toml"):
        return "\n".join(definition_keys(width))
    verb = verbs.BY_WORD.get(name)
    if verb is None or verb.hidden:
        near = nearest(name, verbs.BY_WORD)
        raise Usage(problem=f"there is no help on {safe(name, 40)}", usage=f"help {near}" if near else "help [VERB]")
    return about(verb, width)


def overview(width: int = 80) -> str:
    lines = []
    table = [(_short(verb), verb) for verb in verbs.visible()]
    column = min(max(len(left) for left, _ in table), 18 if width < 60 else 30)
    for left, verb in table:
        also = f" (also: {', '.join(verb.aliases)})" if verb.aliases else ""
        first, *rest = wrap(verb.help + also, max(20, width - column - 2))
        if len(left) > column:
            lines.append(left)
            left = ""
        lines.append(f"{left.ljust(column)}  {first}")
        lines += [" " * (column + 2) + line for line in rest]
    lines += ["", *wrap("`help VERB` tells more; other topics: keys (of the console), keys-of-vm, exit-status, quoting.", width)]
    return "\n".join(lines)


def _short(verb: Verb) -> str:
    return " ".join([verb.name, *(argument.metavar for argument in verb.arguments if not argument.optional)])


def about(verb: Verb, width: int = 80) -> str:
    """One verb at length."""
    lines = [*wrap(f"usage: {verb.usage()}", width, "       "), "", *wrap(_sentence(verb.help), width)]
    if verb.aliases:
        lines.append(f"Also: {', '.join(verb.aliases)}.")
    if verb.options:
        left = {option.name: f"{', '.join(option.spellings())} {option.metavar}".rstrip() for option in verb.options}
        column = max(len(text) for text in left.values())
        lines.append("")
        for option in verb.options:
            first, *rest = wrap(option.help, max(20, width - column - 4))
            lines.append(f"  {left[option.name].ljust(column)}  {first}")
            lines += [" " * (column + 4) + line for line in rest]
    if verb.detail:
        lines += ["", *wrap(verb.detail, width)]
    if verb.name == "console":
        lines += ["", keys(width=width)]
    return "\n".join(lines)


def definition_keys(width: int = 80) -> list[str]:
    """Every key of a VM's definition with its values and meaning, from the table that reads it."""
    from ...model.keys import DISK_KEYS, KEYS, NET_KEYS

    lines = ["Keys of a VM's definition, for `set`, `unset` and `define`:"]
    for prefix, table in (("", KEYS), ("disk0.", DISK_KEYS), ("net0.", NET_KEYS)):
        for key in table.values():
            lines.append(f"  {prefix}{key.name} = {key.kind.metavar}")
            lines += [f"      {line}" for line in wrap(key.help, max(20, width - 6))]
    lines += wrap("CD drives are cdrom0 and so on, floppy drives floppy0, with the keys of a disk.", width)
    return lines


def keys(escape: str = "^]", width: int = 80) -> str:
    """The console's keys, one a line."""
    lines = [f"After {escape}:"]
    for key, text in KEYS:
        first, *rest = wrap(text.replace("^]", escape), max(20, width - 9))
        lines += [f"  {key.replace('^]', escape):<6} {first}", *(" " * 9 + line for line in rest)]
    return "\n".join(lines)


def key_line(vm: str, escape: str) -> str:
    """The one line that appears after the escape key."""
    return f"[{safe(vm, 64)}] . detach  ? help  r take pen  w who  b break  p power  s size  {escape} literal"


def wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most *width* characters, later ones indented (`textwrap` would import `re`)."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = indent + word
        else:
            line = f"{line} {word}" if line.strip() else line + word
    return [*lines, line] if line else lines or [""]


# --- the man page's sections -----------------------------------------------------------------------------------------


def man_sections() -> str:
    """VERBS, CONSOLE KEYS, QUOTING and EXIT STATUS as man source."""
    lines = [".SH VERBS"]
    for verb in verbs.visible():
        lines += [".TP", _man_usage(verb), _man(_sentence(verb.help))]
        if verb.aliases:
            lines.append(_man(f"Also: {', '.join(verb.aliases)}."))
        if verb.detail:
            lines.append(_man(verb.detail))
        if verb.options:
            lines.append(".RS")
            for option in verb.options:
                value = f" \\fI{_man(option.metavar)}\\fR" if option.metavar else ""
                spelled = ", ".join(f"\\fB{_man(text)}\\fR" for text in option.spellings())
                lines += [".TP", f"{spelled}{value}", _man(_sentence(option.help))]
            lines.append(".RE")
    lines += _man_definition()
    lines += [".SH CONSOLE KEYS", "After the escape key (^], or what --escape says):".replace("-", "\\-")]
    for key, text in KEYS:
        lines += [".TP", f"\\fB{_man(key)}\\fR", _man(_sentence(text))]
    lines += [".SH QUOTING", _man(QUOTING), ".SH EXIT STATUS"]
    for status, text in EXIT_STATUSES:
        lines += [".TP", f"\\fB{status}\\fR", _man(_sentence(text))]
    return "\n".join(lines) + "\n"


def _man_definition() -> list[str]:
    from ...model.keys import DISK_KEYS, KEYS, NET_KEYS

    lines = [".SH KEYS OF A DEFINITION", _man("What `set` changes and `define` takes, as TOML (see FILES for its sections).")]
    for prefix, table in (("", KEYS), ("disk.", DISK_KEYS), ("net.", NET_KEYS)):
        for key in table.values():
            lines += [".TP", f"\\fB{_man(prefix + key.name)}\\fR = {_man(key.kind.metavar)}", _man(_sentence(key.help))]
    return lines


def _man_usage(verb: Verb) -> str:
    words = [f"\\fB{_man(verb.name)}\\fR"]
    for argument in verb.arguments:
        metavar = _man(argument.metavar)
        words.append(f"[\\fI{metavar}\\fR]" if argument.optional else f"\\fI{metavar}\\fR")
    for option in sorted(verb.options, key=lambda option: not option.required):
        value = f" \\fI{_man(option.metavar)}\\fR" if option.metavar else ""
        text = f"\\fB{_man(option.spellings()[0])}\\fR{value}"
        words.append(text if option.required else f"[{text}]")
    return " ".join(words)


def _man(text: str) -> str:
    for char, escaped in (("\\", "\\e"), ("-", "\\-"), ("^", "\\(ha"), ("~", "\\(ti"), ("`", "\\(ga"), ("…", "...")):
        text = text.replace(char, escaped)
    return "\\&" + text if text.startswith((".", "'")) else text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ")")) else ".")


def undocumented_statuses() -> list[int]:
    """Exit statuses that an error has and the table above does not (a test wants none)."""
    known = {status for status, _ in EXIT_STATUSES}
    return sorted({kind.exit_status for kind in REGISTRY.values()} - known)
