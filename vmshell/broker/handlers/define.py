"""The verbs that give a VM its definition: new, define, set and unset.

Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import Change, New
from ...messages import Define as DefineRequest
from ...model import definition as definitions
from ..lifecycle.validate import changed

if TYPE_CHECKING:
    from ..lifecycle.boot import Boots
    from ..lifecycle.define import Define
    from ..lifecycle.removal import Removal
    from ..lifecycle.validate import Validation
    from ..runtime.call import Call
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers


class DefineHandlers:
    """Takes new VMs and changes of their definitions."""

    def __init__(self, *, registry: Registry, validation: Validation, define: Define, boots: Boots, removal: Removal) -> None:
        self._registry = registry
        self._validation = validation
        self._definitions = define
        self._boots = boots
        self._removal = removal

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {New: self._new, DefineRequest: self._define, Change: self._change}

    def _new(self, call: Call, request: New) -> None:
        """Define a VM from a catalogue image."""
        wanted = self._validation.from_image(request)
        self._definitions.create(call, wanted, once=False, done=lambda vm: self._made_known(call, vm))

    def _define(self, call: Call, request: DefineRequest) -> None:
        """Make a VM from a text, or give one another; `once` boots it for this one run."""
        definition = definitions.parse(request.text, request.vm)
        if request.once:
            self._definitions.create(call, definition, once=True, done=lambda vm: self._boot_once(call, vm))
            return
        vm = self._registry.get(call.peer.uid, request.vm)
        if vm is not None and not request.new and vm.owner == call.peer.user:
            self._definitions.redefine(call, vm, definition)
        else:
            self._definitions.create(call, definition, once=False, done=lambda vm: self._made_known(call, vm))

    def _change(self, call: Call, request: Change, vm: Vm) -> None:
        self._definitions.redefine(call, vm, changed(vm, request))

    def _boot_once(self, call: Call, vm: Vm) -> None:
        try:
            self._boots.boot(call, vm, console=True)
        except VmshellError:
            self._removal.remove(vm)
            raise

    def _made_known(self, call: Call, vm: Vm) -> None:
        call.reply({"name": vm.ref, "state": vm.state, "missing": self._validation.missing(vm, vm.definition)})
