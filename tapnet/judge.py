"""May this be? Each word of the broker's is one that rules can be made of, and stands in root's policy or in the kernel already.

`policy.py` says what is asked of the policy, and what becomes of VMs that run when it is another.
Runs in: tapnet. Reads the policy; looks at the kernel where the policy says no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from vmshell.errors import BadPolicy
from vmshell.messages import Opening, Port, Segment, Settings
from vmshell.model.policy import Policy

from . import policy
from .checks import check_port, check_segment, check_settings
from .policy import NotInPolicy
from .rootpolicy import RootPolicy
from .standing import Standing
from .state import State


class Judge:
    """Every method raises VmshellError for what may not be."""

    def __init__(self, root: RootPolicy, standing: Standing) -> None:
        self._root = root
        self._standing = standing

    def settings(self, settings: Settings) -> None:
        check_settings(settings)
        self._allow(partial(policy.pools_problem, settings=settings), partial(self._standing.has_pools, settings))
        self.confined(settings.confined)

    def confined(self, uids: Iterable[int]) -> None:
        self._allow(partial(policy.confined_problem, uids=uids), partial(self._standing.has_confined, uids))

    def segment(self, segment: Segment) -> None:
        check_segment(segment)
        self._allow(partial(policy.segment_problem, segment=segment), partial(self._standing.has_segment, segment))

    def port(self, port: Port, state: State) -> None:
        check_port(port, state)
        segment = state.segments[port.segment]
        stands = _never if port.create else partial(self._standing.has_port, port, segment)
        self._allow(partial(policy.port_problem, port=port, segment=segment), stands)

    def openings(self, openings: Iterable[Opening]) -> None:
        self._allow(partial(policy.openings_problem, openings=openings), _never)

    def _allow(self, problem_of: Callable[[Policy], str], stands: Callable[[], bool]) -> None:
        """Raise NotInPolicy unless the policy has no problem with it, or *stands()*."""
        try:
            problem = problem_of(self._root.current())
        except BadPolicy as error:
            problem = error.sentence()
        if problem and not stands():
            raise NotInPolicy(problem=problem)


def _never() -> bool:
    return False
