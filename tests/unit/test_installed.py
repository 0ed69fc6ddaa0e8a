"""What the processes of an installed host rely on: the mark of the state's version, the folder of code that a process holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmshell.installed import PACKAGE_DIR
from vmshell.layout import STATE_VERSION, Layout, read_state_version

TREE = os.path.dirname(PACKAGE_DIR)
HELD = "*(os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd'))"


@pytest.mark.parametrize(
    ("mark", "version"),
    [
        ("state 2 vmshell 0.1.0\n", 2),
        ("state 13\n", 13),
        ("", 0),
        ("state\n", 0),
        ("state two\n", 0),
        ("vmshell 2\n", 0),
        ("\xff\xfe state 2\n", 0),
    ],
)
def test_the_mark_of_the_state(layout: Layout, mark: str, version: int) -> None:
    os.makedirs(layout.state)
    Path(layout.state_mark).write_text(mark, encoding="latin-1")
    assert read_state_version(layout) == version


def test_state_without_a_mark_is_of_no_version(layout: Layout) -> None:
    assert read_state_version(layout) == 0 != STATE_VERSION


@pytest.mark.parametrize(
    ("mark", "said"), [("state 3 vmshell 9\n", "is of version 3, and"), ("state 1\n", "is not marked"), (None, "is not marked")]
)
def test_a_broker_does_not_start_on_state_of_another_version(layout: Layout, mark: str | None, said: str) -> None:
    system = Layout(etc=layout.etc, state=layout.state, run=layout.run, log=layout.log, embedded=False)
    os.makedirs(system.state)
    if mark is not None:
        Path(system.state_mark).write_text(mark)
    command = [sys.executable, "-IS", f"{PACKAGE_DIR}/__main__.py", "broker", system.to_args()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and said in done.stderr
    assert sorted(os.listdir(system.state)) == (["version"] if mark else []), "and nothing was made"


def hold(closed: str = "") -> list[int]:
    """The descriptors of the code's folder that a new process has, after `hold_code`, begun with those in *closed* closed."""
    script = f"import sys; sys.path.insert(0, {TREE!r}); from vmshell.installed import hold_code; hold_code({TREE!r})\n"
    script += f"import os; out = os.open('/proc/self/fd', os.O_RDONLY); folder = {TREE!r}\n"
    script += "held = [n for n in os.listdir(out) if os.path.realpath(f'/proc/self/fd/{n}') == folder]\n"
    script += "os.write(int(sys.argv[1]), ' '.join(held).encode())"
    reader, writer = os.pipe()
    command = ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-IS", "-c", script, str(writer)]
    subprocess.run(command, pass_fds=(writer,), check=True, timeout=60)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return [int(number) for number in answer.read().split()]


@pytest.mark.parametrize("closed", ["", "<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_held_code_is_never_standard_input_or_output(closed: str) -> None:
    """Where one of these is closed, somebody else puts /dev/null in its place (`open_missing_descriptors`)."""
    (number,) = hold(closed)
    assert number > 2


@pytest.mark.parametrize(("process", "words"), [("shell", ["__main__.py", "shell"]), ("launcher", ["launcher/__main__.py"])])
def test_the_starter_follows_the_link_once(tmp_path: Path, process: str, words: list[str]) -> None:
    """Who began with a version imports that one's modules, also when the link leads elsewhere by then."""
    for version in ("a", "b"):
        package = tmp_path / version / "vmshell"
        package.mkdir(parents=True)
        (package / process).mkdir()
        for name in ("__init__.py", "installed.py", words[0]):
            (package / name).write_bytes(Path(PACKAGE_DIR, name).read_bytes())
        (package / process / "late.py").write_text(f"import os; print('{version}', {HELD})\n")
        move = f"import os; os.symlink('b', '{tmp_path}/new'); os.rename('{tmp_path}/new', '{tmp_path}/current')"
        (package / process / "main.py").write_text(f"def main(argv):\n    {move}\n    from . import late\n    return 0\n")
    (tmp_path / "current").symlink_to("a")
    command = [sys.executable, "-IS", f"{tmp_path}/current/vmshell/{words[0]}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[0] == "a", done.stderr
    assert f"{tmp_path}/a" in done.stdout.split()[1:], "and holds its folder"
