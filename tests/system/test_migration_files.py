"""What etc/migrate.sh does with files, on a host whose old state is made up: owners, places, killed at every step, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.host.machine import CHECKOUT, Host
from vmshell import __version__

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

STATE, RUN = "/var/lib/vmshell", "/run/vmshell"
MIGRATE = f"{CHECKOUT}/etc/migrate.sh"
SHIMS, STEP = "/root/shims", "/root/step"
UNITS = "/usr/local/lib/systemd/system"

# As the broker that was root left it: a VM that is off, one that runs, a shelf. And what it never made: a link out of the tree.
MAKE_OLD = f"""
rm -rf {STATE} {RUN}; mkdir -p -m 700 {STATE}; mkdir -m 755 {RUN}; umask 077
cd {STATE}; mkdir -p vms/1000/web1/disks vms/1001/db/disks vms/1001/.rm-9 shelf/1000/media images/demo
for file in vms/next vms/1000/web1/record.json vms/1000/web1/disks/disk0 vms/1001/db/vm.toml vms/1001/.rm-9/x \\
    shelf/1000/media/iso images/demo/disk.raw addresses.json; do echo $file >$file; done
chmod 444 shelf/1000/media/iso images/demo/disk.raw; ln -s /root/canary vms/1000/web1/disks/link; ln -s /root vms/1001/out
cd {RUN}; echo >/root/canary
mkdir -p vms/7 names/hosts; chmod 750 vms vms/7; chmod 755 names names/hosts
for file in host.json autostarted broker.lock vms/7/run.json vms/7/console.sock names/hosts/7 relay.sock tapnet.sock; do
    echo $file >$file; done
chmod 660 vms/7/console.sock; chgrp vmshell-relay vms vms/7 vms/7/console.sock
cp {CHECKOUT}/etc/systemd/* {UNITS}
"""
# Each program that the script runs counts, and at one number ends the script in front of it.
MAKE_SHIMS = f"""
mkdir -p {SHIMS}
for name in chown find install mv rm sed stat systemctl; do
    printf '#!/bin/sh\\nread -r n <{STEP}; n=$((n + 1)); echo $n >{STEP}\\n[ $n != "$KILL_AT" ] || kill -9 0\\nexec %s "$@"\\n' \\
        "$(command -v $name)" >{SHIMS}/$name
    chmod 755 {SHIMS}/$name
done
"""


@pytest.fixture(scope="module")
def files(bare_host: Host) -> Iterator[Host]:
    """A host with accounts and units, but nothing that runs."""
    bare_host.put_tree()
    bare_host.sh(f"mkdir -p {UNITS}; systemd-sysusers {CHECKOUT}/etc/sysusers.d/vmshell.conf")
    bare_host.sh(MAKE_OLD + MAKE_SHIMS + "systemctl daemon-reload")
    yield bare_host


LIST = f"""
find {STATE} {RUN} /root/canary ! -name version ! -name broker.lock -printf '%p %m %u %g %y ' \\
    \\( -type f -execdir cat {{}} \\; -o -printf '\\n' \\)
"""


def rows(text: str) -> dict[str, str]:
    return dict(row.split(" ", 1) for row in text.splitlines())


def listing(host: Host) -> dict[str, str]:
    """Everything below state and run but mark and lock: mode, owner, group, kind, and what a file says."""
    return rows(host.sh(LIST))


def running(verb: str, kill_at: int = 0) -> str:
    """The line of shell that runs the script, or kills it in front of step *kill_at*."""
    shims = f"echo 0 >{STEP}; KILL_AT={kill_at} PATH={SHIMS}:$PATH " if kill_at else ""
    return f"{shims}setsid -w sh {MIGRATE} {verb} >/dev/null\n"


def migrate(host: Host, verb: str) -> None:
    host.sh("set -e\n" + running(verb))


def test_what_becomes_whose(files: Host) -> None:
    before = listing(files)
    migrate(files, "forward")
    after = listing(files)
    moved = {
        f"{STATE}/addresses.json": f"{STATE}/net/addresses.json",
        f"{RUN}/host.json": f"{RUN}/broker/host.json",
        f"{RUN}/autostarted": f"{RUN}/broker/autostarted",
    }
    made = {f"{STATE}/net", f"{RUN}/broker"}
    assert set(after) == {moved.get(path, path) for path in before} | made
    files.exec("test", "!", "-e", f"{RUN}/broker.lock")
    brokers = re.compile(f"({STATE}/(vms|shelf|net)|{RUN}/(vms|names|broker|relay.sock|tapnet.sock))(/|$)")
    for path, row in before.items():
        mode, _, rest = row.split(" ", 2)
        new = moved.get(path, path)
        owner = "vmshell-broker" if brokers.match(new) else "root"
        assert after[new] == f"{mode} {owner} {rest}", new
    for path in made:
        assert after[path].startswith("700 vmshell-broker vmshell-broker d"), path
    assert files.exec("cat", f"{STATE}/version").stdout.startswith(f"state 2 vmshell {__version__}")
    assert files.exec("stat", "-c", "%a %U", f"{STATE}/version").stdout == "644 root\n"


def test_the_way_back_leads_where_it_began(files: Host) -> None:
    files.sh(MAKE_OLD)
    before = listing(files)
    migrate(files, "forward")
    migrate(files, "back")
    assert listing(files) == before


def test_done_is_done(files: Host) -> None:
    """After the mark the tree is the broker's, and root does not walk into it again, whatever the broker puts there."""
    files.sh(MAKE_OLD)
    migrate(files, "forward")
    files.sh(f"touch {STATE}/vms/1000/roots")
    before = files.sh(f"find {STATE} {RUN} -printf '%p %i %m %u %g %T@ %C@\\n'")
    migrate(files, "forward")
    assert files.sh(f"find {STATE} {RUN} -printf '%p %i %m %u %g %T@ %C@\\n'") == before


@pytest.mark.parametrize(
    ("begin", "verb", "then"),
    [
        ("", "forward", "forward"),
        ("", "forward", "back"),
        ("forward", "back", "back"),
        ("forward", "back", "forward"),
    ],
)
def test_killed_at_every_step(files: Host, begin: str, verb: str, then: str) -> None:
    """Whatever comes next completes it. Between the two no broker starts: there is no mark."""

    files.sh(MAKE_OLD)
    migrate(files, "forward")
    if then == "back":
        migrate(files, "back")
    wanted = listing(files)
    for step in range(1, 200):
        # All in one go, for it is done often. The last thing said before the listing: was it killed, is there a mark?
        script = MAKE_OLD + (running(begin) if begin else "")
        script += f"status=$( ({running(verb, step)}) 2>/dev/null; echo $?); mark=$(ls {STATE}/version 2>/dev/null)\n"
        script += f"{running(then)} echo $? $status $mark\n{LIST}"
        said, _, found = files.sh(script).partition("\n")
        status, killed, *mark = said.split()
        assert status == "0" and rows(found) == wanted, f"killed at step {step}"
        if killed == "0":
            break
        # The way back begins with reading two numbers; then the mark goes.
        assert not mark or (verb == "back" and step <= 3), f"killed at step {step}"
    assert 20 < step < 199


def test_what_cannot_be_given_is_named(files: Host) -> None:
    """A file that stays root's must not be found out by the broker: no mark then, and the next run goes on."""
    files.sh(MAKE_OLD)
    stubborn = f"{STATE}/vms/1000/web1/record.json"
    files.sh(f"mv {SHIMS}/chown {SHIMS}/kept; printf '#!/bin/sh\\nexit 1\\n' >{SHIMS}/chown; chmod 755 {SHIMS}/chown")
    done = files.exec("bash", "-c", f"PATH={SHIMS}:$PATH sh {MIGRATE} forward", check=False)
    files.sh(f"mv {SHIMS}/kept {SHIMS}/chown")
    assert done.returncode == 1 and f"{STATE}/vms/" in done.stderr and "cannot be given to vmshell-broker" in done.stderr
    files.exec("test", "!", "-e", f"{STATE}/version")
    migrate(files, "forward")
    assert files.exec("stat", "-c", "%U", stubborn).stdout == "vmshell-broker\n"


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("state 3 vmshell 0.9.0", f"of version 3 (state 3 vmshell 0.9.0); vmshell {__version__} knows none after 2"),
        ("state 12", "of version 12"),
        ("", "does not say `state NUMBER`"),
        ("state 2x", "does not say `state NUMBER`"),
    ],
)
def test_newer_state_is_refused_before_anything_is_touched(files: Host, mark: str, words: str) -> None:
    files.sh(f"{MAKE_OLD}echo '{mark}' >{STATE}/version")
    before = files.sh(f"find {STATE} {RUN} /usr/local /etc -printf '%p %i %m %u %T@ %C@\\n'")
    done = files.make("install", check=False)
    assert done.returncode != 0 and words in done.stderr
    assert files.sh(f"find {STATE} {RUN} /usr/local /etc -printf '%p %i %m %u %T@ %C@\\n'") == before
