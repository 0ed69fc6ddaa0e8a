"""Somebody sits there (or a pipe with several requests): greeting, prompt, one request after the other.

The prompt is written first; the line editor, whose import takes ten times as long as everything before, is loaded while the
person reads. Until it takes over, the terminal echoes nothing and keeps every key.
Runs in: the shell.
"""

from __future__ import annotations

import fcntl
import sys
import termios

from ...errors import EX_DONE, EX_INTERRUPTED, VmshellError
from ..main import PROMPT, attempt, report_unexpected
from ..ui.lines import PlainEditor
from ..ui.terminal import write_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..context import Context
    from ..ui.prompt import Editor

GREETING_PATIENCE = 0.2  # seconds; a prompt does not wait for a busy broker


def run(context: Context) -> int:
    """Requests until `exit`, the end of the input, or a hang-up. Returns the exit status of the shell."""
    terminal = context.terminal
    context.interactive = terminal.stdin_tty
    if not (terminal.stdin_tty and terminal.stdout_tty):
        context.editor = PlainEditor(context, PROMPT if terminal.stdin_tty else "")
        return _requests(context, context.editor)
    if terminal.dumb:
        _greet(context)
        context.editor = PlainEditor(context, PROMPT)
        return _requests(context, context.editor)
    echoed = _keys_waiting()
    terminal.raw()
    if echoed:
        # Typed before we were there, and echoed by the terminal: it will be shown again behind the prompt.
        write_all(1, b"\r\x1b[K")
    _greet(context)
    sys.stdout.flush()
    write_all(1, PROMPT.encode("ascii"))
    context.editor = _load_editor(context)
    return _requests(context, context.editor)


def _load_editor(context: Context) -> Editor | PlainEditor:
    try:
        from ..ui.prompt import Editor
    except ImportError:
        write_all(1, b"\r\x1b[K")
        return PlainEditor(context, PROMPT)
    return Editor(context, PROMPT)


def _keys_waiting() -> bool:
    try:
        return any(fcntl.ioctl(0, termios.FIONREAD, bytes(4)))
    except OSError:
        return False


def _greet(context: Context) -> None:
    """One line about one's VMs, if the broker is there and answers at once; in session mode it may still have to be started."""
    from ...messages import List
    from ..ui.output import greeting, rows

    try:
        answer = context.broker.answer_soon(List(), GREETING_PATIENCE)
    except VmshellError as error:
        if not context.layout.embedded:
            context.complain(error)
        return
    if answer is not None:
        context.say(greeting(rows(answer.get("vms")), more=answer.get("more") is True))


def _requests(context: Context, editor: Editor | PlainEditor) -> int:
    status = EX_DONE
    terminal = context.terminal
    while not context.leaving:
        try:
            line = editor.read()
        except EOFError:
            if terminal.stdin_tty:
                write_all(1, b"\r\n")
                return EX_DONE
            return status
        except KeyboardInterrupt:
            if not terminal.stdin_tty:
                raise
            write_all(1, b"\n" if isinstance(editor, PlainEditor) else b"")
            continue
        if terminal.stdin_tty:
            terminal.quiet()
        status = _one(context, line)
        if terminal.stdin_tty:
            terminal.raw()
    return EX_DONE if terminal.stdin_tty else status


def _one(context: Context, line: str) -> int:
    from ..cli.grammar import words_of

    signals = context.signals
    try:
        signals.interruptible = True
        try:
            status = attempt(context, lambda: words_of(line), line)
            sys.stdout.flush()
            return status
        finally:
            signals.interruptible = False
    except KeyboardInterrupt:
        context.note("")
        return EX_INTERRUPTED
    except OSError:
        raise  # the terminal is gone
    except Exception as error:
        return report_unexpected(context, error)
