"""P6, P7, P8: the console relay's throughput, echo and fairness, beside `socat` as a plain hop or beside itself when quiet.

A synthetic producer stands where QEMU would, at the other end of the serial port, so that nothing but the hop is measured. The
relay is the real process with its log on a real disk, the producer is on FIFOs; `socat` runs as `socat UNIX-LISTEN:…
UNIX-CONNECT:…`, without a log, and the producer is on a socket, as it would be without us. Pairs are interleaved, the figure is
the median of the pairs' ratios with the smallest and the largest.

    python3 bench/relay.py [PAIRS]
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TypeVar

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from vmshell import wire  # noqa: E402
from vmshell.broker.lifecycle import serial_port  # noqa: E402
from vmshell.consoles import DATA, DATA_MAX, FRAME, cells  # noqa: E402
from vmshell.layout import Layout  # noqa: E402
from vmshell.messages import Attach, Forget, ToRelay, Watch  # noqa: E402

PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
FLOOD_BYTES = 512 << 20
SINGLE_BYTES = 2_000_000  # in as many writes
UART = 50_000  # bytes a second, one at a time: a guest that prints a lot
CHUNK = 64 * 1024
ECHOES = 1000
LOG_MAX = 1 << 20
VIRTIO = 12_000_000  # bytes a second: what a virtio console reaches under emulation, 24 times its serial port

T = TypeVar("T")
What = Callable[[int, int], None]  # what a guest does with the descriptors of its serial port: keys come, text goes
Row = tuple[str, str, str, float, str, bool]


# --- the two ends -----------------------------------------------------------------------------------------------------


class Guest:
    """A process in QEMU's place that does *what* when it is told to go. *port* gives it the descriptors of its serial port."""

    def __init__(self, port: Callable[[], tuple[int, ...]], what: What) -> None:
        wait, self._go = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self._go)
                reader, writer = port()
                os.read(wait, 1)
                what(reader, writer)
            except OSError:
                pass
            finally:
                os._exit(0)
        os.close(wait)

    def go(self) -> None:
        os.write(self._go, b"!")

    def close(self) -> None:
        os.close(self._go)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def flood(total: int, piece: int = CHUNK) -> What:
    """*total* bytes as fast as they are taken, *piece* at a time."""

    def run(reader: int, writer: int) -> None:
        block = os.urandom(piece)
        for _ in range(total // piece):
            _write(writer, block)

    return run


def trickle(rate: int, piece: int) -> What:
    """*rate* bytes a second for ever, *piece* at a time."""

    def run(reader: int, writer: int) -> None:
        block, began, sent = os.urandom(piece), time.monotonic(), 0
        while True:
            _write(writer, block)
            sent += piece
            ahead = sent / rate - (time.monotonic() - began)
            if ahead > 0.001:
                time.sleep(ahead)

    return run


def echo(reader: int, writer: int) -> None:
    while data := os.read(reader, CHUNK):
        _write(writer, data)


def _write(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])


class Hop:
    """What stands between guest and viewer: *read* takes what came, *press* types a key; *share* of what comes is the guest's."""

    def __init__(self, read: Callable[[], bytes], press: Callable[[], object], share: float = 1.0) -> None:
        self.read = read
        self._press = press
        self._share = share

    def drain(self, total: int) -> float:
        """Read *total* bytes of the guest's and return the seconds it took."""
        got = 0
        wanted = total / self._share
        began = time.perf_counter()
        while got < wanted:
            size = len(self.read())
            if not size:
                raise RuntimeError(f"the hop closed after {got} of {wanted} bytes")
            got += size
        return time.perf_counter() - began

    def echoes(self, count: int) -> list[float]:
        """Type *count* characters, each after the echo of the one before; seconds of each, sorted."""
        seen = []
        for _ in range(count):
            began = time.perf_counter()
            self._press()
            self.read()
            seen.append(time.perf_counter() - began)
        return sorted(seen)


def console(shown: int, typed: int) -> Hop:
    """The viewer's end of the relay, without taking frames apart: in a flood all but a few are full."""
    return Hop(partial(os.read, shown, CHUNK), partial(os.write, typed, cells(DATA, b"x")), DATA_MAX / FRAME)


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))]


# --- the two hops -----------------------------------------------------------------------------------------------------


class Relay:
    """The real relay process, spoken to as the broker does."""

    def __init__(self, base: str) -> None:
        self.layout = Layout(etc=f"{base}/etc", state=f"{base}/state", run=f"{base}/run", log=f"{base}/log", embedded=False)
        os.makedirs(self.layout.run_vms)
        starter = os.path.join(ROOT, "vmshell", "__main__.py")
        self.process = subprocess.Popen([PYTHON, "-IS", starter, "relay", self.layout.to_args()])
        self.broker = _until(lambda: wire.connect(self.layout.relay_socket, 20.0))
        self._id = 0
        self._number = 0

    def call(self, message: ToRelay, fds: tuple[int, ...] = ()) -> None:
        self._id += 1
        wire.send(self.broker, {"id": self._id, **message.to_body()}, fds)
        while True:
            packet = wire.recv(self.broker)
            if packet is None:
                raise RuntimeError("the relay is gone")
            if packet.body.get("id") == self._id:
                if "ok" not in packet.body:
                    raise RuntimeError(str(packet.body))
                return

    @contextmanager
    def hop(self, what: What) -> Iterator[tuple[Guest, Hop]]:
        self._number += 1
        number = self._number
        os.makedirs(self.layout.vm_run(number))
        with ExitStack() as stack:
            ends = serial_port.make(self.layout.vm_run(number), stack)
            guest = Guest(lambda: ends, what)
        monitor = socket.socket(socket.AF_UNIX)
        monitor.bind(f"{self.layout.vm_run(number)}/qmp.sock")
        monitor.listen(4)
        keys, typed = os.pipe()
        shown, output = os.pipe()
        try:
            with ExitStack() as stack:
                stack.callback(os.close, keys)
                stack.callback(os.close, output)
                self.call(Watch(number=number, log_max=LOG_MAX), serial_port.open_both(self.layout.vm_run(number), stack))
                self.call(Attach(number=number, uid=1001, label="bench"), (keys, output))
            os.read(shown, CHUNK)  # hello
            yield guest, console(shown, typed)
        finally:
            os.close(shown)
            os.close(typed)
            guest.close()
            monitor.close()
            self.call(Forget(number=number, purge=True))

    def close(self) -> None:
        self.broker.close()
        self.process.terminate()
        self.process.wait(20)


@contextmanager
def socat(base: str, what: What, *options: str) -> Iterator[tuple[Guest, Hop]]:
    inner, outer = f"{base}/guest.sock", f"{base}/hop.sock"
    for path in (inner, outer):
        if os.path.exists(path):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(inner)
    listener.listen(4)

    def accepted() -> tuple[int, int]:
        fd = listener.accept()[0].detach()
        return fd, fd

    guest = Guest(accepted, what)
    listener.close()
    process = subprocess.Popen(["socat", *options, f"UNIX-LISTEN:{outer}", f"UNIX-CONNECT:{inner}"], stderr=subprocess.DEVNULL)
    viewer: socket.socket | None = None
    try:
        viewer = _until(lambda: _connect(outer))
        yield guest, Hop(partial(viewer.recv, CHUNK), partial(viewer.send, b"x"))
    finally:
        if viewer is not None:
            viewer.close()
        guest.close()
        process.terminate()
        process.wait(20)


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _until(attempt: Callable[[], T]) -> T:
    deadline = time.monotonic() + 20
    while True:
        try:
            return attempt()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


# --- the rows ---------------------------------------------------------------------------------------------------------


def _ratio(pairs: list[tuple[float, float]]) -> tuple[float, str]:
    ratios = [ours / theirs for ours, theirs in pairs]
    return statistics.median(ratios), f"({min(ratios):.2f}-{max(ratios):.2f})"


def throughput(
    base: str, relay: Relay, pairs: int, *options: str, total: int = FLOOD_BYTES, piece: int = CHUNK
) -> tuple[str, float]:
    """Bytes a second with one viewer, written *piece* at a time: the figure as text, and the ratio."""
    seen = []
    for _ in range(pairs):
        with relay.hop(flood(total, piece)) as (guest, hop):
            guest.go()
            ours = total / hop.drain(total)
        with socat(base, flood(total, piece), *options) as (guest, hop):
            guest.go()
            theirs = total / hop.drain(total)
        seen.append((ours, theirs))
    ratio, spread = _ratio(seen)
    medians = [statistics.median(column) / 1e6 for column in zip(*seen, strict=True)]
    return f"{medians[0]:.3g} against {medians[1]:.3g} MB/s {spread}", ratio


def echo_time(base: str, relay: Relay, pairs: int) -> list[tuple[str, float]]:
    """p50 and p99 of the echo, each as figure and ratio."""
    # Where the scheduler puts three processes on two processors doubles the figure or halves it, for either hop and for
    # seconds on end: many short pairs, and each hop first in half of them.
    seen: list[tuple[list[float], list[float]]] = []
    for index in range(3 * pairs):
        took: dict[str, list[float]] = {}
        for name in ("ours", "theirs") if index % 2 else ("theirs", "ours"):
            with relay.hop(echo) if name == "ours" else socat(base, echo) as (guest, hop):
                guest.go()
                hop.echoes(50)
                took[name] = hop.echoes(ECHOES)
        seen.append((took["ours"], took["theirs"]))
    found = []
    for share in (0.5, 0.99):
        figures = [(percentile(ours, share), percentile(theirs, share)) for ours, theirs in seen]
        ratio, spread = _ratio(figures)
        medians = [statistics.median(column) * 1e6 for column in zip(*figures, strict=True)]
        found.append((f"{medians[0]:.0f} against {medians[1]:.0f} µs {spread}", ratio))
    return found


def fairness(relay: Relay, pairs: int, noise: What, others: int = 1) -> tuple[str, float]:
    """Echo p99 while *others* consoles make noise (their viewers read along), against the same when all is quiet."""
    seen = []
    for _ in range(pairs):
        with relay.hop(echo) as (guest, hop), ExitStack() as stack:
            guest.go()
            quiet = percentile(hop.echoes(ECHOES), 0.99)
            for _ in range(others):
                _read_along(stack, *stack.enter_context(relay.hop(noise)))
            time.sleep(0.2)
            noisy = percentile(hop.echoes(ECHOES), 0.99)
        seen.append((noisy, quiet))
    ratio, spread = _ratio(seen)
    medians = [statistics.median(column) * 1e6 for column in zip(*seen, strict=True)]
    return f"{medians[0]:.0f} against {medians[1]:.0f} µs {spread}", ratio


def _read_along(stack: ExitStack, loud: Guest, hop: Hop) -> None:
    """Have *loud* go, and a process of its own read what it says, until *stack* ends."""
    reader = os.fork()
    if not reader:
        try:
            loud.go()
            while hop.read():
                pass
        finally:
            os._exit(0)
    stack.callback(os.waitpid, reader, 0)
    stack.callback(os.kill, reader, signal.SIGKILL)


def rows(pairs: int = 5) -> list[Row]:
    """Each row as (id, what, figure, ratio, aim, ok)."""
    # Beside the checkout, not in /tmp: that is memory on many hosts, and the log is meant to meet a disk.
    base = tempfile.mkdtemp(prefix="bench-", dir=os.environ.get("BENCH_DIR", os.path.join(ROOT, "bench")))
    relay = Relay(base)
    try:
        found: list[Row] = []
        figure, ratio = throughput(base, relay, pairs)
        found.append(("P6", "relay with log, bytes/s, against socat", figure, ratio, ">= 1.0", ratio >= 1.0))
        figure, ratio = throughput(base, relay, pairs, total=SINGLE_BYTES, piece=1)
        found.append(("P6", "the same, written a byte at a time", figure, ratio, ">= 1.0", ratio >= 1.0))
        (p50, ratio50), (p99, ratio99) = echo_time(base, relay, pairs)
        found.append(("P7", "echo p50 against socat", p50, ratio50, "<= 1.0", ratio50 <= 1.0))
        found.append(("P7", "echo p99 against socat", p99, ratio99, "<= 1.2", ratio99 <= 1.2))
        figure, ratio = fairness(relay, pairs, trickle(VIRTIO, 4096))
        found.append(("P8", "echo p99, another VM at 12 MB/s, against quiet", figure, ratio, "<= 3", ratio <= 3))
        figure, ratio = fairness(relay, pairs, flood(1 << 40))
        found.append(("P8", "echo p99, another VM without limit, against quiet", figure, ratio, "<= 3", ratio <= 3))
        for others in (1, 5, 20):
            figure, ratio = fairness(relay, pairs, trickle(UART, 1), others)
            what = f"echo p99, {others} VMs at 50 kB/s, a byte at a time, against quiet"
            found.append(("P8", what, figure, ratio, "<= 3", ratio <= 3))
        figure, ratio = throughput(base, relay, pairs, "-b", str(CHUNK))
        found.append(("P6", "the same against socat -b 65536 (no aim)", figure, ratio, "", True))
        return found
    finally:
        relay.close()
        shutil.rmtree(base)


def main() -> int:
    if shutil.which("socat") is None:
        print("bench/relay.py: socat is not installed", file=sys.stderr)
        return 1
    for identity, what, figure, ratio, aim, ok in rows(max(5, int(sys.argv[1])) if len(sys.argv) > 1 else 5):
        print(f"{identity:4} {what:52} {figure:44} {ratio:6.2f}  {aim:7} {'' if ok else 'MISSED'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
