"""The checks of `vmshell-admin doctor` that are about networks: what makes them, who gives names, what else filters packets.

Runs in: vmshell-admin, as whoever typed it. Reads /proc, /sys and nft; asks the broker and dnsmasq.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import re
import shutil
import socket
import stat
from collections.abc import Iterator

from ..errors import VmshellError
from ..messages import NetHealth
from ..model import policy
from .asking import ask
from .findings import ANSWER_PATIENCE, ENV, FAIL, OK, WARN, Finding, before_long, output, problem_of, states
from .policies import missing_interfaces
from .verbs import Context

TAPNET, NAMES = "vmshell-tapnet.socket", "vmshell-names.service"
TAPNET_USER = "vmshell-tapnet"
TUN = "/dev/net/tun"
RESOLVER = ("127.77.0.53", 53)
RESOLVER_PATIENCE = 3.0  # seconds
BRIDGES = "vtb*"
FORWARD4, BRIDGE_CALLS = "/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/bridge/bridge-nf-call-iptables"
LEGACY = "/proc/net/ip_tables_names"
ANY_ADDRESS, LISTENING = ("00000000:0035", "00000000000000000000000000000000:0035"), "0A"
# What this host's kernel may lack, and what does not work then.
WITHOUT = {
    "tc-tbf": "net_rate does not hold for what guests receive (modprobe sch_tbf)",
    "tc-fq_codel": "a guest that receives at its net_rate waits up to 0.1 s for each packet (modprobe sch_fq_codel)",
    "ct-count": "one guest may fill the table of connections (modprobe nft_connlimit)",
    "vlan": "there are no networks by VLAN (modprobe 8021q)",
    "ipv6": "guests have no IPv6",
}
TABLE = "vmshell"
Place = tuple[str, str, str]  # a chain: family, table, name
BESIDE = "see `Beside another firewall` in vmshell-admin(8)"


def check_network(context: Context) -> Iterator[Finding]:
    """tapnet answers, and what it says of the kernel; without it, what it may be missing."""
    yield from _parts()
    try:
        answer = ask(context.layout, NetHealth(), ANSWER_PATIENCE)
        problems, lacking = answer.texts("problems"), answer.lacking("features")
    except VmshellError as exc:
        if os.geteuid() != 0:
            yield Finding(WARN, f"the state of the network is for administrators ({exc.sentence()})", "run doctor as root")
            return
        cure = f"systemctl restart {TAPNET} vmshell-broker; journalctl -u vmshell-tapnet"
        said = f"the network service does not answer ({exc.sentence()}), so no VM with a network starts"
        yield Finding(FAIL, said, cure)
        return
    for sentence in problems:
        yield Finding(FAIL, sentence, "vmshell-admin network repair, when its cause is gone; journalctl -u vmshell-tapnet")
    if not problems:
        yield Finding(OK, "the network service answers")
    for lack in missing_interfaces(_policy(context)):
        yield Finding(FAIL, lack, "make it, or take the network out of the policy; VMs on it do not start")
    for name, without in WITHOUT.items():
        if name in lacking:
            yield Finding(WARN, f"this kernel has no {name}: {without}", "nothing else depends on it")


def _parts() -> Iterator[Finding]:
    """What tapnet is made of, said here because without it tapnet cannot say it."""
    try:
        status = os.stat(TUN)
        account = pwd.getpwnam(TAPNET_USER)
    except FileNotFoundError:
        yield Finding(FAIL, f"there is no {TUN}", "modprobe tun; in a container, its host has to pass the device on")
    except KeyError:
        yield Finding(FAIL, f"there is no account {TAPNET_USER}", "make install")
    else:
        if not stat.S_ISCHR(status.st_mode) or not _may_open(status, account):
            yield Finding(FAIL, f"{TAPNET_USER} may not open {TUN}", f"chmod 0666 {TUN}, which is what udev gives it")
    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        yield Finding(FAIL, "libnftables.so.1 is not installed", "apt-get install nftables")
    lacking = problem_of("/usr/bin/python3", "-I", "-c", "import pyroute2")
    if lacking:
        yield Finding(FAIL, f"/usr/bin/python3 has no pyroute2: {lacking}", "apt-get install python3-pyroute2")


def _may_open(status: os.stat_result, account: pwd.struct_passwd) -> bool:
    shift = 6 if status.st_uid == account.pw_uid else 3 if status.st_gid == account.pw_gid else 0
    return status.st_mode >> shift & 0o6 == 0o6


def check_names(context: Context) -> Iterator[Finding]:
    """dnsmasq is there, runs, and answers the host."""
    if shutil.which("dnsmasq", path=ENV["PATH"]) is None:
        yield Finding(FAIL, "dnsmasq is not installed, so guests get no addresses", "apt-get install dnsmasq-base")
        return
    cure = f"systemctl restart {NAMES}; journalctl -u {NAMES}"
    if states(NAMES).get(NAMES) != "active":
        if any(_listens_everywhere(path) for path in ("/proc/net/tcp", "/proc/net/tcp6")):
            cure = "another name server has port 53 of every address; let it listen on its own only (dnsmasq: bind-dynamic)"
        yield Finding(FAIL, f"{NAMES} does not run, so guests get no addresses", cure)
        return
    domain = _policy(context).host.dns_domain
    if before_long(lambda: _resolver_answers(f"doctor.{domain}")):
        yield Finding(OK, f"VMs have names in {domain}; {RESOLVER[0]} answers this host")
    else:
        yield Finding(FAIL, f"{NAMES} runs, and {RESOLVER[0]} does not answer", cure)


def _policy(context: Context) -> policy.Policy:
    """As the file has it. A broken one the broker has not taken either, and `policy check` is who complains."""
    try:
        return policy.load(context.layout.policy, session=False)
    except (OSError, VmshellError):
        return policy.parse("", "nothing")


def _listens_everywhere(path: str) -> bool:
    try:
        with open(path, encoding="ascii") as file:
            rows = [line.split() for line in file]
    except OSError:
        return False
    return any(row[1] in ANY_ADDRESS and row[3] == LISTENING for row in rows[1:])


def _resolver_answers(name: str) -> bool:
    """Does it say anything at all about *name*, which nobody has?"""
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
    question = os.urandom(2) + bytes.fromhex("01000001000000000000") + labels + bytes.fromhex("0000010001")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(RESOLVER_PATIENCE)
        try:
            sock.connect(RESOLVER)
            sock.send(question)
            return sock.recv(512)[:2] == question[:2]
        except OSError:
            return False


def check_routing(context: Context) -> Iterator[Finding]:
    """What others do to our packets: routing switched off, another firewall's closed chains, frames in IP filters."""
    if _read(BRIDGE_CALLS) == "1":
        cure = "sysctl net.bridge.bridge-nf-call-iptables=0, unless something here needs it (Kubernetes does)"
        yield Finding(WARN, "br_netfilter sends frames between VMs through the host's IP filters too", cure)
    bridges = [name for name in os.listdir("/sys/class/net") if name.startswith(BRIDGES[:-1])]
    if bridges and _read(FORWARD4) == "0":
        yield Finding(FAIL, "net.ipv4.ip_forward is 0, so VMs reach nothing outside", "sysctl net.ipv4.ip_forward=1")
    if os.geteuid() != 0:
        yield Finding(WARN, "only root can look at the packet filter", "run doctor as root")
        return
    listing = output("nft", "-j", "list", "ruleset")
    if _read(LEGACY):
        look = "iptables-legacy -S, and the same for ip6tables: they have to let our bridges through"
        yield Finding(WARN, f"there are rules of iptables-legacy, at which nothing here can look; {BESIDE}", look)
    closed = closed_chains(listing, ipv6=bool(_policy(context).host.ipv6_pool))
    if states("firewalld").get("firewalld") == "active" and not opened(listing):
        closed.append("firewalld")
    for chain in closed:
        yield Finding(WARN, f"{chain} drops what it does not know, and nothing there names our bridges, {BRIDGES}", BESIDE)
    if not _objects(listing):
        said = f"what nft says of it is no list: {listing[:80]}" if listing else "there is no nft"
        yield Finding(WARN, f"the packet filter cannot be looked at: {said}", "apt-get install nftables; nft -j list ruleset")
    elif not closed:
        yield Finding(OK, "no other packet filter here is in the way")


def closed_chains(listing: str, *, ipv6: bool) -> list[str]:
    """Chains of others that drop by default where packets of VMs pass and lead to no rule that names our bridges; by `nft -j`.

    *ipv6*: guests speak it.
    """
    rules: dict[Place, list[str]] = {}
    for kind, item in _objects(listing):
        if kind == "rule":
            rules.setdefault((item["family"], item["table"], item["chain"]), []).append(json.dumps(item))
    return [
        f"nftables chain {item['name']} of table {item['family']} {item['table']}"
        for kind, item in _objects(listing)
        if kind == "chain"
        and item.get("hook") in ("input", "forward")
        and item.get("policy") == "drop"
        and item["family"] in ("ip", "inet", *(("ip6",) if ipv6 else ()))
        and item["table"] != TABLE
        and not _names_us((item["family"], item["table"], item["name"]), rules, set())
    ]


def _names_us(place: Place, rules: dict[Place, list[str]], seen: set[Place]) -> bool:
    """Does a rule of this chain, or of one that it jumps to, name our bridges?"""
    if place in seen:
        return False
    seen.add(place)
    texts = rules.get(place, [])
    targets = {target for text in texts for target in re.findall(r'"(?:jump|goto)": \{"target": "([^"]+)"\}', text)}
    return any(BRIDGES in text for text in texts) or any(_names_us((*place[:2], target), rules, seen) for target in targets)


def opened(listing: str) -> bool:
    """Does any rule of others name our bridges?"""
    return any(kind == "rule" and item["table"] != TABLE and BRIDGES in json.dumps(item) for kind, item in _objects(listing))


def _objects(listing: str) -> list[tuple[str, dict[str, str]]]:
    try:
        items = json.loads(listing)["nftables"]
    except (ValueError, KeyError, TypeError):
        return []  # nft is missing, or printed an error
    return [(kind, item) for entry in items for kind, item in entry.items()]


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
