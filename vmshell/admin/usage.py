"""Who would miss it: which VMs stand on an image and what an account owns, to be known before root takes either away.

On an installed host the broker says so. Where it cannot be asked, or what it says makes no sense, nobody can: CannotTell, and all
stays as it is.
Runs in: vmshell-admin. Asks the broker; in session mode it reads one's own records instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ..errors import VmshellError
from ..layout import Layout
from ..messages import ASKED_MAX, SHOWN_MAX, ImageUsers, Owned
from ..refusals import CannotTell
from . import own_records
from .asking import Answer, ask

T = TypeVar("T")


@dataclass(frozen=True)
class Some:
    """How many there are, and what the first of them are called."""

    count: int = 0
    first: tuple[str, ...] = ()

    def __add__(self, other: Some) -> Some:
        return Some(self.count + other.count, self.first + other.first)

    def __str__(self) -> str:
        shown = self.first[:SHOWN_MAX]
        more = self.count - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")


def users_of(layout: Layout, image: str) -> Some:
    """The VMs that stand on *image*, and those of which nobody can say what they stand on. Raises CannotTell."""
    with _telling(f"which VMs use image {image}"):
        (users,), unreadable = _image_users(layout, [image])
    return users + unreadable


def user_counts(layout: Layout, images: Sequence[str]) -> dict[str, int]:
    """How many VMs stand on each of *images*. Raises CannotTell."""
    counts: dict[str, int] = {}
    with _telling("which VMs use which image"):
        for portion in _portions(images):
            users, _ = _image_users(layout, portion)
            counts |= {image: some.count for image, some in zip(portion, users, strict=True)}
    return counts


def belongings(layout: Layout, uid: int, account: str) -> Some:
    """What *uid* owns: VMs, half-made and damaged ones too, and objects on its shelf. Raises CannotTell."""
    what = f"what {account} owns"
    with _telling(what):
        (row,) = ask(layout, Owned(uids=[uid])).rows("owned", 1)
        owned, problem = _some(row), row.text("problem")
    if problem:
        raise CannotTell(what=what, problem=problem)
    return owned


def vm_counts(layout: Layout, uids: Sequence[int]) -> dict[int, str]:
    """How many VMs each of *uids* has, `?` where the broker cannot read it. Raises CannotTell."""
    counts: dict[int, str] = {}
    with _telling("who has how many VMs"):
        for portion in _portions(uids):
            rows = ask(layout, Owned(uids=list(portion))).rows("owned", len(portion))
            found = ("?" if row.text("problem") else str(row.number("vms")) for row in rows)
            counts |= dict(zip(portion, found, strict=True))
    return counts


@contextmanager
def _telling(what: str) -> Iterator[None]:
    try:
        yield
    except VmshellError as exc:
        raise CannotTell(what=what, problem=exc.sentence()) from exc


def _portions(values: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), ASKED_MAX):
        yield values[start : start + ASKED_MAX]


def _image_users(layout: Layout, images: Sequence[str]) -> tuple[list[Some], Some]:
    """The users of each of *images*, and the VMs that may stand on any."""
    if layout.embedded:
        found = own_records.image_users(layout)
        *users, unreadable = (_named(found.get(image, [])) for image in (*images, own_records.ANY))
        return users, unreadable
    answer = ask(layout, ImageUsers(images=list(images)))
    return [_some(row) for row in answer.rows("images", len(images))], _some(answer.table("unreadable"))


def _named(names: list[str]) -> Some:
    return Some(len(names), tuple(names))


def _some(row: Answer) -> Some:
    """What was counted, with as many names as there may be; less than what is named is a contradiction."""
    some = Some(row.number("count"), tuple(row.texts("first")))
    if len(some.first) != min(some.count, SHOWN_MAX):
        raise row.wrong("count")
    return some
