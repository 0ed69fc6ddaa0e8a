"""What changes while a VM runs: memory by the balloon, the medium of a CD drive, cards and cables, whether the console is logged.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import NetworkFailed, VmshellError
from ..messages import PAUSED, RUNNING
from ..model import definition as definitions
from ..model.definition import Disk, Nic
from ..model.values import split_device
from . import opening
from .networks import close

if TYPE_CHECKING:
    from ..model.definition import Definition
    from .context import Context
    from .fleet import Live
    from .networks import Cables
    from .vms import Vm

Answered = Callable[[VmshellError | None], None]
Said = Callable[[list[str], list[str]], None]  # the keys changed now; sentences about those that could not be

# Keys that are nothing to a guest: there is nothing to wait for.
NOT_THE_GUESTS = ("description", "autostart", "image")
BALLOON = "memory.size"


def follow(context: Context, vm: Vm, done: Said) -> None:
    """Make a running VM follow its new definition where it can, one order after the other; `done` is called once."""
    live = context.machines.live(vm)
    booted = vm.booted
    if live is None or booted is None or vm.state not in (RUNNING, PAUSED):
        done([], [])
        return
    todo = [key for key in definitions.differences(booted, vm.definition) if key != BALLOON and _order(vm, booted, key)]
    if vm.definition.memory <= booted.memory and vm.definition.memory != (vm.balloon or booted.memory):
        todo.append(BALLOON)
    now: list[str] = []
    problems: list[str] = []

    def step() -> None:
        if not todo:
            if now:
                context.registry.set_state(vm, vm.state)  # what it runs with now, for a broker that comes after us
            done(now, problems)
            return
        key = todo.pop(0)

        def answered(error: VmshellError | None) -> None:
            if error:
                problems.append(f"{key}: {error.sentence()}")
            elif vm.booted is not None:
                now.append(key)
                _believe(vm, vm.booted, key)
            step()

        _give(context, live, vm, key, answered)

    step()


def _believe(vm: Vm, booted: Definition, key: str) -> None:
    if key == BALLOON:
        vm.balloon = vm.definition.memory
    elif split_device(key):  # a whole card
        vm.booted = replace(booted, nics=vm.definition.nics)
    else:
        vm.booted = definitions.with_key_of(booted, vm.definition, key)


def order_all(context: Context, live: Live) -> None:
    """Before the first instruction: what QEMU has no argument for."""
    for name, nic in (live.vm.booted or live.vm.definition).devices().items():
        if isinstance(nic, Nic) and nic.link == "down":
            context.machines.order(live, "link-down", value=int(name.removeprefix("net")))


def _order(vm: Vm, booted: Definition, key: str) -> tuple[str, int] | None:
    """The order, and its number, that changes *key* of a running VM; None if only a boot does."""
    device, _, field = key.partition(".")
    place = split_device(device)
    wanted, now = (definition.devices().get(device) for definition in (vm.definition, booted))
    if key == BALLOON and vm.definition.memory <= booted.memory:
        return "balloon", vm.definition.memory
    if key == "console.log":
        return ("log-on" if vm.definition.log else "log-off"), 0
    if place and place[0] == "net" and not field:
        return _card_order(vm, booted, place[1])
    if place and isinstance(wanted, Nic) and now and field == "link":
        return f"link-{wanted.link}", place[1]
    if place and isinstance(wanted, Disk) and now and wanted.type == "cdrom" and field == "path":
        return ("insert" if wanted.path else "eject"), place[1]
    return None


def _card_order(vm: Vm, booted: Definition, index: int) -> tuple[str, int] | None:
    """A card that comes or goes is the last one: were another meant, those behind it would change their names.

    On q35 a card can only leave a port of its own, which those have that came while the VM ran.
    """
    wanted, now = vm.definition.nics, booted.nics
    common = min(len(wanted), len(now))
    if wanted[:common] != now[:common] or abs(len(wanted) - len(now)) != 1:
        return None
    if len(wanted) > len(now):
        return "nic-add", index
    return ("nic-remove", index) if booted.family == "pc" or index in vm.added else None


def _give(context: Context, live: Live, vm: Vm, key: str, answered: Answered) -> None:
    found = _order(vm, vm.booted or vm.definition, key)
    assert found is not None
    what, value = found
    if what == "nic-add":
        _add_card(context, live, vm, value, answered)
        return
    if what == "nic-remove":
        _remove_card(context, live, vm, value, answered)
        return
    fd = -1
    try:
        if what == "insert":
            disk = vm.definition.devices()[key.partition(".")[0]]
            assert isinstance(disk, Disk)
            opening.check_disk(disk, key, opening.facts_of(context, vm, disk.path))
            fd = opening.open_object(context, vm, disk.path)
        context.machines.order(live, what, answered, value=value, fd=fd)
    except VmshellError as exc:
        answered(exc)
    finally:
        if fd >= 0:
            os.close(fd)


def _add_card(context: Context, live: Live, vm: Vm, index: int, answered: Answered) -> None:
    """First the cable and its filter, then the card; without the card there is no cable, either."""

    def plugged(error: VmshellError | None, cables: Cables) -> None:
        try:
            if error or index not in cables:
                answered(error or NetworkFailed(problem="a card of this network cannot be added while the VM runs"))
                return
            card = next(card for card in context.networks.plugged(vm) if card.index == index)
            context.machines.order(live, "nic-add", added, value=index, fd=cables[index], card=card)
        finally:
            close(cables)

    def added(error: VmshellError | None) -> None:
        if error:
            context.networks.remove(vm, {index})
        else:
            vm.added.add(index)
        answered(error)

    try:
        context.networks.add(vm, index, plugged)
    except VmshellError as exc:
        answered(exc)


def _remove_card(context: Context, live: Live, vm: Vm, index: int, answered: Answered) -> None:
    def removed(error: VmshellError | None) -> None:
        if not error:
            vm.added.discard(index)
            context.networks.remove(vm, {index})
        answered(error)

    context.machines.order(live, "nic-remove", removed, value=index)
