"""`ssh NAME`: the command line, the environment, the folder, the host keys, by a program in the place of /usr/bin/ssh."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.fakes.broker import ROW, FakeBroker
from tests.fakes.shell import PROMPT, REPOSITORY, environment, leave
from vmshell.errors import NotConnected, ProgramFailed, VmBusy, WrongState
from vmshell.layout import Layout
from vmshell.shell import ssh

LONG = 60  # seconds
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEz"
OTHER = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAA"
# What vmshell is, with another program instead of ssh.
DRIVER = (
    "import sys; sys.path[:0] = [sys.argv[1]]; sys.path += [sys.argv[2]]\n"
    "from vmshell.shell import main, ssh; ssh.PROGRAM = sys.argv[3]; sys.exit(main.main(sys.argv[4:]))"
)
# Tells how it was started, then does what stands in `behaviour` beside it.
FAKE = """#!/usr/bin/python3 -IS
import json, os, signal, sys, time
here = os.path.dirname(os.path.abspath(sys.argv[0]))
options = [sys.argv[n + 1] for n, word in enumerate(sys.argv) if word == "-o"]
known = next(option.partition("=")[2] for option in options if option.startswith("UserKnownHostsFile="))
folder = os.path.dirname(known)
told = {
    "argv": sys.argv[1:], "environment": dict(os.environ), "descriptors": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "known": open(known).read(), "mode": os.stat(folder).st_mode, "folder": folder, "pid": os.getpid(),
    "deaf": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
}
json.dump(told, open(here + "/told.new", "w"))
os.rename(here + "/told.new", here + "/told")
log = open(sys.argv[sys.argv.index("-E") + 1], "a")
def say(text):
    log.write(text + "\\r\\n"); log.flush()
def accept(*keys):
    for key in keys: open(known, "a").write("web1 " + key + "\\n")
    say("Warning: Permanently added 'web1' (ED25519) to the list of known hosts.")
exec(open(here + "/behaviour").read())
"""


class Guests:
    """The broker's answers about web1, and the program in ssh's place."""

    def __init__(self, broker: FakeBroker, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self.keys: list[str] = []
        self.program = folder / "fake-ssh"
        self.program.write_text(FAKE)
        self.program.chmod(0o755)
        self.behave("")
        card = {"name": "net0", "address": "", "forward": ["udp:10022:22", "tcp:8080:80", "tcp:2222:22"]}
        broker.answers["net"] = {"name": "web1", "state": "running", "cards": [card]}
        broker.answers["info"] = lambda body: {**ROW, "host_keys": self.keys}
        broker.answers["host-key"] = self._keep

    def _keep(self, body: dict[str, Any]) -> dict[str, object]:
        self.keys = body.get("keys", [])
        return {"name": "web1", "keys": self.keys}

    def behave(self, code: str) -> None:
        (self.folder / "behaviour").write_text(code)

    def command(self, *words: str) -> list[str]:
        distribution = os.path.dirname(os.path.dirname(pexpect.__file__))
        own = [sys.executable, "-IS", "-c", DRIVER, str(REPOSITORY), distribution, str(self.program)]
        return [*own, "--layout", self.broker.layout.to_args(), *words]

    def run(self, *words: str) -> Any:
        return subprocess.run(self.command(*words), input=b"", capture_output=True, timeout=LONG, env=self.environment())

    def environment(self) -> dict[str, str]:
        return environment(XDG_RUNTIME_DIR=str(self.folder))

    def told(self) -> dict[str, Any]:
        path = self.folder / "told"
        until = time.monotonic() + LONG
        while not path.exists():
            assert time.monotonic() < until, "ssh was not started"
            time.sleep(0.01)
        found: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return found

    def left(self) -> list[Path]:
        return list(self.folder.glob("vmshell-*"))


@pytest.fixture
def guests(layout: Layout, short_tmp: Path) -> Iterator[Guests]:
    with FakeBroker(layout) as broker:
        yield Guests(broker, short_tmp)


# --- how ssh is started -------------------------------------------------------------------------------------------------


def test_every_word_of_the_command_line(guests: Guests) -> None:
    done = guests.run("-c", "ssh web1 ls -l 'a b' --help -- -x")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    told = guests.told()
    folder = told["folder"]
    fixed = [word for option in ssh.OPTIONS for word in ("-o", option)]
    own = ["HostKeyAlias=web1", f"UserKnownHostsFile={folder}/known_hosts", "StrictHostKeyChecking=accept-new", "RequestTTY=auto"]
    assert told["argv"] == [
        *("-F", "/dev/null", "-E", f"{folder}/said", *fixed, *(word for option in own for word in ("-o", option))),
        *("-p", "2222", "-l", "root", "--", "127.0.0.1", "ls", "-l", "a b", "--help", "--", "-x"),
    ]
    assert told["environment"] == {"TERM": "xterm", "LANG": "C.UTF-8", **guessed(told["environment"])}
    assert told["descriptors"] == [0, 1, 2] and told["deaf"] is False
    assert stat.S_IMODE(told["mode"]) == 0o700 and folder.startswith(f"{guests.folder}/vmshell-")
    assert guests.left() == []


def guessed(environment: dict[str, str]) -> dict[str, str]:
    """What an interpreter in the C locale sets for itself (PEP 538)."""
    return {"LC_CTYPE": environment["LC_CTYPE"]} if "LC_CTYPE" in environment else {}


def test_nothing_of_the_users_configures_it() -> None:
    """A38, R20: nothing that runs a program, opens a port, asks an agent, or reads a file of somebody's choice."""
    wanted = {
        *("EscapeChar=none", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "Tunnel=no", "ControlPath=none"),
        *("PermitLocalCommand=no", "ProxyCommand=none", "ProxyJump=none", "KnownHostsCommand=none", "PKCS11Provider=none"),
        *("SecurityKeyProvider=internal", "IdentityAgent=none", "UpdateHostKeys=no", "GlobalKnownHostsFile=/dev/null"),
    }
    assert wanted <= set(ssh.OPTIONS)


@pytest.mark.skipif(not os.path.exists(ssh.PROGRAM), reason="openssh-client is not installed")
def test_the_real_ssh_understands_it() -> None:
    argv = ssh.arguments("/nonexistent", "alice/web1", "root", "10.77.3.2", 22, pinned=True, tty=True)
    argv[1:1] = ["-G"]
    del argv[argv.index("-E") : argv.index("-E") + 2]
    done = subprocess.run([*argv, "ls"], env={}, capture_output=True, text=True, timeout=LONG)
    shown = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert done.returncode == 0
    expected = {"user": "root", "hostname": "10.77.3.2", "port": "22", "hostkeyalias": "web1", "escapechar": "none"}
    expected |= {"userknownhostsfile": "/nonexistent/known_hosts", "clearallforwardings": "yes", "requesttty": "force"}
    assert {key: shown[key] for key in expected} == expected
    assert shown["stricthostkeychecking"] in ("true", "yes") and not {"proxycommand", "controlpath", "localcommand"} & set(shown)


def test_who_is_logged_in(guests: Guests) -> None:
    for words, user in (
        (["ssh", "bob@web1"], "bob"),
        (["ssh", "-l", "_x.y-z9", "web1"], "_x.y-z9"),
        (["ssh", "web1", "--login=Bob", "id"], "Bob"),
        (["ssh", "bob@alice/web1"], "bob"),
    ):
        assert guests.run(*words).returncode == 0
        argv = guests.told()["argv"]
        assert argv[argv.index("-l") + 1] == user and "HostKeyAlias=web1" in argv
    guests.run("ssh", "-t", "web1", "top")
    assert "RequestTTY=force" in guests.told()["argv"]


@pytest.mark.parametrize(
    "words",
    [
        ["ssh"],
        ["ssh", "-l", "root"],
        ["ssh", "-l", "-oProxyCommand=id", "web1"],
        ["ssh", "-l", "", "web1"],
        ["ssh", "-l", "a b", "web1"],
        ["ssh", "-l", "$(id)", "web1"],
        ["ssh", "-l", "x" * 65, "web1"],
        ["ssh", "-l", "x\x1b", "web1"],
        ["ssh", "--", "-oProxyCommand=id@web1"],
        ["ssh", "@web1"],
        ["ssh", "bob@"],
        ["ssh", "a@b@web1"],
        ["ssh", ".bob@web1"],
        ["ssh", "bob@web1", "-l", "bob"],
        ["ssh", "-oProxyCommand=id", "web1"],
        ["ssh", "-o", "ProxyCommand=id", "web1"],
        ["ssh", "-F", "/etc/passwd", "web1"],
        ["ssh", "-L", "80:localhost:80", "web1"],
        ["ssh", "-J", "x", "web1"],
        ["ssh", "-W", "x:1", "web1"],
        ["ssh", "-A", "web1"],
        ["ssh", "-E/x", "web1"],
        ["ssh", "10.77.0.2"],
        ["ssh", "--", "-web1"],
        ["ssh", "web1", "--forget-key", "--forget-key"],
    ],
)
def test_bad_words_start_nothing(guests: Guests, words: list[str]) -> None:
    done = guests.run(*words)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.startswith(b"vmshell: ")
    assert guests.broker.requests == [] and not (guests.folder / "told").exists()


# --- where it leads -----------------------------------------------------------------------------------------------------


class Answers:
    """A context with the answer to `net` alone."""

    def __init__(self, *, embedded: bool, state: str = "running", cards: object = None) -> None:
        self.layout = Layout(etc="/e", state="/s", run="/r", log="/l", embedded=embedded)
        self._answer = {"name": "web1", "state": state, "cards": cards}

    def ask(self, request: object) -> dict[str, object]:
        return self._answer


def test_on_an_installed_host_it_leads_to_the_address() -> None:
    cards = [{"name": "net0", "address": ""}, {"name": "net1", "address": "10.77.3.2", "forward": ["tcp:2222:22"]}]
    context: Any = Answers(embedded=False, cards=cards)
    assert ssh.place(context, "web1") == ("10.77.3.2", 22)
    with pytest.raises(NotConnected, match="no card on a network"):
        ssh.place(Answers(embedded=False, cards=[{"address": ""}]), "web1")  # type: ignore[arg-type]


def test_in_session_mode_it_leads_to_a_forwarded_port() -> None:
    cards = [{"name": "net0", "address": "10.0.2.15", "forward": ["tcp:80", "", 7, "udp:1:22", "tcp:2222:22"]}]
    context: Any = Answers(embedded=True, cards=cards)
    assert ssh.place(context, "web1") == ("127.0.0.1", 2222)
    with pytest.raises(NotConnected, match="set web1 net0.forward=tcp:10022:22"):
        ssh.place(Answers(embedded=True, cards=[{"forward": None}]), "web1")  # type: ignore[arg-type]


@pytest.mark.parametrize("state", ["off", "paused", "starting"])
def test_a_vm_that_does_not_run_is_not_waited_for(state: str) -> None:
    with pytest.raises(WrongState, match=state):
        ssh.place(Answers(embedded=True, state=state, cards=[]), "web1")  # type: ignore[arg-type]


# --- host keys ----------------------------------------------------------------------------------------------------------


def test_keys_are_kept_the_first_time_while_ssh_still_runs(guests: Guests) -> None:
    guests.behave(f"accept({KEY!r}, {OTHER!r}); time.sleep(60)")
    with subprocess.Popen(guests.command("ssh", "web1"), stdin=subprocess.PIPE, env=environment()) as shell:
        until = time.monotonic() + LONG
        while "host-key" not in guests.broker.verbs():
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(guests.told()["pid"], signal.SIGKILL)
        assert shell.wait(LONG) == 128 + signal.SIGKILL
    assert guests.keys == [KEY, OTHER]
    assert guests.broker.verbs().count("host-key") == 1


def test_kept_keys_are_all_that_is_believed(guests: Guests) -> None:
    guests.keys = [KEY, OTHER]
    done = guests.run("ssh", "web1")
    told = guests.told()
    assert "StrictHostKeyChecking=yes" in told["argv"] and told["known"] == f"web1 {KEY}\nweb1 {OTHER}\n"
    assert (done.returncode, done.stderr) == (0, b"") and "host-key" not in guests.broker.verbs()


@pytest.mark.parametrize(
    "lines",
    [
        ["@" * 58, "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @", "@" * 58, "IT IS POSSIBLE THAT", "in /tmp/x"],
        ["No ED25519 host key is known for web1 and you have requested strict checking."],
    ],
)
def test_changed_keys_are_one_sentence_with_the_cure(guests: Guests, lines: list[str]) -> None:
    guests.keys = [KEY]
    guests.behave(f"for line in {[*lines, 'Host key verification failed.']!r}: say(line)\nsys.exit(255)")
    done = guests.run("ssh", "web1", "id")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines() == [
        f"vmshell: {ssh.HostKeyChanged(vm='web1').sentence()}",
        "  if you know why: `ssh --forget-key web1`, then once more",
    ]
    assert guests.keys == [KEY]


def test_forgetting(guests: Guests) -> None:
    guests.keys = [KEY]
    for words in (["--forget-key", "web1"], ["web1", "--forget-key"]):
        done = guests.run("ssh", *words)
        assert done.returncode == 0 and b"web1: its host keys are forgotten" in done.stdout
        assert guests.broker.requests[-1]["forget"] is True and not (guests.folder / "told").exists()
    assert guests.keys == []


def test_a_key_that_could_not_be_kept_does_not_cost_the_session(guests: Guests) -> None:
    guests.broker.answers["host-key"] = VmBusy(vm="web1", state="running")
    guests.behave(f"accept({KEY!r}); print('done', flush=True); sys.exit(3)")
    done = guests.run("ssh", "web1")
    assert (done.returncode, done.stdout) == (3, b"done\n") and b"was not kept: web1 is running" in done.stderr


# --- what comes out, and how it ends ------------------------------------------------------------------------------------


def test_status_input_and_output_are_those_of_ssh(guests: Guests) -> None:
    guests.behave("os.write(1, b'out' + os.read(0, 9)); os.write(2, b'err'); sys.exit(42)")
    done = subprocess.run(guests.command("ssh", "web1"), input=b"\0in\xff", capture_output=True, timeout=LONG, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (42, b"out\0in\xff", b"err")
    guests.behave("os.kill(os.getpid(), signal.SIGTERM)")
    assert guests.run("ssh", "web1").returncode == 128 + signal.SIGTERM


def test_messages_of_ssh_are_passed_on_escaped(guests: Guests) -> None:
    guests.behave("say('Denied \\x1b]0;x\\x07, try again.'); log.write('no line end'); log.flush(); sys.exit(255)")
    done = guests.run("ssh", "web1")
    assert done.returncode == 255
    assert done.stderr.decode().splitlines() == ["Denied \\x1b]0;x\\x07, try again.", "no line end"]


def test_without_ssh_it_says_so(guests: Guests) -> None:
    guests.program.unlink()
    done = guests.run("ssh", "web1")
    problem = ProgramFailed(program="ssh", problem="no such file or directory")
    assert done.returncode == 69 and problem.sentence().encode() in done.stderr and guests.left() == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_when_the_login_ends_ssh_ends_and_nothing_is_left(guests: Guests, ending: signal.Signals) -> None:
    guests.behave("time.sleep(60)")
    with subprocess.Popen(guests.command("ssh", "web1"), stdin=subprocess.PIPE, env=guests.environment()) as shell:
        pid = guests.told()["pid"]
        assert len(guests.left()) == 1
        shell.send_signal(ending)
        assert shell.wait(LONG) == 128 + ending
    until = time.monotonic() + LONG
    while os.path.exists(f"/proc/{pid}") and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert guests.left() == []


def test_not_from_a_list_of_requests(guests: Guests) -> None:
    command = guests.command()
    done = subprocess.run(command, input=b"ssh web1\nlist\n", capture_output=True, timeout=LONG, env=environment())
    assert b"ssh reads standard input" in done.stderr and guests.broker.verbs() == ["list"]


def test_at_the_prompt_ctrl_c_is_sshs_and_the_prompt_comes_back(guests: Guests) -> None:
    guests.behave(
        "import termios; assert termios.tcgetattr(0)[3] & termios.ECHO\n"
        "signal.signal(signal.SIGINT, lambda *_: print('^C seen', flush=True))\n"
        "print('password?', flush=True); time.sleep(1); os.read(0, 9)\n"
        "print('\\x1b[6n' + 'bye', flush=True)"
    )
    words = guests.command()
    child = pexpect.spawn(words[0], words[1:], env=environment(), timeout=LONG, encoding="utf-8", dimensions=(24, 100))
    child.expect_exact(PROMPT)
    child.send("ssh web1\r")
    child.expect_exact("password?")
    child.send("\x03")
    child.expect_exact("^C seen")
    child.send("x\r")
    child.expect_exact("bye")
    child.send("\x1b[5;5R")  # a terminal's answer to what the guest sent last (E03)
    child.expect_exact("vmshell>")
    child.send("help exit\r")
    child.expect_exact("usage: exit")
    child.send("exit\r")
    assert leave(child) == 0
