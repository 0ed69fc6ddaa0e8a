"""Which segment every network has and which address every interface: given once, kept for good, on disk before it is used.

A segment is one broadcast domain with a subnet of its own: one for each user of a private network, one for every other network.
A user is uid and name: whoever gets the uid of an account that is gone does not get its segment (D22).

On disk each change is a line: `["segment", KEY, NUMBER]`, `["card", SEGMENT, "VM/NIC", HOST]`, and `["release", VM]`, which
takes the VM's interfaces away and with a segment's last interface the segment. Where a line cannot be read, what the others say
still holds, but nothing is given out any more: it could be somebody's already.
Runs in: the broker.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...model.addressing import FIRST_HOST, Plan
from ...numbering import NUMBER_MAX
from ...refusals import NoAddress, StorageFailed
from ..runtime.change_log import ChangeLog, Line
from ..runtime.files import why, write_text
from ..runtime.log import note

Owner = tuple[int, str]  # uid and name

VERSION = 1  # of the old file, which was written anew as a whole with each change
SENSELESS = (TypeError, ValueError, KeyError, AttributeError)
WITHOUT_SUBNET = 1 << 23  # segments from here on stand for bridges whose addresses are somebody else's


class _Hosts:
    """The interfaces of one segment: by `number/nic`, their addresses' numbers there."""

    def __init__(self) -> None:
        self.hosts: dict[str, int] = {}
        self.taken: set[int] = set()
        self.last = FIRST_HOST - 1  # the one given last: one that is given back rests for a while

    def next(self, end: int) -> int | None:
        after = self.last + 1
        hosts = itertools.chain(range(after, end), range(FIRST_HOST, min(after, end)))
        return next((host for host in hosts if host not in self.taken), None)


class Addresses:
    """Segments are known by `network` or `network/uid/name`, those of a bridge of the host's by what it is, not by its name."""

    def __init__(self, path: str, plan: Plan) -> None:
        self._old = path  # what there was before the change log
        self._log = ChangeLog(path.removesuffix(".json") + ".log")
        self.plan = plan
        self.damaged = ""  # why nothing is given out
        self._clear()

    def _clear(self) -> None:
        self._segments: dict[str, int] = {}
        self._keys: dict[int, set[str]] = {}  # of each segment
        self._hosts: dict[int, _Hosts] = {}  # by segment
        self._of: dict[int, set[tuple[int, str]]] = {}  # by VM's number, its interfaces with their segments
        self._private: dict[Owner, list[int]] = {}
        self._free: dict[bool, list[int]] = {True: [], False: []}  # heaps of what was given back; by whether it has a subnet
        self._in_heap: set[int] = set()
        self._unused: dict[bool, int] = {True: 0, False: WITHOUT_SUBNET}  # from here on none was ever given
        self._count = 0  # of segments and interfaces

    def load(self) -> None:
        """Read what was given out. What is damaged is said in `damaged`; it is for the administrator to mend."""
        self._clear()
        os.makedirs(os.path.dirname(self._old), mode=0o700, exist_ok=True)
        try:
            lines, self.damaged = self._log.load()
            self._take(lines)
            with contextlib.suppress(OSError):
                os.unlink(self._old)
        except FileNotFoundError:
            self._take_over()
        except OSError as exc:
            self.damaged = why(exc)
        if self.damaged:
            note("addresses-unreadable", problem=self.damaged)

    def _take_over(self) -> None:
        """Go on with the file of an older version, if there is one."""
        try:
            self._take(_old_lines(self._old))
            self._log.write_anew(self._everything())
            os.unlink(self._old)
        except FileNotFoundError:
            return
        except (OSError, *SENSELESS) as exc:
            self.damaged = why(exc)
        except StorageFailed as exc:
            self.damaged = exc.fields["problem"]

    def _take(self, lines: Iterable[Line]) -> None:
        for line in lines:
            try:
                self._apply(*line)
            except SENSELESS as exc:
                self.damaged = self.damaged or f"a line of it makes no sense ({why(exc)})"

    def _apply(self, what: object, *rest: Any) -> None:
        """Believe a line; raises one of SENSELESS if it makes no sense."""
        kinds: dict[object, Callable[..., None]] = {
            "segment": self._add_segment,
            "card": self._add_interface,
            "release": self._drop,
        }
        kinds[what](*rest)

    # --- segments -----------------------------------------------------------------------------------------------------

    def segment(self, network: str, owner: Owner | None, *, subnet: bool) -> int:
        """The number of the segment, given now if it has none; raises NoAddress or StorageFailed."""
        key = _key(network, owner)
        if self.known(network, owner, subnet=subnet) is None:
            self._must_be_whole()
            number = self._next_segment(subnet)
            if number is None:
                raise NoAddress(network=network, size=f"{self.plan.segments} segments")
            self._log.add(["segment", key, number])
            self._add_segment(key, number)
            self._tidy()
        return self._segments[key]

    def known(self, network: str, owner: Owner | None, *, subnet: bool) -> int | None:
        """None also where the policy has become another since: for a pool too small for it, or a network of another kind."""
        number = self._segments.get(_key(network, owner))
        if number is None or (number < self.plan.segments if subnet else number >= WITHOUT_SUBNET):
            return number
        return None

    def private(self) -> dict[Owner, list[int]]:
        """The segments of each user's own."""
        return self._private

    def _next_segment(self, subnet: bool) -> int | None:
        """The lowest that is free. Also what stands for no network any more is taken, where VMs may still run."""
        free, end = self._free[subnet], self.plan.segments if subnet else NUMBER_MAX + 1
        while free and self._is_taken(free[0]):
            self._in_heap.discard(heapq.heappop(free))
        while self._unused[subnet] < end and self._is_taken(self._unused[subnet]):
            self._unused[subnet] += 1
        number = min([*free[:1], self._unused[subnet]])
        return number if number < end else None

    def _is_taken(self, segment: int) -> bool:
        return segment in self._keys or segment in self._hosts

    def _add_segment(self, key: str, number: int) -> None:
        _must_be(number, 0, NUMBER_MAX)
        owner = _owner(key)
        self._forget_segment(key)  # what the network had before its pool or kind became another
        self._segments[key] = number
        self._keys.setdefault(number, set()).add(key)
        self._count += 1
        if owner:
            self._private.setdefault(owner, []).append(number)

    def _forget_segment(self, key: str) -> None:
        number = self._segments.pop(key, None)
        if number is None:
            return
        self._count -= 1
        self._keys[number].discard(key)
        if not self._keys[number]:
            del self._keys[number]
        if owner := _owner(key):
            self._private[owner].remove(number)
            if not self._private[owner]:
                del self._private[owner]
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        if not self._is_taken(number) and number not in self._in_heap:
            self._in_heap.add(number)
            heapq.heappush(self._free[number < WITHOUT_SUBNET], number)

    # --- interfaces ---------------------------------------------------------------------------------------------------

    def host(self, network: str, segment: int, number: int, nic: int) -> int:
        """The number of the interface's address in its segment, given now if it has none; raises NoAddress or StorageFailed."""
        interface = f"{number}/{nic}"
        if self.known_host(segment, number, nic) is None:
            self._must_be_whole()
            host = self._hosts.get(segment, _Hosts()).next(FIRST_HOST + self.plan.hosts)
            if host is None:
                raise NoAddress(network=network, size=f"{self.plan.hosts} addresses")
            self._log.add(["card", segment, interface, host])
            self._add_interface(segment, interface, host)
            self._tidy()
        return self._hosts[segment].hosts[interface]

    def known_host(self, segment: int, number: int, nic: int) -> int | None:
        host = self._hosts[segment].hosts.get(f"{number}/{nic}") if segment in self._hosts else None
        return host if host is not None and host < FIRST_HOST + self.plan.hosts else None

    def release(self, number: int) -> None:
        """Give back what VM *number* has; segments without interfaces go, too."""
        if number in self._of:
            self._must_be_whole()
            self._log.add(["release", number])
            self._drop(number)
            self._tidy()

    def _add_interface(self, segment: int, interface: str, host: int) -> None:
        _must_be(segment, 0, NUMBER_MAX)
        _must_be(host, FIRST_HOST, 1 << 32)
        number = int(interface.partition("/")[0])
        interfaces = self._hosts.setdefault(segment, _Hosts())
        before = interfaces.hosts.get(interface)
        if host in interfaces.taken and host != before:
            raise ValueError("an address is given out twice")
        if before is not None:  # outside of a pool that has become another
            interfaces.taken.discard(before)
            self._count -= 1
        interfaces.hosts[interface] = interfaces.last = host
        interfaces.taken.add(host)
        self._of.setdefault(number, set()).add((segment, interface))
        self._count += 1

    def _drop(self, number: int) -> None:
        for segment, interface in self._of.pop(number, set()):
            interfaces = self._hosts[segment]
            interfaces.taken.discard(interfaces.hosts.pop(interface))
            self._count -= 1
            if not interfaces.hosts:
                del self._hosts[segment]
                for key in list(self._keys.get(segment, ())):
                    self._forget_segment(key)
                self._give_back(segment)

    # --- the file -----------------------------------------------------------------------------------------------------

    def _must_be_whole(self) -> None:
        if self.damaged:
            raise StorageFailed(problem=f"the list of addresses cannot be used ({self.damaged}), so none is given or taken back")

    def _tidy(self) -> None:
        """Have the file no longer than twice what it says. It says the same if that fails."""
        if self._log.wants_anew(self._count):
            with contextlib.suppress(StorageFailed):
                self._log.write_anew(self._everything())

    def _everything(self) -> Iterator[Line]:
        for key, number in self._segments.items():
            yield ["segment", key, number]
        for segment, interfaces in self._hosts.items():
            for interface, host in interfaces.hosts.items():
                yield ["card", segment, interface, host]


def write_old_file(path: str) -> None:
    """Write what is given out as an older version reads it, beside the change log; for etc/migrate.sh. Raises StorageFailed."""
    addresses = Addresses(path, Plan("10.0.0.0/8", "", 24))
    lines, addresses.damaged = addresses._log.load()
    addresses._take(lines)
    if addresses.damaged:
        raise StorageFailed(problem=f"the addresses beside {path} cannot be read ({addresses.damaged})")
    interfaces = {segment: interfaces.hosts for segment, interfaces in addresses._hosts.items()}
    write_text(path, json.dumps({"version": VERSION, "segments": addresses._segments, "cards": interfaces}, indent=1) + "\n")


def _old_lines(path: str) -> list[Line]:
    """What the file of an older version says; raises OSError or what is wrong with it."""
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    if saved["version"] != VERSION:
        raise ValueError("it is of another version")
    lines: list[Line] = [["segment", str(key), int(number)] for key, number in saved["segments"].items()]
    lines += [
        ["card", int(key), str(interface), int(host)] for key, row in saved["cards"].items() for interface, host in row.items()
    ]
    return lines


def _must_be(number: object, low: int, high: int) -> None:
    if type(number) is not int or not low <= number <= high:
        raise ValueError("a number is out of range")


def _key(network: str, owner: Owner | None) -> str:
    return network if owner is None else f"{network}/{owner[0]}/{owner[1]}"


def _owner(key: str) -> Owner | None:
    """Whose own segment *key* is."""
    _, slash, owner = key.partition("/")
    uid, _, name = owner.partition("/")
    return (int(uid), name) if slash else None
