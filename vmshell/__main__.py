"""The starter of our processes: `python3 -IS …/vmshell/__main__.py PROCESS ARGS…`, where PROCESS is the name of its folder.

`-I -S` keep the environment, the current folder and site-packages out of the process. So the starter adds the one folder our code
is in, and nothing else. (The launcher, which root runs, has a short starter of its own, `launcher/__main__.py`; so has the login
shell of an installed host, `etc/bin/vmshell`.)

An installed host has each version in a folder of its own, and a link to the one in force. The link is followed once, here: what a
process imports later is of the version it began with.
"""

from __future__ import annotations

import os
import sys

# They have their descriptors by number, where none of ours may be, and import all they need before they begin.
JOBS = ("storage", "probe")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def main(argv: list[str]) -> int:
    """Run the process named by the first argument and return its exit status."""
    code = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    sys.path.insert(0, code)
    process, rest = (argv[1], argv[2:]) if len(argv) > 1 else ("", [])
    if process not in JOBS:
        from vmshell.installed import hold_code

        hold_code(code)
    run: Callable[[list[str]], int]
    if process == "broker":
        from vmshell.broker.main import main as run
    elif process == "accounts":
        from vmshell.accounts.main import main as run
    elif process == "front":
        from vmshell.front.main import main as run
    elif process == "relay":
        from vmshell.relay.main import main as run
    elif process == "storage":
        from vmshell.storage.main import main as run
    elif process == "probe":
        from vmshell.probe.main import main as run
    elif process == "framefilter":
        from vmshell.framefilter.main import main as run
    elif process == "dnsmasq":
        from vmshell.dnsmasq.main import main as run
    elif process == "tapnet":
        # It cannot do without pyroute2, which is in this interpreter's own environment or in Debian's packages.
        environment = os.path.dirname(os.path.dirname(sys.executable))
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        sys.path += [f"{environment}/lib/{version}/site-packages", "/usr/lib/python3/dist-packages"]
        from tapnet.main import main as run
    elif process == "admin":
        from vmshell.admin.main import main as run
    elif process == "shell":
        from vmshell.shell.main import main as run
    else:
        print("usage: vmshell PROCESS …", file=sys.stderr)
        return 2
    return run(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
