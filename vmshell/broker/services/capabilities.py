"""What this host can do: QEMU's version, and whether KVM really runs a guest. Found out once per boot of the host, by a job.

Runs in: the broker (the probe itself is a process of its own, without rights).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from ...launcher_messages import PROBE
from ...layout import Layout
from ...model.policy import HostPolicy
from ..runtime.files import boot_id
from ..runtime.log import note
from .jobs import Jobs

LOOK_AGAIN = 1.0  # seconds for which bad news is believed
QEMU = "/usr/bin/qemu-system-x86_64"


class Capabilities:
    """`problem` is empty or the one sentence why no VM can run here; `reason` says why `accel` is what it is."""

    def __init__(self, jobs: Jobs, layout: Layout, policy: HostPolicy) -> None:
        self._jobs = jobs
        self._layout = layout
        self._policy = policy
        self._waiting: list[Callable[[], None]] = []
        self._probing = False
        self._look_again = 0.0
        self.known = False
        self.qemu = self.accel = self.reason = self.problem = ""
        self.machines: dict[str, str] = {}  # `q35` and `pc` as today's versions
        self.versions: frozenset[str] = frozenset()  # every machine version this QEMU has

    def when_known(self, action: Callable[[], None]) -> None:
        """Call *action* once the host is known: at once, usually."""
        if self.known and (not self.problem or time.monotonic() < self._look_again):
            action()
            return
        # A host that could not run VMs is looked at again now and then: the administrator may just have installed QEMU.
        self._waiting.append(action)
        self.find_out()

    def find_out(self) -> None:
        """Start the probe, unless this boot's answer is in the run directory."""
        if self._probing:
            return
        cached = self._cached()
        if cached is not None:
            self._believe(cached)
            return
        self._probing = True
        try:
            self._jobs.start(PROBE, [self._policy.accel], {}, self._probed)
        except OSError as exc:
            self._probing = False
            self._believe({"problem": f"the host cannot be looked at ({exc.strerror})"})

    def _probed(self, status: int, answer: dict[str, object]) -> None:
        self._probing = False
        if status:
            self._believe({"problem": "the look at this host failed; the journal of vmshell-launcher may say why"})
            return
        if answer.get("accel") in ("kvm", "tcg") and not answer.get("problem"):
            self._store(answer)  # first: whoever waits for the answer may look for it there
        self._believe(answer)

    def _believe(self, answer: dict[str, object]) -> None:
        self.qemu, self.accel, self.reason, self.problem = (
            str(answer.get(key, "")) for key in ("qemu", "accel", "reason", "problem")
        )
        if self.accel not in ("kvm", "tcg") and not self.problem:
            self.problem = "the look at this host gave no answer"
        machines, versions = answer.get("machines"), answer.get("versions")
        self.machines = {str(key): str(value) for key, value in machines.items()} if isinstance(machines, dict) else {}
        self.versions = frozenset(map(str, versions)) if isinstance(versions, list) else frozenset()
        self.known = True
        self._look_again = time.monotonic() + LOOK_AGAIN
        note("host", qemu=self.qemu, accel=self.accel, reason=self.reason, problem=self.problem)
        waiting, self._waiting = self._waiting, []
        for action in waiting:
            action()

    def _key(self) -> str:
        """What the cached answer depends on: this boot, this QEMU, what the policy asks for."""
        try:
            status = os.stat(QEMU)
        except OSError:
            return ""
        return f"{boot_id()} {status.st_ino} {status.st_mtime_ns} {self._policy.accel}"

    def _cached(self) -> dict[str, object] | None:
        try:
            with open(self._layout.host_facts, encoding="utf-8") as file:
                answer = json.loads(file.read(1 << 16))
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) and answer.get("key") == self._key() != "" else None

    def _store(self, answer: dict[str, object]) -> None:
        path = self._layout.host_facts
        try:
            with open(path + ".new", "w", encoding="utf-8") as file:
                json.dump({**answer, "key": self._key()}, file)
            os.rename(path + ".new", path)
        except OSError as exc:
            note("host-not-cached", problem=exc)
