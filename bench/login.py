"""P1, P2: a command and a login over ssh, beside the smallest login shells there are.

On an installed host of its own (see tests/host): real systemd, sshd with PAM, front, broker and relay.

    P1  `ssh host list`: our shell under sshd's ForceCommand, against a login shell in C that asks the same socket
    P2  login to the prompt, against /bin/sh; and the shell alone, started on a terminal, against `python3 -I -c pass`
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.figures import PYTHON, Row, Terminal, broker, compared, installed, place, skipped
from tests.host.machine import TREE, Host, why_not

VMS = 5
PROMPT, SH_PROMPT = b"vmshell> ", b"$ "
C_SHELL_PATH = "/usr/local/bin/cshell"

C_SHELL = r"""
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
int main(void) {
    static char reply[65536];
    static const char request[] = "{\"id\":1,\"verb\":\"list\"}";
    struct sockaddr_un at = {AF_UNIX, "/run/vmshell/broker.sock"};
    int sock = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    ssize_t size;
    if (connect(sock, (struct sockaddr *)&at, sizeof at) || write(sock, request, strlen(request)) < 0) return 1;
    size = read(sock, reply, sizeof reply);
    return size <= 0 || write(1, reply, size) != size || write(1, "\n", 1) != 1;
}
"""

WHAT_LIST = "`ssh host list`, against a C program as login shell"
WHAT_LOGIN = "ssh login to the prompt, against /bin/sh"
WHAT_ECHO = "the same until keys typed at once are echoed (no aim: typed-ahead keys are kept)"
WHAT_ALONE = "shell to prompt without ssh, against `python3 -I -c pass`"


def rows() -> list[Row]:
    """P1 and P2 over ssh."""
    reason = why_not()
    if reason:
        return [skipped("P1", WHAT_LIST, reason), skipped("P2", WHAT_LOGIN, reason)]
    with host() as machine, place() as folder:
        found: list[Row] = []
        if add_c_shell(machine, folder, "benchc"):
            ours, other = (command(machine, user, "list") for user in ("alice", "benchc"))
            found.append(compared("P1", WHAT_LIST, lambda: _list(ours), lambda: _list(other), 1.08, 25))
        else:
            found.append(skipped("P1", WHAT_LIST, "no C compiler (gcc)"))
        add_sh_account(machine, "benchsh")
        found += _logins(*(command(machine, user) for user in ("alice", "benchsh")))
    return found


def _logins(ours: list[str], other: list[str]) -> list[Row]:
    def to_prompt(argv: list[str], prompt: bytes) -> Callable[[], float]:
        return lambda: _to_prompt(argv, prompt)

    def to_echo(argv: list[str], prompt: bytes) -> Callable[[], float]:
        return lambda: _to_echo(argv, prompt, b"exit")

    return [
        compared("P2", WHAT_LOGIN, to_prompt(ours, PROMPT), to_prompt(other, SH_PROMPT), 1.12, 15),
        compared("P2", WHAT_ECHO, to_echo(ours, PROMPT), to_echo(other, SH_PROMPT), None, 7),
    ]


@contextlib.contextmanager
def host(tree: str = TREE, name: str = "") -> Iterator[Host]:
    """An installed host on which alice has a few VMs; what is installed is *tree*."""
    machine = Host(name or f"bench{os.getpid()}")
    machine.boot()
    try:
        machine.install(tree)
        machine.add_user("alice")
        machine.put_image("echo")
        make_vms(machine, "alice")
        yield machine
    finally:
        machine.down()


def make_vms(machine: Host, user: str) -> None:
    for number in range(VMS):
        status, out, error = machine.run(user, f"new web{number} --image echo --memory 32M")
        if status:
            raise RuntimeError(f"new as {user}: status {status}: {out}{error}")


def add_sh_account(machine: Host, user: str) -> None:
    """Make an ordinary account with /bin/sh, no member of the group."""
    machine.exec("useradd", "--gid", "nogroup", "--shell", "/bin/sh", user)
    keys = "/etc/ssh/bench-keys"
    machine.exec("tee", keys, stdin=machine.public_key())
    machine.exec("chmod", "0644", keys)
    sshd_settings(machine, user, f"AuthorizedKeysFile {keys}")


def add_c_shell(machine: Host, folder: Path, user: str) -> bool:
    """Make the account of the C login shell, with VMs that it can list; says whether there is a compiler."""
    program = _compile(folder)
    if not program:
        return False
    machine.put("/usr/local/bin", program)
    machine.add_user(user)
    make_vms(machine, user)
    machine.exec("usermod", "--shell", C_SHELL_PATH, user)
    sshd_settings(machine, user, f"ForceCommand {C_SHELL_PATH}")
    return True


def sshd_settings(machine: Host, user: str, line: str) -> None:
    """Put *line* before what our own drop-in says of *user*: the first value of a setting is the one that counts."""
    machine.exec("tee", f"/etc/ssh/sshd_config.d/40-{user}.conf", stdin=f"Match User {user}\n    {line}\n")
    machine.sh("systemctl reload ssh")


def command(machine: Host, user: str, verb: str = "") -> list[str]:
    """The ssh command of *user*: one verb, or a login at a terminal."""
    ssh, *options = machine.ssh()
    where = f"{user}@{machine.name}"
    return [shutil.which(ssh) or ssh, *options, "-o", "LogLevel=ERROR", *([where, verb] if verb else ["-tt", where])]


def without_ssh() -> list[Row]:
    """The shell alone: what is left of a login where ssh is already connected."""
    with broker() as session, place() as folder:
        _, starter = installed(folder)
        command = [starter, "--layout", session.layout.to_args()]
        return [compared("P2", WHAT_ALONE, lambda: _to_prompt(command, PROMPT), _bare_python, 2.5, 25)]


def _to_prompt(command: list[str], prompt: bytes) -> float:
    """Seconds until *prompt* is on the screen. It takes keys then: `exit`, typed at once, must end it."""
    terminal = Terminal(command)
    try:
        took = terminal.until(prompt)
        terminal.type(b"exit\r")
        status, _ = terminal.end()
    finally:
        terminal.kill()
    if status:
        raise RuntimeError(f"`exit` at the prompt ended with status {status}: {terminal.output[-300:]!r}")
    return took


def _to_echo(command: list[str], prompt: bytes, echoed: bytes) -> float:
    """Seconds until a key typed when the prompt came is shown: for us, until the line editor has been loaded."""
    terminal = Terminal(command)
    try:
        terminal.until(prompt)
        terminal.type(b"exit")
        took = terminal.until(echoed)
        terminal.type(b"\r")
        terminal.end()
    finally:
        terminal.kill()
    return took


def _bare_python() -> float:
    terminal = Terminal([PYTHON, "-I", "-c", "pass"])
    try:
        return terminal.end()[1]
    finally:
        terminal.kill()


def _compile(folder: Path) -> str:
    """The C login shell, static where the libraries for that are there; "" without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return ""
    source, program = folder / "shell.c", folder / "cshell"
    source.write_text(C_SHELL, encoding="ascii")
    for options in (("-static",), ()):
        command = [compiler, "-O2", *options, "-o", str(program), str(source)]
        if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return str(program)
    return ""


def _list(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode or done.stdout.count("web") < VMS:
        raise RuntimeError(f"{command[-2:]} ended with status {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}")
    return took
