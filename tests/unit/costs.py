"""What a request costs the broker's one thread, counted in steps of Python's machine and not in seconds; and a broker to ask.

A step is one bytecode instruction, so a loop counts with each turn, also inside a comprehension. What a C function does with a
long text is one step: those that the broker uses take time linear in their arguments.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

from tests.fakes.accounts import People
from tests.fakes.parts import PartsWith
from vmshell import encoding
from vmshell.broker.api.server import Client, Server
from vmshell.broker.host.processes import Host
from vmshell.broker.lifecycle.runs import Run
from vmshell.broker.main import make_server
from vmshell.broker.runtime.call import Peer
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.vm.objects import Object, Store
from vmshell.broker.vm.vm import Published, Snapshot, Vm
from vmshell.errors import ProtocolError
from vmshell.layout import Layout
from vmshell.messages import RUNNING
from vmshell.model.definition import Definition, Disk, Nic
from vmshell.model.policy import parse

ALICE, ROOT = Peer(1000, "alice", admin=False), Peer(0, "root", admin=True)
POLICY = """
[host]
ipv4_pool = "10.0.0.0/8"
segment_prefix = 20
[defaults]
vms_max = 100000
running_max = 100000
user_cpus = 100000
user_memory = "900T"
user_disk = "900T"
user_snapshots = 100000
published_max = 4096
changes_per_minute = 0
boots_per_minute = 0
consoles_per_minute = 0
connections_per_minute = 0
disks_max = 32
nics_max = 16
user_nics = 100000
forward_ports = "2000-60000"
[networks.lan]
kind = "shared"
[networks.db]
kind = "service"
providers = ["alice"]
"""


def steps(action: Callable[[], object]) -> int:
    """How many bytecode instructions *action* takes, with all that it calls."""
    count = 0

    def step(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += 1
        return step

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return step

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


class Everybody(People):
    """Besides those who are named there is one of each uid, and all of them are in all groups."""

    def uid_of(self, user: str) -> int | None:
        return super().uid_of(user) or (int(user[1:]) if user[1:].isdecimal() else None)

    def user_of(self, uid: int) -> str:
        return super().user_of(uid) or f"u{uid}"

    def groups_of(self, user: str) -> frozenset[str]:
        return frozenset(self.groups)


class Bench:
    """A broker on an installed host, up to where jobs, launcher, relay and tapnet would be asked: those say nothing.

    alice has `web1`, which is off, `run1`, which runs, and a shelf. *others* VMs are other people's, *own* are further ones of
    hers, and all of them run; there are *objects* on her shelf and in `web1`, and *grants* of the two VMs named.
    """

    def __init__(self, folder: Path, *, others: int = 0, own: int = 0, objects: int = 3, grants: int = 3) -> None:
        layout = Layout(**{name: f"{folder}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)
        host = cast(Any, Host(embedded=True))
        host.listens = lambda port, proto: False
        people = Everybody({"alice": 1000, "root": 0}, {"staff": set(), "vmusers": set()})
        self.parts = parts = PartsWith(layout, parse(POLICY, "policy.toml"), Loop(_raise), host, accounts=people)
        self.server = make_server(parts)
        self.server._group = "vmusers"
        parts.turns.enter = lambda uid, action: action()  # type: ignore[method-assign]
        parts.capabilities.known = True
        parts.registry.load()
        parts.addresses.load()
        quiet: Any = lambda *arguments, **named: None  # noqa: E731
        for part, name in ((parts.jobs, "start"), (parts.jobs, "own"), (parts.relay, "send"), (parts.relay, "request")):
            setattr(part, name, quiet)
        for name in ("launch", "job", "kill", "terminate", "restart_names"):
            setattr(parts.launcher, name, quiet)
        parts.tapnet.request = quiet  # type: ignore[method-assign]
        parts.dnsmasq.begin()
        self._image(layout)
        self._people(own, others)
        self._alices(objects, grants)

    def _image(self, layout: Layout) -> None:
        os.makedirs(f"{layout.images}/demo")
        Path(layout.images, "demo/image.toml").write_text('[boot]\nkernel = "k"\n[sha256]\nk = "0"\n')
        Path(layout.images, "demo/k").touch()

    def _alices(self, objects: int, grants: int) -> None:
        web1, run1 = (self.vm(number, 1000, "alice", name) for number, name in ((1, "web1"), (2, "run1")))
        for vm in (web1, run1):
            os.makedirs(vm.store.folder)
            self.parts.registry.redefine(vm, vm.definition)
        self.run(run1)
        many = {f"o{index}.iso": Object("raw", 1 << 20) for index in range(objects)}
        shelf = self.parts.registry.shelf(1000, "alice")
        for store in (shelf, web1.store):
            os.makedirs(store.folder, exist_ok=True)
            store._write({**many, **({"root": Object("qcow2", 1 << 30)} if store is not shelf else {})})
        run1.store._objects = {"root": Object("qcow2", 1 << 30)}
        published = [Published(index % 60000 + 1, "tcp", f"u{2000 + index}") for index in range(grants)]
        web1.published, run1.published = list(published), list(published)
        web1.snapshots = {f"t{index}": Snapshot(f"t{index}", index, 1, 1, 'name = "web1"\n') for index in range(grants)}

    def _people(self, own: int, others: int) -> None:
        for index in range(own):
            vm = self.vm(100 + index, 1000, "alice", f"own{index}")
            vm.published = [Published(80, "tcp", "u2000")]
            self.run(vm)
        for index in range(others):
            self.run(self.vm(1_000_000 + index, 2000 + index // 4, f"u{2000 + index // 4}", f"vm{index % 4}"))

    def vm(self, number: int, uid: int, owner: str, name: str) -> Vm:
        """A VM that is off, in memory alone."""
        disks = (Disk("root"), Disk("shelf:o1.iso", type="cdrom", readonly=True))
        definition = Definition(name, disks=disks, nics=(Nic(), Nic("lan"), Nic("db")))
        vm = Vm(number, uid, owner, definition, 0, Store(f"{self.parts.layout.vm_state(uid, name)}/disks", name))
        self.parts.registry.add(vm)
        return vm

    def run(self, vm: Vm) -> None:
        """Have it run, with its interfaces attached."""
        vm.booted, vm.state = vm.definition, RUNNING
        parts = self.parts
        parts.addresses._log = cast(Any, SimpleNamespace(add=lambda *lines: None, wants_anew=lambda count: False))
        parts.runs.add(Run(vm))
        parts.attached.keep(vm, parts.interfaces.of(vm, vm.definition, give=True))

    def ask(self, body: dict[str, object], peer: Peer = ALICE) -> list[dict[str, Any]]:
        """What a packet with *body* is answered at once, by the code that would answer it."""
        client = _Client(self.server, peer)
        client._take(encoding.decode(encoding.encode(body)))
        return client.sent

    def close(self) -> None:
        self.parts.loop._epoll.close()


class _Client(Client):
    """Keeps what is sent; it must fit into a packet."""

    def __init__(self, server: Server, peer: Peer) -> None:
        self._server = server
        self.peer = peer
        self.pending = 0
        self.open = True
        self.sent: list[dict[str, Any]] = []

    def send(self, body: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        try:
            encoding.encode(body)
        except ProtocolError as exc:
            raise AssertionError(f"an answer that cannot be sent: {str(body)[:300]}") from exc
        self.sent.append(body)


def _raise(exc: BaseException) -> None:
    raise exc
