"""Session mode's way out: for each card of kind `user` one passt, which speaks for the guest with our own sockets.

The host's loopback is not reachable through it, and QEMU stays in a network of its own: all it has is a stream to passt. Without
passt installed a card leads to QEMU's own small network, which ends there. passt ends with its QEMU.
Runs in: the broker, in session mode.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import TYPE_CHECKING

from ..errors import NetworkFailed
from .journal import note

if TYPE_CHECKING:
    from ..model.shapes import Forward
    from .cards import Card
    from .context import Context
    from .host import Process

PASST = "/usr/bin/passt"
TRIES, TRY_AGAIN = 5, 0.1  # seconds
NOBODY = 65534  # what passt makes itself where root starts it


def available() -> bool:
    return os.path.exists(PASST)


def start_all(context: Context, cards: list[Card]) -> dict[int, int]:
    """QEMU's ends of the streams, by the card's index, the taker's to close; raises NetworkFailed."""
    cables: dict[int, int] = {}
    for card in cards:
        for forward in card.nic.forward:
            _must_be_free(forward)
    try:
        for card in cards:
            if card.network.kind == "user" and available():
                cables[card.index] = _start(context, card)
    except OSError as exc:
        for fd in cables.values():
            os.close(fd)
        raise NetworkFailed(problem=f"passt cannot be started ({exc.strerror})") from exc
    return cables


def _must_be_free(forward: Forward) -> None:
    """passt would go on without a port that somebody else has, and whoever asks for the guest would reach them."""
    kind = socket.SOCK_STREAM if forward.proto == "tcp" else socket.SOCK_DGRAM
    for left in reversed(range(TRIES)):
        with socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC) as sock:
            if forward.proto == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what was closed a moment ago is free
            try:
                sock.bind(("127.0.0.1", forward.host))
                return
            except OSError as exc:
                if not left or exc.errno != errno.EADDRINUSE:
                    problem = f"port {forward.host} of this host cannot lead to the guest ({(exc.strerror or str(exc)).lower()})"
                    raise NetworkFailed(problem=f"{problem}; take another one for net.forward") from exc
        time.sleep(TRY_AGAIN)  # the passt of the run before may not have ended yet


def leads(forward: Forward) -> bool:
    """Is *forward*'s TCP port held by a program of ours? Without its passt any user of this host may take it.

    Asked of the kernel each time: a passt can end before its QEMU, and goes on while there is no broker.
    """
    place, uids = f"0100007F:{forward.host:04X}", {str(os.geteuid()), str(os.geteuid() or NOBODY)}
    with open("/proc/net/tcp", encoding="ascii") as file:
        return any(row[1] == place and row[3] == "0A" and row[7] in uids for row in map(str.split, file))  # 0A: TCP_LISTEN


def command(card: Card) -> list[str]:
    """One-off by nature: the descriptor is its only client."""
    words = [PASST, "--foreground", "--quiet", "--fd", "3", "--no-map-gw"]
    for proto, option in (("tcp", "-t"), ("udp", "-u")):
        ports = [f"127.0.0.1/{forward.host}:{forward.guest}" for forward in card.nic.forward if forward.proto == proto]
        for port in ports or ["none"]:
            words += [option, port]
    return words


def _start(context: Context, card: Card) -> int:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    with its:
        try:
            process = context.host.spawn(command(card), {3: its.fileno()})
        except OSError:
            ours.close()
            raise
    context.loop.watch(process.pidfd, lambda: _ended(context, process))
    return ours.detach()


def _ended(context: Context, process: Process) -> None:
    context.loop.unwatch(process.pidfd)
    note("passt-ended", status=process.reap())
