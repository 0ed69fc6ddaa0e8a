"""From what was seen to what is said: each outcome of the probe as one sentence, with no look at anything but its arguments.

Runs in: the probe. Touches nothing.
"""

from __future__ import annotations

from ..errors import safe
from . import guest
from .trial import KVM_GAVE_UP, Trial

OLDEST = (7, 2)

# A guest that KVM runs is never slower than TCG. One that is, is being emulated an instruction at a time.
SLOW = 1.0  # seconds that are nobody's concern
SLOWER_THAN_TCG = 4


def version(output: bytes) -> tuple[str, str]:
    """QEMU's version from what `--version` printed, and a problem or an empty string."""
    words = output[:200].decode("ascii", "replace").split()
    number = words[3] if words[:3] == ["QEMU", "emulator", "version"] and len(words) > 3 else ""
    parts = number.split(".")
    if len(parts) < 2 or not all(part.isascii() and part.isdigit() and len(part) < 6 for part in parts):
        said = safe(output[:60].decode("ascii", "replace").split("\n")[0])
        return "", f"QEMU does not say its version (it says '{said}')" if said else "QEMU does not say its version"
    if tuple(map(int, parts[:2])) < OLDEST:
        return number, f"QEMU {number} is too old: {OLDEST[0]}.{OLDEST[1]} or later is needed"
    return number, ""


def jail_problem(trial: Trial) -> str:
    """Why no guest can run here, or an empty string. *trial* is the one under TCG, which needs nothing but QEMU and the jail."""
    if trial.done or not trial.over:
        return ""  # not over: the host is busy, which is no fault of QEMU's
    errors = trial.errors.decode("utf-8", "replace")
    # bwrap's words for it: "No permissions to creating new namespace", "Creating new namespace failed", "Can't mount proc".
    if "bwrap: " in errors and "namespace" in errors:
        return "this host lets ordinary processes make no user namespaces, which QEMU's jail is made of"
    if "bwrap: " in errors:
        return f"QEMU's jail cannot be built here ({_first(errors, 'bwrap: ')})"
    if errors.strip():
        return f"QEMU does not run a guest here ({_first(errors, 'qemu-system-x86_64: ')})"
    return f"QEMU does not run a guest here ({_how_far(trial)})"


def kvm_refusal(trial: Trial, tcg: Trial) -> str:
    """Why KVM is not to be used here, or an empty string when the guest really ran under it."""
    if trial.done:
        if trial.seconds > SLOW and tcg.done and trial.seconds > SLOWER_THAN_TCG * tcg.seconds:
            return f"a guest took {trial.seconds:.1f} s under KVM and {tcg.seconds:.1f} s without: KVM only emulates here"
        return ""
    if not trial.restarted and not trial.console and trial.errors.strip():
        return f"QEMU cannot use KVM here ({_first(trial.errors.decode('utf-8', 'replace'), 'qemu-system-x86_64: ')})"
    return f"KVM does not run a guest here ({_how_far(trial)})"


def _how_far(trial: Trial) -> str:
    said = trial.console.decode("ascii", "replace")
    stage = max((char for char in said if char in guest.STAGES), default="")
    if trial.restarted:
        ending = "started anew"
    elif KVM_GAVE_UP in trial.errors:
        ending = "stopped with an internal error of KVM"
    else:
        ending = "ended" if trial.over else "said no more"
    if not stage:
        return f"it {ending}, without a byte" if trial.over else "not a byte came in time"
    return f"it came as far as {guest.STAGES[stage]} and then {ending}"


def _first(errors: str, program: str) -> str:
    """The first line that tells something, without time stamps and warnings, fit to be shown."""
    lines = [line.rpartition(program)[2].strip() for line in errors.splitlines() if line.strip() and "warning: " not in line]
    return safe(lines[0].removeprefix("error: "), 120) if lines else "it gave no reason"


def machines(output: bytes) -> tuple[dict[str, str], list[str]]:
    """From `qemu -machine help`: the version behind `q35` and `pc`, and all versions of the two."""
    aliases: dict[str, str] = {}
    versions: list[str] = []
    for line in output.decode("ascii", "replace").splitlines():
        name, _, rest = line.partition(" ")
        if name.startswith(("pc-q35-", "pc-i440fx-")):
            versions.append(name)
        elif name in ("q35", "pc") and "(alias of " in rest:
            aliases[name] = rest.rpartition("(alias of ")[2].partition(")")[0]
    return {name: version for name, version in aliases.items() if version in versions}, versions
