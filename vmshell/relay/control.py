"""The broker's connection: Watch, Attach, Detach, Order and Forget in; an answer to each, and Events, out.

The relay listens; whoever connects must be of the broker's account or of the relay's own uid (the kernel says who it is). One
connection at a time: a broker that comes back replaces the one that is gone, and re-sends Watch for every VM it knows. What it
brings is looked at before anything is done with it: it may no longer be the program that we know.
Runs in: the relay. Touches `relay.sock`.
"""

from __future__ import annotations

import gc
import os
import socket
from collections import deque

from .. import brokeraccount, messages, wire
from ..errors import Internal, ProtocolError, VmshellError
from ..fields import request_id
from ..refusals import NotWatched, QemuSilent, TooManyRequests
from .checks import BadDescriptor, check_fifo, check_order, check_stderr
from .loop import GONE, IN, OUT
from .orders import brings_fd
from .port import Port
from .vm import Kept, Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..layout import Layout
    from .loop import Loop
    from .service import Service
    from .viewer import User

QUEUE_MAX = 4096  # packets a broker may leave unread; then it is cut off and learns everything anew when it returns
CONSOLES_MAX = 64  # of one person: two pipes each, whose memory the kernel counts as the broker's
EMBEDDED_WAIT = 5.0
COLLECT_AFTER = 6.0  # by then the slowest viewer of a VM that ended is gone
# After a restart, until the broker says how large logs may be: turning a larger log over too early would throw it away.
UNTOLD_LOG_MAX = 64 << 20


class Link:
    """One connection of the broker, with the packets it has not taken yet."""

    __slots__ = ("_queue", "control", "sock")

    def __init__(self, control: Control, sock: socket.socket) -> None:
        self.control = control
        self.sock = sock
        self._queue: deque[dict[str, object]] = deque()
        control.loop.add(sock.fileno(), IN, self._on_event, self)

    @property
    def open(self) -> bool:
        return self.sock.fileno() >= 0

    def send(self, body: dict[str, object]) -> None:
        if not self.open:
            return
        self._queue.append(body)
        if len(self._queue) == 1:
            self._flush()
        elif len(self._queue) > QUEUE_MAX:
            self.close()

    def close(self) -> None:
        if self.open:
            self.control.loop.drop(self.sock.fileno())
            self.sock.close()
            self._queue.clear()
            self.control.link_closed(self)

    def broken(self, exc: Exception) -> None:
        self.close()

    def _flush(self) -> None:
        try:
            while self._queue:
                wire.send(self.sock, self._queue[0])
                self._queue.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self.control.loop.want(self.sock.fileno(), IN | OUT if self._queue else IN)

    def _on_event(self, events: int) -> None:
        if events & OUT:
            self._flush()
        if self.open and events & (IN | GONE):
            try:
                packet = wire.recv(self.sock, fds_allowed=max(messages.Watch.fds, messages.Attach.fds))
            except BlockingIOError:
                return
            except (OSError, ProtocolError):
                packet = None
            if packet is None:
                self.close()
                return
            try:
                self.control.on_packet(self, packet)
            finally:
                packet.close()


class Control:
    """The table of VMs, and what the broker may say about them and their viewers."""

    def __init__(self, loop: Loop, layout: Layout, service: Service, listener: socket.socket) -> None:
        self.loop = loop
        self.vms: dict[int, Vm] = {}
        self._layout = layout
        self._service = service
        self._listener = listener
        self._link: Link | None = None
        self._peers = {brokeraccount.uid(), os.geteuid()}
        self._broker_uid = -1  # whose files QEMU may be handed
        self._collecting = False
        self._handlers: dict[type[messages.ToRelay], Callable[..., None]] = {
            messages.Watch: self._on_watch,
            messages.Attach: self._on_attach,
            messages.Attached: self._on_attached,
            messages.Detach: self._on_detach,
            messages.Order: self._on_order,
            messages.Drain: self._on_drain,
            messages.Forget: self._on_forget,
        }
        listener.setblocking(False)
        loop.add(listener.fileno(), IN, self._on_connect, self)
        self._lonely_since = loop.now
        if layout.embedded:
            loop.after(1.0, self._look_around, self)

    def resume(self, number: int, kept: Kept) -> None:
        """Go on with a VM whose connections the service manager kept, before any broker asks for it."""
        self._add(number, UNTOLD_LOG_MAX).resume(kept)

    def stop(self, reason: str) -> None:
        for vm in self.vms.values():
            vm.stop(reason)
        if self._link is not None:
            self._link.close()
        self._listener.close()

    def broken(self, exc: Exception) -> None:
        """Accepting failed (no descriptors left, say): breathe, then go on."""
        self.loop.want(self._listener.fileno(), 0)
        self.loop.after(1.0, lambda: self.loop.want(self._listener.fileno(), IN), self)

    # --- the connection ---

    def _on_connect(self, events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        uid = wire.peer_uid(sock)
        if uid not in self._peers:
            self.loop.report(f"refused a connection of uid {uid}")
            sock.close()
            return
        sock.setblocking(False)
        if self._link is not None:
            self._link.close()
        self._link, self._broker_uid = Link(self, sock), uid

    def link_closed(self, link: Link) -> None:
        if self._link is link:
            self._link = None
            self._lonely_since = self.loop.now

    def _look_around(self) -> None:
        """Embedded, we are there for one person's shells: with no VM and no broker for a while, our work is done."""
        if self.vms or self._link is not None:
            self._lonely_since = self.loop.now
        elif self.loop.now - self._lonely_since >= EMBEDDED_WAIT:
            self.loop.stopping = True
        self.loop.after(0.5, self._look_around, self)

    def on_packet(self, link: Link, packet: wire.Packet) -> None:
        number = 0
        try:
            number = request_id(packet.body)
            message = messages.parse_to_relay(packet.body)
            self._handlers[type(message)](message, packet, _Reply(link, number))
        except BadDescriptor as exc:
            self.loop.report(f"{packet.body.get('verb')}: {exc}")
            _Reply(link, number).error(exc)
        except VmshellError as exc:
            _Reply(link, number).error(exc)
        except Exception as exc:
            # One VM's trouble is not the broker connection's: it gets an answer like any other.
            self.loop.report(f"{packet.body.get('verb')}: {type(exc).__name__}: {exc}")
            _Reply(link, number).error(Internal(reference="relay"))

    def _say(self, number: int, word: str, count: int) -> None:
        if self._link is not None:
            self._link.send(messages.Event(number=number, word=word, count=count).to_body())

    # --- the verbs ---

    def _on_watch(self, watch: messages.Watch, packet: wire.Packet, reply: _Reply) -> None:
        fresh, piped = len(packet.fds) % 2 == 1, len(packet.fds) > 1
        for fd in packet.fds[:2] if piped else ():
            check_fifo(fd)
        if fresh:
            check_stderr(packet.fds[-1])
        vm = self.vms.get(watch.number)
        if vm is not None and (fresh or (piped and vm.is_another(packet.fds[1]))):
            # What we know is about a QEMU that has ended.
            self._drop(vm, "the VM was started anew", False)
            vm = None
        port = Port(packet.take_fd(), packet.take_fd(), lasting=True) if piped else None
        if vm is None:
            vm = self._add(watch.number, watch.log_max)
            vm.claimed = True
            vm.keep_log(watch.log)
            vm.start(fresh=fresh, port=port, stderr=packet.take_fd() if fresh else -1)
        elif port is not None:
            vm.offer(port)
        vm.claimed = True
        vm.log.limit = watch.log_max
        vm.keep_log(watch.log)
        vm.repeat()
        reply.ok()

    def _on_attach(self, attach: messages.Attach, packet: wire.Packet, reply: _Reply) -> None:
        vm = self._vm(attach.number)
        if len(packet.fds) != attach.fds:
            raise ProtocolError(problem=f"a console is two pipes, and {len(packet.fds)} descriptors came")
        user = attach.uid, attach.label
        if sum(other == user for other in self._users()) >= CONSOLES_MAX:
            raise TooManyRequests(count=CONSOLES_MAX, what="consoles", limit=CONSOLES_MAX)
        vm.console.audience.attach(packet.take_fd(), packet.take_fd(), user, attach.readonly, attach.replay)
        reply.ok()

    def _on_attached(self, attached: messages.Attached, packet: wire.Packet, reply: _Reply) -> None:
        users = sorted(set(self._users()))
        reply.ok(users=users[attached.skip : attached.skip + messages.ATTACHED_IN_PART])

    def _on_detach(self, detach: messages.Detach, packet: wire.Packet, reply: _Reply) -> None:
        for vm in self.vms.values():
            vm.console.audience.cut_off((detach.uid, detach.label), detach.code, detach.reason)
        reply.ok()

    def _on_order(self, order: messages.Order, packet: wire.Packet, reply: _Reply) -> None:
        vm = self._vm(order.number)
        fd = _taken(packet, lambda fd: check_order(order, fd, self._broker_uid)) if brings_fd(order.what) else -1

        def answer(ok: bool) -> None:
            # QEMU may be gone before its "yes" to quit has been read: that is a yes.
            if ok or order.what == "quit" and not vm.reachable:
                reply.ok()
            else:
                reply.error(QemuSilent(vm=order.number, what=order.what))

        vm.order(order, fd, answer)

    def _on_drain(self, drain: messages.Drain, packet: wire.Packet, reply: _Reply) -> None:
        self._vm(drain.number).drain()
        reply.ok()

    def _on_forget(self, forget: messages.Forget, packet: wire.Packet, reply: _Reply) -> None:
        vm = self.vms.get(forget.number)
        if vm is None:
            # Still purge: a relay that has just started knows no VM, but the log is there.
            vm = self._add(forget.number, messages.Watch(number=forget.number).log_max)
        self._drop(vm, forget.reason, forget.purge)
        self._say(forget.number, "unwatched", 0)
        reply.ok()

    # --- the table ---

    def _users(self) -> Iterator[User]:
        """The user of each console, of whichever VMs."""
        return (viewer.user for vm in self.vms.values() for viewer in vm.console.audience.viewers)

    def _vm(self, number: int) -> Vm:
        vm = self.vms.get(number)
        if vm is None:
            raise NotWatched(vm=number)
        return vm

    def _add(self, number: int, log_max: int) -> Vm:
        vm = Vm(self.loop, self._layout, self._service, number, log_max, self._say, self._abandon)
        self.vms[number] = vm
        return vm

    def _drop(self, vm: Vm, reason: str, purge: bool) -> None:
        del self.vms[vm.number]
        vm.forget(reason, purge)
        # Its parts refer to each other, and we allocate too little for the collector to come by itself.
        if not self._collecting:
            self._collecting = True
            self.loop.after(COLLECT_AFTER, self._collect, self)

    def _collect(self) -> None:
        self._collecting = False
        gc.collect()

    def _abandon(self, vm: Vm) -> None:
        self._drop(vm, "the VM has ended", False)


def _taken(packet: wire.Packet, check: Callable[[int], None]) -> int:
    """Take the packet's descriptor out of it if it passes *check*; else it is closed with the packet."""
    if packet.fds:
        check(packet.fds[0])
    return packet.take_fd()


class _Reply:
    """The answer to one message, on the connection it came from."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int) -> None:
        self._link = link
        self._number = number

    def ok(self, **fields: object) -> None:
        if self._number:
            self._link.send({"id": self._number, "ok": fields})

    def error(self, exc: VmshellError) -> None:
        if self._number:
            self._link.send({"id": self._number, "error": exc.to_wire()})
