"""The real demo images, built once per machine and state of the sources, shared by every test that boots a real guest."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout

IMAGES = ("demo", "demo-disk")
ROOT = Path(f"/var/tmp/vmshell-test-images-{os.getuid()}")
_KEPT = 3  # states of the sources
# Sources of vmshell-admin that say nothing of what is in an image.
NOT_IN_IMAGES = (
    *("users.py", "doctor.py", "doctor_network.py", "doctor_rights.py", "findings.py", "main.py", "policies.py", "broker.py"),
    *("asking.py", "usage.py", "own_records.py"),
)


def demo_images(cache_dir: Path = ROOT) -> Path:
    """A catalogue directory with `demo` and `demo-disk`, built by vmshell-admin. To be copied or linked, never changed."""
    cache_dir.mkdir(mode=0o700, exist_ok=True)
    if cache_dir.lstat().st_uid != os.getuid() or cache_dir.is_symlink():
        raise AssertionError(f"{cache_dir} is somebody else's")
    with open(cache_dir / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run side by side build once
        layout = admin_layout(cache_dir / _source_hash())
        images = Path(layout.images)
        for name in IMAGES:
            if not (images / name).is_dir():
                run_admin(layout, "image", "build", name, cache=cache_dir / "packages").check_returncode()
        os.utime(layout.etc)
        _forget_older(cache_dir)
    return images


def install_images(layout: Layout) -> None:
    """Put the demo images into *layout*'s catalogue. Hard links: the files are read-only, and 150 MB stay where they are."""
    os.makedirs(layout.state, mode=0o700, exist_ok=True)
    source = demo_images()
    link = os.link if source.stat().st_dev == os.stat(layout.state).st_dev else shutil.copy2
    for name in IMAGES:
        shutil.copytree(source / name, f"{layout.images}/{name}", copy_function=link)
    os.chmod(layout.images, 0o755)


def admin_layout(root: Path) -> Layout:
    layout = Layout(etc=f"{root}/etc", state=f"{root}/state", run=f"{root}/run", log=f"{root}/log", embedded=True)
    os.makedirs(layout.etc, exist_ok=True)
    return layout


def admin_command(layout: Layout, *words: str, python: str = sys.executable) -> list[str]:
    return [python, "-IS", f"{PACKAGE_DIR}/__main__.py", "admin", "--layout", layout.to_args(), *words]


def run_admin(layout: Layout, *words: str, cache: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run vmshell-admin on *layout* to its end; packages are kept in *cache*."""
    environ = {**os.environ, **environ, "XDG_CACHE_HOME": str(cache or ROOT / "packages")}
    command = admin_command(layout, *words)
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, check=False)


def _source_hash() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(PACKAGE_DIR, "admin").glob("*.py")):
        if source.name not in NOT_IN_IMAGES:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _forget_older(cache_dir: Path) -> None:
    states = sorted(cache_dir.glob("*/etc"), key=lambda etc: etc.stat().st_mtime, reverse=True)
    for etc in states[_KEPT:]:
        shutil.rmtree(etc.parent, ignore_errors=True)
