"""What there is to be, as the broker has said it: settings, segments, ports and the ways to them. Values only.

Runs in: tapnet. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vmshell.messages import Open, Opening, Port, Segment, Settings, ToTapnet, Unplug
from vmshell.numbering import bridge_name, tap_name

Key = tuple[int, int]  # a port: the VM's number and the card's


@dataclass
class State:
    """All of it. `segments` by number, `ports` and `openings` by the VM's number and the card's."""

    settings: Settings | None = None
    confined: frozenset[int] = frozenset()
    segments: dict[int, Segment] = field(default_factory=dict)
    ports: dict[Key, Port] = field(default_factory=dict)
    openings: dict[Key, list[Opening]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)  # taps named for ports that we could not take: somebody's, no orphans

    def copy(self) -> State:
        """Another one that can be changed without this; the messages in it are shared and never changed."""
        openings, refused = dict(self.openings), set(self.refused)
        return State(self.settings, self.confined, dict(self.segments), dict(self.ports), openings, refused)

    def used(self) -> set[int]:
        """The segments that a port is on."""
        return {port.segment for port in self.ports.values()}


def key(message: Port | Open | Unplug) -> Key:
    return message.number, message.nic


def tap(port: Port | Open | Unplug) -> str:
    """The name of a port's tap."""
    return tap_name(port.number, port.nic)


def is_ours(segment: Segment) -> bool:
    """Is the bridge one that we make and remove? Otherwise it is the host's own."""
    return not segment.bridge


def bridge(segment: Segment) -> str:
    """The name of a segment's bridge, ours or the host's."""
    return segment.bridge or bridge_name(segment.segment)


def uplink(segment: Segment) -> str:
    """The VLAN interface that joins a bridge of ours to the host's `parent`; a name that no rule of ours takes for a tap."""
    return f"vmshell{segment.segment:06x}" if segment.vlan else ""


def same(left: ToTapnet | None, right: ToTapnet | None) -> bool:
    """Do two messages ask for the same? (`create` is how a port is asked for, no part of it.)"""
    if left is None or right is None:
        return left is right
    return all(getattr(left, name) == getattr(right, name) for name in left.fields if name != "create")
