"""What every verb is handed: the way to the broker, the terminal, and whether somebody sits there.

Runs in: the shell.
"""

from __future__ import annotations

import sys

from ..errors import VmshellError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..layout import Layout
    from ..messages import Request
    from .client.broker import Answer, Broker
    from .startup.process import Signals
    from .ui.lines import PlainEditor
    from .ui.prompt import Editor
    from .ui.terminal import Terminal


class Context:
    """One login."""

    __slots__ = ("broker", "editor", "interactive", "layout", "leaving", "signals", "single", "terminal")

    def __init__(self, layout: Layout, broker: Broker, terminal: Terminal, signals: Signals) -> None:
        self.layout = layout
        self.broker = broker
        self.terminal = terminal
        self.signals = signals
        self.interactive = False  # at our own prompt, not one request of `ssh host VERB`
        self.leaving = False
        self.single = False  # one request alone: standard input is its own to read
        self.editor: Editor | PlainEditor | None = None

    def ask(self, request: Request) -> dict[str, object]:
        """Send *request*, show what it waits for, return the answer."""
        answer, _ = self.ask_fds(request, 0)
        return answer

    def ask_fds(self, request: Request, count: int) -> Answer:
        """As `ask`, with the *count* descriptors that come beside the answer."""
        from .ui.progress import Progress

        progress = Progress(self.terminal)
        try:
            return self.broker.call(request, progress, fds=count)
        finally:
            progress.clear()

    def take_typed_ahead(self) -> bytes:
        """Keys that the line editor read beyond its line: a console takes them first."""
        return self.editor.take_typed_ahead() if self.editor is not None else b""

    def give_back(self, data: bytes) -> None:
        """Keys that a console read beyond its end: the prompt takes them."""
        if self.editor is not None and data:
            self.editor.give_back(data)

    def say(self, text: str) -> None:
        """A line of the answer."""
        sys.stdout.write(text + "\n")

    def note(self, text: str) -> None:
        """A line that is not the answer."""
        sys.stdout.flush()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def complain(self, error: VmshellError) -> None:
        """The sentence of an error and what to do next."""
        self.note(f"vmshell: {error.sentence()}")
        if error.advice():
            self.note(f"  {error.advice()}")
