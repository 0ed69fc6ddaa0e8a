"""Giving a VM its definition, new or changed: judged as a whole, missing disks made by jobs, written, then followed live.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BadValue, VmshellError
from ...launcher_messages import STORAGE
from ...messages import ALIVE, CREATING, FAILED, OFF, QUEUED, SHELF, Change, Define, DiskAdd, New
from ...model import definition as definitions
from ...model.decide import Verdict, apply_fixed, decide, refuse
from ...model.definition import Definition, Disk, Nic
from ...model.values import split_ref
from ...names import MIB, NAME_MAX, format_size
from ...refusals import BadName, StorageFailed, VmBusy, WrongState
from ...spawn import FIRST_FD
from ..runtime.log import by_user
from ..storage import resources
from ..vm.objects import FILE, Object, Store, mebibytes
from . import live_update

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm

SMALLEST_DISK = MIB
Makes = dict[str, Object]
Done = Callable[[VmshellError | None], None]


# --- what is asked, as a definition -----------------------------------------------------------------------------------


def from_image(context: Context, request: New) -> Definition:
    """The definition of `new NAME --image IMAGE`."""
    image = context.images.get(request.image)
    if request.memory < image.memory_min:
        rule = f"image {image.name} needs at least {image.memory_min}M"
        raise BadValue(field="memory", value=f"{request.memory}M", rule=rule)
    size = request.disk * MIB
    disks: tuple[Disk, ...] = ()
    if image.disk:
        disks = (Disk("root", format="qcow2", size=size, base=f"image:{image.name}"),)
    elif size:
        disks = (Disk("data", format="qcow2", size=size),)
    kernel = f"image:{image.name}" if image.kernel else ""
    return Definition(
        request.vm, image=image.name, cpus=request.cpus, memory=request.memory, kernel=kernel, disks=disks, nics=(Nic(),)
    )


def changed(vm: Vm, request: Change) -> Definition:
    must_be_known(vm, "set")
    return definitions.change(vm.definition, request.set, request.unset)


def with_disk(vm: Vm, request: DiskAdd) -> Definition:
    must_be_known(vm, "disk add")
    disk = Disk(request.object, bus=request.bus, format=request.format, size=request.size * MIB)
    wanted = replace(vm.definition, disks=(*vm.definition.disks, disk))
    return definitions.from_table(definitions.to_table(wanted))  # bus is text so far: the reader judges it


def must_be_known(vm: Vm, verb: str) -> None:
    """Whatever this version does not understand stays as it is, for the one that wrote it."""
    if vm.unreadable:
        raise WrongState(vm=vm.ref, state=f"not understood ({vm.unreadable})", verb=verb, needed="readable")


# --- is it allowed? ---------------------------------------------------------------------------------------------------


def to_make(context: Context, store: Store, definition: Definition) -> Makes:
    """The VM's own objects that do not exist yet and say how to make them."""
    makes: Makes = {}
    for disk in definition.disks:
        if disk.path and not split_ref(disk.path)[0] and (disk.size or disk.base) and not store.find(disk.path):
            size, base = disk.size, split_ref(disk.base)[1]
            if base:
                image = context.images.get(base)
                if not image.disk:
                    raise BadValue(field="disk.base", value=disk.base, rule="that image has no disk")
                if size and size < image.disk_size:
                    rule = f"image {base}'s disk has {format_size(image.disk_size)}; a VM's can only be larger"
                    raise BadValue(field="disk.size", value=format_size(size), rule=rule)
                size = max(size, image.disk_size)
            if base and disk.format == "raw":
                raise BadValue(field="disk.format", value="raw", rule="an overlay over an image is qcow2")
            makes[disk.path] = Object(disk.format or "qcow2", max(size, SMALLEST_DISK), base)
    return makes


def verdicts(context: Context, vm: Vm, definition: Definition, makes: Makes, *, running: bool) -> list[Verdict]:
    """Every rule of the policy about *vm* with this definition, kept or refused."""
    known = [context.images.get(split_ref(ref)[1]).name for ref in definition.objects() if ref.startswith("image:")]
    assert len(known) <= 2  # kernel and initrd; disks name images as `base`, looked up by `to_make`
    sizes = {path: made.size for path, made in makes.items()}
    for ref in definition.objects():
        if ref not in sizes and not ref.startswith("image:"):
            try:
                sizes[ref] = resources.facts_of(context, vm, ref).size
            except VmshellError:
                continue  # it may still be brought in; a boot looks again
    disk = vm.store.size() + sum(mebibytes(made.size) for made in makes.values())
    share = vm.share(running=running, definition=definition, disk=disk)
    used = context.registry.used(vm.uid, without=vm)
    return decide(vm.ref, context.effective(vm.owner), definition, share, used, sizes)


def check(context: Context, vm: Vm, definition: Definition, makes: Makes) -> None:
    """Raise what stands against *definition*: a rule of the policy, or an object that is something else."""
    refuse(verdicts(context, vm, definition, makes, running=False), vm.ref)
    for name, disk in definition.devices().items():
        if isinstance(disk, Disk) and disk.path and (made := _made(context, vm, disk.path)):
            resources.check_disk(disk, name, made)


def _made(context: Context, vm: Vm, ref: str) -> Object | None:
    try:
        return resources.facts_of(context, vm, ref)
    except VmshellError:
        return None


def missing(context: Context, vm: Vm, definition: Definition) -> list[str]:
    """Objects that a boot will want and that are not there yet."""
    refs = [ref for ref in definition.objects() if not ref.startswith("image:")]
    return [ref for ref in refs if _made(context, vm, ref) is None]


# --- doing it ---------------------------------------------------------------------------------------------------------


def settled(context: Context, owner: str, definition: Definition) -> Definition:
    """With what the policy fixes where nothing else was said, and the machine's version written down: no upgrade changes it."""
    said = apply_fixed(definition, context.effective(owner).limits, only_unsaid=True)
    return replace(said, machine=context.facts.machines.get(said.machine, said.machine))


def create(context: Context, call: Call, definition: Definition, *, once: bool, done: Callable[[Vm], None]) -> None:
    """Make a VM; *done* is called with it, or the call fails and nothing is left."""
    if definition.name == SHELF:
        raise BadName(what="VM", value=SHELF, rule="that name is taken: it is where objects without a VM are")

    def act() -> None:
        wanted = settled(context, call.peer.user, definition)
        if once:
            wanted = replace(wanted, name=_free_name(context, call.peer.uid, wanted.name))
        # Judged before the name is taken, with a VM that exists on paper only.
        paper = context.registry.on_paper(call.peer.uid, call.peer.user, wanted)
        makes = to_make(context, paper.store, wanted)
        check(context, paper, wanted, makes)
        vm = context.registry.create(call.peer.uid, call.peer.user, wanted, once=once)

        def made(error: VmshellError | None) -> None:
            try:
                if error:
                    raise error
                context.registry.finish_creation(vm)
            except VmshellError as exc:
                folder = os.path.dirname(vm.store.folder)
                context.registry.forget(vm)
                context.delete_later(folder)
                call.fail(exc)
                return
            by_user(vm.uid, "new", number=vm.number, owner=vm.owner, vm=vm.name, image=wanted.image)
            call.guard(lambda: done(vm))

        make_objects(context, vm.store, makes, made)

    context.facts.when_known(lambda: call.guard(act))


def _free_name(context: Context, uid: int, stem: str) -> str:
    number = 1
    while context.registry.get(uid, f"{stem[: NAME_MAX - 6]}{number}"):
        number += 1
    return f"{stem[: NAME_MAX - 6]}{number}"


def redefine(context: Context, call: Call, vm: Vm, definition: Definition) -> None:
    """Give *vm* another definition: make what is missing, write it, change live what can be changed live, and reply.

    One change at a time until it is answered: the next one is about a VM that has followed this one.
    """
    must_be_known(vm, "define")
    if vm.state not in (OFF, FAILED, *ALIVE, QUEUED) or vm.defining:
        raise VmBusy(vm=vm.ref, state=CREATING if vm.state == CREATING else "being changed")

    def guard(step: Callable[[], None]) -> None:
        """What a step raises is the answer, and the end of the change."""

        def act() -> None:
            try:
                step()
            except BaseException:
                vm.defining = False
                raise

        call.guard(act)

    def begin() -> None:
        # Looked at anew: the host was not known when this was asked, and much may have happened since.
        wanted = settled(context, vm.owner, definition)
        makes = to_make(context, vm.store, wanted)
        check(context, vm, wanted, makes)
        make_objects(context, vm.store, makes, lambda error: guard(lambda: write(wanted, error)))

    def write(wanted: Definition, error: VmshellError | None) -> None:
        if error:
            raise error
        context.registry.redefine(vm, wanted)
        by_user(vm.uid, "defined", number=vm.number, owner=vm.owner, vm=vm.name)
        live_update.follow(context, vm, lambda now, problems: guard(lambda: reply(now, problems)))

    def reply(now: list[str], problems: list[str]) -> None:
        vm.defining = False
        answer = {"name": vm.ref, "state": vm.state, "now": now, "problems": problems}
        call.reply({**answer, "next_boot": pending(context, vm), "missing": missing(context, vm, vm.definition)})

    vm.defining = True
    context.facts.when_known(lambda: guard(begin))


def pending(context: Context, vm: Vm) -> list[str]:
    """The keys whose values a running VM only gets at its next boot."""
    if vm.booted is None:
        return []
    wanted = apply_fixed(vm.definition, context.effective(vm.owner).limits)
    keys = [key for key in definitions.differences(vm.booted, wanted) if key not in live_update.NOT_THE_GUESTS]
    return [key for key in keys if key != live_update.BALLOON or vm.balloon != wanted.memory]


def make_objects(context: Context, store: Store, makes: Makes, done: Done) -> None:
    """Make blank disks and overlays, one job after the other; `done(None)`, or the error once none of them is left."""
    remaining = list(makes.items())
    begun: list[str] = []

    def failed(error: VmshellError) -> None:
        for name in begun:
            store.give_up(name)
        done(error)

    def step() -> None:
        if not remaining:
            done(None)
            return
        name, made = remaining.pop(0)

        def ended(status: int, answer: object) -> None:
            try:
                if status:
                    raise StorageFailed(problem="the disk is full" if status == 2 else "the new disk cannot be written")
                store.finish(name, made)
                begun.remove(name)
            except VmshellError as exc:
                failed(exc)
            else:
                step()

        try:
            path = store.begin(name, made)
            begun.append(name)
            blank(context, path, made, ended)
        except VmshellError as exc:
            failed(exc)
        except OSError as exc:
            failed(StorageFailed(problem=exc.strerror or "the disk refused"))

    step()


def blank(context: Context, path: str, made: Object, ended: Callable[[int, object], None]) -> None:
    """Make an empty disk at *path*: a hole, or a qcow2 file by a job; raises OSError."""
    assert made.format != FILE
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    fd = context.host.create_file(path)
    try:
        if made.format == "raw":
            os.ftruncate(fd, made.size)
            context.loop.after(0, lambda: ended(0, {}))
        else:
            context.jobs.start(STORAGE, ["create", str(made.size)], {FIRST_FD: fd}, ended)
    finally:
        os.close(fd)


# --- the verbs --------------------------------------------------------------------------------------------------------


def handle_new(context: Context, call: Call, request: New) -> None:
    """Define a VM from a catalogue image."""
    create(context, call, from_image(context, request), once=False, done=lambda vm: _made_known(context, call, vm))


def handle_define(context: Context, call: Call, request: Define) -> None:
    """Make a VM from a text, or give one another; `once` boots it for this one run."""
    definition = definitions.parse(request.text, request.vm)
    if request.once:
        create(context, call, definition, once=True, done=lambda vm: _boot_once(context, call, vm))
        return
    vm = context.registry.get(call.peer.uid, request.vm)
    if vm is not None and not request.new and vm.owner == call.peer.user:
        redefine(context, call, vm, definition)
    else:
        create(context, call, definition, once=False, done=lambda vm: _made_known(context, call, vm))


def _boot_once(context: Context, call: Call, vm: Vm) -> None:
    try:
        context.machines.boot(call, vm, console=True)
    except VmshellError:
        context.remove(vm)
        raise


def _made_known(context: Context, call: Call, vm: Vm) -> None:
    call.reply({"name": vm.ref, "state": vm.state, "missing": missing(context, vm, vm.definition)})


def handle_change(context: Context, call: Call, request: Change, vm: Vm) -> None:
    redefine(context, call, vm, changed(vm, request))
