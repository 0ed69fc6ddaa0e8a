"""The verbs about VMs as such: list, info, rm.

Runs in: the broker.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ...messages import ALIVE, FAILED, OFF, Info, List, Rm
from ...model.definition import Disk, Nic
from ...numbering import mac_address
from ...refusals import VmBusy, WrongState
from ..host.processes import cpu_seconds, resident_bytes
from ..vm.access import visible
from .pages import LIST_SHARE, PAGE_ROWS, PAGE_SHARE, fitting

if TYPE_CHECKING:
    from ..lifecycle.removal import Removal
    from ..lifecycle.runs import Runs
    from ..lifecycle.validate import Validation
    from ..network.interfaces import Interfaces
    from ..policies import Policies
    from ..runtime.call import Call
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers


class VmHandlers:
    """Lists VMs, tells about one, removes one."""

    def __init__(
        self,
        *,
        registry: Registry,
        policies: Policies,
        runs: Runs,
        validation: Validation,
        interfaces: Interfaces,
        removal: Removal,
    ) -> None:
        self._registry = registry
        self._policies = policies
        self._runs = runs
        self._validation = validation
        self._interfaces = interfaces
        self._removal = removal

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {List: self._list, Info: self._info, Rm: self._rm}

    def _list(self, call: Call, request: List) -> None:
        """One page of rows, from behind the row that `after` names."""
        rows = visible(call.peer, self._registry, everyone=request.all)
        page = [vm for vm in rows if f"{vm.owner}/{vm.name}" > request.after]
        shown = fitting([self._row(vm) for vm in page[:PAGE_ROWS]], PAGE_SHARE)
        call.reply({"vms": shown, "more": len(page) > len(shown)})

    def _info(self, call: Call, request: Info, vm: Vm) -> None:
        pid = self._runs.qemu_pid(vm)
        definition = vm.definition
        call.reply(
            {
                **self._row(vm),
                "number": vm.number,
                "created": vm.created,
                "description": definition.description,
                "devices": [_device(vm, name, device) for name, device in definition.devices().items()],
                "boot": "kernel" if definition.kernel else "disk",
                "machine": definition.machine,
                "accel": vm.accel,
                "pid": pid,
                "cpu_time": int(cpu_seconds(pid) * 1000) if pid else 0,
                "rss": resident_bytes(pid) if pid else 0,
                "balloon": vm.balloon,
                "log_max": self._policies.host.log_size_max,
                "snapshots": _newest(
                    [{"tag": it.tag, "created": it.created, "memory": it.memory} for it in vm.snapshots.values()]
                ),
                "next_boot": self._validation.pending(vm),
                "missing": self._validation.missing(vm, definition)[:20],
                "last_error": vm.last_error,
                "host_keys": vm.host_keys,
                "published": _newest([vars(item) for item in vm.published]),
                **({"toml": self._registry.text(vm)} if request.toml else {}),
            }
        )

    def _rm(self, call: Call, request: Rm, vm: Vm) -> None:
        """Delete a VM that is off. One rename makes it irrevocable; the files are deleted by a job."""
        if vm.defining:
            raise VmBusy(vm=vm.ref, state="being changed")
        if vm.state not in (OFF, FAILED):
            if vm.state in (*ALIVE, "queued"):
                raise WrongState(vm=vm.ref, state=vm.state, verb="rm", needed="off")
            raise VmBusy(vm=vm.ref, state=vm.state)
        self._removal.remove(vm)
        call.reply({"name": vm.ref, "state": "removed"})

    def _row(self, vm: Vm) -> dict[str, Any]:
        return {
            "name": vm.name,
            "owner": vm.owner,
            "state": vm.state,
            "note": vm.note,
            "cpus": vm.definition.cpus,
            "memory": vm.definition.memory,
            "image": vm.definition.image,
            "address": self._interfaces.address(vm),
            "uptime": int(time.time() - vm.started) if vm.state in ALIVE and vm.started else None,
            "viewers": vm.viewers,
        }


def _newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of *rows* that have room beside everything else that `info` says."""
    return fitting(rows[::-1], LIST_SHARE)[::-1]


def _device(vm: Vm, name: str, device: Disk | Nic) -> dict[str, Any]:
    if isinstance(device, Nic):
        mac = device.mac or mac_address(vm.number, int(name.removeprefix("net")))
        return {"name": name, "network": device.network, "model": device.model, "mac": mac, "link": device.link}
    row: dict[str, Any] = {"name": name, "path": device.path, "type": device.type, "bus": vm.definition.bus_of(device)}
    made = vm.store.find(device.path)
    if made is not None:
        row |= {"format": made.format, "size": made.size, "used": vm.store.used(device.path)}
    return row
