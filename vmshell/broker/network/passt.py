"""Session mode's way out: for each interface of kind `user` one passt, which speaks for the guest with our own sockets.

QEMU stays in a network of its own: all it has is a stream to our frame filter, which keeps from passt what would lead to the
host's loopback (B20; `--no-map-gw` keeps only the gateway's address from leading there). Without passt installed an interface
leads to QEMU's own small network, which ends there. The frame filter and passt end with their QEMU and with each other; QEMU
goes on.
Runs in: the broker, in session mode.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import time
from typing import TYPE_CHECKING

from ...refusals import NetworkFailed
from ...spawn import python
from ..runtime.log import note
from .interfaces import WITH_TAP

if TYPE_CHECKING:
    from ...model.shapes import Forward
    from ..host.processes import Host, Process
    from ..runtime.loop import Loop
    from ..vm.vm import Vm
    from .interfaces import Interface, Interfaces
    from .taps import Done

PASST = "/usr/bin/passt"
TRIES, TRY_AGAIN = 5, 0.1  # seconds
NOBODY = 65534  # what passt makes itself where root starts it
RESOLV_CONF, RESOLVED = "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"  # what systemd-resolved asks is in the second
SERVERS_MAX = 3  # passt takes no more of one family


def available() -> bool:
    return os.path.exists(PASST)


def _must_be_free(forward: Forward) -> None:
    """passt would go on without a port that somebody else has, and whoever asks for the guest would reach them."""
    kind = socket.SOCK_STREAM if forward.proto == "tcp" else socket.SOCK_DGRAM
    for left in reversed(range(TRIES)):
        with socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC) as sock:
            if forward.proto == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed a moment ago is free
            try:
                sock.bind(("127.0.0.1", forward.host))
                return
            except OSError as exc:
                if not left or exc.errno != errno.EADDRINUSE:
                    problem = f"port {forward.host} of this host cannot lead to the guest ({(exc.strerror or str(exc)).lower()})"
                    raise NetworkFailed(problem=f"{problem}; take another one for net.forward") from exc
        time.sleep(TRY_AGAIN)  # the passt of the run before may not have ended yet


def leads(forward: Forward) -> bool:
    """Is *forward*'s TCP port held by a program of ours? Without its passt any user of this host may take it.

    Asked of the kernel each time: a passt can end before its QEMU, and goes on while there is no broker.
    """
    place, uids = f"0100007F:{forward.host:04X}", {str(os.geteuid()), str(os.geteuid() or NOBODY)}
    with open("/proc/net/tcp", encoding="ascii") as file:
        return any(row[1] == place and row[3] == "0A" and row[7] in uids for row in map(str.split, file))  # 0A: TCP_LISTEN


def command(interface: Interface) -> list[str]:
    """One-off by nature: the descriptor is its only client."""
    words = [PASST, "--foreground", "--quiet", "--fd", "3", "--no-map-gw"]
    for proto, option in (("tcp", "-t"), ("udp", "-u")):
        ports = [f"127.0.0.1/{forward.host}:{forward.guest}" for forward in interface.nic.forward if forward.proto == proto]
        for port in ports or ["none"]:
            words += [option, port]
    if not _servers(RESOLV_CONF):  # the host asks itself, which a guest cannot: it asks whom the host asks then
        for server in _servers(RESOLVED)[:SERVERS_MAX]:
            words += ["--dns", server]
    return words


def _servers(path: str) -> list[str]:
    """The name servers of a resolv.conf that are no loopback's; without an interface, which passt does not take."""
    found = []
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for words in map(str.split, file):
            with contextlib.suppress(ValueError):
                if words[:1] == ["nameserver"] and not (address := ipaddress.ip_address(words[-1].partition("%")[0])).is_loopback:
                    found.append(str(address))
    return found


class Passt:
    """The passt processes of a session's VMs, each with the frame filter before it."""

    def __init__(self, *, host: Host, loop: Loop) -> None:
        self._host = host
        self._loop = loop

    def start_all(self, interfaces: list[Interface]) -> dict[int, int]:
        """QEMU's ends of the streams, by the interface's index, the taker's to close; raises NetworkFailed."""
        streams: dict[int, int] = {}
        for interface in interfaces:
            for forward in interface.nic.forward:
                _must_be_free(forward)
        try:
            for interface in interfaces:
                if interface.network.kind == "user" and available():
                    streams[interface.index] = self._start(interface)
        except OSError as exc:
            for fd in streams.values():
                os.close(fd)
            raise NetworkFailed(problem=f"passt cannot be started ({exc.strerror})") from exc
        return streams

    def _start(self, interface: Interface) -> int:
        """QEMU's end. Whoever cannot be started leaves nobody behind: a closed stream is the end of those at its other ends."""
        with contextlib.ExitStack() as stack:
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) for _ in range(2)]
            (qemu, above), (below, its) = [[stack.enter_context(sock) for sock in pair] for pair in pairs]
            self._spawn("passt", command(interface), {3: its.fileno()})
            self._spawn("framefilter", python("framefilter"), {3: above.fileno(), 4: below.fileno()})
            return qemu.detach()

    def _spawn(self, name: str, argv: list[str], fds: dict[int, int]) -> None:
        process = self._host.spawn(argv, fds)
        self._loop.watch(process.pidfd, lambda: self._ended(name, process))

    def _ended(self, name: str, process: Process) -> None:
        self._loop.unwatch(process.pidfd)
        note(f"{name}-ended", status=process.reap())


class SessionNetwork:
    """A session's VMs reach the outside by passt; there are no taps and nothing to take away."""

    def __init__(self, *, interfaces: Interfaces, passt: Passt) -> None:
        self._interfaces = interfaces
        self._passt = passt

    def attach(self, vm: Vm, done: Done) -> None:
        """Start a passt for each interface of *vm*'s next run; raises NetworkFailed for networks that a session has not."""
        interfaces = self._interfaces.of(vm, vm.booted or vm.definition, give=False)
        wanted = [interface for interface in interfaces if interface.network.kind in WITH_TAP]
        if wanted:
            problem = f"network {wanted[0].nic.network} is {wanted[0].network.kind}, and a session has only user and none"
            raise NetworkFailed(problem=problem)
        done(None, self._passt.start_all(interfaces))

    def add(self, vm: Vm, index: int, done: Done) -> None:
        """Make nothing: no interface can be added to a VM that runs in a session."""
        done(None, {})

    def remove(self, vm: Vm, indexes: set[int]) -> None:
        """Take nothing away: passt goes with its QEMU."""

    def ended(self, vm: Vm) -> None:
        """Take nothing away: passt goes with its QEMU."""
