"""`probe [auto|kvm|tcg] [UID]`: find out what runs VMs here and print it as one line of JSON.

    {"qemu": "7.2.22", "accel": "tcg", "reason": "KVM does not run a guest here (…)", "problem": "",
     "machines": {"q35": "pc-q35-7.2", …}, "versions": ["pc-q35-7.2", …]}

`reason` says why `accel` is what it is; `problem`, when not empty, is the one sentence why no VM can run here at all.
It takes under 4 seconds whatever happens, and leaves no process behind.
Its guests run as whom it runs itself; as UID only in root's own session.
Runs in: a process of its own, under a job's uid and with the group that may open KVM's device. It reads a few bytes from guests
that are ours. Touches: /dev/kvm by the guest.
"""

from __future__ import annotations

import json
import os
import select
import signal
import stat
import sys
import time

from ..errors import VmshellError
from ..launch import argv, jail
from . import verdict
from .trial import STOPPING, Tools, Trial, spawn, wait, watch

VERSION_TIMEOUT = 1.0
GUEST_TIMEOUT = 2.4
ACCELS = ("auto", "kvm", "tcg")


def main(args: list[str], tools: Tools | None = None) -> int:
    """Print the answer; the exit status is 0 even when the answer is bad news."""
    if len(args) > 2:
        print("usage: probe [auto|kvm|tcg] [UID]", file=sys.stderr)
        return 2
    wanted = next((word for word in args if word in ACCELS), "auto")
    uid = next((int(word) for word in args if word.isascii() and word.isdigit()), None)
    # As an exception, so that every `finally` on the way out kills what it started; and only while waiting, so that nothing is
    # ever started and not yet written down.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    for number in STOPPING:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    os.umask(0o077)
    print(json.dumps(answer(wanted, uid, tools or Tools(qemu=argv.QEMU, bwrap=jail.BWRAP))), flush=True)
    return 0


def answer(wanted: str, uid: int | None, tools: Tools) -> dict[str, object]:
    """What there is to know, as `main` prints it."""
    found: dict[str, object] = {"qemu": "", "accel": "tcg", "reason": "", "problem": ""}
    found["problem"] = _missing(tools)
    if not found["problem"]:
        found["qemu"], found["problem"] = qemu_version(tools)
    if not found["problem"]:
        found["machines"], found["versions"] = machines(tools)
        try:
            found["accel"], found["reason"], found["problem"] = _try_guests(wanted, uid, tools)
        except OSError as exc:
            found["problem"] = f"no guest could be tried on this host ({exc.strerror})"
        except VmshellError as exc:
            found["problem"] = f"no guest could be tried on this host ({exc})"  # by the uid that we were told to use
    return found


def _missing(tools: Tools) -> str:
    needed = ((tools.qemu, "QEMU", "qemu-system-x86"), (tools.bwrap, "bubblewrap", "bubblewrap"))
    for path, name, package in (*needed, (jail.SETPRIV, "setpriv", "util-linux"), (jail.PRLIMIT, "prlimit", "util-linux")):
        if not os.access(path, os.X_OK):
            return f"{name} is not installed (Debian's package {package})"
    return ""


def qemu_version(tools: Tools) -> tuple[str, str]:
    """QEMU's version, and a problem or an empty string."""
    try:
        return verdict.version(_ask_qemu(tools, "--version"))
    except OSError as exc:
        return "", f"QEMU cannot be started ({exc.strerror})"


def machines(tools: Tools) -> tuple[dict[str, str], list[str]]:
    """What `q35` and `pc` mean to this QEMU today, and every version of them that it has."""
    try:
        return verdict.machines(_ask_qemu(tools, "-machine", "help"))
    except OSError:
        return {}, []


def _ask_qemu(tools: Tools, *question: str) -> bytes:
    """What QEMU says of itself and ends; raises OSError."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            pid = spawn([tools.qemu, *question], writer, writer, ())
        finally:
            os.close(writer)
        try:
            return _read(reader, time.monotonic() + VERSION_TIMEOUT)
        finally:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        os.close(reader)


def _read(fd: int, deadline: float) -> bytes:
    """What comes out of *fd* until its end, 16 KiB or *deadline*."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    output = b""
    while len(output) < 16384 and wait(poll, deadline):
        data = os.read(fd, 4096)
        if not data:
            break
        output += data
    return output


def kvm_closed(path: str, uid: int | None) -> tuple[str, int | None]:
    """Why the VM's account *uid* (None: our own) cannot open KVM's device, or an empty string; and the group it then needs."""
    try:
        status = os.stat(path)
    except OSError:
        return f"there is no {path}", None
    if not stat.S_ISCHR(status.st_mode):
        return f"{path} is no device", None
    mode = stat.S_IMODE(status.st_mode)
    if uid is None:
        if os.access(path, os.R_OK | os.W_OK):
            return "", None
        return f"{path} is closed to VMs (mode {mode:04o}, group {status.st_gid}); the usual is 0660 and group kvm", None
    if mode & 0o006 == 0o006:
        return "", None
    # Root's own group is never lent to a VM.
    if mode & 0o060 == 0o060 and status.st_gid != 0:
        return "", status.st_gid
    return f"{path} is closed to VMs (mode {mode:04o}, group {status.st_gid}); the usual is 0660 and group kvm", None


def _try_guests(wanted: str, uid: int | None, tools: Tools) -> tuple[str, str, str]:
    """Run the guest under TCG and under KVM at the same time; return accel, reason, problem."""
    trials: list[Trial] = []
    try:
        tcg = Trial("tcg", tools, uid)
        trials.append(tcg)
        refusal, group = ("the policy says so", None) if wanted == "tcg" else kvm_closed(tools.kvm, uid)
        if not refusal:
            trials.append(Trial("kvm", tools, uid, group))
        watch(trials, time.monotonic() + GUEST_TIMEOUT)
    finally:
        for trial in trials:
            trial.end()
    problem = verdict.jail_problem(tcg)
    if problem:
        return "tcg", "", problem
    if not refusal:
        refusal = verdict.kvm_refusal(trials[-1], tcg)
        if not refusal:
            return "kvm", f"a guest ran under KVM ({trials[-1].seconds:.2f} s)", ""
    if wanted == "kvm":
        return "tcg", refusal, f"the policy asks for KVM: {refusal}"
    return "tcg", refusal, ""
