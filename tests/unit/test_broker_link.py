"""The broker's connection to a service that is slow, away, or goes away while it is told what there is."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vmshell import wire
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services.connection import Connection
from vmshell.broker.services.tapnet import Tapnet
from vmshell.errors import VmshellError
from vmshell.messages import Health, Unplug
from vmshell.refusals import TapnetDown

MANY = 2000  # more than any socket buffer takes


class Told(Connection):
    """At every new connection it says MANY things."""

    name = "service"
    down = TapnetDown

    def __init__(self, loop: Loop, path: str) -> None:
        super().__init__(loop, path, self.tell)
        self.connections = 0
        self.answers: list[VmshellError | None] = []

    def tell(self) -> None:
        self.connections += 1
        for number in range(1, MANY + 1):
            self.request(Unplug(number=number, nic=0), lambda error, packet: self.answers.append(error))


@pytest.fixture
def loop() -> Loop:
    def unexpected(error: BaseException) -> None:
        raise error

    return Loop(unexpected)


def turn(loop: Loop, done: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        loop.after(0.01, loop.stop)
        loop.run()


def test_a_service_that_reads_late_hears_everything_in_order(loop: Loop, short_tmp: Path) -> None:
    with wire.listen(f"{short_tmp}/s", 0o600) as listener:
        link = Told(loop, f"{short_tmp}/s")
        link.connect()
        descriptor = os.open(short_tmp, os.O_RDONLY)
        link.request(Health(), lambda error, packet: None, (descriptor,))
        os.close(descriptor)  # the link has one of its own
        heard: list[int] = []
        brought: list[str] = []

        def serve() -> None:
            time.sleep(0.2)
            sock, _ = listener.accept()
            with sock:
                while len(heard) < MANY + 1:
                    packet = wire.recv(sock, fds_allowed=1)
                    assert packet is not None
                    heard.append(int(str(packet.body.get("number", 0))))
                    brought.extend(os.readlink(f"/proc/self/fd/{fd}") for fd in packet.fds)
                    packet.close()
                    wire.send(sock, {"id": packet.body["id"], "ok": {}})

        thread = threading.Thread(target=serve)
        thread.start()
        turn(loop, lambda: len(link.answers) == MANY)
        thread.join()
        assert heard == [*range(1, MANY + 1), 0] and brought == [str(short_tmp)]
        assert link.connections == 1 and set(link.answers) == {None}
        link.close()


def test_a_service_that_goes_away_meanwhile_is_called_again_once(loop: Loop, short_tmp: Path) -> None:
    """Each who waits is answered, and a new connection is one more, not one for each message."""
    with wire.listen(f"{short_tmp}/s", 0o600) as listener:
        link = Told(loop, f"{short_tmp}/s")
        link.connect()
        listener.accept()[0].close()
        turn(loop, lambda: link.connections == 2)
        assert len(link.answers) == MANY and all(isinstance(error, TapnetDown) for error in link.answers)
        link.close()


def test_a_service_that_never_reads_is_lost_in_the_end(loop: Loop, short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmshell.broker.services.connection._UNSENT_MAX", 100)
    with wire.listen(f"{short_tmp}/s", 0o600):
        gc.collect()  # what tests before this one have left to it
        before = len(os.listdir("/proc/self/fd"))
        link = Told(loop, f"{short_tmp}/s")
        link.connect()
        assert len(link.answers) == MANY and all(isinstance(error, TapnetDown) for error in link.answers)
        assert link.connections == 1
        link.close()
        assert len(os.listdir("/proc/self/fd")) <= before


def test_an_answer_that_raises_keeps_nobody_waiting_and_the_service_is_called_again(
    loop: Loop, short_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(error: VmshellError | None, packet: wire.Packet) -> None:
        raise ValueError("broken")

    told: list[VmshellError | None] = []
    connections: list[int] = []
    with wire.listen(f"{short_tmp}/s", 0o600) as listener:
        link = Tapnet(loop, f"{short_tmp}/s", lambda: connections.append(1))
        link.connect()
        for answered in (lambda error, packet: told.append(error), broken, lambda error, packet: told.append(error)):
            link.request(Health(), answered)
        listener.accept()[0].close()
        turn(loop, lambda: len(connections) == 2)
        assert [type(error) for error in told] == [TapnetDown, TapnetDown]
        assert "ValueError: broken" in capsys.readouterr().err
        link.close()


def test_a_service_that_was_told_half_is_told_again(loop: Loop, short_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise it would refuse everything, for as long as it runs."""
    told: list[VmshellError | None] = []
    connections: list[int] = []

    def tell() -> None:
        connections.append(1)
        if len(connections) == 1:
            raise ValueError("broken")

    with wire.listen(f"{short_tmp}/s", 0o600):
        link = Tapnet(loop, f"{short_tmp}/s", tell)
        link.request(Health(), lambda error, packet: told.append(error))
        assert [type(error) for error in told] == [TapnetDown] and "ValueError: broken" in capsys.readouterr().err
        turn(loop, lambda: len(connections) == 2)
        link.close()
