"""The broker: start-up checks, sockets, then the loop. See `api/server.py` for what it does all day.

    python3 -IS …/vmshell/__main__.py broker LAYOUT

Rights, in system mode: none. It runs as an account of its own, which owns the records and disks of VMs; whatever needs another
uid the launcher does, whatever changes the network tapnet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys

from .. import wire
from ..errors import VmshellError
from ..layout import STATE_VERSION, Layout, read_state_version
from ..model.policy import Policy
from ..servicemanager import notify
from .api.revocation import Revocation
from .api.server import Server
from .composition import Parts
from .host.processes import Host
from .policies import read_policy
from .runtime import log
from .runtime.loop import Loop
from .services.front import Front

LINGER = 3.0  # seconds for which a session's broker stays when the last VM and the last shell are gone


def main(argv: list[str]) -> int:
    """Run the broker for the layout in `argv[0]`; returns its exit status. Refusals to start are one sentence on stderr."""
    layout = Layout.from_args(argv[0])
    os.chdir("/")
    os.umask(0o077)
    try:
        _check_state_version(layout)
        rules = read_policy(layout)
        with _only_one(layout):
            return _serve(layout, rules)
    except VmshellError as exc:
        print(f"broker: not started: {exc.sentence()}", file=sys.stderr)
        return exc.exit_status
    except OSError as exc:
        print(f"broker: not started: {exc}", file=sys.stderr)
        return 1


def _check_state_version(layout: Layout) -> None:
    """Refuse state of another version: a later one is not understood, an earlier one only half ours."""
    if layout.embedded:
        return  # no installer: it was always this account's
    found = read_state_version(layout)
    if found > STATE_VERSION:
        raise OSError(f"the state in {layout.state} is of version {found}, and this vmshell knows none after {STATE_VERSION}")
    if found < STATE_VERSION:
        raise OSError(f"the state in {layout.state} is not marked as of {STATE_VERSION}: `make install` brings it to that")


def _serve(layout: Layout, rules: Policy) -> int:
    loop = Loop(log.unexpected)
    parts = Parts(layout, rules, loop, Host(embedded=layout.embedded))
    leftovers = parts.registry.load()
    parts.addresses.load()
    os.makedirs(layout.run_vms, mode=0o750, exist_ok=True)
    parts.host.share_with_relay(layout.run_vms, 0o750)
    parts.accounts.begin()
    # Listen last: a shell that can connect must find a broker that knows its VMs.
    parts.adoption.adopt()
    for folder in leftovers:
        parts.removal.delete_later(folder)
    parts.launcher.connect()
    if not layout.embedded:
        parts.dnsmasq.begin()
        parts.tapnet.connect()
        parts.accounts.watch()
    parts.relay.connect()
    parts.capabilities.find_out()
    parts.adoption.autostart()
    server = make_server(parts)
    front = Front(loop, layout, server.admit)
    if not layout.embedded:
        front.connect()
        Revocation(
            loop=loop,
            group=parts.policies.host.group,
            accounts=parts.accounts,
            registry=parts.registry,
            relay=parts.relay,
            server=server,
        ).begin()
    _act_on_signals(parts)
    if layout.embedded:
        loop.after(LINGER, lambda: _linger(parts, server, 0))
    notify("READY=1")
    log.note("started", mode="session" if layout.embedded else "system", pid=os.getpid())
    loop.run()
    front.close()
    parts.accounts.close()
    parts.tapnet.close()
    parts.relay.close()
    parts.launcher.close()
    log.note("stopped", vms=sum(1 for vm in parts.registry if parts.runs.qemu_pid(vm)))
    return 0


def make_server(parts: Parts) -> Server:
    """Make what answers connections; a session's also listens."""
    embedded = parts.layout.embedded
    return Server(
        loop=parts.loop,
        embedded=embedded,
        policies=parts.policies,
        accounts=parts.accounts,
        registry=parts.registry,
        rates=parts.rates,
        turns=parts.turns,
        handlers=parts.handlers,
        met=(lambda uid: None) if embedded else parts.tapnet_sync.meet,
        left=parts.uploads.left,
        listener=wire.listen(parts.layout.broker_socket, 0o600) if embedded else None,
    )


def _linger(parts: Parts, server: Server, accepted: int) -> None:
    """End a session's broker when, since the last look, it has been of no use to anybody."""
    useful = server.connected() or server.accepted != accepted or len(parts.runs) or parts.jobs.running
    if useful:
        seen = server.accepted
        parts.loop.after(LINGER, lambda: _linger(parts, server, seen))
        return
    with contextlib.suppress(FileNotFoundError):
        os.unlink(parts.layout.broker_socket)
    parts.loop.stop()


@contextlib.contextmanager
def _only_one(layout: Layout):  # type: ignore[no-untyped-def]
    """Two brokers over one state directory would start a VM twice: the second one ends here."""
    os.makedirs(layout.run, mode=0o755, exist_ok=True)
    os.makedirs(layout.broker_run, mode=0o700, exist_ok=True)
    os.makedirs(layout.state, mode=0o700, exist_ok=True)
    fd = os.open(f"{layout.broker_run}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise OSError(f"another broker already serves {layout.run}") from None
    try:
        yield
    finally:
        os.close(fd)


def _act_on_signals(parts: Parts) -> None:
    """SIGTERM and SIGINT end the broker; VMs, relay and consoles go on. SIGHUP reads the policy again, or keeps the old one."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)

    def woken() -> None:
        numbers = os.read(reader, 64)
        if numbers.strip(bytes([signal.SIGHUP])):
            parts.loop.stop()
            return
        try:
            parts.policies.reload()
        except VmshellError as exc:
            log.note("policy-refused", problem=exc)

    parts.loop.watch(reader, woken)
