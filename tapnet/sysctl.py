"""Settings of interfaces below /proc/sys/net, which CAP_NET_ADMIN suffices to write.

Runs in: tapnet. Touches /proc/sys/net.
"""

from __future__ import annotations

import os

from vmshell.refusals import NetworkFailed

ROOT = "/proc/sys/net"

# A bridge of ours answers ARP for its own address only (E20), takes only packets that belong there, and believes nobody's routes.
BRIDGE4 = {"arp_ignore": "1", "rp_filter": "1", "send_redirects": "0", "accept_redirects": "0", "accept_source_route": "0"}
# With IPv6 it is the router: addresses are what we put there (no link-local of the kernel's making), at once and unasked.
ROUTER6 = {"accept_ra": "0", "accept_dad": "0", "accept_redirects": "0", "autoconf": "0", "addr_gen_mode": "1"}


def write(path: str, value: str) -> None:
    try:
        fd = os.open(f"{ROOT}/{path}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, value.encode("ascii"))
        finally:
            os.close(fd)
    except OSError as error:
        raise NetworkFailed(problem=f"{ROOT}/{path} cannot be set to {value}: {error.strerror}") from error


def read(path: str) -> str:
    try:
        with open(f"{ROOT}/{path}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def has_ipv6() -> bool:
    """Does this kernel speak IPv6 at all?"""
    return os.path.isdir(f"{ROOT}/ipv6")


def no_ipv6(name: str) -> None:
    """The host has no IPv6 address on *name* and hears nothing there (E14, E21). Before it is up."""
    if has_ipv6():
        write(f"ipv6/conf/{name}/disable_ipv6", "1")


def tap(name: str) -> None:
    """The host says nothing on a tap, should it ever be outside of a bridge. Before it is up."""
    write(f"ipv4/conf/{name}/arp_ignore", "8")
    no_ipv6(name)


def bridge(name: str, router4: bool, router6: bool) -> None:
    """What a bridge of ours may and may not, before it is up."""
    for key, value in BRIDGE4.items():
        write(f"ipv4/conf/{name}/{key}", value)
    write(f"ipv4/conf/{name}/forwarding", "1" if router4 else "0")
    if not router6:
        no_ipv6(name)
        return
    for key, value in ROUTER6.items():
        write(f"ipv6/conf/{name}/{key}", value)
    write(f"ipv6/conf/{name}/disable_ipv6", "0")


def forward4() -> None:
    """Let the host route IPv4. Never taken back: others may rely on it by then."""
    if read("ipv4/ip_forward") != "1":
        write("ipv4/ip_forward", "1")


def forward6() -> None:
    """Let the host route IPv6. A router ignores advertisements, so interfaces that listen to them are told to go on."""
    if read("ipv6/conf/all/forwarding") == "1":
        return
    for name in os.listdir(f"{ROOT}/ipv6/conf"):
        if name not in ("all", "default") and read(f"ipv6/conf/{name}/accept_ra") == "1":
            write(f"ipv6/conf/{name}/accept_ra", "2")
    write("ipv6/conf/all/forwarding", "1")
