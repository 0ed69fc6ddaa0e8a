"""Session mode's way out: for each card of kind `user` one passt, which speaks for the guest with our own sockets.

The host's loopback is not reachable through it, and QEMU stays in a network of its own: all it has is a stream to passt. Without
passt installed a card leads to QEMU's own small network, which ends there. passt ends with its QEMU.
Runs in: the broker, in session mode.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from ..errors import NetworkFailed
from .journal import note

if TYPE_CHECKING:
    from .cards import Card
    from .context import Context
    from .host import Process

PASST = "/usr/bin/passt"


def available() -> bool:
    return os.path.exists(PASST)


def start_all(context: Context, cards: list[Card]) -> dict[int, int]:
    """QEMU's ends of the streams, by the card's index, the taker's to close; raises NetworkFailed."""
    cables: dict[int, int] = {}
    try:
        for card in cards:
            if card.network.kind == "user" and available():
                cables[card.index] = _start(context, card)
    except OSError as exc:
        for fd in cables.values():
            os.close(fd)
        raise NetworkFailed(problem=f"passt cannot be started ({exc.strerror})") from exc
    return cables


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
