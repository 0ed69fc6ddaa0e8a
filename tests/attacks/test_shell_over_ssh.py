"""What a person at the prompt, or behind `ssh host TEXT`, may try against the shell, through a real sshd: A14–A29, A38, A39."""

from __future__ import annotations

import ast
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.host.machine import Host

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPT = "vmshell> "
MARKER = "/tmp/escaped"
TREE = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_escaped(host: Host) -> Iterator[None]:
    """Whatever a test tried, the marker it wanted to leave is not there, and no vmshell runs on without its person."""
    yield
    assert host.exec("test", "-e", MARKER, check=False).returncode != 0
    deadline = time.monotonic() + 60
    while host.exec("pgrep", "-u", "alice", "-f", "bin/vmshell", check=False).stdout:
        assert time.monotonic() < deadline, "a shell is left over"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def erin(host: Host) -> Host:
    """`erin`: an account with a home that she can write, as `--keep-home` leaves it."""
    host.sh("useradd -m -s /bin/bash erin")
    host.admin("user", "add", "erin", "--keep-home", "--key", "-", stdin=host.public_key())
    return host


def home_file(host: Host, path: str, text: str) -> None:
    host.sh(f"install -d -o erin -g erin $(dirname /home/erin/{path})")
    host.exec("tee", f"/home/erin/{path}", stdin=text)
    host.exec("chown", "-R", "erin:erin", "/home/erin")


def at_prompt(host: Host, user: str = "alice") -> pexpect.spawn:
    terminal = host.spawn(user)
    terminal.expect_exact(PROMPT)
    return terminal


def leave(terminal: pexpect.spawn) -> None:
    terminal.send("\x03")
    terminal.expect_exact(PROMPT)
    terminal.send("exit\r")
    terminal.expect(pexpect.EOF)
    terminal.close()


def children_of_shells(host: Host, user: str = "alice") -> str:
    """Every process of *user* that is not sshd's, the service manager's, or the shell itself."""
    own = ("sshd", "vmshell", "systemd", "(sd-pam)", "dbus-daemon")
    rows = host.exec("ps", "-u", user, "-o", "args=", check=False).stdout.splitlines()
    return "\n".join(row for row in rows if not any(word in row for word in own))


def test_A14_nothing_is_left_to_talk_to_after_the_end(erin: Host) -> None:
    """PYTHONINSPECT in a file of the user's, then Ctrl-D: the process is gone, and no `>>>` came."""
    home_file(erin, ".pam_environment", "PYTHONINSPECT DEFAULT=1\nPYTHONSTARTUP DEFAULT=/home/erin/start.py\n")
    home_file(erin, "start.py", f"open('{MARKER}', 'w')\n")
    terminal = at_prompt(erin, "erin")
    terminal.send("\x04")
    terminal.expect(pexpect.EOF)
    assert ">>>" not in str(terminal.before)
    terminal.close()
    assert terminal.exitstatus == 0


def test_A15_A16_no_module_of_the_users_is_loaded(erin: Host) -> None:
    """usercustomize and .pth files in the user site, json.py and socket.py in the home that sshd starts us in."""
    mark = f"open('{MARKER}', 'w')\n"
    site = erin.exec(
        "/usr/bin/python3", "-c", "import sys; print('.local/lib/python%d.%d/site-packages' % sys.version_info[:2])"
    ).stdout.strip()
    for path in (
        f"{site}/usercustomize.py",
        f"{site}/sitecustomize.py",
        "json.py",
        "socket.py",
        "vmshell.py",
        "prompt_toolkit.py",
    ):
        home_file(erin, path, mark)
    home_file(erin, f"{site}/evil.pth", f"import os; {mark}")
    home_file(erin, ".pam_environment", f"PYTHONPATH DEFAULT=/home/erin:/home/erin/{site}\nPYTHONHOME DEFAULT=/home/erin\n")
    assert erin.run("erin", "list")[0] == 0
    leave(at_prompt(erin, "erin"))


def test_A17_the_installed_first_line(host: Host) -> None:
    """One word for Python's flags (`-I -S` locks everyone out), an absolute interpreter, signals ignored until handled."""
    first = host.exec("head", "-1", "/usr/local/bin/vmshell").stdout
    assert first == "#!/usr/bin/env -S --ignore-signal=INT,QUIT,TSTP /usr/bin/python3 -IS\n"


@pytest.mark.parametrize("keys", ["\x18\x05", "\x1b!", "\x1bv", "\x1b[18~", "\x1a", "\x1b:", "\x15!sh\r", "\x12sh\r"])
def test_A19_A24_no_key_starts_a_program(host: Host, keys: str) -> None:
    """Editor, system prompt, vi's `v`, suspend, reverse search: after each there is still our prompt and no other process."""
    terminal = at_prompt(host)
    terminal.send("whoami")
    terminal.send(keys)
    time.sleep(0.3)
    assert children_of_shells(host) == ""
    leave(terminal)


def test_A19_A22_editor_and_pager_of_the_environment_are_never_run(erin: Host) -> None:
    program = f"/usr/bin/touch {MARKER}"
    home_file(erin, ".pam_environment", f'PAGER DEFAULT="{program}"\nEDITOR DEFAULT="{program}"\nVISUAL DEFAULT="{program}"\n')
    terminal = at_prompt(erin, "erin")
    for line in ("help", "help boot", "images", "\x18\x05"):
        terminal.send(line + "\r")
        time.sleep(0.2)
    leave(terminal)


def test_A20_no_history_on_disk(erin: Host) -> None:
    before = erin.sh("find /home/erin -newermt '1 second ago' -o -name '*history*'")
    terminal = at_prompt(erin, "erin")
    terminal.send("list\rwhoami\r")
    leave(terminal)
    assert erin.sh("find /home/erin -name '*history*'") == ""
    assert before == ""


def test_A21_tab_shows_no_file_and_inputrc_types_nothing(erin: Host) -> None:
    home_file(erin, ".inputrc", '"x": "whoami\\n"\n')
    terminal = at_prompt(erin, "erin")
    terminal.send("console /etc/\t\t")
    time.sleep(0.5)
    terminal.send("x")
    terminal.send("\x03")
    terminal.expect_exact(PROMPT)
    assert "passwd" not in str(terminal.before)
    assert "uid" not in str(terminal.before)
    leave(terminal)


def test_A23_signals_while_it_starts(host: Host) -> None:
    """Ctrl-C and Ctrl-\\ typed at random moments of the login: a prompt or the end, never a traceback."""
    rng = random.Random(23)
    for _ in range(25):
        terminal = host.spawn("alice")
        time.sleep(rng.random() * 0.5)
        for _ in range(4):
            terminal.send(rng.choice("\x03\x1c"))
            time.sleep(rng.random() * 0.03)
        found = terminal.expect_exact([PROMPT, pexpect.EOF])
        assert "Traceback" not in str(terminal.before)
        assert "File " not in str(terminal.before)
        if found == 0:
            leave(terminal)
        else:
            terminal.close()


def test_A24_suspended_under_su_it_is_still_ours(host: Host) -> None:
    terminal = host.console("su", "-", "alice")
    terminal.expect_exact(PROMPT)
    terminal.send("\x1a")
    time.sleep(0.3)
    terminal.send("whoami\r")
    terminal.expect("alice")
    leave(terminal)


def test_A25_a_lost_terminal_ends_it_within_two_seconds(host: Host) -> None:
    terminal = at_prompt(host)
    terminal.kill(9)  # the client, with the connection
    terminal.close(force=True)
    time.sleep(2)
    assert host.exec("pgrep", "-u", "alice", "-f", "bin/vmshell", check=False).stdout == ""


def test_A26_A39_random_lines_never_show_our_inside(host: Host) -> None:
    """Two thousand lines of what a person, a cat or a fuzzer may type."""
    rng = random.Random(26)
    words = [
        "list",
        "boot",
        "new",
        "--image",
        "%s",
        "{0}",
        "{x.__class__}",
        "$(id)",
        "`id`",
        "!sh",
        "\\",
        '"',
        "'",
        "a" * 300,
        "--",
        "-c",
        "\x7f",
    ]
    lines = [" ".join(rng.choice(words) for _ in range(rng.randrange(1, 7))) for _ in range(2000)]
    lines = [line for line in lines if not line.split()[0].startswith(("new", "boot"))]
    done = host.run("alice", "", stdin="\n".join(lines) + "\nexit\n", timeout=120)
    assert "Traceback" not in done[1] + done[2]
    assert 'File "' not in done[1] + done[2]
    assert "uid=" not in done[1] + done[2]


@pytest.mark.parametrize("text", ["caf\udce9", "\x1b[31mlist", "list\x1b]0;x\x07", "\udcff\udcfe", "li\u202est", "x" * 300])
def test_A27_what_is_echoed_is_printable(host: Host, text: str) -> None:
    status, out, err = host.run("alice", text)
    assert status != 0
    assert all(char.isprintable() or char == "\n" for char in out + err), ascii(out + err)


@pytest.mark.parametrize(
    "term", ["", "dumb", "vt100", "xterm-256color", "linux", "../../etc/passwd", "x" * 500, "\x1b[2J", "nosuchterm", "%s"]
)
def test_A28_any_terminal_gets_a_prompt(host: Host, term: str) -> None:
    terminal = pexpect.spawn(
        "/usr/bin/env",
        [f"TERM={term}", *host.ssh(), "-tt", f"alice@{host.name}"],
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
    )
    terminal.expect_exact(PROMPT)
    terminal.send("whoami\r")
    terminal.expect("alice")
    leave(terminal)


def test_A29_a_huge_command_is_refused_at_once(host: Host) -> None:
    began = time.monotonic()
    status, out, err = host.run("alice", "list " + "x" * 100_000)
    assert status == 2
    assert len(out + err) < 1000
    assert time.monotonic() - began < 5


TRICKS = [
    "list; touch {m}",
    "list && touch {m}",
    "list | touch {m}",
    "list\ntouch {m}",
    "list $(touch {m})",
    "list `touch {m}`",
    "list > {m}",
    "$(touch {m})",
    "`touch {m}`",
    "() {{ touch {m}; }}",
    "list &touch {m}",
    "list \\\ntouch {m}",
    "'list' ; touch {m}",
    "list\x16\ntouch {m}",
    "list <(touch {m})",
    "exec touch {m}",
    "! touch {m}",
    "!touch {m}",
    "env touch {m}",
    "sh -c 'touch {m}'",
    "/bin/sh -c 'touch {m}'",
    "kvm -monitor stdio",
    "list --json=$(touch {m})",
    "help $(touch {m})",
    "-c 'touch {m}'",
    "--session list",
    "--layout x list",
    "list --layout /tmp:/tmp:/tmp:/tmp:1",
    'python3 -c \'open("{m}","w")\'',
    "__import__('os').system('touch {m}')",
    "console $(touch {m})",
    "new a --image ../../{m}",
    ": ; touch {m}",
]


@pytest.mark.parametrize("trick", TRICKS)
def test_A38_no_text_is_ever_a_program(host: Host, trick: str) -> None:
    """The corpus of ways around filtering shells: each is a usage error here, because there is no shell to get around to."""
    status, out, err = host.run("alice", trick.format(m=MARKER))
    assert status != 0
    assert "Traceback" not in err
    status, _, _ = host.run("alice", "", stdin=trick.format(m=MARKER) + "\n")
    assert host.exec("test", "-e", MARKER, check=False).returncode != 0


def test_A38_A39_the_source_has_nothing_to_evaluate_with() -> None:
    """No eval, exec, pickle, shell or `str.format` on what came in, in any process of ours."""
    banned = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    for path in sorted((TREE / "vmshell").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in banned, f"{path}:{node.lineno}"
                assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "marshal", "yaml", "cmd", "code", "pydoc", "readline"} & set(names), f"{path}:{node.lineno}"
    assert not re.search(
        r"enable_open_in_editor=True|enable_system_prompt=True|enable_suspend=True",
        (TREE / "vmshell/shell/ui/prompt.py").read_text(),
    )
