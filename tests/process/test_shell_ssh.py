"""`ssh NAME`: the command line, the environment, the folder, the host keys, by a program in the place of /usr/bin/ssh."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.fakes.broker import ROW, FakeBroker
from tests.fakes.shell import PROMPT, REPOSITORY, environment, leave
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.refusals import NotConnected, ProgramFailed, VmBusy, WrongState
from vmshell.shell.commands import ssh
from vmshell.shell.commands.ssh_messages import Said

LONG = 60  # seconds
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEz"
WHOLE = (
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBFkxgRdALWRO0jP737a5PzTZjWRPMnD1xk8/ITq1v5bC4BeO"
    "q99abDAM5EecTisYXJvVzvBDCjD7dsY+FLvVZyo="
)
OTHER = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAA"
# What vmshell is, with another program instead of ssh.
DRIVER = (
    "import sys; sys.path[:0] = [sys.argv[1]]; sys.path += [sys.argv[2]]\n"
    "from vmshell.shell import main; from vmshell.shell.commands import ssh; "
    "ssh.PROGRAM = sys.argv[3]; sys.exit(main.main(sys.argv[4:]))"
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
        broker.answers["connect"] = {"name": "web1", "address": "127.0.0.1", "port": 2222}
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

    def use_real_ssh(self, server: Server) -> None:
        """The client that is installed, and web1's sshd at a port of ours."""
        self.program = Path(ssh.PROGRAM)
        self.broker.answers["connect"] = {"name": "web1", "address": "127.0.0.1", "port": server.port}


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def packet(payload: bytes) -> bytes:
    """As it goes over the wire before keys are agreed upon (RFC 4253, 6)."""
    padding = 16 - (len(payload) + 5) % 8
    return struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)


def disconnect(text: str) -> bytes:
    return packet(b"\x01" + struct.pack(">I", 2) + string(text.encode()) + string(b""))


def offer(host_keys: bytes = b"ssh-ed25519") -> bytes:
    """SSH_MSG_KEXINIT; *host_keys* are the kinds of host keys."""
    lists = [b"curve25519-sha256", host_keys, *[b"aes128-ctr"] * 2, *[b"hmac-sha2-256"] * 2, *[b"none"] * 2, b"", b""]
    return packet(b"\x14" + bytes(16) + b"".join(map(string, lists)) + bytes(5))


def blob(seed: int) -> bytes:
    return string(b"ssh-ed25519") + string(bytes([seed]) * 32)


def show(seed: int) -> bytes:
    """SSH_MSG_KEX_ECDH_REPLY: ssh judges the host key before it finds that nothing behind it is true."""
    curve_point, signature = bytes([9]) + bytes(31), string(b"ssh-ed25519") + string(bytes(64))
    return packet(b"\x1f" + string(blob(seed)) + string(curve_point) + string(signature))


def host_key(seed: int) -> str:
    return f"ssh-ed25519 {base64.b64encode(blob(seed)).decode()}"


class Server:
    """What a guest has in the place of an sshd: it identifies itself, sends what it was given, and listens to the end."""

    def __init__(self, *packets: bytes) -> None:
        self._data = b"SSH-2.0-OpenSSH_9.2\r\n" + b"".join(packets)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(LONG)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        self._listener.settimeout(LONG)
        sock, _ = self._listener.accept()
        with sock:
            sock.settimeout(LONG)
            sock.sendall(self._data)
            try:
                while sock.recv(65536):
                    pass
            except ConnectionResetError:
                pass


REAL = pytest.mark.skipif(not os.path.exists(ssh.PROGRAM), reason="openssh-client is not installed")


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
        *("IdentityFile=none", "IdentitiesOnly=yes"),
    }
    assert wanted <= set(ssh.OPTIONS)


def without_log(address: str, port: int, *first: str) -> list[str]:
    """Our command line, but what ssh says goes to standard error."""
    argv = ssh.arguments("/nonexistent", "alice/web1", "root", address, port, pinned=True, tty=True)
    del argv[argv.index("-E") : argv.index("-E") + 2]
    return [argv[0], *first, *argv[1:], "ls"]


@REAL
def test_the_real_ssh_understands_it() -> None:
    done = subprocess.run(without_log("10.77.3.2", 22, "-G"), env={}, capture_output=True, text=True, timeout=LONG)
    shown = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    assert done.returncode == 0
    expected = {"user": "root", "hostname": "10.77.3.2", "port": "22", "hostkeyalias": "web1", "escapechar": "none"}
    expected |= {"userknownhostsfile": "/nonexistent/known_hosts", "clearallforwardings": "yes", "requesttty": "force"}
    assert {key: shown[key] for key in expected} == expected
    assert shown["stricthostkeychecking"] in ("true", "yes") and not {"proxycommand", "controlpath", "localcommand"} & set(shown)
    assert [line for line in done.stdout.splitlines() if line.startswith(("identityf", "certificatef"))] == ["identityfile none"]
    assert (shown["identitiesonly"], shown["visualhostkey"]) == ("yes", "yes")


@REAL
def test_the_real_ssh_looks_for_no_key_of_the_users() -> None:
    """With -v it names each file that it would try, be it there or not: those in ~/.ssh, were it not for our option."""
    for left_out, looked_for in ((set(), False), ({"IdentityFile=none"}, True)):
        with Server(disconnect("enough")) as server:
            words = without_log("127.0.0.1", server.port, "-v")
            argv = ["LogLevel=DEBUG1" if word in left_out else word for word in words]
            done = subprocess.run(argv, env={}, input=b"", capture_output=True, timeout=LONG)
        assert b"enough" in done.stderr and (b"debug1: identity file" in done.stderr) is looked_for, done.stderr


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


def test_whoever_ignores_its_children_starts_us_all_the_same(guests: Guests) -> None:
    """Inherited, that would take ssh's exit status away, and its pid would be another's while we still mean ssh by it."""
    guests.behave("sys.exit(7)")

    def ignores() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    words, given = guests.command("ssh", "web1"), guests.environment()
    done = subprocess.run(words, input=b"", capture_output=True, timeout=LONG, env=given, preexec_fn=ignores)
    assert (done.returncode, done.stderr) == (7, b"") and guests.left() == []


# --- where it leads -----------------------------------------------------------------------------------------------------


def test_it_leads_where_the_broker_says(guests: Guests) -> None:
    guests.broker.answers["connect"] = {"name": "web1", "address": "10.77.3.2", "port": 22}
    assert guests.run("ssh", "web1").returncode == 0
    argv = guests.told()["argv"]
    assert argv[argv.index("-p") + 1] == "22" and argv[-2:] == ["--", "10.77.3.2"]


@pytest.mark.parametrize(
    "error",
    [
        WrongState(vm="web1", state="paused", verb="connect", needed="running"),
        NotConnected(vm="web1", problem="it has no card on a network with addresses"),
    ],
)
def test_a_guest_that_cannot_be_reached_is_not_waited_for(guests: Guests, error: VmshellError) -> None:
    guests.broker.answers["connect"] = error
    done = guests.run("ssh", "web1")
    assert done.returncode == error.exit_status and error.sentence().encode() in done.stderr
    assert not (guests.folder / "told").exists()


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


@REAL
def test_a_changed_key_as_the_real_ssh_says_it(guests: Guests) -> None:
    guests.keys = [host_key(1)]
    with Server(offer(), show(2)) as server:
        guests.use_real_ssh(server)
        done = guests.run("ssh", "web1")
    first, *page = done.stderr.decode().splitlines()
    assert done.returncode == 1 and first == "Pseudo-terminal will not be allocated because stdin is not a terminal."
    assert page == [
        f"vmshell: {ssh.HostKeyChanged(vm='web1').sentence()}",
        "  if you know why: `ssh --forget-key web1`, then once more",
    ]


@REAL
def test_a_key_of_another_kind_is_a_changed_one(guests: Guests) -> None:
    guests.keys = [WHOLE]
    with Server(offer(), show(2)) as server:
        guests.use_real_ssh(server)
        done = guests.run("ssh", "web1", "id")
    assert done.returncode == 1 and done.stderr.startswith(b"vmshell: web1 shows another host key"), done.stderr


@REAL
def test_the_right_key_is_not_talked_about(guests: Guests) -> None:
    """Nor is its picture drawn."""
    guests.keys = [host_key(1)]
    with Server(offer(), show(1)) as server:
        guests.use_real_ssh(server)
        done = guests.run("ssh", "web1", "id")
    assert done.returncode == 255
    assert done.stderr.decode().splitlines() == [
        f"ssh_dispatch_run_fatal: Connection to 127.0.0.1 port {server.port}: incorrect signature"
    ]


@pytest.mark.parametrize("kept", [[OTHER], [], None])
def test_keys_that_another_session_kept_first_end_this_one(guests: Guests, kept: object) -> None:
    guests.broker.answers["host-key"] = {"name": "web1", "keys": kept}
    guests.behave(f"accept({KEY!r}); time.sleep(60)")
    begun = time.monotonic()
    done = guests.run("ssh", "web1")
    assert time.monotonic() - begun < 50 and not os.path.exists(f"/proc/{guests.told()['pid']}")
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode().splitlines()[0] == f"vmshell: {ssh.HostKeyChanged(vm='web1').sentence()}"
    assert guests.left() == []


@pytest.mark.parametrize("kept", [[KEY], [OTHER, KEY + " comment"]])
def test_another_session_that_kept_the_same_key_is_no_harm(guests: Guests, kept: list[str]) -> None:
    guests.broker.answers["host-key"] = {"name": "web1", "keys": kept}
    guests.behave(f"accept({KEY!r}); sys.exit(7)")
    done = guests.run("ssh", "web1")
    assert (done.returncode, done.stderr) == (7, b"")


@REAL
@pytest.mark.parametrize("quicker", [False, True])
def test_with_the_real_ssh_the_first_key_is_kept_or_compared(guests: Guests, quicker: bool) -> None:
    """*quicker*: another session, which found another key, was before us."""
    if quicker:
        guests.broker.answers["host-key"] = {"name": "web1", "keys": [host_key(1)]}
    with Server(offer(), show(2)) as server:
        guests.use_real_ssh(server)
        done = guests.run("ssh", "web1", "id")
    assert guests.broker.requests[-1]["keys"] == [host_key(2)] and b"Permanently" not in done.stderr
    assert (done.returncode, b"another host key" in done.stderr) == ((1, True) if quicker else (255, False))


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
    assert done.stderr.decode().splitlines() == ["Denied \\x1b]0;x\\x07, try again.", "guest: no line end"]


FORGED = ["@" * 59, "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @", "@" * 59, "\x1b]0;x\x07 \u202e"]
FORGED += ["Warning: Permanently added 'web1' (ED25519) to the list of known hosts.", "Host key verification failed."]


@REAL
@pytest.mark.parametrize("pinned", [False, True])
def test_a_guest_forges_a_changed_key_by_the_reason_of_a_disconnect(guests: Guests, pinned: bool) -> None:
    guests.keys = [host_key(1)] if pinned else []
    with Server(disconnect("\r\n".join(["bye", *FORGED]))) as server:
        guests.use_real_ssh(server)
        done = guests.run("ssh", "web1", "id")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 255 and "host-key" not in guests.broker.verbs()
    assert lines[0] == f"Received disconnect from 127.0.0.1 port {server.port}:2: bye"
    assert lines[1:4] == [f"guest: {line}" for line in FORGED[:3]] and lines[5:7] == [f"guest: {line}" for line in FORGED[4:]]
    assert lines[4].startswith("guest: ") and lines[4].isascii()
    assert lines[7:] == [f"Disconnected from 127.0.0.1 port {server.port}"]


@REAL
def test_a_guest_forges_a_changed_key_by_what_it_offers(guests: Guests) -> None:
    guests.keys = [host_key(1)]
    with Server(offer("\n".join(["x", *FORGED]).encode())) as server:
        guests.use_real_ssh(server)
        done = guests.run("ssh", "web1", "id")
    first, *lines = done.stderr.decode().splitlines()
    assert done.returncode == 255 and first.startswith("Unable to negotiate with 127.0.0.1") and first.endswith("Their offer: x")
    assert len(lines) == len(FORGED) and all(line.startswith("guest: ") for line in lines)


def test_a_guest_forges_a_changed_key_at_its_login(guests: Guests) -> None:
    """The instructions of keyboard-interactive are messages of their own; but then ssh has found the key to be right before."""
    guests.keys = [KEY]
    picture = ["+--[ED25519 256]--+", *[f"|{row:>17}|" for row in range(9)], "+----[SHA256]-----+"]
    accepted = "\n".join(["Host key fingerprint is SHA256:Ez", *picture])
    denied = "root@127.0.0.1: Permission denied (publickey,password)."
    said = [accepted, "+ more", *FORGED, denied, denied.replace("word", "x")]
    guests.behave(f"for line in {said!r}: say(line)\nsys.exit(255)")
    done = guests.run("ssh", "web1", "id")
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 255
    assert lines[:4] == [f"guest: {line}" for line in said[1:5]] and lines[4].startswith("guest: \\x1b]0;x\\x07")
    assert lines[5:] == [*(f"guest: {line}" for line in FORGED[4:]), denied, f"guest: {said[-1]}"]


def test_where_nothing_was_kept_nothing_has_changed(guests: Guests) -> None:
    guests.behave(f"for line in {FORGED!r}: say(line)\nsys.exit(255)")
    done = guests.run("ssh", "web1", "id")
    assert done.returncode == 255 and b"another host key" not in done.stderr and done.stderr.count(b"\n") == len(FORGED)


@pytest.mark.parametrize("status", [0, 3, 254])
def test_a_session_that_was_made_had_no_changed_key(guests: Guests, status: int) -> None:
    guests.keys = [KEY]
    guests.behave(f"for line in {FORGED[:3]!r}: say(line)\nsys.exit({status})")
    done = guests.run("ssh", "web1", "id")
    assert done.returncode == status and done.stderr.decode().splitlines() == [f"guest: {line}" for line in FORGED[:3]]


@pytest.mark.parametrize(
    "before",
    [
        "Pseudo-terminal will not be allocated because stdin is not a terminal.",
        'command-line line 0: Unsupported option "pkcs11provider"',
        "kex_protocol_error: type 7 seq 3",
        "kex protocol error: type 7 seq 3",
    ],
)
def test_a_guest_cannot_have_a_changed_key_taken_for_its_own_words(guests: Guests, before: str) -> None:
    """What it can make ssh say before the key is judged, without words of its own, does not hide the judgement."""
    guests.keys = [KEY]
    guests.behave(f"for line in {[before, *FORGED[:3]]!r}: say(line)\nsys.exit(255)")
    done = guests.run("ssh", "web1", "id")
    lines = done.stderr.decode().splitlines()
    assert (done.returncode, lines[0], len(lines)) == (1, before, 3) and "another host key" in lines[1]


def test_a_long_line_of_a_guest_is_judged_at_once() -> None:
    """No pattern may take a guest's text apart in more ways than it has letters."""
    heard = Said("root", "10.77.3.2", 22, pinned=True)
    begun = time.monotonic()
    for text in ("root@10.77.3.2: Permission denied (" + "publickey," * 100_000, "a_" * 100_000, "x" * 100_000 + ": type 1 seq"):
        heard.hear(text)
    assert time.monotonic() - begun < 5


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
        "print('password?', flush=True); os.read(0, 9)\n"
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
    child.expect_exact(RESET)
    child.expect_exact("vmshell>")
    child.send("help exit\r")
    child.expect_exact("usage: exit")
    child.send("exit\r")
    assert leave(child) == 0


# --- the terminal afterwards ----------------------------------------------------------------------------------------------

RESET = "\x1b[?47l\x1b7\x1b[r\x1b8\x0f\x1b(B\x1b)B\x1b[0m\x1b[?25h"  # its beginning
MOUSE = "\x1b[?1000l"  # of its end


class Terminal:
    """A terminal of ours that types an answer to *question*, and what was shown on it."""

    def __init__(self, words: list[str], question: bytes = b"\x1b[6n", **more: str) -> None:
        self._question = question
        self._master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        on_it = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen(words, env=environment(**more), start_new_session=True, **on_it)  # type: ignore[call-overload]
        self.shown = b""

    def read(self, until: bytes = b"") -> None:
        """Until the program has ended, or *until* was shown."""
        deadline = time.monotonic() + LONG
        while not (until and until in self.shown):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._master], [], [], 0.05)[0]:
                data = os.read(self._master, 65536)
                self.shown += data
                os.write(self._master, b"\x1b[5;5R" * data.count(self._question))
            elif self.process.poll() is not None:
                return

    def typed(self) -> bytes:
        """What the next program would read."""
        tty.setraw(self.slave, termios.TCSANOW)
        waiting = struct.unpack("i", fcntl.ioctl(self.slave, termios.FIONREAD, bytes(4)))[0]
        return os.read(self.slave, waiting) if waiting else b""

    def close(self) -> None:
        os.close(self._master)
        os.close(self.slave)


@pytest.mark.parametrize("late", [False, True])
def test_afterwards_the_terminal_is_sane_and_types_nothing(guests: Guests, late: bool) -> None:
    """E03, E05: the guest had the terminal itself, so whatever it can switch on is switched off. *late*: it is slow to answer."""
    wait = "" if late else "select.select([0], [], [])"
    guests.behave(
        "import select, termios, tty; modes = termios.tcgetattr(0); tty.setraw(0)\n"
        "os.write(1, b'\\x1b[?1049h\\x1b[2;3r\\x1b[?1003h\\x1b[?25l\\x1b[6n')\n"
        f"{wait}\ntermios.tcsetattr(0, termios.TCSADRAIN, modes); sys.exit(9)"
    )
    terminal = Terminal(guests.command("ssh", "web1", "vi"), MOUSE.encode() if late else b"\x1b[6n")
    terminal.read()
    assert terminal.process.wait(LONG) == 9
    shown = terminal.shown.decode()
    assert shown.index(RESET) > shown.index("\x1b[6n") and MOUSE in shown
    assert termios.tcgetattr(terminal.slave) == terminal.before
    assert terminal.typed() == b"" and (late or "[5;5R" not in shown)
    terminal.close()


def test_the_terminal_is_sane_when_the_login_ends(guests: Guests) -> None:
    guests.behave("os.write(1, b'\\x1b[?1003hready'); time.sleep(60)")
    terminal = Terminal(guests.command("ssh", "web1"))
    terminal.read(b"ready")
    terminal.process.send_signal(signal.SIGTERM)
    terminal.read()
    assert terminal.process.wait(LONG) == 128 + signal.SIGTERM and RESET in terminal.shown.decode()
    terminal.close()


def test_no_reset_where_it_would_be_text(guests: Guests) -> None:
    """A dumb terminal, and a file: every byte of that is the guest's."""
    guests.behave("os.write(1, b'out')")
    terminal = Terminal(guests.command("ssh", "web1"), TERM="dumb")
    terminal.read()
    assert (terminal.process.wait(LONG), terminal.shown) == (0, b"out")
    terminal.close()
    assert guests.run("ssh", "web1").stdout == b"out"
