"""Kernel modules: which ones a module needs, in the order they must be loaded.

Read from the modules themselves (`depends=` in their .modinfo): a package that was only unpacked has no modules.dep.
Runs in: vmshell-admin. Reads an unpacked kernel package.
"""

from __future__ import annotations

import lzma
import os

_KO = ".ko"


class ModuleMissing(Exception):
    """A module the guest needs is neither a file nor built into the kernel."""


class Modules:
    """The modules below `lib/modules/<release>` of an unpacked kernel package."""

    def __init__(self, folder: str) -> None:
        self._files: dict[str, str] = {}
        for path, _, files in os.walk(f"{folder}/kernel"):
            for file in files:
                name, found, _ = file.partition(_KO)
                if found:
                    self._files[_canonical(name)] = f"{path}/{file}"
        with open(f"{folder}/modules.builtin", encoding="utf-8") as listing:
            self._builtin = {_canonical(os.path.basename(line.strip()).removesuffix(_KO)) for line in listing}

    def in_order(self, wanted: list[str]) -> list[tuple[str, bytes]]:
        """Return (file name, contents) of *wanted* and all they need, each after those it needs; raises ModuleMissing."""
        done: dict[str, bytes] = {}

        def visit(name: str) -> None:
            if name in done or name in self._builtin:
                return
            if name not in self._files:
                raise ModuleMissing(f"the kernel package has no module {name}")
            data = read_module(self._files[name])
            for needed in depends(data):
                visit(needed)
            done[name] = data

        for name in wanted:
            visit(_canonical(name))
        return [(f"{name}{_KO}", data) for name, data in done.items()]


def read_module(path: str) -> bytes:
    """The module at *path*, unpacked where the distribution compresses them (Debian 13: xz)."""
    with open(path, "rb") as file:
        data = file.read()
    return lzma.decompress(data) if path.endswith(".xz") else data


def depends(module: bytes) -> list[str]:
    """The names in *module*'s `depends=` line."""
    # .modinfo is a run of NUL-ended `key=value` strings; a value found that way elsewhere would not start right after a NUL.
    at = module.find(b"\0depends=")
    if at < 0:
        return []
    value = module[at + 9 : module.index(b"\0", at + 9)].decode("ascii")
    return [_canonical(name) for name in value.split(",") if name]


def _canonical(name: str) -> str:
    return name.replace("-", "_")
