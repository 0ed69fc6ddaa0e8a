"""The line editor: the only importer of prompt_toolkit, and late: the prompt is on the screen before this module is loaded.

History is in memory only (A20); there is no external editor, no system prompt, no suspending (A19).
Runs in: the shell, on a terminal.
"""

from __future__ import annotations

import os
import sys

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.input.vt100_parser import Vt100Parser
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.shortcuts import CompleteStyle

from ..cli import completion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..context import Context


class VerbCompleter(Completer):
    """Offers what `cli/completion.py` finds, and nothing else: no file names, no words of the history (A21)."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        start, found = completion.complete(self._context, before)
        for text in found:
            yield Completion(text, start_position=start - len(before))


class Editor:
    """Reads lines, with editing, history and completion."""

    def __init__(self, context: Context, prompt: str) -> None:
        self._context = context
        self._prompt = prompt
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            completer=VerbCompleter(context),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            reserve_space_for_menu=0,
            editing_mode=EditingMode.EMACS,
            key_bindings=_bindings(),
            enable_open_in_editor=False,
            enable_system_prompt=False,
            enable_suspend=False,
            mouse_support=False,
            enable_history_search=True,
        )

    def read(self) -> str:
        """One line. Raises EOFError (Ctrl-D on an empty line, or the terminal is gone) and KeyboardInterrupt (Ctrl-C)."""
        # The early prompt may stand there already: the editor draws its own over it.
        os.write(1, b"\r")
        line = self._session.prompt(self._prompt)
        sys.stdout.flush()
        return line

    def take_typed_ahead(self) -> bytes:
        """The keys that were read together with the line but come after it."""
        return "".join(press.data for press in get_typeahead(self._session.app.input)).encode("utf-8", "surrogateescape")

    def give_back(self, data: bytes) -> None:
        """Keys to be taken as if they had been typed at the prompt."""
        presses: list[KeyPress] = []
        parser = Vt100Parser(presses.append)
        parser.feed_and_flush(data.decode("utf-8", "surrogateescape"))
        store_typeahead(self._session.app.input, presses)


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-z")
    @bindings.add("c-\\")
    def _(event: KeyPressEvent) -> None:
        """Keys that stop or end programs elsewhere: nothing here."""

    return bindings
