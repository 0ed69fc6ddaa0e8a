"""The broker's parts, each made with what its constructor names. Nothing else sees more than it is handed.

Runs in: the broker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from ..layout import Layout
from ..model.addressing import Plan
from ..model.policy import Policy
from .api.rates import Rates
from .api.turns import Turns
from .handlers.about import AboutHandlers
from .handlers.admin import AdminHandlers
from .handlers.define import DefineHandlers
from .handlers.explain import ExplainHandlers
from .handlers.network import NetworkHandlers
from .handlers.power import PowerHandlers
from .handlers.publish import PublishHandlers
from .handlers.snapshots import SnapshotHandlers
from .handlers.storage import StorageHandlers
from .handlers.table import Answering, Handlers
from .handlers.vms import VmHandlers
from .host.processes import Host
from .lifecycle.adopt import Adoption
from .lifecycle.boot import Boots
from .lifecycle.boot_queue import BootQueue
from .lifecycle.consoles import Consoles
from .lifecycle.define import Define
from .lifecycle.events import Events
from .lifecycle.launch_plan import LaunchPlans
from .lifecycle.live_update import LiveUpdate
from .lifecycle.removal import Removal
from .lifecycle.runs import Runs
from .lifecycle.start import Starter
from .lifecycle.stop import Stops
from .lifecycle.validate import Validation
from .network.addresses import Addresses
from .network.attached import Attached, Running
from .network.attachments import Attachments
from .network.dnsmasq import DnsmasqFiles
from .network.interfaces import Interfaces
from .network.openings import Openings
from .network.passt import Passt, SessionNetwork
from .network.tapnet_sync import TapnetSync
from .network.taps import Network
from .policies import Policies
from .runtime.loop import Loop
from .services.accounts import Accounts
from .services.accounts_helper import Question
from .services.capabilities import Capabilities
from .services.jobs import Jobs
from .services.launcher import Launcher
from .services.relay import Relay
from .services.tapnet import Tapnet
from .storage.create import NewDisks
from .storage.images import Images
from .storage.overlays import Overlays
from .storage.resolve import Resolver
from .storage.resources import Resources
from .storage.uploads import Uploads
from .vm.registry import Registry


class Parts:
    """All of them, for `main` and for tests; no part is handed this."""

    def __init__(self, layout: Layout, policy: Policy, loop: Loop, host: Host) -> None:
        self.layout = layout
        self.loop = loop
        self.host = host
        self._services(policy)
        self._storage()
        self._network()
        self._lifecycle()
        self.handlers: Handlers = self._handlers()

    def _services(self, policy: Policy) -> None:
        loop, host, layout = self.loop, self.host, self.layout
        self.registry = Registry(layout)
        self.launcher = Launcher(loop, host, layout)
        self.jobs = Jobs(loop, host, self.launcher)
        self.capabilities = Capabilities(self.jobs, layout, policy.host)
        self.accounts = Accounts(loop, host, layout, self._accounts_in_use, self.refresh)
        self.policies = Policies(
            layout=layout, policy=policy, groups_of=lambda user: self.accounts.groups_of(user), changed=self.refresh
        )
        self.relay = Relay(loop, host, layout, lambda event: self.events.heard(event), lambda: self.runs.watch_all())
        self.tapnet = Tapnet(loop, layout.tapnet_socket, lambda: self.attachments.tell_all())
        self.rates = Rates(self.policies.effective)
        self.turns = Turns(loop)

    def _storage(self) -> None:
        loop, host, registry, policies = self.loop, self.host, self.registry, self.policies
        self.images = Images(self.jobs, self.layout)
        self.resources = Resources(host=host, registry=registry, policies=policies)
        self.resolver = Resolver(policies=policies, resources=self.resources, images=self.images)
        self.new_disks = NewDisks(loop=loop, host=host, jobs=self.jobs, images=self.images)
        self.overlays = Overlays(host=host, jobs=self.jobs)
        self.uploads = Uploads(loop=loop, host=host, jobs=self.jobs, registry=registry, policies=policies)

    def _network(self) -> None:
        loop, registry, policies, accounts = self.loop, self.registry, self.policies, self.accounts
        where = policies.host
        self.addresses = Addresses(self.layout.addresses, Plan(where.ipv4_pool, where.ipv6_pool, where.segment_prefix))
        self.attached = Attached()
        self.interfaces = Interfaces(policies=policies, addresses=self.addresses, accounts=accounts, attached=self.attached.of)
        self.dnsmasq = DnsmasqFiles(
            folder=self.layout.names,
            loop=loop,
            registry=registry,
            interfaces=self.interfaces,
            attached=self.attached.of,
            restart=self.launcher.restart_names if self.host.systemd else lambda: None,
        )
        self.tapnet_sync = TapnetSync(
            loop=loop,
            tapnet=self.tapnet,
            policies=policies,
            accounts=accounts,
            interfaces=self.interfaces,
            attached=self.attached,
            look=self.openings,
        )
        self.attachments = Attachments(
            loop=loop,
            tapnet=self.tapnet,
            policies=policies,
            registry=registry,
            interfaces=self.interfaces,
            attached=self.attached,
            dnsmasq=self.dnsmasq,
            sync=self.tapnet_sync,
        )
        passt = Passt(host=self.host, loop=loop)
        session = SessionNetwork(interfaces=self.interfaces, passt=passt)
        self.network: Network = session if self.layout.embedded else self.attachments

    def _lifecycle(self) -> None:
        loop, layout, registry, relay = self.loop, self.layout, self.registry, self.relay
        self.removal = Removal(
            loop=loop,
            jobs=self.jobs,
            relay=relay,
            registry=registry,
            addresses=self.addresses,
            uploads=self.uploads,
            dnsmasq=self.dnsmasq,
        )
        self.runs = Runs(
            loop=loop,
            layout=layout,
            registry=registry,
            launcher=self.launcher,
            relay=relay,
            log_max=self.policies.host.log_size_max,
        )
        self.boot_queue = BootQueue(loop, self.policies.host.boots_at_once or os.cpu_count() or 1, self.runs.qemu_pid)
        self.validation = Validation(
            policies=self.policies,
            registry=registry,
            images=self.images,
            resolver=self.resolver,
            capabilities=self.capabilities,
        )
        self.live_update = LiveUpdate(
            registry=registry, resources=self.resources, attached=self.attached, network=self.network, runs=self.runs
        )
        self.define = Define(
            registry=registry,
            capabilities=self.capabilities,
            disks=self.new_disks,
            validation=self.validation,
            live=self.live_update,
            removal=self.removal,
        )
        self.launch_plans = LaunchPlans(
            host=self.host,
            policies=self.policies,
            registry=registry,
            capabilities=self.capabilities,
            resources=self.resources,
            resolver=self.resolver,
            interfaces=self.interfaces,
        )
        self.stops = Stops(
            loop=loop,
            registry=registry,
            relay=relay,
            runs=self.runs,
            queue=self.boot_queue,
            network=self.network,
            removal=self.removal,
            boot_again=lambda vm, waiting: self.boots.again(vm, waiting),
        )
        self.consoles = Consoles(relay=relay, runs=self.runs)
        self.boots = Boots(
            loop=loop,
            registry=registry,
            policies=self.policies,
            capabilities=self.capabilities,
            images=self.images,
            overlays=self.overlays,
            network=self.network,
            validation=self.validation,
            queue=self.boot_queue,
            starter=Starter(loop=loop, host=self.host, layout=layout, launcher=self.launcher, plans=self.launch_plans),
            live=self.live_update,
            runs=self.runs,
            end_now=self.stops.end_now,
            attach=self.consoles.attach_at_boot,
        )
        self.events = Events(registry=registry, runs=self.runs, boots=self.boots)
        self.adoption = Adoption(
            layout=layout,
            registry=registry,
            launcher=self.launcher,
            relay=relay,
            adopt_network=self.attachments.adopt,
            runs=self.runs,
            boots=self.boots,
            stops=self.stops,
            removal=self.removal,
        )

    def _handlers(self) -> Handlers:
        """Return what answers each request."""
        embedded, registry, policies = self.layout.embedded, self.registry, self.policies
        answering: list[Answering] = [
            VmHandlers(
                registry=registry,
                policies=policies,
                runs=self.runs,
                validation=self.validation,
                interfaces=self.interfaces,
                removal=self.removal,
            ),
            PowerHandlers(runs=self.runs, boots=self.boots, stops=self.stops, consoles=self.consoles),
            DefineHandlers(
                registry=registry, validation=self.validation, define=self.define, boots=self.boots, removal=self.removal
            ),
            StorageHandlers(
                layout=self.layout,
                registry=registry,
                policies=policies,
                resources=self.resources,
                disks=self.new_disks,
                uploads=self.uploads,
                define=self.define,
            ),
            SnapshotHandlers(registry=registry, policies=policies, validation=self.validation, runs=self.runs),
            NetworkHandlers(
                embedded=embedded,
                policies=policies,
                accounts=self.accounts,
                registry=registry,
                addresses=self.addresses,
                interfaces=self.interfaces,
                sync=self.tapnet_sync,
                attachments=self.attachments,
                look=self.openings,
            ),
            PublishHandlers(
                embedded=embedded,
                host=self.host,
                policies=policies,
                accounts=self.accounts,
                registry=registry,
                sync=self.tapnet_sync,
            ),
            ExplainHandlers(
                accounts=self.accounts,
                registry=registry,
                validation=self.validation,
                disks=self.new_disks,
                boots=self.boots,
            ),
            AdminHandlers(
                embedded=embedded,
                policies=policies,
                registry=registry,
                addresses=self.addresses,
                capabilities=self.capabilities,
                plans=self.launch_plans,
            ),
            AboutHandlers(
                embedded=embedded,
                host=self.host,
                policies=policies,
                registry=registry,
                images=self.images,
                capabilities=self.capabilities,
            ),
        ]
        return {request: answer for part in answering for request, answer in part.table().items()}

    # --- between parts ------------------------------------------------------------------------------------------------

    def openings(self, running: Running) -> Openings:
        """Look at what is published, given who runs."""
        look = partial(Openings, accounts=self.accounts, registry=self.registry, addresses=self.addresses)
        return look(running, policy=self.policies.policy)

    def refresh(self) -> None:
        """Policy, groups or accounts may have changed: tell tapnet what is different now."""
        if not self.layout.embedded:
            self.tapnet_sync.refresh()

    def _accounts_in_use(self) -> Iterator[Question]:
        """Whom VMs, segments and the confinement of sockets depend on, whether anybody of them is here or not."""
        for uid, user in {(vm.uid, vm.owner) for vm in self.registry} | self.addresses.private().keys():
            yield Question("uid", uid)
            yield Question("user", user)
        if not self.layout.embedded and self.policies.host.ssh_forwarding:
            yield Question("members", self.policies.host.group)
            for uid in self.tapnet_sync.met:
                yield Question("uid", uid)
                yield Question("user", self.accounts.user_of(uid))
