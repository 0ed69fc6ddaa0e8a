"""A VM's life through the real broker, relay and QEMU, with a boot sector as the guest. Threat rows D18, D19, D23, C10, C23."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pexpect
import pytest

from tests.consoles import Viewer
from tests.guests import READY, echo_image, spin_image
from tests.session import PATIENCE, Session
from vmshell.errors import VmshellError
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout
from vmshell.messages import Boot, Console, Info, Kill, List, New, Reboot, Reset, Rm, Shutdown

pytestmark = pytest.mark.vm


@pytest.fixture
def echo(session: Session) -> Session:
    """A session with the image and one VM `web1`, off."""
    echo_image(session.layout)
    session.ask(New(vm="web1", image="echo", memory=32))
    return session


def row(session: Session, name: str = "web1") -> dict[str, object]:
    return next(vm for vm in session.ask(List())["vms"] if vm["name"] == name)


def refused(session: Session, request: object) -> VmshellError:
    with pytest.raises(VmshellError) as caught:
        session.ask(request)  # type: ignore[arg-type]
    return caught.value


def boot_with_console(session: Session, name: str = "web1") -> Viewer:
    with session.client() as client:
        _, fds = client.ask_fds(Boot(vm=name, console=True))
    return Viewer(fds)


def attach(session: Session, name: str = "web1") -> Viewer:
    with session.client() as client:
        _, fds = client.ask_fds(Console(vm=name))
    return Viewer(fds)


def test_a_life(echo: Session) -> None:
    """new, boot with the console attached before the first instruction, type, detach, attach with replay, power off, remove."""
    assert row(echo)["state"] == "off"
    viewer = boot_with_console(echo)
    viewer.wait_output(READY)
    viewer.type("hello")
    viewer.wait_output("hello")
    assert row(echo)["state"] == "running"
    echo.wait_for(lambda: row(echo)["viewers"] == 1, "the viewer to be counted")
    viewer.close()
    echo.wait_for(lambda: row(echo)["viewers"] == 0, "the viewer to be gone")
    second = attach(echo)
    second.wait_output("hello")  # replayed
    assert READY in second.output.decode()
    info = echo.ask(Info(vm="web1"))
    assert info["accel"] == "tcg"
    assert info["rss"] > 1 << 20
    assert [device["name"] for device in info["devices"]] == ["disk0", "net0"]
    second.type("\x04")
    assert second.wait_notice("end")["reason"]
    assert row(echo)["state"] == "off"
    second.close()
    echo.ask(Rm(vm="web1"))
    assert echo.ask(List())["vms"] == []
    echo.wait_for(lambda: not list(Path(echo.layout.vms).glob("*/*")), "its files to be gone")
    assert not list(Path(echo.layout.run_vms).glob("*"))
    echo.wait_for(lambda: not list(Path(echo.layout.log).glob("[0-9]*")), "its log to be gone")


def test_who_hears_at_a_console_that_a_vm_has_ended_finds_it_off(echo: Session) -> None:
    """However late the broker learns the exit status (here: it does not), and whoever ends the VM."""
    viewer = boot_with_console(echo)
    viewer.wait_output(READY)
    (launcher,) = echo.pids("launcher")
    os.kill(launcher, signal.SIGSTOP)
    try:
        viewer.type("\x04")
        viewer.wait_notice("end")
        assert row(echo)["state"] == "off"
    finally:
        os.kill(launcher, signal.SIGCONT)
    viewer.close()
    assert echo.ask(Boot(vm="web1"))["state"] == "running"


def test_every_wrong_state_is_refused_by_name(echo: Session) -> None:
    for request in (Shutdown(vm="web1"), Kill(vm="web1"), Reset(vm="web1"), Reboot(vm="web1"), Console(vm="web1")):
        assert refused(echo, request).code == "wrong-state"
    boot_with_console(echo).close()
    assert refused(echo, Boot(vm="web1")).code == "already-running"
    assert refused(echo, Rm(vm="web1")).code == "wrong-state"
    assert refused(echo, New(vm="web1", image="echo")).code == "vm-exists"
    echo.ask(Kill(vm="web1"))
    assert row(echo)["state"] == "off"


def test_fifty_starts_of_one_vm_are_one_qemu(echo: Session) -> None:
    """D18, C23: one gets it, forty-nine are told so."""
    results: list[str] = []

    def start() -> None:
        try:
            results.append(echo.ask(Boot(vm="web1"))["state"])
        except VmshellError as exc:
            results.append(exc.code)

    threads = [threading.Thread(target=start) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(results)) == ["already-running", "running"]
    assert results.count("running") == 1
    pids = echo.qemu_pids()
    assert len(pids) == len(set(pids)) == 2  # the jail and QEMU in it


def test_reset_and_reboot(echo: Session) -> None:
    viewer = boot_with_console(echo)
    viewer.wait_output(READY)
    viewer.output = b""
    echo.ask(Reset(vm="web1"))
    viewer.wait_output(READY)  # the console stayed
    assert row(echo)["state"] == "running"
    viewer.close()


def test_a_guest_that_ignores_the_power_button(echo: Session) -> None:
    """The boot sector knows no ACPI events: the refusal says how long was waited, and `force` pulls the plug."""
    boot_with_console(echo).close()
    error = refused(echo, Shutdown(vm="web1", timeout=1))
    assert error.code == "timed-out"
    assert "1 s" in error.sentence()
    assert row(echo)["state"] == "running"
    assert echo.ask(Shutdown(vm="web1", timeout=1, force=True))["state"] == "off"


def test_qemu_killed_from_outside_is_a_failure_with_a_reason(echo: Session) -> None:
    boot_with_console(echo).close()
    os.kill(echo.ask(Info(vm="web1"))["pid"], signal.SIGKILL)
    echo.wait_for(lambda: row(echo)["state"] == "failed", "the failure to be seen")
    assert "unexpectedly" in str(row(echo)["note"])
    assert echo.ask(Info(vm="web1"))["last_error"]["code"] == "vm-stopped"
    boot_with_console(echo).wait_output(READY)  # and it boots again
    assert row(echo)["note"] == ""


def test_a_silent_guest_is_named_in_the_list(session: Session) -> None:
    """The watchdog: a CPU that spins without a byte of output is said to."""
    spin_image(session.layout)
    session.ask(New(vm="hung", image="spin", memory=32))
    session.ask(Boot(vm="hung"))
    session.wait_for(lambda: "silent" in str(row(session, "hung")["note"]), "the watchdog", 200)
    assert row(session, "hung")["state"] == "running"


@pytest.mark.parametrize("damage", ["missing", "changed", "not-a-file"])
def test_a_damaged_image_is_refused_before_anything_starts(echo: Session, damage: str) -> None:
    disk = Path(echo.layout.images, "echo/disk.raw")
    disk.rename(disk.with_name("kept"))
    if damage == "changed":
        disk.write_bytes(b"\0" * (1 << 20))
    elif damage == "not-a-file":
        disk.mkdir()
    error = refused(echo, Boot(vm="web1"))
    assert error.code == "image-damaged"
    assert "/" not in error.sentence()
    assert row(echo)["state"] == "failed"
    assert not list(Path(echo.layout.run_vms).glob("*"))
    if damage == "not-a-file":
        disk.rmdir()
    disk.unlink(missing_ok=True)
    disk.with_name("kept").rename(disk)
    boot_with_console(echo).wait_output(READY)


def test_a_missing_disk_is_one_sentence_and_no_leftover(echo: Session) -> None:
    (disk,) = Path(echo.layout.vms).glob("*/web1/disks/root")
    disk.rename(disk.with_name("away"))
    error = refused(echo, Boot(vm="web1"))
    assert error.code == "storage"
    assert str(disk) not in error.sentence()
    assert not list(Path(echo.layout.run_vms).glob("*"))
    disk.with_name("away").rename(disk)
    boot_with_console(echo).wait_output(READY)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_full_disk_loses_nothing(layout: Layout) -> None:
    """C10: a state directory without room: the refusal says so, records stay as they are, and with room again all goes on."""
    os.makedirs(layout.state)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "none", layout.state], check=True)
    try:
        with Session(layout) as session:
            echo_image(layout)
            session.ask(New(vm="web1", image="echo", memory=32))
            before = {path: path.read_bytes() for path in Path(layout.vms).glob("*/*/*.*")}
            filler = Path(layout.state, "filler")
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            error = refused(session, New(vm="web2", image="echo", memory=32))
            assert error.sentence() == "the host could not store that: the disk is full"
            assert [vm["name"] for vm in session.ask(List())["vms"]] == ["web1"]
            assert {path: path.read_bytes() for path in before} == before
            filler.unlink()
            subprocess.run(["mount", "-o", "remount,ro", layout.state], check=True)
            assert "read-only" in refused(session, New(vm="web2", image="echo", memory=32)).sentence().lower()
            assert refused(session, Rm(vm="web1")).code == "storage"
            assert {path: path.read_bytes() for path in before} == before
            subprocess.run(["mount", "-o", "remount,rw", layout.state], check=True)
            session.ask(New(vm="web2", image="echo", memory=32))
            session.ask(Boot(vm="web2"))
            session.ask(Kill(vm="web2"))
    finally:
        subprocess.run(["umount", layout.state], check=True)


@pytest.mark.slow
def test_twenty_rounds_of_kill_nine(echo: Session) -> None:
    """D23: broker, relay and viewers are killed at random moments; the guest's process goes on and the console works again."""
    viewer = boot_with_console(echo)
    viewer.wait_output(READY)
    pid = echo.ask(Info(vm="web1"))["pid"]
    rng = random.Random(7)
    for round_number in range(20):
        victim = rng.choice(["broker", "relay", "both", "viewer"])
        if victim == "viewer":
            viewer.close()
        if victim in ("relay", "both"):
            os.kill(echo.relay_pid(), signal.SIGKILL)
        if victim in ("broker", "both"):
            echo.kill_broker()
            time.sleep(rng.random() * 0.2)
            echo.start_broker()
        viewer = again(echo, viewer, f"round{round_number}-{victim}")
    assert echo.ask(Info(vm="web1"))["pid"] == pid
    viewer.close()
    echo.ask(Kill(vm="web1"))
    assert not os.path.exists(f"/proc/{pid}")
    assert not list(Path(echo.layout.run_vms).glob("*"))


def test_a_shell_killed_at_a_console_harms_nothing(echo: Session) -> None:
    """kill -9 of the login shell itself, at random moments: the guest goes on, the next shell sees its last output."""
    boot_with_console(echo).close()
    pid = echo.ask(Info(vm="web1"))["pid"]
    rng = random.Random(9)
    command = ["-IS", f"{PACKAGE_DIR}/__main__.py", "shell", "--layout", echo.layout.to_args(), "console", "web1"]
    for turn in range(5):
        shell = pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=60)
        shell.expect("is the key")
        shell.send(f"turn{turn}")
        shell.expect_exact(f"turn{turn}")
        time.sleep(rng.random() * 0.2)
        shell.kill(signal.SIGKILL)
        shell.close()
        echo.wait_for(lambda: row(echo)["viewers"] == 0, "the dead shell's console to be gone")
        viewer = attach(echo)
        viewer.wait_output(f"turn{turn}")
        viewer.close()
    assert echo.ask(Info(vm="web1"))["pid"] == pid
    assert echo.pids("shell") == []


def again(session: Session, viewer: Viewer, word: str) -> Viewer:
    """Type *word* on the console, attaching anew when the old one is gone; it must come back within the patience."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            if not viewer.closed:
                viewer.type(word)
                viewer.wait_output(word, 5)
                return viewer
        except (OSError, AssertionError):
            pass
        assert time.monotonic() < until, f"no console after {word}\n{session.errors()[-2000:]}"
        viewer.close()
        time.sleep(0.05)
        try:
            viewer = attach(session)
        except (VmshellError, OSError):
            viewer.closed = True


def test_a_broker_killed_while_booting_finds_the_guest_again(echo: Session) -> None:
    """D23: at any moment of a start; afterwards the VM runs or is off, and can be booted either way."""
    for delay in (0.0, 0.01, 0.03, 0.06, 0.1, 0.2):
        with echo.client() as client:
            client.send(Boot(vm="web1"))
            time.sleep(delay)
            echo.kill_broker()
        echo.start_broker()
        echo.wait_for(lambda: row(echo)["state"] in ("running", "off", "failed"), "a settled state")
        if row(echo)["state"] != "running":
            echo.ask(Boot(vm="web1"))
        viewer = attach(echo)
        viewer.wait_output(READY)
        viewer.close()
        assert len(echo.qemu_pids()) == 2
        echo.ask(Kill(vm="web1"))


def test_a_vm_that_ended_while_there_was_no_broker_is_off_and_its_consoles_hear_it(echo: Session) -> None:
    """D23: the relay, which went on, would wait for that QEMU for ever."""
    viewer = boot_with_console(echo)
    viewer.wait_output(READY)
    pid = echo.ask(Info(vm="web1"))["pid"]
    echo.kill_broker()
    for victim in {pid, *echo.qemu_pids()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    echo.wait_for(lambda: not [alive for alive in echo.qemu_pids() if not zombie(alive)], "QEMU to be gone", 60)
    echo.start_broker()
    echo.wait_for(lambda: row(echo)["state"] in ("off", "failed"), "the end to be seen", 60)
    assert viewer.wait_notice("end")["reason"]
    viewer.close()
    boot_with_console(echo).wait_output(READY)


def zombie(pid: int) -> bool:
    """An ended process that nobody has asked about yet: not every container's first process does."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    return True


def test_a_record_that_names_another_process_kills_nobody(echo: Session) -> None:
    """D13: pids in the run directory are believed only with their start times; whoever has the number now is left alone."""
    bystander = subprocess.Popen(["sleep", "300"], start_new_session=True)
    try:
        viewer = boot_with_console(echo)
        viewer.wait_output(READY)
        qemu = echo.ask(Info(vm="web1"))["pid"]
        echo.kill_broker()
        (path,) = Path(echo.layout.run_vms).glob("*/run.json")
        run = json.loads(path.read_text())
        path.write_text(json.dumps({**run, "pid": bystander.pid, "qemu_pid": 1}))
        os.kill(qemu, signal.SIGKILL)
        echo.start_broker()
        assert row(echo)["state"] == "off"
        assert refused(echo, Kill(vm="web1")).code == "wrong-state"
        assert bystander.poll() is None
        viewer.close()
    finally:
        bystander.kill()
        bystander.wait()


def test_a_broker_killed_while_a_vm_is_made_leaves_no_half_vm(session: Session) -> None:
    echo_image(session.layout)
    for number, delay in enumerate((0.0, 0.005, 0.02, 0.04)):
        with session.client() as client:
            client.send(New(vm=f"vm{number}", image="echo", memory=32))
            time.sleep(delay)
            session.kill_broker()
        session.start_broker()
        for vm in session.ask(List())["vms"]:
            assert vm["state"] == "off"
            session.ask(Rm(vm=vm["name"]))
        session.wait_for(lambda: not list(Path(session.layout.vms).glob("*/.*")), "leftovers to be deleted")


@pytest.mark.slow
def test_a_storm_of_verbs(echo: Session) -> None:
    """D19: random verbs on two VMs from three clients; at the end nothing is left but what the records say."""
    echo.ask(New(vm="web2", image="echo", memory=32))
    stop = time.monotonic() + 25
    strange: list[str] = []

    def storm(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < stop:
            name = rng.choice(["web1", "web2"])
            kind = rng.choice([Boot, Kill, Reset, Console, Shutdown, Info])
            request = kind(vm=name, timeout=1, force=True) if kind is Shutdown else kind(vm=name)
            try:
                echo.ask(request)
            except VmshellError as exc:
                known = ("wrong-state", "vm-busy", "already-running", "vm-stopped", "start-failed", "timed-out", "not-watched")
                if exc.code not in known:
                    strange.append(f"{request!r}: {exc.code}: {exc}")
            except Exception as exc:
                strange.append(f"{request!r}: {exc!r}")

    threads = [threading.Thread(target=storm, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert strange == []
    for name in ("web1", "web2"):
        echo.wait_for(lambda name=name: row(echo, name)["state"] in ("off", "failed", "running"), "a settled state")  # type: ignore[misc]
        if row(echo, name)["state"] == "running":
            echo.ask(Kill(vm=name))
    assert echo.qemu_pids() == []
    assert not list(Path(echo.layout.run_vms).glob("*"))
    assert "unexpected" not in echo.errors(), echo.errors()[-3000:]


def test_records_are_what_they_should_be(echo: Session) -> None:
    (record,) = Path(echo.layout.vms).glob("*/web1/record.json")
    document = json.loads(record.read_text())
    assert document["images"] == ["echo"]
    assert record.stat().st_mode & 0o077 == 0
    assert record.parent.stat().st_mode & 0o077 == 0
