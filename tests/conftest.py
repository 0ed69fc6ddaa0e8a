"""What every test shares: short temporary folders (socket paths have 107 bytes), and a real broker in one of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.session import Session
from vmshell.layout import Layout


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short path that other users can pass through, gone after the test."""
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def layout(short_tmp: Path) -> Layout:
    """A session-mode layout in a temporary folder; TCG is set, so that no test waits for the acceleration probe's KVM part."""
    made = Layout(
        etc=f"{short_tmp}/etc", state=f"{short_tmp}/state", run=f"{short_tmp}/run", log=f"{short_tmp}/log", embedded=True
    )
    os.makedirs(made.etc)
    Path(made.policy).write_text('[host]\naccel = "tcg"\nconnections_max = 256\n', encoding="utf-8")
    return made


@pytest.fixture
def session(layout: Layout) -> Iterator[Session]:
    """A running broker (with its relay) of one's own; every VM, process and file is gone afterwards, or the test fails."""
    with Session(layout) as running:
        yield running
