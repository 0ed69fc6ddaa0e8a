"""What every test shares: short temporary folders (socket paths have 107 bytes), and a real broker in one of them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.session import Session
from vmshell.layout import Layout

# How long an example takes is the machine's affair, which other builds share.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_configure() -> None:
    """Whoever runs us in the background may have SIGINT ignored, and so would all that is started here."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For those who run files side by side: hosts with guests are spread among what else waits, and quick files come last."""
    kinds: dict[str, int] = {}  # by file, see `_kind`
    for item in items:
        file = item.nodeid.partition("::")[0]
        kinds[file] = min(kinds.get(file, 2), _kind(item))
    place: dict[str, float] = {}
    for kind in range(3):
        files = sorted((file for file, own in kinds.items() if own == kind), reverse=True)  # the longest have late letters
        place |= {file: (index + 0.5) / len(files) + kind // 2 for index, file in enumerate(files)}
    items.sort(key=lambda item: place[item.nodeid.partition("::")[0]])


def _kind(item: pytest.Item) -> int:
    """0: on a host of its own; 1: it waits for something; 2: neither."""
    marks = [name for name in ("system", "vm", "slow") if item.get_closest_marker(name)]
    return 2 if not marks else 0 if "system" in marks else 1


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short path that other users can pass through, gone after the test."""
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that write much: nothing has to outlive a power cut, and disks take long. What is no descriptor still fails."""
    monkeypatch.setattr(os, "fsync", lambda fd: os.fstat(fd) and None)


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
