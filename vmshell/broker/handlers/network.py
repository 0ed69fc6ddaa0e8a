"""The verbs about networks: which there are, a VM's interfaces, where a guest's port is, the key its sshd showed.

Runs in: the broker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import BadValue, VmshellError
from ...messages import CREATING, RUNNING, Connect, HostKey, Net, NetHealth, Networks
from ...model.definition import Nic
from ...refusals import NotAllowed, NotConnected, VmBusy, WrongState
from ..network import passt
from ..network.interfaces import ADDRESSED, dns_name, names_user, tap_of
from ..runtime.files import kept
from ..runtime.log import by_user
from ..services.accounts_helper import Question

if TYPE_CHECKING:
    from ..network.addresses import Addresses
    from ..network.attached import Running
    from ..network.attachments import Attachments
    from ..network.interfaces import Interface, Interfaces
    from ..network.openings import Openings
    from ..network.tapnet_sync import TapnetSync
    from ..policies import Policies
    from ..runtime.call import Call
    from ..services.accounts import Accounts
    from ..vm.registry import Registry
    from ..vm.vm import Vm
    from .table import Handlers

FIGURES = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")
HOST_KEY_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=-@. ")
HOST_KEYS_MAX, HOST_KEY_MAX = 8, 1200  # characters: RSA with 8,192 bits has 1,100


class NetworkHandlers:
    """Tells about networks and interfaces, and where a guest is reached."""

    def __init__(
        self,
        *,
        embedded: bool,
        policies: Policies,
        accounts: Accounts,
        registry: Registry,
        addresses: Addresses,
        interfaces: Interfaces,
        sync: TapnetSync,
        attachments: Attachments,
        look: Callable[[Running], Openings],
    ) -> None:
        self._embedded = embedded
        self._policies = policies
        self._accounts = accounts
        self._registry = registry
        self._addresses = addresses
        self._interfaces = interfaces
        self._sync = sync
        self._attachments = attachments
        self._look = look

    def table(self) -> Handlers:
        """Return which request is answered by which method."""
        return {
            Networks: self._networks,
            Net: self._net,
            NetHealth: self._net_health,
            Connect: self._connect,
            HostKey: self._host_key,
        }

    def _networks(self, call: Call, request: Networks) -> None:
        """The networks that the peer may use, and how many of its interfaces are on each."""
        peer, host = call.peer, self._policies.host
        interfaces = [device for vm in self._registry.of(peer.uid) for device in vm.definition.devices().values()]
        used = Counter(interface.network for interface in interfaces if isinstance(interface, Nic))
        rows = []
        for name in self._policies.policy.networks_for(peer.user, self._accounts.groups_of(peer.user)):
            network = self._policies.catalogues.networks[name]
            addressed = network.kind in ADDRESSED
            segment = self._addresses.known(name, (peer.uid, peer.user) if network.kind == "private" else None, subnet=addressed)
            subnet = self._addresses.plan.subnet4(segment) if segment is not None and addressed else ""
            six = self._addresses.plan.gateway6(segment) if subnet and segment is not None else ""
            role = "member"
            if network.kind == "service":
                role = "provider" if names_user(network.providers, peer.user, self._accounts.groups_of) else "consumer"
            facts = {"name": name, "kind": network.kind, "subnet": str(subnet), "subnet6": six.replace("::1/", "::/")}
            outside = network.outside if network.kind in ADDRESSED else "none" if network.kind == "none" else "all"
            rows.append({**facts, "outside": outside, "isolated": network.isolated, "role": role, "cards": used[name]})
        call.reply({"networks": rows, "domain": host.dns_domain})

    def _net(self, call: Call, request: Net, vm: Vm) -> None:
        interfaces, domain = self._interfaces.known(vm), self._interfaces.domain_of(vm.owner, vm.uid)
        granted = set(self._look([]).granted(vm))
        call.reply(
            {
                "name": vm.ref,
                "state": vm.state,
                "domain": self._policies.host.dns_domain,
                "cards": [self._row(vm, interfaces, interface, domain) for interface in interfaces],
                "published": [{**vars(item), "open": item in granted} for item in vm.published],
            }
        )

    def _row(self, vm: Vm, interfaces: list[Interface], interface: Interface, domain: str) -> dict[str, object]:
        tap = tap_of(vm, interface)
        return {
            "name": interface.name,
            "network": interface.nic.network,
            "kind": interface.network.kind,
            "model": interface.nic.model,
            "mac": interface.mac,
            "address": interface.address4,
            "address6": interface.address6,
            "link": interface.nic.link,
            "tap": tap,
            "dns": dns_name(domain, vm, interfaces, interface),
            "forward": [str(forward) for forward in interface.nic.forward],
            "rate": self._sync.rate(vm, interface) if tap else 0,
            **{name: _figure(tap, name) for name in FIGURES},
        }

    def _net_health(self, call: Call, request: NetHealth) -> None:
        """What tapnet says of the kernel and of itself; of how many accounts the sockets are confined."""
        if not call.peer.admin:
            raise NotAllowed(what="the state of the host's network", who="administrators")

        def answered(error: VmshellError | None, health: dict[str, object]) -> None:
            if error:
                call.fail(error)
            else:
                call.reply({**health, "confined": self._sync.confined()})

        host = self._policies.host
        # Whoever has just made somebody a member, or no longer one, asks for this: what was known a moment ago does not do (A06).
        self._accounts.look()
        members = [Question("members", host.group)] if host.ssh_forwarding else []
        self._accounts.when_known(members, lambda: call.guard(lambda: self._attachments.health(request.repair, answered)))

    def _connect(self, call: Call, request: Connect, vm: Vm) -> None:
        """Say where the guest's port is. The peer connects by itself: what it may reach is decided by whose socket it is."""
        if vm.state != RUNNING:
            raise WrongState(vm=vm.ref, state=vm.state, verb="connect", needed="running")
        if self._embedded:
            address, port = "127.0.0.1", _forwarded(vm, request.port)
        else:
            address, port = self._interfaces.address(vm), request.port
        if not address:
            raise NotConnected(vm=vm.ref, problem="it has no interface on a network with addresses")
        by_user(call.peer.uid, "connect", number=vm.number, owner=vm.owner, vm=vm.name, port=request.port)
        call.reply({"name": vm.ref, "address": address, "port": port})

    def _host_key(self, call: Call, request: HostKey, vm: Vm) -> None:
        """Remember the keys of the guest's first answer: later ones are compared with them, until they are to be forgotten."""
        if vm.state == CREATING:
            raise VmBusy(vm=vm.ref, state=vm.state)
        vm.must_be_recorded("host-key")
        keys = vm.host_keys
        if request.forget:
            keys = []
        elif request.keys and not vm.host_keys:
            bad = [
                key for key in request.keys if not HOST_KEY_CHARS.issuperset(key) or len(key) > HOST_KEY_MAX or key.count(" ") < 1
            ]
            if bad or len(request.keys) > HOST_KEYS_MAX:
                rule = f"at most {HOST_KEYS_MAX} lines like: ssh-ed25519 AAAA…"
                raise BadValue(field="keys", value=(bad or [""])[0][:40], rule=rule)
            keys = list(request.keys)
        if keys != vm.host_keys:
            with kept(vm, "host_keys"):
                vm.host_keys = keys
                self._registry.save(vm)
            by_user(call.peer.uid, "host-key", number=vm.number, owner=vm.owner, vm=vm.name, forget=request.forget)
        call.reply({"name": vm.ref, "keys": vm.host_keys})


def _figure(tap: str, name: str) -> int:
    """A counter of the kernel's. What the guest receives is what the host sends into its tap."""
    other = name.replace("rx", "TX").replace("tx", "rx").replace("TX", "tx")
    try:
        with open(f"/sys/class/net/{tap}/statistics/{other}", encoding="ascii") as file:
            return int(file.read(32)) if tap else 0
    except (OSError, ValueError):
        return 0


def _forwarded(vm: Vm, port: int) -> int:
    """In session mode a guest is reached by the ports of ours that lead to it; which of them leads to *port*?"""
    nics = (vm.booted or vm.definition).nics
    forward = next((item for nic in nics for item in nic.forward if (item.proto, item.guest) == ("tcp", port)), None)
    if forward is None:
        free = port if port >= 10_000 else port + 10_000
        problem = f"no port leads there: set {vm.name} net0.forward=tcp:{free}:{port}, then boot it again"
        raise NotConnected(vm=vm.ref, problem=problem)
    if not passt.leads(forward):
        cure = "boot it again" if passt.available() else "apt-get install passt, then boot it again"
        raise NotConnected(vm=vm.ref, problem=f"no passt leads to it: {cure}")
    return forward.host
