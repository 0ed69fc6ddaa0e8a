"""The house rules as tests: linters, types, who imports whom, how much privileged code there is, and where `import pam` leads."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
# A leaf may import the leaves before it in this order.
LEAF_ORDER = [
    *("bpf", "brokeraccount", "confine", "descriptors", "errors", "refusals", "consoles", "installed", "layout", "numbering"),
    *("hardware", "names", "policyfile", "servicemanager", "spawn", "encoding", "packets", "wire", "fields", "launcher_messages"),
    "messages",
]
LEAVES = set(LEAF_ORDER)
# One folder is one process, but for two pure libraries, which import leaves only: the launch line is for those who start QEMU,
# the model (definition and policy) for those who read them.
LIBRARIES = {"launch": {"broker", "launcher", "probe"}, "model": {"admin", "broker", "dnsmasq", "front", "shell", "tapnet"}}
THIRD_PARTY = {"shell": {"prompt_toolkit", "pexpect"}, "tapnet": {"pyroute2"}}
# What runs as root, in two heaps: the code that acts, and pure code that only decides (what a message or a launch plan may be;
# text in, value out, tested without a host). Shell counts where root runs it.
PRIVILEGED_MOST = 1550
PRIVILEGED = {
    "acting": (
        785,
        (
            *("vmshell/__init__.py", "vmshell/installed.py", "vmshell/packets.py", "vmshell/descriptors.py"),
            *("vmshell/policyfile.py", "vmshell/brokeraccount.py", "vmshell/servicemanager.py", "vmshell/spawn.py"),
            *("vmshell/launcher/*.py", "pam/*", "etc/migrate.sh"),
        ),
    ),
    "deciding": (
        770,
        (
            *("vmshell/bpf.py", "vmshell/errors.py", "vmshell/encoding.py", "vmshell/fields.py"),
            *("vmshell/numbering.py", "vmshell/hardware.py", "vmshell/launcher_messages.py", "vmshell/launch/*.py"),
        ),
    ),
}
# Modules that no root process has any use for and every reviewer would ask about.
BANNED_AS_ROOT = {"pickle", "shelve", "marshal", "subprocess", "importlib", "runpy", "code", "pty", "xml", "urllib", "http"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}


def sources() -> list[Path]:
    return sorted([*TREE.glob("vmshell/**/*.py"), *TREE.glob("tapnet/**/*.py")])


def place(path: Path) -> str:
    """Which process (or `leaf`) a file belongs to."""
    parts = path.relative_to(TREE).parts
    if parts[0] == "tapnet":
        return "tapnet"
    return parts[1] if len(parts) > 2 else "leaf"


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that *path* imports, as an absolute dotted name, with its line."""
    package = path.relative_to(TREE).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def arrow_problem(path: Path, name: str) -> str:
    """Why *path* may not import *name*, or an empty string."""
    here, parts = place(path), name.split(".")
    top = parts[0]
    if top == "tapnet":
        # The starter of every process is nobody's: it becomes one of them.
        return "" if here == "tapnet" or path.stem == "__main__" else "nothing imports tapnet"
    if top == "vmshell":
        target = parts[1] if len(parts) > 1 else ""
        if target in LEAVES or target in ("", "__version__"):
            if here == "leaf" and path.stem in LEAF_ORDER and target in LEAF_ORDER:
                return "" if LEAF_ORDER.index(target) < LEAF_ORDER.index(path.stem) else f"leaf {path.stem} comes before {target}"
            return ""
        if here == "leaf":
            return "" if path.stem == "__main__" else "leaves import leaves only"
        if target == here or here in LIBRARIES.get(target, ()):
            return ""
        return f"{here} may not import {target}"
    if top in sys.stdlib_module_names:
        banned = here in ("leaf", "broker", "launcher", *LIBRARIES) and top in BANNED_AS_ROOT
        return f"{top} has no place in a root process" if banned else ""
    return "" if top in THIRD_PARTY.get(here, set()) else f"{here} may not import {top}"


def test_import_arrows() -> None:
    problems = [
        f"{path.relative_to(TREE)}:{line}: {problem}"
        for path in sources()
        for line, name in imports(path)
        if (problem := arrow_problem(path, name))
    ]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "name", "allowed"),
    [
        ("vmshell/broker/main.py", "vmshell.wire.recv", True),
        ("vmshell/broker/main.py", "vmshell.launch.plan", True),
        ("vmshell/broker/main.py", "vmshell.relay.loop", False),
        ("vmshell/broker/main.py", "subprocess", False),
        ("vmshell/broker/main.py", "prompt_toolkit", False),
        ("vmshell/shell/ui/prompt.py", "prompt_toolkit", True),
        ("vmshell/shell/ui/prompt.py", "vmshell.launch.argv", False),
        ("vmshell/relay/loop.py", "tapnet.links", False),
        ("vmshell/wire.py", "vmshell.messages", False),
        ("vmshell/messages.py", "vmshell.wire", True),
        ("tapnet/links.py", "vmshell.broker.host.processes", False),
        ("tapnet/rootpolicy.py", "vmshell.model.policy", True),
        ("vmshell/dnsmasq/main.py", "vmshell.model.policy", True),
        ("vmshell/dnsmasq/main.py", "vmshell.broker.network.dnsmasq", False),
    ],
)
def test_the_arrows_tell_good_from_bad(path: str, name: str, allowed: bool) -> None:
    assert (arrow_problem(TREE / path, name) == "") is allowed


def test_the_launch_line_is_pure() -> None:
    """It decides what QEMU may do; to be tested against golden files it must not look at the host."""
    for path in TREE.glob("vmshell/launch/*.py"):
        used = {name.split(".")[0] for _, name in imports(path)}
        assert not used & {"os", "socket", "subprocess", "pathlib", "shutil", "tempfile"}, path


def test_no_calls_a_reviewer_would_ask_about() -> None:
    """A39: nothing turns text into code, anywhere."""
    problems = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                problems.append(f"{path.relative_to(TREE)}:{node.lineno}: {node.func.id}()")
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("os.system", "os.popen", "yaml.load"):
                problems.append(f"{path.relative_to(TREE)}:{node.lineno}: {ast.unparse(node.func)}()")
            if any(word.arg == "shell" for word in node.keywords):
                problems.append(f"{path.relative_to(TREE)}:{node.lineno}: shell=")
    assert not problems, "\n".join(problems)


def test_the_broker_never_asks_the_hosts_accounts_itself() -> None:
    """G19: its loop serves everybody, and a directory may be silent for half a minute; the accounts helper may wait."""
    problems = []
    for path in TREE.glob("vmshell/broker/**/*.py"):
        problems += [
            f"{path.name}:{line}: {name}" for line, name in imports(path) if name.split(".")[0] in ("pwd", "grp", "ctypes")
        ]
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)}
        problems += [f"{path.name}: {name}()" for name in calls & {"os.getgrouplist", "os.initgroups", "os.path.expanduser"}]
    assert not problems, "\n".join(problems)


# What makes a socket of a network; the one file of the broker's with one is for session mode, where the broker is the user.
NETWORK_SOCKETS = {"AF_INET", "AF_INET6", "AF_PACKET", "create_connection", "create_server", "getaddrinfo"}
WITH_NETWORK_SOCKETS = {"vmshell/broker/network/passt.py"}


def test_the_broker_speaks_to_no_network() -> None:
    """N6: `connect` leads to a guest by the user's own shell, whose uid the packet filter asks for."""
    found = set()
    for path in TREE.glob("vmshell/broker/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", "") or getattr(node, "id", "")
            bare = isinstance(node, ast.Call) and ast.unparse(node) == "socket.socket()"
            if bare or name in NETWORK_SOCKETS:
                found.add(str(path.relative_to(TREE)))
    assert found == WITH_NETWORK_SOCKETS


def test_modules_say_where_they_run() -> None:
    missing = [
        str(path.relative_to(TREE))
        for path in sources()
        if path.stem not in ("__init__", "__main__") and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not missing


def test_files_that_are_named_are_there() -> None:
    """What was moved is called by its new name also where only people read it: in docstrings and comments."""
    wrong = []
    for path in sources():
        roots = (TREE, *[above for above in path.parents if above.is_relative_to(TREE)])
        for name in re.findall(r"`([\w./]+\.py)`", path.read_text(encoding="utf-8")):
            if not any((root / name).is_file() for root in roots):
                wrong.append(f"{path.relative_to(TREE)}: {name}")
    assert not wrong, "\n".join(wrong)


def code_lines(path: Path) -> int:
    """Lines that hold code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(1 for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    skipped: set[int] = set()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(
        1
        for number, line in enumerate(text.splitlines(), 1)
        if number not in skipped and line.strip() and not line.lstrip().startswith("#")
    )


def test_privileged_code_is_read_in_a_sitting(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the count beside its limit, and fails where growing further should be a decision of its own."""
    totals = {}
    for heap, (_, patterns) in PRIVILEGED.items():
        totals[heap] = sum(code_lines(path) for pattern in patterns for path in TREE.glob(pattern))
    with capsys.disabled():
        print(f"\nprivileged code lines: {totals}, less than {PRIVILEGED_MOST} in all")
    for heap, (most, _) in PRIVILEGED.items():
        assert totals[heap] < most, heap
    assert sum(totals.values()) < PRIVILEGED_MOST


def test_what_root_imports_is_what_is_counted() -> None:
    """By a launcher that has loaded everything: no file of its own is missing in the count, and none is there for nothing."""
    code = (
        f"import sys; sys.path.insert(0, {str(TREE)!r})\n"
        "import vmshell.launcher.main, vmshell.launcher.ending\n"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.split('.')[0] in ('vmshell', 'tapnet')))"
    )
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    counted = {str(path) for _, patterns in PRIVILEGED.values() for pattern in patterns for path in TREE.glob(pattern)}
    starter = str(TREE / "vmshell/launcher/__main__.py")
    assert {*done.stdout.split(), starter} == {path for path in counted if path.endswith(".py")}


def test_the_packages_are_listed() -> None:
    """setup.cfg names the packages by hand; a new folder must not be forgotten."""
    config = configparser.ConfigParser()
    config.read(TREE / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    there = {str(path.parent.relative_to(TREE)).replace("/", ".") for path in sources()}
    assert listed == there


def test_pam_is_the_library_not_our_folder() -> None:
    """An `__init__.py` in pam/ or tests/pam/ would hide python-pam from everything that imports it."""
    assert not list(TREE.glob("pam/**/__init__.py")) and not (TREE / "tests/pam").exists()
    assert not list(TREE.glob("pam/*.py"))
    if importlib.util.find_spec("pam.__internals") is None:
        pytest.skip("python-pam is not installed")
    import pam

    assert "-packages" in str(pam.__file__)
    assert hasattr(pam, "authenticate")


def test_nothing_lists_our_shell() -> None:
    """A32: no file of ours adds vmshell to /etc/shells."""
    for path in [*TREE.glob("etc/**/*"), TREE / "Makefile"]:
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            assert "add-shell" not in text, path
            assert ">>/etc/shells" not in text.replace(" ", ""), path


def test_starters_are_isolated() -> None:
    """A17: the kernel hands a `#!` line's options over as one word; `-I -S` would lock everybody out."""
    assert first_line("etc/bin/vmshell") == "#!/usr/bin/env -S --ignore-signal=INT,QUIT,TSTP /usr/bin/python3 -IS"
    assert first_line("etc/bin/vmshell-admin") == "#!/usr/bin/python3 -IS"
    for unit in ("broker", "front", "launcher", "relay", "tapnet", "names"):
        text = (TREE / f"etc/systemd/vmshell-{unit}.service").read_text(encoding="utf-8")
        starter = f"/usr/local/lib/vmshell/current/vmshell/{'launcher/' if unit == 'launcher' else ''}__main__.py"
        assert text.count(starter) == text.count(f"/usr/bin/python3 -IS {starter}") == 1


def test_descriptors_go_one_way() -> None:
    """N2: no request brings one, and where requests are read none is taken."""
    from vmshell.messages import REQUESTS

    assert [verb for verb, kind in REQUESTS.items() if kind.fds] == []
    text = (TREE / "vmshell/broker/api/server.py").read_text(encoding="utf-8")
    assert text.count("wire.recv(") == 1 and "fds_allowed" not in text


def first_line(path: str) -> str:
    return (TREE / path).read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.slow
def test_lint() -> None:
    run("ruff", "check", "--quiet", ".")


@pytest.mark.slow
def test_types() -> None:
    run("mypy")


def run(module: str, *argv: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", module, *argv], cwd=TREE, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
