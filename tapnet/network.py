"""The kernel made equal to what the broker wants: many changes as one, each of them whole or not at all.

The order is what protects: the filter knows a tap before the tap is in a bridge, and it is up last of all. What goes wrong on
the way is undone and raised. Bridges are made with their first port and go with their last.
Runs in: tapnet.
"""

from __future__ import annotations

import os

from vmshell.errors import NetworkFailed, VmshellError
from vmshell.messages import Open, Opening, Port, Segment, Settings, ToTapnet, Unplug

from . import rules, sysctl, taps
from .checks import check_port, check_segment, check_settings, orphans
from .links import Link, Links, held_to
from .nft import Nft
from .state import Key, State, bridge, is_ours, key, same, tap
from .watch import Watch


class Answer:
    """How one message ended: an error, or none and perhaps a descriptor."""

    __slots__ = ("error", "fd")

    def __init__(self, error: VmshellError | None = None, fd: int = -1) -> None:
        self.error = error
        self.fd = fd


class Plan:
    """What a batch of messages changes, and the state it leads to."""

    def __init__(self, state: State) -> None:
        self.state = state.copy()
        self.created: dict[Key, Port] = {}
        self.changed: dict[Key, tuple[Port, Port]] = {}  # before and after
        self.removed: dict[Key, Port] = {}
        self.segments: dict[int, Segment] = {}
        self.everything = False  # replace both tables, not only elements
        self.openings = False
        self.fds: dict[Key, int] = {}


class Network:
    """`state` is what the kernel is to be. `failing` says why the tables are not; if they may be wrong, every tap is `down`."""

    def __init__(self) -> None:
        self.state = State(uid=os.geteuid())
        self.failing = ""
        self.down = False
        self.links = Links()
        self.nft = Nft()
        self.watch = Watch()

    # --- what the broker asks ---

    def change(self, messages: list[ToTapnet]) -> list[Answer]:
        """Carry out *messages* together; if that cannot be, each by itself, so that only a bad one fails."""
        if self.failing:
            self.restore(touched=False)
        try:
            return self._together(messages)
        except VmshellError as error:
            if len(messages) == 1:
                return [Answer(error)]
            return [answer for one in messages for answer in self.change([one])]

    def settle(self, wanted: State) -> None:
        """Make the kernel what *wanted* says, whoever left it however: put back what is missing, remove what nobody wants."""
        found = self.links.survey()
        # A VM may have ended since it was named.
        wanted.ports = {key: port for key, port in wanted.ports.items() if tap(port) in found}
        used = {port.segment for port in wanted.ports.values()}
        self.state = wanted
        self.restore(touched=False)
        if self.failing:
            raise NetworkFailed(problem=self.failing)
        for number in used:
            self._bridge(wanted, wanted.segments[number])
        amiss = [port for port in wanted.ports.values() if not self._in_order(port, found)]
        for port in amiss:
            sysctl.no_ipv6(tap(port))
        self.links.plug(amiss, wanted.segments)
        self.links.remove(orphans(found, wanted, used))

    def require(self, port: Port) -> None:
        """Raise NetworkFailed if there is no tap for *port*, or one that somebody else made."""
        if not self._has_tap(port):
            raise NetworkFailed(problem=f"the tap {tap(port)} is gone")

    def _has_tap(self, port: Port) -> bool:
        found = self.links.link(tap(port))
        if found is not None and not found.root_only:
            raise NetworkFailed(problem=f"there is an interface {found.name} already, and it is not ours; remove it")
        return found is not None

    def has_address(self, text: str) -> bool:
        """Is this the address of a port? Nothing else is ever dialled."""
        return bool(text) and any(text in (port.address4, port.address6) for port in self.state.ports.values())

    # --- watching over it ---

    def restore(self, touched: bool) -> None:
        """Load our tables again. If that fails, and they were touched or are gone, no tap stays up until it succeeds."""
        names = [tap(port) for port in self.state.ports.values()]
        try:
            self._load(rules.everything(self.state))
        except VmshellError as error:
            self.failing = str(error.fields.get("problem", error))
            if touched or self.down or not self.watch.has_tables():
                self.down = True
                self.links.set_up(names, False)
            return
        self.failing = ""
        if self.down:
            self.links.set_up(names, True)
        self.down = False

    # --- one batch ---

    def _together(self, messages: list[ToTapnet]) -> list[Answer]:
        plan = Plan(self.state)
        answers = [Answer() for _ in messages]
        try:
            for message, answer in zip(messages, answers, strict=True):
                try:
                    self._plan(plan, message)
                except VmshellError as error:
                    answer.error = error
            self._carry_out(plan)
        except BaseException:
            self._undo(plan)
            raise
        self.state = plan.state
        for message, answer in zip(messages, answers, strict=True):
            if isinstance(message, Port) and answer.error is None:
                answer.fd = plan.fds.pop(key(message), -1)
        return answers

    def _plan(self, plan: Plan, message: ToTapnet) -> None:
        """Add *message* to the plan; what cannot be is refused before anything is touched, but for the tap itself."""
        state = plan.state
        if isinstance(message, Settings):
            check_settings(message)
            plan.everything = plan.everything or not same(state.settings, message)
            state.settings = message
        elif isinstance(message, Segment):
            if not same(state.segments.get(message.segment), message):
                self.check_segment(message)
                state.segments[message.segment] = plan.segments[message.segment] = message
                plan.everything = True
        elif isinstance(message, Port):
            check_port(message, state)
            before = state.ports.get(key(message))
            if message.create:
                if before is not None and self._has_tap(message):
                    raise NetworkFailed(problem=f"the tap {tap(message)} was handed over already and is still held")
                if self.failing:
                    raise NetworkFailed(problem=self.failing)
                if not is_ours(state.segments[message.segment]):
                    self.links.check(state.segments[message.segment])
                plan.fds[key(message)] = taps.create(tap(message))
                plan.created[key(message)] = message
                if before is not None:
                    plan.removed[key(message)] = before
            elif before is None:
                raise NetworkFailed(problem=f"there is no tap {tap(message)}")
            elif (before.mac, before.segment) != (message.mac, message.segment):
                raise NetworkFailed(problem=f"{tap(message)} has another MAC or network already; unplug it first")
            elif not same(before, message):
                plan.changed[key(message)] = before, message
            state.ports[key(message)] = message
            plan.openings = plan.openings or key(message) in state.openings
        elif isinstance(message, Open):
            ways = [Opening.from_body(item) for item in message.openings]
            before_ways = state.openings.pop(key(message), [])
            if ways:
                state.openings[key(message)] = ways
            plan.openings = plan.openings or [vars(way) for way in ways] != [vars(way) for way in before_ways]
        elif isinstance(message, Unplug):
            gone = state.ports.pop(key(message), None)
            plan.openings = state.openings.pop(key(message), None) is not None or plan.openings
            if gone is not None:
                plan.removed[key(message)] = gone

    def _carry_out(self, plan: Plan) -> None:
        created = list(plan.created.values())
        changed = [after for _, after in plan.changed.values()]
        for name in map(tap, created):
            sysctl.no_ipv6(name)
        before = [*plan.removed.values(), *(port for port, _ in plan.changed.values())]
        elements = rules.removing(self.state, before) if before else ""
        elements += rules.adding(plan.state, [*created, *changed]) if created or changed else ""
        elements += rules.opening(plan.state) if plan.openings else ""
        if self.failing:
            pass  # when they can be loaded again, it is from the state
        elif plan.everything:
            self._load(rules.everything(plan.state))
        elif elements:
            self._load(elements)
        used = {port.segment for port in plan.state.ports.values()}
        for number in {port.segment for port in created} | (set(plan.segments) & used):
            self._bridge(plan.state, plan.state.segments[number])
        self.links.plug([*created, *changed], plan.state.segments)
        for old, new in plan.changed.values():
            if old.rate and not new.rate:
                self.links.unlimit(new)
        # Only now, when nothing can fail any more. QEMU has mostly closed its taps by itself.
        gone = [port for port in plan.removed.values() if key(port) not in plan.created]
        self.links.remove([tap(port) for port in gone])
        self._drop_bridges(gone, plan.state)

    def _undo(self, plan: Plan) -> None:
        """Back to `state`, as far as the kernel lets us; what does not come back the next restoring brings."""
        for fd in plan.fds.values():
            os.close(fd)  # and the taps are gone
        self.restore(touched=False)
        try:
            self.links.plug([before for before, _ in plan.changed.values()], self.state.segments)
        except VmshellError:
            pass  # a tap that is gone
        self._drop_bridges(list(plan.created.values()), plan.state, self.state)

    # --- parts ---

    def _load(self, text: str) -> None:
        """One transaction, known to the watch as ours."""
        number = self.watch.generation()
        self.nft.run(text)
        self.watch.own(number)

    def check_segment(self, segment: Segment) -> None:
        """Raise VmshellError if *segment* cannot be, or needs what the host has not."""
        check_segment(segment)
        self.links.check(segment)

    def _bridge(self, state: State, segment: Segment) -> None:
        self.links.make_bridge(segment)
        ways = [way for key, ways in state.openings.items() if key in state.ports for way in ways]
        if segment.gateway4 and (segment.outside != "none" or ways):
            sysctl.forward4()
        if segment.gateway6 and (segment.outside != "none" or ways):
            sysctl.forward6()

    def _drop_bridges(self, gone: list[Port], named: State, wanted: State | None = None) -> None:
        """Remove bridges of ours that *gone* were on and no port of *wanted* is; *named* knows the segments."""
        used = {port.segment for port in (wanted or named).ports.values()}
        for number in {port.segment for port in gone} - used:
            self.links.remove_bridge(named.segments[number])

    def _in_order(self, port: Port, found: dict[str, Link]) -> bool:
        link, master = found[tap(port)], found.get(bridge(self.state.segments[port.segment]))
        return link.up and master is not None and link.master == master.index and link.held == held_to(port)
