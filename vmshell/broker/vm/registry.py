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
from typing import Any, TypeVar

from ...layout import Layout
from ...messages import ALIVE, CREATING, FAILED, OFF, SHELF, STATES
from ...model import definition as definitions
from ...model.decide import Usage
from ...model.definition import Definition
from ...model.values import split_ref
from ...names import check_name
from ...numbering import NUMBER_MAX
from ...refusals import BadName, CannotSnapshot, StorageFailed, VmExists
from ..runtime.files import TEXT_MAX, boot_id, read_text, storage, sync_folder, why, write_fast, write_text
from ..runtime.log import note
from . import damaged_records
from .damaged_records import Remains
from .objects import FACTS, Store
from .vm import Published, Snapshot, Vm

K = TypeVar("K")
L = TypeVar("L")
RECORD_VERSION = 1
# Characters of a record that are no snapshots': grants, host keys and the rest have limits of their own, and fit into these.
RECORD_REST = 128 << 10


class Registry:
    """All VMs by owner and name. Raises StorageFailed when the disk says no; memory and disk then still agree."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._of: dict[int, dict[str, Vm]] = {}  # by uid and name
        self._numbers: dict[int, Vm] = {}
        self._owners: dict[str, dict[int, Vm]] = {}  # by the owner's name and the VM's number
        self._shelves: dict[int, dict[str, Store]] = {}  # by uid and folder
        self._unreadable: list[str] = []  # folders, as `uid/name`, that are no VM's
        self._next = 1

    def __iter__(self) -> Iterator[Vm]:
        return iter(list(self._numbers.values()))

    def get(self, uid: int, name: str) -> Vm | None:
        return self._of.get(uid, {}).get(name)

    def has_number(self, number: int) -> bool:
        return number in self._numbers

    def of(self, uid: int) -> list[Vm]:
        """The VMs of *uid* by name."""
        return [vm for _, vm in sorted(self._of.get(uid, {}).items())]

    def namesakes(self, vm: Vm) -> list[Vm]:
        """The VMs of other accounts that had the name of *vm*'s owner (D22)."""
        return [other for other in self._owners.get(vm.owner, {}).values() if other.uid != vm.uid]

    def add(self, vm: Vm) -> None:
        self._of.setdefault(vm.uid, {})[vm.name] = self._numbers[vm.number] = vm
        self._owners.setdefault(vm.owner, {})[vm.number] = vm

    def forget(self, vm: Vm) -> None:
        """Drop the VM from memory; its name is free again, its number is not."""
        self._numbers.pop(vm.number, None)
        _drop(self._of, vm.uid, vm.name)
        _drop(self._owners, vm.owner, vm.number)

    def shelf(self, uid: int, owner: str) -> Store:
        """The objects of an account that belong to no VM. By uid *and* name, like VMs: a uid may be given to another (D22)."""
        return self._shelf(uid, owner.encode("utf-8", "surrogateescape").hex())

    def _shelf(self, uid: int, folder: str) -> Store:
        known = self._shelves.setdefault(uid, {})
        if folder not in known:
            store = Store(f"{self._layout.shelf(uid)}/{folder}", SHELF)
            with storage():
                store.load()
            known[folder] = store
        return known[folder]

    def shelves_of(self, uid: int) -> list[Store]:
        """The shelves of all accounts that have had *uid*."""
        try:
            folders = os.listdir(self._layout.shelf(uid))
        except FileNotFoundError:
            folders = []
        return [self._shelf(uid, folder) for folder in {*folders, *self._shelves.get(uid, ())}]

    def used(self, uid: int, *, without: Vm | None = None) -> Usage:
        """The sum over *uid*'s VMs and shelf; a VM that only waits for its turn runs, or two could take the last place."""
        shares = [vm.share(running=vm.state in (*ALIVE, "queued")) for vm in self.of(uid) if vm is not without]
        return Usage.total([*shares, *(Usage(disk=shelf.size()) for shelf in self.shelves_of(uid))])

    # --- the disk -----------------------------------------------------------------------------------------------------

    def load(self) -> list[str]:
        """Read every record; returns the leftovers of interrupted work, for deletion. Damaged ones are kept, listed as failed."""
        leftovers = []
        damaged: list[tuple[int, str, Remains]] = []
        os.makedirs(self._layout.vms, mode=0o700, exist_ok=True)
        for owner in os.listdir(self._layout.vms):
            folder = f"{self._layout.vms}/{owner}"
            if not owner.isdecimal() or not os.path.isdir(folder):
                continue
            for entry in sorted(os.listdir(folder)):
                if entry.startswith((".new-", ".rm-")):
                    leftovers.append(f"{folder}/{entry}")
                    continue
                try:
                    self._load_one(int(owner), entry, f"{folder}/{entry}")
                except Exception as exc:
                    # One unreadable record must not keep everyone else's VMs away.
                    note("record-unreadable", folder=f"{folder}/{entry}", problem=str(exc))
                    damaged.append((int(owner), entry, damaged_records.remains_of(f"{folder}/{entry}", why(exc))))
        self._next = self._read_next()
        self._take_damaged(damaged)
        return leftovers

    def _load_one(self, uid: int, name: str, folder: str) -> None:
        """Raises whatever is wrong with the record in *folder*."""
        text = read_text(f"{folder}/record.json")
        record = json.loads(text)
        number, owner, created = record["number"], record["owner"], record["created"]
        well_formed = type(number) is int and 0 < number <= NUMBER_MAX and type(owner) is str and type(created) is int
        if not well_formed or number in self._numbers or check_name(name) != name:
            raise ValueError("a field is wrong")
        definition, problem = _stored_definition(folder, name)
        vm = Vm(number, uid, owner, definition, created, _load_store(folder, name))
        vm.last_error = record.get("last_error")
        vm.snapshots = {row["tag"]: Snapshot(**row) for row in record.get("snapshots", [])}
        vm.snapshot_number = max([record.get("snapshot_number", 0), *(saved.number for saved in vm.snapshots.values())])
        vm.once = record.get("once") is True
        vm.published = [Published(**row) for row in record.get("published", [])]
        vm.host_keys = [str(key) for key in record.get("host_keys", [])]
        vm.recorded = text
        if record.get("version") != RECORD_VERSION:
            vm.record_stays = True
            problem = problem or "its record was written by a newer version"
        self._add_unreadable(vm, problem or vm.store.damaged)

    def _add_unreadable(self, vm: Vm, problem: str) -> None:
        """Add *vm*; with a *problem* it is listed as failed, and never boots."""
        if problem:
            vm.unreadable = vm.note = problem
            vm.state = FAILED
        self.add(vm)

    def _take_damaged(self, damaged: list[tuple[int, str, Remains]]) -> None:
        """Make VMs of what is left of damaged records: their owners have them in their lists, and can remove them."""
        runs = damaged_records.running(self._layout.run_vms) if damaged else {}
        for uid, name, left in damaged:
            run = runs.get((uid, name), Remains())
            number = next((number for number in (left.number, run.number) if number and number not in self._numbers), 0)
            owner = left.owner or run.owner or damaged_records.only_owner(vm.owner for vm in self.of(uid) if not vm.record_stays)
            if not is_name(name):
                self._unreadable.append(f"{uid}/{name}")
                continue
            folder = self._layout.vm_state(uid, name)
            number, owner = number or self._free_number(), owner or str(uid)  # nobody's: an administrator names it by uid
            vm = Vm(number, uid, owner, _stored_definition(folder, name)[0], left.created, _load_store(folder, name))
            vm.record_stays = True
            self._add_unreadable(vm, f"its record is damaged ({left.problem})")

    def unreadable(self) -> list[str]:
        """What is in place of a VM, as `uid/name`, has a name that no VM has, and is still there."""
        return [name for name in self._unreadable if os.path.lexists(f"{self._layout.vms}/{name}")]

    def unreadable_shelves(self) -> list[str]:
        """Every shelf, as `uid/shelf`, of which it is not known what its objects are."""
        found = []
        with storage():
            uids = os.listdir(self._layout.shelves) if os.path.isdir(self._layout.shelves) else []
            for uid in uids:
                if uid.isdecimal():
                    found += [f"{uid}/{SHELF}" for store in self.shelves_of(int(uid)) if store.damaged]
        return found

    def folders(self, uid: int) -> list[str]:
        """The folders of all VMs of *uid*, whatever state they are in: half made, removed, unreadable."""
        with storage():
            try:
                return sorted(os.listdir(f"{self._layout.vms}/{uid}"))
            except FileNotFoundError:
                return []

    def on_shelf(self, uid: int) -> list[str]:
        """The objects on the shelves of all accounts that have had *uid*, as people name them, and lists that are damaged."""
        with storage():
            shelves = self.shelves_of(uid)
        names = [name for shelf in shelves for name in (*(name for name, _ in shelf), *([FACTS] if shelf.damaged else []))]
        return [f"{SHELF}.{name}" for name in names]

    def on_paper(self, uid: int, owner: str, definition: Definition) -> Vm:
        """A VM to judge a definition with, that is nowhere written down."""
        if self.get(uid, definition.name):
            raise VmExists(vm=definition.name)
        return Vm(0, uid, owner, definition, 0, Store(f"{self._layout.vms}/{uid}/.paper", definition.name))

    def create(self, uid: int, owner: str, definition: Definition, *, once: bool = False) -> Vm:
        """Take the name and a new number: a VM in state creating, in a folder of its own in which its disks are to be made."""
        if self.get(uid, definition.name):
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
        self.add(vm)
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

    def set_aside(self, vm: Vm) -> str:
        """Begin a removal: one rename takes the VM away for good; returns the folder that is left to delete."""
        aside = f"{self._layout.vms}/{vm.uid}/.rm-{vm.number}"
        with storage():
            os.rename(self._layout.vm_state(vm.uid, vm.name), aside)
        return aside

    def save(self, vm: Vm) -> None:
        """Write the lasting record, if it says anything new: a sync costs everybody milliseconds."""
        text = _record(vm)
        if text == vm.recorded or vm.record_stays:
            return
        with storage():
            write_text(f"{self._layout.vm_state(vm.uid, vm.name)}/record.json", text)
        vm.recorded = text

    def must_have_room(self, vm: Vm, text: str) -> None:
        """Raise CannotSnapshot if one more snapshot, with the definition *text*, would make the record too large to be read."""
        size = len(_record(vm)) + len(json.dumps([vars(Snapshot("t" * 63, NUMBER_MAX, 1 << 40, 1 << 24, text))], indent=1))
        if size > TEXT_MAX - RECORD_REST:
            raise CannotSnapshot(vm=vm.ref, problem=f"its record has no room beside {len(vm.snapshots)} snapshots; delete one")

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
        if state == OFF and vm.unreadable:
            vm.state, vm.note = FAILED, vm.unreadable

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
        number = self._free_number()
        with storage():
            # Not synced: what a power cut takes away with it is only which numbers of removed VMs were used.
            write_fast(f"{self._layout.vms}/next", f"{self._next}\n")
        return number

    def _free_number(self) -> int:
        """The next number that no VM has; behind the last one from the first again, for users make and remove VMs at will."""
        numbers = itertools.chain(range(self._next, NUMBER_MAX + 1), range(1, self._next))
        number = next((number for number in numbers if number not in self._numbers), 0)
        if not number:
            raise StorageFailed(problem=f"all {NUMBER_MAX} VM numbers are in use")
        self._next = number + 1
        return number

    def _read_next(self) -> int:
        try:
            return max(1, min(int(read_text(f"{self._layout.vms}/next")), NUMBER_MAX + 1))
        except (OSError, ValueError):
            return max(self._numbers, default=0) + 1


def _drop(index: dict[K, dict[L, Vm]], first: K, second: L) -> None:
    row = index.get(first, {})
    row.pop(second, None)
    if not row:
        index.pop(first, None)


def is_name(name: str) -> bool:
    try:
        return check_name(name) == name
    except BadName:
        return False


def _load_store(folder: str, name: str) -> Store:
    store = Store(f"{folder}/disks", name)
    store.load()
    return store


def _definition_text(folder: str) -> str:
    return read_text(f"{folder}/vm.toml")


def _stored_definition(folder: str, name: str) -> tuple[Definition, str]:
    """The definition as far as it is understood, and why it must not be booted (empty: it may)."""
    try:
        return definitions.read_stored(_definition_text(folder), name)
    except OSError as exc:
        return Definition(name=name), f"its definition is damaged ({why(exc)})"


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
    images = json.loads(vm.recorded).get("images") if vm.recorded else None
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
        "uid": vm.uid,
        "owner": vm.owner,
        "name": vm.name,
        "pid": vm.pid,
        "ticks": vm.pid_ticks,
        "qemu_pid": vm.qemu_pid,
        "qemu_ticks": vm.qemu_ticks,
        "started": vm.started,
        "accel": vm.accel,
        "balloon": vm.balloon,
        "added": sorted(vm.added),
        "cables": vm.attached,
        "boot_id": boot_id(),
    }
