"""The administrator's one file, `policy.toml`, and `decide()`: may this user's VM run with this, given what is in use?

`[host]` is about the machine, `[defaults]` about every user. Both are complete without the file: the limits are in force
before the first login. `decide` is pure; it is asked when a VM is defined and again at every boot.
Runs in: the broker.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import BadPolicy, OverLimit
from ..names import MIB, format_size, parse_size

GIB = 1024  # in MiB


@dataclass(frozen=True)
class Limits:
    """What one user may have. Memory and disks in MiB; `user_*` are sums, over running VMs for CPUs and memory."""

    vms_max: int = 10
    running_max: int = 4
    cpus_max: int = 2
    user_cpus: int = 4
    memory_max: int = 2 * GIB
    user_memory: int = 4 * GIB
    disk_size_max: int = 32 * GIB
    user_disk: int = 64 * GIB


# One's own machine in session mode: the host itself is the limit.
SESSION_LIMITS = Limits(
    vms_max=1000,
    running_max=500,
    cpus_max=255,
    user_cpus=10_000,
    memory_max=1024 * GIB,
    user_memory=4096 * GIB,
    disk_size_max=16 * 1024 * GIB,
    user_disk=64 * 1024 * GIB,
)

_SIZES = frozenset({"memory_max", "user_memory", "disk_size_max", "user_disk"})


@dataclass(frozen=True)
class HostPolicy:
    """`accel`: auto, kvm or tcg. `uid_base` + a VM's number is its QEMU's uid. `boots_at_once` 0 means one per core."""

    accel: str = "auto"
    uid_base: int = 2_100_000_000
    boots_at_once: int = 0
    log_size_max: int = 1 << 20
    group: str = "vmusers"
    connections_max: int = 32

    @property
    def job_uid(self) -> int:
        """The uid of helpers that are nobody's VM."""
        return self.uid_base - 1


@dataclass(frozen=True)
class Policy:
    host: HostPolicy = field(default_factory=HostPolicy)
    defaults: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Usage:
    """What counts against the limits: one VM's share, or a user's sum."""

    vms: int = 0
    running: int = 0
    cpus: int = 0
    memory: int = 0
    disk: int = 0

    @classmethod
    def total(cls, shares: Iterable[Usage]) -> Usage:
        parts = list(shares)
        return cls(**{item.name: sum(getattr(part, item.name) for part in parts) for item in fields(cls)})


def load(path: str, defaults: Limits) -> Policy:
    """Read *path*; a missing file means the defaults. Raises BadPolicy naming line or key (and nothing is half-applied)."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & 0o002 or status.st_uid not in (0, os.geteuid()):
                raise BadPolicy(path=path, problem="it must belong to root and not be writable by others")
            document = tomllib.load(file)
    except FileNotFoundError:
        return Policy(defaults=defaults)
    except OSError as exc:
        raise BadPolicy(path=path, problem=exc.strerror or str(exc)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise BadPolicy(path=path, problem=str(exc)) from exc
    unknown = sorted(set(document) - {"host", "defaults"})
    if unknown:
        raise BadPolicy(path=path, problem=f"there is no section [{unknown[0]}]; the sections are [host] and [defaults]")
    host = replace(HostPolicy(), **_section(path, "host", document.get("host", {}), HostPolicy()))
    limits = replace(defaults, **_section(path, "defaults", document.get("defaults", {}), defaults))
    if host.accel not in ("auto", "kvm", "tcg"):
        raise BadPolicy(path=path, problem=f"[host] accel is {host.accel!r}; allowed are auto, kvm and tcg")
    return Policy(host, limits)


def _section(path: str, name: str, table: object, model: HostPolicy | Limits) -> dict[str, Any]:
    """The typed values of one section, by the model's own defaults: text for text, whole numbers from 0, sizes like `2G`."""
    if not isinstance(table, dict):
        raise BadPolicy(path=path, problem=f"[{name}] is not a section")
    values: dict[str, Any] = {}
    for key, value in table.items():
        default = getattr(model, key, None) if key in {item.name for item in fields(model)} else None
        if default is None:
            known = ", ".join(item.name for item in fields(model))
            raise BadPolicy(path=path, problem=f"[{name}] has no key {key!r}; its keys are {known}")
        if key in _SIZES:
            values[key] = parse_size(value, f"[{name}] {key}") // MIB
        elif key == "log_size_max":
            values[key] = max(4096, parse_size(value, f"[{name}] {key}"))
        elif type(value) is not type(default) or (isinstance(value, int) and value < 0):
            wanted = "text" if isinstance(default, str) else "a whole number from 0"
            raise BadPolicy(path=path, problem=f"[{name}] {key} is {value!r}; allowed is {wanted}")
        else:
            values[key] = value
    return values


def decide(vm: str, limits: Limits, asked: Usage, used: Usage) -> None:
    """Raise OverLimit with the numbers if *asked* (one VM's share) does not fit beside *used* (all of the user's others).

    A share of zero is always allowed: somebody over a lowered limit may still list, stop and delete.
    """
    for what, share, in_use, limit, rule in (
        ("VMs", asked.vms, used.vms, limits.vms_max, "vms_max"),
        ("running VMs", asked.running, used.running, limits.running_max, "running_max"),
        ("CPUs for one VM", asked.cpus, 0, limits.cpus_max, "cpus_max"),
        ("CPUs in all", asked.cpus if asked.running else 0, used.cpus, limits.user_cpus, "user_cpus"),
    ):
        if share and in_use + share > limit:
            free = max(0, limit - in_use)
            raise OverLimit(vm=vm, asked=share, what=what, limit=limit, used=in_use, rule=rule, allowed=free)
    for what, share, in_use, limit, rule in (
        ("memory for one VM", asked.memory, 0, limits.memory_max, "memory_max"),
        ("memory in all", asked.memory if asked.running else 0, used.memory, limits.user_memory, "user_memory"),
        ("disk for one VM", asked.disk, 0, limits.disk_size_max, "disk_size_max"),
        ("disk in all", asked.disk if asked.vms else 0, used.disk, limits.user_disk, "user_disk"),
    ):
        if share and in_use + share > limit:
            sizes = {"asked": share, "limit": limit, "used": in_use, "allowed": max(0, limit - in_use)}
            raise OverLimit(vm=vm, what=what, rule=rule, **{key: format_size(value * MIB) for key, value in sizes.items()})
