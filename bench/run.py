"""`make bench`: every figure, measured now, ours beside the other's, with its aim.

    bench/run.py [P1 P2 …]

Nothing here is a test with a time limit: a figure that misses its aim is printed so, and the exit status stays 0. Each pair is
measured in turn, ours and the other's; the ratio is the median of the pairs' ratios, and `median (min-max)` stands beside it.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench.figures import Row, skipped  # noqa: E402

# A module is imported, and a function run, once however many of its figures are asked for.
SOURCES: list[tuple[str, str, str]] = [
    ("P1 P2", "login", "rows"),
    ("P2", "login", "without_ssh"),
    ("P4", "boot", "first_lines"),
    ("P5", "boot", "starts"),
    ("P5", "virsh", "rows"),
    ("P6 P7 P8", "relay", "rows"),
    ("P9", "network", "rows"),
    ("P10", "many", "memory"),
    ("P11", "many", "requests"),
    ("P13", "boot", "new_disks"),
    ("P14", "throughput", "rows"),
    ("P20", "launch", "rows"),
    ("P21", "front", "rows"),
]
KNOWN = sorted(
    {identity for identities, _, _ in SOURCES for identity in identities.split()}, key=lambda identity: int(identity[1:])
)


def main(argv: list[str]) -> int:
    wanted = argv or KNOWN
    unknown = [identity for identity in wanted if identity not in KNOWN]
    if unknown:
        print(f"bench/run.py: there is no {unknown[0]}; there are {', '.join(KNOWN)}", file=sys.stderr)
        return 2
    # Whatever ends us ends what we started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    load, system = os.getloadavg()[0], os.uname()
    print(f"{os.cpu_count()} CPUs, load {load:.1f}, {system.sysname} {system.release}; guests run emulated (TCG)")
    rows: list[Row] = []
    for identities, module, function in SOURCES:
        if set(identities.split()) & set(wanted):
            measured = _measure(identities, module, function)
            rows += [row for row in measured if row[0] in wanted]
    print(table(rows))
    missed = [row[0] for row in rows if row[5] is False]
    print(f"{len(rows)} figures; aims missed: {', '.join(missed) or 'none'}")
    return 0


def _measure(identities: str, module: str, function: str) -> list[Row]:
    """One source's rows. A source that fails is named in the table and costs the others nothing."""
    print(f"measuring {identities} …", file=sys.stderr, flush=True)
    if module == "relay" and shutil.which("socat") is None:
        return [skipped(identity, "console relay against socat", "socat is not installed") for identity in identities.split()]
    measure: Callable[[], list[Row]] = getattr(importlib.import_module(f"bench.{module}"), function)
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return [
            skipped(identity, f"bench/{module}.py", f"{type(error).__name__}: {error}"[:200]) for identity in identities.split()
        ]


def table(rows: list[Row]) -> str:
    lines = [_line("id", "what", "figure", "ratio", "aim", "")]
    for identity, what, figure, ratio, aim, ok in rows:
        verdict = {True: "ok" if aim else "", False: "MISSES", None: "-"}[ok]
        whats, figures = textwrap.wrap(what, 50), textwrap.wrap(figure, 46)
        for index in range(max(len(whats), len(figures))):
            left, middle = (part[index] if index < len(part) else "" for part in (whats, figures))
            first = index == 0
            shown = "" if math.isnan(ratio) or not first else f"{ratio:.2f}"
            lines.append(_line(identity if first else "", left, middle, shown, aim if first else "", verdict if first else ""))
    return "\n".join(lines)


def _line(identity: str, what: str, figure: str, ratio: str, aim: str, verdict: str) -> str:
    return f"{identity:4} {what:50} {figure:46} {ratio:>6}  {aim:15} {verdict}".rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
