"""P14: what the filter costs: frames from guest to guest and from guest to host, with our tables loaded and with none.

Frames go into a tap and come out of another (or are dropped by the host, which has no listener), as QEMU's virtio card hands them
over: 64 KiB segments that the kernel would cut for a wire (what a guest's TCP sends), and full Ethernet frames. The work of a
frame is done in the sender's system call, so the time for a round of them is the throughput.
"""

from __future__ import annotations

import os
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.figures import Row, compared, place, skipped
from tapnet import rules
from tapnet.state import State
from tests.frames import ethernet, ip4, tcp, udp
from tests.process.tapnets import SETTINGS, VNET_HEADER, Namespace, Tapnet, address, mac, port, segment, unable
from vmshell.messages import Port

MOST = 1.03
PAIRS = 15
ROUND = 200  # frames on their way at once; a tap holds 1,000
ROUNDS = 20
GSO_TCP4 = 1
SEGMENT, FULL = 61_440, 1460  # bytes of payload
ACK = 0x10


def rows() -> list[Row]:
    reason = unable()
    if reason:
        return [skipped("P14", "cost of the filter", reason)]
    with place() as folder:
        return _measured(folder)


def _measured(folder: Path) -> list[Row]:
    namespace = Namespace()
    tapnet = Tapnet(namespace, folder / "run")
    try:
        ports = [port(1), port(2)]
        tapnet.settle(segment(kind="shared"))
        one, two = (tapnet.plug(each) for each in ports)
        os.set_blocking(two, False)
        gateway = namespace.run("cat", "/sys/class/net/vtb000001/address").strip()
        namespace.run("ip", "neigh", "replace", address(1), "lladdr", mac(1), "dev", "vtb000001")
        tapnet.kill()  # it would put the tables back
        to_host = _frame(gateway, udp(40000, 53, bytes(FULL)), 17, "10.77.1.1")
        to_guest = _frame(mac(2), tcp(1, 2, ACK) + bytes(FULL), 6, address(2))
        cases: dict[str, Callable[[], float]] = {
            "guest to guest, 60 KiB segments": lambda: _pump(one, two, _segment()),
            "guest to guest, full frames": lambda: _pump(one, two, to_guest),
            "guest to host, full frames": lambda: _pump(one, -1, to_host),
        }
        found = []
        for what, run in cases.items():
            ours, bare = _with(namespace, ports, run), _without(namespace, run)
            found.append(compared("P14", f"{what}: with the filter (against none)", ours, bare, MOST, PAIRS))
        os.close(one)
        os.close(two)
        return found
    finally:
        namespace.close()


def _segment() -> bytes:
    payload = tcp(1, 2, ACK) + bytes(SEGMENT)
    frame = _frame(mac(2), payload, 6, address(2))[len(VNET_HEADER) :]
    # Checksum and cutting are left to whoever needs them, as a virtio guest does.
    return struct.pack("<BBHHHH", 1, GSO_TCP4, 54, FULL, 34, 16) + frame


def _frame(target: str, payload: bytes, proto: int, to: str) -> bytes:
    return VNET_HEADER + ethernet(target, mac(1), 0x0800, ip4(address(1), to, proto, payload))


def _pump(source: int, target: int, frame: bytes) -> float:
    began = time.perf_counter()
    for _ in range(ROUNDS):
        for _ in range(ROUND):
            os.write(source, frame)
        if target >= 0:
            for _ in range(ROUND):
                os.read(target, 1 << 17)  # BlockingIOError: a frame did not arrive, and nothing was measured
    return time.perf_counter() - began


def _with(namespace: Namespace, ports: list[Port], run: Callable[[], float]) -> Callable[[], float]:
    state = State(SETTINGS, {1: segment(kind="shared")}, {(each.number, each.nic): each for each in ports})
    return lambda: _loaded(namespace, rules.everything(state), run)


def _without(namespace: Namespace, run: Callable[[], float]) -> Callable[[], float]:
    return lambda: _loaded(namespace, "flush ruleset\n", run)


def _loaded(namespace: Namespace, text: str, run: Callable[[], float]) -> float:
    subprocess.run(namespace.command("nft", "-f", "-"), input=text, text=True, check=True)
    return run()
