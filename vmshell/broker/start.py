"""From a VM's definition to a running jail: open everything, hand it over, keep nothing.

A straight list under one ExitStack; whatever step raises, all that was opened is closed again and nothing is left behind.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import BadValue, StartFailed
from ..launch.jail import command
from ..launch.plan import NICS_MAX, DiskPlan, LaunchPlan, NicPlan
from ..launch.seccomp import program
from ..model.decide import apply_fixed
from ..model.definition import Definition, Disk, Nic
from ..model.values import split_ref
from ..names import MIB, mac_address
from . import opening
from .cards import WITH_TAP, cards_of
from .objects import mebibytes

if TYPE_CHECKING:
    from ..layout import Layout
    from .catalogue import Image
    from .context import Context
    from .host import Process
    from .networks import Cables
    from .vms import Vm

_FILE_SLACK = 64 << 20  # a qcow2 file's own tables, beside its contents
_OOM_SCORE = 500  # when memory runs out, a guest goes before anything of the host
SPARE_NICS = 2  # cards that may come while a VM runs
_SOCKETS = ("console", "qmp", "agent")

Images = Mapping[str, "Image"]
Scratch = Mapping[int, int]  # by the disk's place in the definition: the empty overlay that takes what the guest writes


@dataclass(frozen=True)
class Started:
    """The jail's outer process, the reading end of QEMU's standard error, and the gate: QEMU waits for a byte written there.

    The taker closes both. A broker that is killed before it has written down the process leaves a gate that never opens, so no
    QEMU ever runs of which nobody knows.
    """

    process: Process
    errors: int
    gate: int


class _Descriptors:
    """The descriptors of one start: numbers as QEMU will see them, from 3 up, and ours behind them."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self.map: dict[int, int] = {}

    def add(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        number = 3 + len(self.map)
        self.map[number] = fd
        return number


def images_of(context: Context, vm: Vm, definition: Definition) -> dict[str, Image]:
    """Every catalogue image that a boot needs: of kernel and initrd, and below the overlays."""
    names = {split_ref(ref)[1] for ref in (definition.kernel, definition.initrd) if ref.startswith("image:")}
    for disk in definition.disks:
        if disk.path and split_ref(disk.path)[0] != "library":
            store, name = opening.store_of(context, vm, disk.path)
            names |= {made.base} if (made := store.find(name)) and made.base else set()
    return {name: context.images.get(name) for name in sorted(names)}


def start(context: Context, vm: Vm, definition: Definition, images: Images, scratch: Scratch, cables: Cables) -> Started:
    """Start *vm*'s QEMU, its CPUs stopped; *cables* stay open here.

    Raises a VmshellError; then no process, socket or descriptor is left.
    """
    host = context.host
    folder = context.layout.vm_run(vm.number)
    with contextlib.ExitStack() as stack:
        host.share_with_relay(folder, 0o750)
        fds = _Descriptors(stack)
        sockets = {name: stack.enter_context(host.listen_for_qemu(f"{folder}/{name}.sock")).fileno() for name in _SOCKETS}
        gate = stack.enter_context(_gate(f"{folder}/gate"))
        plan = _plan(context, vm, definition, images, scratch, cables, fds, sockets, gate)
        takers = stack.enter_context(contextlib.ExitStack())
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, write_end)
        takers.callback(os.close, read_end)
        os.set_blocking(read_end, False)
        ours = os.dup(gate)
        takers.callback(os.close, ours)
        try:
            process = host.spawn(command(plan), fds.map, stdout=write_end, stderr=write_end)
        except OSError as exc:
            raise StartFailed(vm=vm.ref, problem=f"a program it needs cannot be started ({exc.strerror})") from exc
        takers.pop_all()
        return Started(process, read_end, ours)


def launch_line(context: Context, vm: Vm) -> list[str]:
    """The command that `start` would run for *vm* now. Objects are opened for it and closed again; nothing is started."""
    definition = apply_fixed(vm.definition, context.effective(vm.owner).limits)
    opening.check_objects(context, vm, definition)
    images = images_of(context, vm, definition)
    with contextlib.ExitStack() as stack:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, null)
        scratch = {index: null for index, disk in enumerate(definition.disks) if disk.snapshot}
        sockets = dict.fromkeys(_SOCKETS, null)
        cables = {card.index: null for card in cards_of(context, vm, definition, give=False) if card.network.kind in WITH_TAP}
        return command(_plan(context, vm, definition, images, scratch, cables, _Descriptors(stack), sockets, null))


def _plan(
    context: Context,
    vm: Vm,
    definition: Definition,
    images: Images,
    scratch: Scratch,
    cables: Cables,
    fds: _Descriptors,
    sockets: Mapping[str, int],
    gate: int,
) -> LaunchPlan:
    """Open what *definition* names and say how QEMU gets it."""
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
    firmware = opening.open_firmware(context, vm, definition)
    uid = host.vm_uid(vm.number)
    return LaunchPlan(
        number=vm.number,
        machine=definition.machine,
        acpi=definition.acpi,
        clock=definition.clock,
        reboot_stops=definition.on_reboot == "stop",
        accel=accel,
        cpus=definition.cpus,
        cpu_model=context.policy.catalogues.cpu_models[definition.cpu_model] or None,
        memory=definition.memory,
        firmware=None if firmware is None else (fds.add(firmware[0]), fds.add(firmware[1])),
        boot_menu=definition.boot_menu,
        kernel_fd=fds.add(_open_boot_file(context, vm, kernel, images, "kernel")) if kernel else None,
        initrd_fd=fds.add(_open_boot_file(context, vm, initrd, images, "initrd")) if initrd else None,
        cmdline=definition.cmdline or (image.cmdline if image else ""),
        option_rom_fds=tuple(fds.add(opening.open_object(context, vm, ref)) for ref in definition.option_roms),
        loadvm=vm.snapshots[definition.restore].number if definition.restore else None,
        disks=tuple(disks),
        nics=tuple(
            _nic(context, vm, name, nic, cables, fds, order.get(name))
            for name, nic in definition.devices().items()
            if isinstance(nic, Nic)
        ),
        spare_nics=min(SPARE_NICS, NICS_MAX - len(definition.nics)) if host.taps else 0,
        display=definition.display,
        video=definition.video_shown,
        keymap=definition.keymap or None,
        tablet=definition.tablet and definition.display == "vnc",
        serial=definition.serial,
        console_fd=fds.add(os.dup(sockets["console"])),
        qmp_fd=fds.add(os.dup(sockets["qmp"])),
        agent_fd=fds.add(os.dup(sockets["agent"])) if definition.agent else None,
        block_fd=fds.add(os.dup(gate)),
        seccomp_fd=fds.add(_seccomp()),
        uid=uid,
        gid=uid,
        kvm_gid=os.stat("/dev/kvm").st_gid if accel == "kvm" and host.apart else None,
        file_size_max=_file_size_max(context, vm, definition),
        # A name for each run: the last one's scope may be there until systemd has seen its end.
        scope=f"vmshell-vm-{vm.number}-{int(vm.started * 1000)}.scope" if host.systemd else None,
        cpu_weight=limits.cpu_weight,
        oom_score_adj=_OOM_SCORE,
    )


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
) -> DiskPlan:
    layers: list[tuple[int, str]] = []
    if disk.snapshot:
        assert scratch is not None
        layers.append((fds.add(os.dup(scratch)), "qcow2"))
    if disk.path:
        made = opening.facts_of(context, vm, disk.path)
        own = opening.open_object(context, vm, disk.path, writable=disk.writable)
        layers.append((fds.add(own), "qcow2" if made.format == "qcow2" else "raw"))
        if made.base:
            base = images[made.base]
            layers.append((fds.add(base.open(base.disk)), base.disk_format))
    name = next(name for name, device in definition.devices().items() if device is disk)
    geometry = disk.geometry
    return DiskPlan(
        kind=disk.type,
        bus=definition.bus_of(disk),
        layers=tuple(layers),
        readonly=disk.readonly,
        geometry=(geometry.cyls, geometry.heads, geometry.secs, geometry.trans) if geometry else None,
        bootindex=order.get(name),
    )


def _nic(context: Context, vm: Vm, name: str, nic: Nic, cables: Cables, fds: _Descriptors, bootindex: int | None) -> NicPlan:
    index = int(name.removeprefix("net"))
    kind = context.policy.catalogues.networks[nic.network].kind
    cable = fds.add(os.dup(cables[index])) if index in cables else None
    forwards = tuple((forward.proto, forward.host, forward.guest) for forward in nic.forward)
    return NicPlan(
        mac=nic.mac or mac_address(vm.number, index),
        model=nic.model,
        tap_fd=cable if kind in WITH_TAP else None,
        stream_fd=cable if kind not in WITH_TAP else None,
        forwards=forwards if cable is None else (),
        bootindex=bootindex,
        connected=kind != "none",
    )


def _open_boot_file(context: Context, vm: Vm, ref: str, images: Images, what: str) -> int:
    origin, name = split_ref(ref)
    if origin != "image":
        return opening.open_object(context, vm, ref)
    image = images[name]
    file = image.kernel if what == "kernel" else image.initrd
    if not file:
        raise BadValue(field=f"boot.{what}", value=ref, rule=f"that image has no {what}")
    return image.open(file)


def _file_size_max(context: Context, vm: Vm, definition: Definition) -> int:
    """How large a file QEMU may make: the largest disk, its tables, and the memory of its snapshots inside it."""
    sizes = [opening.facts_of(context, vm, disk.path).size for disk in definition.disks if disk.path]
    saved = context.effective(vm.owner).limits.snapshots_max * (definition.memory + mebibytes(_FILE_SLACK)) * MIB
    return max(sizes, default=0) + _FILE_SLACK + saved


def clean(layout: Layout, number: int) -> None:
    """Remove what a start left in the run directory."""
    shutil.rmtree(layout.vm_run(number), ignore_errors=True)


@contextlib.contextmanager
def _gate(path: str) -> Iterator[int]:
    """A pipe as one descriptor: whoever reads it also holds it open for writing, so that nobody's end is the end of the wait."""
    os.mkfifo(path, 0o600)
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.unlink(path)
        yield fd
    finally:
        os.close(fd)


def _seccomp() -> int:
    """Our system-call filter as a descriptor that bwrap reads."""
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    os.write(fd, program())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
