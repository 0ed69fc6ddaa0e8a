"""What changes while a VM runs: memory by the balloon, the medium of a CD drive, cards and cables, whether the console is logged.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import Internal, VmshellError
from ...messages import PAUSED, RUNNING
from ...model import definition as definitions
from ...model.definition import Disk, Nic
from ...model.values import split_device
from ...refusals import NetworkFailed, VmStopped
from ..network.attachments import close
from ..runtime.log import unexpected
from ..storage import resources

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..context import Context
    from ..network.attachments import Cables
    from ..vm.registry import Vm
    from .runs import Live

Answered = Callable[[VmshellError | None], None]
Said = Callable[[list[str], list[str]], None]  # the keys changed now; sentences about those that could not be

# Keys that are nothing to a guest: there is nothing to wait for.
NOT_THE_GUESTS = ("description", "autostart", "image")
BALLOON = "memory.size"


def follow(context: Context, vm: Vm, done: Said) -> None:
    """Make a running VM follow its new definition where it can, one order after the other; `done` is called once.

    No other change may come in between (`vm.defining`): each order was found by comparing with what the VM ran with at first.
    """
    live, booted, wanted = context.machines.live(vm), vm.booted, vm.definition
    if live is None or booted is None or vm.state not in (RUNNING, PAUSED):
        done([], [])
        return
    todo = [(key, order) for key in definitions.differences(booted, wanted) if (order := _order(vm, booted, wanted, key))]
    if wanted.memory <= booted.memory and wanted.memory != (vm.balloon or booted.memory):
        todo.append((BALLOON, ("balloon", wanted.memory)))
    now: list[str] = []
    problems: list[str] = []

    def step() -> None:
        if not todo or _ended(context, live):
            done(now, problems)
            return
        key, (what, value) = todo.pop(0)

        def answered(error: VmshellError | None) -> None:
            try:
                if error := _ended(context, live) or error:
                    raise error
                _believe(context, vm, wanted, key)
                now.append(key)
            except Exception as exc:
                problems.append(f"{key}: {_told(exc).sentence()}")
            step()

        _answer(lambda answered: _give(context, live, wanted, key, what, value, answered), answered)

    step()


def _answer(action: Callable[[Answered], None], answered: Answered) -> None:
    """Do what will answer. What it raises is an answer, too, and only the first one counts: nobody waits for ever."""
    waiting = [answered]

    def first(error: VmshellError | None) -> None:
        if waiting:
            waiting.pop()(error)

    try:
        action(first)
    except Exception as exc:
        first(_told(exc))


def _told(exc: Exception) -> VmshellError:
    return exc if isinstance(exc, VmshellError) else Internal(reference=unexpected(exc))


def _ended(context: Context, live: Live) -> VmStopped | None:
    """What is to be said once this is no longer the VM's present run: taps and answers may come after its end."""
    if context.machines.live(live.vm) is live and not live.ending:
        return None
    return VmStopped(vm=live.vm.ref, problem=live.why_it_ends())


def _believe(context: Context, vm: Vm, wanted: Definition, key: str) -> None:
    """*vm* runs with *key* as it is *wanted* from now on; written down for a broker that comes after us."""
    booted = vm.booted or wanted
    if key == BALLOON:
        vm.balloon = wanted.memory
    elif split_device(key):  # a whole card
        vm.booted = replace(booted, nics=wanted.nics)
    else:
        vm.booted = definitions.with_key_of(booted, wanted, key)
    context.registry.set_state(vm, vm.state)


def order_all(context: Context, live: Live, done: Answered) -> None:
    """Before the first instruction: what QEMU has no argument for. `done` is called once; an error is the end of it."""
    devices = (live.vm.booted or live.vm.definition).devices()
    down = [name for name, nic in devices.items() if isinstance(nic, Nic) and nic.link == "down"]

    def step(error: VmshellError | None = None) -> None:
        if error or not down:
            done(error)
        else:
            context.machines.order(live, "link-down", step, value=int(down.pop(0).removeprefix("net")))

    step()


def _order(vm: Vm, booted: Definition, wanted: Definition, key: str) -> tuple[str, int] | None:
    """The order, and its number, that changes *key* of a running VM; None if only a boot does."""
    device, _, field = key.partition(".")
    place = split_device(device)
    then, now = wanted.devices().get(device), booted.devices().get(device)
    if key == "console.log":
        return ("log-on" if wanted.log else "log-off"), 0
    if place and place[0] == "net" and not field:
        return _card_order(vm, booted, wanted, place[1])
    if place and isinstance(then, Nic) and now and field == "link":
        return f"link-{then.link}", place[1]
    if place and isinstance(then, Disk) and now and then.type == "cdrom" and field == "path":
        return ("insert" if then.path else "eject"), place[1]
    return None


def _card_order(vm: Vm, booted: Definition, wanted: Definition, index: int) -> tuple[str, int] | None:
    """A card that comes or goes is the last one: were another meant, those behind it would change their names.

    On q35 a card can only leave a port of its own, which those have that came while the VM ran.
    """
    then, now = wanted.nics, booted.nics
    common = min(len(then), len(now))
    if then[:common] != now[:common] or abs(len(then) - len(now)) != 1:
        return None
    if len(then) > len(now):
        return "nic-add", index
    return ("nic-remove", index) if booted.family == "pc" or index in vm.added else None


def _give(context: Context, live: Live, wanted: Definition, key: str, what: str, value: int, answered: Answered) -> None:
    if what == "nic-add":
        _add_card(context, live, wanted, value, answered)
    elif what == "nic-remove":
        _remove_card(context, live, wanted, value, answered)
    elif what == "insert":
        _insert(context, live, wanted, key, value, answered)
    else:
        context.machines.order(live, what, answered, value=value)


def _insert(context: Context, live: Live, wanted: Definition, key: str, drive: int, answered: Answered) -> None:
    device, fd = wanted.devices()[key.partition(".")[0]], -1
    try:
        if isinstance(device, Disk):
            resources.check_disk(device, key, resources.facts_of(context, live.vm, device.path))
            fd = resources.open_object(context, live.vm, device.path)
        context.machines.order(live, "insert", answered, value=drive, fd=fd)
    finally:
        if fd >= 0:
            os.close(fd)


def _add_card(context: Context, live: Live, wanted: Definition, index: int, answered: Answered) -> None:
    """First the cable and its filter, then the card; without the card there is no cable, either.

    QEMU makes every card with its link up. One that is to be down hears it before anybody else hears of the card.
    """
    vm = live.vm

    def plugged(error: VmshellError | None, cables: Cables) -> None:
        try:
            if (problem := _ended(context, live) or error) or index not in cables:  # its end takes away what there is
                answered(problem or NetworkFailed(problem="a card of this network cannot be added while the VM runs"))
            else:
                card = next(card for card in context.networks.plugged(vm) if card.index == index)
                context.machines.order(live, "nic-add", added, value=index, fd=cables[index], card=card)
        except Exception as exc:
            settled(_told(exc))
        finally:
            close(cables)

    def added(error: VmshellError | None) -> None:
        if error or wanted.nics[index].link == "up":
            settled(error)
        else:
            context.machines.order(live, "link-down", settled, value=index)

    def settled(error: VmshellError | None) -> None:
        stopped = _ended(context, live)
        if error and not stopped:
            context.machines.order(live, "nic-remove", value=index)
            context.networks.remove(vm, {index})
        elif not stopped:
            vm.added ^= {index}
        answered(error)

    context.networks.add(vm, index, plugged)


def _remove_card(context: Context, live: Live, wanted: Definition, index: int, answered: Answered) -> None:
    def removed(error: VmshellError | None) -> None:
        if not error and not _ended(context, live):
            live.vm.added ^= {index}
            live.vm.booted = replace(live.vm.booted or wanted, nics=wanted.nics)  # first: the names of what is left are written
            context.networks.remove(live.vm, {index})
        answered(error)

    context.machines.order(live, "nic-remove", removed, value=index)
