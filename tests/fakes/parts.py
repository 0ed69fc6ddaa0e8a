"""The broker's parts with some of them replaced by a test's own. Runs in: tests."""

from __future__ import annotations

from typing import Any

from vmshell.broker.composition import Parts
from vmshell.broker.host.processes import Host
from vmshell.broker.runtime.loop import Loop
from vmshell.layout import Layout
from vmshell.model.policy import Policy

REPLACEABLE = {"accounts", "jobs", "launcher", "relay", "tapnet", "capabilities", "registry", "network"}


class PartsWith(Parts):
    """*replaced* parts are there before anything is made with them, as it is with the real ones."""

    def __init__(self, layout: Layout, policy: Policy, loop: Loop, host: Host, **replaced: Any) -> None:
        assert replaced.keys() <= REPLACEABLE
        self._replaced = replaced
        super().__init__(layout, policy, loop, host)

    def _services(self, policy: Policy) -> None:
        super()._services(policy)
        for name in self._replaced.keys() - {"network"}:
            setattr(self, name, self._replaced[name])

    def _network(self) -> None:
        super()._network()
        self.network = self._replaced.get("network", self.network)
