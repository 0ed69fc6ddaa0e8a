"""A launch plan as it travels: JSON less what the launcher sets itself; and of which kind each of its descriptors has to be.

`plan_of` builds the plan with the plan's own constructors, so what a request may hold is said in one place. Every ValueError
begins with the field that is wrong.
Used by: launcher, broker. Touches nothing.
"""

from __future__ import annotations

from ..names import tap_name
from .devices import DiskPlan, NicPlan
from .plan import LaunchPlan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    T = TypeVar("T")
    Table = dict[str, object]

# What nobody but the launcher says: as whom QEMU runs, where it is counted, which filter it gets.
LAUNCHERS_OWN = frozenset(
    ("number", "uid", "gid", "kvm_gid", "seccomp_fd", "scope", "slice", "oom_score_adj", "info_fd", "paused")
)
LISTS_MAX = 64

READ, WRITTEN, LISTENER, STREAM, BARRIER, TAP = "read", "written", "listener", "stream", "barrier", "tap"


def plan_of(table: Table, **own: object) -> LaunchPlan:
    """Build the plan in *table* with the launcher's *own* fields; raises ValueError for whatever a plan cannot be."""
    _only(table, _keywords(LaunchPlan) - LAUNCHERS_OWN, "plan")
    values = dict(table)
    for name in ("option_rom_fds", "firmware"):
        if values.get(name) is not None:
            values[name] = _tuple(values[name], name)
    values["disks"] = tuple(_disk(item) for item in _tuple(values.get("disks", []), "disks"))
    values["nics"] = tuple(_nic(item) for item in _tuple(values.get("nics", []), "nics"))
    return _built(LaunchPlan, {**values, **own}, "plan")


def _disk(item: object) -> DiskPlan:
    values = _table(item, "disks")
    _only(values, _keywords(DiskPlan), "disks")
    values["layers"] = tuple(_tuple(pair, "layers", 2) for pair in _tuple(values.get("layers"), "layers"))
    if values.get("geometry") is not None:
        values["geometry"] = _tuple(values["geometry"], "geometry", 4)
    return _built(DiskPlan, values, "disks")


def _nic(item: object) -> NicPlan:
    values = _table(item, "nics")
    _only(values, _keywords(NicPlan), "nics")
    values["forwards"] = tuple(_tuple(row, "forwards", 3) for row in _tuple(values.get("forwards", []), "forwards"))
    return _built(NicPlan, values, "nics")


def _built(kind: Callable[..., T], values: Table, what: str) -> T:
    try:
        return kind(**values)
    except TypeError as exc:
        # Python's own words for a field that is missing, or of a type that the constructor could not even look at.
        raise ValueError(f"{what}: {exc}") from exc


def _table(value: object, what: str) -> Table:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must hold tables")
    return dict(value)


def _tuple(value: object, what: str, length: int | None = None) -> tuple[object, ...]:
    if not isinstance(value, list) or len(value) > LISTS_MAX or (length is not None and len(value) != length):
        raise ValueError(f"{what} must be a list" + (f" of {length}" if length else f" of at most {LISTS_MAX}"))
    return tuple(value)


def _keywords(kind: type) -> frozenset[str]:
    """What the constructor of *kind* takes."""
    return frozenset(kind.__init__.__annotations__) - {"return"}  # type: ignore[misc]


def _only(table: Table, known: frozenset[str], what: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"{unknown[0][:40]!r}: a launch request has no such key in {what}")


def uses(plan: LaunchPlan) -> Iterator[tuple[str, int, str]]:
    """Every descriptor of *plan* that the broker lends: the field it stands in, its number, and of which kind it has to be.

    A tap's kind is `tap` and its name, which follows from the VM's number.
    """
    for name, fd, kind in (
        ("kernel_fd", plan.kernel_fd, READ),
        ("initrd_fd", plan.initrd_fd, READ),
        ("agent_fd", plan.agent_fd, LISTENER),
        ("qmp_fd", plan.qmp_fd, LISTENER),
        ("block_fd", plan.block_fd, BARRIER),
    ):
        if fd is not None:
            yield name, fd, kind
    for fd in plan.option_rom_fds:
        yield "option_rom_fds", fd, READ
    if plan.firmware is not None:
        yield "firmware", plan.firmware[0], READ
        yield "firmware", plan.firmware[1], WRITTEN
    for index, disk in enumerate(plan.disks):
        for depth, (fd, _) in enumerate(disk.layers):
            yield f"disks[{index}].layers[{depth}]", fd, WRITTEN if not depth and not disk.readonly else READ
    for index, nic in enumerate(plan.nics):
        if nic.tap_fd is not None:
            yield f"nics[{index}].tap_fd", nic.tap_fd, f"{TAP} {tap_name(plan.number, index)}"
        if nic.stream_fd is not None:
            yield f"nics[{index}].stream_fd", nic.stream_fd, STREAM
