"""Into a guest from elsewhere: ssh, scp and the shell's own ssh, published ports, and sshd's forwarding where it is opened."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.host.guest import PATIENCE, Guest
from tests.host.machine import Host
from tests.host.world import World, outside, said, through, wait_for, world

__all__ = ["outside", "world"]

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

FORWARDING = "/etc/ssh/sshd_config.d/40-vmshell-forwarding.conf"


# --- into a guest -----------------------------------------------------------------------------------------------------


def test_ssh_and_scp_through_connect(world: World, tmp_path: Path) -> None:
    assert said([*through(world.web1, "ssh"), "root@web1", "hostname; exit 7"]) == (7, "web1\n")
    sent, back = tmp_path / "sent", tmp_path / "back"
    sent.write_bytes(os.urandom(1 << 20))
    for options in ([], ["-O"]):
        assert said([*through(world.web1, "scp"), *options, str(sent), "root@web1:/tmp/file"])[0] == 0
        assert said([*through(world.web1, "scp"), *options, "root@web1:/tmp/file", str(back)])[0] == 0
        assert back.read_bytes() == sent.read_bytes()
        back.unlink()


def test_connect_says_why_not(world: World) -> None:
    status, text = said([*world.host.ssh(), f"alice@{world.host.name}", "connect web1:4711"])
    assert status == 4 and "refused" in text.lower(), text
    there = world.host.run("bob", "connect alice/web1:22")
    absent = world.host.run("bob", "connect alice/nothing:22")
    assert there[0] == absent[0] == 3 and there[2].replace("web1", "nothing") == absent[2]


def test_ssh_inside_the_shell_pins_the_host_key(world: World) -> None:
    def log_in() -> str:
        terminal = world.host.spawn("alice", "ssh web1 'echo it is $(hostname)'", timeout=PATIENCE)
        if terminal.expect(["assword: ", pexpect.EOF]) == 0:
            terminal.sendline("demo")
            terminal.expect(pexpect.EOF)
        terminal.close()
        return str(terminal.before)

    assert "it is web1" in log_in()
    world.web1.sh("rm /etc/dropbear/*; killall dropbear; sh /etc/rc.ssh >/dev/null 2>&1 &")
    wait_for(lambda: world.web1.run("netstat -ltn | grep ':22 '")[0] == 0)
    assert "it is" not in log_in()
    world.web1.vmshell("ssh --forget-key web1")
    assert "it is web1" in log_in()


def test_published_to_another_user(world: World) -> None:
    web1, evil = world.web1, world.evil
    for port in (80, 81):
        web1.sh(f"nc -ll -p {port} -e echo answer {port} >/dev/null 2>&1 &")
    asked = f"nc -w 5 {web1.address} 80 </dev/null"
    assert "answer" not in evil.run(asked)[1]
    web1.vmshell("publish web1 80 --to bob")
    assert evil.sh(asked) == "answer 80\n"
    assert "answer" not in evil.run(f"nc -w 3 {web1.address} 81 </dev/null")[1] and not evil.reaches(web1.address)
    web1.vmshell("unpublish web1 80")
    assert "answer" not in evil.run(asked)[1]


def test_published_to_a_group(world: World) -> None:
    host, web1, evil = world.host, world.web1, world.evil
    web1.sh("nc -ll -p 82 -e echo answer 82 >/dev/null 2>&1 &")
    asked = f"nc -w 5 {web1.address} 82 </dev/null"
    host.sh("groupadd team && usermod -aG team bob")
    assert "nobody" in host.run("alice", "publish web1 82 --to @nobodys")[2]
    web1.vmshell("publish web1 82 --to @team")
    assert evil.sh(asked) == "answer 82\n"
    host.sh("gpasswd -d bob team")  # the broker notices by itself
    wait_for(lambda: "answer" not in evil.run(f"nc -w 2 {web1.address} 82 </dev/null")[1], 30)
    host.sh("usermod -aG team bob")
    wait_for(lambda: "answer 82" in evil.run(asked)[1], 30)
    web1.vmshell("unpublish web1 82 --to @team")
    assert "answer" not in evil.run(asked)[1]


def test_published_to_the_world(world: World) -> None:
    host, web1 = world.host, world.web1
    web1.sh("netstat -ltn | grep -q ':80 ' || nc -ll -p 80 -e echo answer 80 >/dev/null 2>&1 &")
    asked = host.outside("socat", "-T", "10", "-", f"TCP:203.0.113.{host.number()}:20001,connect-timeout=5")
    assert said(asked)[0] != 0
    status, _, err = host.run("alice", "publish web1 80 --to world:80")
    assert status == 1 and "20000-20009" in err
    web1.vmshell("publish web1 80 --to world:20001")
    assert said(asked) == (0, "answer 80\n")
    assert host.run("bob", "publish evil 80 --to world:20002")[0] == 1
    web1.vmshell("unpublish web1 80")
    assert said(asked)[0] != 0


def events(host: Host, event: str) -> list[dict[str, object]]:
    """What the broker has written to the journal of *event*."""
    lines = host.sh("journalctl -u vmshell-broker -o cat --no-pager").splitlines()
    return [entry for line in lines if line.startswith("{") and (entry := json.loads(line))["event"] == event]


def test_the_journal_says_who_opened_and_used_what(world: World) -> None:
    host, web1 = world.host, world.web1
    connections = len(events(host, "connect"))
    web1.vmshell("publish web1 8443 --to bob")
    web1.vmshell("unpublish web1 8443 --to bob")
    assert host.run("bob", "connect alice/web1:22")[0] == 3
    assert "SSH-2.0" in host.run("alice", "connect web1:22")[1]
    wait_for(lambda: len(events(host, "connect")) == connections + 1)
    alices = {"uid": host.uid("alice"), "owner": "alice", "vm": "web1"}
    opened = {**alices, "port": 8443, "proto": "tcp", "to": "bob"}
    for event, expected in (("publish", opened), ("unpublish", opened), ("connect", {**alices, "port": 22})):
        assert expected.items() <= events(host, event)[-1].items()


# --- an account that is not like others -------------------------------------------------------------------------------


def test_a_long_uid_and_an_odd_name(world: World) -> None:
    """An account of a directory service: its VMs are called by its uid, since its name is none that DNS has."""
    host, user, uid = world.host, "svc_db.x", 4_294_967_290
    host.sh(f"useradd --badname --uid {uid} --no-create-home --home-dir /nonexistent -- {user}")
    host.add_user(user)
    guest = Guest(host, user, "web1").make().boot().ready()
    name = f"web1.u{uid}.vm"
    assert guest.sh("hostname") == "web1\n"
    assert f"Address: {guest.address}" in guest.sh(f"nslookup {name}")
    assert f"name = {name}" in guest.sh(f"nslookup {guest.address}")
    assert guest.reaches("outside.test", 1)
    assert said([*through(guest, "ssh"), "root@web1", "hostname"]) == (0, "web1\n")
    assert not world.evil.reaches(guest.address, 1) and host.run("bob", f"connect {user}/web1:22")[0] == 3
    guest.detach()
    guest.vmshell("kill web1")


def test_other_names_are_asked_of_whom_the_host_asks(world: World) -> None:
    """Without dns_servers; the resolver sees it when the host asks somebody else from now on."""
    host, web1, asked = world.host, world.web1, "nslookup outside.test"
    host.sh("cp /etc/vmshell/policy.toml /etc/resolv.conf /root/; sed -i /dns_servers/d /etc/vmshell/policy.toml")
    host.sh("echo nameserver 203.0.113.9 >/etc/resolv.conf; systemctl restart vmshell-broker")
    try:
        wait_for(lambda: world.outside not in web1.run(asked)[1])
        host.sh(f"echo nameserver {world.outside} >/etc/resolv.conf")
        wait_for(lambda: f"Address: {world.outside}" in web1.run(asked)[1])
    finally:
        host.sh("cp /root/resolv.conf /etc/; cp /root/policy.toml /etc/vmshell/; systemctl restart vmshell-broker")
    wait_for(lambda: f"Address: {world.outside}" in web1.run(asked)[1])


# --- sshd's own forwarding, where the administrator opens it ----------------------------------------------------------


def names_started(host: Host) -> str:
    """When dnsmasq was started last."""
    return host.sh("systemctl show --value -p ExecMainStartTimestampMonotonic vmshell-names").strip()


@pytest.fixture
def forwarding(world: World) -> Iterator[World]:
    host = world.host
    host.sh(f"cp /usr/local/share/vmshell/examples/{FORWARDING.rpartition('/')[2]} {FORWARDING}; sshd -t && systemctl reload ssh")
    before = names_started(host)
    host.sh("sed -i 's/^.host.$/[host]\\nssh_forwarding = true/' /etc/vmshell/policy.toml; systemctl restart vmshell-broker")
    wait_for(lambda: "elements" in host.sh("nft list set inet vmshell confined"))
    wait_for(lambda: names_started(host) not in (before, "0"))  # with the broker's start; until then it is about to be away
    yield world
    host.sh(f"rm {FORWARDING}; systemctl reload ssh; sed -i /ssh_forwarding/d /etc/vmshell/policy.toml")
    host.sh("systemctl restart vmshell-broker")


def asked_by(host: Host, user: str, target: str) -> str:
    """What comes from *target* through sshd's forwarding."""
    return said([*host.ssh(), "-W", target, f"{user}@{host.name}"])[1]


def test_sshd_does_not_forward(world: World) -> None:
    assert "SSH-2.0" not in asked_by(world.host, "alice", f"{world.web1.address}:22")


def test_forwarding_reaches_own_vms_and_nothing_else(forwarding: World) -> None:
    """A06, A07."""
    host, web1, evil = forwarding.host, forwarding.web1, forwarding.evil
    assert "SSH-2.0-dropbear" in asked_by(host, "alice", f"{web1.address}:22")
    assert "SSH-2.0-dropbear" in asked_by(host, "bob", f"{evil.address}:22")
    elsewhere = [evil.address, forwarding.db.address, "127.0.0.1", "127.77.0.53", "::1", f"203.0.113.{host.number()}"]
    elsewhere += [".".join([*address.split(".")[:3], "1"]) for address in (web1.address, evil.address)]
    for address in elsewhere:
        host.exec("nc", "-z", "-w", "5", address, "22")  # there is something to reach
        assert "SSH-2.0" not in asked_by(host, "alice", f"[{address}]:22"), address
    assert said([*host.ssh(), "-W", f"{forwarding.outside}:7", f"alice@{host.name}"], "hello\n")[1] != "hello\n"
    assert "SSH-2.0" not in asked_by(host, "bob", f"{web1.address}:22")
    for options in (["-R", "20005:127.0.0.1:22"], ["-w", "0:0"]):
        assert said([*host.ssh(), "-N", "-o", "ExitOnForwardFailure=yes", *options, f"alice@{host.name}"])[0] == 255, options


def test_a06_who_joins_later_is_confined_as_well(forwarding: World) -> None:
    """By `user add`, and by hand: nobody tells the broker of that, and no login of theirs need come first."""
    host = forwarding.host
    host.add_user("dora")
    host.sh("useradd --create-home erik && usermod -aG vmusers -s /usr/local/bin/vmshell erik")
    host.exec("tee", "/etc/ssh/vmshell-keys/erik", stdin=host.public_key())
    confined = host.sh("nft list set inet vmshell confined")
    assert str(host.uid("dora")) in confined
    wait_for(lambda: str(host.uid("erik")) in host.sh("nft list set inet vmshell confined"), 30)
    for user in ("dora", "erik"):
        assert "SSH-2.0" not in asked_by(host, user, "127.0.0.1:22"), user


def test_forwarding_opens_no_unix_socket(forwarding: World, tmp_path: Path) -> None:
    host, here, told = forwarding.host, tmp_path / "here", tmp_path / "told"
    options = ["-N", "-v", "-E", str(told), "-L", f"{here}:/run/systemd/journal/stdout"]
    with subprocess.Popen([*host.ssh(), *options, f"alice@{host.name}"]) as client:
        try:
            wait_for(here.exists)
            with socket.socket(socket.AF_UNIX) as asking:
                asking.settimeout(30)
                asking.connect(str(here))
                assert asking.recv(1) == b""  # refused: without a byte sent, so that no close races with a write
            wait_for(lambda: "open failed" in told.read_text())
        finally:
            client.kill()  # a SIGTERM that comes while ssh is busy is noticed when there is a packet, and there is none


def test_a_jump_by_name(forwarding: World) -> None:
    host = forwarding.host
    host.sh("cp /etc/resolv.conf /root/; echo nameserver 127.77.0.53 >/etc/resolv.conf")
    try:
        options = ["-o", "HostName=web1.alice.vm", "-o", "HostKeyAlias=jumped", "-J", f"alice@{host.name}"]
        assert said([*host.ssh(), *options, "root@web1.alice.vm", "hostname"]) == (0, "web1\n")
    finally:
        host.sh("cp /root/resolv.conf /etc/")


def test_doctor_wants_both_or_none(forwarding: World) -> None:
    host = forwarding.host
    assert "OK    sshd          alice" in host.admin("doctor", check=False).stdout
    # What counts is what is in force, not what the file says.
    host.sh("sed -i /ssh_forwarding/d /etc/vmshell/policy.toml; systemctl restart vmshell-broker")
    wait_for(lambda: host.run("alice", "list")[0] == 0)
    done = host.admin("doctor", check=False)
    assert done.returncode == 1 and "disableforwarding no" in done.stdout
