"""What goes wrong on a host, as a user sees it: one sentence, the right exit status, nothing lost."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.host.machine import Host
from vmshell.errors import EX_UNAVAILABLE, EX_USAGE, EX_VM_FAILED
from vmshell.refusals import EX_LIMIT, EX_NO_SUCH

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

QEMU = "/usr/bin/qemu-system-x86_64"
FORGET_PROBE = "rm -f /run/vmshell/broker/host.json; systemctl restart vmshell-broker"


@pytest.fixture
def web1(host: Host) -> Iterator[Host]:
    host.put_image("echo")
    assert host.run("alice", "new web1 --image echo --memory 32M")[0] == 0
    yield host
    host.run("alice", "kill web1")
    assert host.run("alice", "rm web1 --yes")[0] == 0
    assert host.run("alice", "list --json")[1].count('"name"') == 0


def refused(host: Host, command: str, status: int) -> str:
    """What alice is told; on stderr, without a path or a stack, within two lines."""
    got, out, err = host.run("alice", command)
    assert (got, out) == (status, ""), (got, out, err)
    assert "Traceback" not in err
    assert "/var/" not in err
    assert "/run/" not in err
    assert 1 <= len(err.strip().splitlines()) <= 2, err
    return err


def boots(host: Host) -> None:
    """It boots, with nothing restarted by hand; bad news about the host is believed for a second."""
    time.sleep(1)
    assert host.run("alice", "boot web1 --wait ready --timeout 120", timeout=150)[0] == 0


def test_no_qemu(web1: Host) -> None:
    try:
        web1.sh(f"mv {QEMU} {QEMU}.away; {FORGET_PROBE}")
        assert "qemu" in refused(web1, "boot web1", EX_UNAVAILABLE).lower()
    finally:
        web1.sh(f"mv {QEMU}.away {QEMU}")
    boots(web1)  # found again without a restart of anything


def test_qemu_too_old(web1: Host) -> None:
    try:
        web1.sh(f"mv {QEMU} {QEMU}.away")
        web1.exec("tee", QEMU, stdin="#!/bin/sh\necho QEMU emulator version 6.2.0\n")
        web1.sh(f"chmod 755 {QEMU}; {FORGET_PROBE}")
        said = refused(web1, "boot web1", EX_UNAVAILABLE)
        assert "6.2" in said
        assert "7.2" in said
    finally:
        web1.sh(f"mv {QEMU}.away {QEMU}; {FORGET_PROBE}")
    boots(web1)


def test_no_bubblewrap(web1: Host) -> None:
    """R9, B39: a jail that cannot be built is no jail; nothing is started without it."""
    try:
        web1.sh(f"mv /usr/bin/bwrap /usr/bin/bwrap.away; {FORGET_PROBE}")
        assert "bwrap" in refused(web1, "boot web1", EX_UNAVAILABLE) or "bubblewrap" in refused(web1, "boot web1", EX_UNAVAILABLE)
        assert web1.exec("pgrep", "-f", "qemu-system", check=False).stdout == ""
    finally:
        web1.sh("mv /usr/bin/bwrap.away /usr/bin/bwrap")
    boots(web1)


def test_the_broker_is_down(web1: Host) -> None:
    boots(web1)
    pid = web1.sh("pgrep -f '[q]emu-system-x86_64 -name'").split()[0]
    try:
        web1.sh("systemctl stop vmshell-broker.socket vmshell-broker.service")
        for command in ("list", "boot web1", "console web1"):
            assert "does not answer" in refused(web1, command, EX_UNAVAILABLE)
        assert web1.sh("pgrep -f '[q]emu-system-x86_64 -name'").split()[0] == pid
    finally:
        web1.sh("systemctl start vmshell-broker.socket")
    assert "running" in web1.run("alice", "list")[1]


def test_a_damaged_image(web1: Host) -> None:
    disk = "/var/lib/vmshell/images/echo/disk.raw"
    web1.sh(f"cp -p {disk} /root/kept; chmod u+w {disk}; printf x | dd of={disk} conv=notrunc bs=1 seek=600 status=none")
    assert "damaged" in refused(web1, "boot web1", EX_VM_FAILED)
    web1.sh(f"cat /root/kept >{disk}; chmod a-w {disk}")
    boots(web1)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("nonsense verb", EX_USAGE),
        ("boot none", EX_NO_SUCH),
        ("new web2 --image none", EX_NO_SUCH),
        ("new web2 --image echo --colour red", EX_USAGE),
        ("new ../x --image echo", EX_USAGE),
        ("new a/b --image echo", EX_USAGE),
        (f"new {'a' * 300} --image echo", EX_USAGE),
        ("new wéb --image echo", EX_USAGE),
        ("new w\x1b[2Jb --image echo", EX_USAGE),
        ("new 'a\nb' --image echo", EX_USAGE),
        ("new web2 --image echo --memory 9000G", EX_LIMIT),
        ("new web2 --image echo --memory nan", EX_USAGE),
        ("new web2 --image echo --cpus 0", EX_USAGE),
        ("destroy web1", EX_USAGE),
    ],
)
def test_bad_input_over_ssh(web1: Host, command: str, status: int) -> None:
    said = refused(web1, command, status)
    assert all(char.isprintable() or char == "\n" for char in said)
    assert web1.run("alice", "list --json")[1].count('"name"') == 1
