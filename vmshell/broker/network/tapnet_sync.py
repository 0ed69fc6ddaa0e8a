"""What tapnet is told beyond cables: who may reach what, whose sockets are confined, how fast a card is.

It follows from policy, grants and groups, is worked out anew whenever one of them may have changed, and what is another than was
told last is told.
Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...errors import VmshellError
from ...messages import NUMBERS_MAX, OPENINGS_MAX, Confine, Open, Settings
from ...model.limitkinds import FIRST_CONFINED
from ...refusals import TapnetDown
from ..runtime.log import note
from .interfaces import ADDRESSED, port_message
from .openings import Ways

if TYPE_CHECKING:
    from ...messages import Port, ToTapnet
    from ..context import Context
    from ..runtime.loop import Timer
    from ..services.tapnet import TapnetLink
    from ..vm.registry import Vm
    from .interfaces import Card

Key = tuple[int, int]  # a card: the VM's number and its own
Done = Callable[[VmshellError | None], None]
RETRY = 5.0  # seconds after tapnet refused to open or close a way


class Upkeep:
    """*plugged* is who runs with which cards, by the VM's number; it is the caller's and changes."""

    def __init__(self, context: Context, tapnet: TapnetLink, plugged: dict[int, tuple[Vm, list[Card]]]) -> None:
        self._context = context
        self._tapnet = tapnet
        self._plugged = plugged
        self._settings: list[dict[str, object]] = []
        self._ports: dict[Key, dict[str, object]] = {}
        self._opened: dict[Key, list[dict[str, object]] | None] = {}  # None: it was refused
        self._retry: Timer | None = None
        self._confined: frozenset[int] = frozenset()
        self.met: set[int] = set()  # members who were here and were not in the list

    def begin(self) -> None:
        """There is a new tapnet, which knows nothing."""
        self._settings = []
        self._ports.clear()
        self._opened.clear()
        self._tell_settings()

    def asked(self, port: Port) -> None:
        """tapnet was asked to make *port*."""
        self._ports[port.number, port.nic] = _facts(port)

    def forget(self, key: Key) -> None:
        """The card is no longer plugged in."""
        self._opened.pop(key, None)
        self._ports.pop(key, None)

    # --- who may reach what -------------------------------------------------------------------------------------------

    def open_ports(self, done: Done | None = None) -> None:
        """Tell tapnet who may reach what, as it follows from what is published and who runs; then `done`, with its refusal."""
        running = list(self._plugged.values())
        ways = Ways(self._context, running)
        changed = []
        for vm, cards in running:
            for card in cards:
                if card.network.kind in ADDRESSED:
                    found = ways.to(vm, card)
                    if found != self._opened.get((vm.number, card.index), []):
                        changed.append((vm, card, found))
        waiting = _Answers(len(changed), done)
        for vm, card, found in changed:
            self._open(vm, card, found, waiting)

    def _open(self, vm: Vm, card: Card, found: list[dict[str, object]], waiting: _Answers) -> None:
        key = vm.number, card.index
        self._opened[key] = found
        if len(found) > OPENINGS_MAX:
            # A group is large: who is behind the last place waits, and everybody else goes on.
            note("too-many-openings", number=vm.number, owner=vm.owner, vm=vm.name, count=len(found))

        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if error and key in self._opened:
                note("tapnet-refused", verb=Open.verb, problem=error)
                self._opened[key] = None
                if not isinstance(error, TapnetDown):  # a new tapnet is told everything
                    if self._retry:
                        self._retry.cancel()  # one is for all that was refused
                    self._retry = self._context.loop.after(RETRY, self.open_ports)
            waiting.one(error)

        self._tapnet.request(Open(number=vm.number, nic=card.index, openings=found[:OPENINGS_MAX]), answered)

    def waits(self, vm: Vm) -> str:
        """That not all ways to *vm* have room, in words; empty if they have."""
        for card in self._plugged.get(vm.number, (vm, []))[1]:
            found = self._opened.get((vm.number, card.index))
            if found and len(found) > OPENINGS_MAX:
                ways = f"{OPENINGS_MAX} of {len(found)} ways to {card.name}"
                return f"{ways} are open, single users' before groups'; the rest waits"
        return ""

    def rate(self, vm: Vm, card: Card) -> int:
        """What holds for a card that is plugged in, in kbit/s each way; 0 is no limit."""
        told = self._ports.get((vm.number, card.index))
        return int(str(told.get("rate", 0))) if told else self._context.effective(vm.owner).limits.net_rate

    # --- policy, groups and accounts ----------------------------------------------------------------------------------

    def refresh(self, done: Done | None = None) -> None:
        """Policy, groups or accounts may have changed: tell tapnet what is different now."""
        self._tell_settings()
        for vm, cards in self._plugged.values():
            for card in cards:
                self._tell_port(vm, card)
        self.open_ports(done)

    def meet(self, uid: int) -> None:
        """*uid* is a member who is here. Who was none when the list was made, or was not in it, gets into it now (A06)."""
        apart = self._context.policy.host.ssh_forwarding and not self._context.layout.embedded
        if uid and apart and uid not in self._confined:
            self.met.add(uid)
            self._tell_settings()

    def confined(self) -> int:
        """Of how many accounts the sockets are held to their own VMs."""
        return len(self._confined)

    def _tell_settings(self) -> None:
        host, known = self._context.policy.host, self._context.accounts
        # A directory may not list everybody whom it knows.
        self.met = {uid for uid in self.met if host.group in known.groups_of(known.user_of(uid))}
        confined = {*known.members(host.group), *self.met} if host.ssh_forwarding else set()
        self._confined = frozenset(uid for uid in confined if uid >= FIRST_CONFINED)
        uids = sorted(self._confined)
        messages = [
            Settings(pool4=host.ipv4_pool, pool6=host.ipv6_pool, confined=uids[:NUMBERS_MAX]),
            *(Confine(uids=uids[at : at + NUMBERS_MAX]) for at in range(NUMBERS_MAX, len(uids), NUMBERS_MAX)),
        ]
        bodies = [message.to_body() for message in messages]
        if bodies != self._settings:
            self._settings = bodies
            for message in messages:
                self._ask(message)

    def _tell_port(self, vm: Vm, card: Card) -> None:
        port = port_message(self._context, vm, card, create=False)
        if self._ports.get((vm.number, card.index)) != _facts(port):
            self.asked(port)
            self._ask(port, lambda: self._ports.pop((vm.number, card.index), None))

    def _ask(self, message: ToTapnet, refused: Callable[[], object] | None = None) -> None:
        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if error:
                note("tapnet-refused", verb=message.verb, problem=error)
            if error and refused:
                refused()

        self._tapnet.request(message, answered)


def _facts(port: Port) -> dict[str, object]:
    """All of it but how it is asked for."""
    return {**port.to_body(), "create": False}


class _Answers:
    """As many as are awaited; then `done`, with the first error."""

    def __init__(self, count: int, done: Done | None) -> None:
        self._left = count
        self._error: VmshellError | None = None
        self._done = done
        if not count and done:
            done(None)

    def one(self, error: VmshellError | None) -> None:
        self._error = self._error or error
        self._left -= 1
        if not self._left and self._done:
            self._done(self._error)
