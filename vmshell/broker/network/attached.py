"""The interfaces that VMs run with: what tapnet was told to make and to keep.

Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .interfaces import saved

if TYPE_CHECKING:
    from ..vm.vm import Vm
    from .interfaces import Interface

Running = list[tuple["Vm", "list[Interface]"]]


class Attached:
    """By the VM's number, and by segment and MAC."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Vm, list[Interface]]] = {}
        self._macs: dict[tuple[int, str], int] = {}  # whose VM's

    def __iter__(self) -> Iterator[tuple[Vm, list[Interface]]]:
        return iter(list(self._of.values()))

    def of(self, vm: Vm) -> list[Interface]:
        """The interfaces that *vm* runs with."""
        return self._of.get(vm.number, (vm, []))[1]

    def keep(self, vm: Vm, interfaces: list[Interface]) -> None:
        """Take these as the interfaces that *vm* runs with; they are written with its next state."""
        for interface in self.of(vm):
            if self._macs.get((interface.segment, interface.mac)) == vm.number:
                del self._macs[interface.segment, interface.mac]
        self._of.pop(vm.number, None)
        if interfaces:
            self._of[vm.number] = (vm, interfaces)
            self._macs |= {(interface.segment, interface.mac): vm.number for interface in interfaces}
        vm.attached = [saved(interface) for interface in interfaces]

    def has_twin(self, vm: Vm, interface: Interface) -> bool:
        """Say whether another VM runs with the MAC of *interface* on its segment."""
        return self._macs.get((interface.segment, interface.mac), vm.number) != vm.number
