"""`make install` over the last version whose broker was root, with VMs running and somebody at a console; and the way back to it.

The tests are one story and run in this order. What happens to the files, step by step: test_migration_files.py.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.guests import WRITTEN
from tests.host.machine import CHECKOUT, PARTS, TREE, Host
from vmshell.layout import STATE_VERSION

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

BEFORE = "3e16c3802e49ee5f69a68b58a5c21e819f60d0fb"
LONG = 120  # seconds for an emulated guest on a busy machine
UPGRADED = "vmshell was upgraded: log in again"
STATE, RUN = "/var/lib/vmshell", "/run/vmshell"
# Every process that is a QEMU, by pid and start; of our own uids, which no other host's processes have in here.
QEMUS = "ps -eo pid,lstart,uid,comm | grep -w qemu-system-x86 | sort"


@pytest.fixture(scope="module")
def old_tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tree of `BEFORE`, out of this repository's history."""
    if not Path(TREE, ".git").exists():
        pytest.skip("this tree has no history, so the version before is not at hand")
    git = ["git", "-c", "safe.directory=*", "-C", TREE]
    if subprocess.run([*git, "cat-file", "-e", BEFORE], capture_output=True).returncode != 0:
        pytest.skip(f"this clone's history does not reach back to {BEFORE[:7]}, the version before")
    done = subprocess.run([*git, "archive", BEFORE, *PARTS], capture_output=True, check=True)
    folder = tmp_path_factory.mktemp("before")
    subprocess.run(["tar", "-C", str(folder), "-xf", "-"], input=done.stdout, check=True)
    return str(folder)


@pytest.fixture(scope="module")
def old_host(bare_host: Host, old_tree: str) -> Host:
    """A host with the version before, alice, bob and three images."""
    bare_host.install(old_tree)
    for name in ("alice", "bob"):
        bare_host.add_user(name)
    for image in ("counter", "writer", "echo"):
        bare_host.put_image(image)
    return bare_host


class AtConsole:
    """Somebody at the console of a guest that says *ready* when it is."""

    ready: str

    def __init__(self, host: Host, user: str, name: str) -> None:
        self._host, self._user, self._name = host, user, name
        self.attach()

    def attach(self) -> None:
        self.session = self._host.spawn(self._user, f"console {self._name}", timeout=LONG)
        self.session.expect_exact(self.ready, timeout=LONG)

    def attach_again(self) -> None:
        """In a new session: what a console is differs between the two versions, so that of before the change is over."""
        self.session.close(force=True)
        self.attach()

    def is_told_to_log_in_again(self) -> None:
        self.session.expect_exact(UPGRADED, timeout=LONG)
        self.session.expect_exact([pexpect.EOF], timeout=LONG)


class Counter(AtConsole):
    """At the console of a guest that counts keys: whether it is the same guest, its memory says."""

    ready = "counter ready"

    def __init__(self, host: Host, user: str, name: str) -> None:
        super().__init__(host, user, name)
        self.count = 0

    def press(self) -> None:
        """Press a key and see the next number."""
        self.session.send("x")
        self.session.expect_exact(f"counter {self.count:04X}", timeout=LONG)
        self.count += 1


class Writer(AtConsole):
    """At the console of a guest that writes to its disk."""

    ready = "writer ready"

    def says(self, key: str, answer: str) -> None:
        self.session.send(key)
        self.session.expect_exact(answer, timeout=LONG)


@pytest.fixture(scope="module")
def counter(old_host: Host) -> Iterator[Counter]:
    """alice, logged in and at the console of `count`."""
    make(old_host, "alice", "count", "counter")
    at_console = Counter(old_host, "alice", "count")
    for _ in range(3):
        at_console.press()
    yield at_console
    at_console.session.close(force=True)


@pytest.fixture(scope="module")
def writer(old_host: Host) -> Iterator[Writer]:
    """bob, at the console of `disk`, to which he has written."""
    make(old_host, "bob", "disk", "writer")
    at_console = Writer(old_host, "bob", "disk")
    at_console.says("w", "write ok")
    yield at_console
    at_console.session.close(force=True)


@pytest.fixture(scope="module")
def prompt(old_host: Host) -> Iterator[pexpect.spawn]:
    """bob, logged in with the version before, at the prompt."""
    terminal = old_host.spawn("bob", timeout=LONG)
    terminal.expect_exact("vmshell>")
    yield terminal
    terminal.close(force=True)


def make(host: Host, user: str, name: str, image: str) -> None:
    said(host, user, f"new {name} --image {image} --memory 32M")
    said(host, user, f"boot {name}")


def said(host: Host, user: str, command: str) -> str:
    status, out, err = host.run(user, command, timeout=LONG)
    assert status == 0, f"{command}: {out}{err}"
    return out


def story(host: Host) -> dict[str, dict[str, object]]:
    """What alice and bob are told of their VMs and limits, less what the clock changes."""
    told: dict[str, dict[str, object]] = {}
    for user in ("alice", "bob"):
        told[f"{user}'s account"] = account = json.loads(said(host, user, "whoami --json"))
        # Less the rates, too, which the version before did not know.
        account["limits"] = {key: value for key, value in account["limits"].items() if not key.endswith("_per_minute")}
        for vm in json.loads(said(host, user, "list --json"))["vms"]:
            told[vm["name"]] = {key: value for key, value in vm.items() if key != "uptime"}
    return told


def assert_same_story(host: Host, before: dict[str, dict[str, object]]) -> None:
    """Wait until they are told the same as before: what the relay knows of a VM comes a moment after the broker's start."""
    end = time.monotonic() + LONG
    while (now := story(host)) != before and time.monotonic() < end:
        time.sleep(0.5)
    changed = {(name, key): (value, now[name].get(key)) for name, row in before.items() for key, value in row.items()}
    assert not {place: values for place, values in changed.items() if values[0] != values[1]}
    assert now.keys() == before.keys()


def owners(host: Host) -> set[str]:
    return set(host.sh(f"find {STATE}/vms {STATE}/shelf {RUN}/vms -printf '%u\\n'").split())


def grouped(host: Host) -> str:
    """What is the relay's by its group: by that it finds the sockets of VMs from before."""
    return host.sh(f"find {RUN}/vms \\( -type d -o -type s \\) -printf '%p %m %g\\n' | sort")


def test_nothing_ends(old_host: Host, counter: Counter, writer: Writer, prompt: pexpect.spawn) -> None:
    """One `make install`: the same processes, the same memory, disk and limits; who is at a console is told to log in again."""
    said(old_host, "alice", "new idle --image echo --memory 32M")
    said(old_host, "alice", "disk add idle more --size 1M")
    assert old_host.run("alice", "put shelf.notes.img", stdin="n" * 4096)[0] == 0
    assert owners(old_host) == {"root"}
    qemus, before, groups = old_host.sh(QEMUS), story(old_host), grouped(old_host)
    assert len(qemus.splitlines()) == 2
    old_host.install()
    assert old_host.sh(QEMUS) == qemus
    for somebody in (counter, writer):
        somebody.is_told_to_log_in_again()
        somebody.attach_again()
    for _ in range(3):
        counter.press()
    writer.says("r", f"read {WRITTEN}")
    writer.says("w", "write ok")
    assert_same_story(old_host, before)
    assert owners(old_host) == {"vmshell-broker"} and grouped(old_host) == groups
    assert old_host.exec("cat", f"{STATE}/version").stdout.startswith(f"state {STATE_VERSION} vmshell ")


def test_who_was_logged_in_keeps_his_code(old_host: Host, prompt: pexpect.spawn) -> None:
    """The old code lies where it was while a session of before has it, in which all goes on but a console or `put`."""
    old_host.sh("test -e /usr/local/lib/vmshell/vmshell/shell/later.py")
    for command, told in (("list", "running"), ("console disk", UPGRADED), ("list", "running")):
        prompt.sendline(command)
        prompt.expect_exact(told)
        prompt.expect_exact("vmshell>")


def test_the_second_time_changes_nothing(old_host: Host, counter: Counter, writer: Writer) -> None:
    kept = f"find /etc /usr/local {STATE} -type f ! -path '{STATE}/vms/*/disks/*' -printf '%p %i %m %u %g %s %T@ %C@\\n' | sort"
    qemus, files = old_host.sh(QEMUS), old_host.sh(kept).splitlines()
    assert "of version" not in old_host.make("install").stdout
    assert old_host.sh(kept).splitlines() == files
    assert old_host.sh(QEMUS) == qemus
    counter.press()
    writer.says("r", f"read {WRITTEN}")


def test_without_the_mark_no_broker_starts_and_clients_wait(old_host: Host) -> None:
    """So it is while files are given: whoever asks then is answered when all is done, and sees no error."""
    old_host.sh(f"mv {STATE}/version /root/; systemctl --no-block restart vmshell-broker")
    asking = old_host.spawn("alice", "list", timeout=LONG)
    with pytest.raises(pexpect.TIMEOUT):
        asking.expect_exact("count", timeout=3)
    assert old_host.exec("systemctl", "is-active", "vmshell-broker", check=False).stdout.strip() != "active"
    assert old_host.exec("systemctl", "is-active", "vmshell-broker.socket").stdout.strip() == "active"
    old_host.sh(f"mv /root/version {STATE}/")
    asking.expect_exact("count")
    asking.expect_exact([pexpect.EOF])
    asking.close()
    assert asking.exitstatus == 0


def test_vms_of_before_are_stopped_and_started(old_host: Host, writer: Writer) -> None:
    """Through the launcher, which did not start them: their end, and a boot from the disk that they wrote."""
    said(old_host, "bob", "kill disk")
    writer.session.expect_exact([pexpect.EOF])
    said(old_host, "bob", "boot disk")
    again = Writer(old_host, "bob", "disk")
    again.says("r", f"read {WRITTEN}")
    again.session.close(force=True)
    said(old_host, "alice", "boot idle")
    done = old_host.admin("doctor", check=False)
    assert done.returncode == 0, done.stdout


def test_the_way_back(old_host: Host, old_tree: str, counter: Counter) -> None:
    """As it is printed: the newer tree's `back`, then the older one's `make install`. VMs of both versions run on."""
    qemus, before = old_host.sh(QEMUS), story(old_host)
    given = old_host.sh(f"cat {STATE}/net/addresses.log")
    old_host.exec("sh", f"{CHECKOUT}/etc/migrate.sh", "back")
    assert owners(old_host) == {"root"}
    known = json.loads(old_host.sh(f"cat {STATE}/addresses.json"))
    cards = {tuple(line[1:]) for line in map(json.loads, given.splitlines()) if line[0] == "card"}
    assert cards and cards == {(int(at), name, host) for at, row in known["cards"].items() for name, host in row.items()}
    old_host.install(old_tree)
    assert old_host.sh(QEMUS) == qemus
    counter.attach_again()
    assert_same_story(old_host, before)
    counter.press()
    left = old_host.sh(f"ls /usr/local/lib/systemd/system {RUN} {STATE}").split()
    assert not [name for name in left if "launcher" in name or name in ("version", "net", "broker")]
    assert old_host.sh("systemctl --failed --no-legend --plain").strip() == ""
    said(old_host, "bob", "kill disk")
    said(old_host, "bob", "boot disk")


def test_and_forward_again_however_often_killed(old_host: Host, counter: Counter) -> None:
    """kill -9 at moments all over it, each time further; the run that is let through completes it."""
    qemus, before = old_host.sh(QEMUS), story(old_host)
    old_host.put_tree()
    for tenths in range(1, 16):
        old_host.sh(f"timeout -s KILL {tenths / 10} make -s -C {CHECKOUT} install", check=False)
        assert old_host.sh(QEMUS) == qemus, f"after {tenths / 10} s"
    old_host.make("install")
    assert old_host.sh(QEMUS) == qemus
    counter.attach_again()
    assert_same_story(old_host, before)
    counter.press()
    said(old_host, "alice", "kill count")
    assert owners(old_host) == {"vmshell-broker"}
