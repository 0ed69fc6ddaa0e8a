"""The packet filter as text for nftables: which frame may leave a guest, which packet may cross the host, and who may answer.

Two tables of ours, nobody else's is touched. Everything that belongs to one port stands in sets keyed by its interface's name, so
a port comes and goes as elements of sets, and a tap that no set knows is mute.

    bridge vmshell   prerouting   what a guest may send: its own addresses, and nothing that servers and routers say
                     forward      on service networks: who asks for what is published, and the answers
                     input        what is on somebody else's bridge never reaches the host; the rest is the host's to judge
                     postrouting  where there is more than one owner's: a guest is handed no frame that is for another
    inet vmshell     prerouting   a tap itself is no way into the host: not without its bridge, nor past it (E18)
                     input        of the host, a guest reaches DHCP, DNS and ping at its gateway
                     forward      between segments by openings; outside as the segment says
                     output       of the host's processes, a VM is reached by its owner's and root's
                     nat          one address for all on the way out; published ports on the way in

Runs in: tapnet. Pure: every name, address and number is parsed or made here before it is written.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from vmshell.messages import Segment
from vmshell.names import is_interface

from .state import State, bridge, is_ours, tap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmshell.messages import Opening, Port, Settings

TABLES = ("bridge vmshell", "inet vmshell")
BRIDGE, INET = TABLES
HOST_DNS = "127.77.0.53"  # where dnsmasq answers the host itself
LINK_GATEWAY = "fe80::1"
GATEWAY_MACS = "06:ff:00:00:00:00"  # as `links.bridge_mac` makes them, without the segment
CASTS_PER_SECOND, CASTS_BURST = 200, 400  # broadcast and multicast frames of one guest
ECHOES_PER_SECOND = 50  # pings that the host answers, of the guests of one segment
# What one guest may ask of dnsmasq, which is everybody's: questions of DHCP and for routers, of names, and connections for those.
DHCPS_PER_SECOND, DHCPS_BURST = 5, 20
NAMES_PER_SECOND, NAMES_BURST = 50, 200
NAMES_CONNECTIONS_MAX = 3
CONNECTIONS_MAX = 4096  # of one guest through the host at once: the table of connections is everybody's
# Where br_netfilter is at work, bridged frames pass the host's IP hooks, too. This mark says that they are the bridge's to judge,
# so that nobody tracks them, or puts fragments of different networks together. What is for the host, or to be routed by it, goes
# to a gateway's MAC and has no mark, or is a broadcast and loses it.
BRIDGED = "0x766d7368"
NOT_INTERNET = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/3"),
)
# Not even with outside = "all": metadata services live here; Azure, Alibaba and Oracle have theirs outside of 169.254.0.0/16.
NEVER4 = ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "168.63.129.16", "100.100.100.200", "192.0.0.192")
NEVER6 = ("fd00:ec2::/32", "fd20:ce::/32", "fe80::/10", "ff00::/8")

Elements = dict[str, list[str]]  # by set, as nft writes them


# --- what a port is, in elements --------------------------------------------------------------------------------------


def _port_elements(port: Port, segment: Segment) -> tuple[Elements, Elements]:
    """What the sets of either table hold of *port*."""
    name, mac = f'"{tap(port)}"', _mac(port.mac)
    link: Elements = {"macs": [f"{name} . {mac}"], "llmacs": [f"{name} . 0x{mac.replace(':', '')}"]}
    host: Elements = {"taps": [name]}
    if segment.kind == "bridged":
        link["loose"] = [name]
    elif segment.kind == "service":
        link["serving"] = [name]
    if port.address4:
        address = ipaddress.IPv4Address(port.address4)
        link["source4"] = [f"{name} . {mac} . {address}"]
        link["own4"] = [f"{name} . {address}"]
        host["owner4"] = [f"{int(port.owner)} . {address}"]
    if port.address6:
        own = ipaddress.IPv6Address(port.address6)
        addresses = dict.fromkeys((own, _eui64("fe80::", mac), _eui64(str(own), mac)))
        link["six"] = [name]
        link["source6"] = [f"{name} . {address}" for address in addresses]
        link["targets"] = [f"{name} . 0x{int(address):032x}" for address in addresses]
        host["owner6"] = [f"{int(port.owner)} . {own}"]
    if port.rate:
        link["rates"] = [f'{name} : "{tap(port)}"']
    return link, host


def addresses(port: Port) -> Elements:
    """The elements that stand for *port*'s own addresses."""
    link, _ = _port_elements(port, Segment(segment=port.segment))
    return {name: link[name] for name in ("own4", "source6") if name in link}


def _limit(port: Port) -> str:
    """A guest's sending, in the kilobytes that nft counts; a second's worth of burst would make the rate none."""
    rate = max(1, int(port.rate) // 8)
    return f"rate over {rate} kbytes/second burst {max(64, rate // 4)} kbytes"


def _mac(text: str) -> str:
    octets = [int(octet, 16) for octet in text.split(":")]
    return ":".join(f"{octet:02x}" for octet in octets)


def _eui64(prefix: str, mac: str) -> ipaddress.IPv6Address:
    """The address that a guest makes of its MAC in the /64 of *prefix* (RFC 4291, appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    low = bytes([octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:]])
    return ipaddress.IPv6Address(ipaddress.IPv6Address(prefix).packed[:8] + low)


def _ours(state: State, ports: Iterable[Port]) -> tuple[Elements, Elements]:
    link: Elements = {}
    host: Elements = {}
    for port in ports:
        for total, part in zip((link, host), _port_elements(port, state.segments[port.segment]), strict=True):
            for name, elements in part.items():
                total.setdefault(name, []).extend(elements)
    return link, host


# --- what a segment is ------------------------------------------------------------------------------------------------


def _segment_elements(state: State) -> Elements:
    found: Elements = {}
    used = {port.segment for port in state.ports.values()} | set(state.segments)
    for number in sorted(used):
        segment = state.segments[number]
        if not is_ours(segment) or segment.kind == "bridged":
            continue
        name = f'"{bridge(segment)}"'
        if segment.gateway4:
            found.setdefault("gateway4", []).append(f"{name} . {ipaddress.IPv4Interface(segment.gateway4).ip}")
        if segment.gateway6:
            gateway6 = ipaddress.IPv6Interface(segment.gateway6).ip
            found.setdefault("gateway6", []).extend(f"{name} . {address}" for address in (gateway6, LINK_GATEWAY))
        if segment.outside != "none":
            found.setdefault(f"outside_{segment.outside}", []).append(name)
    return found


# --- what is open -----------------------------------------------------------------------------------------------------


def _opening_elements(state: State) -> tuple[Elements, Elements]:
    """Ways from a tap are for the bridge's table, ways from a bridge and from the world for the host's."""
    link: Elements = {}
    host: Elements = {}
    world: dict[str, str] = {}
    for key, ways in state.openings.items():
        port = state.ports.get(key)
        for way in ways if port else ():
            addresses = {"4": port.address4, "6": port.address6} if port else {}
            for family, text in addresses.items():
                if text:
                    address = ipaddress.ip_address(text)
                    if way.source:
                        side = host if way.source.startswith("vtb") else link
                        side.setdefault(f"ways{family}", []).append(_way(way, str(address)))
                    elif way.host_port and family == "4":
                        world.setdefault(f"{_proto(way)} . {int(way.host_port)}", f"{address} . {int(way.port)}")
                        host.setdefault("opened4", []).append(f"{address} . {_proto(way)} . {int(way.port)}")
    if world:
        host["world4"] = [f"{place} : {target}" for place, target in world.items()]
    return link, host


def _way(way: Opening, address: str) -> str:
    if not is_interface(way.source):
        raise ValueError(f"{way.source} is no interface")
    return f'"{way.source}" . {address} . {_proto(way)} . {int(way.port)}'


def _proto(way: Opening) -> str:
    return {"tcp": "tcp", "udp": "udp"}[way.proto]


# --- the tables -------------------------------------------------------------------------------------------------------

WAYS = {"4": "typeof iifname . ip daddr . meta l4proto . th dport", "6": "typeof iifname . ip6 daddr . meta l4proto . th dport"}
BRIDGE_SETS = {
    "macs": "type ifname . ether_addr",
    "llmacs": "typeof iifname . @th,208,48",  # the same for the link-layer options of neighbour discovery
    "source4": "type ifname . ether_addr . ipv4_addr",  # one look for every packet
    "own4": "type ifname . ipv4_addr",  # the same for ARP
    "source6": "type ifname . ipv6_addr",
    "targets": "typeof iifname . @th,64,128",  # the same for what neighbour discovery is about
    "six": "type ifname",
    "loose": "type ifname",
    "serving": "type ifname",  # on a service network: everybody else pays for one look
    "ways4": WAYS["4"],
    "ways6": WAYS["6"],
    "rates": "type ifname : limit",
}
INET_SETS = {
    "taps": "type ifname",
    "owner4": "type uid . ipv4_addr",
    "owner6": "type uid . ipv6_addr",
    "confined": "type uid",
    "gateway4": "type ifname . ipv4_addr",
    "gateway6": "type ifname . ipv6_addr",
    "outside_internet": "type ifname",
    "outside_all": "type ifname",
    "ways4": WAYS["4"],
    "ways6": WAYS["6"],
    "opened4": "typeof ip daddr . meta l4proto . th dport",  # whither it leads
    "world4": "type inet_proto . inet_service : ipv4_addr . inet_service",
}
OPEN_SETS = {BRIDGE: ("ways4", "ways6"), INET: ("ways4", "ways6", "opened4", "world4")}
MAPS = ("rates", "world4")

# No verdict maps: when the tables are replaced, the kernel empties the old maps a moment before the old chains are gone, and what
# passes just then would be dropped.
BRIDGE_CHAINS = f"""
  set storm {{ type ifname; flags dynamic; size 65535; timeout 10s; }}
  set dhcps {{ type ifname; flags dynamic; size 65535; timeout 10s; }}
  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
    iifname "vt*" jump guest
    iifname "vmshell*" meta mark set {BRIDGED}
  }}
  chain guest {{
    ether type != ip iifname . ether saddr != @macs drop
    ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 jump cast
    ether daddr & ff:ff:ff:00:00:00 == {GATEWAY_MACS} iifname @loose drop
    ether daddr & ff:ff:ff:00:00:00 != {GATEWAY_MACS} meta mark set {BRIDGED}
    RATED
    ether type ip jump ip_in
    ether type ip6 jump ip6_in
    ether type arp jump arp_in
    drop
  }}
  chain cast {{
    iifname . ether saddr != @macs drop
    ether daddr & ff:ff:ff:ff:ff:f0 == 01:80:c2:00:00:00 drop
    add @storm {{ iifname limit rate over {CASTS_PER_SECOND}/second burst {CASTS_BURST} packets }} drop
  }}
  chain arp_in {{
    arp htype != 1 drop
    arp ptype != ip drop
    arp hlen != 6 drop
    arp plen != 4 drop
    arp operation != {{ request, reply }} drop
    iifname . arp saddr ether != @macs drop
    arp operation request arp saddr ip 0.0.0.0 iifname . arp daddr ip @own4 accept
    iifname . arp saddr ip @own4 accept
    iifname @loose accept
    drop
  }}
  chain dhcp_in {{ # the MAC that DHCP itself names: in another's name nothing is asked for, declined or given back
    jump often
    iifname . @th,288,48 @llmacs return
    drop
  }}
  chain often {{
    add @dhcps {{ iifname limit rate over {DHCPS_PER_SECOND}/second burst {DHCPS_BURST} packets }} drop
  }}
  chain ip_in {{
    udp sport 67 drop
    udp dport 67 jump dhcp_in
    iifname . ether saddr . ip saddr @source4 accept
    iifname . ether saddr != @macs drop
    ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    iifname @loose accept
    drop
  }}
  chain ip6_in {{
    ip6 nexthdr != {{ tcp, udp, icmpv6 }} drop
    udp sport 547 drop
    udp dport 547 jump often
    icmpv6 type {{ nd-router-advert, nd-redirect, 138, 139, 140 }} drop
    icmpv6 type nd-router-solicit jump rs_in
    icmpv6 type nd-neighbor-solicit jump ns_in
    icmpv6 type nd-neighbor-advert jump na_in
    iifname . ip6 saddr @source6 accept
    iifname @loose accept
    drop
  }}
  chain rs_in {{
    jump often
    ip6 saddr :: ip6 length 8 iifname @six accept
    ip6 length 8 return
    ip6 length 16 @th,64,16 0x0101 iifname . @th,80,48 @llmacs return
    drop
  }}
  chain ns_in {{
    ip6 saddr :: ip6 length 24 iifname . @th,64,128 @targets accept
    ip6 saddr :: ip6 length 32 @th,192,16 0x0e01 iifname . @th,64,128 @targets accept
    ip6 length 24 return
    ip6 length 32 @th,192,16 0x0101 iifname . @th,208,48 @llmacs return
    drop
  }}
  chain na_in {{
    iifname != @loose iifname . @th,64,128 != @targets drop
    ip6 length 24 return
    ip6 length 32 @th,192,16 0x0201 iifname . @th,208,48 @llmacs return
    drop
  }}
  chain input {{
    type filter hook input priority -300; policy accept;
    iifname @loose drop
    meta mark {BRIDGED} meta pkttype host drop # to the tap's own end
    meta mark {BRIDGED} meta mark set 0
  }}
"""

# Every hook costs every frame, so these are there only where there is something to judge.
SERVICE_CHAINS = """
  chain forward {
    type filter hook forward priority -300; policy accept;
    iifname @serving jump service
  }
  chain service {
    ether type arp accept
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    ip frag-off & 0x1fff != 0 accept # the rest of what has its ports in the first: without that nobody puts it together
    iifname . ip daddr . meta l4proto . th dport @ways4 accept
    iifname . ip6 daddr . meta l4proto . th dport @ways6 accept
    tcp flags & (syn | ack) == syn drop
    oifname . ip saddr . meta l4proto . th sport @ways4 accept
    oifname . ip6 saddr . meta l4proto . th sport @ways6 accept
    drop
  }
"""
OTHERS_CHAINS = f"""
  chain postrouting {{
    type filter hook postrouting priority 300; policy accept;
    meta mark {BRIDGED} meta mark set 0
    oifname "vt*" ether daddr & 01:00:00:00:00:00 != 01:00:00:00:00:00 oifname . ether daddr != @macs drop
  }}
"""

COUNTED = (
    "\n".join(
        f"  set {name}{family} {{ type ipv{family}_addr; flags dynamic; size 65535; }}"
        for name in ("flows", "talks")
        for family in "46"
    ),
    f"add @flows4 {{ ip saddr ct count over {CONNECTIONS_MAX} }} drop\n"
    f"    add @flows6 {{ ip6 saddr ct count over {CONNECTIONS_MAX} }} drop",
    f"tcp dport 53 ct state new add @talks4 {{ ip saddr ct count over {NAMES_CONNECTIONS_MAX} }} drop\n"
    f"    tcp dport 53 ct state new add @talks6 {{ ip6 saddr ct count over {NAMES_CONNECTIONS_MAX} }} drop",
)

COUNTING = f"""
add table inet vmshellprobe
table inet vmshellprobe {{
  {COUNTED[0]}
  chain c {{
    type filter hook forward priority 0;
    {COUNTED[1]}
  }}
}}
"""

# Of what crosses by an opening, every packet is held to it, both ways: what is closed is closed for connections that stand, too.
# So is all that a user's socket sends first: a connection that is remembered is not its next user's. Only what has no uid any
# more, the end of a TCP connection whose socket is closed, goes by that it is established.
INET_CHAINS = f"""
  set echoes {{ type ifname; flags dynamic; size 65535; timeout 10s; }}
  set names4 {{ type ipv4_addr; flags dynamic; size 65535; timeout 10s; }}
  set names6 {{ type ipv6_addr; flags dynamic; size 65535; timeout 10s; }}
  chain prerouting {{
    type filter hook prerouting priority -450; policy accept;
    iifname "vt0*" drop
    iifname @taps drop
    meta mark {BRIDGED} notrack
  }}
  chain counted {{
    COUNTED
  }}
  chain input {{
    type filter hook input priority -5; policy accept;
    iifname "vtb*" jump from_guest
  }}
  chain from_guest {{ # first what is limited: a question may belong to a connection that stands
    udp dport 53 add @names4 {{ ip saddr limit rate over {NAMES_PER_SECOND}/second burst {NAMES_BURST} packets }} drop
    udp dport 53 add @names6 {{ ip6 saddr limit rate over {NAMES_PER_SECOND}/second burst {NAMES_BURST} packets }} drop
    icmp type echo-request jump echo
    icmpv6 type echo-request jump echo
    ct state established,related accept
    ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    ct state new jump counted
    TALKING
    iifname . ip daddr @gateway4 jump gateway
    icmpv6 type {{ nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert }} accept
    ip6 daddr ff02::1:2 udp sport 546 udp dport 547 accept
    iifname . ip6 daddr @gateway6 jump gateway
    drop
  }}
  chain echo {{
    add @echoes {{ iifname limit rate over {ECHOES_PER_SECOND}/second }} drop
  }}
  chain gateway {{
    meta l4proto {{ tcp, udp }} th dport 53 accept
    icmp type echo-request accept
    icmpv6 type echo-request accept
    udp sport 68 udp dport 67 accept
    udp sport 546 udp dport 547 accept
    drop
  }}
  chain forward {{
    type filter hook forward priority -5; policy accept;
    iifname "vtb*" jump across
    oifname "vtb*" jump inwards
  }}
  chain across {{
    meta mark {BRIDGED} accept
    ct state invalid drop
    ct state new jump counted
    oifname "vtb*" jump between
    ct direction reply ct status dnat jump answered
    ct state established,related accept
    ip daddr {{ {", ".join(NEVER4)} }} drop
    ip6 daddr {{ {", ".join(NEVER6)} }} drop
    iifname @outside_all accept
    iifname @outside_internet ip daddr != {{ {", ".join(NOT_INTERNET)} }} accept
    iifname @outside_internet ip6 daddr 2000::/3 accept
    reject with icmpx type admin-prohibited
  }}
  chain between {{
    ct direction original iifname . ip daddr . meta l4proto . th dport @ways4 accept
    ct direction original iifname . ip6 daddr . meta l4proto . th dport @ways6 accept
    ct direction reply oifname . ip saddr . meta l4proto . th sport @ways4 accept
    ct direction reply oifname . ip6 saddr . meta l4proto . th sport @ways6 accept
    drop
  }}
  chain answered {{
    ip saddr . meta l4proto . th sport @opened4 accept
    ct state related meta l4proto icmp accept
    drop
  }}
  chain inwards {{
    ct direction original ct status dnat ip daddr . meta l4proto . th dport @opened4 accept
    ct direction original ct status dnat ct state related meta l4proto icmp accept
    ct direction original drop
    ct state established,related accept
    drop
  }}
  chain output {{
    type filter hook output priority -5; policy accept;
    oifname "vtb*" jump to_guest
    meta skuid @confined ct direction original jump owned
  }}
  chain to_guest {{
    ct direction reply accept
    ct state related accept
    tcp flags & (syn | ack) != syn ct state established accept
    udp sport 67 udp dport 68 accept
    udp sport 547 udp dport 546 accept
    icmpv6 type {{ nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert }} accept
    meta skuid 0 accept
    jump owned
  }}
  chain owned {{
    meta skuid . ip daddr @owner4 accept
    meta skuid . ip6 daddr @owner6 accept
    ip daddr {HOST_DNS} meta l4proto {{ tcp, udp }} th dport 53 accept
    reject with icmpx type admin-prohibited
  }}
  chain published {{
    type nat hook prerouting priority -100; policy accept;
    iifname != "vtb*" fib daddr type local dnat ip to meta l4proto . th dport map @world4
  }}
"""


def masquerading(settings: Settings) -> Iterator[str]:
    """The rules that give all guests the host's address on the way out."""
    yield f'ip saddr {ipaddress.IPv4Network(settings.pool4)} oifname != "vtb*" masquerade'
    if settings.pool6:
        yield f'ip6 saddr {ipaddress.IPv6Network(settings.pool6)} oifname != "vtb*" masquerade'


def _masquerade(state: State) -> Iterator[str]:
    yield "  chain masked {\n    type nat hook postrouting priority 100; policy accept;"
    if state.settings:
        yield from (f"    {rule}" for rule in masquerading(state.settings))
    yield "  }"


def _sets(kinds: dict[str, str], elements: Elements) -> Iterator[str]:
    for name, kind in kinds.items():
        filled = f" elements = {{ {', '.join(dict.fromkeys(elements[name]))} }}" if elements.get(name) else ""
        yield f"  {'map' if name in MAPS else 'set'} {name} {{ {kind};{filled} }}"


def _merged(*parts: Elements) -> Elements:
    found: Elements = {}
    for part in parts:
        for name, elements in part.items():
            found.setdefault(name, []).extend(elements)
    return found


# --- what nftables is told --------------------------------------------------------------------------------------------


def shape(state: State) -> tuple[bool, bool, bool]:
    """Which chains and rules there have to be: for service networks, for segments with frames of several owners, for rates."""
    kinds = {segment.kind for segment in state.segments.values()}
    return "service" in kinds, kinds != {"private"}, any(port.rate for port in state.ports.values())


def everything(state: State, counts: bool = True) -> str:
    """Both tables with all that is in them, in place of what they are: one transaction, no packet passes unjudged.

    *counts*: the kernel can count the connections of an address.
    """
    ports = list(state.ports.values())
    link, host = _ours(state, ports)
    open_link, open_host = _opening_elements(state)
    confined = {"confined": [str(int(uid)) for uid in sorted(state.confined)]}
    lines = []
    for table in TABLES:
        lines += [f"add table {table}", f"delete table {table}"]
    lines += [f"table {BRIDGE} {{", *(f"  limit {tap(port)} {{ {_limit(port)} }}" for port in ports if port.rate)]
    service, others, rated = shape(state)
    chains = BRIDGE_CHAINS.replace("RATED", "limit name iifname map @rates drop" if rated else "")
    chains += (SERVICE_CHAINS if service else "") + (OTHERS_CHAINS if others else "")
    lines += [*_sets(BRIDGE_SETS, _merged(link, open_link)), chains, "}"]
    lines += [f"table {INET} {{", *_sets(INET_SETS, _merged(host, open_host, confined, _segment_elements(state)))]
    counted = COUNTED if counts else ("", "", "")
    chains = INET_CHAINS.replace("COUNTED", counted[1]).replace("TALKING", counted[2])
    lines += [counted[0], chains, *_masquerade(state), "}"]
    return "\n".join(lines) + "\n"


def adding(state: State, ports: Iterable[Port]) -> str:
    """What *ports* bring; their segments are in *state* and known to the tables."""
    ports = list(ports)
    limits = [f"add limit {BRIDGE} {tap(port)} {_limit(port)}" for port in ports if port.rate]
    return _lines([*limits, *_changes("add", state, ports)])


def removing(state: State, ports: Iterable[Port]) -> str:
    """What goes with *ports*, all of which the tables know."""
    ports = list(ports)
    limits = [f"delete limit {BRIDGE} {tap(port)}" for port in ports if port.rate]
    return _lines([*_changes("delete", state, ports), *limits])


def opening(state: State) -> str:
    """All the ways there are, in place of those there were."""
    lines = []
    for table, elements in zip(TABLES, _opening_elements(state), strict=True):
        for name in OPEN_SETS[table]:
            lines.append(f"flush {'map' if name in MAPS else 'set'} {table} {name}")
            if elements.get(name):
                lines.append(f"add element {table} {name} {{ {', '.join(dict.fromkeys(elements[name]))} }}")
    return _lines(lines)


def _changes(verb: str, state: State, ports: list[Port]) -> Iterator[str]:
    for table, elements in zip(TABLES, _ours(state, ports), strict=True):
        for name, values in elements.items():
            yield f"{verb} element {table} {name} {{ {', '.join(dict.fromkeys(values))} }}"


def _lines(lines: list[str]) -> str:
    return "\n".join(lines) + "\n" if lines else ""
