"""Somebody is put out of the group, or their account is deleted, while they are logged in (G18): by ssh on an installed host.

They lose what they have open and hear why; their VMs run on, and nobody else notices anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pexpect
import pytest

from tests.host.machine import Host

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 60  # seconds in which what takes at most 5 is to happen on a busy machine
NO_MEMBER = "you are no longer a member of the group vmusers"
DETACH = "\x1dd"


# Connects as its argument, and is root's again when it has a console.
HOLDER = """
import grp, os, sys
sys.path.insert(0, "/usr/local/lib/vmshell/current")
from vmshell import messages, wire
from vmshell.layout import Layout

os.setgroups([grp.getgrnam("vmusers").gr_gid])
os.seteuid(int(sys.argv[1]))
sock = wire.connect(Layout.system().broker_socket, 60)
os.seteuid(0)
wire.send(sock, {"id": 1, **messages.Console(vm="count").to_body()})
shown, typed = wire.take_fds(wire.recv(sock, fds_allowed=2))
print("attached", flush=True)
while data := os.read(shown, 65536):
    print(data, flush=True)
print("console ended", flush=True)
print(wire.recv(sock).body, flush=True)
assert wire.recv(sock) is None
print("connection ended", flush=True)
"""


@pytest.fixture(scope="module")
def users(host: Host) -> Iterator[Host]:
    """alice and bob, each with a VM that runs and counts keys, and carol, who has none and is to go."""
    host.put_image("counter")
    host.add_user("carol")
    for user in ("alice", "bob", "carol"):
        assert host.run(user, "new count --image counter --memory 32M")[0] == 0
        status, _, err = host.run(user, "boot count --wait 'counter ready' --timeout 120", timeout=150)
        assert status == 0, err
    yield host


class Person:
    """Logged in three times: at the console of `count`, at the prompt, and waiting for an answer."""

    def __init__(self, host: Host, user: str) -> None:
        self.user = user
        self.console = host.spawn(user, "console count", timeout=PATIENCE)
        self.console.expect_exact("console of count")
        self.console.send("x")
        self.console.expect_exact("counter 0000")
        self.prompt = host.spawn(user, timeout=PATIENCE)
        self.prompt.expect_exact("vmshell>")
        self.prompt.send("whoami\r")
        self.prompt.expect_exact(f"{user} (uid")
        self.waiting = host.spawn(user, "shutdown count --timeout 600", timeout=PATIENCE)
        self.waiting.expect_exact("waiting for count to switch itself off")

    def loses_everything(self, why: str) -> None:
        for session, status in ((self.console, 1), (self.waiting, 1)):
            session.expect_exact(why)
            session.expect(pexpect.EOF)
            session.close()
            assert session.exitstatus == status, session.before
        self.prompt.send("list\r")
        self.prompt.expect_exact(why)
        self.prompt.send("list\r")
        self.prompt.expect_exact("for members of the group vmusers only" if "member" in why else "for accounts of this host only")
        self.prompt.send("exit\r")
        self.prompt.expect(pexpect.EOF)


def qemus(host: Host) -> set[str]:
    return set(host.exec("pgrep", "-x", "qemu-system-x86").stdout.split())


def wait_for(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


@pytest.fixture
def bob(users: Host) -> Iterator[pexpect.spawn]:
    """bob's console, which is to notice nothing."""
    console = users.spawn("bob", "console count", timeout=PATIENCE)
    console.expect_exact("console of count")
    console.send("x")
    console.expect(r"counter [0-9A-F]{4}")
    yield console
    console.send("x")
    console.expect(r"counter [0-9A-F]{4}")
    assert "vmshell" not in console.before
    console.send(DETACH)
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0


def test_g18_who_leaves_the_group_hears_why_and_the_vm_counts_on(users: Host, bob: pexpect.spawn) -> None:
    alice, before = Person(users, "alice"), qemus(users)
    users.exec("gpasswd", "-d", "alice", "vmusers")
    alice.loses_everything(NO_MEMBER)
    assert qemus(users) == before
    lines = users.sh("journalctl -u vmshell-broker -o cat | grep access-ended")
    assert '"user": "alice", "connections": 3' in lines and '"consoles": "all"' in lines and "bob" not in lines

    users.exec("gpasswd", "-a", "alice", "vmusers")
    wait_for(lambda: users.run("alice", "list")[0] == 0)
    again = users.spawn("alice", "console count", timeout=PATIENCE)
    again.expect_exact("counter 0000")
    again.send("x")
    again.expect_exact("counter 0001")
    again.close(force=True)


def test_g18_whose_account_is_deleted_hears_it_too(users: Host, bob: pexpect.spawn) -> None:
    carol, before = Person(users, "carol"), qemus(users)
    users.exec("userdel", "-f", "carol")
    carol.loses_everything("the account carol is gone")
    assert qemus(users) == before
    assert users.admin("doctor", check=False).stdout != ""


def test_g18_user_remove_does_the_same(users: Host, bob: pexpect.spawn) -> None:
    """It ends the account's processes itself; what somebody else holds that was given to it ends by the broker."""
    before = qemus(users)
    holder = users.console("/usr/bin/python3", "-c", HOLDER, str(users.uid("alice")))
    holder.expect_exact("attached")
    users.admin("user", "remove", "alice", "--keep-account")
    holder.expect_exact(NO_MEMBER)
    holder.expect_exact("console ended")
    holder.expect_exact(NO_MEMBER)
    holder.expect_exact("connection ended")
    holder.expect(pexpect.EOF)
    assert qemus(users) == before
