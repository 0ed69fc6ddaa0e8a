"""The process that configures dnsmasq: `… dnsmasq LAYOUT`, before each start of dnsmasq, as the same uid.

The broker, which nobody need believe, has no part in it: it writes data files and may have the service started anew.
Runs in: dnsmasq. Reads policy.toml; writes dnsmasq.conf into a folder that is the service's own.
"""

from __future__ import annotations

import os
import sys

from ..errors import BadPolicy
from ..layout import Layout
from ..model.policy import load
from .configuration import FOLDERS, configuration


def main(argv: list[str]) -> int:
    """Write the configuration; *argv* is the layout as one argument."""
    layout = Layout.from_args(argv[0])
    try:
        policy = load(layout.policy, session=False)
    except BadPolicy as exc:
        there = os.path.exists(layout.dnsmasq_conf)
        print(f"{exc.sentence()}; {'the configuration stays what it was' if there else 'dnsmasq cannot start'}", file=sys.stderr)
        return 0 if there else 1
    # One that is missing would end dnsmasq; the broker, which makes them, has it started anew then.
    folders = [folder for folder in FOLDERS.values() if os.path.isdir(f"{layout.names}/{folder}")]
    try:
        _write(layout.dnsmasq_conf, configuration(policy.host, layout.names, folders))
    except OSError as exc:
        print(f"{layout.dnsmasq_conf} cannot be written: {exc.strerror}", file=sys.stderr)
        return 1
    return 0


def _write(path: str, text: str) -> None:
    """Replace the file as a whole: who is stopped on the way leaves the old one."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    with open(f"{path}.new", "w", encoding="ascii") as file:
        file.write(text)
    os.rename(f"{path}.new", path)
