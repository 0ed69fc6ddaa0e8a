"""One VM as the relay knows it: its serial port and its monitor, its state, and the words about it.

One `Vm` is one run of one QEMU. It reads the serial port first and connects to `qmp.sock` second, so that `ready` means that no
byte of the guest can be missed; it connects again by itself whenever a connection is lost, until the broker says Forget.
Runs in: the relay. Touches the VM's run directory (connecting only) and its log directory.
"""

from __future__ import annotations

import os

from .. import messages
from .console import Console
from .logfile import Log, NoLog, purge
from .orders import Orders
from .port import Port, dial, every_name, from_store
from .qmp import Monitor, connect
from .stderr import Stderr
from .words import Words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..layout import Layout
    from .loop import Loop, Timer
    from .orders import Done
    from .service import Service

FIRST_RETRY = 0.02
LAST_RETRY = 1.0
UNREACHABLE_AFTER = 5.0

UNREACHABLE = "unreachable"

# QEMU's run states in our terms; any other one means that the CPUs stand still.
STATES = {
    "running": messages.RUNNING,
    "prelaunch": messages.STARTING,
    "inmigrate": messages.STARTING,
    "internal-error": "internal-error",
    "io-error": "io-error",
    "guest-panicked": "guest-panic",
}
STATE_WORDS: dict[str, tuple[str, ...]] = {
    messages.RUNNING: ("running",),
    messages.PAUSED: ("paused",),
    "internal-error": ("paused", "internal-error"),
    "io-error": ("paused", "io-error"),
    "guest-panic": ("paused", "guest-panic"),
    UNREACHABLE: ("unreachable",),
}


class Kept:
    """What the service manager kept of one VM's connections while we were away; `port` by the kinds of the names."""

    __slots__ = ("logged", "port", "stderr", "viewers")

    def __init__(self) -> None:
        self.port: dict[str, int] = {}
        self.logged = True
        self.stderr = -1
        self.viewers: list[tuple[str, int]] = []  # their pipes, by the names they were kept under


class Vm:
    """*say(number, word, count)* tells the broker; *abandoned(vm)* is called when a VM nobody asked for turns out to be gone."""

    def __init__(
        self,
        loop: Loop,
        layout: Layout,
        service: Service,
        number: int,
        log_max: int,
        say: Callable[[int, str, int], None],
        abandoned: Callable[[Vm], None],
    ) -> None:
        self.number = number
        self.claimed = False  # has the broker asked for it since we started?
        self.state = messages.STARTING
        self._told = messages.STARTING  # the state that the viewers believe it is in
        self.words = Words(loop, lambda word, count: say(number, word, count))
        self.log = Log(layout.vm_log(number) + "/console.log", log_max)
        self.console = Console(loop, self.log, self, service, number)
        self._loop = loop
        self._service = service
        self._abandoned = abandoned
        self._run_dir = layout.vm_run(number)
        self._log_dir = layout.vm_log(number)
        self._logged = True
        self._port: Port | None = None
        self._monitor: Monitor | None = None
        self._orders: Orders | None = None
        self._stderr: Stderr | None = None
        self._timer: Timer | None = None
        self._retry = FIRST_RETRY
        self._missing_since = loop.now
        self._ready = False
        self._ended_itself = False
        self._gone = False

    # --- for the broker's connection ---

    def start(self, *, fresh: bool, port: Port | None = None, stderr: int = -1) -> None:
        """Begin: *fresh* for a QEMU just started, else the log holds what was said before. Without *port* it is on a socket."""
        if not fresh:
            self.console.remember(self._started_at())
        if stderr >= 0:
            self._take_stderr(stderr)
        if port is not None:
            self._take_port(port)
        self._connect()

    def resume(self, kept: Kept) -> None:
        """Go on after our own restart with what the service manager kept for us."""
        # A viewer that was kept has seen it run: to say so again would tear the guest's output apart.
        self._told = messages.RUNNING
        self.keep_log(kept.logged)
        self.console.remember(self._started_at())
        if kept.stderr >= 0:
            self._take_stderr(kept.stderr)
        self.console.audience.restore(kept.viewers)
        self._port = from_store(kept.port)
        self._connect()

    def is_another(self, output_fd: int) -> bool:
        """Does *output_fd* belong to another run than the one that we know?"""
        return self._port is not None and not self._port.leads_to(output_fd)

    def offer(self, port: Port) -> None:
        """Take *port*, or close it if we have it already."""
        if self._port is not None:
            port.close()
            return
        self._take_port(port)
        self._connect()

    def repeat(self) -> None:
        """Say everything that is so, for a broker that has just come."""
        if self._ready:
            self.words.say("ready")
        for word in STATE_WORDS.get(self.state, ()):
            self.words.say(word)
        if self._ended_itself:
            self.words.say("guest-shutdown")
        if self.console.seen:
            self.words.say("output")
        self.words.say("viewers", len(self.console.audience.viewers))

    @property
    def reachable(self) -> bool:
        return self._monitor is not None and self._monitor.ready

    def order(self, order: messages.Order, fd: int, done: Done) -> None:
        """Carry out *order*; *done(ok)* is called once. The closing of *fd* (or -1) is ours from here on."""
        if order.what in ("log-on", "log-off"):
            self.keep_log(order.what == "log-on")
            done(True)
        elif self._monitor is not None and self._orders is not None:
            self._orders.give(order, fd, done)
        else:
            if fd >= 0:
                os.close(fd)
            done(False)

    def keep_log(self, on: bool) -> None:
        """Write the guest's output down from now on, or no more; what is in memory is replayed either way."""
        if on == self._logged:
            return
        self._unstore_port()
        self._logged = on
        self._store_port()
        self.console.log = self.log if on else NoLog()
        self.log.rest()

    def drain(self) -> None:
        """QEMU is gone: take and hand on what it and the guest said last."""
        self._gone = True
        self._cancel_timer()
        if self._monitor is not None:
            self._monitor.finish()
        self.console.finish()
        self.words.flush()

    def forget(self, reason: str, purge_log: bool) -> None:
        """The VM has ended: last words, goodbye, close; nothing of it stays in the relay."""
        self.drain()
        self._close_port()
        self.console.audience.end("the guest switched itself off" if self._ended_itself else reason)
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._stderr is not None:
            self._stderr.finish()
            self._service.remove(f"stderr-{self.number}")
        self.log.close()
        if purge_log:
            purge(self._log_dir)

    def stop(self, reason: str) -> None:
        """The relay ends, the VM does not. With a service manager that keeps our connections nobody need notice."""
        self._gone = True
        if not self._service.keeps:
            self.console.audience.end(reason)
        self.log.close()

    # --- connecting ---

    def _connect(self) -> None:
        self._cancel_timer()
        try:
            if self._port is None:
                self._take_port(dial(self._run_dir))
            if self._port is not None and not self.console.connected:
                self.console.connect(self._port)
            if self._monitor is None:
                self._monitor = Monitor(self._loop, self, connect(f"{self._run_dir}/qmp.sock"))
                self._orders = Orders(self._loop, self._monitor)
            elif self._monitor.ready and not self._ready:
                self._now_ready()
        except OSError:
            self._later()

    def _later(self) -> None:
        """Try again after a while, and say so when it has been long."""
        if self._gone:
            return
        if self._loop.now - self._missing_since > UNREACHABLE_AFTER and self.state != UNREACHABLE:
            if not self.claimed:
                self._abandoned(self)
                return
            self._set_state(UNREACHABLE)
        if self._timer is None:
            self._timer = self._loop.after(self._retry, self._connect, self)
            self._retry = min(LAST_RETRY, self._retry * 2)

    def _lost(self) -> None:
        if self._ready:
            self._ready = False
            self._missing_since = self._loop.now
        self._later()

    def _now_ready(self) -> None:
        self._ready = True
        self._retry = FIRST_RETRY
        self.words.say("ready")

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _started_at(self) -> float:
        # The broker makes the socket anew for each start, so its age is the run's.
        try:
            return os.stat(f"{self._run_dir}/qmp.sock").st_mtime
        except OSError:
            return 0.0

    def broken(self, exc: Exception) -> None:
        """Something of ours raised: begin anew with both, after a moment."""
        if self._gone:
            return
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self.console.disconnect()
        if self._port is not None and not self._port.lasting:
            self._close_port()
        self._lost()

    # --- the descriptors of its serial port, and QEMU's error pipe ---

    def _take_port(self, port: Port) -> None:
        self._port = port
        self._store_port()

    def _store_port(self) -> None:
        if self._port is not None:
            for name, fd in self._port.names(self.number, logged=self._logged).items():
                self._service.store(name, fd)

    def _unstore_port(self) -> None:
        for name in every_name(self.number):
            self._service.remove(name)

    def _close_port(self) -> None:
        self._unstore_port()
        if self._port is not None:
            self._port.close()
            self._port = None

    def _take_stderr(self, fd: int) -> None:
        name = f"stderr-{self.number}"
        self._service.store(name, fd)
        self._stderr = Stderr(self._loop, fd, self._log_dir + "/qemu.log", lambda: self._service.remove(name))

    # --- what the console says ---

    def console_lost(self) -> None:
        self._close_port()
        self._lost()

    def first_output(self) -> None:
        self.words.say("output")

    def send_break(self) -> None:
        if self._monitor is not None and self._orders is not None:
            self._orders.send_break(self.number)

    def viewers_changed(self, count: int) -> None:
        self.words.say("viewers", count)

    def state_shown(self) -> str:
        return self.state

    # --- what the monitor says ---

    def monitor_ready(self, status: str) -> None:
        if self.console.connected:
            self._now_ready()
        else:
            self._later()
        self._set_state(STATES.get(status, messages.PAUSED))

    def monitor_lost(self, why: str) -> None:
        self._monitor = None
        self._lost()

    def monitor_event(self, name: str, data: dict[str, object]) -> None:
        if name in ("RESUME", "STOP", "STATUS") and self._orders is not None and self._orders.in_job:
            # QEMU stands still while it saves: nothing that anybody need hear. The job's end asks how things are.
            return
        if name == "RESUME":
            self._set_state(messages.RUNNING)
        elif name == "STOP":
            # The event does not say why; the run state does.
            if self._monitor is not None:
                self._monitor.ask_status()
        elif name == "STATUS":
            status = data.get("status")
            if isinstance(status, str):
                self._set_state(STATES.get(status, messages.PAUSED))
        elif name == "SHUTDOWN":
            if data.get("guest") is True:
                self._ended_itself = True
                self.words.say("guest-shutdown")
        elif name == "GUEST_PANICKED":
            self.words.say("guest-panic")
        elif name == "BLOCK_IO_ERROR":
            # "ignore" and "report" leave the decision to the guest; only "stop" needs a person.
            if data.get("action") == "stop":
                self.words.say("io-error")
        elif name == "RESET":
            self.console.seen = False

    def _set_state(self, state: str) -> None:
        if state == self.state:
            return
        self.state = state
        for word in STATE_WORDS.get(state, ()):
            self.words.say(word)
        if state != self._told:
            self._told = state
            self.console.audience.tell("state", state=state)
