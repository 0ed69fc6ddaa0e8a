"""From a VM's definition to a launch request: open everything, hand it to the launcher, keep nothing.

A straight list under one ExitStack; whatever step raises, all that was opened is closed again and nothing is left behind.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import BadValue, VmshellError
from ...launch.jail import command
from ...launch.plan import NICS_MAX, LaunchPlan
from ...model.decide import apply_fixed
from ...model.definition import Definition, Disk, Nic
from ...model.values import split_ref
from ...names import MIB
from ...numbering import mac_address
from ...refusals import LauncherDown, StartFailed
from ...spawn import FIRST_FD
from ..network.interfaces import WITH_TAP, cards_of
from ..storage import resources
from ..vm.objects import mebibytes
from . import orphans, serial_port

if TYPE_CHECKING:
    from ...layout import Layout
    from ..context import Context
    from ..host.processes import Process
    from ..network.attachments import Cables
    from ..storage.image_catalogue import Image
    from ..vm.registry import Vm
    from .runs import Live

_FILE_SLACK = 64 << 20  # a qcow2 file's own tables, beside its contents
LAUNCHER_TIMEOUT, LAUNCHER_AGAIN = 30.0, 0.2  # seconds for which a launcher that is away is asked again, and between two tries
SPARE_NICS = 2  # cards that may come while a VM runs
_SOCKETS = ("qmp", "agent")

Images = Mapping[str, "Image"]
Scratch = Mapping[int, int]  # by the disk's place in the definition: the empty overlay that takes what the guest writes


@dataclass(frozen=True)
class Started:
    """The jail's outer process, the reading end of QEMU's standard error, and the start barrier: QEMU waits for a byte there.

    The two descriptors close after the call. A broker that is killed before it has written down the process leaves a barrier that
    never opens, so no QEMU ever runs of which nobody knows.
    """

    process: Process
    errors: int
    barrier: int


class _Descriptors:
    """The descriptors of one start, in the order of their numbers as QEMU will see them, from 3 up."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.lent: list[int] = []

    def add(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        self.lent.append(fd)
        return FIRST_FD + len(self.lent) - 1


def images_of(context: Context, vm: Vm, definition: Definition) -> dict[str, Image]:
    """Every catalogue image that a boot needs: of kernel and initrd, and below the overlays."""
    names = {split_ref(ref)[1] for ref in (definition.kernel, definition.initrd) if ref.startswith("image:")}
    for disk in definition.disks:
        if disk.path and split_ref(disk.path)[0] != "library":
            store, name = resources.store_of(context, vm, disk.path)
            names |= {made.base} if (made := store.find(name)) and made.base else set()
    return {name: context.images.get(name) for name in sorted(names)}


class Start:
    """One start on its way: everything is opened, the launcher is asked, and whatever it answers, all is closed again.

    `answered(live, error, started)` is called once. The constructor raises a VmshellError; then nothing is left of it. A launcher
    that went away before it answered is asked again: what it may have started waits at a barrier that nobody opens. In a
    session it is ended at once, on a host by the next launch of the same number.
    """

    def __init__(
        self,
        context: Context,
        live: Live,
        definition: Definition,
        images: Images,
        scratch: Scratch,
        cables: Cables,
        answered: Callable[[Live, VmshellError | None, Started | None], None],
    ) -> None:
        self._context = context
        self._live = live
        self._answered = answered
        self._tries_end = time.monotonic() + LAUNCHER_TIMEOUT
        folder = context.layout.vm_run(live.vm.number)
        with contextlib.ExitStack() as stack:
            context.host.share_with_relay(folder, 0o750)
            fds = _Descriptors(stack)
            sockets = {name: _listen(context, f"{folder}/{name}.sock", stack) for name in _SOCKETS}
            self._barrier = stack.enter_context(_barrier(f"{folder}/{orphans.BARRIER}"))
            console = serial_port.make(folder, stack)
            self._plan = _plan(context, live.vm, definition, images, scratch, cables, fds, sockets, self._barrier)
            self._errors, write_end = os.pipe2(os.O_CLOEXEC)
            stack.callback(os.close, self._errors)
            stack.callback(os.close, write_end)
            os.set_blocking(self._errors, False)
            self._fds = (*fds.lent, *console, write_end)
            self._opened = stack.pop_all()
        self._ask()

    def _ask(self) -> None:
        if self._live.asked == "kill" or self._live.error:
            self._heard(StartFailed(vm=self._live.vm.ref, problem="it was killed meanwhile"), None)
            return
        try:
            self._context.launcher.launch(self._live.vm.number, self._plan, self._fds, self._heard, self._live.has_status)
        except BaseException:
            self._opened.close()
            raise

    def _heard(self, error: VmshellError | None, process: Process | None) -> None:
        if isinstance(error, LauncherDown) and self._context.layout.embedded:
            orphans.end_waiting(self._context.layout.vm_run(self._live.vm.number))
        if isinstance(error, LauncherDown) and time.monotonic() < self._tries_end:
            self._context.loop.after(LAUNCHER_AGAIN, self._ask)
            return
        if isinstance(error, LauncherDown):
            self._context.launcher.kill(self._live.vm.number)  # it may have been started all the same
        with self._opened:
            self._answered(self._live, error, Started(process, self._errors, self._barrier) if process else None)


def _listen(context: Context, path: str, stack: contextlib.ExitStack) -> int:
    return stack.enter_context(context.host.listen_for_qemu(path)).fileno()


def launch_line(context: Context, vm: Vm) -> list[str]:
    """The command that `start` would run for *vm* now. Objects are opened for it and closed again; nothing is started."""
    definition = apply_fixed(vm.definition, context.effective(vm.owner).limits)
    resources.check_objects(context, vm, definition)
    images = images_of(context, vm, definition)
    with contextlib.ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        scratch = {index: null for index, disk in enumerate(definition.disks) if disk.snapshot}
        sockets = dict.fromkeys(_SOCKETS, null)
        cables = {card.index: null for card in cards_of(context, vm, definition, give=False) if card.network.kind in WITH_TAP}
        fds = _Descriptors(stack)
        table = _plan(context, vm, definition, images, scratch, cables, fds, sockets, null)
    # What the launcher says itself (`LAUNCHERS_OWN`), but for a scope that is named by the moment.
    uid = context.policy.host.uid_base + vm.number if context.host.apart else None
    scope = f"vmshell-vm-{vm.number}.scope" if context.host.systemd else None
    return command(LaunchPlan(**table, number=vm.number, uid=uid, gid=uid, scope=scope, seccomp_fd=FIRST_FD + len(fds.lent)))


def _plan(
    context: Context,
    vm: Vm,
    definition: Definition,
    images: Images,
    scratch: Scratch,
    cables: Cables,
    fds: _Descriptors,
    sockets: Mapping[str, int],
    barrier: int,
) -> dict[str, Any]:
    """Open what *definition* names and say how QEMU gets it: the plan of a launch request."""
    host, limits = context.host, context.effective(vm.owner).limits
    accel = vm.accel or context.facts.accel
    order = _boot_order(definition)
    disks = [
        _disk(context, vm, definition, disk, images, scratch.get(index), fds, order)
        for index, disk in enumerate(definition.disks)
    ]
    kernel = definition.kernel
    image = images[split_ref(kernel)[1]] if kernel.startswith("image:") else None
    initrd = definition.initrd or (kernel if image and image.initrd else "")
    firmware = resources.open_firmware(context, vm, definition)
    return {
        "machine": definition.machine,
        "acpi": definition.acpi,
        "clock": definition.clock,
        "reboot_stops": definition.on_reboot == "stop",
        "accel": accel,
        "cpus": definition.cpus,
        "cpu_model": context.policy.catalogues.cpu_models[definition.cpu_model] or None,
        "memory": definition.memory,
        "firmware": None if firmware is None else [fds.add(fd) for fd in firmware],
        "boot_menu": definition.boot_menu,
        "kernel_fd": fds.add(_open_boot_file(context, vm, kernel, images, "kernel")) if kernel else None,
        "initrd_fd": fds.add(_open_boot_file(context, vm, initrd, images, "initrd")) if initrd else None,
        "cmdline": definition.cmdline or (image.cmdline if image else ""),
        "option_rom_fds": [fds.add(resources.open_object(context, vm, ref)) for ref in definition.option_roms],
        "loadvm": vm.snapshots[definition.restore].number if definition.restore else None,
        "disks": disks,
        "nics": [
            _nic(context, vm, name, nic, cables, fds, order.get(name))
            for name, nic in definition.devices().items()
            if isinstance(nic, Nic)
        ],
        "spare_nics": min(SPARE_NICS, NICS_MAX - len(definition.nics)) if host.taps else 0,
        "display": definition.display,
        "video": definition.video_shown,
        "keymap": definition.keymap or None,
        "tablet": definition.tablet and definition.display == "vnc",
        "serial": definition.serial,
        "qmp_fd": fds.add(os.dup(sockets["qmp"])),
        "agent_fd": fds.add(os.dup(sockets["agent"])) if definition.agent else None,
        "block_fd": fds.add(os.dup(barrier)),
        "file_size_max": _file_size_max(context, vm, definition),
        "cpu_weight": limits.cpu_weight,
    }


def _boot_order(definition: Definition) -> dict[str, int]:
    """Boot index by device. Without an order: disks, then CD drives, then floppies; no NIC, whose ROM would only cost time."""
    names = definition.boot_order
    if not names:
        devices = [name for name in definition.devices() if not name.startswith("net")]
        names = tuple(sorted(devices, key=lambda name: ("disk", "cdrom", "floppy").index(name.rstrip("0123456789"))))
    return {name: index for index, name in enumerate(names, 1)}


def _disk(
    context: Context,
    vm: Vm,
    definition: Definition,
    disk: Disk,
    images: Images,
    scratch: int | None,
    fds: _Descriptors,
    order: Mapping[str, int],
) -> dict[str, Any]:
    layers: list[list[object]] = []
    if disk.snapshot:
        assert scratch is not None
        layers.append([fds.add(os.dup(scratch)), "qcow2"])
    if disk.path:
        made = resources.facts_of(context, vm, disk.path)
        own = resources.open_object(context, vm, disk.path, writable=disk.writable)
        layers.append([fds.add(own), "qcow2" if made.format == "qcow2" else "raw"])
        if made.base:
            base = images[made.base]
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


def _nic(
    context: Context, vm: Vm, name: str, nic: Nic, cables: Cables, fds: _Descriptors, bootindex: int | None
) -> dict[str, Any]:
    index = int(name.removeprefix("net"))
    kind = context.policy.catalogues.networks[nic.network].kind
    cable = fds.add(os.dup(cables[index])) if index in cables else None
    forwards = [[forward.proto, forward.host, forward.guest] for forward in nic.forward]
    return {
        "mac": nic.mac or mac_address(vm.number, index),
        "model": nic.model,
        "tap_fd": cable if kind in WITH_TAP else None,
        "stream_fd": cable if kind not in WITH_TAP else None,
        "forwards": forwards if cable is None else [],
        "bootindex": bootindex,
        "connected": kind != "none",
    }


def _open_boot_file(context: Context, vm: Vm, ref: str, images: Images, what: str) -> int:
    origin, name = split_ref(ref)
    if origin != "image":
        return resources.open_object(context, vm, ref)
    image = images[name]
    file = image.kernel if what == "kernel" else image.initrd
    if not file:
        raise BadValue(field=f"boot.{what}", value=ref, rule=f"that image has no {what}")
    return image.open(file)


def _file_size_max(context: Context, vm: Vm, definition: Definition) -> int:
    """How large a file QEMU may make: the largest disk, its tables, and the memory of its snapshots inside it."""
    sizes = [resources.facts_of(context, vm, disk.path).size for disk in definition.disks if disk.path]
    saved = context.effective(vm.owner).limits.snapshots_max * (definition.memory + mebibytes(_FILE_SLACK)) * MIB
    return max(sizes, default=0) + _FILE_SLACK + saved


def clean(layout: Layout, number: int) -> None:
    """Remove what a start left in the run directory."""
    shutil.rmtree(layout.vm_run(number), ignore_errors=True)


@contextlib.contextmanager
def _barrier(path: str) -> Iterator[int]:
    """A pipe as one descriptor: whoever reads it also holds it open for writing, so that nobody's end is the end of the wait."""
    os.mkfifo(path, 0o600)
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.unlink(path)
        yield fd
    finally:
        os.close(fd)
