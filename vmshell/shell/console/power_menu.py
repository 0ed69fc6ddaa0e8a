"""The power menu of a console: asked inline, answered while the console goes on.

Four keys at least stand between a running VM and `kill`: the escape key, p, 4, y.
Runs in: the shell.
"""

from __future__ import annotations

from ... import messages
from ...errors import VmshellError, safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client.broker import Pending
    from ..context import Context


class PowerMenu:
    """`ask` shows it; while `asking`, keys go to `choose`; `pending` are requests under way, to be polled."""

    def __init__(self, context: Context, vm: str, notice: Callable[[str], None]) -> None:
        self._context = context
        self._vm = vm
        self._notice = notice
        self._step = ""
        self.pending: list[Pending] = []

    @property
    def asking(self) -> bool:
        return bool(self._step)

    def ask(self) -> None:
        self._step = "menu"
        self._notice(f"power of {self._vm}: 1 shut down  2 reboot  3 reset  4 kill  any other key: nothing")

    def choose(self, key: int) -> None:
        step, self._step = self._step, ""
        if step == "menu" and key == ord("1"):
            self._begin(messages.Shutdown(vm=self._vm), f"asking {self._vm} to switch itself off")
        elif step == "menu" and key == ord("2"):
            self._begin(messages.Reboot(vm=self._vm), f"asking {self._vm} to start again")
        elif step == "menu" and key in (ord("3"), ord("4")):
            self._step = "reset" if key == ord("3") else "kill"
            self._notice(f"y to {self._step} {self._vm} at once (what it has not written to disk is lost), any other key: no")
        elif step == "reset" and key in b"yY":
            self._begin(messages.Reset(vm=self._vm), f"resetting {self._vm}")
        elif step == "kill" and key in b"yY":
            self._begin(messages.Kill(vm=self._vm), f"pulling the plug of {self._vm}")
        else:
            self._notice("nothing done")

    def answer(self, ready: dict[int, int]) -> None:
        """Take the answers that have come."""
        for pending in [pending for pending in self.pending if pending.fileno() in ready]:
            try:
                got = pending.receive()
            except VmshellError as error:
                self._done(pending, error.sentence())
            except OSError:
                self._done(pending, "the VM service went away while at work on this")
            else:
                if isinstance(got, str):
                    self._notice(safe(got, 200))
                elif got is not None:
                    self._done(pending, f"{safe(got[0].get('name'), 64)}: {safe(got[0].get('state'), 20)}")

    def close(self) -> None:
        for pending in self.pending:
            pending.close()
        self.pending.clear()

    def _begin(self, request: messages.Request, sentence: str) -> None:
        try:
            self.pending.append(self._context.broker.begin(request))
        except VmshellError as error:
            self._notice(error.sentence())
        else:
            self._notice(sentence)

    def _done(self, pending: Pending, sentence: str) -> None:
        self.pending.remove(pending)
        pending.close()
        self._notice(sentence)
