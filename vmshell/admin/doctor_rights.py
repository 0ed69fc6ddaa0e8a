"""The check of `vmshell-admin doctor` that is about rights: what each process of ours may do, by the kernel's word and no file's.

`SERVICES` is all that is allowed: who runs as whom, with which capabilities. Beyond it, nothing of ours runs as root, and nothing
under a uid of VMs or jobs has any capability.
Runs in: vmshell-admin, as root. Reads /proc; asks systemd for the services' pids.
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .. import brokeraccount
from ..errors import VmshellError
from ..model import policy
from ..numbering import JOBS_MAX, NUMBER_MAX
from .findings import FAIL, OK, WARN, Finding, output
from .verbs import Context

SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_ADMIN, NET_RAW = 6, 7, 8, 10, 12, 13
CAPABILITIES = {
    SETGID: "setgid",
    SETUID: "setuid",
    SETPCAP: "setpcap",
    NET_BIND_SERVICE: "net_bind_service",
    NET_ADMIN: "net_admin",
    NET_RAW: "net_raw",
}
EXACT, AT_MOST = ("CapBnd", "CapPrm", "CapEff"), ("CapInh", "CapAmb")
STARTER, LAUNCHER_STARTER = "/vmshell/__main__.py", "/vmshell/launcher/__main__.py"
# Root types these itself, or they end with one question.
MAY_BE_ROOTS = ("admin", "shell", "auth")
SECOND_LOOK = 1.0  # seconds; a process on its way down to its uid and rights is there by then

Status = dict[str, str]
Look = dict[tuple[int, str], str]  # what is wrong, by pid and start time


@dataclass(frozen=True)
class Service:
    """A process that stays: the account it runs as, the capabilities it has, and whether a seccomp filter bounds it."""

    name: str
    account: str
    capabilities: tuple[int, ...] = ()
    filtered: bool = True

    @property
    def unit(self) -> str:
        return f"vmshell-{self.name}.service"


SERVICES = (
    # No filter: QEMU would inherit it, and has exactly two of its own.
    Service("launcher", "root", (SETUID, SETGID, SETPCAP), filtered=False),
    Service("front", "vmshell-front"),
    Service("broker", brokeraccount.NAME),
    Service("relay", "vmshell-relay"),
    Service("tapnet", "vmshell-tapnet", (NET_ADMIN,)),
    Service("names", "vmshell-names", (NET_BIND_SERVICE, NET_ADMIN, NET_RAW)),
)


def check_rights(context: Context) -> Iterator[Finding]:
    if os.geteuid() != 0:
        yield Finding(WARN, "only root can look at the rights of all processes", "run doctor as root")
        return
    pids = _main_pids()
    findings = [*_services(pids), *_others(pids.get("launcher", 0), _uids(context))]
    yield from findings or [Finding(OK, "each process of ours has the rights it needs and no others")]


# --- the services -----------------------------------------------------------------------------------------------------


def _services(pids: dict[str, int]) -> Iterator[Finding]:
    for service in SERVICES:
        pid = pids.get(service.name, 0)
        status = read_status(pid) if pid else {}
        if not status:
            cure = f"systemctl start {service.unit}; journalctl -u {service.unit}"
            yield Finding(WARN, f"{service.unit} does not run, so nobody can look at its rights", cure)
            continue
        try:
            uid = pwd.getpwnam(service.account).pw_uid
        except KeyError:
            yield Finding(FAIL, f"there is no account {service.account}", "make install")
            continue
        for problem in deviations(service, uid, status):
            yield Finding(FAIL, f"{service.unit} (pid {pid}) {problem}", f"systemctl cat {service.unit}; make install")


def deviations(service: Service, uid: int, status: Status) -> Iterator[str]:
    """Each way in which *status* is not what *service*, whose account has *uid*, is to have."""
    uids = status.get("Uid", "").split()
    if uids != [str(uid)] * 4:
        yield f"runs under uid {', '.join(dict.fromkeys(uids)) or 'unknown'} and not {uid}, {service.account}"
    wanted = sum(1 << number for number in service.capabilities)
    for key in EXACT:
        if (have := mask(status, key)) != wanted:
            yield f"has {key} {words(have)} and not {words(wanted)}"
    for key in AT_MOST:
        if (have := mask(status, key)) & ~wanted:
            yield f"has {key} {words(have)} and should have no more than {words(wanted)}"
    if status.get("NoNewPrivs") != "1":
        yield "may gain rights by what it starts (NoNewPrivs is not 1)"
    if service.filtered and status.get("Seccomp") != "2":
        yield "has no seccomp filter"


def _main_pids() -> dict[str, int]:
    """The main process of each service that runs, as systemd knows it."""
    pids = output("systemctl", "show", "-P", "MainPID", *(service.unit for service in SERVICES)).split()
    if len(pids) != len(SERVICES) or not all(pid.isdecimal() for pid in pids):
        return {}
    return {service.name: int(pid) for service, pid in zip(SERVICES, pids, strict=True)}


# --- everything else that runs ----------------------------------------------------------------------------------------


def _uids(context: Context) -> range:
    """The uids of VMs and jobs. A policy that cannot be read has not been taken by the broker either."""
    try:
        base = policy.load(context.layout.policy, session=False).host.uid_base
    except (OSError, VmshellError):
        base = policy.parse("", "nothing").host.uid_base
    return range(base, base + NUMBER_MAX + 1 + JOBS_MAX)


def _others(launcher: int, uids: range) -> Iterator[Finding]:
    """What has more rights than it should, twice: also what the launcher starts is root's for its first milliseconds."""
    first = _look(launcher, uids)
    if first:
        time.sleep(SECOND_LOOK)
        still = _look(launcher, uids)
        for (pid, _), problem in sorted(one for one in still.items() if one[0] in first):
            yield Finding(FAIL, f"pid {pid} {problem}", f"systemctl status {pid} says what it belongs to; make install")


def _look(launcher: int, uids: range) -> Look:
    found: Look = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdecimal()):
        problem = "" if pid in (launcher, os.getpid()) else suspicion(read_status(pid), _command(pid), uids)
        if problem:
            found[pid, _started(pid)] = problem
    return found


def suspicion(status: Status, command: list[str], uids: range) -> str:
    """What speaks against a process with *status* and *command*, or an empty string. *uids*: those of VMs and jobs."""
    own = [int(uid) for uid in status.get("Uid", "").split() if uid.isdecimal()]
    if 0 in own and (kind := _kind(command)) and kind not in MAY_BE_ROOTS:
        return f"is our {kind} and runs as root"
    if any(uid in uids for uid in own):
        have = 0
        for key in (*EXACT, *AT_MOST):
            have |= mask(status, key)
        if have:
            return f"runs under uid {own[0]}, which is a VM's or a job's, and has {words(have)}"
    return ""


def _kind(command: list[str]) -> str:
    """Which process of ours *command* starts; nothing for other programs, and for what root runs in a session of its own."""
    for at, word in enumerate(command):
        rest = command[at + 1 :]
        if word.endswith(LAUNCHER_STARTER):
            return "" if len(rest) > 1 else "launcher"  # in a session its connection follows
        if word.endswith(STARTER):
            in_session = any(word.startswith("/") and word.endswith(":1") for word in rest)
            return "" if in_session or not rest else rest[0]
    return ""


# --- the kernel's words -----------------------------------------------------------------------------------------------


def parse_status(text: str) -> Status:
    """The lines of a /proc/PID/status, by their names."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def read_status(pid: int) -> Status:
    """Nothing for a process that has ended."""
    return parse_status(_read(f"/proc/{pid}/status"))


def mask(status: Status, key: str) -> int:
    """A set of capabilities as a number; what the kernel does not say counts as all of them."""
    try:
        return int(status[key], 16)
    except (KeyError, ValueError):
        return (1 << 64) - 1


def words(capabilities: int) -> str:
    """The capabilities in a mask by name, those that nothing of ours ever has by number."""
    numbers = [number for number in range(64) if capabilities >> number & 1]
    if len(numbers) > len(CAPABILITIES):
        return f"{len(numbers)} capabilities"
    return ", ".join(CAPABILITIES.get(number, f"capability {number}") for number in numbers) or "no capability"


def _command(pid: int) -> list[str]:
    """The words that started *pid*; none for one in a container, where another vmshell may be at home."""
    try:
        if os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid"):
            return []
    except OSError:
        return []
    return _read(f"/proc/{pid}/cmdline").removesuffix("\0").split("\0")


def _started(pid: int) -> str:
    """When *pid* was started: the same number with another time is another process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(") ")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
