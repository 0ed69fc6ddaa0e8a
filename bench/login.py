"""P1, P2: a command and a login over ssh, beside the smallest login shells there are.

A real sshd with PAM, started here, in mount and PID namespaces of its own: /etc/passwd, group and shadow are copies with four
more accounts, /run is empty, so nothing of the host is touched and everything ends with this process. The code is installed
there as `make install` lays it out (byte-compiled, root's), with a system-mode broker and a relay under a uid of its own.

    P1  `ssh host list`: our shell under sshd's ForceCommand, against a login shell in C that asks the same socket
    P2  login to the prompt, against /bin/sh; and the shell alone, started on a terminal, against `python3 -I -c pass`
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from bench.figures import PYTHON, Row, Terminal, broker, compared, installed, layout_in, place, skipped
from tests.guests import echo_image
from vmshell import wire
from vmshell.layout import Layout

VMS = 5
RUN = "/run/vmshell"  # where an installed login shell looks for its broker
UIDS = {"bench-vmshell": 61001, "bench-c": 61002, "bench-sh": 61003, "vmshell-relay": 61004}
GID = 61000
PROMPT, SH_PROMPT = b"vmshell> ", b"$ "

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
WHAT_ALONE = "shell to prompt without ssh, against `python3 -I -c pass`"


def rows() -> list[Row]:
    """P1 and P2 over ssh, measured by this file run in its namespaces."""
    reason = _why_not()
    if reason:
        return [skipped("P1", WHAT_LIST, reason), skipped("P2", WHAT_LOGIN, reason)]
    with place() as folder:
        # When `unshare` goes, by whatever signal, the namespace's first process goes, and with it everything in there.
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        done = subprocess.run(
            [*namespaces, sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True, check=False
        )
    if done.returncode:
        reason = f"the sshd part failed with status {done.returncode}; see above"
        return [skipped("P1", WHAT_LIST, reason), skipped("P2", WHAT_LOGIN, reason)]
    return [(*row[:3], math.nan if row[3] is None else row[3], *row[4:]) for row in json.loads(done.stdout.splitlines()[-1])]


def _why_not() -> str:
    if os.geteuid() != 0:
        return "an sshd with accounts of its own needs root"
    missing = [
        program for program in ("sshd", "ssh", "ssh-keygen", "unshare", "mount", "setpriv") if shutil.which(program) is None
    ]
    return f"not installed: {', '.join(missing)}" if missing else ""


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


# --- in the namespaces ------------------------------------------------------------------------------------------------


def main(folder: Path) -> int:
    """Measure, and print the rows as one line of JSON."""
    library, starter = installed(folder)
    cshell = _compile(folder)
    _accounts(folder, {"bench-vmshell": starter, "bench-c": cshell or "/bin/sh", "bench-sh": "/bin/sh"})
    layout = layout_in(folder, run=RUN, embedded=False)
    with _services(library, layout), _sshd(folder, starter) as ssh:
        echo_image(layout)
        for user in ("bench-vmshell", "bench-c"):
            for number in range(VMS):
                _as(UIDS[user], layout, {"id": 1, "verb": "new", "vm": f"web{number}", "image": "echo", "memory": 32})
        found: list[Row] = []
        if cshell:
            found.append(
                compared(
                    "P1",
                    WHAT_LIST,
                    lambda: _command([*ssh, "bench-vmshell@host", "list"]),
                    lambda: _command([*ssh, "bench-c@host", "list"]),
                    1.08,
                    25,
                )
            )
        else:
            found.append(skipped("P1", WHAT_LIST, "no C compiler (gcc)"))
        ours, other = [*ssh, "-tt", "bench-vmshell@host"], [*ssh, "-tt", "bench-sh@host"]
        found.append(compared("P2", WHAT_LOGIN, lambda: _to_prompt(ours, PROMPT), lambda: _to_prompt(other, SH_PROMPT), 1.12, 15))
        found.append(
            compared(
                "P2",
                "the same until keys typed at once are echoed (no aim: typed-ahead keys are kept)",
                lambda: _to_echo(ours, PROMPT, b"exit"),
                lambda: _to_echo(other, SH_PROMPT, b"exit"),
                None,
                7,
            )
        )
    print(json.dumps([[None if value != value else value for value in row] for row in found]))
    return 0


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


def _accounts(folder: Path, shells: dict[str, str]) -> None:
    """Copies of the account files, with ours behind, in the place of the host's, for this mount namespace."""
    texts = {name: Path("/etc", name).read_text(encoding="utf-8").rstrip("\n") for name in ("passwd", "group", "shadow")}
    texts["group"] = (
        "\n".join(line for line in texts["group"].splitlines() if not line.startswith("vmusers:")) + f"\nvmusers:x:{GID}:"
    )
    for user, uid in UIDS.items():
        if not any(line.startswith(f"{user}:") for line in texts["passwd"].splitlines()):
            texts["passwd"] += f"\n{user}:x:{uid}:{GID}::/:{shells.get(user, '/usr/sbin/nologin')}"
            texts["shadow"] += f"\n{user}:*:20000:0:99999:7:::"
    for name, text in texts.items():
        copy = folder / name
        copy.write_text(text + "\n", encoding="utf-8")
        copy.chmod(0o640 if name == "shadow" else 0o644)
        subprocess.run(["mount", "--bind", str(copy), f"/etc/{name}"], check=True)
    for empty in ("/run", "/var/log"):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "none", empty], check=True)
    for name in ("/run/sshd", "/run/lock", RUN):
        os.mkdir(name, 0o755)


@contextlib.contextmanager
def _services(library: str, layout: Layout) -> Iterator[None]:
    """A system-mode relay and broker, as the service manager would start them."""
    relay = pwd.getpwnam("vmshell-relay")
    os.mkdir(layout.log, 0o700)
    os.chown(layout.log, relay.pw_uid, relay.pw_gid)
    starter = [PYTHON, "-IS", f"{library}/vmshell/__main__.py"]
    listener = wire.listen(layout.relay_socket, 0o600)
    jail = ["setpriv", f"--reuid={relay.pw_uid}", f"--regid={relay.pw_gid}", "--clear-groups", "--no-new-privs", "--"]
    argument = f"--listen-fd={listener.fileno()}"
    running = [
        subprocess.Popen([*jail, *starter, "relay", layout.to_args(), argument], pass_fds=(listener.fileno(),)),
        subprocess.Popen([*starter, "broker", layout.to_args()], stderr=subprocess.DEVNULL),
    ]
    listener.close()
    try:
        _wait(lambda: wire.connect(layout.broker_socket, 20).close())
        _as(0, layout, {"id": 1, "verb": "version"})  # answered once the host has been looked at
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _sshd(folder: Path, starter: str) -> Iterator[list[str]]:
    """An sshd on a free port of the loopback; yields the ssh command that reaches it."""
    for name in ("hostkey", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/hostkey\nPidFile none\nStrictModes no\nUsePAM yes\n"
        f"AuthorizedKeysFile {folder}/key.pub\nPasswordAuthentication no\nLogLevel QUIET\n"
        f"Match User bench-vmshell\n    ForceCommand {starter}\n    DisableForwarding yes\n"
        "    PermitUserRC no\n    AcceptEnv none\n",
        encoding="utf-8",
    )
    (folder / "key.pub").chmod(0o644)
    server = subprocess.Popen([shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-f", str(config)], start_new_session=True)
    command = [shutil.which("ssh") or "/usr/bin/ssh", "-F", "/dev/null", "-i", f"{folder}/key", "-p", str(port)]
    options = (
        "IdentitiesOnly=yes",
        "IdentityAgent=none",
        "HostName=127.0.0.1",
        "ControlPath=none",
        "BatchMode=yes",
        "LogLevel=ERROR",
    )
    command += [word for option in options for word in ("-o", option)]
    command += ["-o", f"UserKnownHostsFile={folder}/known_hosts", "-o", "StrictHostKeyChecking=accept-new"]
    try:
        _wait(lambda: socket.create_connection(("127.0.0.1", port), 5).close())
        yield command
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _command(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode or done.stdout.count("web") < VMS:
        raise RuntimeError(f"{command[-2:]} ended with status {done.returncode}: {done.stdout[-300:]}{done.stderr[-300:]}")
    return took


def _as(uid: int, layout: Layout, request: dict[str, object]) -> None:
    """Ask the broker as *uid*, in a process of its own."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.setuid(uid)
            sock = wire.connect(layout.broker_socket, 60)
            wire.send(sock, request)
            while (packet := wire.recv(sock)) and "progress" in packet.body:
                pass
            os._exit(0 if packet and "ok" in packet.body else 1)
        os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"refused: {request}")


def _wait(attempt: object) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            attempt()  # type: ignore[operator]
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
