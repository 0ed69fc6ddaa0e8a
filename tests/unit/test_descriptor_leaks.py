"""Whatever the host refuses, and whenever: every descriptor that a request made or brought is closed again (rows D07, F14).

Each verb is asked with the n-th call that could fail failing, for every n there is.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.costs import ALICE, Bench
from vmshell import wire
from vmshell.broker.api.server import Client
from vmshell.broker.network import attachments, passt
from vmshell.broker.network.attachments import _Batch
from vmshell.broker.network.taps import Taps
from vmshell.broker.services.connection import Answered, Connection
from vmshell.descriptors import check_stream
from vmshell.errors import VmshellError
from vmshell.messages import PIPES, Order, ToTapnet
from vmshell.refusals import NetworkFailed, RelayDown, StartFailed, Upgraded

pytestmark = pytest.mark.slow

CALLS = (
    *("open", "dup", "pipe2", "mkfifo", "set_blocking", "fstat", "stat", "fsync", "ftruncate", "unlink", "rename"),
    *("fchmod", "chmod", "makedirs", "listdir"),
)
REQUESTS: dict[str, dict[str, object]] = {
    "put": {"vm": "web1", "object": "new", "format": "file"},
    "put on the shelf": {"vm": "shelf", "object": "new", "format": "raw"},
    "disk-add": {"vm": "web1", "object": "new", "size": 4},
    "disk-add on the shelf": {"vm": "shelf", "object": "new", "size": 4, "format": "raw"},
    "console": {"vm": "run1", "consoles": PIPES},
    "display": {"vm": "run1"},
    "boot": {"vm": "web1", "console": True, "consoles": PIPES},
    "boot of what is thrown away": {"vm": "web1", "scratch": True},
    "set": {"vm": "run1", "set": {"cdrom0": "shelf:o2.iso"}},
    "new": {"vm": "new1", "image": "demo", "disk": 4},
    "define": {"vm": "new1", "text": 'name = "new1"\n[boot]\nkernel = "image:demo"\n', "once": True, "consoles": PIPES},
    "images": {},
    "objects": {"vm": "shelf"},
    "drop": {"vm": "shelf", "object": "o2.iso"},
    "rm": {"vm": "web1"},
    "publish": {"vm": "web1", "port": 99, "to": "@staff"},
}


class Failing:
    """Calls of the host's, of which the n-th fails."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: int) -> None:
        self.count = 0
        self._fails = fails
        for name in CALLS:
            patch.setattr(os, name, self._counted(getattr(os, name)))
        patch.setattr(socket, "socketpair", self._counted(socket.socketpair))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self._fails:
                raise OSError(errno.EMFILE, "Too many open files")
            return real(*arguments, **named)

        return call


def held() -> dict[str, str]:
    """Every descriptor of ours with what it leads to, once nobody refers to it any more."""
    gc.collect()
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the folder's own
    return found


@pytest.fixture(autouse=True)
def dnsmasq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "DNSMASQ", "/bin/true")


def bench(folder: Path, error: VmshellError | None) -> Bench:
    """A broker whose relay and tapnet answer at once, and whose jobs end at once; no launcher starts anything."""
    made = Bench(folder)
    parts: Any = made.parts
    parts.relay.send = lambda message, done, fds=(): done(error)
    parts.jobs.start = lambda kind, words, fds, done: done(int(error is not None), {"size": 5})
    parts.launcher.launch = lambda number, plan, fds, heard, ended: heard(StartFailed(vm=number, problem="no"), None)
    parts.tapnet.request = lambda message, answered: tap(message, answered, error)
    vm = made.parts.registry.get(1000, "run1")
    assert vm is not None
    vm.booted = replace(vm.definition, display="vnc")
    return made


def tap(message: ToTapnet, answered: Answered, error: VmshellError | None) -> None:
    packet = wire.Packet({}, [])
    if error is None and getattr(message, "create", False):
        packet.fds.append(fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3))  # tapnet's own affair, which does not fail here
    answered(error, packet)
    packet.close()


@pytest.mark.parametrize("error", [None, RelayDown()], ids=["answered", "refused"])
@pytest.mark.parametrize("what", REQUESTS)
def test_whatever_fails_no_descriptor_stays_open(tmp_path: Path, what: str, error: VmshellError | None) -> None:
    before = held()
    body = {"id": 1, "verb": what.split(" ")[0], **REQUESTS[what]}
    for fails in range(1, 300):
        folder = tmp_path / str(fails)
        folder.mkdir()
        broker = bench(folder, error)
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, fails)
            broker.ask(body, ALICE)
        broker.close()
        del broker
        assert held() == before, f"after call {fails}"
        if failing.count < fails:
            assert fails > 1 or what in ("publish", "display", "objects")
            return
    raise AssertionError("it makes no end of calls")


# --- what a descriptor is, and is not ---------------------------------------------------------------------------------


def strange(tmp_path: Path) -> Iterator[int]:
    """Descriptors that are no connected stream; the taker closes them."""
    path = str(tmp_path / "s.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        yield os.open(path, os.O_PATH)
    yield os.open(os.devnull, os.O_RDWR)
    yield os.open(tmp_path, os.O_RDONLY)
    yield os.memfd_create("x")
    yield socket.socket(socket.AF_INET).detach()
    yield socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach()
    reader, writer = os.pipe()
    os.close(writer)
    yield reader


def test_what_is_no_connected_stream_is_refused(tmp_path: Path) -> None:
    before = held()
    for fd in strange(tmp_path):
        with pytest.raises(ValueError, match="soc"):
            check_stream(fd)
        os.close(fd)
    assert held() == before


def test_whatever_comes_beside_a_request_is_refused_and_closed(tmp_path: Path) -> None:
    """8,000 descriptors in 1.5 s: each `put` with a file beside it left a copy of it open. Now no request brings one (N2)."""
    (tmp_path / "b").mkdir()
    broker = Bench(tmp_path / "b")
    broker.server._clients = {}
    before = held()
    for fd in strange(tmp_path):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            wire.send(ours, {"id": 1, "verb": "put", "vm": "web1", "object": "x", "format": "raw"}, (fd,))
            Client(broker.server, theirs, ALICE).readable()
            answer, ended = wire.recv(ours), wire.recv(ours)
        os.close(fd)
        assert answer is not None and ended is None
        assert answer.body["error"] == Upgraded().to_wire()
    assert held() == before


def test_a_descriptor_that_cannot_be_closed_without_an_error_keeps_no_other_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of FUSE may answer its last FLUSH with an error: close() says so, and has closed it."""
    before = held()
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(4)]
    real = os.close

    def troubled(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", troubled)
    wire.Packet({}, fds).close()
    monkeypatch.undo()
    assert held() == before


def test_copies_for_a_service_that_does_not_read_are_all_there_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, calls = held(), os.dup, []

    def scarce(fd: int) -> int:
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(fd)

    link = Connection.__new__(Connection)
    link._unsent = deque([({}, ())])
    link._sock = wire.Socket()
    monkeypatch.setattr(os, "dup", scarce)
    with pytest.raises(OSError, match="Too many"):
        link._send(Order(number=1, what="reset").to_body(), (0, 1, 2))
    link._sock.close()
    assert held() == before


def test_taps_are_closed_if_what_follows_from_them_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    broker = Bench(tmp_path / "b")
    before = held()
    vm = broker.parts.registry.get(1000, "web1")
    assert vm is not None
    ended: list[tuple[VmshellError | None, Taps]] = []
    broker.parts.network.attach(vm, lambda error, taps: ended.append((error, dict(taps))))
    monkeypatch.setattr(broker.parts.tapnet_sync, "open_ports", lambda: 1 // 0)
    batch: _Batch = broker.parts.attachments._coming[vm.number]
    for index in sorted(batch.indexes):
        batch.taker(index)(None, wire.Packet({}, [os.open(os.devnull, os.O_RDWR)]))
    ((error, taps),) = ended
    assert error is not None and error.code == "internal" and not taps
    assert held() == before


def test_passt_that_cannot_be_started_leaves_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    broker = Bench(tmp_path / "b")
    vm = broker.parts.registry.get(1000, "web1")
    assert vm is not None
    known = broker.parts.interfaces.known(vm)
    interfaces = [replace(interface, network=replace(interface.network, kind="user")) for interface in known]

    def refused(*arguments: object, **named: object) -> None:
        raise OSError(errno.EAGAIN, "Try again")

    monkeypatch.setattr(passt, "available", lambda: True)
    before = held()
    for fails in range(1, 6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(broker.parts.host, "spawn", refused)
            Failing(patch, fails)
            with pytest.raises(NetworkFailed):
                passt.Passt(host=broker.parts.host, loop=broker.parts.loop).start_all(interfaces)
        assert held() == before
