"""The shell as it is installed: the starter of etc/bin with its folders filled in, started on a pty or with pipes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pexpect
import prompt_toolkit

from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout

REPOSITORY = Path(PACKAGE_DIR).parent
PROMPT = "vmshell> "
LONG = 60  # seconds: other builds share the cores


def starter(folder: Path) -> str:
    """Write the starter as the installer does, and return its path."""
    path = folder / "vmshell"
    if not path.exists():
        distribution = str(Path(prompt_toolkit.__file__).parent.parent)
        text = (
            (REPOSITORY / "etc/bin/vmshell").read_text().replace("@LIBDIR@", str(REPOSITORY)).replace("@DISTDIR@", distribution)
        )
        path.write_text(text)
        path.chmod(0o755)
    return str(path)


def environment(**more: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "TERM": "xterm", **more}


def run(folder: Path, layout: Layout, *arguments: str, input: bytes = b"", timeout: float = LONG, **env: str) -> Any:
    """Run to the end without a terminal."""
    return subprocess.run(
        [starter(folder), "--layout", layout.to_args(), *arguments],
        input=input,
        capture_output=True,
        timeout=timeout,
        env=environment(**env),
    )


def spawn(folder: Path, layout: Layout, *arguments: str, term: str = "xterm", size: tuple[int, int] = (24, 100)) -> Any:
    """Start on a terminal of its own."""
    return pexpect.spawn(
        starter(folder),
        ["--layout", layout.to_args(), *arguments],
        env=environment(TERM=term),
        timeout=LONG,
        encoding="utf-8",
        codec_errors="replace",
        dimensions=size,
    )


def leave(child: Any) -> int:
    """Wait for the end and return the exit status."""
    child.expect(pexpect.EOF)
    child.close()
    assert child.signalstatus is None, f"killed by signal {child.signalstatus}"
    status: int = child.exitstatus
    return status


def descendants(pid: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path("/proc", entry, "stat").read_text().rpartition(") ")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found.append(int(entry))
    return found
