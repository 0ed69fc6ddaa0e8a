"""From a VM's record to a running jail: open everything, hand it over, keep nothing.

A straight list under one ExitStack; whatever step raises, all that was opened is closed again and nothing is left behind.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import StartFailed
from ..launch.jail import command
from ..launch.plan import DiskPlan, LaunchPlan, NicPlan
from ..launch.seccomp import program
from ..layout import Layout
from ..names import mac_address
from .catalogue import Image
from .host import Host, Process
from .vms import Vm

_FILE_SLACK = 64 << 20  # a qcow2 file's own tables, beside its contents
_OOM_SCORE = 500  # when memory runs out, a guest goes before anything of the host


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


def start(host: Host, layout: Layout, vm: Vm, accel: str, images: dict[str, Image]) -> Started:
    """Start *vm*'s QEMU, its CPUs stopped. *images*: every catalogue image the definition names.

    Raises a VmshellError; then no process, socket or descriptor is left.
    """
    definition = vm.definition
    folder = layout.vm_run(vm.number)
    with contextlib.ExitStack() as stack:
        host.share_with_relay(folder, 0o750)
        fds = _Descriptors(stack)
        kernel = images[definition.kernel] if definition.kernel else None
        disks = []
        for disk in definition.disks:
            own = fds.add(host.open_disk(f"{layout.vm_state(vm.uid, vm.name)}/disks/{disk.file}"))
            base = images[disk.base] if disk.base else None
            disks.append(
                DiskPlan(
                    fd=own,
                    format="qcow2",
                    base_fd=fds.add(base.open(base.disk)) if base else None,
                    base_format=base.disk_format if base else None,
                )
            )
        sockets = [stack.enter_context(host.listen_for_qemu(f"{folder}/{name}.sock")) for name in ("console", "qmp")]
        console_fd, qmp_fd = (fds.add(os.dup(sock.fileno())) for sock in sockets)
        gate = stack.enter_context(_gate(f"{folder}/gate"))
        uid = host.vm_uid(vm.number)
        plan = LaunchPlan(
            number=vm.number,
            machine=definition.machine,
            accel=accel,
            cpus=definition.cpus,
            memory=definition.memory,
            kernel_fd=fds.add(kernel.open(kernel.kernel)) if kernel else None,
            initrd_fd=fds.add(kernel.open(kernel.initrd)) if kernel and kernel.initrd else None,
            cmdline=kernel.cmdline if kernel else "",
            disks=tuple(disks),
            nics=(NicPlan(mac=mac_address(vm.number, 0)),),
            console_fd=console_fd,
            qmp_fd=qmp_fd,
            block_fd=fds.add(os.dup(gate)),
            seccomp_fd=fds.add(_seccomp()),
            uid=uid,
            gid=uid,
            kvm_gid=os.stat("/dev/kvm").st_gid if accel == "kvm" and host.apart else None,
            file_size_max=max((disk.size for disk in definition.disks), default=0) + _FILE_SLACK,
            # A name for each run: the last one's scope may be there until systemd has seen its end.
            scope=f"vmshell-vm-{vm.number}-{int(vm.started * 1000)}.scope" if host.systemd else None,
            oom_score_adj=_OOM_SCORE,
        )
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, write_end)
        try:
            process = host.spawn(command(plan), fds.map, stdout=write_end, stderr=write_end)
        except OSError as exc:
            os.close(read_end)
            raise StartFailed(vm=vm.ref, problem=f"a program it needs cannot be started ({exc.strerror})") from exc
        os.set_blocking(read_end, False)
        return Started(process, read_end, os.dup(gate))


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
