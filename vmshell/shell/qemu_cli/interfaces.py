"""Network cards of a QEMU command line: -net, -nic, -netdev, and the -device that a netdev is tied to.

Runs in: the shell, for the verb `kvm` alone. Pure functions.
"""

from __future__ import annotations

from functools import partial

from ...model.keys import NET_KEYS
from .options import FORMS, FORWARD
from .words import Draft, Given, Missing, Refused, checked, entry_text, identifier, number

# What people call a card on the command line, and its name in a definition
MODELS = {
    "virtio": "virtio",
    "virtio-net": "virtio",
    "virtio-net-pci": "virtio",
    "e1000": "e1000",
    "e1000e": "e1000e",
    "rtl8139": "rtl8139",
}
DEVICES = {name: model for name, model in MODELS.items() if name != "virtio"}


class Card:
    """One network card that the guest is to see."""

    __slots__ = ("bootindex", "entry", "given", "ident")

    def __init__(self, given: Given, entry: dict[str, object], ident: str = "") -> None:
        self.given = given
        self.entry = entry
        self.ident = ident  # the -netdev it is tied to; empty for -net nic and -nic
        self.bootindex: int | None = None


class Network:
    """All cards of a command line. Without a word about the network there is one, as QEMU has it."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.cards: list[Card] = []
        self.backends: list[tuple[Given, str, list[str]]] = []
        self.users: list[tuple[Given, list[str]]] = []
        self.mentioned = False

    # --- one option at a time -----------------------------------------------------------------------------------------

    def net(self, given: Given) -> None:
        kind = self._kind(given)
        if kind == "nic":
            found = dict(given.properties("kind", ("kind", "model", "macaddr")))
            self.cards.append(Card(given, self._entry(found)))
        elif kind == "user":
            self.users.append((given, self._forwards(given.properties("kind", ("kind", "hostfwd"), ("hostfwd",)))))
        else:
            self._none(given, kind)

    def nic(self, given: Given) -> None:
        kind = self._kind(given)
        if kind != "user":
            return self._none(given, kind)
        found = given.properties("kind", ("kind", "model", "mac", "hostfwd"), ("hostfwd",))
        entry = self._entry(dict(found))
        self._forward(entry, self._forwards(found))
        self.cards.append(Card(given, entry))

    def netdev(self, given: Given) -> None:
        kind = self._kind(given)
        if kind != "user":
            raise Refused(f"{kind} is not offered", FORWARD)
        found = given.properties("kind", ("kind", "id", "hostfwd"), ("hostfwd",))
        ident = identifier(dict(found).get("id", ""))
        if any(ident == other for _, other, _ in self.backends):
            raise Refused(f"there is another -netdev with id={ident}", "another id")
        self.backends.append((given, ident, self._forwards(found)))

    def device(self, given: Given, driver: str) -> None:
        self.mentioned = True
        found = dict(given.properties("driver", ("driver", "netdev", "mac", "bootindex")))
        if "netdev" not in found:
            raise Refused("it names no netdev", f"-netdev user,id=ID and -device {driver},netdev=ID")
        card = Card(given, self._entry({**found, "model": driver}), found["netdev"])
        if "bootindex" in found:
            card.bootindex = number("bootindex", found["bootindex"], 9999)
        self.cards.append(card)

    def redirect(self, given: Given) -> None:
        """-redir: nothing of it is accepted, but the forward it asked for is spelled out."""
        parts = given.value.split(":")
        if len(parts) == 4 and not parts[2] and parts[0] in ("", "tcp", "udp") and parts[1].isdigit() and parts[3].isdigit():
            raise Refused(given.option.reason, f"-nic user,hostfwd={parts[0] or 'tcp'}::{parts[1]}-:{parts[3]}")
        raise Refused(given.option.reason, given.option.instead)

    def _kind(self, given: Given) -> str:
        """The backend, the first word; refused with its own reason if it is not a person's to have."""
        self.mentioned = True
        kind = given.value.partition(",")[0].removeprefix("type=")
        if ("-netdev", kind) in FORMS:
            verdict, reason, instead = FORMS["-netdev", kind]
            raise Refused(reason, instead, given.option.page or verdict)
        return kind

    def _none(self, given: Given, kind: str) -> None:
        if given.value != "none":
            raise Refused(given.option.reason if kind != "none" else "none stands alone", given.option.instead)
        given.row.became = "no network card"

    def _entry(self, found: dict[str, str]) -> dict[str, object]:
        entry: dict[str, object] = {"network": "users"}
        if "model" in found:
            model = MODELS.get(found["model"])
            if model is None:
                raise Refused(f"{found['model']} is no card that VMs have", "model=virtio|e1000e|e1000|rtl8139")
            entry["model"] = model
        mac = found.get("mac", found.get("macaddr"))
        if mac is not None:
            entry["mac"] = checked(NET_KEYS["mac"], mac, "mac")
        return entry

    def _forwards(self, found: list[tuple[str, str]]) -> list[str]:
        return [self._hostfwd(value) for name, value in found if name == "hostfwd"]

    def _hostfwd(self, value: str) -> str:
        """`tcp::2222-:22` as `tcp:2222:22`. On which address the host listens is the policy's to say, so none is taken."""
        host, dash, guest = value.partition("-")
        left, right = host.split(":"), guest.split(":")
        if not dash or len(left) != 3 or len(right) != 2:
            raise Refused(f"hostfwd={value} is no forward", FORWARD)
        if left[1] or right[0]:
            raise Refused("addresses of a forward are the policy's to say", FORWARD)
        forward = f"{left[0] or 'tcp'}:{left[2]}:{right[1]}"
        checked(NET_KEYS["forward"], [forward], "hostfwd")
        return forward

    # --- all together -------------------------------------------------------------------------------------------------

    def finish(self) -> list[dict[str, object]]:
        """The [[net]] tables, in order."""
        self._hub()
        for given, ident, forwards in self.backends:
            self.draft.attempt(given, partial(self._tie, given, ident, forwards))
        idents = {ident for _, ident, _ in self.backends}
        for card in self.cards:
            if card.ident and card.ident not in idents:
                missing = Missing(f"there is no -netdev with id={card.ident}", f"-netdev user,id={card.ident} beside it")
                self.draft.attempt(card.given, missing.throw)
        for index, card in enumerate(self.cards):
            if not card.given.row.refused:
                card.given.row.became = entry_text(f"net{index}", card.entry)
        if not self.mentioned:
            return [{"network": "users"}]
        return [card.entry for card in self.cards]

    def _hub(self) -> None:
        """-net nic and -net user are two ends of one cable; one is nothing without the other."""
        cards = [card for card in self.cards if card.given.option.name == "-net"]
        for card in cards:
            if not self.users:
                self.draft.attempt(card.given, Missing("no -net says what it is connected to", "-net user beside it").throw)
        for index, (given, forwards) in enumerate(self.users):
            if not cards:
                self.draft.attempt(given, Missing("no card is connected to it", "-net nic beside it").throw)
            elif index:
                self.draft.attempt(given, Refused("there is another -net user", "say it once").throw)
            else:
                self._forward(cards[0].entry, forwards)
                given.row.became = "net0: network=users"

    def _tie(self, given: Given, ident: str, forwards: list[str]) -> None:
        tied = [card for card in self.cards if card.ident == ident]
        if not tied:
            raise Missing("no card is connected to it", f"-device virtio-net-pci,netdev={ident} beside it")
        for second in tied[1:]:
            second.given.row.refuse(Refused(f"{ident} already has a card", "a -netdev of its own"))
        self._forward(tied[0].entry, forwards)
        given.row.became = entry_text(f"net{self.cards.index(tied[0])}", {"network": "users", **tied[0].entry})

    def _forward(self, entry: dict[str, object], forwards: list[str]) -> None:
        if forwards:
            entry["forward"] = forwards
