"""A host with guests on networks, and a network around it: what the tests of networks share. A test file imports its fixtures.

The host's kernel sends bridged frames through IP filters (br_netfilter), as it does wherever Docker has been; nothing here turns
that off. `outside` is this machine, beside the host in the hosts' own network.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from .guest import PATIENCE, Guest
from .machine import Host

POLICY = """\
[host]
dns_servers = ["{outside}"]
[networks.users]
kind = "private"
[networks.db]
kind = "service"
outside = "none"
providers = ["carl"]
[user.alice]
forward_ports = "20000-20009"
"""


@dataclass
class World:
    """alice has web1 and web2, bob has evil, carl has db on a service network that web2 and evil use."""

    host: Host
    outside: str
    web1: Guest
    web2: Guest
    evil: Guest
    db: Guest


@pytest.fixture(scope="module")
def outside(host: Host) -> Iterator[str]:
    """The address of a machine beyond the host, that answers pings, names in outside.test and, on port 7, every byte."""
    address, inner = f"203.0.113.{100 + host.number()}", private(host)
    for own in (address, inner):
        subprocess.run(host.outside("ip", "addr", "replace", f"{own}/32", "dev", "lan0"), check=True)
    resolver = ["dnsmasq", "-d", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--bind-interfaces"]
    resolver += ["--except-interface=lo", f"--listen-address={address}", f"--address=/outside.test/{address}"]
    resolver += [f"--address=/private.test/{inner}"]
    # Bound to what is this host's: the network is shared with the hosts of other test files, which end when they like.
    echoes = [["socat", f"TCP-LISTEN:7,fork,reuseaddr,bind={own}", "EXEC:cat"] for own in (address, inner)]
    commands = [host.outside(*argv) for argv in (resolver, *echoes)]
    programs = [subprocess.Popen(argv, stderr=subprocess.DEVNULL, start_new_session=True) for argv in commands]
    host.sh(f"ip route add {inner}/32 dev lan0")
    yield address
    for program in programs:
        os.killpg(program.pid, signal.SIGTERM)  # with the children that hold connections of guests that are gone
        program.wait(20)
    for own in (address, inner):
        subprocess.run(host.outside("ip", "addr", "del", f"{own}/32", "dev", "lan0"), check=True)


def private(host: Host) -> str:
    """An address beside the host as well, which is not the internet."""
    return f"192.168.77.{host.number()}"


@pytest.fixture(scope="module")
def world(host: Host, outside: str) -> Iterator[World]:
    host.add_user("carl")
    host.put_image("netdemo")
    host.exec("tee", "/etc/vmshell/policy.toml", stdin=POLICY.format(outside=outside))
    host.sh("systemctl restart vmshell-broker")
    web1 = Guest(host, "alice", "web1").make()
    web2 = Guest(host, "alice", "web2").make("net1.network=db")
    evil = Guest(host, "bob", "evil").make("net1.network=db")
    db = Guest(host, "carl", "db").make("net0.network=db")
    for guest in (web1, web2, evil, db):
        guest.boot()
    for guest in (web1, web2, evil, db):
        guest.ready()
    yield World(host, outside, web1, web2, evil, db)
    for guest in (web1, web2, evil, db):
        guest.detach()


def hardware(guest: Guest) -> str:
    """The MAC of its first card, as it is in frames."""
    return guest.host.sh(f"cat /run/vmshell/names/dhcp-hosts/* | grep -w {guest.address}").split(",")[0].replace(":", "")


def colons(mac: str) -> str:
    return ":".join(mac[at : at + 2] for at in range(0, 12, 2))


def address_hex(address: str) -> str:
    return bytes(map(int, address.split("."))).hex()


def tap_of(world: World, guest: Guest) -> str:
    row = world.host.sh(f"bridge fdb show | grep '{colons(hardware(guest))} .* static'")
    return row.split()[2]


def bridge_of(world: World, guest: Guest) -> str:
    return world.host.sh(f"basename $(readlink /sys/class/net/{tap_of(world, guest)}/master)").strip()


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)


def tables(host: Host) -> list[str]:
    """Our two tables without what changes by itself."""
    found = []
    for table in ("inet vmshell", "bridge vmshell"):
        listing = host.exec("nft", "-j", "-s", "list", "table", *table.split(), check=False).stdout or '{"nftables": []}'
        for item in (thing for entry in json.loads(listing)["nftables"] for thing in entry.values()):
            item.pop("handle", None)
            elements = item.pop("elem", [])
            if "size" in item:  # a set that packets fill
                elements = []
            found.append(json.dumps(item, sort_keys=True) + str(sorted(json.dumps(element) for element in elements)))
    return sorted(found)


def through(guest: Guest, program: str) -> list[str]:
    """ssh or scp to *guest*, by way of `ssh owner@host connect`."""
    host = guest.host
    proxy = shlex.join([*host.ssh(), f"{guest.user}@{host.name}", f"connect {guest.name}:22"])
    return [*host.ssh(program), "-o", f"ProxyCommand={proxy}", "-o", f"HostKeyAlias={guest.user}.{guest.name}"]


def said(argv: list[str], stdin: str = "") -> tuple[int, str]:
    """The exit status of *argv*, run on this machine, and what it said."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    return done.returncode, done.stdout + done.stderr
