"""Taps: before a VM starts its taps are made and its filter stands; when it has ended they go. A new tapnet hears all of it.

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
from .interfaces import WITH_TAP, restored
from .taps import close

if TYPE_CHECKING:
    from ...messages import ToTapnet
    from ..policies import Policies
    from ..runtime.loop import Loop
    from ..services.tapnet import Tapnet
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .attached import Attached
    from .dnsmasq import DnsmasqFiles
    from .interfaces import Interface, Interfaces
    from .tapnet_sync import TapnetSync
    from .taps import Done, Taps

DNSMASQ = "/usr/sbin/dnsmasq"
ANSWER_TIMEOUT = 20.0  # seconds; five hundred taps at once take one


class Attachments:
    """The taps of VMs that run on an installed host."""

    def __init__(
        self,
        *,
        loop: Loop,
        tapnet: Tapnet,
        policies: Policies,
        registry: Registry,
        interfaces: Interfaces,
        attached: Attached,
        dnsmasq: DnsmasqFiles,
        sync: TapnetSync,
    ) -> None:
        self._loop = loop
        self._tapnet = tapnet
        self._policies = policies
        self._registry = registry
        self._interfaces = interfaces
        self._attached = attached
        self._dnsmasq = dnsmasq
        self._sync = sync
        self._coming: dict[int, _Batch] = {}  # by the VM's number: what tapnet was told to make and has not yet

    # --- a VM's start and end -----------------------------------------------------------------------------------------

    def attach(self, vm: Vm, done: Done) -> None:
        """Make the taps of *vm*'s next run. `done(error, taps)`; the taps are the taker's to close."""
        interfaces = self._interfaces.of(vm, vm.booted or vm.definition, give=True)
        wanted = [interface for interface in interfaces if interface.network.kind in WITH_TAP]
        if not wanted:
            done(None, {})
            return
        if any(interface.address4 for interface in wanted):
            if not os.path.exists(DNSMASQ):
                raise NetworkFailed(problem="dnsmasq is not installed, so guests get no addresses: apt-get install dnsmasq-base")
            self._name(vm, interfaces, wanted)
        self._make(vm, wanted, done)

    def add(self, vm: Vm, index: int, done: Done) -> None:
        """Make the tap of one more interface of a VM that runs."""
        interface = self._interfaces.of(vm, vm.definition, give=True)[index]
        if interface.network.kind not in WITH_TAP:
            done(None, {})
            return
        # Its others as they run, not as they are defined by now.
        self._name(vm, sorted([*self._interfaces.known(vm), interface], key=lambda interface: interface.index), [interface])
        self._make(vm, [interface], done)

    def _name(self, vm: Vm, interfaces: list[Interface], coming: list[Interface]) -> None:
        """Have dnsmasq know *interfaces*, of which *coming* are about to be attached; raises NetworkFailed if a MAC is taken."""
        # tapnet looks, too, but by then dnsmasq would have taken the other interface's address away.
        twin = next((interface for interface in coming if self._attached.has_twin(vm, interface)), None)
        if twin:
            raise NetworkFailed(problem=f"another interface on this network has the MAC {twin.mac}")
        for other in self._registry.namesakes(vm):  # whose account was made anew: it is called otherwise now (D22)
            self._dnsmasq.write(other, self._interfaces.known(other))
        self._dnsmasq.write(vm, interfaces, coming)

    def _make(self, vm: Vm, wanted: list[Interface], done: Done) -> None:
        """Ask for taps; in the end every interface has one, or none of them is left."""

        def made(error: VmshellError | None, taps: Taps) -> None:
            try:
                # Else the run has ended meanwhile, its taps were taken away, and those of their names are the next run's.
                if self._coming.get(vm.number) is batch:
                    del self._coming[vm.number]
                    if error:
                        self.remove(vm, batch.indexes)
                    else:
                        # Not before: a new connection is told what exists, and these were still to be made.
                        self._attached.keep(vm, [*self._attached.of(vm), *wanted])
                        self._sync.open_ports()
            except Exception as exc:
                close(taps)  # the boot goes no further, and its end takes away the taps
                error = error or Internal(reference=unexpected(exc))
            done(error, taps)

        batch = self._coming[vm.number] = _Batch(wanted, made)
        self._loop.after(ANSWER_TIMEOUT, batch.too_late)  # first: whatever is raised below, what came is closed
        for interface in wanted:
            self._ask(self._interfaces.segment_message(interface), batch.failed)
            port = self._interfaces.port_message(vm, interface, create=True)
            self._sync.asked(port)
            self._tapnet.request(port, batch.taker(interface.index))

    def ended(self, vm: Vm) -> None:
        """Its QEMU is gone, or never was: so go its taps, and their filter. Who still waits for some gets none.

        tapnet does one thing after the other: what a later run asks for is made when these have come and gone.
        """
        coming = self._coming.pop(vm.number, None) or _Batch([], lambda error, taps: None)
        coming.failed(VmStopped(vm=vm.ref, problem="its taps were still to be made"))
        self.remove(vm, {interface.index for interface in self._attached.of(vm)} | coming.indexes)

    def remove(self, vm: Vm, indexes: set[int]) -> None:
        """Take these interfaces' taps and their filter away."""
        if not indexes:
            return
        self._attached.keep(vm, [interface for interface in self._attached.of(vm) if interface.index not in indexes])
        for index in sorted(indexes):
            self._sync.forget((vm.number, index))
            self._ask(Unplug(number=vm.number, nic=index))
        self._sync.open_ports()
        with contextlib.suppress(OSError):  # a full disk keeps no VM from its end
            self._dnsmasq.write(vm, self._interfaces.known(vm))

    def adopt(self, vm: Vm, taps: object) -> None:
        """A VM that went on while there was no broker keeps its taps, also on a network that the policy no longer has."""
        try:
            interfaces = [restored(row) for row in taps] if isinstance(taps, list) else []
        except (KeyError, TypeError) as exc:
            note("interfaces-unreadable", number=vm.number, problem=exc)
            return
        self._attached.keep(vm, interfaces)

    def health(self, repair: bool, done: Callable[[VmshellError | None, dict[str, object]], None]) -> None:
        """What tapnet has and lacks; with *repair* after it has put right what it can."""
        self._sync.refresh()
        if repair:
            self._ask(Settle())
        self._tapnet.request(Health(), lambda error, packet: done(error, packet.body.get("ok", {})))  # type: ignore[arg-type]

    # --- a new connection ---------------------------------------------------------------------------------------------

    def tell_all(self) -> None:
        """All that there is to be; tapnet compares it with what the kernel has."""
        self._sync.begin()
        attached = [interface for _, interfaces in self._attached for interface in interfaces]
        for interface in {interface.segment: interface for interface in sorted(attached, key=self._weight)}.values():
            self._ask(self._interfaces.segment_message(interface))
        self._sync.refresh()
        self._ask(Settle())

    def _weight(self, interface: Interface) -> tuple[bool, ...]:
        """Of interfaces that came to one segment at different times, the last by this says what it is.

        That is one that came while the network was what it is in the policy now; without any, one from when it was narrowest.
        """
        kept, now = interface.network, self._policies.catalogues.networks.get(interface.nic.network)
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
    """The interfaces of one start: done when each has its tap, or when one has none; then the others are closed."""

    def __init__(self, interfaces: list[Interface], done: Done) -> None:
        self.indexes = {interface.index for interface in interfaces}
        self._missing = set(self.indexes)
        self._error: VmshellError | None = None
        self._done = done
        self._taps: Taps = {}
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
                self._taps[index] = packet.take_fd()
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
            close(self._taps)
        self._done(self._error, self._taps)
