"""Giving a VM its definition, new or changed: judged as a whole, missing disks made by jobs, written, then followed live.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import ALIVE, CREATING, FAILED, OFF, QUEUED, SHELF
from ...names import NAME_MAX
from ...refusals import BadName, VmBusy
from ..runtime.log import by_user
from .validate import must_be_known

if TYPE_CHECKING:
    from ...model.definition import Definition
    from ..runtime.call import Call
    from ..services.capabilities import Capabilities
    from ..storage.create import NewDisks
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .live_update import LiveUpdate
    from .removal import Removal
    from .validate import Validation


class Define:
    """New VMs, and other definitions for those that are there."""

    def __init__(
        self,
        *,
        registry: Registry,
        capabilities: Capabilities,
        disks: NewDisks,
        validation: Validation,
        live: LiveUpdate,
        removal: Removal,
    ) -> None:
        self._registry = registry
        self._capabilities = capabilities
        self._disks = disks
        self._validation = validation
        self._live = live
        self._removal = removal

    def create(self, call: Call, definition: Definition, *, once: bool, done: Callable[[Vm], None]) -> None:
        """Make a VM; *done* is called with it, or the call fails and nothing is left."""
        if definition.name == SHELF:
            raise BadName(what="VM", value=SHELF, rule="that name is taken: it is where objects without a VM are")

        def act() -> None:
            wanted = self._validation.normalized(call.peer.user, definition)
            if once:
                wanted = replace(wanted, name=self._free_name(call.peer.uid, wanted.name))
            # Judged before the name is taken, with a VM that exists on paper only.
            paper = self._registry.on_paper(call.peer.uid, call.peer.user, wanted)
            makes = self._disks.to_make(paper.store, wanted)
            self._validation.check(paper, wanted, makes)
            vm = self._registry.create(call.peer.uid, call.peer.user, wanted, once=once)

            def made(error: VmshellError | None) -> None:
                try:
                    if error:
                        raise error
                    self._registry.finish_creation(vm)
                except VmshellError as exc:
                    folder = os.path.dirname(vm.store.folder)
                    self._registry.forget(vm)
                    self._removal.delete_later(folder)
                    call.fail(exc)
                    return
                by_user(vm.uid, "new", number=vm.number, owner=vm.owner, vm=vm.name, image=wanted.image)
                call.guard(lambda: done(vm))

            self._disks.make(vm.store, makes, made)

        self._capabilities.when_known(lambda: call.guard(act))

    def _free_name(self, uid: int, stem: str) -> str:
        number = 1
        while self._registry.get(uid, f"{stem[: NAME_MAX - 6]}{number}"):
            number += 1
        return f"{stem[: NAME_MAX - 6]}{number}"

    def redefine(self, call: Call, vm: Vm, definition: Definition) -> None:
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
            wanted = self._validation.normalized(vm.owner, definition)
            makes = self._disks.to_make(vm.store, wanted)
            self._validation.check(vm, wanted, makes)
            self._disks.make(vm.store, makes, lambda error: guard(lambda: write(wanted, error)))

        def write(wanted: Definition, error: VmshellError | None) -> None:
            if error:
                raise error
            self._registry.redefine(vm, wanted)
            by_user(vm.uid, "defined", number=vm.number, owner=vm.owner, vm=vm.name)
            self._live.follow(vm, lambda now, problems: guard(lambda: reply(now, problems)))

        def reply(now: list[str], problems: list[str]) -> None:
            vm.defining = False
            answer = {"name": vm.ref, "state": vm.state, "now": now, "problems": problems}
            call.reply(
                {**answer, "next_boot": self._validation.pending(vm), "missing": self._validation.missing(vm, vm.definition)}
            )

        vm.defining = True
        self._capabilities.when_known(lambda: guard(begin))
