"""The verbs publish and unpublish: what a VM's owner lets others reach.

Runs in: the broker.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ... import encoding
from ...errors import BadValue, VmshellError
from ...messages import CREATING, Publish
from ...model.decide import Verdict, refuse
from ...model.limitkinds import port_range
from ...refusals import NoPortToReach, NoSuchVm, PortTaken, TooOften, VmBusy
from ..network.openings import WORLD
from ..runtime.files import kept
from ..runtime.log import BURST, by_user, has_share
from ..services.accounts_helper import Question
from ..vm.vm import Published, Vm

if TYPE_CHECKING:
    from ..host.processes import Host
    from ..network.tapnet_sync import TapnetSync
    from ..policies import Policies
    from ..runtime.call import Call
    from ..services.accounts import Accounts
    from ..vm.registry import Registry
    from .table import Handlers


class PublishHandlers:
    """Writes down what a VM's owner publishes, and has it opened."""

    def __init__(
        self, *, embedded: bool, host: Host, policies: Policies, accounts: Accounts, registry: Registry, sync: TapnetSync
    ) -> None:
        self._embedded = embedded
        self._host = host
        self._policies = policies
        self._accounts = accounts
        self._registry = registry
        self._sync = sync

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {Publish: self._publish}

    def _publish(self, call: Call, request: Publish, vm: Vm) -> None:
        if vm.state == CREATING:
            raise VmBusy(vm=vm.ref, state=vm.state)
        vm.must_be_recorded("publish")
        what = "unpublish" if request.remove else "publish"
        if not has_share(call.peer.uid, what):
            raise TooOften(what=what, limit=BURST)
        named = [] if request.remove else _named(request.to)
        self._accounts.when_known(named, lambda: call.guard(lambda: self._write(call, request, vm)))

    def _write(self, call: Call, request: Publish, vm: Vm) -> None:
        what = "unpublish" if request.remove else "publish"
        if self._registry.get(vm.uid, vm.name) is not vm:
            raise NoSuchVm(vm=vm.ref)  # deleted meanwhile
        with kept(vm, "published"):
            vm.published = _without(vm, request) if request.remove else self._with(vm, request)
            self._registry.save(vm)
        said = {"port": request.port, "proto": request.proto, "to": request.to, "host_port": request.host_port}
        by_user(call.peer.uid, what, number=vm.number, owner=vm.owner, vm=vm.name, **said)

        def told(error: VmshellError | None) -> None:
            waits = "" if request.remove else self._sync.waits(vm)
            call.reply({"name": vm.ref, **said, "pending": error.sentence() if error else waits})

        self._sync.open_ports(told)

    def _with(self, vm: Vm, request: Publish) -> list[Published]:
        if self._embedded:
            rule = "in session mode the ports that lead to a guest stand in its definition: set NAME net0.forward=tcp:8080:80"
            raise BadValue(field="publish", value=request.port, rule=rule)
        uid = self._uid_of(request.to)
        host_port = (request.host_port or request.port) if request.to == WORLD else 0
        new = Published(request.port, request.proto, request.to, host_port, uid)
        others = [item for item in vm.published if (item.port, item.proto, item.to) != (new.port, new.proto, new.to)]
        refuse(self._verdicts(vm, new, others), vm.ref)
        # `net` and `info` say it in one message.
        if len(json.dumps([vars(item) for item in (*others, new)])) > encoding.FRAME_MAX // 2:
            rule = f"{vm.ref} has published {len(others)} ports, and its list is full: unpublish some, or publish to a group"
            raise BadValue(field="publish", value=request.port, rule=rule)
        if host_port and (self._leads_elsewhere(vm, new, others) or self._host.listens(host_port, new.proto)):
            raise PortTaken(port=host_port)
        return [*others, new]

    def _leads_elsewhere(self, vm: Vm, new: Published, others: list[Published]) -> bool:
        """Does the host's port lead to another port already, of this VM or of another?"""
        return any(
            (item.host_port, item.proto) == (new.host_port, new.proto)
            for other in self._registry
            for item in (others if other is vm else other.published)
        )

    def _uid_of(self, to: str) -> int:
        """The uid of the user whom *to* names, else 0; raises BadValue if there is nobody of that name."""
        self._accounts.must_know(*_named(to))
        if to.startswith("@"):
            uid = 0 if self._accounts.is_group(to[1:]) else None
        else:
            uid = 0 if to == WORLD else self._accounts.uid_of(to)
        if uid is None:
            raise BadValue(field="to", value=to, rule="a user of this host, @GROUP, or world")
        return uid

    def _verdicts(self, vm: Vm, new: Published, others: list[Published]) -> list[Verdict]:
        effective = self._policies.effective(vm.owner)
        count = sum(len(other.published) for other in self._registry.of(vm.uid) if other is not vm) + len(others)
        most, ports = effective.limits.published_max, effective.limits.forward_ports
        said = ("published ports in all", "1", str(count), str(most), str(max(0, most - count)))
        found = [Verdict("published_max", effective.section("published_max"), *said, count < most, vm.ref)]
        if new.to == WORLD:
            nearest = f"a port from {ports}" if ports else "@GROUP or a user"
            section = effective.section("forward_ports")
            what = f"port {new.host_port} of the host"
            found.append(Verdict("forward_ports", section, what, "", "", "", nearest, new.host_port in port_range(ports), vm.ref))
        return found


def _without(vm: Vm, request: Publish) -> list[Published]:
    def meant(item: Published) -> bool:
        return (item.port, item.proto) == (request.port, request.proto) and request.to in ("", item.to)

    if not any(meant(item) for item in vm.published):
        raise NoPortToReach(vm=vm.ref, port=f"{request.port}/{request.proto}" + (f" to {request.to}" if request.to else ""))
    return [item for item in vm.published if not meant(item)]


def _named(to: str) -> list[Question]:
    """What must be known of the user or group whom *to* names."""
    if to == WORLD:
        return []
    return [Question("group", to[1:]) if to.startswith("@") else Question("user", to)]
