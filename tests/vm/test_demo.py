"""`make demo` without a terminal: it plays the whole way by itself, and its exit status is the guest's word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images import install_images
from tests.session import Session
from vmshell.layout import Layout

TREE = Path(__file__).parents[2]

pytestmark = [pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.skipif(not Path(sys.executable).with_name("vmshell").exists(), reason="vmshell is not installed beside this Python")
def test_the_demo_plays_itself(short_tmp: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    names = ("CONFIG_HOME", "DATA_HOME", "STATE_HOME", "RUNTIME_DIR")
    environ |= {f"XDG_{name}": str(short_tmp / name.lower()) for name in names}
    layout = Layout.session(environ, os.getuid(), str(short_tmp))
    install_images(layout)
    os.makedirs(short_tmp / "runtime_dir", mode=0o700)
    try:
        done = subprocess.run(
            [sys.executable, "etc/demo.py"], cwd=TREE, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    finally:
        Session(layout).stop()
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "$ vmshell --session new demo-play",
        "login: root",
        "kernel-is ",
        "detached from demo-play",
        "demo-play: off",
        "--- done: a guest",
    ):
        assert line in done.stdout, done.stdout
    assert "\x1b" not in done.stdout
