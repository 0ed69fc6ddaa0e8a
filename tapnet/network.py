"""The kernel made equal to what the broker wants: many changes as one, each of them whole or not at all.

The order is what protects: the filter knows a tap before the tap is in a bridge, and it is up last of all. What goes wrong on
the way is undone and raised. Bridges are made with their first port and go with their last.
Runs in: tapnet.
"""

from __future__ import annotations

import os
from functools import partial
from time import monotonic

from vmshell.errors import VmshellError
from vmshell.messages import Confine, Open, Opening, Port, Segment, Settings, ToTapnet, Unplug
from vmshell.refusals import NetworkFailed

from . import rules, sysctl, taps
from .checks import is_our_tap, orphans
from .judge import Judge
from .links import Link, Links
from .nft import Nft
from .rootpolicy import RootPolicy
from .standing import Standing
from .state import Key, State, bridge, key, same, tap, uplink
from .watch import Departures, Watch

RETRY_SECONDS = 5.0  # between two tries to put right what could not be


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
        # Who has a MAC where: of two with the same, one would take the other's frames (E33).
        self.macs = {(bridge(state.segments[port.segment]), port.mac): key(port) for port in state.ports.values()}
        self.hosts: dict[str, str] = {}  # its interfaces by MAC, once it matters: on the host's own LAN they are taken as well
        self.fds: dict[Key, int] = {}


class Network:
    """`state` is what the kernel is to be. `failing` says why the tables are not; if they may be wrong, every tap is `down`.

    `amiss` says what else is not as it is to be, and is tried again every RETRY_SECONDS.
    """

    def __init__(self, root: RootPolicy) -> None:
        self.state = State()
        self.failing = ""
        self.amiss = ""
        self.down = False
        self.links = Links()
        self.nft = Nft()
        self.judge = Judge(root, Standing(self.links, self.nft))
        self.watch = Watch()
        self.counts = True
        self.departures = Departures()
        self._retry_at = 0.0
        self._postponed = False  # links are to be looked at once the tables are loaded

    @property
    def problems(self) -> list[str]:
        return [problem for problem in (self.failing, self.amiss) if problem]

    # --- what the broker asks ---

    def change(self, messages: list[ToTapnet]) -> list[Answer]:
        """Carry out *messages* as one: an Answer for each, or an error raised and nothing changed."""
        if self.failing:
            self.restore(touched=False)
        return self._together(messages)

    def settle(self, wanted: State) -> None:
        """From now on *wanted* is what there is to be; then as `reconcile`."""
        found = self.links.survey()
        # A VM may have ended since it was named.
        wanted.ports = {key: port for key, port in wanted.ports.items() if tap(port) in found}
        self.state = wanted
        self.reconcile()

    def reconcile(self) -> None:
        """Make the kernel what it is to be, whoever left it however: put back what is missing, remove what nobody wants.

        What cannot be put right stops nothing else. Raises NetworkFailed for the first of it; until then it stays as closed as it
        is: a tap without a bridge leads nowhere.
        """
        self._retry_at = monotonic() + RETRY_SECONDS
        found = self.links.survey()
        self.restore(touched=False)
        self._postponed = bool(self.failing)
        steps = [partial(self._put_right, number, found) for number in sorted(self.state.used())]
        problems = []
        for step in (partial(self._route, self.state), *steps) if not self.failing else ():
            try:
                step()
            except VmshellError as error:
                problems.append(_problem(error))
        self.links.remove(orphans(found, self.state))
        self.amiss = problems[0] if problems else ""
        if self.problems:
            raise NetworkFailed(problem=self.problems[0])

    def _put_right(self, number: int, found: dict[str, Link]) -> None:
        """A segment's bridge, and in it the taps of its ports."""
        self.links.make_bridge(self.state.segments[number])
        ports = [port for port in self.state.ports.values() if port.segment == number and tap(port) in found]
        for port in ports:
            sysctl.tap(tap(port))
        self.links.plug(ports, self.state.segments)
        self.links.unlimit([port for port in ports if not port.rate])

    def require(self, port: Port) -> None:
        """Raise NetworkFailed if there is no tap for *port*, or one that somebody else made."""
        if not self._has_tap(port):
            raise NetworkFailed(problem=f"the tap {tap(port)} is gone")

    def _has_tap(self, port: Port) -> bool:
        found = self.links.link(tap(port))
        if found is not None and not found.root_only:
            raise NetworkFailed(problem=f"there is an interface {found.name} already, and it is not ours; remove it")
        return found is not None

    # --- watching over it ---

    def begin(self) -> None:
        """Nobody has said yet what there is to be: tables that are there stay as they are, without them every tap is mute."""
        self.counts = self.nft.accepts(rules.COUNTING)
        if not self.watch.has_tables():
            self.restore(touched=True)

    def look_after(self, touched: bool) -> None:
        """Put right what somebody else has undone; *touched* says that it was our tables, or may have been."""
        if touched or self.failing:
            self.restore(touched)
        again = self.amiss and monotonic() >= self._retry_at
        if self.departures.any(self._misses) or again or (self._postponed and not self.failing):
            try:
                self.reconcile()
            except VmshellError:
                pass  # `amiss` says it

    def _misses(self, name: str) -> bool:
        """Is *name*, which has gone or has left its bridge, one that is wanted where it was?"""
        segments = [self.state.segments[number] for number in self.state.used()]
        if any(name in (bridge(segment), uplink(segment)) for segment in segments):
            return True
        return any(name == tap(port) for port in self.state.ports.values()) and self.links.link(name) is not None

    def restore(self, touched: bool) -> None:
        """Load our tables again. If that fails, and they were touched or are gone, no tap stays up until it succeeds."""
        try:
            self._load(rules.everything(self.state, self.counts))
        except VmshellError as error:
            self.failing = _problem(error)
            if touched or self.down or not self.watch.has_tables():
                self.down = True
                self._switch_taps(False)
            return
        self.failing = ""
        if self.down:
            self._switch_taps(True)
        self.down = False

    def _switch_taps(self, up: bool) -> None:
        self.links.set_up([name for name, link in self.links.survey().items() if is_our_tap(link)], up)

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
            self.judge.settings(message)
            plan.everything = plan.everything or not same(state.settings, message)
            state.settings, state.confined = message, frozenset(message.confined)
        elif isinstance(message, Confine):
            self.judge.confined(message.uids)
            state.confined |= set(message.uids)
        elif isinstance(message, Segment):
            if not same(state.segments.get(message.segment), message):
                self.judge.segment(message)
                self.links.check(message)
                state.segments[message.segment] = plan.segments[message.segment] = message
                plan.everything = True
        elif isinstance(message, Port):
            self.judge.port(message, state)
            before = state.ports.get(key(message))
            if message.create:
                if before is not None and self._has_tap(message):
                    raise NetworkFailed(problem=f"the tap {tap(message)} was handed over already; its QEMU has to end first")
                if self.failing:
                    raise NetworkFailed(problem=self.failing)
                place = bridge(state.segments[message.segment]), message.mac
                if plan.macs.setdefault(place, key(message)) != key(message):
                    raise NetworkFailed(problem=f"another card on this network has the MAC {message.mac}")
                if state.segments[message.segment].kind == "bridged":
                    self.links.check(state.segments[message.segment])
                    plan.hosts = plan.hosts or {link.mac: name for name, link in self.links.survey().items()}
                    if message.mac in plan.hosts:
                        whose = plan.hosts[message.mac]
                        raise NetworkFailed(problem=f"{whose} of this host has the MAC {message.mac}; the card needs another")
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
            self.judge.openings(ways)
            before_ways = state.openings.pop(key(message), [])
            if ways:
                state.openings[key(message)] = ways
            plan.openings = plan.openings or [vars(way) for way in ways] != [vars(way) for way in before_ways]
        elif isinstance(message, Unplug):
            gone = state.ports.pop(key(message), None)
            state.refused.discard(tap(message))
            plan.openings = state.openings.pop(key(message), None) is not None or plan.openings
            if gone is not None:
                plan.removed[key(message)] = gone

    def _carry_out(self, plan: Plan) -> None:
        created = list(plan.created.values())
        changed = [after for _, after in plan.changed.values()]
        for name in map(tap, created):
            sysctl.tap(name)
        before = [*plan.removed.values(), *(port for port, _ in plan.changed.values())]
        elements = rules.removing(self.state, before) if before else ""
        elements += rules.adding(plan.state, [*created, *changed]) if created or changed else ""
        elements += rules.opening(plan.state) if plan.openings else ""
        changed_shape = rules.shape(plan.state) != rules.shape(self.state)
        plan.everything = plan.everything or changed_shape or plan.state.confined != self.state.confined
        if self.failing:
            pass  # when they can be loaded again, it is from the state
        elif plan.everything:
            self._load(rules.everything(plan.state, self.counts))
        elif elements:
            self._change(elements, plan.state)
        for number in {port.segment for port in created} | (set(plan.segments) & plan.state.used()):
            self.links.make_bridge(plan.state.segments[number])
        self._route(plan.state)
        self._plug([*created, *changed], plan.state)
        self.links.unlimit([new for old, new in plan.changed.values() if old.rate and not new.rate])
        # Only now, when nothing can fail any more. QEMU has mostly closed its taps by itself.
        gone = [port for port in plan.removed.values() if key(port) not in plan.created]
        self.links.remove([tap(port) for port in gone])
        self._drop_bridges(gone, plan.state)

    def _undo(self, plan: Plan) -> None:
        """Back to `state`, as far as the kernel lets us; what does not come back the next restoring brings."""
        for fd in plan.fds.values():
            os.close(fd)  # and the taps are gone
        self.restore(touched=False)
        for number in set(plan.segments) & self.state.used():
            try:
                self.links.make_bridge(self.state.segments[number])
            except VmshellError as error:
                self.amiss = self.amiss or _problem(error)
        try:
            self._plug([self.state.ports[place] for place in plan.changed if place in self.state.ports], self.state)
        except VmshellError:
            pass  # a tap that is gone
        self._drop_bridges(list(plan.created.values()), plan.state, self.state)

    # --- parts ---

    def _plug(self, ports: list[Port], state: State) -> None:
        """Plugged taps are up, which without a filter none may be: then it waits until there is one."""
        if self.down:
            self._postponed = True
        else:
            self.links.plug(ports, state.segments)

    def _load(self, text: str) -> None:
        """One transaction, known to the watch as ours."""
        number = self.watch.generation()
        self.nft.run(text)
        self.watch.own(number)

    def _change(self, elements: str, state: State) -> None:
        """Add and remove elements; if somebody else's hand in our tables is in the way, load all of *state*."""
        try:
            self._load(elements)
        except NetworkFailed:
            self._load(rules.everything(state, self.counts))

    def _route(self, state: State) -> None:
        """Have the host route if any guest has a way that leads over it."""
        segments = [state.segments[number] for number in state.used()]
        if not state.openings and all(segment.outside == "none" for segment in segments):
            return
        if any(segment.gateway4 for segment in segments):
            sysctl.forward4()
        if any(segment.gateway6 for segment in segments):
            sysctl.forward6()

    def _drop_bridges(self, gone: list[Port], named: State, wanted: State | None = None) -> None:
        """Remove bridges of ours that *gone* were on and no port of *wanted* is; *named* knows the segments."""
        for number in {port.segment for port in gone} - (wanted or named).used():
            self.links.remove_bridge(named.segments[number])


def _problem(error: VmshellError) -> str:
    return str(error.fields.get("problem", error))
