"""P9: ports for a hundred VMs at once, and for five hundred: tap, bridge, filter, up. Ours against `ip -batch` and one `nft -f`.

Both start from an empty network namespace in which our tables are loaded, and end with the same in it: a bridge with its address,
taps that are isolated, do not learn, are not flooded to and have no IPv6, and the filter of all of them. Ours is what the broker
waits for: from its first request until it holds the last descriptor. The other's taps stay without one (`ip tuntap` makes them
persistent), which no QEMU could be given; that is in its favour. What it takes to clean up is in neither.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from bench.figures import Row, compared, place, skipped
from tapnet import rules
from tapnet.state import State, tap
from tests.process.tapnets import SETTINGS, Namespace, Tapnet, address, mac, segment, unable
from vmshell.messages import Port

MOST = 3.0
PAIRS = {100: 7, 500: 5}
QUIET = "/proc/sys/net/ipv6/conf/default/disable_ipv6"


def rows() -> list[Row]:
    reason = unable()
    if reason:
        return [skipped("P9", "taps made, bridged, filtered and up", reason)]
    with place() as folder:
        return [_compared(folder, count) for count in PAIRS]


def _compared(folder: Path, count: int) -> Row:
    ports = [_port(number) for number in range(1, count + 1)]
    what = f"{count} ports: tap, bridge, filter, up (against ip -batch and one nft -f)"
    return compared("P9", what, lambda: _ours(folder, ports), lambda: _other(folder, ports), MOST, PAIRS[count])


def _port(number: int) -> Port:
    # All in one segment, which has room for five hundred.
    return Port(number=number, nic=0, segment=1, mac=mac(number), address4=address(number), isolated=True, create=True)


def _ours(folder: Path, ports: list[Port]) -> float:
    namespace = Namespace()
    try:
        tapnet = Tapnet(namespace, folder / "run")
        tapnet.settle()
        fds = []
        began = time.perf_counter()
        tapnet.send(segment(gateway4="10.77.0.1/20"))
        for port in ports:
            tapnet.send(port)
        for _ in range(len(ports) + 1):
            _, answer, fd = tapnet.receive()
            assert "ok" in answer, answer
            fds.append(fd)
        took = time.perf_counter() - began
        _compare(namespace, ports)
        tapnet.kill()
    finally:
        # The namespace takes its taps with it, all at once; one after the other would take 20 ms each.
        namespace.close()
    for fd in fds:
        if fd >= 0:
            os.close(fd)
    return took


def _other(folder: Path, ports: list[Port]) -> float:
    bridge = "vtb000001"
    lines = [f"link add {bridge} address 06:ff:00:00:00:01 type bridge stp_state 0 ageing_time 0 mcast_snooping 0"]
    lines += [f"address add 10.77.0.1/20 dev {bridge}", f"link set {bridge} up"]
    for port in ports:
        name = tap(port)
        lines += [f"tuntap add dev {name} mode tap", f"link set {name} master {bridge}"]
        lines += [f"link set {name} type bridge_slave isolated on learning off flood off guard on", f"link set {name} up"]
    state = State(
        SETTINGS, segments={1: segment(gateway4="10.77.0.1/20")}, ports={(port.number, port.nic): port for port in ports}
    )
    (folder / "links").write_text("\n".join(lines) + "\n", encoding="ascii")
    (folder / "filter").write_text(rules.everything(state), encoding="ascii")
    (folder / "tables").write_text(rules.everything(State(SETTINGS)), encoding="ascii")
    namespace = Namespace()
    try:
        namespace.run("sh", "-c", f"echo 1 > {QUIET}; nft -f {folder}/tables")
        # Inside the namespace already: entering it is no part of the work.
        script = f"date +%s%N; nft -f {folder}/filter && ip -batch {folder}/links && date +%s%N"
        began, ended = namespace.run("sh", "-c", script).split()
        _compare(namespace, ports)
    finally:
        namespace.close()
    return (int(ended) - int(began)) / 1e9


def _compare(namespace: Namespace, ports: list[Port]) -> None:
    """All of it has to be there."""
    up = [name for name, flags in namespace.links().items() if name.startswith("vt0") and "UP" in flags.split(",")]
    isolated = subprocess.run(namespace.command("bridge", "-d", "link"), capture_output=True, text=True).stdout
    assert len(up) == len(ports) == isolated.count("isolated on"), (len(up), isolated.count("isolated on"))
    assert namespace.filter().count(f'"{tap(ports[-1])}" . {ports[-1].mac}') == 2  # by MAC, and by MAC and address
