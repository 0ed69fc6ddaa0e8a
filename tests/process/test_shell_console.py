"""The console on a real terminal and as a pipe, against the relay's ends of its pipes (threats E01 to E09)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.fakes.broker import FakeBroker
from tests.fakes.shell import LONG, descendants, environment, leave, run, spawn, starter
from vmshell.layout import Layout
from vmshell.refusals import RelayDown, WrongState

pytestmark = pytest.mark.slow

EDITOR = "\x1b[?2004h"  # the line editor switches bracketed paste on when it takes over


@pytest.fixture
def broker(layout: Layout) -> Iterator[FakeBroker]:
    with FakeBroker(layout) as fake:
        fake.answers["list"] = {"vms": [{"name": "web1", "state": "running"}], "more": False}
        fake.answers["console"] = fake.console
        fake.answers["boot"] = lambda body: fake.console(body) if body.get("console") else {"name": "web1", "state": "running"}
        yield fake


@pytest.fixture
def attached(broker: FakeBroker, short_tmp: Path) -> Iterator[Any]:
    """`console web1` typed at the prompt, and the relay has said hello."""
    child = spawn(short_tmp, broker.layout)
    child.delaybeforesend = None
    child.expect_exact(EDITOR)
    child.send("console web1\r")
    broker.next_console().hello()
    child.expect_exact("[vmshell: console of web1. ^] is the key: ^] . leaves, ^] ? helps]")
    yield child
    child.close(force=True)


def test_keys_and_output_go_through(broker: FakeBroker, attached: Any) -> None:
    end = broker.next_console()
    end.data(b"web1 login: ")
    attached.expect_exact("web1 login: ")
    attached.send("ro\x03\x1a\x1c\x04ot\r")
    assert end.keys(9) == b"ro\x03\x1a\x1c\x04ot\r"
    attached.send("\x1d.")
    attached.expect_exact("detached from web1, which runs on")
    assert end.gone()
    attached.expect_exact(EDITOR)
    attached.send("exit\r")
    assert leave(attached) == 0


def test_a_name_alone_and_keys_typed_ahead(broker: FakeBroker, short_tmp: Path) -> None:
    child = spawn(short_tmp, broker.layout)
    child.delaybeforesend = None
    child.expect_exact(EDITOR)
    child.send("web1\rroot\r")
    end = broker.next_console()
    end.hello()
    assert end.keys(5) in (b"root\r", b"root\n")
    child.expect_exact("console of web1")
    child.send("\x1d.whoami\r")
    child.expect("mode|user")
    assert broker.verbs() == ["list", "console", "whoami"]
    child.close(force=True)


def test_the_key_line_appears_only_when_one_hesitates(broker: FakeBroker, attached: Any) -> None:
    attached.send("\x1d")
    attached.expect_exact("[web1] . detach  ? help  r take pen  w who  b break  p power  s size  ^] literal")
    attached.send("\x1d")
    assert broker.next_console().keys(1) == b"\x1d"
    attached.send("\x1d?")
    attached.expect_exact("take the pen")
    attached.send("\x1d.")
    attached.expect_exact("detached")
    assert "[web1] . detach" not in attached.before


def test_commands_of_the_console(broker: FakeBroker, attached: Any) -> None:
    end = broker.next_console()
    for key, control in (("r", "pen"), ("w", "who"), ("b", "break")):
        attached.send("\x1d" + key)
        assert end.control() == control
    end.notice(notice="who", viewers=[{"label": "bob\x1b]0;x\a", "pen": True}, {"label": "alice", "pen": False}])
    attached.expect_exact("[vmshell: attached: bob\\x1b]0;x\\x07 (pen), alice]")
    end.notice(notice="pen", pen=False, holder="bob")
    attached.expect_exact("[vmshell: bob has the pen now; ^] r takes it]")
    end.notice(notice="refused", why="bob has the pen")
    attached.expect_exact("[vmshell: bob has the pen; ^] r takes it]")
    end.notice(notice="gap", bytes=1234)
    attached.expect_exact("[vmshell: 1234 bytes are missing here")
    end.notice(notice="state", state="paused")
    attached.expect_exact("[vmshell: web1 is paused]")


def test_the_size_is_typed(broker: FakeBroker, attached: Any) -> None:
    attached.send("\x1ds")
    assert broker.next_console().keys(22) == b"stty rows 24 cols 100\r"


def test_power_menu(broker: FakeBroker, attached: Any) -> None:
    def press(keys: str) -> None:
        for key in keys:
            attached.send(key)
            time.sleep(0.05)

    press("\x1dp")
    attached.expect_exact("1 shut down  2 reboot  3 reset  4 kill")
    press("4")
    attached.expect_exact("y to kill web1 at once")
    press("n")
    attached.expect_exact("nothing done")
    press("\x1dpx")
    attached.expect_exact("nothing done")
    assert "kill" not in broker.verbs()
    broker.answers["shutdown"] = {"name": "web1", "state": "off"}
    press("\x1dp1")
    attached.expect_exact("web1: off")
    press("\x1dp4y")
    attached.expect_exact("web1: done")
    assert broker.verbs() == ["list", "console", "shutdown", "kill"]
    attached.send("x")
    assert broker.next_console().keys(1) == b"x", "the keys of the menu did not reach the guest"


def test_silence_is_explained(broker: FakeBroker, attached: Any) -> None:
    attached.expect_exact("[vmshell: web1 is running and silent; its last output is 3 s old. Press Return]")


def test_silence_of_a_guest_without_a_console(broker: FakeBroker, short_tmp: Path) -> None:
    child = spawn(short_tmp, broker.layout, "console", "web1")
    broker.next_console().hello(quiet_s=None)
    child.expect_exact("console=ttyS0")
    child.close(force=True)


def test_output_is_filtered_unless_raw(broker: FakeBroker, short_tmp: Path) -> None:
    for option, shown in (("", "<>"), ("--raw", "<\x1b]0;title\x07\x1b[6n>")):
        child = spawn(short_tmp, broker.layout, "console", "web1", *([option] if option else []))
        end = broker.next_console(len(broker.consoles) if not option else 1)
        end.hello()
        end.data(b"<\x1b]0;title\x07\x1b[6n>")
        child.expect_exact(shown)
        child.send("\x1d.")
        child.expect_exact("detached")
        assert leave(child) == 0


def test_answers_of_the_terminal_do_not_reach_the_prompt(broker: FakeBroker, short_tmp: Path) -> None:
    """E03, with --raw: what the terminal types by itself after the last bytes is thrown away at detach."""
    child = spawn(short_tmp, broker.layout)
    child.delaybeforesend = None
    child.expect_exact(EDITOR)
    child.send("console web1 --raw\r")
    end = broker.next_console()
    end.hello()
    child.expect_exact("leaves")
    child.send("\x1d")
    time.sleep(0.05)
    child.send(".")
    time.sleep(0.02)
    child.send("kill web1\r")  # a terminal's answer, were the guest to choose it
    child.expect_exact(EDITOR)
    child.send("exit\r")
    child.expect(pexpect.EOF)
    assert "kill" not in broker.verbs()
    child.close()


def test_the_screen_is_put_back(broker: FakeBroker, attached: Any) -> None:
    """E05: alternate screen, hidden cursor, margins and character set left on by the guest."""
    broker.next_console().data(b"\x1b[?1049h\x1b[?25l\x1b[3;9r\x1b(0<here>")
    attached.expect_exact("<here>")
    attached.send("\x1d.")
    attached.expect_exact(EDITOR)
    for sequence in ("\x1b[?1049l", "\x1b[?25h", "\x1b[r", "\x1b(B", "\x1b[0m"):
        assert sequence in attached.before, sequence


@pytest.mark.parametrize("way", ["detach", "end", "SIGTERM", "SIGHUP", "gone"])
def test_the_terminal_modes_are_restored_on_every_way_out(broker: FakeBroker, short_tmp: Path, way: str) -> None:
    outer = pexpect.spawn(
        "/bin/sh",
        [
            "-c",
            'stty -g; "$@"; echo status $?; stty -g',
            "sh",
            starter(short_tmp),
            "--layout",
            broker.layout.to_args(),
            "console",
            "web1",
        ],
        env=environment(),
        timeout=LONG,
        encoding="utf-8",
    )
    outer.expect(r"([0-9a-f]+:[0-9a-f:]{20,})\r\n")
    before = outer.match.group(1)
    end = broker.next_console()
    end.hello()
    end.data(b"\x1b[?1049h\x1b[?25l<here>")
    outer.expect_exact("<here>")
    status = 0
    if way == "detach":
        outer.send("\x1d.")
    elif way == "end":
        end.notice(notice="end", reason="switched off")
        outer.expect_exact("[vmshell: web1 has ended: switched off]")
    elif way == "gone":
        broker.answers["console"] = WrongState(vm="web1", state="off", verb="console", needed="running")
        end.close()
    else:
        (inner,) = descendants(outer.pid)
        os.kill(inner, getattr(signal, way))
        status = 128 + getattr(signal, way)
    outer.expect(r"status (\d+)\r\n([0-9a-f]+:[0-9a-f:]{20,})\r\n")
    assert (outer.match.group(2), int(outer.match.group(1))) == (before, status)
    assert "\x1b[?1049l" in outer.before and "\x1b[?25h" in outer.before
    outer.expect(pexpect.EOF)
    outer.close()


def test_a_terminal_that_vanishes(broker: FakeBroker, attached: Any) -> None:
    attached.ptyproc.fileobj.close()
    assert broker.next_console().gone()
    os.waitpid(attached.pid, 0)
    attached.closed = attached.ptyproc.closed = attached.terminated = attached.ptyproc.terminated = True


def test_a_relay_that_vanishes_and_comes_back(broker: FakeBroker, attached: Any) -> None:
    """Said, tried again, and the replay is fitted to what was on the screen."""
    end = broker.next_console()
    end.data(b"line one\r\nline two\r\n")
    attached.expect_exact("line two")
    broker.answers["console"] = RelayDown()
    end.close()
    attached.expect_exact("the console service went away; attaching again")
    time.sleep(0.5)
    broker.answers["console"] = broker.console
    again = broker.next_console(1)
    again.hello()
    again.data(b"line one\r\nline two\r\nline three\r\n")
    attached.expect_exact("line three")
    assert "line two" not in attached.before
    attached.send("k")
    assert again.keys(1) == b"k"


def test_while_the_relay_is_away_one_can_leave(broker: FakeBroker, attached: Any) -> None:
    broker.answers["console"] = RelayDown()
    broker.next_console().close()
    attached.expect_exact("attaching again")
    attached.send("\x1d.")
    attached.expect_exact("detached from web1")


def test_a_flood_does_not_keep_one_from_leaving(broker: FakeBroker, attached: Any) -> None:
    end = broker.next_console()
    attached.send("\x1d.")
    sent = 0
    try:
        for _ in range(2000):
            end.data(b"x" * 8000)
            sent += 1
    except OSError:
        pass
    assert sent < 2000, "it left in the middle"
    attached.expect_exact("detached from web1")


def test_another_escape_key(broker: FakeBroker, short_tmp: Path) -> None:
    child = spawn(short_tmp, broker.layout, "console", "web1", "--escape", "^A")
    end = broker.next_console()
    end.hello()
    child.expect_exact("^A is the key")
    child.send("\x1d\x01\x01")
    assert end.keys(2) == b"\x1d\x01"
    child.send("\x01d")
    assert leave(child) == 0


def test_a_stopped_vm_can_be_booted_from_there(broker: FakeBroker, short_tmp: Path) -> None:
    broker.answers["console"] = WrongState(vm="web1", state="off", verb="console", needed="running")
    child = spawn(short_tmp, broker.layout, "web1")
    child.expect_exact("web1 is off; console needs it running. Press b to boot it, any other key to go back.")
    child.send("b")
    broker.next_console().hello()
    child.expect_exact("console of web1")
    child.send("\x1d.")
    assert leave(child) == 0
    child = spawn(short_tmp, broker.layout, "web1")
    child.expect_exact("any other key")
    child.send("n")
    assert leave(child) == 4
    done = run(short_tmp, broker.layout, "console", "web1")
    assert done.returncode == 4 and b"web1 is off" in done.stderr


OUT = {"notice": "end", "reason": "you are out", "code": "access-ended"}


def test_whoever_may_look_no_longer_is_told_why(broker: FakeBroker, attached: Any) -> None:
    """G18: the VM has not ended, and that is not said."""
    broker.next_console().notice(**OUT)
    attached.expect_exact("[vmshell: you are out]")
    attached.expect_exact(EDITOR)
    assert "ended" not in attached.before


# --- as a pipe ---------------------------------------------------------------------------------------------------------------


def test_a_pipe_whose_user_may_look_no_longer_ends_with_1(broker: FakeBroker, short_tmp: Path) -> None:
    command = [starter(short_tmp), "--layout", broker.layout.to_args(), "console", "web1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as child:
        end = broker.next_console()
        end.hello()
        end.notice(**OUT)
        _, errors = child.communicate(timeout=LONG)
    assert child.returncode == 1 and b"you are out" in errors


def test_a_pipe_sends_its_input_and_ends_after_the_last_output(broker: FakeBroker, short_tmp: Path) -> None:
    with subprocess.Popen(
        [starter(short_tmp), "--layout", broker.layout.to_args(), "console", "web1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as child:
        end = broker.next_console()
        end.hello()
        assert child.stdin is not None
        child.stdin.write(b"una\x1d.me\n")  # no escape key where there is no terminal
        child.stdin.close()
        child.stdin = None
        assert end.keys(8) == b"una\x1d.me\n"
        end.data(b"una\x1d.me\r\nLi")
        time.sleep(0.7)
        end.data(b"nux\r\n\x1b]0;x\a")
        output, errors = child.communicate(timeout=LONG)
    assert (child.returncode, output) == (0, b"una.me\r\nLinux\r\n")
    assert b"console of web1" in errors


def test_a_pipe_that_may_not_type_says_so(broker: FakeBroker, short_tmp: Path) -> None:
    def console(body: dict[str, object]) -> tuple[dict[str, object], tuple[int, ...]]:
        answer = broker.console(body)
        broker.consoles[-1].hello(pen=False, holder="bob")
        broker.consoles[-1].notice(notice="refused", why="bob has the pen")
        return answer

    broker.answers["console"] = console
    done = run(short_tmp, broker.layout, "console", "web1", input=b"x")
    assert done.returncode == 1 and b"bob has the pen" in done.stderr


def test_a_readonly_pipe_goes_on_without_input(broker: FakeBroker, short_tmp: Path) -> None:
    with subprocess.Popen(
        [starter(short_tmp), "--layout", broker.layout.to_args(), "console", "web1", "--readonly"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as child:
        end = broker.next_console()
        end.hello(pen=False)
        time.sleep(2.5)
        end.data(b"late\n")
        assert child.stdout is not None and child.stdout.readline() == b"late\n"
        child.stdout.close()  # the reader leaves: noticed though nothing is written
        assert child.wait(LONG) == 0
    assert broker.requests[-1]["readonly"] is True


# --- boot --wait ---------------------------------------------------------------------------------------------------------------


def waiting(short_tmp: Path, broker: FakeBroker, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [starter(short_tmp), "--layout", broker.layout.to_args(), "boot", "web1", "--wait", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )


def test_wait_returns_when_the_guest_has_printed_it(broker: FakeBroker, short_tmp: Path) -> None:
    with waiting(short_tmp, broker, r"web1 login: $") as child:
        end = broker.next_console()
        end.hello()
        end.data(b"booting\r\n\x1b[1mweb1 lo")
        time.sleep(0.2)
        assert child.poll() is None
        end.data(b"gin\x1b[0m: ")
        output, errors = child.communicate(timeout=LONG)
    assert (child.returncode, output) == (0, b"web1: running\n")
    assert b"web1 printed" in errors


def test_wait_times_out_with_8_and_shows_the_last_lines(broker: FakeBroker, short_tmp: Path) -> None:
    with waiting(short_tmp, broker, "login:", "--timeout", "1") as child:
        broker.next_console().data(b"Kernel panic \x1b[31mhere\r\n")
        _, errors = child.communicate(timeout=LONG)
    assert child.returncode == 8
    assert b"within 1 s" in errors and b"  Kernel panic here\n" in errors


def test_wait_ends_with_7_when_the_vm_does(broker: FakeBroker, short_tmp: Path) -> None:
    with waiting(short_tmp, broker, "login:") as child:
        broker.next_console().notice(notice="end", reason="switched off")
        _, errors = child.communicate(timeout=LONG)
    assert child.returncode == 7 and b"switched off" in errors


def test_wait_ends_with_1_when_one_may_look_no_longer(broker: FakeBroker, short_tmp: Path) -> None:
    """G18: it is not the VM that has ended."""
    with waiting(short_tmp, broker, "login:") as child:
        broker.next_console().notice(**OUT)
        _, errors = child.communicate(timeout=LONG)
    assert child.returncode == 1 and b"vmshell: you are out\n" in errors and b"stopped" not in errors


def test_a_pattern_that_never_ends_can_be_interrupted_and_times_out(broker: FakeBroker, short_tmp: Path) -> None:
    for way in ("timeout", "SIGINT"):
        with waiting(short_tmp, broker, "(a+)+$", "--timeout", "2" if way == "timeout" else "100") as child:
            broker.next_console(0 if way == "timeout" else 1).data(b"a" * 4000 + b"!")
            time.sleep(1)
            if way == "SIGINT":
                child.send_signal(signal.SIGINT)
            child.communicate(timeout=LONG)
        assert child.returncode == (8 if way == "timeout" else 130)


def test_a_bad_pattern_boots_nothing(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "boot", "web1", "--wait", "(")
    assert done.returncode == 2 and broker.requests == []


def test_wait_and_console_together(broker: FakeBroker, short_tmp: Path) -> None:
    child = spawn(short_tmp, broker.layout, "boot", "web1", "--console", "--wait", "login:")
    end = broker.next_console()
    end.hello()
    end.data(b"early words\r\nlogin:")
    child.expect_exact("early words")
    child.send("root\r")
    assert end.keys(5) in (b"root\r", b"root\n")
    child.send("\x1d.")
    assert leave(child) == 0
