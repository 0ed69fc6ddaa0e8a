"""Bridges, VLANs and what is on them, by pyroute2; and many taps at once, by messages of our own.

A bridge of ours is known by its name and its MAC, which is set when it is made: there is no moment in which one of ours could be
taken for somebody else's. The MAC never changes with the taps on it (E29). `ifalias` says whose it is to whoever looks.
Runs in: tapnet. Touches network interfaces.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from vmshell.messages import Port, Segment
from vmshell.refusals import NetworkFailed

from . import netlink, sysctl
from .netlink import attribute, message, nested, u8, u32, u64
from .state import bridge, tap, uplink

ALIAS = "vmshell"

# linux/rtnetlink.h, linux/if_link.h, linux/neighbour.h, linux/pkt_sched.h
_NEWLINK, _DELLINK, _NEWNEIGH, _NEWQDISC, _DELQDISC = 16, 17, 28, 36, 37
_ADDRESS, _MASTER, _LINKINFO, _SLAVE_KIND, _SLAVE_DATA = 1, 10, 18, 4, 5
_GUARD, _LEARNING, _UNICAST_FLOOD, _ISOLATED = 5, 8, 9, 33
_LLADDR, _NOARP, _NTF_MASTER = 2, 0x40, 0x04
_TCA_KIND, _TCA_OPTIONS, _TBF_PARMS, _TBF_RATE64, _TBF_BURST, _ETHERNET = 1, 2, 1, 4, 6, 1
_CODEL_TARGET, _CODEL_LIMIT, _CODEL_MEMORY = 1, 2, 9
_ROOT, _BUCKET, _BUCKET_CLASS = 0xFFFFFFFF, 0x10000, 0x10001
_UP = 1
_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, change
_NEIGHBOUR = struct.Struct("=B3xiHBB")  # family, index, state, flags, type
_TRAFFIC = struct.Struct("=B3xiIII")  # family, index, handle, parent, info
_TBF = struct.Struct("=BBHhHI12xIII")  # rate: cells, link layer, overhead, alignment, mpu, bytes/s; no peak; limit, buffer, mtu

BURST_SECONDS = 0.02
BURST_LEAST = 1 << 16  # one segment as QEMU hands it over
QUEUE_SECONDS = 0.1
FRAME_MAX = 1514  # octets
# Of fq_codel, as in tc-fq_codel(8): microseconds that a packet may wait (or 1.5 times what the largest frame takes, if that is
# more); packets and octets held.
CODEL_TARGET = 5000
CODEL_PACKETS, CODEL_MEMORY = 1000, 4 << 20


@dataclass
class Link:
    """What the kernel says of an interface, as far as it matters here. `held` is what security rests on, of a tap in a bridge."""

    name: str
    index: int
    kind: str
    mac: str
    master: int
    up: bool
    parent: int
    vlan: int
    root_only: bool  # a tap as we make them: owner and group are root's
    held: tuple[int | None, ...]


class Links:
    """Our two sockets to the kernel: one by pyroute2, one for many messages at once.

    `limits`: the kernel has token buckets. `fair`: it has fq_codel, so that who downloads at his limit can still type.
    """

    def __init__(self) -> None:
        self.limits = self.fair = True
        self._ip = IPRoute()
        self._channel = netlink.Channel(socket.NETLINK_ROUTE)

    # --- looking ---

    def link(self, name: str) -> Link | None:
        try:
            return _read(self._ip.link("get", ifname=name)[0])
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise _failed(f"the interface {name} cannot be looked at", error.code) from error

    def survey(self) -> dict[str, Link]:
        """Every interface by its name."""
        return {link.name: link for link in map(_read, self._ip.get_links())}

    def addresses(self, index: int) -> set[str]:
        """The addresses of interface *index*, each with its prefix: `10.77.3.1/24`."""
        return {f"{found.get_attr('IFA_ADDRESS')}/{found['prefixlen']}" for found in self._ip.get_addr(index=index)}

    # --- bridges ---

    def check(self, segment: Segment) -> None:
        """Raise NetworkFailed if what the segment needs of the host is not there."""
        if segment.bridge:
            found = self.link(segment.bridge)
            if found is None:
                raise NetworkFailed(problem=f"the host has no bridge {segment.bridge}; it has to be made first")
            if found.kind != "bridge":
                raise NetworkFailed(problem=f"{segment.bridge} of the host is no bridge; the policy has to name one")
            return
        found = self.link(bridge(segment))
        if found is not None and not is_our_bridge(found, segment):
            raise NetworkFailed(problem=f"there is an interface {found.name} already, and it is not ours; remove it")
        if segment.vlan and self.link(segment.parent) is None:
            raise _no_parent(segment)

    def make_bridge(self, segment: Segment) -> None:
        """Make the segment's bridge, or bring the one that is there into line; a bridge of the host is only looked for."""
        self.check(segment)
        name = bridge(segment)
        if segment.bridge:
            return
        try:
            found = self.link(name)
            if found is None:
                self._must_be_free(segment)
                quiet = {"br_stp_state": 0, "br_ageing_time": 0, "br_mcast_snooping": 0}
                self._ip.link("add", ifname=name, kind="bridge", address=bridge_mac(segment.segment), **quiet)
            index = found.index if found else socket.if_nametoindex(name)
            sysctl.bridge(name, bool(segment.gateway4), bool(segment.gateway6))
            wanted = _addresses(segment)
            there = self.addresses(index)
            for text in there - wanted:
                self._ip.addr("del", index=index, **_parts(text))
            for text in wanted - there:
                self._ip.addr("add", index=index, **_parts(text))
            if segment.vlan:
                self._join(segment, index)
            if found is None or not found.up:
                self._ip.link("set", index=index, state="up", ifalias=ALIAS)
        except (NetlinkError, OSError) as error:
            if found is None:
                self.remove_bridge(segment)
            code = error.code if isinstance(error, NetlinkError) else error.errno
            raise _failed(f"the bridge {name} cannot be made", code) from error
        except NetworkFailed:
            if found is None:
                self.remove_bridge(segment)
            raise

    def _must_be_free(self, segment: Segment) -> None:
        """Two interfaces with one subnet would take each other's packets."""
        for text in filter(None, (segment.gateway4, segment.gateway6)):
            subnet = ip_interface(text).network
            for found in self._ip.get_addr():
                other = ip_interface(f"{found.get_attr('IFA_ADDRESS')}/{found['prefixlen']}")
                if other.version == subnet.version and other.ip in subnet:
                    name = socket.if_indextoname(found["index"])
                    cure = "take another pool for VMs, or another address there"
                    raise NetworkFailed(problem=f"{other.ip} of {name} is in {subnet}; {cure}")

    def _join(self, segment: Segment, index: int) -> None:
        """The VLAN of the host's interface, as the one port of the bridge that learns."""
        name, parent = uplink(segment), self.link(segment.parent)
        found = self.link(name)
        if parent is None:
            raise _no_parent(segment)
        if found is not None and (found.kind, found.parent, found.vlan) != ("vlan", parent.index, segment.vlan):
            raise NetworkFailed(problem=f"there is an interface {name} already, and it is not ours; remove it")
        if found is None:
            try:
                self._ip.link("add", ifname=name, kind="vlan", link=parent.index, vlan_id=segment.vlan)
            except NetlinkError as error:
                raise _failed(f"VLAN {segment.vlan} of {segment.parent} cannot be made", error.code) from error
        own = socket.if_nametoindex(name)
        sysctl.no_ipv6(name)
        self._ip.link("set", index=own, master=index, ifalias=ALIAS)
        try:
            self._ip.link("set", index=own, state="up")
        except NetlinkError as error:
            if error.code != errno.ENETDOWN:  # its interface is down, and takes the VLAN along when it comes up
                raise

    def remove_bridge(self, segment: Segment) -> None:
        """Delete the bridge, and its VLAN, if they are of our making."""
        if not segment.bridge:
            self.remove([uplink(segment), bridge(segment)])

    def try_vlan(self, segment: Segment) -> None:
        """Raise NetlinkError if the kernel has no VLAN interfaces."""
        self._ip.link("add", ifname=f"vmshell{segment.segment:06x}", kind="vlan", link=_index(bridge(segment)), vlan_id=2)

    # --- taps ---

    def plug(self, ports: list[Port], segments: dict[int, Segment]) -> None:
        """Put the ports' taps into their bridges and switch them on, that last; NetworkFailed names the first that failed.

        Doing it again is no harm, so this also changes a port and brings one back into line.
        """
        masters: dict[int, int] = {}
        messages, names = [], []
        for port in ports:
            segment = segments[port.segment]
            if port.segment not in masters:
                masters[port.segment] = _index(bridge(segment))
            index = _index(tap(port))
            limits = _limits(index, port.rate, self.fair) if port.rate and self.limits else []
            steps = _plug(port, index, masters[port.segment], limits)
            messages += steps
            names += [tap(port)] * len(steps)
        for name, code in zip(names, self._channel.run(messages), strict=True):
            if code:
                raise _failed(f"the tap {name} cannot be put into its bridge", code)

    def unlimit(self, ports: list[Port]) -> None:
        """Take away the rate limits towards the guests; none there is no error."""
        indexes = [index for port in ports if (index := _index(tap(port), missing=0))]
        self._channel.run([message(_DELQDISC, 0, _TRAFFIC.pack(0, index, 0, _ROOT, 0)) for index in indexes])

    def set_up(self, names: list[str], up: bool) -> None:
        """Switch interfaces on or off; those that are gone are no error."""
        indexes = [index for name in names if (index := _index(name, missing=0))]
        flags = _UP if up else 0
        codes = self._channel.run([message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, flags, _UP)) for index in indexes])
        failed = [code for code in codes if code not in (0, errno.ENODEV)]
        if failed:
            raise _failed("the taps cannot be switched " + ("on" if up else "off"), failed[0])

    def remove(self, names: list[str]) -> None:
        """Delete interfaces; those that are gone are no error."""
        indexes = [index for name in names if name and (index := _index(name, missing=0))]
        self._channel.run([message(_DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0)) for index in indexes])


# --- pure -------------------------------------------------------------------------------------------------------------


def bridge_mac(number: int) -> str:
    """The MAC of the bridge of segment *number*; no card of a VM has it, for there is no card 255."""
    return f"06:ff:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"


def is_our_bridge(link: Link, segment: Segment) -> bool:
    return link.kind == "bridge" and link.mac == bridge_mac(segment.segment)


def held_to(port: Port) -> tuple[int, ...]:
    """What `Link.held` is for a port that is plugged as it should be: isolated, not learning, not flooded to, no BPDUs."""
    return (int(port.isolated), 0, 0, 1)


def _plug(port: Port, index: int, master: int, limits: list[bytes]) -> list[bytes]:
    """The messages that plug a tap: into the bridge, what it may there, where its MAC is, its rate, and only then up."""
    guest = bytes.fromhex(port.mac.replace(":", ""))
    # Our end has the highest MAC of all, so that a bridge of the host never takes it for its own (E29).
    ours = b"\xfe" + guest[1:]
    options = [u8(_ISOLATED, port.isolated), u8(_LEARNING, 0), u8(_UNICAST_FLOOD, 0), u8(_GUARD, 1)]
    data = nested(_LINKINFO, attribute(_SLAVE_KIND, b"bridge\0"), nested(_SLAVE_DATA, *options))
    steps = [
        message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + attribute(_ADDRESS, ours) + u32(_MASTER, master)),
        message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, 0, 0) + data),
        message(
            _NEWNEIGH,
            netlink.CREATE | netlink.REPLACE,
            _NEIGHBOUR.pack(socket.AF_BRIDGE, index, _NOARP, _NTF_MASTER, 0) + attribute(_LLADDR, guest),
        ),
    ]
    return [*steps, *limits, message(_NEWLINK, 0, _IFINFO.pack(0, 0, index, _UP, _UP))]


def _limits(index: int, rate: int, fair: bool) -> list[bytes]:
    """The messages that hold what a guest receives to *rate* kbit/s: a token bucket; in it one queue, or one for each flow."""
    speed = rate * 125
    burst = max(BURST_LEAST, int(speed * BURST_SECONDS))
    limit = min(burst + int(speed * QUEUE_SECONDS), 0xFFFFFFFF)
    parameters = _TBF.pack(0, _ETHERNET, 0, 0, 0, min(speed, 0xFFFFFFFF), limit, 0, 0)
    bucket = [attribute(_TBF_PARMS, parameters), u64(_TBF_RATE64, speed), u32(_TBF_BURST, burst)]
    queues = [_queue(index, _BUCKET, _ROOT, b"tbf", bucket)]
    if fair:
        target = max(CODEL_TARGET, FRAME_MAX * 1_500_000 // speed)
        bounds = [u32(_CODEL_TARGET, target), u32(_CODEL_LIMIT, CODEL_PACKETS), u32(_CODEL_MEMORY, CODEL_MEMORY)]
        queues.append(_queue(index, 0, _BUCKET_CLASS, b"fq_codel", bounds))
    return queues


def _queue(index: int, handle: int, parent: int, kind: bytes, options: list[bytes]) -> bytes:
    """The message that makes a queue of an interface, or gives the one that is there these options."""
    body = _TRAFFIC.pack(0, index, handle, parent, 0) + attribute(_TCA_KIND, kind + b"\0") + nested(_TCA_OPTIONS, *options)
    return message(_NEWQDISC, netlink.CREATE | netlink.REPLACE, body)


def _addresses(segment: Segment) -> set[str]:
    wanted = [text for text in (segment.gateway4, segment.gateway6) if text]
    # Guests name their router by its link-local address, and everybody's is this one.
    wanted += ["fe80::1/64"] if segment.gateway6 else []
    return {str(ip_interface(text)) for text in wanted}


def _parts(address: str) -> dict[str, Any]:
    """`10.77.3.1/24` as pyroute2 takes it."""
    ip, _, length = address.partition("/")
    return {"address": ip, "prefixlen": int(length)}


def _index(name: str, missing: int | None = None) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        if missing is None:
            raise NetworkFailed(problem=f"the interface {name} is gone") from None
        return missing


def _read(found: Any) -> Link:
    """A Link from pyroute2's message."""
    info = found.get_attr("IFLA_LINKINFO")
    kind = info.get_attr("IFLA_INFO_KIND") if info else None
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    slave = info.get_attr("IFLA_INFO_SLAVE_DATA") if info else None

    def value(nla: Any, name: str) -> Any:
        return nla.get_attr(name) if hasattr(nla, "get_attr") else None

    return Link(
        name=found.get_attr("IFLA_IFNAME"),
        index=found["index"],
        kind=kind or "",
        mac=found.get_attr("IFLA_ADDRESS") or "",
        master=found.get_attr("IFLA_MASTER") or 0,
        up=bool(found["flags"] & _UP),
        parent=found.get_attr("IFLA_LINK") or 0,
        vlan=(value(data, "IFLA_VLAN_ID") or 0) if kind == "vlan" else 0,
        root_only=kind == "tun" and value(data, "IFLA_TUN_OWNER") == 0 and value(data, "IFLA_TUN_GROUP") == 0,
        held=tuple(value(slave, f"IFLA_BRPORT_{name}") for name in ("ISOLATED", "LEARNING", "UNICAST_FLOOD", "GUARD")),
    )


def _no_parent(segment: Segment) -> NetworkFailed:
    return NetworkFailed(problem=f"the host has no interface {segment.parent} for VLAN {segment.vlan}; it has to be there first")


def _failed(what: str, code: int | None) -> NetworkFailed:
    return NetworkFailed(problem=f"{what}: {os.strerror(code) if code else 'no reason given'}")
