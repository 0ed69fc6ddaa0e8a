"""The broker's connection to a launcher that is killed after it has started something."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from vmshell import wire
from vmshell.broker.host.processes import Process
from vmshell.broker.runtime.loop import Loop
from vmshell.broker.services.launcher import Launcher
from vmshell.errors import VmshellError
from vmshell.layout import Layout


def test_what_a_launcher_can_say_no_more_is_waited_for_no_more(short_tmp: Path) -> None:
    """The exit status of a VM: its end took the patience for that status, two seconds, after every restart of the launcher."""
    loop = Loop(lambda error: None)
    layout = Layout(etc="/x", state="/x", run=str(short_tmp), log="/x", embedded=False)
    link = Launcher(loop, cast(Any, None), layout)
    started: list[VmshellError | Process | None] = []
    ended: list[int] = []
    with wire.listen(layout.launcher_socket, 0o600) as listener:
        link.launch(7, {}, (), lambda error, process: started.append(error or process), ended.append)
        first, _ = listener.accept()
        with first:
            packet = wire.recv(first)
            assert packet is not None
            pidfd = os.pidfd_open(os.getpid())
            wire.send(first, {"id": packet.body["id"], "ok": {"pid": os.getpid()}}, (pidfd,))
            os.close(pidfd)
            turn(loop, lambda: bool(started))
        assert isinstance(started[0], Process) and ended == []
        turn(loop, lambda: bool(ended))
        assert ended == [0]
        second, _ = listener.accept()
        second.close()
    link.close()
    started[0].reap()


def turn(loop: Loop, done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        loop.after(0.01, loop.stop)
        loop.run()
