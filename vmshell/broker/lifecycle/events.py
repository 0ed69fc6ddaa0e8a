"""What the relay says of VMs: each event moves one VM on.

    off/failed → queued → starting → running ⇄ paused → (stopping) → off, or failed with the reason
    creating → off          off/failed → gone

`boot.py` is the way up, `stop.py` the way down, `runs.py` what exists in between. Each state is written before the act; the state
machine never depends on anybody waiting.
Runs in: the broker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...messages import PAUSED, RUNNING, STARTING, Event

if TYPE_CHECKING:
    from ..vm.registry import Registry
    from .boot import Boots
    from .runs import Runs

PAUSES = {
    "internal-error": "internal-error: this host cannot run the guest",
    "io-error": "io-error: storage refused a write",
}


class Events:
    """Acts on what the relay says."""

    def __init__(self, *, registry: Registry, runs: Runs, boots: Boots) -> None:
        self._registry = registry
        self._runs = runs
        self._boots = boots

    def heard(self, event: Event) -> None:
        """Act on one word about one VM; words about VMs that do not run mean nothing."""
        run = self._runs.get(event.number)
        if run is None:
            return
        vm, word = run.vm, event.word
        if word in ("guest-shutdown", "guest-panic"):
            run.guest_ended = True  # also when QEMU's end was seen first: the relay reads its last words only then
        elif run.ending:
            return
        elif word == "ready" and vm.state == STARTING:
            self._boots.ready(run)
        elif word == "running" and vm.state in (STARTING, PAUSED):
            vm.note = ""
            self._boots.runs(run)
        elif word == "paused" and vm.state == RUNNING:
            self._registry.set_state(vm, PAUSED)
        elif word in PAUSES:
            vm.note = PAUSES[word]
        elif word == "output":
            vm.seen_output = True
        elif word == "viewers":
            vm.viewers = event.count
