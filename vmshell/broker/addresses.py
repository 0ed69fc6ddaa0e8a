"""Which segment every network has and which address every card: given once, kept for good, on disk before it is used.

A segment is one broadcast domain with a subnet of its own: one for each user of a private network, one for every other network.
Runs in: the broker.
"""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

from ..errors import NoAddress, StorageFailed
from ..model.addressing import FIRST_HOST
from ..names import NUMBER_MAX
from .disk import read_text, storage, write_text

if TYPE_CHECKING:
    from ..model.addressing import Plan

VERSION = 1
WITHOUT_SUBNET = 1 << 23  # segments from here on stand for bridges whose addresses are somebody else's


class Addresses:
    """`segments`: by `network` or `network/uid`; `cards`: by segment, then by `number/nic`, the number of the address in it."""

    def __init__(self, path: str, plan: Plan) -> None:
        self._path = path
        self.plan = plan
        self._segments: dict[str, int] = {}
        self._cards: dict[int, dict[str, int]] = {}

    def load(self) -> None:
        """Raises StorageFailed if the file is damaged: addresses given out twice would be worse than none."""
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

    def segment(self, network: str, uid: int | None, *, subnet: bool) -> int:
        """The number of the segment, given now if it has none; raises NoAddress."""
        key = _key(network, uid)
        if self.known(network, uid, subnet=subnet) is None:
            taken = set(self._segments.values())
            numbers = range(self.plan.segments) if subnet else range(WITHOUT_SUBNET, NUMBER_MAX + 1)
            number = next((number for number in numbers if number not in taken), None)
            if number is None:
                raise NoAddress(network=network, size=f"{self.plan.segments} segments")
            self._segments[key] = number
            self._save()
        return self._segments[key]

    def known(self, network: str, uid: int | None, *, subnet: bool) -> int | None:
        """None also where the policy has become another since: for a pool too small for it, or a network of another kind."""
        number = self._segments.get(_key(network, uid))
        if number is None or (number < self.plan.segments if subnet else number >= WITHOUT_SUBNET):
            return number
        return None

    def private(self) -> dict[int, list[int]]:
        """The segments of each uid's own."""
        found: dict[int, list[int]] = {}
        for key, number in self._segments.items():
            _, slash, uid = key.rpartition("/")
            if slash:
                found.setdefault(int(uid), []).append(number)
        return found

    def host(self, network: str, segment: int, number: int, nic: int) -> int:
        """The number of the card's address in its segment, given now if it has none; raises NoAddress."""
        cards, card = self._cards.setdefault(segment, {}), f"{number}/{nic}"
        if self.known_host(segment, number, nic) is None:
            taken = set(cards.values())
            host = next((host for host in itertools.count(FIRST_HOST) if host not in taken), FIRST_HOST)
            if host >= FIRST_HOST + self.plan.hosts:
                raise NoAddress(network=network, size=f"{self.plan.hosts} addresses")
            cards[card] = host
            self._save()
        return cards[card]

    def known_host(self, segment: int, number: int, nic: int) -> int | None:
        host = self._cards.get(segment, {}).get(f"{number}/{nic}")
        return host if host is not None and host < FIRST_HOST + self.plan.hosts else None

    def release(self, number: int, keep: frozenset[tuple[int, int]] = frozenset()) -> None:
        """Give back what VM *number* has, but for the (segment, nic) in *keep*; segments without cards go, too."""
        changed = False
        for segment, cards in list(self._cards.items()):
            for card in [card for card in cards if card.partition("/")[0] == str(number)]:
                if (segment, int(card.partition("/")[2])) not in keep:
                    del cards[card]
                    changed = True
            if not cards:
                del self._cards[segment]
                self._segments = {key: other for key, other in self._segments.items() if other != segment}
                changed = True
        if changed:
            self._save()

    def _save(self) -> None:
        saved = {"version": VERSION, "segments": self._segments, "cards": self._cards}
        with storage():
            write_text(self._path, json.dumps(saved, indent=1) + "\n")


def _key(network: str, uid: int | None) -> str:
    return network if uid is None else f"{network}/{uid}"
