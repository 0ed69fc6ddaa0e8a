"""Removing a VM: its name and number are free at once, its files are deleted by a job, its addresses given back.

Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import Forget
from ..runtime.log import by_user, note

if TYPE_CHECKING:
    from ..network.addresses import Addresses
    from ..network.dnsmasq import DnsmasqFiles
    from ..runtime.loop import Loop
    from ..services.jobs import Jobs
    from ..services.relay import Relay
    from ..storage.uploads import Uploads
    from ..vm.registry import Registry
    from ..vm.vm import Vm

DELETE_AGAIN = 60.0  # seconds


class Removal:
    """What several verbs end with."""

    def __init__(
        self,
        *,
        loop: Loop,
        jobs: Jobs,
        relay: Relay,
        registry: Registry,
        addresses: Addresses,
        uploads: Uploads,
        dnsmasq: DnsmasqFiles,
    ) -> None:
        self._loop = loop
        self._jobs = jobs
        self._relay = relay
        self._registry = registry
        self._addresses = addresses
        self._uploads = uploads
        self._dnsmasq = dnsmasq

    def remove(self, vm: Vm) -> None:
        """Delete a VM that is off. One rename makes it irrevocable; the files are deleted by a job."""
        aside = self._registry.set_aside(vm)
        self._registry.forget(vm)
        self._uploads.removed(vm)
        self.delete_later(aside)
        self._relay.send(Forget(number=vm.number, purge=True), lambda error: None)
        self._dnsmasq.forget(vm)
        by_user(vm.uid, "rm", number=vm.number, owner=vm.owner, vm=vm.name)

    def delete_later(self, folder: str) -> None:
        """Delete a folder of ours in a job, its VM's addresses given back; what is interrupted is found at the next start."""
        what = folder

        def done(status: int) -> None:
            if status:
                note("delete-failed", folder=folder, status=status)

        try:
            self._release(folder)
        except VmshellError as exc:
            # On a full disk the disks go all the same, and the folder stays as the reminder of what is left to do.
            what = f"{folder}/disks"
            note("release-failed", folder=folder, problem=exc)
            self._loop.after(DELETE_AGAIN, lambda: self.delete_later(folder))
        try:
            self._jobs.own(["rm", "-rf", "--one-file-system", "--", what], done)
        except OSError as exc:
            note("delete-failed", folder=folder, problem=exc)

    def _release(self, folder: str) -> None:
        """Give back the addresses of the VM that left *folder*, as `.rm-5`, if no other has its number by now."""
        number = folder.rpartition("-")[2]
        if number.isdecimal() and not self._registry.has_number(int(number)):
            self._addresses.release(int(number))
