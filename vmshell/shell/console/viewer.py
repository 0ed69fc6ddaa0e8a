"""The serial console: bytes between the terminal and the console that the broker handed over.

On a terminal, keys go raw to the guest and the escape key starts the console's own commands; without one it is a pipe that ends
with its input. However it ends, the terminal gets back the modes it had.
Runs in: the shell. Touches descriptors 0, 1 and 2, and the console's.
"""

from __future__ import annotations

import os
import select
from time import monotonic

from ... import messages
from ...errors import EX_DONE, EX_REFUSED, VmshellError
from ...refusals import RelayDown
from ..cli import help
from ..ui.terminal import write_all
from . import notices
from .connection import PIPES, Link
from .keys import Keys, show_key
from .power_menu import PowerMenu
from .terminal_filter import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..context import Context

SILENCE = 2.0  # seconds after attaching until silence is explained
SILENCE_STARTING = 10.0  # the same for a guest that is only just being started
KEY_LINE_AFTER = 0.3  # seconds: fingers that know the second key see no line
REATTACH = 15.0  # seconds in which a relay that vanished may come back
RETRY = 0.3
PIPE_DRAIN = 1.5  # seconds without output after the end of piped input
PIPE_DRAIN_MAX = 15.0
TAIL = 512  # bytes by which a replay after a restart is fitted to what was shown before
READ = 4096

# Modes that only --raw lets a guest switch on: mouse, focus, keyboard protocols.
RAW_RESET = b"\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1006l\x1b[?1015l\x1b[>4m"


class Options:
    """How to attach."""

    __slots__ = ("escape", "raw", "readonly", "replay")

    def __init__(self, *, readonly: bool = False, replay: bool = True, escape: int = 0x1D, raw: bool = False) -> None:
        self.readonly = readonly
        self.replay = replay
        self.escape = escape
        self.raw = raw


class Viewer:
    """One attachment. `run` returns the exit status when it is over; *link* is closed then."""

    def __init__(self, context: Context, vm: str, link: Link, options: Options) -> None:
        terminal = context.terminal
        self.vm = vm
        self._context = context
        self._options = options
        self._on_terminal = terminal.stdin_tty and terminal.stdout_tty
        self._link: Link | None = link
        self._filter = Filter()
        self._keys = Keys(options.escape)
        self.key = show_key(options.escape)
        self._power = PowerMenu(context, vm, self.notice)
        self._reads_input = self._on_terminal or not options.readonly
        self._result: int | None = None
        self._pipe_status = EX_DONE
        self._tail = b""
        self._pen = False
        self._quiet_s: object = None
        self._vm_state = ""
        # Moments (monotonic) at which something is due; None: nothing.
        self._silence_at: float | None = monotonic() + SILENCE
        self._key_line_at: float | None = None
        self._retry_at: float | None = None
        self._give_up_at = 0.0
        self._drain_at: float | None = None
        self._drain_end = 0.0
        self._fitting = False

    def run(self) -> int:
        terminal, signals = self._context.terminal, self._context.signals
        interruptible = signals.interruptible
        try:
            if self._on_terminal:
                signals.interruptible = False  # Ctrl-C is the guest's
                terminal.hold_reset(self._reset)
                terminal.raw_both_ways()
            self._loop()
        except BrokenPipeError:
            self._result = EX_REFUSED
        except OSError:
            self._result = EX_DONE  # the terminal is gone
        finally:
            self._give_terminal_back()
            self._power.close()
            if self._link is not None:
                self._link.close()
            signals.interruptible = interruptible
        return EX_DONE if self._result is None else self._result

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        if self._on_terminal:
            self._typed(self._context.take_typed_ahead())
        while self._result is None:
            poll = select.poll()
            poll.register(1, 0)  # a reader that went away is noticed though we have nothing to write
            if self._reads_input and not (self._link is not None and self._link.full):
                poll.register(0, select.POLLIN)
            wanted = self._link.wants() if self._link is not None else {}
            for fd, events in wanted.items():
                poll.register(fd, events)
            for pending in self._power.pending:
                poll.register(pending, select.POLLIN)
            ready = dict(poll.poll(self._until_due()))
            if ready.get(1, 0) & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                self._result = EX_DONE
                return
            # Keys first: a flood of output must not keep the escape key from being seen.
            if 0 in ready:
                self._read_input()
            if self._link is not None and self._result is None and (self._link.waiting or not wanted.keys().isdisjoint(ready)):
                self._read_link(self._link)
            self._power.answer(ready)
            self._do_what_is_due()

    def _until_due(self) -> int:
        if self._link is not None and self._link.waiting:
            return 0
        moments = [self._silence_at, self._key_line_at, self._retry_at, self._drain_at]
        due = [moment for moment in moments if moment is not None]
        return max(0, int((min(due) - monotonic()) * 1000) + 1) if due else 60_000

    def _do_what_is_due(self) -> None:
        now = monotonic()
        if self._silence_at is not None and now >= self._silence_at:
            self._silence_at = None
            if self._on_terminal:
                self.notice(notices.silence(self.vm, self._vm_state, self._quiet_s))
        if self._key_line_at is not None and now >= self._key_line_at:
            self._key_line_at = None
            if self._keys.after_escape:
                self._bracket(help.key_line(self.vm, self.key))
        if self._retry_at is not None and now >= self._retry_at:
            self._reattach()
        if self._drain_at is not None and (now >= self._drain_at or now >= self._drain_end):
            self._result = self._pipe_status

    # --- from the terminal -------------------------------------------------------------------------------------------

    def _read_input(self) -> None:
        try:
            data = os.read(0, READ)
        except OSError:
            data = b""  # EIO: the terminal hung up
        if data and self._on_terminal:
            self._typed(data)
        elif data:
            if self._link is not None:
                self._link.keys(data)
        elif self._on_terminal:
            self._result = EX_DONE
        else:
            self._reads_input = False
            self._drain_at = monotonic() + PIPE_DRAIN
            self._drain_end = monotonic() + PIPE_DRAIN_MAX

    def _typed(self, chunk: bytes) -> None:
        for item in self._keys.feed(chunk):
            if self._result is not None:
                self._context.give_back(item if isinstance(item, bytes) else b"")
            elif isinstance(item, bytes):
                self._send(item)
            else:
                self._command(item)
        self._key_line_at = monotonic() + KEY_LINE_AFTER if self._keys.after_escape else None

    def _send(self, data: bytes) -> None:
        while data and self._power.asking:
            self._power.choose(data[0])
            data = data[1:]
        if data and self._link is not None:
            self._link.keys(data)

    def _command(self, command: str) -> None:
        if command == "detach":
            self._result = EX_DONE
            self.notice(f"detached from {self.vm}, which runs on")
        elif command == "help":
            self._bracket(help.keys(self.key, self._context.terminal.size()[0]))
        elif command == "power":
            self._power.ask()
        elif command in ("pen", "who", "break"):
            if self._link is not None:
                self._link.control(command)
        elif command == "size":
            columns, rows = self._context.terminal.size()
            self._send(f"stty rows {rows} cols {columns}\r".encode("ascii"))
        elif command == "unknown":
            self._bracket(help.key_line(self.vm, self.key))

    # --- from the relay ----------------------------------------------------------------------------------------------

    def _read_link(self, link: Link) -> None:
        link.flush()
        tag, data, notice = link.receive()
        if tag == "data":
            self._show(data)
        elif tag == "notice":
            self._heard(notice)
        elif tag == "end":
            refusal = notices.refusal(notice)
            self.notice(refusal.sentence() if refusal else notices.ended(self.vm, notice))
            self._result = refusal.exit_status if refusal else self._pipe_status
        elif tag == "gone":
            self._lost()

    def _show(self, data: bytes) -> None:
        self._silence_at = None
        if self._drain_at is not None:
            self._drain_at = monotonic() + PIPE_DRAIN
        if self._fitting:
            self._fitting = False
            data = fit(self._tail, data)
        self._tail = (self._tail + data)[-TAIL:]
        filtered = self._filter.feed(data)
        write_all(1, data if self._options.raw else filtered)

    def _heard(self, notice: dict[str, object]) -> None:
        word = notice.get("notice")
        if word == "hello":
            self._vm_state, self._quiet_s = str(notice.get("state", "")), notice.get("quiet_s")
            self._pen = notice.get("pen") is True
            if self._vm_state == messages.STARTING and self._silence_at is not None:
                self._silence_at = monotonic() + SILENCE_STARTING
            key = self.key if self._on_terminal else ""
            self.notice(notices.banner(self.vm, key, notice, readonly=self._options.readonly))
            return
        if word == "state":
            self._vm_state = str(notice.get("state", ""))
        if word == "pen":
            had, self._pen = self._pen, notice.get("pen") is True
            if had == self._pen and had:
                return
        if word == "refused" and not self._on_terminal:
            self._pipe_status = EX_REFUSED
        text = notices.text(self.vm, self.key, notice)
        if text:
            self.notice(text)

    def _lost(self) -> None:
        assert self._link is not None
        self._link.close()
        self._link = None
        self._silence_at = None
        self._retry_at = monotonic() + RETRY
        self._give_up_at = monotonic() + REATTACH
        self.notice("the console service went away; attaching again (your VM is not affected)")

    def _reattach(self) -> None:
        request = messages.Console(vm=self.vm, readonly=self._options.readonly)
        try:
            _, pipes = self._context.broker.call(request, fds=PIPES)
        except VmshellError as error:
            if error.code == "wrong-state":
                self.notice(error.sentence())
                self._retry_at, self._result = None, EX_DONE
            elif monotonic() >= self._give_up_at or error.code not in ("relay-down", "broker-down", "busy", "vm-busy"):
                raise (error if error.code not in ("relay-down", "busy") else RelayDown()) from error
            else:
                self._retry_at = monotonic() + RETRY
            return
        self._retry_at = None
        self._link = Link(*pipes)
        self._fitting = True

    # --- words of our own --------------------------------------------------------------------------------------------

    def notice(self, text: str) -> None:
        """Say *text* so that it is told apart from what the guest prints."""
        self._bracket(f"[vmshell: {text}]")

    def _bracket(self, text: str) -> None:
        if not self._on_terminal:
            self._context.note(text)
            return
        lines = text.split("\n")
        if not self._context.terminal.dumb:
            lines = [f"\x1b[7m{line}\x1b[27m" for line in lines]
        write_all(1, ("\r\n" + "\r\n".join(lines) + "\r\n").encode("utf-8"))

    def _reset(self) -> bytes:
        if self._context.terminal.dumb:
            return b""
        return self._filter.reset() + (RAW_RESET if self._options.raw else b"")

    def _give_terminal_back(self) -> None:
        if not self._on_terminal:
            return
        terminal = self._context.terminal
        terminal.restore()  # writes the reset first
        if self._options.raw:
            # Answers that the guest's last bytes made the terminal type must not reach our prompt (E03).
            terminal.drain_answers()
        if self._context.interactive:
            terminal.quiet()


def fit(tail: bytes, replay: bytes) -> bytes:
    """What of a replay comes after *tail*, the last bytes already shown; all of it when they are not in it."""
    if not tail:
        return replay
    for length in (len(tail), 64, 16):
        at = replay.rfind(tail[-length:])
        if at >= 0:
            return replay[at + len(tail[-length:]) :]
    return replay
