"""The data that dnsmasq reads: for each VM who has which address and name. dnsmasq itself is a service of its own.

    names/dhcp-hosts/N     MAC,tags,address: the only ones who get an answer
         /dhcp-opts/N      host name and domain of VM N
         /hosts/N          address and name of each interface, forward and reverse

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
from .interfaces import dns_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..runtime.loop import Loop
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .interfaces import Interface, Interfaces

FOLDERS = ("hosts", "dhcp-hosts", "dhcp-opts")
SOON, AGAIN = 0.2, 3.0  # seconds: what changes in a burst is read again once, and who removes VM after VM hinders nobody


class DnsmasqFiles:
    """`attached` gives the interfaces that a VM runs with; `restart` has dnsmasq started anew."""

    def __init__(
        self,
        *,
        folder: str,
        loop: Loop,
        registry: Registry,
        interfaces: Interfaces,
        attached: Callable[[Vm], list[Interface]],
        restart: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._loop = loop
        self._registry = registry
        self._interfaces = interfaces
        self._attached = attached
        self._restart_now = restart
        self._restart_due = False
        self._restarted = 0.0

    def begin(self) -> None:
        """Write the files of all VMs anew, and have dnsmasq start with them."""
        for folder in ("", *FOLDERS):
            os.makedirs(f"{self._folder}/{folder}", exist_ok=True)
            os.chmod(f"{self._folder}/{folder}", 0o755)  # noqa: S103 - dnsmasq reads it under a uid of its own
        known, domain = set(), cache(self._interfaces.domain_of)  # the broker waits for each that is asked
        for vm in self._registry:
            interfaces = self._interfaces.known(vm)
            if any(interface.address4 for interface in interfaces):
                self.write(vm, interfaces, domain=domain(vm.owner, vm.uid))
                known.add(str(vm.number))
        for folder in FOLDERS:
            for name in os.listdir(f"{self._folder}/{folder}"):
                if name not in known:
                    os.unlink(f"{self._folder}/{folder}/{name}")
        self._restart()

    def write(self, vm: Vm, interfaces: list[Interface], coming: Sequence[Interface] = (), domain: str = "") -> None:
        """Give *vm*'s interfaces their addresses and names, in place of what stood there; for the rest see `entries`."""
        texts = self.entries(vm, interfaces, coming, domain)
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
            self._loop.after(max(SOON, self._restarted + AGAIN - monotonic()), self._restart)

    def _restart(self) -> None:
        self._restart_due = False
        self._restarted = monotonic()
        self._restart_now()

    def entries(self, vm: Vm, interfaces: list[Interface], coming: Sequence[Interface] = (), domain: str = "") -> dict[str, str]:
        """Return the text of each of a VM's files, by its folder; *domain* is its owner's, if that was asked for already.

        A MAC of its owner's choice gets an address only while its interface is attached, or is *coming* to be: two VMs may have
        chosen the same, and of those only one can run (E33).
        """
        domain, there = domain or self._interfaces.domain_of(vm.owner, vm.uid), [*self._attached(vm), *coming]
        hosts, leases, options = "", "", ""
        for interface in interfaces:
            if not interface.address4:
                continue
            tag, name = f"v{vm.number}c{interface.index}", dns_name(domain, vm, interfaces, interface)
            hosts += "".join(f"{address} {name}\n" for address in (interface.address4, interface.address6) if address)
            six = f"[{interface.address6}]," if interface.address6 else ""
            if not interface.nic.mac or interface in there:
                # Only where it is attached: a MAC may be somebody else's on another segment.
                leases += f"{interface.mac},tag:{bridge_name(interface.segment)},set:{tag},{six}{interface.address4}\n"
            said = (f"12,{vm.name}", f"15,{domain}", f"option:domain-search,{domain}")
            options += "".join(f"tag:{tag},{option}\n" for option in said)
            if interface.network.kind == "service" and interface.network.outside == "none":
                options += f"tag:{tag},3\n"  # no router: a guest with another interface would take this one for its way out
        # In this order: who gets an address has its options by then.
        return {"hosts": hosts, "dhcp-opts": options, "dhcp-hosts": leases}
