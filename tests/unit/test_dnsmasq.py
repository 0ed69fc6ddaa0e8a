"""dnsmasq's configuration: made from root's policy by a process of its own, whatever the broker has written or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmshell.dnsmasq.configuration import FOLDERS, configuration
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.layout import Layout
from vmshell.model.policy import parse

POLICY = '[host]\nipv4_pool = "10.99.0.0/16"\nipv6_pool = "fd99::/48"\ndns_domain = "guests"\ndns_servers = ["192.0.2.1"]\n'


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(**{name: str(tmp_path / name) for name in ("etc", "state", "run", "log")}, embedded=False)


def write(layout: Layout) -> subprocess.CompletedProcess[str]:
    """Run the process as the unit does."""
    command = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "dnsmasq", layout.to_args()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def put(layout: Layout, text: str) -> None:
    os.makedirs(layout.etc, exist_ok=True)
    Path(layout.policy).write_text(text)
    os.chmod(layout.policy, 0o644)


def data(layout: Layout) -> None:
    for folder in FOLDERS.values():
        os.makedirs(f"{layout.names}/{folder}")


def text(layout: Layout) -> str:
    return Path(layout.dnsmasq_conf).read_text()


def test_it_comes_from_the_policy(layout: Layout) -> None:
    put(layout, POLICY)
    data(layout)
    assert write(layout).returncode == 0
    assert text(layout) == configuration(parse(POLICY, "policy.toml").host, layout.names)
    for line in ("dhcp-range=10.99.0.0,static,255.255.0.0", "local=/guests/", "server=192.0.2.1", "no-resolv", "enable-ra"):
        assert f"{line}\n" in text(layout), line
    assert os.listdir(os.path.dirname(layout.dnsmasq_conf)) == ["dnsmasq.conf"]


def test_without_a_policy_file_it_is_what_is_built_in(layout: Layout) -> None:
    data(layout)
    assert write(layout).returncode == 0
    assert "dhcp-range=10.77.0.0,static,255.255.0.0\n" in text(layout) and "enable-ra" not in text(layout)


def test_folders_of_data_that_are_missing_are_not_read(layout: Layout) -> None:
    """dnsmasq would not start; the broker, which makes them, has it started anew."""
    assert write(layout).returncode == 0
    assert "dir=" not in text(layout)
    os.makedirs(f"{layout.names}/hosts")
    assert write(layout).returncode == 0
    assert text(layout).count("dir=") == 1 and f"hostsdir={layout.names}/hosts\n" in text(layout)


def test_a_broken_policy_leaves_what_was_in_force(layout: Layout) -> None:
    put(layout, "[host]\nnothing = 1\n")
    done = write(layout)
    assert done.returncode == 1 and "no key nothing; " in done.stderr and done.stderr.endswith("dnsmasq cannot start\n")
    put(layout, POLICY)
    assert write(layout).returncode == 0
    before = text(layout)
    put(layout, "[host]\nnothing = 1\n")
    done = write(layout)
    assert done.returncode == 0 and done.stderr.endswith("the configuration stays what it was\n")
    assert text(layout) == before


def test_what_lies_among_the_data_is_no_configuration(layout: Layout) -> None:
    """N7: a file where the broker once wrote it is nobody's configuration, and it cannot be written where it is now."""
    data(layout)
    Path(layout.names, "dnsmasq.conf").write_text("dhcp-script=/bin/true\n")
    assert write(layout).returncode == 0
    assert "dhcp-script" not in text(layout)
    assert not layout.dnsmasq_conf.startswith(f"{layout.run}/")


def test_where_it_cannot_be_written_it_says_so(layout: Layout) -> None:
    os.makedirs(layout.etc)
    Path(os.path.dirname(layout.dnsmasq_conf)).write_text("a file")
    done = write(layout)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "dnsmasq.conf cannot be written: " in done.stderr


def test_it_is_what_dnsmasq_takes(layout: Layout) -> None:
    dnsmasq = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin")
    if dnsmasq is None:
        pytest.skip("dnsmasq-base is not installed")
    put(layout, POLICY)
    data(layout)
    assert write(layout).returncode == 0
    done = subprocess.run([dnsmasq, "--test", f"--conf-file={layout.dnsmasq_conf}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "dhcp-ignore-names\n" in text(layout)
