"""The closed table of what can be asked, and how each is answered. Whatever is not in it is refused before it is looked at.

Each handler gets a call that is already authorised, with its VM. Those that take long hand the call on and return.
Runs in: the broker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ... import __version__
from ...errors import VmshellError
from ...messages import (
    ALIVE,
    FAILED,
    OFF,
    Boot,
    Change,
    Connect,
    Console,
    Define,
    DiskAdd,
    Display,
    Done,
    Drop,
    Explain,
    HostKey,
    Images,
    ImageUsers,
    Info,
    Kill,
    LaunchLine,
    List,
    Net,
    NetHealth,
    Networks,
    New,
    Objects,
    Owned,
    Publish,
    Put,
    Reboot,
    Reload,
    Request,
    Reset,
    Rm,
    Shutdown,
    Snapshot,
    Unreadable,
    Version,
    Whoami,
)
from ...model.definition import Disk, Nic
from ...numbering import mac_address
from ...refusals import NoQemu, NotAllowed, VmBusy, WrongState
from ..handlers import admin, explain, network, snapshots, storage
from ..host.processes import cpu_seconds, resident_bytes
from ..lifecycle import define, launch_plan
from ..network import openings, passt
from ..vm.access import visible
from .rates import BOOTS, CHANGES, CONNECTIONS, CONSOLES, Rate

if TYPE_CHECKING:
    from ..context import Context
    from ..storage.image_catalogue import Image
    from ..vm.registry import Vm
    from .server import Call

PAGE_ROWS = 100  # rows of a reply
PAGE_SHARE, LIST_SHARE = 60 << 10, 10 << 10  # bytes of a packet for a page, and for each long list beside other things


def handle_list(context: Context, call: Call, request: List) -> None:
    """One page of rows, from behind the row that `after` names."""
    rows = visible(call.peer, context.registry, everyone=request.all)
    page = [vm for vm in rows if f"{vm.owner}/{vm.name}" > request.after]
    shown = storage.fitting([_row(context, vm) for vm in page[:PAGE_ROWS]], PAGE_SHARE)
    call.reply({"vms": shown, "more": len(page) > len(shown)})


def handle_info(context: Context, call: Call, request: Info, vm: Vm) -> None:
    pid = context.machines.qemu_pid(vm)
    definition = vm.definition
    call.reply(
        {
            **_row(context, vm),
            "number": vm.number,
            "created": vm.created,
            "description": definition.description,
            "devices": [_device(context, vm, name, device) for name, device in definition.devices().items()],
            "boot": "kernel" if definition.kernel else "disk",
            "machine": definition.machine,
            "accel": vm.accel,
            "pid": pid,
            "cpu_time": int(cpu_seconds(pid) * 1000) if pid else 0,
            "rss": resident_bytes(pid) if pid else 0,
            "balloon": vm.balloon,
            "log_max": context.policy.host.log_size_max,
            "snapshots": _newest([{"tag": it.tag, "created": it.created, "memory": it.memory} for it in vm.snapshots.values()]),
            "next_boot": define.pending(context, vm),
            "missing": define.missing(context, vm, definition)[:20],
            "last_error": vm.last_error,
            "host_keys": vm.host_keys,
            "published": _newest([vars(item) for item in vm.published]),
            **({"toml": context.registry.text(vm)} if request.toml else {}),
        }
    )


def _newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of *rows* that have room beside everything else that `info` says."""
    return storage.fitting(rows[::-1], LIST_SHARE)[::-1]


def handle_boot(context: Context, call: Call, request: Boot, vm: Vm) -> None:
    context.machines.boot(call, vm, console=request.console, restore=request.restore, scratch=request.scratch)


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
    if vm.defining:
        raise VmBusy(vm=vm.ref, state="being changed")
    if vm.state not in (OFF, FAILED):
        if vm.state in (*ALIVE, "queued"):
            raise WrongState(vm=vm.ref, state=vm.state, verb="rm", needed="off")
        raise VmBusy(vm=vm.ref, state=vm.state)
    context.remove(vm)
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
    shown = storage.fitting(rows, PAGE_SHARE)
    call.reply({"images": shown, "more": len(names) > len(shown)})


def handle_whoami(context: Context, call: Call, request: Whoami) -> None:
    peer = call.peer
    effective, used = context.effective(peer.user), context.registry.used(peer.uid)
    call.reply(
        {
            "user": peer.user,
            "uid": peer.uid,
            "admin": peer.admin,
            "mode": _mode(context),
            "limits": effective.numbers(),
            "catalogue": effective.choices(),
            "wrapper_options": effective.limits.wrapper_options and sorted(effective.limits.wrapper_options),
            "used": vars(used),
        }
    )


def handle_display(context: Context, call: Call, request: Display, vm: Vm) -> None:
    context.machines.display(call, vm)


def handle_snapshot(context: Context, call: Call, request: Snapshot, vm: Vm) -> None:
    snapshots.handle_snapshot(context, call, request, vm)


def handle_launch_line(context: Context, call: Call, request: LaunchLine, vm: Vm) -> None:
    """The command that a boot would run now, for the administrator to look at."""
    if not call.peer.admin and not context.layout.embedded:
        raise NotAllowed(what="the launch line", who="administrators")

    def known() -> None:
        if context.facts.problem:
            raise NoQemu(problem=context.facts.problem)
        call.reply({"name": vm.ref, "argv": launch_plan.launch_line(context, vm)})

    context.facts.when_known(lambda: call.guard(known))


def handle_reload(context: Context, call: Call, request: Reload) -> None:
    """Take the policy file as it is now; one that is not valid is refused, and the old one stays."""
    if not call.peer.admin and not context.layout.embedded:
        raise NotAllowed(what="reloading the policy", who="administrators")
    call.reply({"later": context.reload_policy()})


def handle_version(context: Context, call: Call, request: Version) -> None:
    def answer() -> None:
        facts = context.facts
        call.reply(
            {
                "version": __version__,
                "qemu": facts.qemu,
                "accel": facts.accel,
                "reason": facts.reason,
                "problem": facts.problem,
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
    if context.layout.embedded and not passt.available():
        lacks.append("guests have a network of their own with DHCP, and no way out of it: apt-get install passt")
    return lacks


def _row(context: Context, vm: Vm) -> dict[str, Any]:
    return {
        "name": vm.name,
        "owner": vm.owner,
        "state": vm.state,
        "note": vm.note,
        "cpus": vm.definition.cpus,
        "memory": vm.definition.memory,
        "image": vm.definition.image,
        "address": network.address_of(context, vm),
        "uptime": int(time.time() - vm.started) if vm.state in ALIVE and vm.started else None,
        "viewers": vm.viewers,
    }


def _device(context: Context, vm: Vm, name: str, device: Disk | Nic) -> dict[str, Any]:
    if isinstance(device, Nic):
        mac = device.mac or mac_address(vm.number, int(name.removeprefix("net")))
        return {"name": name, "network": device.network, "model": device.model, "mac": mac, "link": device.link}
    row: dict[str, Any] = {"name": name, "path": device.path, "type": device.type, "bus": vm.definition.bus_of(device)}
    made = vm.store.find(device.path)
    if made is not None:
        row |= {"format": made.format, "size": made.size, "used": vm.store.used(device.path)}
    return row


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
    New: define.handle_new,
    Define: define.handle_define,
    Change: define.handle_change,
    Boot: handle_boot,
    Shutdown: handle_shutdown,
    Kill: handle_kill,
    Reset: handle_reset,
    Reboot: handle_reboot,
    Rm: handle_rm,
    Console: handle_console,
    Display: handle_display,
    Snapshot: handle_snapshot,
    Objects: storage.handle_objects,
    DiskAdd: storage.handle_disk_add,
    Put: storage.handle_put,
    Done: storage.handle_done,
    Drop: storage.handle_drop,
    Explain: explain.handle_explain,
    LaunchLine: handle_launch_line,
    Reload: handle_reload,
    ImageUsers: admin.handle_image_users,
    Owned: admin.handle_owned,
    Unreadable: admin.handle_unreadable,
    Images: handle_images,
    Networks: network.handle_networks,
    Net: network.handle_net,
    NetHealth: network.handle_net_health,
    Connect: network.handle_connect,
    Publish: openings.handle_publish,
    HostKey: network.handle_host_key,
    Whoami: handle_whoami,
    Version: handle_version,
}

# What a request counts as; None: it looks, it ends what has been counted, or it is an administrator's, who is not counted.
RATES: dict[type[Request], Rate | None] = {
    List: None,
    Info: None,
    New: CHANGES,
    Define: CHANGES,
    Change: CHANGES,
    Boot: BOOTS,
    Shutdown: None,
    Kill: None,
    Reset: BOOTS,
    Reboot: BOOTS,
    Rm: CHANGES,
    Console: CONSOLES,
    Display: CONSOLES,
    Snapshot: CHANGES,
    Objects: None,
    DiskAdd: CHANGES,
    Put: CHANGES,
    Done: None,
    Drop: CHANGES,
    Explain: None,
    LaunchLine: None,
    Reload: None,
    ImageUsers: None,
    Owned: None,
    Unreadable: None,
    Images: None,
    Networks: None,
    Net: None,
    NetHealth: None,
    Connect: CONNECTIONS,
    Publish: CHANGES,
    HostKey: CHANGES,
    Whoami: None,
    Version: None,
}
