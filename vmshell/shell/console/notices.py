"""What the relay's notices say, as lines a person reads on the console.

Labels and reasons may hold what somebody chose: all of them go through `safe`.
Runs in: the shell. Pure functions.
"""

from __future__ import annotations

from ...errors import VmshellError, safe
from ...refusals import from_wire


def banner(vm: str, key: str, hello: dict[str, object], *, readonly: bool) -> str:
    """The first line: whose console, and the way out of it."""
    line = f"console of {vm}"
    state = hello.get("state")
    if isinstance(state, str) and state not in ("", "running"):
        line += f", which is {safe(state, 20)}"
    if key:
        line += f". {key} is the key: {key} . leaves, {key} ? helps"
    if readonly:
        line += ". You look only"
    elif hello.get("pen") is not True:
        line += f". {_holder(hello)} has the pen; {key or '^]'} r takes it"
    return line


def silence(vm: str, state: str, quiet_s: object) -> str:
    """Nothing has come since we attached: what that may mean."""
    if isinstance(quiet_s, int):
        last = f"its last output is {quiet_s} s old"
    else:
        last = "it has printed nothing yet (a Linux guest needs console=ttyS0 on its kernel command line)"
    return f"{vm} is {safe(state or 'running', 20)} and silent; {last}. Press Return"


def ended(vm: str, notice: dict[str, object]) -> str:
    reason = notice.get("reason")
    return f"{vm} has ended: {safe(reason, 200)}" if isinstance(reason, str) and reason else f"{vm} has ended"


def refusal(notice: dict[str, object]) -> VmshellError | None:
    """Why this viewer may look no longer, if that is why the console ends; None if the VM has ended."""
    return from_wire({"code": notice["code"], "text": notice.get("reason")}) if "code" in notice else None


def text(vm: str, key: str, notice: dict[str, object]) -> str:
    """The line for any other notice; an empty string for one not known."""
    word = notice.get("notice")
    if word == "pen":
        return "you have the pen" if notice.get("pen") is True else f"{_holder(notice)} has the pen now; {key} r takes it"
    if word == "refused":
        return f"{safe(notice.get('why') or 'not typed: you do not have the pen', 200)}; {key} r takes it"
    if word == "gap":
        return f"{_whole(notice.get('bytes'))} bytes are missing here: this terminal was too slow for them"
    if word == "state":
        return f"{vm} is {safe(notice.get('state'), 40)}"
    if word == "who":
        return _who(notice.get("viewers"), _whole(notice.get("more")))
    return ""


def _who(viewers: object, more: int) -> str:
    rows = [row for row in viewers if isinstance(row, dict)] if isinstance(viewers, list) else []
    names = [safe(row.get("label"), 80) + (" (pen)" if row.get("pen") is True else "") for row in rows]
    if more:
        names.append(f"and {more} more")
    return f"attached: {', '.join(names)}" if names else "nobody is attached"


def _holder(notice: dict[str, object]) -> str:
    holder = notice.get("holder")
    return safe(holder, 80) if isinstance(holder, str) and holder else "nobody"


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
