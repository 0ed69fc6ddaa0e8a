"""The broker's connection to tapnet, which alone may change the host's network. tapnet is there only on an installed host.

Runs in: the broker.
"""

from __future__ import annotations

from ...refusals import TapnetDown
from .connection import Connection


class Tapnet(Connection):
    """Every new connection begins with all that there is to be: `on_connect` says it."""

    name = "tapnet"
    down = TapnetDown
    fds_allowed = 1
