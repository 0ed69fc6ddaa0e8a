"""The shell with the real broker, relay and QEMU: the whole way from `new` to `rm`, and who starts the broker in session mode."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pexpect
import pytest

from tests.fakes.shell import environment, leave, run, spawn, starter
from tests.guests import READY, echo_image
from tests.session import Session
from vmshell.layout import Layout

pytestmark = [pytest.mark.slow, pytest.mark.vm]

GUEST = 120  # seconds for anything that waits for an emulated guest


def test_the_whole_way_at_the_prompt(session: Session, short_tmp: Path) -> None:
    echo_image(session.layout)
    child = spawn(short_tmp, session.layout)
    child.delaybeforesend = None
    child.expect_exact("You have no VMs yet")
    child.send("new web1 --image echo --memory 64M\r")
    child.expect_exact("web1: off")
    child.send("boot web1 --console\r")
    child.expect_exact("console of web1", timeout=GUEST)
    child.expect_exact(READY, timeout=GUEST)
    child.send("hello")
    child.expect_exact("hello", timeout=GUEST)
    child.send("\x1d.")
    child.expect_exact("detached from web1, which runs on")
    child.send("list\r")
    child.expect("web1 +(\x1b\\[32m)?running")
    child.send("web1\r")
    child.expect_exact(READY)  # the replay
    child.send("\x04")
    child.expect_exact("[vmshell: web1 has ended", timeout=GUEST)
    child.send("info web1\r")
    child.expect("state +(\x1b\\[2m)?off")
    child.send("rm web1\r")
    child.expect_exact("Type its name to go on: ")
    child.sendline("web1")
    child.expect_exact("web1: removed")
    child.send("exit\r")
    assert leave(child) == 0


def test_the_whole_way_by_commands(session: Session, short_tmp: Path) -> None:
    echo_image(session.layout)

    def status(text: str, *, input: bytes = b"") -> int:
        done = run(short_tmp, session.layout, "-c", text, input=input, timeout=GUEST)
        assert b"Traceback" not in done.stderr
        code: int = done.returncode
        return code

    assert status("boot web1") == 3
    assert status("new web1 --image nothing") == 3
    assert status("new web1 --image echo --memory 1M") == 2
    assert status("new web1 --image echo --memory 64M") == 0
    assert status("new web1 --image echo") == 4
    assert status("console web1") == 4
    assert status(f"boot web1 --wait '{READY}' --timeout 100") == 0
    assert status("boot web1") == 4
    done = run(short_tmp, session.layout, "-c", "console web1", input=b"over a pipe", timeout=GUEST)
    assert done.returncode == 0 and READY.encode() in done.stdout and b"over a pipe" in done.stdout
    assert status("rm web1 --yes") == 4
    assert status("kill web1") == 0
    assert status("rm web1 --yes") == 0
    assert status("info web1") == 3


def test_a_relay_that_is_killed_comes_back_under_an_open_console(session: Session, short_tmp: Path) -> None:
    echo_image(session.layout)
    assert run(short_tmp, session.layout, "-c", "new web1 --image echo --memory 64M").returncode == 0
    child = spawn(short_tmp, session.layout, "boot", "web1", "--console")
    child.expect_exact(READY, timeout=GUEST)
    os.kill(session.relay_pid(), signal.SIGKILL)
    child.expect_exact("the console service went away; attaching again")
    child.expect_exact("console of web1", timeout=GUEST)
    child.send("still there")
    child.expect_exact("still there", timeout=GUEST)
    child.send("\x1d.")
    assert leave(child) == 0


def test_the_power_menu_ends_a_real_guest(session: Session, short_tmp: Path) -> None:
    echo_image(session.layout)
    assert run(short_tmp, session.layout, "-c", "new web1 --image echo --memory 64M").returncode == 0
    child = spawn(short_tmp, session.layout, "boot", "web1", "--console")
    child.expect_exact(READY, timeout=GUEST)
    for key, answer in (("\x1d", "] . detach"), ("p", "4 kill"), ("4", "y to kill"), ("y", "web1 has ended")):
        child.send(key)
        child.expect_exact(answer, timeout=GUEST)
    assert leave(child) == 0


def test_two_shells_at_once_start_one_broker(layout: Layout, short_tmp: Path) -> None:
    own = Session(layout)
    try:
        shells = [
            subprocess.Popen(
                [starter(short_tmp), "--layout", layout.to_args(), "-c", "whoami"],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for _ in range(4)
        ]
        for shell in shells:
            output, errors = shell.communicate(timeout=60)
            assert (shell.returncode, errors) == (0, b"") and b"session" in output
        assert len(own.pids("broker")) == 1
        (pid,) = own.pids("broker")
        status = Path(f"/proc/{pid}/status").read_text()
        ignored = int(re.search(r"SigIgn:\s+(\w+)", status).group(1), 16)  # type: ignore[union-attr]
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGTTOU):
            assert not ignored >> (number - 1) & 1, f"{number!r} is inherited as ignored"
        assert os.getsid(pid) == pid
    finally:
        own.stop()


def test_a_broker_that_cannot_start_says_why(layout: Layout, short_tmp: Path) -> None:
    Path(layout.policy).write_text("nonsense =\n")
    done = run(short_tmp, layout, "-c", "list")
    assert done.returncode == 69
    assert b"the VM service does not answer (it ended with status" in done.stderr and b"Traceback" not in done.stderr


def test_the_prompt_does_not_wait_for_the_broker_to_start(layout: Layout, short_tmp: Path) -> None:
    own = Session(layout)
    try:
        child = spawn(short_tmp, layout)
        child.expect_exact("vmshell> ")
        child.send("list\r")
        child.expect_exact("no VMs yet")
        child.send("\x04")
        child.expect(pexpect.EOF)
        child.close()
    finally:
        own.stop()
