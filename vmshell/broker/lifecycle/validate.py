"""Whether a definition is allowed: the policy's rules about it, with their numbers, and what its objects are.

Runs in: the broker.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BadValue
from ...messages import Change, DiskAdd, New
from ...model import definition as definitions
from ...model.decide import Verdict, apply_fixed, decide, refuse
from ...model.definition import Definition, Disk, Nic
from ...model.values import split_ref
from ...names import MIB
from ...refusals import WrongState
from ..storage.checks import check_disk
from ..vm.objects import mebibytes
from .live_update import BALLOON, NOT_THE_GUESTS

if TYPE_CHECKING:
    from ..policies import Policies
    from ..services.capabilities import Capabilities
    from ..storage.create import Makes
    from ..storage.images import Images
    from ..storage.resolve import Resolved, Resolver
    from ..vm.registry import Registry
    from ..vm.vm import Vm


class Validation:
    """What stands against a definition, by the very code that `explain` asks."""

    def __init__(
        self, *, policies: Policies, registry: Registry, images: Images, resolver: Resolver, capabilities: Capabilities
    ) -> None:
        self._policies = policies
        self._registry = registry
        self._images = images
        self._resolver = resolver
        self._capabilities = capabilities

    def from_image(self, request: New) -> Definition:
        """The definition of `new NAME --image IMAGE`."""
        image = self._images.get(request.image)
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

    def normalized(self, owner: str, definition: Definition) -> Definition:
        """Add what the policy fixes where nothing else was said, and the machine's version, so that no upgrade changes it."""
        said = apply_fixed(definition, self._policies.effective(owner).limits, only_unsaid=True)
        return replace(said, machine=self._capabilities.machines.get(said.machine, said.machine))

    def resolve(self, vm: Vm, definition: Definition, makes: Makes | None = None) -> Resolved:
        """Look up what *definition* names; *makes* are objects that are still to be made."""
        return self._resolver.resolve(vm, definition, makes)

    def verdicts(self, resolved: Resolved, makes: Makes, *, running: bool) -> list[Verdict]:
        """Return every rule of the policy about a VM with this definition, kept or refused."""
        vm, definition = resolved.vm, resolved.definition
        for ref in definition.objects():
            if ref.startswith("image:"):  # kernel and initrd; disks name images as `base`, looked up when they are made
                resolved.image(split_ref(ref)[1])
        # What is missing may still be brought in; a boot looks again.
        sizes = {ref: made.size for ref in definition.objects() if (made := resolved.find(ref))}
        disk = vm.store.size() + sum(mebibytes(made.size) for made in makes.values())
        share = vm.share(running=running, definition=definition, disk=disk)
        used = self._registry.used(vm.uid, without=vm)
        return decide(vm.ref, resolved.effective, definition, share, used, sizes)

    def check(self, vm: Vm, definition: Definition, makes: Makes) -> None:
        """Raise what stands against *definition*: a rule of the policy, or an object that is something else."""
        resolved = self.resolve(vm, definition, makes)
        refuse(self.verdicts(resolved, makes, running=False), vm.ref)
        for name, disk in definition.devices().items():
            # What is still to be made is looked at when it is there, by the boot.
            if isinstance(disk, Disk) and disk.path not in makes and (made := resolved.find(disk.path)):
                check_disk(disk, name, made)

    def missing(self, vm: Vm, definition: Definition) -> list[str]:
        """Return the objects that a boot will want and that are not there yet."""
        return self.resolve(vm, definition).missing()

    def pending(self, vm: Vm) -> list[str]:
        """The keys whose values a running VM only gets at its next boot."""
        if vm.booted is None:
            return []
        wanted = apply_fixed(vm.definition, self._policies.effective(vm.owner).limits)
        keys = [key for key in definitions.differences(vm.booted, wanted) if key not in NOT_THE_GUESTS]
        return [key for key in keys if key != BALLOON or vm.balloon != wanted.memory]


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
