"""What the broker may ask of the launcher: four requests; and the one event that the launcher says by itself.

    {"id": 7, "verb": "launch", "number": 5, "plan": {…}}       descriptors: as the plan numbers them, from 3; last: its 0, 1, 2
    {"id": 8, "verb": "job", "kind": "storage", "words": ["create", "1048576"]}      descriptors: from 3; last: standard output
    {"id": 9, "verb": "signal", "number": 5, "signal": "kill"}
    {"id": 10, "verb": "restart-names"}

Each is answered with `ok` or `error`; all but `signal` with the pid of what was started, its pidfd beside it.
Runs in: the launcher, the broker. Stdlib only, no I/O at import.
"""

from __future__ import annotations

from typing import Any

from .fields import Message, bad, choice, field, integer, listing, parsed, table, text
from .numbering import NUMBER_MAX

NUMBER = integer(1, NUMBER_MAX)
LENT_MAX = 128  # descriptors beside one request
WORDS_MAX, WORD_MAX = 64, 200
TERM, KILL = "term", "kill"
STORAGE, PROBE = "storage", "probe"


def word(value: object, name: str) -> str:
    said = text(WORD_MAX)(value, name)
    if not said.isprintable():
        raise bad(name, value, "printable characters")
    return said


class ToLauncher(Message):
    """What the launcher may be asked."""


class Launch(ToLauncher):
    """Start the QEMU of VM *number*; *plan* is a LaunchPlan less what the launcher sets itself (`launch/plan.py`).

    QEMU's standard input and output, the guest's serial port, are FIFOs opened for reading and writing: so QEMU holds the other
    end as well, and never sees it closed. Its standard error is the writing end of a pipe.
    """

    verb = "launch"
    number: int = field(NUMBER)
    plan: dict[str, Any] = field(table)


class Job(ToLauncher):
    """Start a storage worker or a probe under a uid of its own. What it found out is the last line that it prints."""

    verb = "job"
    kind: str = field(choice(STORAGE, PROBE))
    words: tuple[str, ...] = field(listing(word, WORDS_MAX), default=())


class Signal(ToLauncher):
    """Send a signal to every process of VM *number*. That there is none is no error."""

    verb = "signal"
    number: int = field(NUMBER)
    signal: str = field(choice(TERM, KILL))


class RestartNames(ToLauncher):
    """Have the service manager start the names service anew."""

    verb = "restart-names"


class Ended(Message):
    """Launcher → broker: what request *run* started has ended, with this exit status (128 and the signal's number)."""

    verb = "ended"
    run: int = field(integer(0, 1 << 53))
    status: int = field(integer(0, 255))


TO_LAUNCHER: dict[str, type[ToLauncher]] = {kind.verb: kind for kind in (Launch, Job, Signal, RestartNames)}


def parse_to_launcher(body: dict[str, object]) -> ToLauncher:
    """The typed request in *body*; raises ProtocolError, BadValue or BadName."""
    return parsed(body, TO_LAUNCHER, "the launcher")
