"""The broker's parts, put together once. Runs in: the broker."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..layout import Layout
from .admission import Admission
from .facts import Facts
from .host import Host
from .images import Images
from .jobs import Jobs
from .loop import Loop
from .machine import Machines
from .policy import Policy
from .relaylink import RelayLink
from .vms import Registry


@dataclass
class Context:
    layout: Layout
    policy: Policy
    loop: Loop
    host: Host
    registry: Registry = field(init=False)
    jobs: Jobs = field(init=False)
    facts: Facts = field(init=False)
    images: Images = field(init=False)
    admission: Admission = field(init=False)
    machines: Machines = field(init=False)
    relay: RelayLink = field(init=False)

    def __post_init__(self) -> None:
        self.registry = Registry(self.layout)
        self.jobs = Jobs(self.loop, self.host)
        self.facts = Facts(self.jobs, self.host, self.layout, self.policy.host)
        self.images = Images(self.jobs, self.host, self.layout)
        self.machines = Machines(self)
        places = self.policy.host.boots_at_once or os.cpu_count() or 1
        self.admission = Admission(self.loop, places, self.machines.qemu_pid)
        self.relay = RelayLink(self.loop, self.host, self.layout, self.machines.heard, self.machines.watch_all)
