"""dnsmasq.conf: one server for all segments, whose addresses all come from the files that the broker writes.

Those files are data. dnsmasq takes addresses, names and DHCP options from them and nothing else: no line makes it run a program,
or read or write another file (tests/attacks/test_dnsmasq.py tries every option). What may do that stands here only, and this
is made from root's policy.
Runs in: dnsmasq. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from ..model.addressing import Plan
from ..model.limits import HostPolicy

HOST_ADDRESS = "127.77.0.53"  # where the host itself may ask
# The folders of data, by the option that has dnsmasq read every file in it.
FOLDERS = {"hostsdir": "hosts", "dhcp-hostsdir": "dhcp-hosts", "dhcp-optsdir": "dhcp-opts"}


def configuration(host: HostPolicy, names: str, there: Collection[str] = tuple(FOLDERS.values())) -> str:
    """The text of dnsmasq.conf; *names* is the folder with the folders of data, of which those in *there* exist."""
    plan, pool = Plan(host.ipv4_pool, host.ipv6_pool, host.segment_prefix), ipaddress.IPv4Network(host.ipv4_pool)
    lines = [
        "# written from policy.toml at every start: see vmshell-policy(5), keys ipv4_pool to dns_servers",
        "bind-dynamic",
        "interface=vtb*",
        "except-interface=lo",
        f"listen-address={HOST_ADDRESS}",
        "no-hosts",
        *(f"{option}={names}/{folder}" for option, folder in FOLDERS.items() if folder in there),
        # One range for every segment: who is in no file gets no answer.
        f"dhcp-range={pool.network_address},static,{pool.netmask}",
        f"dhcp-option=option:netmask,{plan.subnet4(0).netmask}",
        "dhcp-option=28",  # no broadcast address: dnsmasq would give the whole pool's
        "dhcp-authoritative",
        # An answer by broadcast needs no entry in the host's ARP table, and so no CAP_NET_ADMIN.
        "dhcp-broadcast",
        "dhcp-ignore-names",
        # A lease is a MAC's: the client's own name for itself may be another's, by intent or because both are clones.
        "dhcp-ignore-clid",
        # Of all cards there may be, in both families, and of all that guests may ask at once: one guest's share is the filter's.
        "dhcp-lease-max=200000",
        "dns-forward-max=10000",
        "max-tcp-connections=200",
        # What guests ask, however often, is nothing for the journal; and whom the host asks is nothing for them.
        "quiet-dhcp",
        "quiet-dhcp6",
        "quiet-ra",
        "no-ident",
        "no-ping",
        "leasefile-ro",
        "domain-needed",
        "bogus-priv",
        f"local=/{host.dns_domain}/",
    ]
    if host.ipv6_pool:
        lines += ["enable-ra", "dhcp-range=::,constructor:vtb*,static,64,10m"]  # a guest made anew has another DUID, and waits
    if host.dns_servers:
        lines += ["no-resolv", *(f"server={address}" for address in host.dns_servers)]
    return "\n".join(lines) + "\n"
