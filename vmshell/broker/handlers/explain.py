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
from ..host.accounts_helper import Question
from ..lifecycle import define
from ..storage import resources
from ..vm.access import Peer, authorise
from . import snapshots

if TYPE_CHECKING:
    from ..api.server import Call
    from ..context import Context
    from ..vm.registry import Vm


def handle_explain(context: Context, call: Call, request: Explain) -> None:
    """Reply with every rule asked, kept or not, and the error that the request would end with."""
    peer = call.peer
    if not request.user or request.user == peer.user:
        _explain(context, call, request, peer)
        return
    if not peer.admin:
        raise NotAllowed(what="explaining for somebody else", who="administrators")
    account = Question("user", request.user)

    def known() -> None:
        context.accounts.must_know(account)
        uid = context.accounts.uid_of(request.user)
        if uid is None:
            raise NoSuchUser(user=request.user)
        _explain(context, call, request, Peer(uid, request.user, admin=False))

    context.accounts.when_known([account], lambda: call.guard(known))


def _explain(context: Context, call: Call, request: Explain, peer: Peer) -> None:
    asked = parse_request(request.request)
    found: list[Verdict] = []
    error: VmshellError | None = None
    try:
        vm = authorise(peer, asked, context.registry)
        judge = JUDGES.get(type(asked))
        if judge is not None:
            found = judge(context, peer, asked, vm)
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
            "judged": type(asked) in JUDGES,
        }
    )


def _row(verdict: Verdict) -> dict[str, Any]:
    return {key: getattr(verdict, key) for key in ("rule", "section", "what", "asked", "used", "limit", "nearest", "ok")}


def _name(request: Request) -> str:
    return str(getattr(request, "vm", ""))


def _new(context: Context, peer: Peer, request: New, vm: None) -> list[Verdict]:
    return _on_paper(context, peer, define.from_image(context, request))


def _define(context: Context, peer: Peer, request: Define, vm: None) -> list[Verdict]:
    definition = definitions.parse(request.text, request.vm)
    there = context.registry.get(peer.uid, request.vm)
    if there is not None and not request.new and not request.once:
        return _redefined(context, there, definition)
    # Run at once, the sums over running VMs count too.
    return _on_paper(context, peer, definition, running=request.once)


def _on_paper(context: Context, peer: Peer, definition: Definition, *, running: bool = False) -> list[Verdict]:
    wanted = define.settled(context, peer.user, definition)
    paper = context.registry.on_paper(peer.uid, peer.user, wanted)
    return define.verdicts(context, paper, wanted, define.to_make(context, paper.store, wanted), running=running)


def _redefined(context: Context, vm: Vm, definition: Definition) -> list[Verdict]:
    wanted = define.settled(context, vm.owner, definition)
    return define.verdicts(context, vm, wanted, define.to_make(context, vm.store, wanted), running=False)


def _change(context: Context, peer: Peer, request: Change, vm: Vm) -> list[Verdict]:
    return _redefined(context, vm, define.changed(vm, request))


def _disk_add(context: Context, peer: Peer, request: DiskAdd, vm: Vm | None) -> list[Verdict]:
    return [] if vm is None else _redefined(context, vm, define.with_disk(vm, request))


def _boot(context: Context, peer: Peer, request: Boot, vm: Vm) -> list[Verdict]:
    context.machines.must_be_bootable(vm)
    definition = context.machines.for_this_run(vm, request.restore, scratch=request.scratch)
    found = define.verdicts(context, vm, definition, {}, running=True)
    if all(verdict.ok for verdict in found):
        resources.check_objects(context, vm, definition)
        snapshots.check_restore(context, vm, definition)
    return found


JUDGES: dict[type[Request], Callable[..., list[Verdict]]] = {
    New: _new,
    Define: _define,
    Change: _change,
    DiskAdd: _disk_add,
    Boot: _boot,
}
