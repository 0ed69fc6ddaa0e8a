"""The shell without a terminal: how sshd calls it, exit statuses, environment, descriptors.

Threats A01 to A05, A11, A13 to A16, A26 to A31, A34, A35, A38.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import ROW, FakeBroker
from tests.fakes.shell import REPOSITORY, environment, run, starter
from vmshell.layout import Layout
from vmshell.refusals import NoSuchVm, OverLimit, TimedOut, VmBusy, WrongState


@pytest.fixture
def broker(layout: Layout) -> Iterator[FakeBroker]:
    with FakeBroker(layout) as fake:
        fake.answers["list"] = {"vms": [ROW], "more": False}
        fake.answers["console"] = lambda body: NoSuchVm(vm=str(body["vm"]))
        yield fake


# --- how it is called ---------------------------------------------------------------------------------------------------


def test_words_text_and_forced_command_are_the_same_request(broker: FakeBroker, short_tmp: Path) -> None:
    own = starter(short_tmp)
    outputs = [
        run(short_tmp, broker.layout, "list"),
        run(short_tmp, broker.layout, "-c", "list"),
        run(short_tmp, broker.layout, "-c", own, SSH_ORIGINAL_COMMAND="list"),
        run(short_tmp, broker.layout, "-c", "/usr/local/bin/vmshell", SSH_ORIGINAL_COMMAND="list"),
        run(short_tmp, broker.layout, "-c", own, input=b"list\n"),
        run(short_tmp, broker.layout, input=b"list\nexit\nlist\n"),
    ]
    for done in outputs:
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == outputs[0].stdout
    assert b"web1" in outputs[0].stdout
    assert broker.verbs() == ["list"] * 6


def test_a_command_that_is_not_the_forced_one_ignores_the_variable(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "-c", "images --json", SSH_ORIGINAL_COMMAND="kill web1")
    assert broker.verbs() == ["images"] and done.returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "id; cat /etc/passwd",
        "/usr/lib/openssh/sftp-server",
        "internal-sftp",
        "scp -f /etc/passwd",
        "rsync --server -e.LsfxC . /",
        "git-upload-pack 'x'",
        "/bin/sh ~/.ssh/rc",
        "$(id)",
        "`id`",
        "&& id",
        "list\nid",
        "list;id",
        "list|id",
        "list && id",
        "()",
        "!id",
        "sh",
        "id",
        "caf\udce9 \x1b[31m",
    ],
)
def test_other_programs_are_refused_with_status_2_and_no_output(broker: FakeBroker, short_tmp: Path, text: str) -> None:
    junk = b"\0\0\0\5\1binary junk"
    for done in (
        run(short_tmp, broker.layout, "-c", text, input=junk),
        run(short_tmp, broker.layout, "-c", starter(short_tmp), input=junk, SSH_ORIGINAL_COMMAND=text),
    ):
        assert (done.returncode, done.stdout) == (2, b""), text
        assert done.stderr.startswith(b"vmshell: ") and done.stderr.decode().replace("\n", "").isprintable()


def test_no_process_is_started_for_any_text(broker: FakeBroker, short_tmp: Path) -> None:
    """A01, A38: after the interpreter's own start there is no execve and no fork."""
    trace = short_tmp / "trace"
    for text in ("id; cat /etc/passwd", "list", "`id`", "console web1 --escape ^A", "connect web1:22", "ssh `id`@web1"):
        subprocess.run(
            [
                "strace",
                "-f",
                "-qq",
                "-e",
                "trace=execve,fork,vfork,clone,clone3",
                "-o",
                str(trace),
                starter(short_tmp),
                "--layout",
                broker.layout.to_args(),
                "-c",
                text,
            ],
            env=environment(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        calls = [line for line in trace.read_text().splitlines() if "(" in line and "ENOENT" not in line]
        assert len(calls) == 2 and all("execve" in line for line in calls), calls  # env, python


def test_a_hundred_kilobytes_are_refused_quickly(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "-c", "x" * 100_000, timeout=60)
    assert done.returncode == 2 and b"limit is 4096" in done.stderr and len(done.stderr) < 1024


def test_arguments_that_make_no_sense(layout: Layout, short_tmp: Path) -> None:
    for arguments in (["-c"], ["-c", "list", "more"], ["-x"], ["--nonsense"], ["-"], ["a"] * 1000):
        done = run(short_tmp, layout, *arguments)
        assert done.returncode == 2, arguments
        assert b"Traceback" not in done.stderr


def test_login_program_names(broker: FakeBroker, short_tmp: Path) -> None:
    """login and su put `-vmshell` or nothing at all into argv[0]; a script's interpreter never sees it (A34)."""
    for name in ("-vmshell", "", "x" * 300):
        done = subprocess.run(
            # Python gives nobody an empty name.
            ["bash", "-c", 'exec -a "$0" "$@"', name, starter(short_tmp), "--layout", broker.layout.to_args(), "-c", "list"],
            env=environment(),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0 and b"web1" in done.stdout


# --- what comes out ------------------------------------------------------------------------------------------------------


def test_json_is_one_document(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "list", "--json")
    assert json.loads(done.stdout) == {"vms": [ROW]}
    broker.answers["info"] = {**ROW, "note": "\x1b]0;x\a"}
    done = run(short_tmp, broker.layout, "info", "web1", "--json")
    assert json.loads(done.stdout)["note"] == "\x1b]0;x\a" and b"\x1b" not in done.stdout


def test_pages_are_put_together(broker: FakeBroker, short_tmp: Path) -> None:
    def page(body: dict[str, object]) -> dict[str, object]:
        start = int(str(body.get("after", "alice/vm0")).removeprefix("alice/vm") or 0)
        return {"vms": [{**ROW, "name": f"vm{n}"} for n in range(start + 1, start + 101)], "more": start < 200}

    broker.answers["list"] = page
    done = run(short_tmp, broker.layout, "list", "--json")
    assert [row["name"] for row in json.loads(done.stdout)["vms"]] == [f"vm{n}" for n in range(1, 301)]


def test_what_others_chose_is_escaped(broker: FakeBroker, short_tmp: Path) -> None:
    broker.answers["list"] = {"vms": [{**ROW, "note": "\x1b[2Jcleared \u202e\n", "owner": "a\x07"}], "more": False}
    error = {"code": "x\x1b", "text": "\x1b]0;t\a", "at": 5}
    broker.answers["info"] = {**ROW, "last_error": error, "devices": [{"name": "\x1b"}]}
    for arguments in (["list", "--all"], ["info", "web1"]):
        done = run(short_tmp, broker.layout, *arguments)
        assert done.returncode == 0 and done.stdout.decode().replace("\n", "").isprintable()
        assert b"\\x1b" in done.stdout


def test_nonsense_from_the_broker_is_survived(broker: FakeBroker, short_tmp: Path) -> None:
    nonsense: tuple[dict[str, object], ...] = (
        {},
        {"vms": None, "images": 7, "devices": "x", "limits": [], "used": {}, "lacks": 3},
        {"vms": [1, {}], "images": [{}], "more": True},
    )
    for junk in nonsense:
        for verb in ("list", "images", "info web1", "whoami", "version", "boot web1", "shutdown web1"):
            broker.answers[verb.split()[0]] = lambda body, junk=junk: {"more": False} if body.get("after") else junk
            done = run(short_tmp, broker.layout, "-c", verb)
            assert b"Traceback" not in done.stderr and b"inside vmshell" not in done.stderr, (verb, junk, done.stderr)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoSuchVm(vm="web9"), 3),
        (WrongState(vm="web1", state="off", verb="console", needed="running"), 4),
        (OverLimit(vm="web1", asked=1, what="VM", limit=1, used=1, rule="vms_max", allowed="nothing"), 5),
        (VmBusy(vm="web1", state="starting"), 6),
        (TimedOut(vm="web1", what="switch itself off", seconds=60), 8),
    ],
)
def test_exit_statuses(broker: FakeBroker, short_tmp: Path, error: Exception, status: int) -> None:
    broker.answers["info"] = error
    done = run(short_tmp, broker.layout, "-c", "info web1")
    assert (done.returncode, done.stdout) == (status, b"")
    assert str(error) in done.stderr.decode()


def test_destroy_asks_which(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "-c", "destroy web1")
    assert done.returncode == 2 and b"`kill web1`" in done.stderr and b"`rm web1`" in done.stderr
    assert broker.requests == []


def test_rm_without_a_terminal_wants_yes(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "-c", "rm web1", input=b"web1\n")
    assert done.returncode == 2 and broker.requests == []
    broker.answers["rm"] = {"name": "web1", "state": "removed"}
    done = run(short_tmp, broker.layout, "-c", "rm web1 --yes")
    assert (done.returncode, done.stdout) == (0, b"web1: removed\n")


def test_no_broker(layout: Layout, short_tmp: Path) -> None:
    system = Layout(etc=layout.etc, state=layout.state, run=layout.run, log=layout.log, embedded=False)
    for request in ("list", "lsit"):
        done = run(short_tmp, system, "-c", request)
        assert b"Traceback" not in done.stderr
        assert done.returncode == (69 if request == "list" else 2)


def test_a_broker_that_is_not_root_is_not_trusted(layout: Layout, short_tmp: Path) -> None:
    """D24: in system mode whoever put a socket there first must be root."""
    if os.geteuid() != 0:
        pytest.skip("needs root to have a socket of somebody else's")
    system = Layout(etc=layout.etc, state=layout.state, run=f"{short_tmp}/bob", log=layout.log, embedded=False)
    os.makedirs(system.run)
    os.chown(system.run, 4002, 4002)
    code = (
        "import os, socket; os.setresgid(4002, 4002, 4002); os.setresuid(4002, 4002, 4002)\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(os.sys.argv[1]); s.listen()\n"
        "print('ready', flush=True)\n"
        'c, _ = s.accept(); c.send(b\'{"id":1,"ok":{"vms":[],"more":false}}\'); c.recv(100)'
    )
    with subprocess.Popen([sys.executable, "-c", code, system.broker_socket], stdout=subprocess.PIPE) as bob:
        try:
            assert bob.stdout is not None and bob.stdout.readline() == b"ready\n"
            done = run(short_tmp, system, "-c", "list")
        finally:
            bob.kill()
    assert done.returncode == 69 and b"somebody else" in done.stderr


def test_a_restarted_broker_is_asked_again(broker: FakeBroker, short_tmp: Path) -> None:
    """Between two requests of one shell the broker goes away and comes back: nobody notices."""
    with subprocess.Popen(
        [starter(short_tmp), "--layout", broker.layout.to_args()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        for _ in range(2):
            shell.stdin.write(b"boot web1\n")
            shell.stdin.flush()
            assert shell.stdout.readline() == b"web1: done\n"
            broker.drop_clients()
        shell.stdin.close()
        assert shell.wait(20) == 0
    assert broker.verbs() == ["boot", "boot"]


# --- what it inherits ------------------------------------------------------------------------------------------------------


def test_hostile_environment_changes_nothing(broker: FakeBroker, short_tmp: Path) -> None:
    marker = short_tmp / "marker"
    home = short_tmp / "home"
    site = home / ".local/lib/python3.11/site-packages"
    site.mkdir(parents=True)
    for path in (
        home / "json.py",
        home / "socket.py",
        home / "termios.py",
        site / "usercustomize.py",
        site / "sitecustomize.py",
        site / "x.pth",
    ):
        path.write_text(f"import os; os.mkdir({str(marker)!r})\n")
    hostile = {
        "HOME": str(home),
        "PYTHONPATH": str(home),
        "PYTHONHOME": str(home),
        "PYTHONSTARTUP": str(home / "json.py"),
        "PYTHONINSPECT": "1",
        "PYTHONUSERBASE": str(home / ".local"),
        "PYTHONBREAKPOINT": "os.system",
        "PYTHONPYCACHEPREFIX": str(home),
        "PYTHONWARNINGS": "x::y",
        "PAGER": "touch " + str(marker),
        "EDITOR": "touch",
        "VISUAL": "touch",
        "BASH_ENV": "x",
        "ENV": "x",
        "IFS": "x",
        "LC_ALL": "xx_YY",
        "LC_EVIL": "\x1b[2J",
        "LANG": "tr_TR.ISO-8859-9",
        "TERMINFO": str(home),
        "TERM": "../../x",
        "COLUMNS": "-1",
        "LINES": "999999999",
        "SHELL": "/bin/sh",
        "PATH": str(home),
        "PROMPT_TOOLKIT_COLOR_DEPTH": "x",
        "NO_COLOR": "",
        "XDG_RUNTIME_DIR": "relative",
    }
    done = subprocess.run(
        [starter(short_tmp), "--layout", broker.layout.to_args()],
        input=b"list\nhelp\n",
        env=hostile,
        cwd=home,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and b"web1" in done.stdout and done.stderr == b""
    assert not marker.exists()


def test_the_environment_is_an_allow_list(layout: Layout, short_tmp: Path) -> None:
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from vmshell.shell.startup import process\n"
        "print(process.reduce_environment(session=False), sorted(os.environ))"
    )
    many = {f"VAR{n}": "x" for n in range(30)} | {
        "LD_BIND_NOW": "1",
        "HOME": "/x",
        "SSH_ORIGINAL_COMMAND": "list",
        "TERM": "vt100",
    }
    done = subprocess.run(
        [sys.executable, "-IS", "-c", code, str(REPOSITORY)], env=many, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "list ['LC_ALL', 'PATH', 'PROMPT_TOOLKIT_NO_CPR', 'TERM']"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_missing_descriptors(broker: FakeBroker, short_tmp: Path, closed: str) -> None:
    command = f'"$0" --layout "$1" -c "info web1" {closed}; echo $? >&9'
    broker.answers["info"] = ROW
    done = subprocess.run(
        ["/bin/sh", "-c", f"( {command} ) 9>&1", starter(short_tmp), broker.layout.to_args()],
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert done.stdout.endswith(b"0\n")
    assert broker.verbs() == ["info"]


def test_a_directory_that_is_gone(broker: FakeBroker, short_tmp: Path) -> None:
    gone = short_tmp / "gone"
    gone.mkdir()
    done = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'cd "$0" && rmdir "$0" && exec "$@"',
            str(gone),
            starter(short_tmp),
            "--layout",
            broker.layout.to_args(),
            "list",
        ],
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and b"web1" in done.stdout


def test_a_reader_that_leaves(broker: FakeBroker, short_tmp: Path) -> None:
    broker.answers["list"] = {"vms": [{**ROW, "name": f"v{n}"} for n in range(100)], "more": False}
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" --layout "$1" list | true', starter(short_tmp), broker.layout.to_args()],
        env=environment(),
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""


@pytest.mark.slow
def test_ten_thousand_random_lines_never_show_a_traceback(broker: FakeBroker, short_tmp: Path) -> None:
    """A26, through the whole program: one process, every line refused or answered."""
    chance = random.Random(26)
    alphabet = bytes(range(1, 256)).replace(b"\n", b"")
    words = [
        b"list",
        b"info",
        b"web1",
        b"--json",
        b"help",
        b"boot",
        b"--wait",
        b"'",
        b"new",
        b"--image",
        b"whoami",
        b"rm",
        b"?",
        b"console",
    ]
    lines = []
    for _ in range(10_000):
        if chance.random() < 0.5:
            lines.append(bytes(chance.choices(alphabet, k=chance.randrange(40))))
        else:
            lines.append(b" ".join(chance.choices(words, k=chance.randrange(1, 6))))
    lines = [line for line in lines if not line.strip().startswith((b"exit", b"quit", b"logout"))]
    broker.answers["boot"] = NoSuchVm(vm="x")
    done = run(short_tmp, broker.layout, input=b"\n".join(lines) + b"\n", timeout=280)
    assert b"Traceback" not in done.stderr and b'File "' not in done.stderr and b"inside vmshell" not in done.stderr
    assert len(done.stderr.splitlines()) > 4000
    assert done.stderr.decode().replace("\n", "").isprintable()


# --- the starter -----------------------------------------------------------------------------------------------------------


def test_the_first_line_is_exactly_the_one_that_was_judged() -> None:
    """A17: the kernel passes one argument; `-I -S` with a blank would lock everyone out."""
    first = (REPOSITORY / "etc/bin/vmshell").read_text().splitlines()[0]
    assert first == "#!/usr/bin/env -S --ignore-signal=INT,QUIT,TSTP /usr/bin/python3 -IS"


def test_the_man_sections_are_printed() -> None:
    command = [sys.executable, "-IS", str(REPOSITORY / "vmshell/__main__.py"), "shell", "--verbs-man"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(".SH VERBS") and done.stderr == ""
