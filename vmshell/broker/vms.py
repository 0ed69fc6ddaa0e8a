"""The records of all VMs: what is on disk, and one object per VM in memory. The only module that reads or writes them.

Lasting (`vms/<uid>/<name>/`): `vm.toml` what the owner set, `record.json` what the broker knows. Written beside and renamed.
Until the next reboot (`RUNDIR/vms/<number>/run.json`): state, pid and start time of a VM that is not simply off. It lies in
memory, so writing it before every act costs nothing, and a host that was restarted finds every VM off, which is the truth.
Runs in: the broker.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

from ..errors import StorageFailed, VmExists
from ..layout import Layout
from ..messages import ALIVE, CREATING, FAILED, OFF, STATES
from ..names import NUMBER_MAX, check_name
from . import definition as definitions
from .definition import Definition
from .journal import note
from .policy import Usage

RECORD_VERSION = 1


class Vm:
    """One VM in memory. `state` is one of messages.STATES; everything below the blank line lives only while it runs."""

    def __init__(self, number: int, uid: int, owner: str, definition: Definition, created: int) -> None:
        self.number = number
        self.uid = uid
        self.owner = owner
        self.definition = definition
        self.created = created
        self.last_error: dict[str, Any] | None = None
        self.state = OFF
        self.unreadable = False
        self.recorded = ""  # what its record on disk says

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

    def share(self, *, running: bool) -> Usage:
        """What this VM counts against its owner's limits."""
        disk = sum(item.size for item in self.definition.disks) >> 20
        on = int(running)
        return Usage(vms=1, running=on, cpus=self.definition.cpus * on, memory=self.definition.memory * on, disk=disk)

    def started_again(self) -> None:
        """Forget what was true of the last run."""
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
        self._numbers: dict[int, Vm] = {}
        self._next = 1

    def __iter__(self) -> Iterator[Vm]:
        return iter(list(self._vms.values()))

    def get(self, uid: int, name: str) -> Vm | None:
        return self._vms.get((uid, name))

    def of(self, uid: int) -> list[Vm]:
        return sorted((vm for vm in self if vm.uid == uid), key=lambda vm: vm.name)

    def used(self, uid: int, *, without: Vm | None = None) -> Usage:
        """The sum over *uid*'s VMs; one that only waits for its turn counts as running, or two could take the last place."""
        return Usage.total(vm.share(running=vm.state in (*ALIVE, "queued")) for vm in self.of(uid) if vm is not without)

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
            text = _read(f"{folder}/record.json")
            record = json.loads(text)
            definition = definitions.readable(_read(f"{folder}/vm.toml"))
            number, owner, created = record["number"], record["owner"], record["created"]
            well_formed = type(number) is int and 0 < number <= NUMBER_MAX and type(owner) is str and type(created) is int
            if not well_formed or number in self._numbers or check_name(name) != name:
                raise ValueError("a field is wrong")
        except Exception as exc:
            # One unreadable record must not keep everyone else's VMs away; the files stay for the administrator.
            note("record-unreadable", folder=folder, problem=str(exc))
            return
        vm = Vm(number, uid, owner, definition or Definition(name=name, image=name), created)
        vm.last_error = record.get("last_error")
        vm.recorded = text
        if definition is None or record.get("version") != RECORD_VERSION:
            vm.unreadable = True
            vm.state, vm.note = FAILED, "its definition cannot be read by this version"
        self._vms[uid, name] = self._numbers[number] = vm

    def create(self, uid: int, owner: str, definition: Definition) -> tuple[Vm, str]:
        """Take the name and a new number; returns the VM (state creating) and the folder in which its disks are to be made."""
        if (uid, definition.name) in self._vms:
            raise VmExists(vm=definition.name)
        vm = Vm(self._take_number(), uid, owner, definition, int(time.time()))
        vm.state = CREATING
        folder = f"{self._layout.vms}/{uid}/.new-{vm.number}"
        with _storage():
            os.makedirs(f"{folder}/disks", mode=0o700)
            _write(f"{folder}/vm.toml", definition.to_toml())
            vm.recorded = _record(vm)
            _write(f"{folder}/record.json", vm.recorded)
        self._vms[uid, vm.name] = self._numbers[vm.number] = vm
        return vm, folder

    def finish_creation(self, vm: Vm, folder: str) -> None:
        """The disks are there: make the VM real, in one rename."""
        with _storage():
            _sync_folder(folder)
            os.rename(folder, self._layout.vm_state(vm.uid, vm.name))
            _sync_folder(os.path.dirname(folder))
        vm.state = OFF

    def forget(self, vm: Vm) -> None:
        """Drop the VM from memory; its name is free again, its number is not."""
        self._vms.pop((vm.uid, vm.name), None)
        self._numbers.pop(vm.number, None)

    def set_aside(self, vm: Vm) -> str:
        """Begin a removal: one rename takes the VM away for good; returns the folder that is left to delete."""
        aside = f"{self._layout.vms}/{vm.uid}/.rm-{vm.number}"
        with _storage():
            os.rename(self._layout.vm_state(vm.uid, vm.name), aside)
        return aside

    def save(self, vm: Vm) -> None:
        """Write the lasting record (the last error), if it says anything new: a sync costs everybody milliseconds."""
        text = _record(vm)
        if text == vm.recorded:
            return
        with _storage():
            path = f"{self._layout.vm_state(vm.uid, vm.name)}/record.json"
            _write(path + ".new", text)
            os.rename(path + ".new", path)
        vm.recorded = text

    # --- the run directory --------------------------------------------------------------------------------------------

    def set_state(self, vm: Vm, state: str) -> None:
        """Write *state*, then believe it. Called before the act that the state announces."""
        assert state in STATES
        folder = self._layout.vm_run(vm.number)
        with _storage():
            if state in (OFF, FAILED):
                shutil.rmtree(folder, ignore_errors=True)
            else:
                os.makedirs(folder, mode=0o750, exist_ok=True)
                _write_fast(f"{folder}/run.json", json.dumps(_run(vm, state)))
        vm.state = state

    def saved_run(self, number: int) -> dict[str, Any]:
        """What `run.json` says, or nothing at all if it is missing, damaged or from before a reboot."""
        try:
            run = json.loads(_read(f"{self._layout.vm_run(number)}/run.json"))
        except (OSError, ValueError):
            return {}
        return run if isinstance(run, dict) and run.get("boot_id") == boot_id() else {}

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _take_number(self) -> int:
        """The next number that no VM has; behind the last one from the first again, for users make and remove VMs at will."""
        numbers = itertools.chain(range(self._next, NUMBER_MAX + 1), range(1, self._next))
        number = next((number for number in numbers if number not in self._numbers), 0)
        if not number:
            raise StorageFailed(problem=f"all {NUMBER_MAX} VM numbers are in use")
        with _storage():
            # Not synced: what a power cut takes away with it is only which numbers of removed VMs were used.
            _write_fast(f"{self._layout.vms}/next", f"{number + 1}\n")
        self._next = number + 1
        return number

    def _read_next(self) -> int:
        try:
            return max(1, min(int(_read(f"{self._layout.vms}/next")), NUMBER_MAX + 1))
        except (OSError, ValueError):
            return max(self._numbers, default=0) + 1


def boot_id() -> str:
    """This boot of the host, so that no pid of an earlier one is believed."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def _record(vm: Vm) -> str:
    record = {
        "version": RECORD_VERSION,
        "number": vm.number,
        "owner": vm.owner,
        "created": vm.created,
        "image": vm.definition.image,
        "last_error": vm.last_error,
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
        "boot_id": boot_id(),
    }


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(1 << 20)


def _write_fast(path: str, text: str) -> None:
    with open(path + ".new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(path + ".new", path)


def _write(path: str, text: str) -> None:
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _storage:
    """Turn what the file system says into the sentence a person reads; the path stays in the journal (R25)."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, OSError):
            note("storage", problem=str(exc))
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageFailed(problem="the disk is full" if full else exc.strerror or "the disk refused") from exc
