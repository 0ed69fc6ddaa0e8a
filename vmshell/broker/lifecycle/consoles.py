"""Ways to a VM's screen and serial console: descriptors that a call's reply brings, past which the broker sees nothing.

Runs in: the broker.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...errors import VmshellError
from ...messages import PAUSED, QUEUED, RUNNING, STARTING, Attach
from ...refusals import RelayDown, VmBusy, WrongState
from ..runtime.log import note

if TYPE_CHECKING:
    from ..runtime.call import Call
    from ..services.relay import Relay
    from ..vm.vm import Vm
    from .runs import Runs

Attached = Callable[[VmshellError | None], None]


class Consoles:
    """Serial consoles by the relay, screens by QEMU."""

    def __init__(self, *, relay: Relay, runs: Runs) -> None:
        self._relay = relay
        self._runs = runs

    def console(self, call: Call, vm: Vm, *, readonly: bool, replay: bool) -> None:
        """Reply with a viewer's ends of a console's two pipes; the relay holds the others."""
        if vm.state in (QUEUED, STARTING):
            raise VmBusy(vm=vm.ref, state=vm.state)
        if vm.state not in (RUNNING, PAUSED):
            raise WrongState(vm=vm.ref, state=vm.state, verb="console", needed="running")

        def done(error: VmshellError | None) -> None:
            if error:
                call.fail(error)
            else:
                call.reply({"name": vm.ref, "state": vm.state})

        self._attach(call, vm, done, readonly=readonly, replay=replay)

    def display(self, call: Call, vm: Vm) -> None:
        """Reply with one end of a stream; QEMU gets the other and speaks RFB on it. No port is opened anywhere."""
        run = self._runs.must_live(vm, "display")
        if vm.state not in (RUNNING, PAUSED):
            raise VmBusy(vm=vm.ref, state=vm.state)
        if (vm.booted or vm.definition).display != "vnc":
            raise WrongState(vm=vm.ref, state="without a screen", verb="display", needed="booted with display.type = vnc")
        viewer, qemu = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)

        def answered(error: VmshellError | None) -> None:
            with viewer:
                if error:
                    call.fail(error)
                else:
                    call.reply({"name": vm.ref, "state": vm.state}, (viewer.fileno(),))

        with qemu:
            self._runs.order(run, "display", answered, fd=qemu.fileno())

    def attach_at_boot(self, call: Call, vm: Vm) -> None:
        """Keep a console for the reply of *call*'s boot; without one it is a boot all the same."""
        self._attach(call, vm, lambda error: None, readonly=False, replay=True)

    def _attach(self, call: Call, vm: Vm, done: Attached, *, readonly: bool, replay: bool) -> None:
        """Make two pipes; the relay gets an end of each, *call* keeps the others for its reply, and `done(error)` is called.

        From here on the broker is out of the path: no guest byte ever enters it.
        """
        with ExitStack() as relays, ExitStack() as viewers:
            try:
                keys, typed = _pipe(relays, viewers)
                shown, output = _pipe(viewers, relays)
            except OSError as exc:
                note("no-console", number=vm.number, problem=exc)
                done(RelayDown())
                return
            theirs = viewers.pop_all()

            def answered(error: VmshellError | None) -> None:
                if error:
                    theirs.close()
                else:
                    theirs.pop_all()
                    call.keep_fds((shown, typed))
                done(error)

            peer = call.peer
            message = Attach(number=vm.number, uid=peer.uid, label=peer.label, readonly=readonly, replay=replay)
            self._relay.send(message, answered, (keys, output))


def _pipe(reads: ExitStack, writes: ExitStack) -> tuple[int, int]:
    """Return the two ends of a new pipe, which these stacks close."""
    out, into = os.pipe2(os.O_CLOEXEC)
    reads.callback(os.close, out)
    writes.callback(os.close, into)
    return out, into
