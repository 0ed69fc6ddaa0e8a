"""One VM in memory: what its record says, and what is true of its present run.

Runs in: the broker.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...messages import OFF
from ...model.decide import Usage
from ...model.definition import Definition
from ...refusals import WrongState
from .objects import Store


@dataclass(frozen=True)
class Published:
    """A port of a VM, for a user, a `@group` or the `world`; for the world by *host_port* of the host.

    *uid* is the user's: another account that gets the name later is not meant (D22). Old records have 0, which is anybody's.
    """

    port: int
    proto: str
    to: str
    host_port: int = 0
    uid: int = 0


@dataclass(frozen=True)
class Snapshot:
    """Memory and disks of a moment, inside the VM's own disks. *memory* in MiB, *text*: the definition it ran with."""

    tag: str
    number: int
    created: int
    memory: int
    text: str


class Vm:
    """One VM in memory. `state` is one of messages.STATES; everything below the blank line lives only while it runs."""

    def __init__(self, number: int, uid: int, owner: str, definition: Definition, created: int, store: Store) -> None:
        self.number = number
        self.uid = uid
        self.owner = owner
        self.definition = definition
        self.created = created
        self.store = store
        self.snapshots: dict[str, Snapshot] = {}
        self.snapshot_number = 0  # of the last one begun: none is used twice, whatever became of it
        self.once = False  # gone when it ends
        self.published: list[Published] = []
        self.host_keys: list[str] = []  # of the guest's sshd, as it first answered
        self.last_error: dict[str, Any] | None = None
        self.state = OFF
        self.unreadable = ""  # why it must not be booted
        self.recorded = ""  # what its record on disk says
        self.record_stays = False  # as it is on the disk: this version cannot read it, or not all of it

        self.defining = False  # its definition is being changed
        self.booted: Definition | None = None  # what it runs with
        self.added: set[int] = set()  # interfaces that came while it ran, or went that it booted with: not where a boot puts them
        self.attached: list[dict[str, object]] = []  # its interfaces, as `interfaces.saved` writes them
        self.balloon = 0  # MiB that the balloon was told to leave to the guest; 0: never told
        self.note = ""
        self.accel = ""
        self.pid = 0  # of the jail's outer process, which leads to QEMU's
        self.pid_ticks = 0  # its start time: the same number with another time is another process
        self.qemu_pid = 0
        self.qemu_ticks = 0
        self.started = 0.0
        self.seen_output = False
        self.viewers = 0

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def ref(self) -> str:
        """How the owner calls it."""
        return self.definition.name

    def share(self, *, running: bool, definition: Definition | None = None, disk: int | None = None) -> Usage:
        """What this VM counts against its owner's limits, or would with another *definition* or with *disk* MiB of objects.

        While it runs, what it was booted with counts: a guest need not give back what its balloon asks for.
        """
        counts = definition or self.booted or self.definition
        return Usage(
            vms=1,
            running=int(running),
            cpus=counts.cpus,
            memory=counts.memory,
            disk=(self.store.size() if disk is None else disk) + sum(saved.memory for saved in self.snapshots.values()),
            snapshots=len(self.snapshots),
            nics=len(counts.nics),
        )

    def must_be_recorded(self, verb: str) -> None:
        """Raise WrongState if nothing more can be written about this VM."""
        if self.record_stays:
            raise WrongState(vm=self.ref, state=f"not understood ({self.unreadable})", verb=verb, needed="readable")

    def started_again(self) -> None:
        """Forget what was true of the last run."""
        self.booted = None
        self.added = set()
        self.attached = []
        self.balloon = 0
        self.note = ""
        self.accel = ""
        self.pid = self.pid_ticks = self.qemu_pid = self.qemu_ticks = 0
        self.started = 0.0
        self.seen_output = False
        self.viewers = 0
