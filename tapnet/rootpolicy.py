"""Root's policy as the file has it: looked at whenever it is asked for, read again when it is another.

Runs in: tapnet. Reads policy.toml.
"""

from __future__ import annotations

import os

from vmshell.errors import BadPolicy
from vmshell.model.policy import Policy, load

Mark = tuple[int, int, int, int] | None


class RootPolicy:
    """A file that is broken leaves in force what was, and `problem` says so."""

    def __init__(self, path: str) -> None:
        self.problem = ""
        self._path = path
        self._policy: Policy | None = None
        self._broken: BadPolicy | None = None
        self._read: Mark | str = "never"

    def current(self) -> Policy:
        """The policy in force; raises BadPolicy if the file has been broken ever since we started."""
        mark = self._mark()
        if mark != self._read:
            self._read = mark
            self._load()
        if self._policy is None:
            assert self._broken is not None
            raise self._broken
        return self._policy

    def look(self) -> None:
        """Have `problem` say how it is now."""
        try:
            self.current()
        except BadPolicy:
            pass  # `problem` says it

    def _load(self) -> None:
        try:
            self._policy = load(self._path, session=False)
            self.problem = ""
        except BadPolicy as error:
            self._broken = error
            goes_on = "what was in force before is" if self._policy is not None else "no new network can be made"
            self.problem = f"{error.sentence()}; until it is mended, {goes_on}"

    def _mark(self) -> Mark:
        """By what another file, or another content, is known; None where there is none."""
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
