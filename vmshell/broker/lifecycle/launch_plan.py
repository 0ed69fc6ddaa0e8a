"""The launch plan: from what a definition names to the descriptors and words that the launcher makes a QEMU of.

Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import BadValue
from ...launch.jail import command
from ...launch.plan import NICS_MAX, LaunchPlan
from ...model.decide import apply_fixed
from ...model.definition import Definition, Disk, Nic
from ...model.values import split_ref
from ...names import MIB
from ...numbering import mac_address
from ...spawn import FIRST_FD
from ..network.interfaces import WITH_TAP
from ..storage.checks import check_objects
from ..vm.objects import mebibytes

if TYPE_CHECKING:
    from ..host.processes import Host
    from ..network.interfaces import Interfaces
    from ..network.taps import Taps
    from ..policies import Policies
    from ..services.capabilities import Capabilities
    from ..storage.resolve import Resolved, Resolver
    from ..storage.resources import Resources
    from ..vm.registry import Registry
    from ..vm.vm import Vm

_FILE_SLACK = 64 << 20  # a qcow2 file's own tables, beside its contents
SPARE_NICS = 2  # interfaces that may come while a VM runs
SOCKETS = ("qmp", "agent")


class Descriptors:
    """The descriptors of one start, in the order of their numbers as QEMU will see them, from 3 up."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.lent: list[int] = []

    def add(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        self.lent.append(fd)
        return FIRST_FD + len(self.lent) - 1


class LaunchPlans:
    """Builds the plan of a launch request."""

    def __init__(
        self,
        *,
        host: Host,
        policies: Policies,
        registry: Registry,
        capabilities: Capabilities,
        resources: Resources,
        resolver: Resolver,
        interfaces: Interfaces,
    ) -> None:
        self._host = host
        self._policies = policies
        self._registry = registry
        self._capabilities = capabilities
        self._resources = resources
        self._resolver = resolver
        self._interfaces = interfaces

    def launch_line(self, vm: Vm) -> list[str]:
        """The command that `start` would run for *vm* now. Objects are opened for it and closed again; nothing is started."""
        definition = apply_fixed(vm.definition, self._policies.effective(vm.owner).limits)
        resolved = self._resolver.resolve(vm, definition)
        check_objects(self._registry, resolved)
        with contextlib.ExitStack() as stack:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, null)
            overlays = {index: null for index, disk in enumerate(definition.disks) if disk.snapshot}
            sockets = dict.fromkeys(SOCKETS, null)
            interfaces = self._interfaces.of(vm, definition, give=False)
            taps = {interface.index: null for interface in interfaces if interface.network.kind in WITH_TAP}
            fds = Descriptors(stack)
            table = self.build(resolved, overlays, taps, fds, sockets=sockets, barrier=null)
        # What the launcher says itself (`LAUNCHERS_OWN`), but for a scope that is named by the moment.
        uid = self._policies.host.uid_base + vm.number if self._host.apart else None
        scope = f"vmshell-vm-{vm.number}.scope" if self._host.systemd else None
        return command(LaunchPlan(**table, number=vm.number, uid=uid, gid=uid, scope=scope, seccomp_fd=FIRST_FD + len(fds.lent)))

    def build(
        self,
        resolved: Resolved,
        overlays: Mapping[int, int],
        taps: Taps,
        fds: Descriptors,
        *,
        sockets: Mapping[str, int],
        barrier: int,
    ) -> dict[str, Any]:
        """Open what the definition names and say how QEMU gets it: the plan of a launch request.

        *overlays* take what the guest writes to disks with `snapshot`, by the disk's place in the definition.
        """
        vm, definition, limits = resolved.vm, resolved.definition, resolved.effective.limits
        images = resolved.images()
        order = _boot_order(definition)
        disks = [self._disk(resolved, disk, overlays.get(index), fds, order) for index, disk in enumerate(definition.disks)]
        kernel = definition.kernel
        image = images[split_ref(kernel)[1]] if kernel.startswith("image:") else None
        initrd = definition.initrd or (kernel if image and image.initrd else "")
        firmware = self._resources.open_firmware(vm, definition)
        return {
            "machine": definition.machine,
            "acpi": definition.acpi,
            "clock": definition.clock,
            "reboot_stops": definition.on_reboot == "stop",
            "accel": vm.accel or self._capabilities.accel,
            "cpus": definition.cpus,
            "cpu_model": self._policies.catalogues.cpu_models[definition.cpu_model] or None,
            "memory": definition.memory,
            "firmware": None if firmware is None else [fds.add(fd) for fd in firmware],
            "boot_menu": definition.boot_menu,
            "kernel_fd": fds.add(self._open_boot_file(resolved, kernel, "kernel")) if kernel else None,
            "initrd_fd": fds.add(self._open_boot_file(resolved, initrd, "initrd")) if initrd else None,
            "cmdline": definition.cmdline or (image.cmdline if image else ""),
            "option_rom_fds": [fds.add(self._resources.open_object(vm, ref)) for ref in definition.option_roms],
            "loadvm": vm.snapshots[definition.restore].number if definition.restore else None,
            "disks": disks,
            "nics": [
                self._nic(vm, name, nic, taps, fds, order.get(name))
                for name, nic in definition.devices().items()
                if isinstance(nic, Nic)
            ],
            "spare_nics": min(SPARE_NICS, NICS_MAX - len(definition.nics)) if self._host.taps else 0,
            "display": definition.display,
            "video": definition.video_shown,
            "keymap": definition.keymap or None,
            "tablet": definition.tablet and definition.display == "vnc",
            "serial": definition.serial,
            "qmp_fd": fds.add(os.dup(sockets["qmp"])),
            "agent_fd": fds.add(os.dup(sockets["agent"])) if definition.agent else None,
            "block_fd": fds.add(os.dup(barrier)),
            "file_size_max": _file_size_max(resolved),
            "cpu_weight": limits.cpu_weight,
        }

    def _disk(
        self, resolved: Resolved, disk: Disk, overlay: int | None, fds: Descriptors, order: Mapping[str, int]
    ) -> dict[str, Any]:
        definition = resolved.definition
        layers: list[list[object]] = []
        if disk.snapshot:
            assert overlay is not None
            layers.append([fds.add(os.dup(overlay)), "qcow2"])
        if disk.path:
            made = resolved.object(disk.path)
            own = self._resources.open_object(resolved.vm, disk.path, writable=disk.writable)
            layers.append([fds.add(own), "qcow2" if made.format == "qcow2" else "raw"])
            if made.base:
                base = resolved.image(made.base)
                layers.append([fds.add(base.open(base.disk)), base.disk_format])
        name = next(name for name, device in definition.devices().items() if device is disk)
        geometry = disk.geometry
        return {
            "kind": disk.type,
            "bus": definition.bus_of(disk),
            "layers": layers,
            "readonly": disk.readonly,
            "geometry": [geometry.cyls, geometry.heads, geometry.secs, geometry.trans] if geometry else None,
            "bootindex": order.get(name),
        }

    def _nic(self, vm: Vm, name: str, nic: Nic, taps: Taps, fds: Descriptors, bootindex: int | None) -> dict[str, Any]:
        index = int(name.removeprefix("net"))
        kind = self._policies.catalogues.networks[nic.network].kind
        tap = fds.add(os.dup(taps[index])) if index in taps else None
        forwards = [[forward.proto, forward.host, forward.guest] for forward in nic.forward]
        return {
            "mac": nic.mac or mac_address(vm.number, index),
            "model": nic.model,
            "tap_fd": tap if kind in WITH_TAP else None,
            "stream_fd": tap if kind not in WITH_TAP else None,
            "forwards": forwards if tap is None else [],
            "bootindex": bootindex,
            "connected": kind != "none",
        }

    def _open_boot_file(self, resolved: Resolved, ref: str, what: str) -> int:
        origin, name = split_ref(ref)
        if origin != "image":
            return self._resources.open_object(resolved.vm, ref)
        image = resolved.image(name)
        file = image.kernel if what == "kernel" else image.initrd
        if not file:
            raise BadValue(field=f"boot.{what}", value=ref, rule=f"that image has no {what}")
        return image.open(file)


def _boot_order(definition: Definition) -> dict[str, int]:
    """Boot index by device. Without an order: disks, then CD drives, then floppies; no NIC, whose ROM would only cost time."""
    names = definition.boot_order
    if not names:
        devices = [name for name in definition.devices() if not name.startswith("net")]
        names = tuple(sorted(devices, key=lambda name: ("disk", "cdrom", "floppy").index(name.rstrip("0123456789"))))
    return {name: index for index, name in enumerate(names, 1)}


def _file_size_max(resolved: Resolved) -> int:
    """How large a file QEMU may make: the largest disk, its tables, and the memory of its snapshots inside it."""
    definition = resolved.definition
    sizes = [resolved.object(disk.path).size for disk in definition.disks if disk.path]
    saved = resolved.effective.limits.snapshots_max * (definition.memory + mebibytes(_FILE_SLACK)) * MIB
    return max(sizes, default=0) + _FILE_SLACK + saved
