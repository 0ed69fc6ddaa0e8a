"""P14: what the filter costs: throughput from guest to guest and from guest to host, with our tables loaded and with none.

The aim is on what a user has: a TCP stream between real guests, counted at the sender's tap while the tables come and go under
it. Below stands the worst case, which no guest reaches: no QEMU, frames go into a tap and come out of another (or are dropped by
the host, which has no listener). The work of a frame is done in the sender's system call, so the time for a round of them is the
throughput. A private network, which is the default; br_netfilter is off, as where nobody has asked for it.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.figures import Row, compared, place, skipped
from tapnet import rules
from tapnet.state import State
from tests.frames import ethernet, ip4, tcp, udp
from tests.images import demo_images
from tests.process.tapnets import SETTINGS, Namespace, Tapnet, address, mac, port, segment, unable
from vmshell.admin import cpio
from vmshell.messages import Port
from vmshell.numbering import tap_name

MOST = 1.03
PAIRS = 15
ROUND = 200  # frames on their way at once; a tap holds 1,000
ROUNDS = 20
FULL = 1460  # bytes of payload
ACK = 0x10

STREAM = """\
#!/bin/sh
export PATH=/sbin:/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
sh /lib/modules/load
for word in $(cat /proc/cmdline); do case $word in stream=*|address=*) eval "$word" ;; esac; done
ip link set eth0 up
ip addr add "$address/24" dev eth0
while :; do
    if [ "$stream" = sink ]; then nc -l -p 5001 >/dev/null
    else nc "${stream%:*}" "${stream#*:}" </dev/zero >/dev/null
    fi
    sleep 1
done
"""
SINK = """
import socket
server = socket.create_server(("10.77.1.1", 53))
while True:
    connection, _ = server.accept()
    buffer = bytearray(1 << 20)
    while connection.recv_into(buffer):
        pass
"""


def rows() -> list[Row]:
    reason = unable()
    if reason:
        return [skipped("P14", "cost of the filter", reason)]
    with place() as folder:
        return _streams(folder) + _pumps(folder)


# --- a stream between real guests -------------------------------------------------------------------------------------


def _streams(folder: Path) -> list[Row]:
    namespace = Namespace()
    tapnet = Tapnet(namespace, folder / "streams")
    try:
        ports = [port(1), port(2)]
        _prepare(namespace)
        tapnet.settle(segment(kind="private"))
        taps = [tapnet.plug(each) for each in ports]
        tapnet.kill()
        initrd = _stream_image(folder)
        rows = []
        with _sink(namespace), _guest(initrd, taps[1], 2, "sink"):
            for what, target in (("guest to guest", f"{address(2)}:5001"), ("guest to host", "10.77.1.1:53")):
                with _guest(initrd, taps[0], 1, target):
                    _wait_for_stream(namespace)
                    stream = partial(_seconds_per_gigabyte, namespace)
                    ours, bare = _with(namespace, ports, stream), _without(namespace, stream)
                    name = f"{what}, TCP stream of a real guest, s/GB: with the filter (against none)"
                    rows.append(compared("P14", name, ours, bare, MOST, PAIRS, "s"))
        for tap in taps:
            os.close(tap)
        return rows
    finally:
        namespace.close()


def _stream_image(folder: Path) -> Path:
    """The demo guest's initramfs with a first program of our own behind it."""
    more = cpio.archive([cpio.regular("stream", STREAM, 0o755)])
    image = folder / "stream.gz"
    image.write_bytes((demo_images() / "demo/initrd.gz").read_bytes() + gzip.compress(more))
    return image


@contextlib.contextmanager
def _guest(initrd: Path, tap: int, number: int, role: str) -> Iterator[None]:
    """VM *number* on its tap, the card as the launch line gives it; *role* is `sink`, or where to send to."""
    command_line = f"console=ttyS0 quiet panic=-1 rdinit=/stream stream={role} address={address(number)}"
    argv = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "160", "-nographic", "-no-reboot", "-nodefaults"]
    argv += ["-kernel", str(demo_images() / "demo/vmlinuz"), "-initrd", str(initrd), "-append", command_line]
    argv += ["-netdev", f"tap,id=n0,fd={tap},vhost=off", "-device", f"virtio-net-pci,netdev=n0,mac={mac(number)}"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[tap]) as guest:
        try:
            yield
        finally:
            guest.kill()


@contextlib.contextmanager
def _sink(namespace: Namespace) -> Iterator[None]:
    """Takes what comes to the host's TCP port 53, which the filter leaves open for DNS."""
    with subprocess.Popen(namespace.command(sys.executable, "-IS", "-c", SINK)) as sink:
        try:
            yield
        finally:
            sink.kill()


def _sent(namespace: Namespace) -> int:
    """Bytes the guest that sends has sent."""
    return int(namespace.run("cat", f"/sys/class/net/{tap_name(1, 0)}/statistics/rx_bytes"))


def _wait_for_stream(namespace: Namespace) -> None:
    end = time.monotonic() + 240
    before = _sent(namespace)
    while _sent(namespace) - before < 50_000_000:
        if time.monotonic() > end:
            raise RuntimeError("no stream came from the guest")
        time.sleep(1)


def _seconds_per_gigabyte(namespace: Namespace) -> float:
    time.sleep(0.2)  # what was on its way under the other tables
    began, before = time.perf_counter(), _sent(namespace)
    time.sleep(2)
    sent = _sent(namespace) - before
    return (time.perf_counter() - began) / sent * 1e9


# --- frames without QEMU ----------------------------------------------------------------------------------------------


def _pumps(folder: Path) -> list[Row]:
    namespace = Namespace()
    tapnet = Tapnet(namespace, folder / "run")
    try:
        ports = [port(1), port(2)]
        _prepare(namespace)
        tapnet.settle(segment(kind="private"))
        one, two = (tapnet.plug(each) for each in ports)
        os.set_blocking(two, False)
        gateway = namespace.run("cat", "/sys/class/net/vtb000001/address").strip()
        namespace.run("ip", "neigh", "replace", address(1), "lladdr", mac(1), "dev", "vtb000001")
        tapnet.kill()  # it would put the tables back
        to_host = _frame(gateway, udp(40000, 53, bytes(FULL)), 17, "10.77.1.1")
        to_guest = _frame(mac(2), tcp(1, 2, ACK) + bytes(FULL), 6, address(2))
        cases: dict[str, Callable[[], float]] = {
            "tap to tap, full frames": lambda: _pump(one, two, to_guest),
            "tap to host, full frames": lambda: _pump(one, -1, to_host),
        }
        found = []
        for what, run in cases.items():
            ours, bare = _with(namespace, ports, run), _without(namespace, run)
            found.append(compared("P14", f"no QEMU, {what}: with the filter (against none)", ours, bare, None, PAIRS))
        os.close(one)
        os.close(two)
        return found
    finally:
        namespace.close()


def _frame(target: str, payload: bytes, proto: int, to: str) -> bytes:
    return ethernet(target, mac(1), 0x0800, ip4(address(1), to, proto, payload))


def _prepare(namespace: Namespace) -> None:
    if os.path.exists("/proc/sys/net/bridge"):
        namespace.set("bridge/bridge-nf-call-iptables", "0")


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
    state = State(SETTINGS, segments={1: segment(kind="private")}, ports={(each.number, each.nic): each for each in ports})
    return lambda: _loaded(namespace, rules.everything(state), run)


def _without(namespace: Namespace, run: Callable[[], float]) -> Callable[[], float]:
    return lambda: _loaded(namespace, "flush ruleset\n", run)


def _loaded(namespace: Namespace, text: str, run: Callable[[], float]) -> float:
    subprocess.run(namespace.command("nft", "-f", "-"), input=text, text=True, check=True)
    return run()
