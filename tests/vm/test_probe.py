"""The acceleration probe as a process: with the real QEMU, with stand-ins for what breaks, killed at any moment.

A stand-in for bwrap receives the whole line. It becomes the real bwrap, or plays a guest on the standard output that it inherits.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmshell.installed import PACKAGE_DIR
from vmshell.launch import argv
from vmshell.probe.main import answer
from vmshell.probe.trial import Tools

REAL_QEMU, REAL_BWRAP = "/usr/bin/qemu-system-x86_64", "/usr/bin/bwrap"
UID = 61234
PROMISED = 4.0  # seconds
TREE = os.path.dirname(PACKAGE_DIR)
PYTHON = sys.executable

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a VM's own uid needs root")
pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not os.path.exists(REAL_QEMU), reason="QEMU is not installed"),
    pytest.mark.skipif(not os.path.exists(REAL_BWRAP), reason="bubblewrap is not installed"),
]


def children() -> set[int]:
    """Our children, those among them that lost their parent to a signal."""
    mine = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue
            if int(words[1]) == os.getpid():
                mine.add(int(name))
    return mine


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No process is left over, whatever the test did; orphans come to us while it runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    subreaper = 36  # PR_SET_CHILD_SUBREAPER
    assert libc.prctl(subreaper, 1, 0, 0, 0) == 0
    before = children()
    try:
        yield
        # A probe that was killed outright leaves its guests to the kernel, which may take a moment.
        deadline = time.monotonic() + 60
        while (left := children() - before) and time.monotonic() < deadline:
            for pid in left:
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)
        assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes()[:200] for pid in left]
    finally:
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
        libc.prctl(subreaper, 0, 0, 0, 0)


class Stand:
    """A folder with stand-ins, and the tools that name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tools = Tools(qemu=REAL_QEMU, bwrap=REAL_BWRAP, kvm="/dev/null")

    def _script(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
        return str(path)

    def qemu(self, text: str) -> None:
        self.tools.qemu = self._script("qemu", f"#!/bin/sh\n{text}\n")

    def bwrap(self, *, kvm: str = "", tcg: str = "") -> None:
        """*kvm* and *tcg* are Python for what is done in place of each guest, with `console` to speak on; empty: the real one."""
        body = "\n".join(
            f"if {accel!r} in accel:\n    " + (code or "os.execv(bwrap, sys.argv)").replace("\n", "\n    ")
            for accel, code in (("kvm", kvm), ("tcg", tcg))
        )
        self.tools.bwrap = self._script(
            "bwrap",
            f"#!{PYTHON} -IS\n"
            "import os, sys, time\n"
            f"bwrap = {REAL_BWRAP!r}\n"
            "accel = sys.argv[sys.argv.index('-accel') + 1]\n"
            "def console(text):\n"
            "    os.write(1, text)\n"
            f"{body}\n",
        )

    def __call__(self, wanted: str = "auto", uid: int | None = None) -> dict[str, str]:
        started = time.monotonic()
        found = {key: str(value) for key, value in answer(wanted, uid, self.tools).items()}
        assert time.monotonic() - started < PROMISED
        assert set(found) - {"machines", "versions"} == {"accel", "problem", "qemu", "reason"}
        assert "\n" not in found["problem"] + found["reason"]
        return found


@pytest.fixture
def stand(short_tmp: Path) -> Stand:
    return Stand(short_tmp)


def run(*args: str, prefix: tuple[str, ...] = ()) -> dict[str, str]:
    """The probe as the broker starts it."""
    words = [*prefix, PYTHON, "-IS", f"{PACKAGE_DIR}/__main__.py", "probe", *args]
    done = subprocess.run(words, capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    found: dict[str, str] = json.loads(done.stdout)
    assert done.stdout.count(b"\n") == 1
    return found


# --- the real thing -------------------------------------------------------------------------------------------------------


def test_this_host() -> None:
    """As the broker runs it in session mode: QEMU's version, an accelerator, and a reason whenever that is not KVM."""
    started = time.monotonic()
    found = run()
    assert time.monotonic() - started < PROMISED + 1
    assert found["problem"] == ""
    assert tuple(map(int, found["qemu"].split(".")[:2])) >= (7, 2)
    assert found["accel"] in ("kvm", "tcg")
    assert found["reason"]


@needs_root
def test_this_host_with_a_vms_uid() -> None:
    found = run("auto", str(UID))
    assert found["problem"] == ""
    if os.stat("/dev/kvm").st_mode & 0o066 == 0 if os.path.exists("/dev/kvm") else True:
        assert found["accel"] == "tcg"


def test_an_open_device_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where KVM makes a VM and then cannot run Linux's first steps, it is refused, with any CPU model QEMU could be given."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no /dev/kvm that we may open")
    refused = []
    for model in (argv.CPU["kvm"], "host,arch-capabilities=off,vmx=off,svm=off", "qemu64,svm=off"):
        monkeypatch.setitem(argv.CPU, "kvm", model)
        found = answer("auto", None, Tools(qemu=REAL_QEMU, bwrap=REAL_BWRAP))
        assert found["problem"] == ""
        refused.append(found["accel"] == "tcg")
    # Two of a kind: a host's KVM runs guests or it does not; only `host` may fail on a register that the others leave alone.
    assert refused[1] == refused[2]
    assert refused[0] or not refused[1]


def test_the_policy_may_ask_for_tcg() -> None:
    assert run("tcg")["accel"] == "tcg"


def test_no_user_namespaces() -> None:
    """B39: for real, in a user namespace in which the making of further ones is switched off."""
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    prefix = ("/usr/bin/unshare", "--user", "--map-root-user", "/bin/sh", "-c", shell, "sh")
    found = run(prefix=prefix)
    assert found["problem"] == "this host lets ordinary processes make no user namespaces, which QEMU's jail is made of"


# --- stand-ins for the programs -------------------------------------------------------------------------------------------


def test_no_qemu(stand: Stand) -> None:
    stand.tools.qemu = "/nonexistent/qemu"
    assert stand()["problem"] == "QEMU is not installed (Debian's package qemu-system-x86)"


def test_no_bwrap(stand: Stand) -> None:
    stand.tools.bwrap = "/nonexistent/bwrap"
    assert stand()["problem"] == "bubblewrap is not installed (Debian's package bubblewrap)"


def test_an_old_qemu(stand: Stand) -> None:
    stand.qemu("echo 'QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)'")
    found = stand()
    assert (found["qemu"], found["problem"]) == ("5.2.0", "QEMU 5.2.0 is too old: 7.2 or later is needed")


@pytest.mark.parametrize("text", ["exit 1", "echo nonsense", "exec head -c 1000000 /dev/zero", "exec cat /dev/zero"])
def test_a_qemu_that_does_not_say_its_version(stand: Stand, text: str) -> None:
    stand.qemu(text)
    assert stand()["problem"].startswith("QEMU does not say its version")


def test_a_qemu_that_hangs(stand: Stand) -> None:
    stand.qemu("sleep 100 & exec sleep 100")
    assert stand()["problem"] == "QEMU does not say its version"


def test_a_qemu_that_is_no_program(stand: Stand) -> None:
    (stand.folder / "broken").write_bytes(b"\x7fELF broken")
    (stand.folder / "broken").chmod(0o755)
    stand.tools.qemu = str(stand.folder / "broken")
    assert stand()["problem"].startswith("QEMU cannot be started (")


def test_nobodys_guests_are_roots(stand: Stand) -> None:
    assert stand(uid=0)["problem"].startswith("no guest could be tried on this host (uid")


def test_no_descriptors_left(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(name: str, flags: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", scarce)
    assert stand()["problem"] == "no guest could be tried on this host (Too many open files)"


def test_a_qemu_that_ends_at_once(stand: Stand) -> None:
    stand.bwrap(tcg="print('qemu-system-x86_64: no BIOS here', file=sys.stderr); sys.exit(1)", kvm="sys.exit(1)")
    assert stand()["problem"] == "QEMU does not run a guest here (no BIOS here)"


# --- stand-ins for KVM ----------------------------------------------------------------------------------------------------

KVM_HANGS = "console(b'123'); time.sleep(100)"


@pytest.mark.parametrize(
    ("kvm", "reason"),
    [
        ("time.sleep(100)", "KVM does not run a guest here (not a byte came in time)"),
        (KVM_HANGS, "KVM does not run a guest here (it came as far as long mode and then said no more)"),
        (
            "console(b'1234'); time.sleep(.3); console(b'1234'); time.sleep(100)",
            "KVM does not run a guest here (it came as far as its first exception and then started anew)",
        ),
        (
            "console(b'1'); print('KVM internal error. Suberror: 1', file=sys.stderr, flush=True); time.sleep(100)",
            "KVM does not run a guest here (it came as far as real mode and then stopped with an internal error of KVM)",
        ),
        ("sys.exit('qemu-system-x86_64: failed to initialize kvm: Permission denied')",
         "QEMU cannot use KVM here (failed to initialize kvm: Permission denied)"),
        ("os.abort()", "KVM does not run a guest here (it ended, without a byte)"),
        ("os.write(2, b'x' * 100000); console(b'2' * 100000); time.sleep(100)", None),
    ],
)  # fmt: skip
def test_kvm_is_refused_and_tcg_taken(stand: Stand, kvm: str, reason: str | None) -> None:
    """A KVM that opens and does not run: one sentence, TCG instead, inside the time promised."""
    stand.bwrap(kvm=kvm)
    found = stand()
    assert (found["accel"], found["problem"]) == ("tcg", "")
    assert found["reason"] == reason if reason else len(found["reason"]) < 200


def test_kvm_that_only_emulates(stand: Stand) -> None:
    stand.bwrap(
        kvm="console(b'1'); time.sleep(1.8); console(b'2345V'); time.sleep(100)", tcg="console(b'12345V'); time.sleep(100)"
    )
    found = stand()
    assert found["accel"] == "tcg"
    assert "KVM only emulates here" in found["reason"]


def test_kvm_that_runs(stand: Stand) -> None:
    stand.bwrap(kvm="console(b'12345V'); time.sleep(100)")
    found = stand()
    assert (found["accel"], found["problem"]) == ("kvm", "")
    assert found["reason"].startswith("a guest ran under KVM (")


def test_a_policy_that_asks_for_kvm_and_does_not_get_it(stand: Stand) -> None:
    """B36: no silent fallback."""
    stand.bwrap(kvm=KVM_HANGS)
    found = stand("kvm")
    assert found["problem"].startswith("the policy asks for KVM: KVM does not run a guest here")


def test_no_kvm_device(stand: Stand) -> None:
    stand.tools.kvm = f"{stand.folder}/kvm"
    assert stand()["reason"] == f"there is no {stand.folder}/kvm"


# --- killed ---------------------------------------------------------------------------------------------------------------


def start(stand: Stand) -> subprocess.Popen[bytes]:
    code = (
        f"import sys; sys.path.insert(0, {TREE!r})\n"
        "from vmshell.probe.main import main\n"
        "from vmshell.probe.trial import Tools\n"
        f"main([], Tools(qemu={stand.tools.qemu!r}, bwrap={stand.tools.bwrap!r}, kvm='/dev/null'))\n"
    )
    return subprocess.Popen([PYTHON, "-IS", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# A guest that has nothing to do and would stand there for ever, in place of KVM's.
IDLE = """
sys.argv[sys.argv.index('-accel') + 1] = 'tcg'
sys.argv[sys.argv.index('-cpu') + 1] = 'qemu64'
os.execv(bwrap, [*sys.argv, '-S'])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stopped_at_any_moment_it_leaves_nothing(stand: Stand, number: signal.Signals) -> None:
    """Both guests are real QEMUs; the signal comes while Python starts, while they start, while they run, and at the end."""
    stand.bwrap(kvm=IDLE)
    chance = random.Random(2007)
    for _ in range(12):
        process = start(stand)
        time.sleep(chance.uniform(0.02, 0.6))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        # Before main() has begun, Python's own answer to SIGINT is a KeyboardInterrupt.
        assert b"Traceback" not in errors or number == signal.SIGINT, errors


def descendants(pid: int) -> list[str]:
    """The names of all processes below *pid*."""
    parents, names = {}, {}
    for entry in os.listdir("/proc"):
        try:
            head, _, rest = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")") if entry.isdigit() else (b"", b"", b"")
        except OSError:
            continue
        if rest:
            parents[int(entry)] = int(rest.split()[1])
            names[int(entry)] = head.partition(b"(")[2].decode()
    found, level = [], {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found += [names[child] for child in level]
    return found


@pytest.mark.slow
def test_killed_outright_it_takes_its_guests_along(stand: Stand) -> None:
    """SIGKILL leaves no time for anything: bwrap and QEMU end because their parent did."""
    stand.bwrap(kvm=IDLE, tcg=IDLE)
    for _ in range(4):
        process = start(stand)
        deadline = time.monotonic() + 30
        while descendants(process.pid).count("qemu-system-x86") < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=60)
