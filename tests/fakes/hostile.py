"""A broker that was taken over: it says, byte for byte, what a test has it say, for as long as the test likes.

    with HostileBroker(layout, [b'{"id":1,"ok":{}}']) as broker: …

Each connection gets the packets after its first request. A packet is bytes, or (bytes, descriptor): the descriptor goes with it
and the broker keeps none of its own, so that the one in the packet is the last. *again* is sent over and over behind them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Sequence

from vmshell import encoding, wire
from vmshell.layout import Layout

Packet = bytes | tuple[bytes, int]
LINGER = 600  # seconds


class HostileBroker:
    def __init__(self, layout: Layout, packets: Sequence[Packet] = (), *, again: bytes = b"", closes: bool = False) -> None:
        self._packets, self._again, self._closes = packets, again, closes
        self._end, self._stop = socket.socketpair()  # a byte ends the thread
        os.makedirs(layout.run, exist_ok=True)
        self._listener = wire.listen(layout.broker_socket, 0o600)
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> HostileBroker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.send(b"x")
        self._thread.join()
        for sock in (self._end, self._stop, self._listener):
            sock.close()

    def _serve(self) -> None:
        clients: list[socket.socket] = []
        pause = 0.05 if self._again else None
        while self._end not in (readable := select.select([self._end, self._listener], [], [], pause)[0]):
            if readable:
                clients.append(self._listener.accept()[0])
                self._talk(clients[-1])
            for client in clients:
                with contextlib.suppress(OSError):
                    if self._again:
                        client.send(self._again, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        for client in clients:
            client.close()

    def _talk(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.settimeout(20)
            client.recv(encoding.FRAME_MAX)
            for packet in self._packets:
                data, fds = (packet, []) if isinstance(packet, bytes) else (packet[0], [packet[1]])
                socket.send_fds(client, [data], fds)
                for fd in fds:
                    os.close(fd)
            if self._closes:
                client.shutdown(socket.SHUT_RDWR)


class Lingering:
    """`take` gives a TCP connection whose last close waits LINGER seconds for a peer that never reads."""

    def __init__(self) -> None:
        self._peers: list[socket.socket] = []

    def take(self) -> int:
        with socket.create_server(("127.0.0.1", 0)) as server:
            sock = socket.create_connection(server.getsockname())
            self._peers.append(server.accept()[0])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(b"x" * 65536)
        return sock.detach()

    def __enter__(self) -> Lingering:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.close()  # unread data: a reset, which ends the waiting of whoever closed the other end
