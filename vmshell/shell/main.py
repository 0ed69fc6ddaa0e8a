"""The restricted login shell's beginning and end: how it was called, one request or many, the exit status.

    vmshell                          at a terminal: a prompt; without one: one request per line of its input
    vmshell -c TEXT                  as sshd calls a login shell: TEXT is one request. If TEXT is this program's own path
                                     (sshd's ForceCommand), the request is $SSH_ORIGINAL_COMMAND; if not set, as without -c
    vmshell [--session] VERB WORD…   one request, already in words; --session: one's own broker, nothing installed

Runs in: the shell, as the user.
"""

from __future__ import annotations

import os
import sys

from ..errors import EX_DONE, EX_INTERNAL, EX_INTERRUPTED, Internal, VmshellError, safe
from ..layout import Layout
from ..names import nearest
from ..refusals import BrokerDown, NoSuchVm, UnknownVerb, Usage
from .startup import process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cli.grammar import Word
    from .context import Context

PROMPT = "vmshell> "
INSTALLED = ("/usr/bin/vmshell", "/usr/local/bin/vmshell")
USAGE = "vmshell [--session] [-c TEXT | VERB WORD...]"


class Invocation:
    """What the arguments ask for: `text` (one request, to be split), or `words`, or neither (a prompt)."""

    def __init__(self) -> None:
        self.session = False
        self.layout = ""
        self.text: str | None = None
        self.words: list[str] = []
        self.special = ""


def read_arguments(argv: list[str]) -> Invocation:
    """Understand *argv* (without the program's name); raises Usage."""
    asked = Invocation()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "-c":
            if len(rest) != 1:
                raise Usage(problem="-c takes one argument", usage=USAGE)
            asked.text = rest.pop()
        elif word == "--session":
            asked.session = True
        elif word == "--layout" and rest:  # tests and benchmarks: everything in a folder of their own
            asked.layout = rest.pop(0)
        elif word in ("-l", "--login"):
            pass  # some programs ask a login shell to be one
        elif word == "--verbs-man":
            asked.special = word
        elif word in ("--help", "-h"):
            asked.words = ["help"]
        elif word == "--version":
            asked.words = ["version"]
        elif word.startswith("-"):
            raise Usage(problem=f"vmshell has no option {safe(word, 40)}", usage=USAGE)
        else:
            asked.words = [word, *rest]
            rest = []
    return asked


def main(argv: list[str]) -> int:
    """Be the shell for these arguments and return the exit status."""
    sys.excepthook = process.quiet_excepthook
    sys.unraisablehook = lambda _: None
    os.chdir("/")
    process.open_missing_descriptors()
    process.use_utf8()
    process.no_core_files()
    signals = process.Signals()
    signals.install()
    try:
        status = _start([as_utf8(word) for word in argv], signals)
    except VmshellError as error:
        _print_error(error)
        status = error.exit_status
    except KeyboardInterrupt:
        status = EX_INTERRUPTED
    except BrokenPipeError:
        status = 1
    return _flush(status)


def as_utf8(word: str) -> str:
    """sshd hands over bytes; whatever the locale made of them, they are UTF-8 or nothing we know."""
    return os.fsencode(word).decode("utf-8", "surrogateescape")


def entry() -> None:
    """The starter that pip makes (session mode from a virtual environment)."""
    sys.exit(main(sys.argv[1:]))


def _start(argv: list[str], signals: process.Signals) -> int:
    asked = read_arguments(argv)
    command = process.reduce_environment(session=asked.session or bool(asked.layout))
    if asked.special:
        from .cli.help import man_sections

        sys.stdout.write(man_sections())
        return EX_DONE
    if asked.text is not None and asked.text in (sys.argv[0], *INSTALLED):
        asked.text = None if command is None else as_utf8(command)
    context = _context(asked, signals)
    try:
        if asked.text is None and not asked.words:
            from .startup.interactive import run

            return run(context)
        signals.interruptible = True
        return _one_request(context, asked)
    except (VmshellError, KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as error:
        raise _unexpected(context, error) from error
    finally:
        signals.interruptible = False
        context.terminal.restore()


def _context(asked: Invocation, signals: process.Signals) -> Context:
    from .client.broker import Broker
    from .context import Context
    from .ui.terminal import Terminal

    layout = _layout(asked)
    terminal = Terminal()
    signals.at_end = terminal.restore

    def start() -> None:
        from .startup.session import start_broker

        start_broker(layout)

    return Context(layout, Broker(layout, start if layout.embedded else None), terminal, signals)


def _layout(asked: Invocation) -> Layout:
    if asked.layout:
        try:
            return Layout.from_args(asked.layout)
        except ValueError:
            raise Usage(problem="--layout is not a layout", usage=USAGE) from None
    if not asked.session:
        return Layout.system()
    home = os.environ.get("HOME", "")
    if not home:
        import pwd

        home = pwd.getpwuid(os.geteuid()).pw_dir
    return Layout.session(dict(os.environ), os.geteuid(), home)


def _one_request(context: Context, asked: Invocation) -> int:
    from .cli import grammar

    context.single = True
    if asked.text is not None:
        return attempt(context, lambda: grammar.words_of(asked.text or ""), asked.text)
    return attempt(context, lambda: grammar.as_words(asked.words), " ".join(asked.words))


def attempt(context: Context, split: object, line: str) -> int:
    """Carry out one request; complain about what is refused. Returns the exit status."""
    from .cli.grammar import Pointed

    try:
        return dispatch(context, split())  # type: ignore[operator]
    except Pointed as error:
        _point(context, line, error.column)
        context.complain(error)
        return error.exit_status
    except VmshellError as error:
        context.complain(error)
        return error.exit_status


def dispatch(context: Context, words: list[Word]) -> int:
    """Find the verb and run it; raises VmshellError."""
    from .cli import grammar, verbs
    from .commands import machines

    if not words:
        return EX_DONE
    first = words[0].text
    if first in ("--help", "-h"):
        first = "help"
    verb = verbs.BY_WORD.get(first)
    if verb is not None:
        if verbs.wants_help(words[1:], verb):
            return machines.help(context, grammar.Values({"topic": verb.name}))
        request = grammar.parse(words, verb)
        return request.verb.run(context, request.values)
    if len(words) == 1 and grammar.looks_like_vm(first):
        try:
            return machines.bare_name(context, first)
        except VmshellError as error:
            if error.code != NoSuchVm.code and not (error.code == BrokerDown.code and _near(words)):
                raise
    raise _unknown(words)


def _near(words: list[Word]) -> str:
    """What was probably meant: a verb one slip away, or `console web1` for Lish's `web1 console`."""
    from .cli import grammar, verbs

    first = words[0].text
    near = nearest(first, [word for word in verbs.BY_WORD if not verbs.BY_WORD[word].hidden])
    if not near and len(words) > 1 and words[1].text in verbs.BY_WORD and grammar.looks_like_vm(first):
        near = f"{words[1].text} {first}"
    return near


def _unknown(words: list[Word]) -> VmshellError:
    from .cli import grammar

    first, near = words[0].text, _near(words)
    if near:
        return grammar.UnknownVerbNear(verb=safe(first, 40), near=near)
    return UnknownVerb(verb=safe(first, 40))


def _point(context: Context, line: str, column: int) -> None:
    """Show the place in the line, where a terminal can."""
    shown = safe(line, 1000)
    if context.terminal.stderr_tty and shown == line and len(line) + 3 < context.terminal.size()[0]:
        context.note(f"  {line}\n  {' ' * (column - 1)}^")


def _unexpected(context: Context, error: BaseException) -> VmshellError:
    """A fault of ours: a reference for the person; what happened, only where it is the person's own log (session mode)."""
    reference = f"{os.getpid():x}-{int.from_bytes(os.urandom(2), 'big'):04x}"
    if context.layout.embedded:
        import traceback

        try:
            with open(f"{context.layout.run}/shell.err", "a", encoding="utf-8") as file:
                file.write(f"reference {reference}\n{''.join(traceback.format_exception(error))}\n")
        except OSError:
            pass
    return Internal(reference=reference)


def report_unexpected(context: Context, error: BaseException) -> int:
    """At the prompt a fault of ours costs one request, not the login."""
    context.complain(_unexpected(context, error))
    return EX_INTERNAL


def _print_error(error: VmshellError) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"vmshell: {error.sentence()}\n" + (f"  {error.advice()}\n" if error.advice() else ""))
    sys.stderr.flush()


def _flush(status: int) -> int:
    """Whether the answer reached its reader belongs to the answer."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        # Nothing more can be said; the interpreter must not try again at its end.
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        return status or 1
    return status
