"""What a definition names, looked up once for a request: its objects, its images, and what holds for its owner.

Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...model.values import split_ref

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ...model.policy import Effective
    from ..policies import Policies
    from ..vm.objects import Object
    from ..vm.vm import Vm
    from .image_catalogue import Image
    from .images import Images
    from .resources import Resources


class Resolved:
    """A definition of *vm* with all that it names. What could not be found is remembered as the error that says so."""

    def __init__(
        self,
        vm: Vm,
        definition: Definition,
        *,
        effective: Effective,
        objects: Mapping[str, Object | VmshellError],
        image: Callable[[str], Image],
    ) -> None:
        self.vm = vm
        self.definition = definition
        self.effective = effective
        self._objects = objects
        self._load = image
        self._images: dict[str, Image] = {}

    def object(self, ref: str) -> Object:
        """Return what the object *ref* was made as, or raise why it is not there."""
        found = self._objects[ref]
        if isinstance(found, VmshellError):
            raise found
        return found

    def find(self, ref: str) -> Object | None:
        """Return what the object *ref* was made as; None if it is not there."""
        found = self._objects.get(ref)
        return None if isinstance(found, VmshellError) else found

    def missing(self) -> list[str]:
        """Return the objects that are not there."""
        return [ref for ref, found in self._objects.items() if isinstance(found, VmshellError)]

    def image(self, name: str) -> Image:
        """Return the catalogue image *name*; raises NoSuchImage or ImageDamaged."""
        if name not in self._images:
            self._images[name] = self._load(name)
        return self._images[name]

    def images(self) -> dict[str, Image]:
        """Return every image that a boot needs: of kernel and initrd, and below the overlays."""
        definition = self.definition
        names = {split_ref(ref)[1] for ref in (definition.kernel, definition.initrd) if ref.startswith("image:")}
        for disk in definition.disks:
            if disk.path and split_ref(disk.path)[0] != "library" and (made := self.find(disk.path)) and made.base:
                names.add(made.base)
        return {name: self.image(name) for name in sorted(names)}


class Resolver:
    """Looks up what definitions name."""

    def __init__(self, *, policies: Policies, resources: Resources, images: Images) -> None:
        self._policies = policies
        self._resources = resources
        self._images = images

    def resolve(self, vm: Vm, definition: Definition, makes: Mapping[str, Object] | None = None) -> Resolved:
        """Look up all that *definition* names; *makes* are objects that are still to be made."""
        objects: dict[str, Object | VmshellError] = {}
        for ref in definition.objects():
            if not ref.startswith("image:"):
                objects[ref] = makes[ref] if makes and ref in makes else self._look_up(vm, ref)
        effective = self._policies.effective(vm.owner)
        return Resolved(vm, definition, effective=effective, objects=objects, image=self._images.get)

    def _look_up(self, vm: Vm, ref: str) -> Object | VmshellError:
        try:
            return self._resources.facts_of(vm, ref)
        except VmshellError as exc:
            return exc
