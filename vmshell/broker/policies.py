"""The policy in force: what the file said when it was read last, and what holds for a user by it.

Runs in: the broker.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from ..layout import Layout
from ..model import policy as policies
from ..model.catalogues import Catalogues
from ..model.policy import Effective, HostPolicy, Policy
from .runtime.log import note

KNOWN_MAX = 4096  # users for whom it is remembered what holds for them


def read_policy(layout: Layout) -> Policy:
    """Read the policy file; raises BadPolicy."""
    return policies.load(layout.policy, session=layout.embedded)


class Policies:
    """`changed` is called when another policy has come into force. What concerns the host waits for the broker's next start."""

    def __init__(
        self,
        *,
        layout: Layout,
        policy: Policy,
        groups_of: Callable[[str], Collection[str]],
        changed: Callable[[], None],
    ) -> None:
        self._layout = layout
        self._groups_of = groups_of
        self._changed = changed
        self._known: dict[tuple[str, frozenset[str]], Effective] = {}  # by user and groups, of the policy *_known_of*
        self._known_of = policy
        self.policy = policy

    @property
    def host(self) -> HostPolicy:
        """What the policy says about this host."""
        return self.policy.host

    @property
    def catalogues(self) -> Catalogues:
        """What there is to choose from: networks, CPU models, firmware."""
        return self.policy.catalogues

    def effective(self, user: str) -> Effective:
        """Return what holds for *user* now; the account's groups only matter if the policy names any."""
        if self._known_of is not self.policy or len(self._known) >= KNOWN_MAX:
            self._known, self._known_of = {}, self.policy
        groups = frozenset(self._groups_of(user)) if self.policy.has_groups else frozenset()
        if (user, groups) not in self._known:
            self._known[user, groups] = self.policy.effective(user, groups)
        return self._known[user, groups]

    def reload(self) -> list[str]:
        """Take the policy file as it is now, or raise BadPolicy and keep the old one; returns what waits for a restart.

        VMs that run go on as they are: limits are asked when something is defined or booted. Only what is published follows at
        once, and how fast an interface is.
        """
        new = read_policy(self._layout)
        later = [key for key, value in vars(new.host).items() if value != getattr(self.policy.host, key)]
        self.policy = replace(new, host=self.policy.host)
        note("policy-loaded", waits=", ".join(later))
        self._changed()
        return later
