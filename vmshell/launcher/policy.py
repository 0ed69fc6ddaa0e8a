"""What the launcher itself reads of root's policy, whatever the broker says: the first uid of VMs, and the CPU models.

Runs in: the launcher. Reads the policy file.
"""

from __future__ import annotations

import contextlib
import os
import tomllib

from ..errors import BadPolicy
from ..hardware import CPU_MODELS
from ..numbering import UID_BASE, UID_BASES
from ..policyfile import read


class Policy:
    """`uid_base` is as the file says it at the start, CPU models as it says them now; a broken file leaves what was."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._models: frozenset[str] = frozenset()
        document = self._read()
        base = _section(document, "host").get("uid_base", UID_BASE)
        if type(base) is not int or base not in UID_BASES:
            raise BadPolicy(path=path, problem=f"[host] uid_base must be from {UID_BASES.start} to {UID_BASES.stop - 1}")
        self.uid_base = base

    def has_cpu_model(self, text: str | None) -> bool:
        """Is *text* what -cpu takes for a model of root's catalogue? None is what the host offers."""
        if self._changed():
            with contextlib.suppress(BadPolicy):
                self._read()
        return text is None or text in self._models

    def _changed(self) -> bool:
        return _stamp(self._path) != self._stamp

    def _read(self) -> dict[str, object]:
        self._stamp = _stamp(self._path)
        try:
            document = tomllib.loads(read(self._path))
        except FileNotFoundError:
            document = {}
        except (ValueError, RecursionError) as exc:
            raise BadPolicy(path=self._path, problem=str(exc)) from exc
        models = {**CPU_MODELS, **_section(document, "cpu_models")}
        self._models = frozenset(text for text in models.values() if isinstance(text, str))
        return document


def _section(document: dict[str, object], name: str) -> dict[str, object]:
    table = document.get(name, {})
    return table if isinstance(table, dict) else {}


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
