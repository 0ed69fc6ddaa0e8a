"""`explain`: which rules a request would meet, with their numbers, by the very code that would refuse it. Nothing is done.

Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import VmshellError
from ...messages import Boot, Change, Define, DiskAdd, Explain, New, Request, parse_request
from ...model import definition as definitions
from ...model.decide import Verdict
from ...model.definition import Definition
from ...refusals import NoSuchUser, NotAllowed
from ..lifecycle.restore import check_restore
from ..lifecycle.validate import changed, with_disk
from ..runtime.call import Peer
from ..services.accounts_helper import Question
from ..storage.checks import check_objects
from ..vm.access import authorise

if TYPE_CHECKING:
    from ..lifecycle.boot import Boots
    from ..lifecycle.validate import Validation
    from ..runtime.call import Call
    from ..services.accounts import Accounts
    from ..storage.create import NewDisks
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers


class ExplainHandlers:
    """Judges a request without doing it."""

    def __init__(self, *, accounts: Accounts, registry: Registry, validation: Validation, disks: NewDisks, boots: Boots) -> None:
        self._accounts = accounts
        self._registry = registry
        self._validation = validation
        self._disks = disks
        self._boots = boots
        self._judges: dict[type[Request], Callable[..., list[Verdict]]] = {
            New: self._new,
            Define: self._define,
            Change: self._change,
            DiskAdd: self._disk_add,
            Boot: self._boot,
        }

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {Explain: self._explain_for}

    def _explain_for(self, call: Call, request: Explain) -> None:
        """Reply with every rule asked, kept or not, and the error that the request would end with."""
        peer = call.peer
        if not request.user or request.user == peer.user:
            self._explain(call, request, peer)
            return
        if not peer.admin:
            raise NotAllowed(what="explaining for somebody else", who="administrators")
        account = Question("user", request.user)

        def known() -> None:
            self._accounts.must_know(account)
            uid = self._accounts.uid_of(request.user)
            if uid is None:
                raise NoSuchUser(user=request.user)
            self._explain(call, request, Peer(uid, request.user, admin=False))

        self._accounts.when_known([account], lambda: call.guard(known))

    def _explain(self, call: Call, request: Explain, peer: Peer) -> None:
        asked = parse_request(request.request)
        found: list[Verdict] = []
        error: VmshellError | None = None
        try:
            vm = authorise(peer, asked, self._registry)
            judge = self._judges.get(type(asked))
            if judge is not None:
                found = judge(peer, asked, vm)
            refused = next((verdict for verdict in found if not verdict.ok), None)
            if refused is not None:
                error = refused.error(_name(asked))
        except VmshellError as exc:
            error = exc
        call.reply(
            {
                "allowed": error is None,
                "error": error.to_wire() if error else {},
                "rules": [_row(verdict) for verdict in found],
                "judged": type(asked) in self._judges,
            }
        )

    def _new(self, peer: Peer, request: New, vm: None) -> list[Verdict]:
        return self._on_paper(peer, self._validation.from_image(request))

    def _define(self, peer: Peer, request: Define, vm: None) -> list[Verdict]:
        definition = definitions.parse(request.text, request.vm)
        there = self._registry.get(peer.uid, request.vm)
        if there is not None and not request.new and not request.once:
            return self._redefined(there, definition)
        # Run at once, the sums over running VMs count too.
        return self._on_paper(peer, definition, running=request.once)

    def _on_paper(self, peer: Peer, definition: Definition, *, running: bool = False) -> list[Verdict]:
        wanted = self._validation.normalized(peer.user, definition)
        paper = self._registry.on_paper(peer.uid, peer.user, wanted)
        makes = self._disks.to_make(paper.store, wanted)
        return self._validation.verdicts(self._validation.resolve(paper, wanted, makes), makes, running=running)

    def _redefined(self, vm: Vm, definition: Definition) -> list[Verdict]:
        wanted = self._validation.normalized(vm.owner, definition)
        makes = self._disks.to_make(vm.store, wanted)
        return self._validation.verdicts(self._validation.resolve(vm, wanted, makes), makes, running=False)

    def _change(self, peer: Peer, request: Change, vm: Vm) -> list[Verdict]:
        return self._redefined(vm, changed(vm, request))

    def _disk_add(self, peer: Peer, request: DiskAdd, vm: Vm | None) -> list[Verdict]:
        return [] if vm is None else self._redefined(vm, with_disk(vm, request))

    def _boot(self, peer: Peer, request: Boot, vm: Vm) -> list[Verdict]:
        self._boots.must_be_bootable(vm)
        definition = self._boots.for_this_run(vm, request.restore, scratch=request.scratch)
        resolved = self._validation.resolve(vm, definition)
        found = self._validation.verdicts(resolved, {}, running=True)
        if all(verdict.ok for verdict in found):
            check_objects(self._registry, resolved)
            check_restore(resolved)
        return found


def _row(verdict: Verdict) -> dict[str, Any]:
    return {key: getattr(verdict, key) for key in ("rule", "section", "what", "asked", "used", "limit", "nearest", "ok")}


def _name(request: Request) -> str:
    return str(getattr(request, "vm", ""))
