"""The account that the broker runs as in system mode, and by which its services know it.

Runs in: the launcher, the relay, tapnet, vmshell-admin. Asks the host's accounts, once at a service's start.
"""

from __future__ import annotations

import pwd

NAME = "vmshell-broker"


def uid() -> int:
    """The broker's uid on this host; root's where there is no such account, as for a broker that root starts by hand."""
    try:
        return pwd.getpwnam(NAME).pw_uid
    except KeyError:
        return 0
