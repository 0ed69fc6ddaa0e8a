"""The broker's parts, put together once. Runs in: the broker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..errors import VmshellError
from ..layout import Layout
from ..messages import Forget
from ..model import policy as policies
from ..model.addressing import Plan
from ..model.policy import Effective, Policy
from .api.rates import Rates
from .api.turns import Turns
from .host.accounts import Accounts
from .host.accounts_helper import Question
from .host.capabilities import Facts
from .host.processes import Host
from .lifecycle.boot_queue import Admission
from .lifecycle.machines import Machines
from .network.addresses import Addresses
from .network.attachments import Networks
from .network.dnsmasq import Resolving
from .runtime.log import by_user, note
from .runtime.loop import Loop
from .services.jobs import Jobs
from .services.launcher import LauncherLink
from .services.relay import RelayLink
from .storage.images import Images
from .storage.uploads import Uploads
from .vm.registry import Registry, Vm

DELETE_AGAIN = 60.0  # seconds


@dataclass
class Context:
    layout: Layout
    policy: Policy
    loop: Loop
    host: Host
    registry: Registry = field(init=False)
    launcher: LauncherLink = field(init=False)
    jobs: Jobs = field(init=False)
    facts: Facts = field(init=False)
    images: Images = field(init=False)
    admission: Admission = field(init=False)
    machines: Machines = field(init=False)
    relay: RelayLink = field(init=False)
    addresses: Addresses = field(init=False)
    networks: Networks = field(init=False)
    resolving: Resolving = field(init=False)
    accounts: Accounts = field(init=False)
    uploads: Uploads = field(init=False)
    rates: Rates = field(init=False)
    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        self.registry = Registry(self.layout)
        self.launcher = LauncherLink(self.loop, self.host, self.layout)
        self.jobs = Jobs(self.loop, self.host, self.launcher)
        self.facts = Facts(self.jobs, self.layout, self.policy.host)
        self.images = Images(self.jobs, self.layout)
        self.uploads = Uploads(self)
        self.machines = Machines(self)
        places = self.policy.host.boots_at_once or os.cpu_count() or 1
        self.admission = Admission(self.loop, places, self.machines.qemu_pid)
        host = self.policy.host
        self.addresses = Addresses(self.layout.addresses, Plan(host.ipv4_pool, host.ipv6_pool, host.segment_prefix))
        self.networks = Networks(self)
        self.resolving = Resolving(self)
        self.accounts = Accounts(self.loop, self.host, self.layout, self._accounts_in_use, self.networks.refresh)
        self.rates = Rates(self.effective)
        self.turns = Turns(self.loop)
        self.relay = RelayLink(self.loop, self.host, self.layout, self.machines.heard, self.machines.watch_all)

    # --- the policy ---------------------------------------------------------------------------------------------------

    def effective(self, user: str) -> Effective:
        """What holds for *user* now; the account's groups only matter if the policy names any."""
        return self.policy.effective(user, self.accounts.groups_of(user) if self.policy.has_groups else ())

    def _accounts_in_use(self) -> Iterator[Question]:
        """Whom VMs, segments and the confinement of sockets depend on, whether anybody of them is here or not."""
        for uid, user in {(vm.uid, vm.owner) for vm in self.registry} | self.addresses.private().keys():
            yield Question("uid", uid)
            yield Question("user", user)
        if not self.layout.embedded and self.policy.host.ssh_forwarding:
            yield Question("members", self.policy.host.group)
            for uid in self.networks.upkeep.met:
                yield Question("uid", uid)
                yield Question("user", self.accounts.user_of(uid))

    def reload_policy(self) -> list[str]:
        """Take the policy file as it is now, or raise BadPolicy and keep the old one; returns what waits for a restart.

        VMs that run go on as they are: limits are asked when something is defined or booted. Only what is published follows at
        once, and how fast a card is.
        """
        new = read_policy(self.layout)
        later = [key for key, value in vars(new.host).items() if value != getattr(self.policy.host, key)]
        self.policy = replace(new, host=self.policy.host)
        note("policy-loaded", waits=", ".join(later))
        self.networks.refresh()
        return later

    # --- what several verbs end with ----------------------------------------------------------------------------------

    def remove(self, vm: Vm) -> None:
        """Delete a VM that is off. One rename makes it irrevocable; the files are deleted by a job."""
        aside = self.registry.set_aside(vm)
        self.registry.forget(vm)
        self.uploads.removed(vm)
        self.delete_later(aside)
        self.relay.send(Forget(number=vm.number, purge=True), lambda error: None)
        self.resolving.forget(vm)
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
            self.loop.after(DELETE_AGAIN, lambda: self.delete_later(folder))
        try:
            self.jobs.own(["rm", "-rf", "--one-file-system", "--", what], done)
        except OSError as exc:
            note("delete-failed", folder=folder, problem=exc)

    def _release(self, folder: str) -> None:
        """Give back the addresses of the VM that left *folder*, as `.rm-5`, if no other has its number by now."""
        number = folder.rpartition("-")[2]
        if number.isdecimal() and not self.registry.has_number(int(number)):
            self.addresses.release(int(number))


def read_policy(layout: Layout) -> Policy:
    """The policy as the file says it; raises BadPolicy."""
    return policies.load(layout.policy, session=layout.embedded)
