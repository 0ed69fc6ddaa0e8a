"""P10, P11: what broker and relay cost with many VMs, and how they answer many clients.

P11's clients are two processes of a hundred connections each, in the broker's own language: they cost as much CPU as the broker
does, and on two processors take it from it. `busy` is meant in two ways, and both are printed: each client asks five times a
second; or each asks again as soon as it has its answer. Then 200 requests are always queued, and nobody's can take less than 200
times the cost of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from bench.figures import Row, broker, percentile, spread
from tests.guests import disk_image
from tests.session import Client, Session
from vmshell import wire
from vmshell.layout import Layout
from vmshell.messages import Boot, Kill, List, New, Reload, Request, Rm, Whoami
from vmshell.model.limits import Limits
from vmshell.refusals import ReportedError

VMS = 50
# A guest of eleven instructions that says `up` and halts for good.
QUIET = bytes.fromhex("fabaf803b075eeb070eeb00deeb00aeef4ebfd")

CLIENTS = 200
GENERATORS = 2
SECONDS = 4.0
PACE = 5.0  # requests a second of each client, where it is paced
LISTED = 5  # VMs in the list that is asked for


# --- P10 --------------------------------------------------------------------------------------------------------------


def memory() -> list[Row]:
    with broker() as session:
        disk_image(session.layout, "quiet", QUIET)
        with session.client() as client:
            for number in range(VMS):
                client.ask(New(vm=f"vm{number}", image="quiet", memory=16))
        # The host is looked at in the first seconds; and a broker that has worked has its buffers.
        time.sleep(2)
        idle = _resident(session)
        _boot_all(session)
        time.sleep(2)
        up = sum(vm["state"] == "running" for vm in session.ask(List())["vms"])
        busy = _resident(session)
        idle_cpu = _cpu_share(session, 5.0)
    each = (sum(busy) - sum(idle)) / max(1, up)
    text = f"{sum(idle):.1f} MiB (broker {idle[0]:.1f}, relay {idle[1]:.1f})"
    more = f"{sum(busy):.1f} MiB with {up} running: {each:.2f} MiB each; {idle_cpu:.1%} of a core"
    return [
        ("P10", f"broker and relay, resident, {VMS} VMs defined, none runs", text, math.nan, "<= 45 MiB", sum(idle) <= 45),
        ("P10", "the same for each running VM", more, math.nan, "<= 0.5 MiB", each <= 0.5 and up == VMS),
    ]


def _boot_all(session: Session) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(session.client()) for _ in range(5)]
        for number in range(VMS):
            clients[number % 5].send(Boot(vm=f"vm{number}"))
        for number in range(VMS):
            assert not clients[number % 5].receive()[1]


def _resident(session: Session) -> tuple[float, float]:
    """MiB of the broker and of the relay."""
    assert session.broker is not None
    found = []
    for pid in (session.broker.pid, session.relay_pid()):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        found.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
    return found[0], found[1]


def _cpu_share(session: Session, seconds: float) -> float:
    assert session.broker is not None
    pids = (session.broker.pid, session.relay_pid())

    def used() -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split() for pid in pids]
        return sum(int(line[11]) + int(line[12]) for line in fields) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(seconds)
    return (used() - before) / seconds


# --- P11 --------------------------------------------------------------------------------------------------------------


def requests() -> list[Row]:
    with broker() as session:
        disk_image(session.layout, "quiet", QUIET)
        for number in range(LISTED):
            session.ask(New(vm=f"vm{number}", image="quiet", memory=16))
        alone = [_crowd(session.layout, 1, 0.0) for _ in range(5)]
        flat_out = [_crowd(session.layout, CLIENTS, 0.0) for _ in range(5)]
        paced = [_crowd(session.layout, CLIENTS, PACE) for _ in range(5)]
        rows: list[Row] = []
        for what, seen in ((f"each asks {PACE:.0f} times a second", paced), ("each asks again at once", flat_out)):
            tails, single = [[percentile(times, 0.99) * 1000 for times in runs] for runs in (seen, alone)]
            figure = f"{spread(tails)} against {spread(single)} ms; {statistics.median(map(len, seen)) / SECONDS:.0f} requests/s"
            tail = statistics.median(tails)
            what = f"`list` p99, {CLIENTS} clients, {what}, against 1"
            rows.append(("P11", what, figure, tail / statistics.median(single), "<= 5 ms", tail <= 5))
        rows.append(_neighbour(session))
        rows.append(_beside_a_storm(session))
    return rows


def _crowd(layout: Layout, clients: int, pace: float) -> list[float]:
    """The seconds of every request that *clients* connections made in SECONDS."""
    shares = [clients // GENERATORS] * GENERATORS if clients > 1 else [1]
    readers = []
    for share in shares:
        readers.append(_forked(lambda share=share: _ask_along(layout, share, pace)))  # type: ignore[misc]
    return [took for reader in readers for took in reader()]


def _ask_along(layout: Layout, count: int, pace: float) -> list[float]:
    """One generator: *count* connections; with a pace each request has its moment, and lateness of ours is not the broker's."""
    request = json.dumps({"id": 1, "verb": "list"}).encode()
    poll = select.epoll()
    socks = {}
    for _ in range(count):
        sock = wire.connect(layout.broker_socket, 20)
        sock.setblocking(False)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
    sent: dict[int, float] = {}
    took: list[float] = []
    begin = time.perf_counter()
    due = [(begin + (index / count / pace if pace else 0.0), fd) for index, fd in enumerate(socks)]
    while (now := time.perf_counter()) < begin + SECONDS:
        while due and due[0][0] <= now:
            moment, fd = due.pop(0)
            sent[fd] = time.perf_counter()
            socks[fd].send(request)
            if pace:
                due.append((moment + 1 / pace, fd))
        wait = max(0.0, due[0][0] - now) if due else SECONDS
        for fd, _ in poll.poll(min(wait, begin + SECONDS - now)):
            socks[fd].recv(1 << 16)
            took.append(time.perf_counter() - sent[fd])
            if not pace:
                sent[fd] = time.perf_counter()
                socks[fd].send(request)
    for sock in socks.values():
        sock.close()
    return took


def _neighbour(session: Session) -> Row:
    """`list` every 5 ms beside four connections that make, boot, kill and remove VMs without a pause."""
    quiet = [_forked(lambda: _look(session.layout))() for _ in range(3)]
    seen, rounds = [], 0
    for _ in range(5):
        worker = _worker(session.layout)
        time.sleep(0.2)
        seen.append(_forked(lambda: _look(session.layout))())
        rounds += worker()
    worst = [max(times) * 1000 for times in seen]
    tails, still = (statistics.median(percentile(times, 0.99) * 1000 for times in runs) for runs in (seen, quiet))
    figure = f"longest {spread(worst)} ms, p99 {tails:.1f} against {still:.1f} when quiet; {rounds} VMs came and went"
    return ("P11", "`list` beside another's work", figure, math.nan, "<= 50 ms", statistics.median(worst) <= 50)


def _beside_a_storm(session: Session) -> Row:
    """`whoami` every 5 ms beside four connections that make and remove VMs for as long as they may, and ask on when refused."""
    policy = Path(session.layout.policy)
    before = policy.read_text(encoding="utf-8")
    policy.write_text(f"{before}[defaults]\nchanges_per_minute = {Limits().changes_per_minute}\n", encoding="utf-8")
    session.ask(Reload())
    seen, refused = [], 0
    for _ in range(5):
        storms = [_forked(lambda name=f"storm{index}": _storm(session.layout, name)) for index in range(4)]  # type: ignore[misc]
        time.sleep(0.2)
        seen.append(_forked(lambda: _look(session.layout, Whoami()))())
        refused += int(sum(storm()[0] for storm in storms))
    policy.write_text(before, encoding="utf-8")
    session.ask(Reload())
    tails = [percentile(times, 0.95) * 1000 for times in seen]
    figure = f"{spread(tails)} ms; {refused} requests refused"
    return ("P11", "`whoami` p95 beside another's refused storm", figure, math.nan, "<= 50 ms", statistics.median(tails) <= 50)


def _storm(layout: Layout, name: str) -> list[float]:
    refused = 0
    until = time.perf_counter() + SECONDS + 0.5
    with Client(layout) as client:
        while time.perf_counter() < until:
            for request in (New(vm=name, image="quiet", memory=16), Rm(vm=name)):
                try:
                    client.ask(request)
                except ReportedError:
                    refused += 1
    return [float(refused)]


def _look(layout: Layout, request: Request | None = None) -> list[float]:
    took = []
    with Client(layout) as client:
        until = time.perf_counter() + SECONDS
        while (began := time.perf_counter()) < until:
            client.ask(request or List())
            took.append(time.perf_counter() - began)
            time.sleep(0.005)
    return took


def _worker(layout: Layout) -> Callable[[], int]:
    """Start four connections' work for a little longer than a look takes; the returned function waits, and counts rounds."""

    def work(name: str) -> list[float]:
        done = 0
        until = time.perf_counter() + SECONDS + 0.5
        with Client(layout) as client:
            while time.perf_counter() < until:
                for request in (New(vm=name, image="quiet", memory=16), Boot(vm=name), Kill(vm=name), Rm(vm=name)):
                    client.ask(request)
                done += 1
        return [float(done)]

    readers = [_forked(lambda name=f"work{index}": work(name)) for index in range(4)]  # type: ignore[misc]
    return lambda: int(sum(reader()[0] for reader in readers))


def _forked(function: Callable[[], list[float]]) -> Callable[[], list[float]]:
    """Run *function* in a process of its own; the returned function waits for its answer."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(read_end)
            with os.fdopen(write_end, "w") as file:
                json.dump(function(), file)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write_end)

    def answer() -> list[float]:
        try:
            with os.fdopen(read_end) as file:
                text = file.read()
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            _, status = os.waitpid(pid, 0)
        if status:
            raise RuntimeError("a client of the benchmark failed; see above")
        numbers: list[float] = json.loads(text)
        return numbers

    return answer
