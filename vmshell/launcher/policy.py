"""What the launcher itself reads of root's policy, whatever the broker says: the first uid of VMs, and the CPU models.

Runs in: the launcher. Reads the policy file.
"""

from __future__ import annotations

import contextlib
import functools
import tomllib

from ..errors import BadPolicy
from ..hardware import CPU_MODELS
from ..numbering import UID_BASE, UID_BASES
from ..policyfile import read


class Policy:
    """`uid_base` is as the file says it at the start, CPU models as it says them now; a broken file leaves what was."""

    def __init__(self, path: str) -> None:
        self._path = path
        base = self._read().get("uid_base", UID_BASE)
        if type(base) is not int or base not in UID_BASES:
            raise BadPolicy(path=path, problem=f"[host] uid_base must be from {UID_BASES.start} to {UID_BASES.stop - 1}")
        self.uid_base = base

    def cpu_models(self) -> frozenset[str]:
        """What -cpu takes for each model of root's catalogue."""
        with contextlib.suppress(BadPolicy):
            self._read()
        return self._models

    def _read(self) -> dict[str, object]:
        """Take the CPU models of the file; return its section [host]."""
        try:
            document = _parsed(read(self._path))
        except FileNotFoundError:
            document = {}
        except (ValueError, RecursionError) as exc:
            raise BadPolicy(path=self._path, problem=str(exc)) from exc
        models = {**CPU_MODELS, **_section(document, "cpu_models")}
        self._models = frozenset(text for text in models.values() if isinstance(text, str))
        return _section(document, "host")


@functools.lru_cache(maxsize=1)
def _parsed(text: str) -> dict[str, object]:
    # Of a host with thousands of users it takes longer than all else of a launch; reading the file takes nothing.
    return tomllib.loads(text)


def _section(document: dict[str, object], name: str) -> dict[str, object]:
    table = document.get(name, {})
    return table if isinstance(table, dict) else {}
