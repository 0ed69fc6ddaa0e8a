"""After our own start: the VMs that went on while there was no broker, and those that start with the host.

Runs in: the broker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import ALIVE, FAILED, OFF, QUEUED, RUNNING, STARTING, STOPPING, Forget
from ..host.processes import same_process
from ..runtime.log import note
from . import orphans
from .runs import Run
from .start import clean

if TYPE_CHECKING:
    from ...layout import Layout
    from ..services.launcher import Launcher
    from ..services.relay import Relay
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .boot import Boots
    from .removal import Removal
    from .runs import Runs
    from .stop import Stops


class Adoption:
    """`adopt_network` takes a VM's interfaces as they were written down."""

    def __init__(
        self,
        *,
        layout: Layout,
        registry: Registry,
        launcher: Launcher,
        relay: Relay,
        adopt_network: Callable[[Vm, object], None],
        runs: Runs,
        boots: Boots,
        stops: Stops,
        removal: Removal,
    ) -> None:
        self._layout = layout
        self._registry = registry
        self._launcher = launcher
        self._relay = relay
        self._adopt_network = adopt_network
        self._runs = runs
        self._boots = boots
        self._stops = stops
        self._removal = removal

    def adopt(self) -> None:
        """Find the VMs that went on while there was no broker, and boot those that were still waiting for their turn."""
        ended = []
        for vm in self._registry:
            saved = self._registry.saved_run(vm.number)
            if saved.get("state") == QUEUED:
                self._boots.enter(self._runs.begin(vm, self._registry.saved_booted(vm)))
            elif not saved:
                clean(self._layout, vm.number)
            elif not self._adopt_one(vm, saved):
                ended.append(vm.number)
            if vm.once and vm.state in (OFF, FAILED):
                self._removal.remove(vm)
        # Only now: the first word to the relay also names every VM that was found.
        for number in ended:
            self._relay.send(Forget(number=number, reason="the VM has ended"), lambda error: None)

    def autostart(self) -> None:
        """Once after the host's boot: start the VMs that are to start with it, if the policy still grants it."""
        marker = f"{self._layout.broker_run}/autostarted"
        if os.path.exists(marker):
            return
        for vm in self._registry:
            if vm.definition.autostart and vm.state == OFF and not vm.once:
                try:
                    self._boots.enter(self._boots.start(vm))
                except VmshellError as exc:
                    note("autostart-refused", number=vm.number, owner=vm.owner, vm=vm.name, problem=exc)
        with open(marker, "w", encoding="ascii"):
            pass

    def _adopt_one(self, vm: Vm, saved: dict[str, object]) -> bool:
        """Go on with *vm* where its last broker left it; False if it has ended."""
        run = Run(vm)
        outer = same_process(saved.get("pid"), saved.get("ticks"))
        qemu = same_process(saved.get("qemu_pid"), saved.get("qemu_ticks"))
        if outer is None and qemu is None:
            # A jail that was started and not written down yet waits at a barrier that nobody opens any more.
            if self._layout.embedded:
                orphans.end_waiting(self._layout.vm_run(vm.number))
            else:
                self._launcher.kill(vm.number)
            vm.last_error = {
                "code": "vm-stopped",
                "text": "it ended while the service was down",
                "hint": "",
                "at": int(time.time()),
            }
            self._registry.set_state(vm, OFF)
            return False
        vm.accel = str(saved.get("accel", ""))
        vm.booted = self._registry.saved_booted(vm)
        balloon = saved.get("balloon")
        vm.balloon = balloon if type(balloon) is int else 0
        added = saved.get("added")
        vm.added = {index for index in added if type(index) is int} if isinstance(added, list) else set()
        started = saved.get("started")
        vm.started = float(started) if isinstance(started, (int, float)) else time.time()
        self._runs.add(run)
        self._adopt_network(vm, saved.get("cables"))
        if outer is not None:
            self._runs.hold_outer(run, outer)
        if qemu is not None:
            self._runs.hold_qemu(run, qemu)
        else:
            self._runs.find_qemu(run)
        state = saved.get("state")
        self._registry.set_state(vm, state if isinstance(state, str) and state in ALIVE else RUNNING)
        if vm.state == STARTING:
            self._boots.bound(run)
        elif vm.state == STOPPING:
            self._stops.resume(run)
        return True
