"""In place of what the broker knows of the host's accounts: everybody in a dict, each question answered at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vmshell.broker.services.accounts_helper import Question


class People:
    """*names*: uids by account; *groups*: the accounts in each."""

    def __init__(self, names: dict[str, int], groups: dict[str, set[str]]) -> None:
        self.names = names
        self.groups = groups

    def uid_of(self, user: str) -> int | None:
        return self.names.get(user)

    def user_of(self, uid: int) -> str:
        return next((name for name, number in self.names.items() if number == uid), "")

    def groups_of(self, user: str) -> frozenset[str]:
        return frozenset(group for group, members in self.groups.items() if user in members)

    def is_group(self, group: str) -> bool:
        return group in self.groups

    def members(self, group: str) -> list[int]:
        return sorted(self.names[user] for user in self.groups.get(group, ()))

    def when_known(self, questions: Iterable[Question], done: Callable[[], None]) -> None:
        done()

    def must_know(self, *questions: Question) -> None:
        """Nobody is silent here."""

    def look(self) -> None: ...

    def watch(self) -> None:
        """Nothing changes but by a test."""
