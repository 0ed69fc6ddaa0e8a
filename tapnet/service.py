"""The broker's connection: who may, what is asked, and the answers; all requests that wait are carried out as one.

One broker at a time: a new connection takes the place of the old one. It begins by naming what there is to be (`settings`,
`segment`, `port`, `open` without effect), and `settle` makes it so; from then on every message changes the kernel. Answers come
in the order of the requests.
Runs in: tapnet. Touches its socket.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys
from collections import deque
from collections.abc import Callable
from time import monotonic

from vmshell import brokeraccount, wire
from vmshell.errors import Internal, ProtocolError, VmshellError, safe
from vmshell.fields import request_id
from vmshell.messages import Confine, Health, Open, Opening, Port, Segment, Settings, Settle, ToTapnet, Unplug, parse_to_tapnet

from .features import Features
from .network import Answer, Network
from .policy import NotInPolicy
from .rootpolicy import RootPolicy
from .state import State, key, tap

IN, OUT = selectors.EVENT_READ, selectors.EVENT_WRITE
CHANGES = (Settings, Confine, Segment, Port, Open, Unplug)
BATCH = 1024  # requests carried out as one
UNREAD = 4096  # answers that wait for a broker that does not read; then it is not read from either
CHECK_SECONDS = 1.0
NOTICE_SECONDS = 0.2  # within which a notice of the kernel's has come, if it comes


class Service:
    """The loop. Everything runs in this one thread; what takes longest is a batch of hundreds of taps."""

    def __init__(self, listener: socket.socket, root: RootPolicy, network: Network, features: Features) -> None:
        self.stopping = False
        self._listener = listener
        self._peers = {brokeraccount.uid(), os.geteuid()}
        self._root = root
        self._network = network
        self._features = features
        self._reported = self._problems()
        self._broker: socket.socket | None = None
        self._naming: State | None = None
        self._answers: deque[tuple[dict[str, object], int]] = deque()
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, IN, self._on_connect)
        for notices in (network.watch, network.departures):
            self._selector.register(notices, IN, self._check)

    def add(self, sock: socket.socket, call: Callable[[], None]) -> None:
        self._selector.register(sock, IN, call)

    def run(self) -> None:
        """Serve until `stopping` is set."""
        checked = 0.0
        while not self.stopping:
            patience = NOTICE_SECONDS if self._network.watch.awaits() else CHECK_SECONDS
            for ready, _ in self._selector.select(patience):
                if self._selector.get_map().get(ready.fd) == ready:  # an earlier one of this round may have ended it
                    self._contained(ready.data)
            if monotonic() - checked >= patience:
                checked = monotonic()
                self._contained(self._check)

    def close(self) -> None:
        self._hang_up()
        self._listener.close()

    def _contained(self, call: Callable[[], None]) -> None:
        """A bug ends the connection it came by, and nothing else: running VMs keep what they have."""
        try:
            call()
        except Exception as error:
            report(f"{type(error).__name__}: {error}{_where(error)}")
            if call == self._on_broker:
                self._hang_up()

    # --- the filter, and what it stands on ---

    def _check(self) -> None:
        network = self._network
        touched = network.watch.disturbed()
        if touched:
            report("somebody else has changed our nftables tables; loading them again")
        network.look_after(touched)
        self._root.look()
        if (problems := self._problems()) != self._reported:
            self._reported = problems
            report("; ".join(problems) or "everything is as it should be again")

    def _problems(self) -> list[str]:
        return [*self._network.problems, *filter(None, [self._root.problem])]

    # --- the connection ---

    def _on_connect(self) -> None:
        sock, _ = self._listener.accept()
        if wire.peer_uid(sock) not in self._peers:
            report(f"refused a connection of uid {wire.peer_uid(sock)}")
            sock.close()
            return
        self._hang_up()
        sock.setblocking(False)
        self._broker, self._naming = sock, State()
        self._selector.register(sock, IN, self._on_broker)

    def _hang_up(self) -> None:
        """The broker is gone or has sent what no broker sends. Everything stays as it is."""
        if self._broker is None:
            return
        self._selector.unregister(self._broker)
        self._broker.close()
        self._broker = self._naming = None
        for _, fd in self._answers:
            _close(fd)
        self._answers.clear()

    def _on_broker(self) -> None:
        self._flush()
        requests: list[tuple[int, ToTapnet]] = []
        gone = False
        while self._broker is not None and len(self._answers) < UNREAD and len(requests) < BATCH:
            try:
                packet = wire.recv(self._broker)
            except BlockingIOError:
                break
            except ProtocolError as error:
                self._answer(0, Answer(error))
                break
            except OSError:
                packet = None
            if packet is None:
                gone = True
                break
            ident = 0
            try:
                ident = request_id(packet.body)
                requests.append((ident, parse_to_tapnet(packet.body)))
            except VmshellError as error:
                self._carry_out(requests)
                requests = []
                self._answer(ident, Answer(error))
        self._carry_out(requests)
        if gone:
            self._hang_up()

    def _carry_out(self, requests: list[tuple[int, ToTapnet]]) -> None:
        """Answer *requests* in order; those that change something and follow each other are one batch."""
        batch: list[tuple[int, ToTapnet]] = []
        for ident, message in requests:
            if self._broker is None:
                return  # gone meanwhile: its successor says everything anew
            changes = self._naming is None and isinstance(message, CHANGES)
            # Removals by themselves: what is removed and made again in one breath has to be gone in between.
            if batch and (not changes or isinstance(message, Unplug) != isinstance(batch[0][1], Unplug)):
                self._change(batch)
                batch = []
            if changes:
                batch.append((ident, message))
            else:
                self._single(ident, message)
        if batch:
            self._change(batch)

    def _change(self, batch: list[tuple[int, ToTapnet]]) -> None:
        """Carry out *batch* together; if that cannot be, each by itself, so that only a bad one fails."""
        try:
            answers = self._network.change([message for _, message in batch])
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._change([one])
                return
            answers = [Answer(error if isinstance(error, VmshellError) else _internal(error))]
        for (ident, _), answer in zip(batch, answers, strict=True):
            self._answer(ident, answer)

    def _single(self, ident: int, message: ToTapnet) -> None:
        try:
            if isinstance(message, Health):
                self._answer(ident, Answer(), self._health())
                return
            if isinstance(message, Settle):
                self._settle()
            elif self._naming is not None:
                self._name(self._naming, message)
            self._answer(ident, Answer())
        except VmshellError as error:
            self._answer(ident, Answer(error))
        except Exception as error:
            self._answer(ident, Answer(_internal(error)))

    # --- naming what there is ---

    def _name(self, state: State, message: ToTapnet) -> None:
        if isinstance(message, Settings):
            self._network.judge.settings(message)
            state.settings, state.confined = message, frozenset(message.confined)
        elif isinstance(message, Confine):
            self._network.judge.confined(message.uids)
            state.confined |= set(message.uids)
        elif isinstance(message, Segment):
            self._network.judge.segment(message)
            state.segments[message.segment] = message
        elif isinstance(message, Port):
            if message.create:
                raise ProtocolError(problem="nothing is made before `settle`")
            state.refused.add(tap(message))
            self._network.judge.port(message, state)
            self._network.require(message)
            state.refused.discard(tap(message))
            state.ports[key(message)] = message
        elif isinstance(message, Open):
            ways = [Opening.from_body(item) for item in message.openings]
            self._network.judge.openings(ways)
            state.openings[key(message)] = ways
        elif isinstance(message, Unplug):
            state.ports.pop(key(message), None)
            state.openings.pop(key(message), None)
            state.refused.discard(tap(message))

    def _settle(self) -> None:
        wanted = self._naming
        if wanted is None:
            self._network.reconcile()
            return
        if wanted.settings is None:
            raise ProtocolError(problem="`settings` come first")
        # Settled it is even if something cannot be made so: that is tried again, and hinders nobody else.
        self._naming = None
        self._network.settle(wanted)

    def _health(self) -> dict[str, object]:
        if self._features.problems:
            self._features.probe(self._network.links, self._network.nft)  # perhaps they are gone
        self._root.look()
        problems = dict.fromkeys((*self._features.problems, *self._problems()))
        return {"features": {**self._features.found, "ct-count": self._network.counts}, "problems": list(problems)}

    # --- answers ---

    def _answer(self, ident: int, answer: Answer, result: dict[str, object] | None = None) -> None:
        body: dict[str, object] = {"id": ident}
        if answer.error is not None:
            if isinstance(answer.error, NotInPolicy):
                report(f"refused a request of the broker's: {answer.error}")
            body["error"] = answer.error.to_wire()
        else:
            body["ok"] = result or {}
        if self._broker is None:
            _close(answer.fd)
            return
        self._answers.append((body, answer.fd))
        self._flush()

    def _flush(self) -> None:
        """Send what waits. A descriptor is the broker's once it is sent; one that cannot be sent closes, and its tap is gone."""
        while self._answers and self._broker is not None:
            body, fd = self._answers[0]
            try:
                wire.send(self._broker, body, (fd,) if fd >= 0 else ())
            except BlockingIOError:
                break
            except OSError:
                self._hang_up()
                return
            self._answers.popleft()
            _close(fd)
        if self._broker is not None:
            wanted = (OUT if self._answers else 0) | (IN if len(self._answers) < UNREAD else 0)
            self._selector.modify(self._broker, wanted, self._on_broker)


def report(text: str) -> None:
    """One escaped line on stderr, which is the service's journal."""
    try:
        print(f"tapnet: {safe(text)}", file=sys.stderr, flush=True)
    except OSError:
        pass  # the journal is gone; nothing here depends on it


def _internal(error: Exception) -> Internal:
    reference = os.urandom(4).hex()
    report(f"{reference}: {type(error).__name__}: {error}{_where(error)}")
    return Internal(reference=reference)


def _where(error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f" (line {frame.tb_lineno} of {frame.tb_frame.f_code.co_filename})" if frame is not None else ""


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
