"""Which segment every network has and which address every card: given once, kept for good, on disk before it is used.

A segment is one broadcast domain with a subnet of its own: one for each user of a private network, one for every other network.
A user is uid and name: whoever gets the uid of an account that is gone does not get its segment (D22).
Runs in: the broker.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import TYPE_CHECKING

from ..model.addressing import FIRST_HOST
from ..numbering import NUMBER_MAX
from ..refusals import NoAddress, StorageFailed
from .disk import read_text, storage, write_text

if TYPE_CHECKING:
    from ..model.addressing import Plan

Owner = tuple[int, str]  # uid and name
Segments = dict[str, int]
Cards = dict[int, dict[str, int]]

VERSION = 1
WITHOUT_SUBNET = 1 << 23  # segments from here on stand for bridges whose addresses are somebody else's


class Addresses:
    """`segments`: by `network` or `network/uid/name`, of a bridge of the host's by what it is and not by who calls it what.

    `cards`: by segment, then by `number/nic`, its address's number there.
    """

    def __init__(self, path: str, plan: Plan) -> None:
        self._path = path
        self.plan = plan
        self._segments: Segments = {}
        self._cards: Cards = {}
        self._last: dict[int, int] = {}  # by segment, the address given last: one that is given back rests for a while

    def load(self) -> None:
        """Raises StorageFailed if the file is damaged: addresses given out twice would be worse than none."""
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        try:
            saved = json.loads(read_text(self._path))
            if saved["version"] != VERSION:
                raise ValueError("it is of another version")
            self._segments = {str(key): int(number) for key, number in saved["segments"].items()}
            self._cards = {int(key): {str(card): int(host) for card, host in row.items()} for key, row in saved["cards"].items()}
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            raise StorageFailed(problem=f"the list of addresses, {self._path}, cannot be read ({exc})") from exc

    def segment(self, network: str, owner: Owner | None, *, subnet: bool) -> int:
        """The number of the segment, given now if it has none; raises NoAddress."""
        key = _key(network, owner)
        if self.known(network, owner, subnet=subnet) is None:
            # Also what stands for no network any more, since the pools have become others: VMs may still run there.
            taken = {*self._segments.values(), *self._cards}
            numbers = range(self.plan.segments) if subnet else range(WITHOUT_SUBNET, NUMBER_MAX + 1)
            number = next((number for number in numbers if number not in taken), None)
            if number is None:
                raise NoAddress(network=network, size=f"{self.plan.segments} segments")
            self._save({**self._segments, key: number}, self._cards)
        return self._segments[key]

    def known(self, network: str, owner: Owner | None, *, subnet: bool) -> int | None:
        """None also where the policy has become another since: for a pool too small for it, or a network of another kind."""
        number = self._segments.get(_key(network, owner))
        if number is None or (number < self.plan.segments if subnet else number >= WITHOUT_SUBNET):
            return number
        return None

    def private(self) -> dict[Owner, list[int]]:
        """The segments of each user's own."""
        found: dict[Owner, list[int]] = {}
        for key, number in self._segments.items():
            _, slash, owner = key.partition("/")
            if slash:
                uid, _, name = owner.partition("/")
                found.setdefault((int(uid), name), []).append(number)
        return found

    def host(self, network: str, segment: int, number: int, nic: int) -> int:
        """The number of the card's address in its segment, given now if it has none; raises NoAddress."""
        cards, card = self._cards.get(segment, {}), f"{number}/{nic}"
        if self.known_host(segment, number, nic) is None:
            taken, end = set(cards.values()), FIRST_HOST + self.plan.hosts
            after = self._last.get(segment, FIRST_HOST - 1) + 1
            hosts = itertools.chain(range(after, end), range(FIRST_HOST, min(after, end)))
            host = next((host for host in hosts if host not in taken), None)
            if host is None:
                raise NoAddress(network=network, size=f"{self.plan.hosts} addresses")
            self._save(self._segments, {**self._cards, segment: {**cards, card: host}})
            self._last[segment] = host
        return self._cards[segment][card]

    def known_host(self, segment: int, number: int, nic: int) -> int | None:
        host = self._cards.get(segment, {}).get(f"{number}/{nic}")
        return host if host is not None and host < FIRST_HOST + self.plan.hosts else None

    def release(self, number: int) -> None:
        """Give back what VM *number* has; segments without cards go, too."""
        left = {
            segment: {card: host for card, host in cards.items() if card.partition("/")[0] != str(number)}
            for segment, cards in self._cards.items()
        }
        empty = {segment for segment, cards in left.items() if not cards}
        if left != self._cards:
            segments = {key: segment for key, segment in self._segments.items() if segment not in empty}
            self._save(segments, {segment: cards for segment, cards in left.items() if cards})

    def _save(self, segments: Segments, cards: Cards) -> None:
        """Written first, then believed: what is not on disk would be given out twice."""
        saved = {"version": VERSION, "segments": segments, "cards": cards}
        with storage():
            write_text(self._path, json.dumps(saved, indent=1) + "\n")
        self._segments, self._cards = segments, cards


def _key(network: str, owner: Owner | None) -> str:
    return network if owner is None else f"{network}/{owner[0]}/{owner[1]}"
