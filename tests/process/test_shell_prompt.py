"""The prompt on a real terminal: typed-ahead keys, Ctrl-C, hang-up, no escape (threats A14, A19 to A26, A28)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.fakes.broker import ROW, FakeBroker
from tests.fakes.shell import LONG, PROMPT, descendants, environment, leave, spawn, starter
from vmshell.layout import Layout
from vmshell.refusals import NoSuchVm

pytestmark = pytest.mark.slow
RUNNING = r"web1 +(\x1b\[32m)?running"


@pytest.fixture
def broker(layout: Layout) -> Iterator[FakeBroker]:
    with FakeBroker(layout) as fake:
        fake.answers["list"] = {"vms": [ROW], "more": False}
        fake.answers["images"] = {
            "images": [{"name": "demo", "description": "a", "boot": "kernel", "disk": 0, "memory_min": 96}],
            "more": False,
        }
        fake.answers["console"] = lambda body: NoSuchVm(vm=str(body["vm"]))
        yield fake


@pytest.fixture
def shell(broker: FakeBroker, short_tmp: Path) -> Iterator[Any]:
    child = spawn(short_tmp, broker.layout)
    yield child
    child.close(force=True)


def at_prompt(child: Any) -> None:
    """The line editor has taken over: it switches bracketed paste on."""
    child.expect_exact("\x1b[?2004h")


def test_greeting_prompt_request_exit(shell: Any) -> None:
    shell.expect_exact("You have 1 VM: web1 is running.")
    shell.expect_exact(PROMPT)
    shell.sendline("list")
    shell.expect(RUNNING)
    at_prompt(shell)
    shell.sendline("exit")
    assert leave(shell) == 0


def test_keys_typed_ahead_are_kept_and_shown_once(broker: FakeBroker, short_tmp: Path) -> None:
    """Typed before the process had even started, and while the line editor was being loaded."""
    child = spawn(short_tmp, broker.layout)
    child.delaybeforesend = None
    child.send("version\rima")
    child.expect_exact(PROMPT)
    child.send("ges\r")
    child.expect("demo")
    at_prompt(child)
    child.sendline("exit")
    assert leave(child) == 0
    assert broker.verbs() == ["list", "version", "images"]


def test_control_c_clears_the_line_and_interrupts_a_request(broker: FakeBroker, shell: Any) -> None:
    at_prompt(shell)
    shell.send("kill web1\x03")
    at_prompt(shell)

    def slow(body: dict[str, object]) -> dict[str, object]:
        time.sleep(3)
        return {"name": "web1", "state": "off"}

    broker.answers["shutdown"] = slow
    shell.sendline("shutdown web1")
    shell.expect_exact("waiting for the VM service")
    shell.send("\x03")
    at_prompt(shell)
    shell.sendline("whoami")
    shell.expect("mode|user")
    assert "kill" not in broker.verbs()
    shell.sendline("exit")
    assert leave(shell) == 0


def test_keys_that_stop_or_end_programs_elsewhere_do_nothing(shell: Any) -> None:
    """A24: Ctrl-Z and Ctrl-\\ at the prompt and while a request runs."""
    at_prompt(shell)
    shell.send("\x1a\x1c\x1a")
    shell.sendline("list")
    shell.expect(RUNNING)
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGQUIT, signal.SIGINT):
        os.kill(shell.pid, number)
    time.sleep(0.5)
    assert Path(f"/proc/{shell.pid}/stat").read_text().rpartition(") ")[2][0] in "SR"
    at_prompt(shell)
    shell.sendline("exit")
    assert leave(shell) == 0


def test_end_of_input_exits_and_nothing_follows(shell: Any) -> None:
    """A14: no interpreter prompt behind the shell."""
    at_prompt(shell)
    shell.send("\x04")
    shell.expect(pexpect.EOF)
    assert ">>>" not in shell.before
    shell.close()
    assert shell.exitstatus == 0


def test_hang_up_ends_it_within_two_seconds(broker: FakeBroker, short_tmp: Path) -> None:
    for moment in (0.0, 0.05, 0.15, 0.6):
        child = spawn(short_tmp, broker.layout)
        time.sleep(moment)
        child.ptyproc.fileobj.close()
        until = time.monotonic() + 5  # two seconds, on a machine that is doing other things
        while Path(f"/proc/{child.pid}/stat").exists() and " Z " not in Path(f"/proc/{child.pid}/stat").read_text():
            assert time.monotonic() < until, "still there"
            time.sleep(0.02)
        os.waitpid(child.pid, 0)
        child.closed = child.ptyproc.closed = child.terminated = child.ptyproc.terminated = True


def test_termination_gives_the_terminal_back(shell: Any) -> None:
    at_prompt(shell)
    until = time.monotonic() + LONG
    while termios.tcgetattr(shell.child_fd)[3] & termios.ICANON:
        assert time.monotonic() < until, "the editor reads single keys"
        time.sleep(0.01)
    os.kill(shell.pid, signal.SIGTERM)
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 128 + signal.SIGTERM


def test_a_terminal_is_as_it_was_afterwards(broker: FakeBroker, short_tmp: Path) -> None:
    """For every way out that leaves the terminal to somebody: exit, Ctrl-D, SIGTERM, SIGHUP."""
    for way in ("exit\r", "\x04", signal.SIGTERM, signal.SIGHUP):
        outer = pexpect.spawn(
            "/bin/sh",
            ["-c", 'stty -g; "$@"; stty -g', "sh", starter(short_tmp), "--layout", broker.layout.to_args()],
            env=environment(),
            timeout=LONG,
            encoding="utf-8",
        )
        outer.expect(r"([0-9a-f]+:[0-9a-f:]+)\r\n")
        before = outer.match.group(1)
        at_prompt(outer)
        if isinstance(way, str):
            outer.send(way)
        else:
            (inner,) = descendants(outer.pid)
            os.kill(inner, way)
        outer.expect(r"([0-9a-f]+:[0-9a-f:]{20,})\r\n")
        assert outer.match.group(1) == before, way
        outer.expect(pexpect.EOF)
        outer.close()


@pytest.mark.parametrize(
    "term", ["", "dumb", "../../x", "vt100", "xterm-256color", "linux", "no-such-terminal", "x" * 33, "xterm\n", "\x1b[2J"]
)
def test_a_prompt_on_any_terminal(broker: FakeBroker, short_tmp: Path, term: str) -> None:
    child = spawn(short_tmp, broker.layout, term=term, size=(24, 40))
    child.expect_exact(PROMPT)
    child.send("list\r")
    child.expect(RUNNING)
    child.expect_exact("vmshell>")
    child.send("exit\r")
    assert leave(child) == 0


def test_a_dumb_terminal_gets_no_escape_sequence(broker: FakeBroker, short_tmp: Path) -> None:
    child = spawn(short_tmp, broker.layout, term="dumb")
    child.expect_exact(PROMPT)
    seen = child.before
    child.send("lsit\r")
    child.expect_exact("did you mean `list`?")
    seen += child.before
    child.send("kill web1\x03")
    child.expect_exact(PROMPT)
    child.send("exit\r")
    child.expect(pexpect.EOF)
    assert "\x1b" not in seen + child.before
    assert "kill" not in broker.verbs()


def test_narrow_tables(broker: FakeBroker, short_tmp: Path) -> None:
    child = spawn(short_tmp, broker.layout, "-c", "list", size=(24, 40))
    child.expect(pexpect.EOF)
    lines = child.before.replace("\x1b[32m", "").replace("\x1b[0m", "").splitlines()
    assert max(map(len, lines)) <= 40 and "web1" in lines[1] and "running" in lines[1]
    child.close()


def test_editor_keys_start_nothing(shell: Any, short_tmp: Path) -> None:
    """A19, A22: C-x C-e, M-!, vi's v, and TAB on a path."""
    at_prompt(shell)
    shell.send("x\x18\x05\x1b!\x1bv\x1b:\x15/etc/pass\t\t")
    time.sleep(1)
    assert descendants(shell.pid) == []
    shell.send("\x15")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)
    assert "passwd" not in shell.before


def test_completion(shell: Any) -> None:
    at_prompt(shell)
    shell.send("boo\tw\t")
    shell.expect("web1")
    shell.send("--cons\t\x15whoam\t\r")
    shell.expect("user|mode")
    shell.sendline("exit")
    assert leave(shell) == 0


def test_nothing_is_written_to_disk(broker: FakeBroker, short_tmp: Path) -> None:
    """A20: no history, no cache; a home with a trap stays as it is."""
    home = short_tmp / "home"
    home.mkdir()
    (home / ".inputrc").write_text('"l": "rm web1 --yes\\n"\n')
    child = pexpect.spawn(
        starter(short_tmp),
        ["--layout", broker.layout.to_args()],
        timeout=LONG,
        encoding="utf-8",
        env=environment(HOME=str(home), INPUTRC=str(home / ".inputrc"), XDG_STATE_HOME=str(home)),
    )
    at_prompt(child)
    child.send("list\r")
    child.expect(RUNNING)
    child.send("exit\r")
    assert leave(child) == 0
    assert [path.name for path in home.rglob("*")] == [".inputrc"] and "rm" not in broker.verbs()


def test_rm_asks_for_the_name(broker: FakeBroker, shell: Any) -> None:
    broker.answers["rm"] = {"name": "web1", "state": "removed"}
    for answer, outcome in (("y", "was not deleted"), ("web2", "was not deleted"), ("web1", "web1: removed")):
        at_prompt(shell)
        shell.sendline("rm web1")
        shell.expect_exact("Type its name to go on: ")
        shell.sendline(answer)
        shell.expect_exact(outcome)
    assert broker.verbs().count("rm") == 1
    at_prompt(shell)
    shell.send("rm web1\rweb1\r")  # typed before the question was asked: not an answer
    shell.expect_exact("Type its name to go on: ")
    shell.sendline("no")
    shell.expect_exact("was not deleted")
    assert broker.verbs().count("rm") == 1


def test_the_caret_points(shell: Any) -> None:
    at_prompt(shell)
    shell.sendline("boot web1 'oops")
    shell.expect_exact("            ^")
    shell.expect_exact("column 11")


def test_signals_at_any_moment_of_the_start(broker: FakeBroker, short_tmp: Path) -> None:
    """A23: 200 random moments; afterwards there is a prompt of ours, or nothing, and never a traceback."""
    chance = random.Random(23)
    outcomes = {"prompt": 0, "ended": 0}
    for round_ in range(200):
        child = spawn(short_tmp, broker.layout)
        child.delaybeforesend = None
        time.sleep(chance.uniform(0, 0.08))
        number = (signal.SIGINT, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)[round_ % 4]
        os.kill(child.pid, number)
        output = ""
        if child.expect_exact([PROMPT, pexpect.EOF]) == 0:
            output = child.before + PROMPT
            child.send("\x04")
            child.expect(pexpect.EOF)
        output += child.before
        child.close()
        assert "Traceback" not in output and 'File "' not in output and "KeyboardInterrupt" not in output, output
        assert child.exitstatus in (0, 143) or child.signalstatus in (number,), (child.exitstatus, child.signalstatus, output)
        outcomes["prompt" if PROMPT in output else "ended"] += 1
    assert outcomes["prompt"] > 50, outcomes


def test_interrupts_of_a_single_request_at_any_moment(broker: FakeBroker, short_tmp: Path) -> None:
    chance = random.Random(24)
    for _ in range(60):
        with subprocess.Popen(
            [starter(short_tmp), "--layout", broker.layout.to_args(), "-c", "list"],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child:
            time.sleep(chance.uniform(0, 0.05))
            child.send_signal(signal.SIGINT)
            _, errors = child.communicate(timeout=LONG)
        assert errors == b"" and child.returncode in (0, 130, -signal.SIGINT), (child.returncode, errors)


def test_without_prompt_toolkit_there_is_a_plain_prompt(broker: FakeBroker, short_tmp: Path) -> None:
    path = Path(starter(short_tmp))
    path.write_text("\n".join("" if line.startswith("sys.path +=") else line for line in path.read_text().splitlines()))
    child = spawn(short_tmp, broker.layout)
    child.expect_exact(PROMPT)
    child.send("list\r")
    child.expect(RUNNING)
    child.send("exit\r")
    assert leave(child) == 0


def test_a_broken_installation_says_one_sentence(short_tmp: Path, layout: Layout) -> None:
    path = Path(starter(short_tmp))
    path.write_text(path.read_text().replace("vmshell.shell.main", "vmshell.shell.gone"))
    done = subprocess.run([str(path)], env=environment(), capture_output=True, timeout=60)
    assert done.stderr == b"vmshell: cannot start; tell the administrator\n" and done.returncode == 1
