"""Whose uids the launcher gives, and whose processes it ends: nobody else's. Rows A29, A30, C16, E31.

Each launcher has a range of its own, far from that of this machine's VMs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.process.launchers import SOMEBODY, Launcher, Lent, processes_of, small_plan, status, uploads
from tests.process.relays import until
from vmshell.installed import PACKAGE_DIR
from vmshell.launcher.ending import signal_all
from vmshell.launcher.uids import occupant, processes
from vmshell.numbering import JOBS_MAX, UID_BASES

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be a launcher")]

VM = 5


@pytest.fixture
def launcher(short_tmp: Path) -> Iterator[Launcher]:
    with Launcher(short_tmp) as running:
        yield running


@pytest.fixture
def stopped(short_tmp: Path) -> Launcher:
    """A launcher that has not been started yet."""
    return Launcher(short_tmp)


@contextlib.contextmanager
def somebody(uid: int, code: str = "import time; time.sleep(3600)", most: int = 0) -> Iterator[int]:
    """A process of *uid*'s that runs *code* in Python, and at *most* so many of that uid; all of them are gone afterwards."""

    def become() -> None:
        if most:
            resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    process = subprocess.Popen([sys.executable, "-IS", "-c", code], preexec_fn=become, start_new_session=True)
    try:
        yield process.pid
    finally:

        def killed() -> bool:
            left = processes_of(uid)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left

        until(killed, "that uid's processes to end")
        process.wait()


# --- the range --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("passwd", "eve:x:{0}:7::/:/bin/sh", "eve in /etc/passwd has id {0}"),
        ("passwd", "eve:x:7:{0}::/:/bin/sh", "eve in /etc/passwd has id {0}"),
        ("group", "eve:x:{0}:root", "eve in /etc/group has id {0}"),
        ("subuid", "eve:{0}:1", "eve in /etc/subuid has the ids from {0} to {0}"),
        ("subgid", "0:1:4294967295", "0 in /etc/subgid has the ids from 1 to 4294967295"),
    ],
)
def test_who_lives_in_a_range_is_found(short_tmp: Path, file: str, line: str, said: str) -> None:
    (short_tmp / "etc").mkdir()
    for uid, inside in ((999, False), (1000, True), (1500, True), (1999, True), (2000, False)):
        text = f"# nobody\nroot:x:0:0::/:/bin/sh\nplus:1:65536x\n+::::::\n\n{line.format(uid)}\nlast:x\n"
        (short_tmp / "etc" / file).write_text(text, encoding="utf-8")
        found = occupant(range(1000, 2000), str(short_tmp))
        assert found == (said.format(uid) if inside or "4294967295" in line else ""), found


def test_a_range_around_somebody_elses(short_tmp: Path) -> None:
    (short_tmp / "etc").mkdir()
    for first, count, inside in ((0, 1000, False), (0, 1001, True), (1500, 0, False), (1999, 9, True), (2000, 65536, False)):
        (short_tmp / "etc/subuid").write_text(f"eve:{first}:{count}\n", encoding="utf-8")
        assert bool(occupant(range(1000, 2000), str(short_tmp))) is inside


def test_a_range_with_an_account_is_refused_in_one_sentence(stopped: Launcher) -> None:
    for uid, refused in ((stopped.base, True), (stopped.uids.stop - 1, True), (stopped.uids.stop, False)):
        before = stopped.accounts.read_text()
        stopped.accounts.write_text(before + f"eve:x:{uid}:100::/:/bin/sh\n")
        if refused:
            line = stopped.not_started()
            assert line.startswith("launcher: not started: the uids") and f"eve in /etc/passwd has id {uid}" in line
            assert line.endswith("see uid_base")
        else:
            with stopped:
                stopped.signal(1)
        stopped.accounts.write_text(before)


def test_a_process_in_the_range_that_is_none_of_ours_is_refused(stopped: Launcher) -> None:
    """By the control groups of a service manager; without one nothing tells it from what an earlier launcher left."""
    for uid in (stopped.base + VM, stopped.jobs.start):
        with somebody(uid) as pid:
            line = stopped.not_started(managed=True)
            assert f"process {pid} has uid {uid}" in line and "see uid_base" in line


@pytest.mark.parametrize(
    "text",
    [
        *("[host]\nuid_base = 0", "[host]\nuid_base = 1000", "[host]\nuid_base = 65536", "[host]\nuid_base = -1"),
        *("[host]\nuid_base = true", "[host]\nuid_base = 100000.0", '[host]\nuid_base = "100000"', "[host]\nuid_base = []"),
        *(f"[host]\nuid_base = {UID_BASES.stop}", "[host]\nuid_base = 4294967295", f"[host]\nuid_base = {1 << 70}"),
        *("[host", "uid_base = = 3", "\0", "[host]\nuid_base = 1" + "0" * 5000, "a = " + "[" * 5000),
    ],
)
def test_a_broken_policy_is_refused_in_one_sentence(stopped: Launcher, text: str) -> None:
    Path(stopped.layout.policy).write_text(text, encoding="utf-8")
    line = stopped.not_started()
    assert line.startswith("launcher: not started: ") and stopped.layout.policy in line and len(line) < 400


def test_a_policy_that_others_can_write_is_refused(stopped: Launcher) -> None:
    os.chmod(stopped.layout.policy, 0o666)
    assert "must not be writable by others" in stopped.not_started()
    os.chmod(stopped.layout.policy, 0o644)
    os.chown(stopped.layout.policy, SOMEBODY, SOMEBODY)
    assert f"belongs to uid {SOMEBODY}" in stopped.not_started()


def test_without_the_service_managers_socket_it_does_not_start(short_tmp: Path) -> None:
    """It makes none of its own, and says who has one."""
    command = [sys.executable, "-IS", f"{PACKAGE_DIR}/launcher/__main__.py", f"{short_tmp}/policy.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "launcher: not started: it has no socket to listen at: systemctl start vmshell-launcher.socket\n"
    assert os.listdir(short_tmp) == []


def test_the_highest_uids_have_jails(short_tmp: Path) -> None:
    """What bubblewrap writes into the map of a user namespace is an int of C's: a range beyond it would have no VM."""
    launcher = Launcher(short_tmp)
    launcher.use(UID_BASES.stop - 1)
    if occupied := [*processes(launcher.uids)] or occupant(launcher.uids):
        pytest.skip(f"somebody lives there: {occupied}")
    number = launcher.jobs.start - launcher.base - 1  # the last VM's
    with launcher, Lent(short_tmp) as lent:
        os.close(launcher.started(*lent.request(number, small_plan(lent)))[1])
        os.write(lent.gate, b"g")
        until(lambda: qemu_of(launcher, number), "QEMU to run")
        launcher.end(number)


def test_models_follow_the_policy_and_a_broken_one_changes_nothing(launcher: Launcher) -> None:
    """N7: the CPU is root's to name."""

    def takes(model: str) -> bool:
        with Lent(launcher.folder) as lent:
            body, fds = lent.request(VM, {**small_plan(lent), "cpu_model": model})
            answer, pidfd = launcher.ask(body, fds)
            if pidfd >= 0:
                os.close(pidfd)
                launcher.end(VM)
                return True
            assert "cpu_model must be one of the policy's" in answer["error"]["text"]
            return False

    assert takes("qemu64,svm=off") and not takes("Nehalem") and not takes("qemu64")
    launcher.set_policy('[cpu_models]\nold = "Nehalem"\nodd = 3\n')
    assert takes("Nehalem") and takes("qemu64,svm=off") and not takes("3")
    Path(launcher.layout.policy).write_text("[cpu_models\n", encoding="utf-8")
    assert takes("Nehalem") and not takes("Haswell")
    launcher.set_policy('[cpu_models]\nold = "Haswell"\n')
    assert takes("Haswell") and not takes("Nehalem")
    os.unlink(launcher.layout.policy)
    assert takes("qemu64,svm=off") and not takes("Haswell")


# --- whom a signal meets ----------------------------------------------------------------------------------------------


@pytest.fixture
def uids(short_tmp: Path) -> range:
    return Launcher(short_tmp).uids


def within(seconds: float, call: Callable[[], None]) -> bool:
    """Does *call* come to its end in time? In a process of its own, which ends."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


FORKS = "import os, time\nwhile True:\n try: os.fork()\n except OSError: time.sleep(0.001)\n"
STOPS = "import os, signal\nwhile True:\n try: os.kill(-1, signal.SIGSTOP)\n except OSError: pass\n"
DEAF = "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(3600)\n"


def test_all_of_a_uid_end_however_fast_they_fork_and_nobody_else(uids: range) -> None:
    """C16: one call; between two looks at /proc a process would have had another child."""
    uid = uids[VM]
    with somebody(uid + 1) as neighbour, somebody(SOMEBODY) as other, somebody(uid, FORKS, most=60):
        until(lambda: len(processes_of(uid)) > 40, "many processes")
        signal_all(uid, uids, signal.SIGKILL)
        until(lambda: not processes_of(uid), "all of them to end")
        assert processes_of(uid + 1) == [neighbour] and processes_of(SOMEBODY) == [other]


def test_whoever_is_signalled_cannot_keep_the_sender(uids: range) -> None:
    """C16: the sender becomes the uid of those it signals. Stopped by one of them it would be waited for without end."""
    uid = uids[VM]
    for _ in range(20):
        with somebody(uid, STOPS):
            until(lambda: processes_of(uid), "the process")
            time.sleep(0.03)
            assert within(30, lambda: signal_all(uid, uids, signal.SIGKILL))
            until(lambda: not processes_of(uid), "it to end")


def test_a_signal_to_nobody_is_no_error_and_one_to_others_is_refused(uids: range) -> None:
    signal_all(uids[VM], uids, signal.SIGKILL)
    with somebody(uids.stop) as outside, somebody(SOMEBODY) as other:
        for uid in (0, SOMEBODY, uids.start - 1, uids.start, uids.stop, -1):
            with pytest.raises(ValueError, match="none of ours"):
                signal_all(uid, uids, signal.SIGKILL)
        with pytest.raises(ValueError, match="none of ours"):
            signal_all(0, range(0, 10), signal.SIGKILL)  # our own
        assert processes_of(uids.stop) == [outside] and processes_of(SOMEBODY) == [other]


def test_term_is_asked_and_kill_is_not(launcher: Launcher) -> None:
    uid = launcher.base + VM
    with somebody(uid + 1) as neighbour:
        with somebody(uid, DEAF):
            until(lambda: any(status(pid, "SigIgn", 16)[0] & 1 << 14 for pid in processes_of(uid)), "it to be deaf")
            launcher.signal(VM, "term")
            launcher.signal(VM, "term")
            assert processes_of(uid)
            launcher.end(VM)
        assert processes_of(uid + 1) == [neighbour]


# --- killed and started again -----------------------------------------------------------------------------------------


def qemu_of(launcher: Launcher, number: int) -> list[int]:
    found = []
    for pid in launcher.of(launcher.base + number):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/exe").endswith("/qemu-system-x86_64"):
                found.append(pid)
    return found


def test_what_runs_goes_on_when_the_launcher_is_killed_and_is_found_again(launcher: Launcher) -> None:
    """N8: VMs and jobs; whose uid is in use stays so, and what is left of a number ends before its next run."""
    with Lent(launcher.folder) as lent, uploads(launcher, lent, 3) as jobs:
        body, fds = lent.request(VM, small_plan(lent))
        os.close(launcher.started(body, fds)[1])
        until(lambda: len(launcher.of(launcher.base + VM)) == 2, "the jail")
        running = dict(launcher.running())
        for _ in range(2):
            launcher.kill()
            launcher.start()
            assert {**dict(launcher.running()), **running} == running
        with uploads(launcher, lent, 2) as more:
            assert set(more.values()) == {*launcher.jobs[3:5]}
        os.close(launcher.started(body, fds)[1])
        until(lambda: len(launcher.of(launcher.base + VM)) == 2 and not set(running) & set(launcher.of(launcher.base + VM)), "it")
        assert set(jobs) <= {pid for pid, _ in launcher.running()}
        launcher.end(VM)
    with Lent(launcher.folder) as lent, uploads(launcher, lent, JOBS_MAX) as jobs:
        assert set(jobs.values()) == set(launcher.jobs)  # all have come back


def test_a_job_that_outlives_its_own_end_keeps_its_uid_until_the_last_process(launcher: Launcher) -> None:
    """E31: what a job leaves behind would meet the next of its uid: it is found with it, and ended."""
    uid = launcher.jobs.start
    launcher.kill()
    with somebody(uid, "import os, time\nos.fork()\ntime.sleep(3600)") as first:
        until(lambda: len(processes_of(uid)) == 2, "two processes")
        launcher.start()
        with Lent(launcher.folder) as lent, uploads(launcher, lent, 1) as jobs:
            assert set(jobs.values()) == {uid + 1}
            os.kill(first, signal.SIGKILL)
            with uploads(launcher, lent, 1) as more:
                assert set(more.values()) == {uid + 2}
        os.kill(next(pid for pid in processes_of(uid) if pid != first), signal.SIGKILL)
        until(lambda: not processes_of(uid), "both to end")
        with Lent(launcher.folder) as lent, uploads(launcher, lent, 1) as jobs:
            assert set(jobs.values()) == {uid}


def test_a_qemu_whose_jail_was_killed_ends_before_the_next_run(launcher: Launcher) -> None:
    """C16: the jail's outer process may end first. What it leaves has the disk's lock and the VM's uid."""
    with Lent(launcher.folder) as lent:
        body, fds = lent.request(VM, small_plan(lent))
        outer, pidfd = launcher.started(body, fds)
        os.close(pidfd)
        os.write(lent.gate, b"g")
        (qemu,) = until(lambda: qemu_of(launcher, VM), "QEMU to run")
        os.kill(outer, signal.SIGKILL)
        until(lambda: launcher.children() == {}, "the jail's outer process to end")
        launcher.signal(VM + 1)
        assert qemu_of(launcher, VM) == [qemu]
    with Lent(launcher.folder) as lent:
        os.close(launcher.started(*lent.request(VM, small_plan(lent)))[1])
        until(lambda: qemu not in launcher.of(launcher.base + VM), "the old QEMU to end")
        launcher.end(VM)


def test_a_signal_that_cannot_be_sent_is_said() -> None:
    """Without the right to become that uid nothing was signalled, and the broker must not take it for done."""
    code = "import os, sys; sys.path.insert(0, sys.argv[1]); os.setuid(65534)\n"
    code += "from vmshell.launcher.ending import signal_all\nsignal_all(2_100_000_005, range(2_100_000_000, 2_100_000_010), 9)"
    command = [sys.executable, "-IS", "-c", code, os.path.dirname(PACKAGE_DIR)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "the processes of uid 2100000005 cannot be signalled" in done.stderr
