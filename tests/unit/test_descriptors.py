"""What `vmshell/descriptors.py` takes for what: every kind of descriptor against every check."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmshell import descriptors

OWNER = os.geteuid()
SOMEBODY = 12345


@pytest.fixture
def kinds(tmp_path: Path) -> Iterator[dict[str, int]]:
    """One descriptor of each kind there is, by name."""
    with ExitStack() as stack:
        made: dict[str, int] = {}

        def keep(name: str, fd: int) -> None:
            stack.callback(os.close, fd)
            made[name] = fd

        def file(name: str, flags: int, mode: int = 0o600, uid: int = OWNER) -> None:
            path = tmp_path / name
            path.touch()
            keep(name, os.open(path, flags))
            os.chmod(path, mode)
            if uid != OWNER:
                os.chown(path, uid, uid)

        file("read", os.O_RDONLY)
        file("write", os.O_WRONLY)
        file("both", os.O_RDWR)
        file("path", os.O_PATH)
        if OWNER == 0:
            file("theirs", os.O_RDONLY, uid=SOMEBODY)
            file("theirs-public", os.O_RDONLY, 0o644, uid=SOMEBODY)
            file("theirs-both", os.O_RDWR, 0o644, uid=SOMEBODY)
        keep("folder", os.open(tmp_path, os.O_RDONLY))
        keep("device", os.open("/dev/null", os.O_RDWR))
        reader, writer = os.pipe()
        keep("pipe-read", reader)
        keep("pipe-write", writer)
        os.mkfifo(tmp_path / "fifo")
        keep("fifo", os.open(tmp_path / "fifo", os.O_RDWR))
        keep("fifo-path", os.open(tmp_path / "fifo", os.O_PATH))
        keep("memory", os.memfd_create("m"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "s"))
        keep("bound", os.dup(listener.fileno()))
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(tmp_path / "l"))
        other.listen()
        keep("listener", other.detach())
        listener.close()
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        keep("stream", one.detach())
        keep("stream-other", two.detach())
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        keep("packets", one.detach())
        keep("packets-other", two.detach())
        keep("tcp", socket.socket(socket.AF_INET).detach())
        packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        packets.bind(str(tmp_path / "p"))
        packets.listen()
        keep("packets-listener", packets.detach())
        yield made


TAKES: dict[Callable[[int], None], set[str]] = {
    lambda fd: descriptors.check_read_file(fd, OWNER): {"read", "theirs-public"},
    lambda fd: descriptors.check_written_file(fd, OWNER): {"both", "memory"},
    descriptors.check_listener: {"listener"},
    descriptors.check_stream: {"stream", "stream-other"},
    descriptors.check_pipe: {"pipe-read", "pipe-write", "fifo"},
    lambda fd: descriptors.check_pipe(fd, os.O_RDWR): {"fifo"},
    lambda fd: descriptors.check_pipe(fd, os.O_WRONLY): {"pipe-write"},
    lambda fd: descriptors.check_tap(fd, "vt000001n0"): set(),
}


@pytest.mark.parametrize("check", TAKES)
def test_a_check_takes_its_kind_and_no_other(kinds: dict[str, int], check: Callable[[int], None]) -> None:
    taken = set()
    for name, fd in kinds.items():
        try:
            check(fd)
            taken.add(name)
        except ValueError as exc:
            assert str(exc)
    assert taken == TAKES[check] & set(kinds)
    for fd in kinds.values():
        os.fstat(fd)  # none was closed by being looked at


@pytest.mark.root
def test_a_tap_is_known_by_its_name() -> None:
    """In a network namespace of its own, where taps may have any name."""
    if OWNER != 0 or not os.path.exists("/dev/net/tun"):
        pytest.skip("making a tap needs root and /dev/net/tun")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            import ctypes

            assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0
            made = {}
            for name, flags in (("vt000001n0", 0x1002), ("vt000002n0", 0x5002), ("vt000003n0", 0x1001)):
                made[name] = os.open("/dev/net/tun", os.O_RDWR)
                fcntl.ioctl(made[name], 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
            descriptors.check_tap(made["vt000001n0"], "vt000001n0")
            descriptors.check_tap(made["vt000002n0"], "vt000002n0")
            for own, name in (("vt000001n0", "vt000001n1"), ("vt000003n0", "vt000003n0")):
                with pytest.raises(ValueError, match="tap|Ethernet"):
                    descriptors.check_tap(made[own], name)
            with pytest.raises(ValueError, match="no tap"):
                descriptors.check_tap(os.open("/dev/net/tun", os.O_RDWR), "vt000001n0")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
