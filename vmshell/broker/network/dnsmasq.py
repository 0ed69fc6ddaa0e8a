"""The data that dnsmasq reads: for each VM who has which address and name. dnsmasq itself is a service of its own.

    names/dhcp-hosts/N     MAC,tags,address: the only ones who get an answer
         /dhcp-opts/N      host name and domain of VM N
         /hosts/N          address and name of each card, forward and reverse

Its configuration is none of the broker's: the service makes it from root's policy whenever it starts. dnsmasq sees a new file at
once; what was changed or taken away it forgets when it is started anew. (Told to read all again, dnsmasq 2.90 ends by a signal as
soon as anybody has a lease.) It has nothing to lose: every address is in the files.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING

from ...numbering import bridge_name
from ..runtime.files import read_text, write_fast
from .interfaces import dns_name, domain_of, known_cards

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..context import Context
    from ..vm.registry import Vm
    from .interfaces import Card

FOLDERS = ("hosts", "dhcp-hosts", "dhcp-opts")
SOON, AGAIN = 0.2, 3.0  # seconds: what changes in a burst is read again once, and who removes VM after VM hinders nobody


class Resolving:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._folder = context.layout.names
        self._restart_due = False
        self._restarted = 0.0

    def begin(self) -> None:
        """Write the files of all VMs anew, and have dnsmasq start with them."""
        context = self._context
        for folder in ("", *FOLDERS):
            os.makedirs(f"{self._folder}/{folder}", exist_ok=True)
            os.chmod(f"{self._folder}/{folder}", 0o755)  # noqa: S103 - dnsmasq reads it under a uid of its own
        known, domain = set(), cache(lambda owner, uid: domain_of(context, owner, uid))  # the broker waits for each that is asked
        for vm in context.registry:
            cards = known_cards(context, vm)
            if any(card.address4 for card in cards):
                self.write(vm, cards, domain=domain(vm.owner, vm.uid))
                known.add(str(vm.number))
        for folder in FOLDERS:
            for name in os.listdir(f"{self._folder}/{folder}"):
                if name not in known:
                    os.unlink(f"{self._folder}/{folder}/{name}")
        self._restart()

    def write(self, vm: Vm, cards: list[Card], coming: Sequence[Card] = (), domain: str = "") -> None:
        """Give *vm*'s cards their addresses and names; what stood there for it before is replaced. The others: see `entries`."""
        texts = entries(self._context, vm, cards, coming, domain)
        changed = [self._write(f"{folder}/{vm.number}", text) for folder, text in texts.items()]
        if True in changed:
            self._restart_soon()

    def forget(self, vm: Vm) -> None:
        """The VM is gone for good."""
        for folder in FOLDERS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._folder}/{folder}/{vm.number}")
                self._restart_soon()

    def _write(self, name: str, text: str) -> bool:
        """Write a file that everybody may read; True if it replaced one that said something else."""
        path = f"{self._folder}/{name}"
        try:
            before = read_text(path)
        except OSError:
            before = ""
        if before != text:
            # Beside its folder: dnsmasq reads every file in it.
            beside = f"{self._folder}/.new"
            write_fast(beside, text)
            os.chmod(beside, 0o644)
            os.rename(beside, path)
        return before not in ("", text)

    def _restart_soon(self) -> None:
        if not self._restart_due:
            self._restart_due = True
            self._context.loop.after(max(SOON, self._restarted + AGAIN - monotonic()), self._restart)

    def _restart(self) -> None:
        self._restart_due = False
        self._restarted = monotonic()
        if self._context.host.systemd:
            self._context.launcher.restart_names()


def entries(context: Context, vm: Vm, cards: list[Card], coming: Sequence[Card] = (), domain: str = "") -> dict[str, str]:
    """The text of each of a VM's files, by its folder; *domain* is its owner's, if that was asked for already.

    A MAC of its owner's choice gets an address only while its card is plugged in, or is *coming* to be: two VMs may have chosen
    the same, and of those only one can run (E33).
    """
    domain, there = domain or domain_of(context, vm.owner, vm.uid), [*context.networks.plugged(vm), *coming]
    hosts, leases, options = "", "", ""
    for card in cards:
        if not card.address4:
            continue
        tag, name = f"v{vm.number}c{card.index}", dns_name(domain, vm, cards, card)
        hosts += "".join(f"{address} {name}\n" for address in (card.address4, card.address6) if address)
        six = f"[{card.address6}]," if card.address6 else ""
        if not card.nic.mac or card in there:
            # Only where it is plugged in: a MAC may be somebody else's on another segment.
            leases += f"{card.mac},tag:{bridge_name(card.segment)},set:{tag},{six}{card.address4}\n"
        said = (f"12,{vm.name}", f"15,{domain}", f"option:domain-search,{domain}")
        options += "".join(f"tag:{tag},{option}\n" for option in said)
        if card.network.kind == "service" and card.network.outside == "none":
            options += f"tag:{tag},3\n"  # no router: a guest with another card would take this one for its way out
    # In this order: who gets an address has its options by then.
    return {"hosts": hosts, "dhcp-opts": options, "dhcp-hosts": leases}
