"""The closed table of what can be asked, and how each is answered. Whatever is not in it is refused before it is looked at.

Each handler gets a call that is already authorised, with its VM. Those that take long hand the call on and return.
Runs in: the broker.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import BadValue, StorageFailed, VmBusy, VmshellError, WrongState
from ..messages import (
    ALIVE,
    FAILED,
    OFF,
    Boot,
    Console,
    Forget,
    Images,
    Info,
    Kill,
    List,
    New,
    Reboot,
    Request,
    Reset,
    Rm,
    Shutdown,
    Version,
    Whoami,
)
from ..names import MIB, format_size, mac_address
from .access import visible
from .definition import Definition, Disk
from .host import cpu_seconds, resident_bytes
from .journal import by_user, note
from .policy import Usage, decide

if TYPE_CHECKING:
    from .catalogue import Image
    from .context import Context
    from .server import Call
    from .vms import Vm

PAGE_ROWS = 100  # rows of a reply; a row is at most some 500 bytes, a packet 64 KiB
SMALLEST_BLANK_DISK = MIB


def handle_list(context: Context, call: Call, request: List) -> None:
    """One page of rows, from behind the row that `after` names."""
    rows = visible(call.peer, context.registry, everyone=request.all)
    page = [vm for vm in rows if f"{vm.owner}/{vm.name}" > request.after]
    call.reply({"vms": [_row(vm) for vm in page[:PAGE_ROWS]], "more": len(page) > PAGE_ROWS})


def handle_info(context: Context, call: Call, request: Info, vm: Vm) -> None:
    pid = context.machines.qemu_pid(vm)
    folder = context.layout.vm_state(vm.uid, vm.name)
    definition = vm.definition
    call.reply(
        {
            **_row(vm),
            "number": vm.number,
            "created": vm.created,
            "mac": mac_address(vm.number, 0),
            "disks": [_disk(disk, f"{folder}/disks/{disk.file}") for disk in definition.disks],
            "boot": "kernel" if definition.kernel else "disk",
            "machine": definition.machine,
            "accel": vm.accel,
            "pid": pid,
            "cpu_time": int(cpu_seconds(pid) * 1000) if pid else 0,
            "rss": resident_bytes(pid) if pid else 0,
            "log_max": context.policy.host.log_size_max,
            "last_error": vm.last_error,
        }
    )


def handle_new(context: Context, call: Call, request: New) -> None:
    """Define a VM from a catalogue image; its disks are made by a job."""
    image = context.images.get(request.image)
    definition = _define(request, image)
    disk_share = sum(disk.size for disk in definition.disks) // MIB
    asked = Usage(vms=1, cpus=request.cpus, memory=request.memory, disk=disk_share)
    decide(request.vm, context.policy.defaults, asked, context.registry.used(call.peer.uid))
    vm, folder = context.registry.create(call.peer.uid, call.peer.user, definition)
    remaining = list(definition.disks)

    def failed(error: VmshellError) -> None:
        context.registry.forget(vm)
        delete_later(context, folder)
        call.fail(error)

    def next_disk(status: int = 0, output: str = "") -> None:
        try:
            if status:
                raise StorageFailed(problem="the disk is full" if status == 2 else "the new disk cannot be written")
            if remaining:
                disk = remaining.pop(0)
                fd = context.host.create_file(f"{folder}/disks/{disk.file}")
                try:
                    command = context.host.python("storage", "create", str(disk.size), uid=context.host.job_uid())
                    context.jobs.start(command, {3: fd}, next_disk)
                finally:
                    os.close(fd)
                return
            context.registry.finish_creation(vm, folder)
        except VmshellError as exc:
            failed(exc)
        except OSError as exc:
            failed(StorageFailed(problem=exc.strerror or "the disk refused"))
        else:
            by_user(vm.uid, "new", number=vm.number, owner=vm.owner, vm=vm.name, image=request.image)
            call.reply({"name": vm.ref, "state": vm.state})

    next_disk()


def _define(request: New, image: Image) -> Definition:
    if request.memory < image.memory_min:
        rule = f"image {image.name} needs at least {image.memory_min}M"
        raise BadValue(field="memory", value=f"{request.memory}M", rule=rule)
    size = request.disk * MIB
    disks: tuple[Disk, ...] = ()
    if image.disk:
        if size and size < image.disk_size:
            rule = f"image {image.name}'s disk has {format_size(image.disk_size)}; a VM's can only be larger"
            raise BadValue(field="disk", value=format_size(size), rule=rule)
        disks = (Disk("root", max(size, image.disk_size), image.name),)
    elif size:
        disks = (Disk("data", max(size, SMALLEST_BLANK_DISK)),)
    kernel = image.name if image.kernel else ""
    return Definition(request.vm, image.name, cpus=request.cpus, memory=request.memory, kernel=kernel, disks=disks)


def handle_boot(context: Context, call: Call, request: Boot, vm: Vm) -> None:
    context.machines.boot(call, vm, console=request.console)


def handle_shutdown(context: Context, call: Call, request: Shutdown, vm: Vm) -> None:
    context.machines.shutdown(call, vm, force=request.force, timeout=request.timeout)


def handle_kill(context: Context, call: Call, request: Kill, vm: Vm) -> None:
    context.machines.kill(call, vm)


def handle_reset(context: Context, call: Call, request: Reset, vm: Vm) -> None:
    context.machines.reset(call, vm)


def handle_reboot(context: Context, call: Call, request: Reboot, vm: Vm) -> None:
    context.machines.reboot(call, vm)


def handle_rm(context: Context, call: Call, request: Rm, vm: Vm) -> None:
    """Delete a VM that is off. One rename makes it irrevocable; the files are deleted by a job."""
    if vm.state not in (OFF, FAILED):
        if vm.state in (*ALIVE, "queued"):
            raise WrongState(vm=vm.ref, state=vm.state, verb="rm", needed="off")
        raise VmBusy(vm=vm.ref, state=vm.state)
    aside = context.registry.set_aside(vm)
    context.registry.forget(vm)
    context.relay.send(Forget(number=vm.number, purge=True), lambda error: None)
    delete_later(context, aside)
    by_user(vm.uid, "rm", number=vm.number, owner=vm.owner, vm=vm.name)
    call.reply({"name": vm.ref, "state": "removed"})


def handle_console(context: Context, call: Call, request: Console, vm: Vm) -> None:
    context.machines.console(call, vm, readonly=request.readonly, replay=request.replay)


def handle_images(context: Context, call: Call, request: Images) -> None:
    names = [name for name in context.images.names() if name > request.after]
    rows = []
    for name in names[:PAGE_ROWS]:
        try:
            rows.append(_image(context.images.get(name)))
        except VmshellError as exc:
            rows.append({"name": name, "description": exc.sentence(), "boot": "", "disk": 0, "memory_min": 0})
    call.reply({"images": rows, "more": len(names) > PAGE_ROWS})


def handle_whoami(context: Context, call: Call, request: Whoami) -> None:
    peer = call.peer
    limits, used = context.policy.defaults, context.registry.used(peer.uid)
    call.reply(
        {
            "user": peer.user,
            "uid": peer.uid,
            "admin": peer.admin,
            "mode": _mode(context),
            "limits": vars(limits),
            "used": vars(used),
        }
    )


def handle_version(context: Context, call: Call, request: Version) -> None:
    def answer() -> None:
        facts = context.facts
        call.reply(
            {
                "version": __version__,
                "qemu": facts.qemu,
                "accel": facts.accel,
                "mode": _mode(context),
                "lacks": _lacks(context),
            }
        )

    context.facts.when_known(answer)


def _mode(context: Context) -> str:
    return "session" if context.layout.embedded else "system"


def _lacks(context: Context) -> list[str]:
    """What this mode or host cannot do, a sentence each."""
    facts, host = context.facts, context.host
    lacks = []
    if facts.problem:
        lacks.append(facts.problem)
    if facts.accel == "tcg":
        lacks.append(f"guests run emulated (TCG), ten to twenty times slower than with KVM: {facts.reason}")
    if not host.apart:
        lacks.append("every guest's QEMU runs under your own uid: jailed, but without a uid of its own")
    if not host.systemd:
        lacks.append("no limits by control group: there is no service manager to ask")
    lacks.append("guests have a network of their own with DHCP, and no way out of it")
    return lacks


def delete_later(context: Context, folder: str) -> None:
    """Delete a folder of ours in a job; what is interrupted is found again at the next start."""

    def done(status: int, output: str) -> None:
        if status:
            note("delete-failed", folder=folder, status=status)

    try:
        context.jobs.start(["rm", "-rf", "--one-file-system", "--", folder], {}, done)
    except OSError as exc:
        note("delete-failed", folder=folder, problem=exc)


def _row(vm: Vm) -> dict[str, Any]:
    return {
        "name": vm.name,
        "owner": vm.owner,
        "state": vm.state,
        "note": vm.note,
        "cpus": vm.definition.cpus,
        "memory": vm.definition.memory,
        "image": vm.definition.image,
        "address": "",
        "uptime": int(time.time() - vm.started) if vm.state in ALIVE and vm.started else None,
        "viewers": vm.viewers,
    }


def _disk(disk: Disk, path: str) -> dict[str, Any]:
    try:
        used = os.stat(path, follow_symlinks=False).st_blocks * 512
    except OSError:
        used = 0
    return {"name": disk.name, "format": "qcow2", "size": disk.size, "used": used}


def _image(image: Image) -> dict[str, Any]:
    return {
        "name": image.name,
        "description": image.description[:200],
        "boot": "kernel" if image.kernel else "disk",
        "disk": image.disk_size,
        "memory_min": image.memory_min,
    }


HANDLERS: dict[type[Request], Callable[..., None]] = {
    List: handle_list,
    Info: handle_info,
    New: handle_new,
    Boot: handle_boot,
    Shutdown: handle_shutdown,
    Kill: handle_kill,
    Reset: handle_reset,
    Reboot: handle_reboot,
    Rm: handle_rm,
    Console: handle_console,
    Images: handle_images,
    Whoami: handle_whoami,
    Version: handle_version,
}
