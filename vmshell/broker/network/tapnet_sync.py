"""What tapnet is told beyond taps: who may reach what, whose sockets are confined, how fast an interface is.

It follows from policy, grants and groups, is worked out anew whenever one of them may have changed, and what is another than was
told last is told.
Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ... import wire
from ...errors import VmshellError
from ...messages import NUMBERS_MAX, OPENINGS_MAX, Confine, Open, Settings
from ...model.limitkinds import FIRST_CONFINED
from ...refusals import TapnetDown
from ..runtime.log import note
from .interfaces import ADDRESSED

if TYPE_CHECKING:
    from ...messages import Port, ToTapnet
    from ..policies import Policies
    from ..runtime.loop import Loop, Timer
    from ..services.accounts import Accounts
    from ..services.tapnet import Tapnet
    from ..vm.vm import Vm
    from .attached import Attached, Running
    from .interfaces import Interface, Interfaces
    from .openings import Openings

Key = tuple[int, int]  # an interface: the VM's number and its own
Done = Callable[[VmshellError | None], None]
RETRY = 5.0  # seconds after tapnet refused to open or close a way


class TapnetSync:
    """`look` gives what the grants open, given who runs; made anew each time."""

    def __init__(
        self,
        *,
        loop: Loop,
        tapnet: Tapnet,
        policies: Policies,
        accounts: Accounts,
        interfaces: Interfaces,
        attached: Attached,
        look: Callable[[Running], Openings],
    ) -> None:
        self._loop = loop
        self._tapnet = tapnet
        self._policies = policies
        self._accounts = accounts
        self._interfaces = interfaces
        self._attached = attached
        self._look = look
        self._settings: list[dict[str, object]] = []
        self._ports: dict[Key, dict[str, object]] = {}
        self._opened: dict[Key, list[dict[str, object]] | None] = {}  # None: it was refused
        self._retry: Timer | None = None
        self._confined: frozenset[int] = frozenset()
        self.met: set[int] = set()  # members who were here and were not in the list

    def begin(self) -> None:
        """There is a new tapnet, which knows nothing."""
        self._settings = []
        self._ports.clear()
        self._opened.clear()
        self._tell_settings()

    def asked(self, port: Port) -> None:
        """tapnet was asked to make *port*."""
        self._ports[port.number, port.nic] = _facts(port)

    def forget(self, key: Key) -> None:
        """The interface is no longer attached."""
        self._opened.pop(key, None)
        self._ports.pop(key, None)

    # --- who may reach what -------------------------------------------------------------------------------------------

    def open_ports(self, done: Done | None = None) -> None:
        """Tell tapnet who may reach what, as it follows from what is published and who runs; then `done`, with its refusal."""
        running = list(self._attached)
        openings = self._look(running)
        changed = []
        for vm, interfaces in running:
            for interface in interfaces:
                if interface.network.kind in ADDRESSED:
                    found = openings.to(vm, interface)
                    if found != self._opened.get((vm.number, interface.index), []):
                        changed.append((vm, interface, found))
        waiting = _Answers(len(changed), done)
        for vm, interface, found in changed:
            self._open(vm, interface, found, waiting)

    def _open(self, vm: Vm, interface: Interface, found: list[dict[str, object]], waiting: _Answers) -> None:
        key = vm.number, interface.index
        self._opened[key] = found
        if len(found) > OPENINGS_MAX:
            # A group is large: who is behind the last place waits, and everybody else goes on.
            note("too-many-openings", number=vm.number, owner=vm.owner, vm=vm.name, count=len(found))

        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if error and key in self._opened:
                note("tapnet-refused", verb=Open.verb, problem=error)
                self._opened[key] = None
                if not isinstance(error, TapnetDown):  # a new tapnet is told everything
                    if self._retry:
                        self._retry.cancel()  # one is for all that was refused
                    self._retry = self._loop.after(RETRY, self.open_ports)
            waiting.one(error)

        self._tapnet.request(Open(number=vm.number, nic=interface.index, openings=found[:OPENINGS_MAX]), answered)

    def waits(self, vm: Vm) -> str:
        """That not all ways to *vm* have room, in words; empty if they have."""
        for interface in self._attached.of(vm):
            found = self._opened.get((vm.number, interface.index))
            if found and len(found) > OPENINGS_MAX:
                ways = f"{OPENINGS_MAX} of {len(found)} ways to {interface.name}"
                return f"{ways} are open, single users' before groups'; the rest waits"
        return ""

    def rate(self, vm: Vm, interface: Interface) -> int:
        """What holds for an interface that is attached, in kbit/s each way; 0 is no limit."""
        told = self._ports.get((vm.number, interface.index))
        return int(str(told.get("rate", 0))) if told else self._policies.effective(vm.owner).limits.net_rate

    # --- policy, groups and accounts ----------------------------------------------------------------------------------

    def refresh(self, done: Done | None = None) -> None:
        """Policy, groups or accounts may have changed: tell tapnet what is different now."""
        self._tell_settings()
        for vm, interfaces in self._attached:
            for interface in interfaces:
                self._tell_port(vm, interface)
        self.open_ports(done)

    def meet(self, uid: int) -> None:
        """*uid* is a member who is here. Who was none when the list was made, or was not in it, gets into it now (A06)."""
        if uid and self._policies.host.ssh_forwarding and uid not in self._confined:
            self.met.add(uid)
            self._tell_settings()

    def confined(self) -> int:
        """Of how many accounts the sockets are held to their own VMs."""
        return len(self._confined)

    def _tell_settings(self) -> None:
        host, known = self._policies.host, self._accounts
        # A directory may not list everybody whom it knows.
        self.met = {uid for uid in self.met if host.group in known.groups_of(known.user_of(uid))}
        confined = {*known.members(host.group), *self.met} if host.ssh_forwarding else set()
        self._confined = frozenset(uid for uid in confined if uid >= FIRST_CONFINED)
        uids = sorted(self._confined)
        messages = [
            Settings(pool4=host.ipv4_pool, pool6=host.ipv6_pool, confined=uids[:NUMBERS_MAX]),
            *(Confine(uids=uids[at : at + NUMBERS_MAX]) for at in range(NUMBERS_MAX, len(uids), NUMBERS_MAX)),
        ]
        bodies = [message.to_body() for message in messages]
        if bodies != self._settings:
            self._settings = bodies
            for message in messages:
                self._ask(message)

    def _tell_port(self, vm: Vm, interface: Interface) -> None:
        port = self._interfaces.port_message(vm, interface, create=False)
        if self._ports.get((vm.number, interface.index)) != _facts(port):
            self.asked(port)
            self._ask(port, lambda: self._ports.pop((vm.number, interface.index), None))

    def _ask(self, message: ToTapnet, refused: Callable[[], object] | None = None) -> None:
        def answered(error: VmshellError | None, packet: wire.Packet) -> None:
            if error:
                note("tapnet-refused", verb=message.verb, problem=error)
            if error and refused:
                refused()

        self._tapnet.request(message, answered)


def _facts(port: Port) -> dict[str, object]:
    """All of it but how it is asked for."""
    return {**port.to_body(), "create": False}


class _Answers:
    """As many as are awaited; then `done`, with the first error."""

    def __init__(self, count: int, done: Done | None) -> None:
        self._left = count
        self._error: VmshellError | None = None
        self._done = done
        if not count and done:
            done(None)

    def one(self, error: VmshellError | None) -> None:
        self._error = self._error or error
        self._left -= 1
        if not self._left and self._done:
            self._done(self._error)
