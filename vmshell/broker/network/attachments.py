"""Cables: before a VM starts its taps are made and its filter stands; when it has ended they go. A new tapnet hears all of it.

Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...errors import Internal, VmshellError
from ...messages import Health, Settle, Unplug
from ...refusals import NetworkFailed, TapnetDown, VmStopped
from ..runtime.log import note, unexpected
from ..services.tapnet import TapnetLink
from . import passt
from .interfaces import WITH_TAP, cards_of, known_cards, port_message, restored, saved, segment_message
from .tapnet_sync import Upkeep

if TYPE_CHECKING:
    from ...messages import ToTapnet
    from ..context import Context
    from ..vm.registry import Vm
    from .interfaces import Card

Cables = dict[int, int]  # by the card's index: a tap, or the stream that passt serves
Plugged = Callable[[VmshellError | None, Cables], None]
DNSMASQ = "/usr/sbin/dnsmasq"
ANSWER_TIMEOUT = 20.0  # seconds; five hundred taps at once take one


class Networks:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._tapnet = TapnetLink(context.loop, context.layout.tapnet_socket, self._tell_all)
        self._plugged: dict[int, tuple[Vm, list[Card]]] = {}  # what tapnet was told to make and to keep
        self._macs: dict[tuple[int, str], int] = {}  # of those cards, by segment and MAC: whose VM's
        self._coming: dict[int, _Batch] = {}  # by the VM's number: what tapnet was told to make and has not yet
        self.upkeep = Upkeep(context, self._tapnet, self._plugged)

    def connect(self) -> None:
        """In session mode there is nobody to connect to."""
        if not self._context.layout.embedded:
            self._tapnet.connect()
            self._context.accounts.watch()

    def close(self) -> None:
        self._tapnet.close()

    # --- a VM's start and end -----------------------------------------------------------------------------------------

    def plug(self, vm: Vm, done: Plugged) -> None:
        """Make the cables of *vm*'s next run. `done(error, cables)`; the cables are the taker's to close."""
        cards = cards_of(self._context, vm, vm.booted or vm.definition, give=not self._context.layout.embedded)
        wanted = [card for card in cards if card.network.kind in WITH_TAP]
        if self._context.layout.embedded:
            if wanted:
                problem = f"network {wanted[0].nic.network} is {wanted[0].network.kind}, and a session has only user and none"
                raise NetworkFailed(problem=problem)
            done(None, passt.start_all(self._context, cards))
            return
        if not wanted:
            done(None, {})
            return
        if any(card.address4 for card in wanted):
            if not os.path.exists(DNSMASQ):
                raise NetworkFailed(problem="dnsmasq is not installed, so guests get no addresses: apt-get install dnsmasq-base")
            self._name(vm, cards, wanted)
        self._make(vm, wanted, done)

    def add(self, vm: Vm, index: int, done: Plugged) -> None:
        """Make the cable of one more card of a VM that runs."""
        card = cards_of(self._context, vm, vm.definition, give=True)[index]
        if card.network.kind not in WITH_TAP:
            done(None, {})
            return
        # Its others as they run, not as they are defined by now.
        self._name(vm, sorted([*known_cards(self._context, vm), card], key=lambda card: card.index), [card])
        self._make(vm, [card], done)

    def _name(self, vm: Vm, cards: list[Card], coming: list[Card]) -> None:
        """Have dnsmasq know *cards*, of which *coming* are about to be plugged in; raises NetworkFailed if a MAC is taken."""
        # tapnet looks, too, but by then dnsmasq would have taken the other card's address away.
        twin = next((card for card in coming if self._macs.get((card.segment, card.mac), vm.number) != vm.number), None)
        if twin:
            raise NetworkFailed(problem=f"another card on this network has the MAC {twin.mac}")
        context = self._context
        for other in context.registry.namesakes(vm):  # whose account was made anew: it is called otherwise now (D22)
            context.resolving.write(other, known_cards(context, other))
        context.resolving.write(vm, cards, coming)

    def _make(self, vm: Vm, wanted: list[Card], done: Plugged) -> None:
        """Ask for taps; in the end every card has one, or none of them is left."""

        def made(error: VmshellError | None, cables: Cables) -> None:
            try:
                # Else the run has ended meanwhile, its taps were taken away, and those of their names are the next run's.
                if self._coming.get(vm.number) is batch:
                    del self._coming[vm.number]
                    if error:
                        self.remove(vm, batch.indexes)
                    else:
                        # Not before: a new connection is told what exists, and these were still to be made.
                        self._keep(vm, [*self.plugged(vm), *wanted])
                        self.upkeep.open_ports()
            except Exception as exc:
                close(cables)  # the boot goes no further, and its end takes away the taps
                error = error or Internal(reference=unexpected(exc))
            done(error, cables)

        batch = self._coming[vm.number] = _Batch(wanted, made)
        self._context.loop.after(ANSWER_TIMEOUT, batch.too_late)  # first: whatever is raised below, what came is closed
        for card in wanted:
            self._ask(segment_message(self._context, card), batch.failed)
            port = port_message(self._context, vm, card, create=True)
            self.upkeep.asked(port)
            self._tapnet.request(port, batch.taker(card.index))

    def _keep(self, vm: Vm, cards: list[Card]) -> None:
        """These are plugged in; written with the VM's next state."""
        for card in self.plugged(vm):
            if self._macs.get((card.segment, card.mac)) == vm.number:
                del self._macs[card.segment, card.mac]
        self._plugged.pop(vm.number, None)
        if cards:
            self._plugged[vm.number] = (vm, cards)
            self._macs |= {(card.segment, card.mac): vm.number for card in cards}
        vm.cables = [saved(card) for card in cards]

    def ended(self, vm: Vm) -> None:
        """Its QEMU is gone, or never was: so go its taps, and their filter. Who still waits for some gets none.

        tapnet does one thing after the other: what a later run asks for is made when these have come and gone.
        """
        coming = self._coming.pop(vm.number, None) or _Batch([], lambda error, cables: None)
        coming.failed(VmStopped(vm=vm.ref, problem="its cables were still to be made"))
        self.remove(vm, {card.index for card in self.plugged(vm)} | coming.indexes)

    def remove(self, vm: Vm, indexes: set[int]) -> None:
        """Take these cards' taps and their filter away."""
        if not indexes:
            return
        self._keep(vm, [card for card in self.plugged(vm) if card.index not in indexes])
        for index in sorted(indexes):
            self.upkeep.forget((vm.number, index))
            self._ask(Unplug(number=vm.number, nic=index))
        self.upkeep.open_ports()
        with contextlib.suppress(OSError):  # a full disk keeps no VM from its end
            self._context.resolving.write(vm, known_cards(self._context, vm))

    def adopt(self, vm: Vm, cables: object) -> None:
        """A VM that went on while there was no broker keeps its cables, also on a network that the policy no longer has."""
        try:
            cards = [restored(row) for row in cables] if isinstance(cables, list) else []
        except (KeyError, TypeError) as exc:
            note("cables-unreadable", number=vm.number, problem=exc)
            return
        self._keep(vm, cards)

    def refresh(self) -> None:
        """Policy, groups or accounts may have changed."""
        if not self._context.layout.embedded:
            self.upkeep.refresh()

    def plugged(self, vm: Vm) -> list[Card]:
        """The cards that are plugged in."""
        return self._plugged.get(vm.number, (vm, []))[1]

    def health(self, repair: bool, done: Callable[[VmshellError | None, dict[str, object]], None]) -> None:
        """What tapnet has and lacks; with *repair* after it has put right what it can."""
        self.upkeep.refresh()
        if repair:
            self._ask(Settle())
        self._tapnet.request(Health(), lambda error, packet: done(error, packet.body.get("ok", {})))  # type: ignore[arg-type]

    # --- a new connection ---------------------------------------------------------------------------------------------

    def _tell_all(self) -> None:
        """All that there is to be; tapnet compares it with what the kernel has."""
        self.upkeep.begin()
        plugged = [card for _, cards in self._plugged.values() for card in cards]
        for card in {card.segment: card for card in sorted(plugged, key=self._weight)}.values():
            self._ask(segment_message(self._context, card))
        self.upkeep.refresh()
        self._ask(Settle())

    def _weight(self, card: Card) -> tuple[bool, ...]:
        """Of cards that came to one segment at different times, the last by this says what it is.

        That is one that came while the network was what it is in the policy now; without any, one from when it was narrowest.
        """
        kept, now = card.network, self._context.policy.catalogues.networks.get(card.nic.network)
        current = now is not None and (now.kind, now.outside) == (kept.kind, kept.outside)
        return current, kept.outside != "all", kept.outside == "none", kept.kind == "service"

    def _ask(self, message: ToTapnet, failed: Callable[[VmshellError], None] | None = None) -> None:
        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if error and failed:
                failed(error)
            elif error:
                note("tapnet-refused", verb=message.verb, problem=error)

        self._tapnet.request(message, answered)


class _Batch:
    """The cards of one start: done when each has its cable, or when one has none; then the others are closed."""

    def __init__(self, cards: list[Card], done: Plugged) -> None:
        self.indexes = {card.index for card in cards}
        self._missing = set(self.indexes)
        self._error: VmshellError | None = None
        self._done = done
        self._cables: Cables = {}
        self._finished = False

    def failed(self, error: VmshellError) -> None:
        self._error = self._error or error

    def taker(self, index: int) -> Callable[[VmshellError | None, wire.Packet], None]:
        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if self._finished:
                return
            if error:
                self.failed(error)
            elif packet.fds:
                self._cables[index] = packet.take_fd()
            else:
                self.failed(NetworkFailed(problem="the network service made a tap and did not hand it over"))
            self._missing.discard(index)
            if not self._missing:
                self._finish()

        return answered

    def too_late(self) -> None:
        """tapnet is there and says nothing."""
        if not self._finished:
            self.failed(TapnetDown())
            self._finish()

    def _finish(self) -> None:
        self._finished = True
        if self._error:
            close(self._cables)
        self._done(self._error, self._cables)


def close(cables: Cables) -> None:
    """Close them, once: afterwards there are none."""
    while cables:
        os.close(cables.popitem()[1])
