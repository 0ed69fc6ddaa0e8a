"""The records of all VMs: what is on disk, and one object per VM in memory. The only module that reads or writes them.

Lasting (`vms/<uid>/<name>/`): `vm.toml` what the owner set, `record.json` what the broker knows. Written beside and renamed.
Until the next reboot (`RUNDIR/vms/<number>/run.json`): state, pid and start time of a VM that is not simply off. It lies in
memory, so writing it before every act costs nothing, and a host that was restarted finds every VM off, which is the truth.
Runs in: the broker.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..layout import Layout
from ..messages import ALIVE, CREATING, FAILED, OFF, SHELF, STATES
from ..model import definition as definitions
from ..model.decide import Usage
from ..model.definition import Definition
from ..model.values import split_ref
from ..names import check_name
from ..numbering import NUMBER_MAX
from ..refusals import StorageFailed, VmExists
from .disk import read_text, storage, sync_folder, write_fast, write_text
from .journal import note
from .objects import Store
from .publishing import Published

RECORD_VERSION = 1


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

        self.defining = False  # its definition is being changed
        self.booted: Definition | None = None  # what it runs with
        self.added: set[int] = set()  # cards that came while it ran, or went that it booted with: not where a boot puts them
        self.cables: list[dict[str, object]] = []  # the cards that are plugged in, as `cards.saved` writes them
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

    def started_again(self) -> None:
        """Forget what was true of the last run."""
        self.booted = None
        self.added = set()
        self.cables = []
        self.balloon = 0
        self.note = ""
        self.accel = ""
        self.pid = self.pid_ticks = self.qemu_pid = self.qemu_ticks = 0
        self.started = 0.0
        self.seen_output = False
        self.viewers = 0


class Registry:
    """All VMs by owner and name. Raises StorageFailed when the disk says no; memory and disk then still agree."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._vms: dict[tuple[int, str], Vm] = {}
        self._shelves: dict[tuple[int, str], Store] = {}
        self._numbers: dict[int, Vm] = {}
        self._unreadable: list[str] = []  # what was not loaded, as `uid/name`
        self._next = 1

    def __iter__(self) -> Iterator[Vm]:
        return iter(list(self._vms.values()))

    def get(self, uid: int, name: str) -> Vm | None:
        return self._vms.get((uid, name))

    def of(self, uid: int) -> list[Vm]:
        return sorted((vm for vm in self if vm.uid == uid), key=lambda vm: vm.name)

    def shelf(self, uid: int, owner: str) -> Store:
        """The objects of an account that belong to no VM. By uid *and* name, like VMs: a uid may be given to another (D22)."""
        return self._shelf(uid, owner.encode("utf-8", "surrogateescape").hex())

    def _shelf(self, uid: int, folder: str) -> Store:
        if (uid, folder) not in self._shelves:
            store = Store(f"{self._layout.shelf(uid)}/{folder}", SHELF)
            try:
                with storage():
                    store.load()
            except (ValueError, TypeError, AttributeError) as exc:
                note("shelf-unreadable", folder=store.folder, problem=str(exc))
                raise StorageFailed(problem="the list of the objects on your shelf is damaged") from exc
            self._shelves[uid, folder] = store
        return self._shelves[uid, folder]

    def _shelves_of(self, uid: int) -> list[Store]:
        try:
            folders = os.listdir(self._layout.shelf(uid))
        except FileNotFoundError:
            folders = []
        known = [folder for other, folder in self._shelves if other == uid]
        return [self._shelf(uid, folder) for folder in {*folders, *known}]

    def used(self, uid: int, *, without: Vm | None = None) -> Usage:
        """The sum over *uid*'s VMs and shelf; a VM that only waits for its turn runs, or two could take the last place."""
        shares = [vm.share(running=vm.state in (*ALIVE, "queued")) for vm in self.of(uid) if vm is not without]
        return Usage.total([*shares, *(Usage(disk=shelf.size()) for shelf in self._shelves_of(uid))])

    # --- the disk -----------------------------------------------------------------------------------------------------

    def load(self) -> list[str]:
        """Read every record; returns the leftovers of interrupted work, for deletion. Damaged ones are kept, listed as failed."""
        leftovers = []
        os.makedirs(self._layout.vms, mode=0o700, exist_ok=True)
        for owner in os.listdir(self._layout.vms):
            folder = f"{self._layout.vms}/{owner}"
            if not owner.isdecimal() or not os.path.isdir(folder):
                continue
            for entry in sorted(os.listdir(folder)):
                if entry.startswith((".new-", ".rm-")):
                    leftovers.append(f"{folder}/{entry}")
                else:
                    self._load_one(int(owner), entry, f"{folder}/{entry}")
        self._next = self._read_next()
        return leftovers

    def _load_one(self, uid: int, name: str, folder: str) -> None:
        try:
            text = read_text(f"{folder}/record.json")
            record = json.loads(text)
            definition, problem = definitions.read_stored(_definition_text(folder), name)
            number, owner, created = record["number"], record["owner"], record["created"]
            well_formed = type(number) is int and 0 < number <= NUMBER_MAX and type(owner) is str and type(created) is int
            if not well_formed or number in self._numbers or check_name(name) != name:
                raise ValueError("a field is wrong")
            store = Store(f"{folder}/disks", name)
            store.load()
            snapshots = {row["tag"]: Snapshot(**row) for row in record.get("snapshots", [])}
            published = [Published(**row) for row in record.get("published", [])]
            host_keys = [str(key) for key in record.get("host_keys", [])]
        except Exception as exc:
            # One unreadable record must not keep everyone else's VMs away; the files stay for the administrator.
            note("record-unreadable", folder=folder, problem=str(exc))
            self._unreadable.append(f"{uid}/{name}")
            return
        vm = Vm(number, uid, owner, definition, created, store)
        vm.last_error = record.get("last_error")
        vm.snapshots = snapshots
        vm.snapshot_number = max([record.get("snapshot_number", 0), *(saved.number for saved in snapshots.values())])
        vm.once = record.get("once") is True
        vm.published = published
        vm.host_keys = host_keys
        vm.recorded = text
        if record.get("version") != RECORD_VERSION:
            problem = problem or "its record was written by a newer version"
        if problem:
            vm.unreadable = problem
            vm.state, vm.note = FAILED, problem
        self._vms[uid, name] = self._numbers[number] = vm

    def unreadable(self) -> list[str]:
        """The VMs, as `uid/name`, whose records could not be read at the start and are still there."""
        return [name for name in self._unreadable if os.path.lexists(f"{self._layout.vms}/{name}/record.json")]

    def folders(self, uid: int) -> list[str]:
        """The folders of all VMs of *uid*, whatever state they are in: half made, removed, unreadable."""
        with storage():
            try:
                return sorted(os.listdir(f"{self._layout.vms}/{uid}"))
            except FileNotFoundError:
                return []

    def on_shelf(self, uid: int) -> list[str]:
        """The objects on the shelves of all accounts that have had *uid*, as people name them."""
        with storage():
            return [f"{SHELF}.{name}" for shelf in self._shelves_of(uid) for name, _ in shelf]

    def on_paper(self, uid: int, owner: str, definition: Definition) -> Vm:
        """A VM to judge a definition with, that is nowhere written down."""
        if (uid, definition.name) in self._vms:
            raise VmExists(vm=definition.name)
        return Vm(0, uid, owner, definition, 0, Store(f"{self._layout.vms}/{uid}/.paper", definition.name))

    def create(self, uid: int, owner: str, definition: Definition, *, once: bool = False) -> Vm:
        """Take the name and a new number: a VM in state creating, in a folder of its own in which its disks are to be made."""
        if (uid, definition.name) in self._vms:
            raise VmExists(vm=definition.name)
        number = self._take_number()
        folder = f"{self._layout.vms}/{uid}/.new-{number}"
        vm = Vm(number, uid, owner, definition, int(time.time()), Store(f"{folder}/disks", definition.name))
        vm.state, vm.once = CREATING, once
        with storage():
            os.makedirs(f"{folder}/disks", mode=0o700)
            write_text(f"{folder}/vm.toml", definitions.to_toml(definition))
            vm.recorded = _record(vm)
            write_text(f"{folder}/record.json", vm.recorded)
        self._vms[uid, vm.name] = self._numbers[vm.number] = vm
        return vm

    def finish_creation(self, vm: Vm) -> None:
        """The disks are there: make the VM real, in one rename."""
        folder, final = os.path.dirname(vm.store.folder), self._layout.vm_state(vm.uid, vm.name)
        with storage():
            sync_folder(folder)
            os.rename(folder, final)
            vm.store.folder = f"{final}/disks"
            sync_folder(os.path.dirname(final))
        vm.state = OFF

    def redefine(self, vm: Vm, definition: Definition) -> None:
        """Write another definition, then believe it."""
        with storage():
            write_text(f"{self._layout.vm_state(vm.uid, vm.name)}/vm.toml", definitions.to_toml(definition))
        vm.definition = definition
        self.save(vm)

    def text(self, vm: Vm) -> str:
        """The definition as it stands on the disk, with what this version does not know."""
        with storage():
            return _definition_text(os.path.dirname(vm.store.folder))

    def forget(self, vm: Vm) -> None:
        """Drop the VM from memory; its name is free again, its number is not."""
        self._vms.pop((vm.uid, vm.name), None)
        self._numbers.pop(vm.number, None)

    def set_aside(self, vm: Vm) -> str:
        """Begin a removal: one rename takes the VM away for good; returns the folder that is left to delete."""
        aside = f"{self._layout.vms}/{vm.uid}/.rm-{vm.number}"
        with storage():
            os.rename(self._layout.vm_state(vm.uid, vm.name), aside)
        return aside

    def save(self, vm: Vm) -> None:
        """Write the lasting record, if it says anything new: a sync costs everybody milliseconds."""
        text = _record(vm)
        if text == vm.recorded:
            return
        with storage():
            write_text(f"{self._layout.vm_state(vm.uid, vm.name)}/record.json", text)
        vm.recorded = text

    # --- the run directory --------------------------------------------------------------------------------------------

    def set_state(self, vm: Vm, state: str) -> None:
        """Write *state*, then believe it. Called before the act that the state announces."""
        assert state in STATES
        folder = self._layout.vm_run(vm.number)
        with storage():
            if state in (OFF, FAILED):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                os.makedirs(folder, mode=0o750, exist_ok=True)
                if vm.booted:
                    write_fast(f"{folder}/booted.toml", definitions.to_toml(vm.booted))
                write_fast(f"{folder}/run.json", json.dumps(_run(vm, state)))
        vm.state = state

    def saved_run(self, number: int) -> dict[str, Any]:
        """What `run.json` says, or nothing at all if it is missing, damaged or from before a reboot."""
        try:
            run = json.loads(read_text(f"{self._layout.vm_run(number)}/run.json"))
        except (OSError, ValueError):
            return {}
        return run if isinstance(run, dict) and run.get("boot_id") == boot_id() else {}

    def saved_booted(self, vm: Vm) -> Definition:
        """What a VM that runs was booted with; what it is defined as now, if nobody wrote that down."""
        try:
            return definitions.read_stored(read_text(f"{self._layout.vm_run(vm.number)}/booted.toml"), vm.name)[0]
        except OSError:
            return vm.definition

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _take_number(self) -> int:
        """The next number that no VM has; behind the last one from the first again, for users make and remove VMs at will."""
        numbers = itertools.chain(range(self._next, NUMBER_MAX + 1), range(1, self._next))
        number = next((number for number in numbers if number not in self._numbers), 0)
        if not number:
            raise StorageFailed(problem=f"all {NUMBER_MAX} VM numbers are in use")
        with storage():
            # Not synced: what a power cut takes away with it is only which numbers of removed VMs were used.
            write_fast(f"{self._layout.vms}/next", f"{number + 1}\n")
        self._next = number + 1
        return number

    def _read_next(self) -> int:
        try:
            return max(1, min(int(read_text(f"{self._layout.vms}/next")), NUMBER_MAX + 1))
        except (OSError, ValueError):
            return max(self._numbers, default=0) + 1


def boot_id() -> str:
    """This boot of the host, so that no pid of an earlier one is believed."""
    return read_text("/proc/sys/kernel/random/boot_id").strip()


def _definition_text(folder: str) -> str:
    return read_text(f"{folder}/vm.toml")


def _images(vm: Vm) -> list[str]:
    """Every catalogue image that this VM came from or stands on: none of them may be taken away under it."""
    definition = vm.definition
    refs = [definition.kernel, definition.initrd, *(disk.base for disk in definition.disks)]
    named = {split_ref(ref)[1] for ref in refs if ref.startswith("image:")} | {made.base for _, made in vm.store}
    return sorted((named | {definition.image}) - {""})


def images_of(vm: Vm) -> list[str] | None:
    """The images that *vm* stands on; of one with an unreadable definition what its record says, None if that says nothing."""
    if not vm.unreadable:
        return _images(vm)
    images = json.loads(vm.recorded).get("images")
    return images if isinstance(images, list) and all(isinstance(image, str) for image in images) else None


def _record(vm: Vm) -> str:
    record = {
        "version": RECORD_VERSION,
        "number": vm.number,
        "owner": vm.owner,
        "created": vm.created,
        "images": _images(vm),
        "last_error": vm.last_error,
        **({"once": True} if vm.once else {}),
        **({"snapshot_number": vm.snapshot_number} if vm.snapshot_number else {}),
        **({"published": [vars(item) for item in vm.published]} if vm.published else {}),
        **({"host_keys": vm.host_keys} if vm.host_keys else {}),
        **({"snapshots": [vars(saved) for saved in vm.snapshots.values()]} if vm.snapshots else {}),
    }
    return json.dumps(record, indent=1) + "\n"


def _run(vm: Vm, state: str) -> dict[str, object]:
    return {
        "state": state,
        "pid": vm.pid,
        "ticks": vm.pid_ticks,
        "qemu_pid": vm.qemu_pid,
        "qemu_ticks": vm.qemu_ticks,
        "started": vm.started,
        "accel": vm.accel,
        "balloon": vm.balloon,
        "added": sorted(vm.added),
        "cables": vm.cables,
        "boot_id": boot_id(),
    }
