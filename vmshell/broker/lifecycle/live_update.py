"""What changes while a VM runs: memory by the balloon, the medium of a CD drive, interfaces, whether the console is logged.

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
from ..network.taps import close
from ..runtime.log import unexpected
from ..storage.checks import check_disk

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..network.attached import Attached
    from ..network.taps import Network, Taps
    from ..storage.resources import Resources
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .runs import Run, Runs

Answered = Callable[[VmshellError | None], None]
Said = Callable[[list[str], list[str]], None]  # the keys changed now; sentences about those that could not be

# Keys that are nothing to a guest: there is nothing to wait for.
NOT_THE_GUESTS = ("description", "autostart", "image")
BALLOON = "memory.size"


class LiveUpdate:
    """Orders to QEMU by which a running VM follows its definition."""

    def __init__(self, *, registry: Registry, resources: Resources, attached: Attached, network: Network, runs: Runs) -> None:
        self._registry = registry
        self._resources = resources
        self._attached = attached
        self._network = network
        self._runs = runs

    def follow(self, vm: Vm, done: Said) -> None:
        """Make a running VM follow its new definition where it can, one order after the other; `done` is called once.

        No other change may come in between (`vm.defining`): each order was found by comparing with what the VM ran with at first.
        """
        run, booted, wanted = self._runs.get(vm.number), vm.booted, vm.definition
        if run is None or booted is None or vm.state not in (RUNNING, PAUSED):
            done([], [])
            return
        todo = [(key, order) for key in definitions.differences(booted, wanted) if (order := _order(vm, booted, wanted, key))]
        if wanted.memory <= booted.memory and wanted.memory != (vm.balloon or booted.memory):
            todo.append((BALLOON, ("balloon", wanted.memory)))
        now: list[str] = []
        problems: list[str] = []

        def step() -> None:
            if not todo or self._ended(run):
                done(now, problems)
                return
            key, (what, value) = todo.pop(0)

            def answered(error: VmshellError | None) -> None:
                try:
                    if error := self._ended(run) or error:
                        raise error
                    self._believe(vm, wanted, key)
                    now.append(key)
                except Exception as exc:
                    problems.append(f"{key}: {_told(exc).sentence()}")
                step()

            _answer(lambda answered: self._give(run, wanted, key, what, value, answered), answered)

        step()

    def _ended(self, run: Run) -> VmStopped | None:
        """What is to be said once this is no longer the VM's present run: taps and answers may come after its end."""
        if self._runs.get(run.vm.number) is run and not run.ending:
            return None
        return VmStopped(vm=run.vm.ref, problem=run.why_it_ends())

    def _believe(self, vm: Vm, wanted: Definition, key: str) -> None:
        """*vm* runs with *key* as it is *wanted* from now on; written down for a broker that comes after us."""
        booted = vm.booted or wanted
        if key == BALLOON:
            vm.balloon = wanted.memory
        elif split_device(key):  # a whole interface
            vm.booted = replace(booted, nics=wanted.nics)
        else:
            vm.booted = definitions.with_key_of(booted, wanted, key)
        self._registry.set_state(vm, vm.state)

    def order_all(self, run: Run, done: Answered) -> None:
        """Before the first instruction: what QEMU has no argument for. `done` is called once; an error is the end of it."""
        devices = (run.vm.booted or run.vm.definition).devices()
        down = [name for name, nic in devices.items() if isinstance(nic, Nic) and nic.link == "down"]

        def step(error: VmshellError | None = None) -> None:
            if error or not down:
                done(error)
            else:
                self._runs.order(run, "link-down", step, value=int(down.pop(0).removeprefix("net")))

        step()

    def _give(self, run: Run, wanted: Definition, key: str, what: str, value: int, answered: Answered) -> None:
        if what == "nic-add":
            self._add_interface(run, wanted, value, answered)
        elif what == "nic-remove":
            self._remove_interface(run, wanted, value, answered)
        elif what == "insert":
            self._insert(run, wanted, key, value, answered)
        else:
            self._runs.order(run, what, answered, value=value)

    def _insert(self, run: Run, wanted: Definition, key: str, drive: int, answered: Answered) -> None:
        device, fd = wanted.devices()[key.partition(".")[0]], -1
        try:
            if isinstance(device, Disk):
                check_disk(device, key, self._resources.facts_of(run.vm, device.path))
                fd = self._resources.open_object(run.vm, device.path)
            self._runs.order(run, "insert", answered, value=drive, fd=fd)
        finally:
            if fd >= 0:
                os.close(fd)

    def _add_interface(self, run: Run, wanted: Definition, index: int, answered: Answered) -> None:
        """Make the tap and its filter, then the interface; without the interface there is no tap, either.

        QEMU makes every interface with its link up. One that is to be down hears it before anybody else hears of the interface.
        """
        vm = run.vm

        def plugged(error: VmshellError | None, taps: Taps) -> None:
            try:
                if (problem := self._ended(run) or error) or index not in taps:  # its end takes away what there is
                    answered(problem or NetworkFailed(problem="an interface of this network cannot be added while the VM runs"))
                else:
                    interface = next(interface for interface in self._attached.of(vm) if interface.index == index)
                    self._runs.order(run, "nic-add", added, value=index, fd=taps[index], interface=interface)
            except Exception as exc:
                settled(_told(exc))
            finally:
                close(taps)

        def added(error: VmshellError | None) -> None:
            if error or wanted.nics[index].link == "up":
                settled(error)
            else:
                self._runs.order(run, "link-down", settled, value=index)

        def settled(error: VmshellError | None) -> None:
            stopped = self._ended(run)
            if error and not stopped:
                self._runs.order(run, "nic-remove", value=index)
                self._network.remove(vm, {index})
            elif not stopped:
                vm.added ^= {index}
            answered(error)

        self._network.add(vm, index, plugged)

    def _remove_interface(self, run: Run, wanted: Definition, index: int, answered: Answered) -> None:
        def removed(error: VmshellError | None) -> None:
            if not error and not self._ended(run):
                run.vm.added ^= {index}
                run.vm.booted = replace(run.vm.booted or wanted, nics=wanted.nics)  # first: the names of what is left are written
                self._network.remove(run.vm, {index})
            answered(error)

        self._runs.order(run, "nic-remove", removed, value=index)


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


def _order(vm: Vm, booted: Definition, wanted: Definition, key: str) -> tuple[str, int] | None:
    """The order, and its number, that changes *key* of a running VM; None if only a boot does."""
    device, _, field = key.partition(".")
    place = split_device(device)
    then, now = wanted.devices().get(device), booted.devices().get(device)
    if key == "console.log":
        return ("log-on" if wanted.log else "log-off"), 0
    if place and place[0] == "net" and not field:
        return _interface_order(vm, booted, wanted, place[1])
    if place and isinstance(then, Nic) and now and field == "link":
        return f"link-{then.link}", place[1]
    if place and isinstance(then, Disk) and now and then.type == "cdrom" and field == "path":
        return ("insert" if then.path else "eject"), place[1]
    return None


def _interface_order(vm: Vm, booted: Definition, wanted: Definition, index: int) -> tuple[str, int] | None:
    """An interface that comes or goes is the last one: were another meant, those behind it would change their names.

    On q35 an interface can only leave a port of its own, which those have that came while the VM ran.
    """
    then, now = wanted.nics, booted.nics
    common = min(len(then), len(now))
    if then[:common] != now[:common] or abs(len(then) - len(now)) != 1:
        return None
    if len(then) > len(now):
        return "nic-add", index
    return ("nic-remove", index) if booted.family == "pc" or index in vm.added else None
