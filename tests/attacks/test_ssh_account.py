"""Ways out of a vmshell account that never meet the shell, or meet it sideways (A01–A13, A32, A33), through a real sshd.

Each test is named after its row. Where sshd itself must do the refusing, the same thing is first seen to work through a second
sshd without our drop-in: otherwise a broken client would pass for a safe server.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pexpect
import pytest

from tests.host.machine import Host

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

# An sshd as it would be without `make install`'s drop-in, and with the subsystem that never starts a shell (A04).
PLAIN_PORT = ("-o", "Port=2222")
PLAIN_CONFIG = """
Port 2222
PidFile /run/plain.pid
UsePAM yes
AcceptEnv LANG LC_*
Subsystem sftp internal-sftp
AuthorizedKeysFile /etc/ssh/vmshell-keys/%u
StrictModes no
"""
OPEN_SOCKET = "/run/everyone.sock"


@pytest.fixture(scope="module")
def plain(host: Host) -> Iterator[tuple[str, ...]]:
    """ssh options that lead to a second sshd on the host, without our drop-in."""
    host.exec("tee", "/root/plain.conf", stdin=PLAIN_CONFIG)
    host.sh("systemd-run --quiet --unit=plain-sshd /usr/sbin/sshd -D -f /root/plain.conf")
    wait_for(lambda: host.exec("ss", "-Hltn", "sport = :2222").stdout != "")
    yield PLAIN_PORT
    host.exec("systemctl", "stop", "plain-sshd")


@pytest.fixture(scope="module")
def banner(host: Host) -> Iterator[str]:
    """A service that greets on the host's loopback and on a socket open to all: what forwarding would reach."""
    greet = "SYSTEM:echo secret"
    host.sh(f"systemd-run --quiet --unit=greet-tcp socat TCP-LISTEN:7777,bind=127.0.0.1,fork,reuseaddr {greet!r}")
    host.sh(f"systemd-run --quiet --unit=greet-unix socat UNIX-LISTEN:{OPEN_SOCKET},fork,mode=666 {greet!r}")
    wait_for(lambda: host.exec("test", "-S", OPEN_SOCKET, check=False).returncode == 0)
    wait_for(lambda: host.exec("ss", "-Hltn", "sport = :7777").stdout != "")
    yield "secret"
    host.exec("systemctl", "stop", "greet-tcp", "greet-unix")


@pytest.fixture(scope="module")
def homely(host: Host) -> Host:
    """`dora`: an account with a home of her own, as `--keep-home` leaves it; nothing but sshd and the shell protects it."""
    host.sh("useradd -m -s /bin/bash dora")
    host.admin("user", "add", "dora", "--keep-home", "--key", "-", stdin=host.public_key())
    return host


def write_home(host: Host, path: str, text: str) -> None:
    host.sh("install -d -o dora -g dora -m 700 /home/dora/.ssh")
    host.exec("tee", f"/home/dora/{path}", stdin=text)
    host.exec("chown", "dora:dora", f"/home/dora/{path}")


def client(host: Host, program: str, *argv: str, stdin: str = "", timeout: float = 30) -> tuple[int, str, str]:
    """Run scp, sftp, rsync or ssh with the host's configuration."""
    done = subprocess.run(
        [*host.ssh(program), *argv], input=stdin, capture_output=True, text=True, errors="surrogateescape", timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def as_user(host: Host, user: str, *argv: str, stdin: str = "") -> tuple[int, str]:
    """What a process of *user* gets, had it come to be."""
    done = host.exec("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", *argv, stdin=stdin, check=False)
    return done.returncode, done.stdout + done.stderr


# --- A01, A02: what of the three ways to ask reaches the shell --------------------------------------------------------


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
@pytest.mark.parametrize("pty", [False, True], ids=["no-pty", "pty"])
def test_A02_a_command_is_a_request(host: Host, plain: tuple[str, ...], forced: bool, pty: bool) -> None:
    options = () if forced else plain
    status, out, err = host.run("alice", "version", options=(*options, *(("-tt",) if pty else ())))
    assert status == 0, err
    assert "vmshell" in out


NOT_VERBS = ["id", "id; cat /etc/passwd", "/bin/sh", "/usr/local/bin/vmshell; id", "$(id)", "`id`", "list && id", " -c id"]


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
@pytest.mark.parametrize("pty", [False, True], ids=["no-pty", "pty"])
@pytest.mark.parametrize("text", NOT_VERBS)
def test_A01_other_text_is_refused(host: Host, plain: tuple[str, ...], forced: bool, pty: bool, text: str) -> None:
    options = () if forced else plain
    status, out, err = host.run("alice", text, options=(*options, *(("-tt",) if pty else ())))
    assert status not in (0, 255)
    assert "uid=" not in out + err and "root:" not in out + err


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
def test_A02_without_a_command_there_is_a_prompt(host: Host, plain: tuple[str, ...], forced: bool) -> None:
    terminal = host.spawn("alice", options=() if forced else plain)
    terminal.expect_exact("vmshell>")
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "plain"])
def test_A02_without_command_and_terminal_lines_are_requests(host: Host, plain: tuple[str, ...], forced: bool) -> None:
    status, out, err = host.run("alice", options=(*(() if forced else plain), "-T"), stdin="whoami\nid\n")
    assert "alice" in out
    assert "uid=" not in out + err
    assert status != 0  # the last request was refused


def test_A02_the_original_command_is_capped(host: Host) -> None:
    status, out, err = host.run("alice", "list " + "x" * 100_000)
    assert status not in (0, 255)
    assert len(out + err) < 2000


# --- A03–A05: file transfer -------------------------------------------------------------------------------------------


def test_A03_sftp_by_the_external_server(host: Host, tmp_path: Path) -> None:
    batch = f"get /etc/passwd {tmp_path}/passwd\nput {__file__} /tmp/put-here\n"
    status, _, _ = client(host, "sftp", "-b", "-", "alice@host", stdin=batch)
    assert status != 0
    assert not (tmp_path / "passwd").exists()
    assert host.exec("test", "-e", "/tmp/put-here", check=False).returncode != 0


def test_A03_nothing_of_the_shell_disturbs_the_protocol(host: Host) -> None:
    """Text on standard output is what makes clients say "Received message too long"."""
    status, out, _ = client(host, "ssh", "-s", "alice@host", "sftp")
    assert status not in (0, 255) and out == ""


def test_A04_internal_sftp_does_not_bypass_the_shell(host: Host, plain: tuple[str, ...], tmp_path: Path) -> None:
    batch = f"get /etc/passwd {tmp_path}/plain\n"
    assert client(host, "sftp", *plain, "-b", "-", "alice@host", stdin=batch)[0] == 0, "without the drop-in this is the hole"
    assert "root:" in (tmp_path / "plain").read_text()
    config = "/etc/ssh/sshd_config"
    host.sh(f"cp {config} /root/; sed -i 's/^Subsystem.*/Subsystem sftp internal-sftp/' {config} && systemctl reload ssh")
    try:
        wait_for(lambda: "internal-sftp" in host.exec("sshd", "-T").stdout)
        status, _, _ = client(host, "sftp", "-b", "-", "alice@host", stdin=f"get /etc/passwd {tmp_path}/ours\n")
    finally:
        host.sh(f"mv /root/sshd_config {config} && systemctl reload ssh")
    assert status != 0
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ("scp", "-O", "alice@host:/etc/passwd", "{tmp}/got"),
        ("scp", "-O", __file__, "alice@host:/tmp/put-here"),
        ("scp", "alice@host:/etc/passwd", "{tmp}/got"),
        ("scp", "-O", "-r", "-p", "alice@host:/etc", "{tmp}/got"),
    ],
    ids=["scp-O-get", "scp-O-put", "scp-get", "scp-O-tree"],
)
def test_A05_scp(host: Host, tmp_path: Path, argv: tuple[str, ...]) -> None:
    started = time.monotonic()
    status, _, _ = client(host, argv[0], *(word.format(tmp=tmp_path) for word in argv[1:]))
    assert status != 0
    assert time.monotonic() - started < 20
    assert not (tmp_path / "got").exists()
    assert host.exec("test", "-e", "/tmp/put-here", check=False).returncode != 0


@pytest.mark.parametrize(
    "text",
    [
        "rsync --server --sender -logDtpre.iLsfxC . /etc/passwd",
        "git-upload-pack '/etc/.git'",
        "scp -f /etc/passwd",
        "/usr/lib/openssh/sftp-server",
        "tar cf - /etc",
    ],
)
def test_A05_servers_of_other_programs(host: Host, text: str) -> None:
    """They send binary data and wait for an answer in kind: the shell must neither hang nor choke."""
    status, out, _ = host.run("alice", text, stdin="\x00\x01\x00\x00binary\n" * 1000, timeout=60)
    assert status not in (0, 255) and "root:" not in out


# --- A06–A09: forwarding ----------------------------------------------------------------------------------------------


def test_A06_tcp_forwarding(host: Host, plain: tuple[str, ...], banner: str) -> None:
    def reached(options: tuple[str, ...]) -> str:
        return client(host, "ssh", *options, "-W", "127.0.0.1:7777", "alice@host")[1]

    assert banner in reached(plain), "without the drop-in this is the hole"
    assert banner not in reached(())


def test_A06_a_local_listener_leads_nowhere(host: Host, banner: str, tmp_path: Path) -> None:
    with forwarding(host, "alice", "-L", f"{tmp_path}/local.sock:127.0.0.1:7777"):
        assert banner not in read_from(tmp_path / "local.sock")


def test_A07_stream_sockets(host: Host, plain: tuple[str, ...], banner: str, tmp_path: Path) -> None:
    with forwarding(host, "alice", *plain, "-L", f"{tmp_path}/plain.sock:{OPEN_SOCKET}"):
        assert banner in read_from(tmp_path / "plain.sock"), "without the drop-in this is the hole"
    with forwarding(host, "alice", "-L", f"{tmp_path}/ours.sock:{OPEN_SOCKET}"):
        assert banner not in read_from(tmp_path / "ours.sock")


def test_A07_the_brokers_socket_through_plain_forwarding(host: Host, plain: tuple[str, ...], tmp_path: Path) -> None:
    """Even where forwarding is open the broker is not reached: its socket keeps packets, sshd only opens streams. It lives on."""
    pid = host.exec("systemctl", "show", "-P", "MainPID", "vmshell-broker").stdout
    with forwarding(host, "alice", *plain, "-L", f"{tmp_path}/broker.sock:/run/vmshell/broker.sock"):
        assert read_from(tmp_path / "broker.sock", b'{"id":1,"verb":"whoami"}') == ""
    assert host.exec("systemctl", "show", "-P", "MainPID", "vmshell-broker").stdout == pid


@pytest.mark.parametrize("where", ["7788", "/tmp/remote.sock"])
def test_A08_remote_listeners(host: Host, plain: tuple[str, ...], where: str) -> None:
    def listeners() -> str:
        return host.sh("ss -Hltn 'sport = :7788'; ls /tmp/remote.sock 2>/dev/null", check=False)

    argv = ("-o", "ExitOnForwardFailure=yes", "-R", f"{where}:127.0.0.1:1")
    with forwarding(host, "alice", *plain, *argv):
        wait_for(lambda: listeners() != "")  # without the drop-in this is the hole
    host.sh("rm -f /tmp/remote.sock")
    wait_for(lambda: listeners() == "")
    status, _, _ = client(host, "ssh", "-N", *argv, "alice@host")
    assert status == 255
    assert listeners() == ""


def test_A08_nobody_but_root_writes_where_the_sockets_are(host: Host) -> None:
    for folder in ("/run/vmshell", "/run/vmshell/vms", "/var/lib/vmshell", "/var/lib/vmshell-home", "/etc/ssh/vmshell-keys"):
        assert as_user(host, "alice", "touch", f"{folder}/x")[0] != 0


def test_A09_agent_and_x11(host: Host) -> None:
    before = host.sh("ls -d /tmp/ssh-* 2>/dev/null", check=False)
    terminal = host.spawn("alice", options=("-A", "-X", "-o", "ForwardX11Trusted=yes"))
    try:
        environ = shell_environment(host, "alice", terminal)
        assert not {"SSH_AUTH_SOCK", "DISPLAY", "XAUTHORITY"} & set(environ)
        assert host.sh("ls -d /tmp/ssh-* 2>/dev/null", check=False) == before
    finally:
        terminal.close(force=True)


# --- A10–A13: files in a home, and the environment --------------------------------------------------------------------


def test_A10_ssh_rc(homely: Host) -> None:
    write_home(homely, ".ssh/rc", "touch /tmp/rc-ran\n")
    status, out, err = homely.run("dora", "version")
    assert status == 0 and err == ""
    assert homely.exec("test", "-e", "/tmp/rc-ran", check=False).returncode != 0


def test_A10_the_shared_home_takes_no_file(host: Host) -> None:
    for name in (".ssh", ".pam_environment", ".forward", ".config", ".bashrc"):
        status, text = as_user(host, "alice", "touch", f"/var/lib/vmshell-home/{name}")
        assert status != 0 and "Permission denied" in text
    assert host.sh("ls -A /var/lib/vmshell-home") == ""


def test_A11_no_variable_from_files_of_the_user(homely: Host) -> None:
    write_home(homely, ".ssh/environment", "EVIL_FILE=1\n")
    keys = "/etc/ssh/vmshell-keys/dora"
    homely.sh(f"cp {keys} /root/keys; sed -i 's/^/environment=\"EVIL_KEY=1\" /' {keys}")
    try:
        terminal = homely.spawn("dora")
        environ = shell_environment(homely, "dora", terminal)
        terminal.close(force=True)
    finally:
        homely.sh(f"cp /root/keys {keys}")
    assert not [name for name in environ if name.startswith("EVIL")]


def test_A12_pam_environment(homely: Host) -> None:
    """Debian 12's sshd reads ~/.pam_environment. An account of `user add` has none and can make none; doctor finds the others."""
    marker = "libevil-nowhere.so"
    write_home(homely, ".pam_environment", f"LD_PRELOAD DEFAULT={marker}\nPYTHONSTARTUP DEFAULT=/tmp/x\n")
    _, _, err = homely.run("dora", "version")
    reads_it = "user_readenv=1" in homely.exec("cat", "/etc/pam.d/sshd").stdout
    assert (marker in err) is reads_it, "this is what the shared home is for"
    doctor = homely.admin("doctor", check=False)
    assert ("dora" in "".join(line for line in doctor.stdout.splitlines() if line.startswith("FAIL  pam"))) is reads_it
    # And alice: no way to make the file, nothing of it at login.
    assert as_user(homely, "alice", "touch", "/var/lib/vmshell-home/.pam_environment")[0] != 0
    status, _, err = homely.run("alice", "version")
    assert status == 0 and marker not in err
    # Taken in again without --keep-home dora is safe too.
    homely.sh("loginctl terminate-user dora", check=False)
    wait_for(lambda: homely.admin("user", "add", "dora", check=False).returncode == 0)
    status, _, err = homely.run("dora", "version")
    assert status == 0 and marker not in err


HOSTILE = {
    "LC_EVIL": "x\x1b[2J",
    "LC_ALL": "xx_YY",
    "LANG": "../../etc",
    "LD_PRELOAD": "/tmp/evil.so",
    "LD_LIBRARY_PATH": "/tmp",
    "PYTHONPATH": "/tmp",
    "PYTHONINSPECT": "1",
    "PYTHONSTARTUP": "/tmp/x.py",
    "PYTHONWARNINGS": "error",
    "PATH": "/tmp",
    "HOME": "/tmp",
    "SHELL": "/bin/sh",
    "BASH_ENV": "/tmp/x",
    "ENV": "/tmp/x",
    "EDITOR": "/bin/sh",
    "VISUAL": "/bin/sh",
    "PAGER": "/bin/sh",
    "TERMINFO": "/tmp",
    "TERMCAP": "/tmp",
    "INPUTRC": "/tmp/x",
    "XDG_CONFIG_HOME": "/tmp",
    "XDG_DATA_HOME": "/tmp",
    "TMPDIR": "/etc",
    "IFS": "x",
    "MALLOC_TRACE": "/tmp/x",
    "GCONV_PATH": "/tmp",
    "LOCPATH": "/tmp",
    "NLSPATH": "/tmp",
    "SSH_ORIGINAL_COMMAND": "id",
    "SUDO_COMMAND": "x",
}


def test_A11_A13_nothing_the_client_sends_arrives(host: Host, plain: tuple[str, ...]) -> None:
    send = ("-o", "SetEnv=" + " ".join(f'{name}="{value}"' for name, value in HOSTILE.items()))

    def arrived(options: tuple[str, ...]) -> dict[str, str]:
        terminal = host.spawn("alice", options=(*options, *send))
        try:
            environ = shell_environment(host, "alice", terminal)
        finally:
            terminal.close(force=True)
        return {name: value for name, value in environ.items() if HOSTILE.get(name) == value}

    assert "LC_EVIL" in arrived(plain), "without the drop-in this is the hole"
    assert arrived(()) == {}


def test_A13_a_hostile_locale_changes_no_answer(host: Host, plain: tuple[str, ...]) -> None:
    """Where sshd lets LC_* in, the shell does not care."""
    quiet = host.run("alice", "version")
    send = ("-o", 'SetEnv=LC_ALL="xx_YY" LANG="tr_TR.ISO-8859-9" LC_EVIL="x"')
    assert host.run("alice", "version", options=(*plain, *send)) == quiet


# --- A32, A33: other ways to a process of one's own -------------------------------------------------------------------


def test_A32_chsh(host: Host) -> None:
    before = host.exec("getent", "passwd", "alice").stdout
    status, text = as_user(host, "alice", "chsh", "-s", "/bin/bash")
    assert status != 0 and "may not change the shell" in text
    assert host.exec("getent", "passwd", "alice").stdout == before


def test_A32_su_with_another_shell(host: Host) -> None:
    """As bob, who knows alice's password: still vmshell. With the shell listed in /etc/shells the same command gives /bin/sh."""
    host.exec("chpasswd", stdin="alice:from-the-test\n")

    def id_through_su(*options: str) -> str:
        return as_user(host, "bob", "su", *options, "-s", "/bin/sh", "alice", "-c", "id", stdin="from-the-test\n")[1]

    try:
        for options in ((), ("-",), ("-m",)):
            text = id_through_su(*options)
            assert "uid=" not in text and "restricted shell /usr/local/bin/vmshell" in text, text
        host.sh("cp /etc/shells /root/shells; echo /usr/local/bin/vmshell >>/etc/shells")
        assert "uid=" in id_through_su(), "listed in /etc/shells this is the hole"
    finally:
        host.sh("[ ! -e /root/shells ] || mv /root/shells /etc/shells; usermod -p '*' alice")


def test_A32_nothing_lists_the_shell(host: Host) -> None:
    assert "vmshell" not in host.exec("cat", "/etc/shells").stdout


def test_A33_cron_and_at(host: Host) -> None:
    for argv in (("crontab", "-l"), ("crontab", "-"), ("at", "now")):
        status, text = as_user(host, "alice", *argv, stdin="* * * * * touch /tmp/cron-ran\n")
        assert status != 0, argv
        assert re.search("not allowed|permission to use", text), text
    assert host.sh("ls -A /var/spool/cron/crontabs /var/spool/cron/atjobs | grep -v SEQ | grep -v : ", check=False).strip() == ""


def test_A33_no_unit_of_ones_own(host: Host) -> None:
    assert as_user(host, "alice", "sh", "-c", "mkdir -p ~alice/.config/systemd/user")[0] != 0
    # Asking for lingering takes a polkit decision that only an administrator can make.
    assert as_user(host, "alice", "loginctl", "enable-linger")[0] != 0
    assert host.exec("test", "-e", "/var/lib/systemd/linger/alice", check=False).returncode != 0


def test_A33_forward(host: Host) -> None:
    assert as_user(host, "alice", "sh", "-c", "echo '|/bin/sh' > ~alice/.forward")[0] != 0


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def forwarding(host: Host, user: str, *argv: str) -> Iterator[None]:
    """`ssh -N` with the given options, until the block ends."""
    # A session of its own, so that the ProxyCommand is ended with it.
    ssh = subprocess.Popen([*host.ssh(), "-N", *argv, f"{user}@host"], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(ssh.pid, signal.SIGTERM)
        ssh.wait(timeout=60)


def read_from(path: Path, send: bytes = b"") -> str:
    """What comes out of a forwarded socket until its end; empty when it never came to be or says nothing."""
    end = time.monotonic() + 10
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        try:
            sock.connect(str(path))
            if send:
                sock.sendall(send)
            return sock.recv(1000).decode()
        except OSError:
            return ""


def shell_environment(host: Host, user: str, terminal: pexpect.spawn) -> dict[str, str]:
    """The environment that sshd started the shell with: /proc keeps it as it was at exec."""
    terminal.expect_exact("vmshell>")
    pid = host.exec("pgrep", "-n", "-u", user, "-f", "python3 -IS /usr/local/bin/vmshell").stdout.strip()
    pairs = host.exec("cat", f"/proc/{pid}/environ").stdout.split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
