"""N7: a hostile broker writes what it likes into the folders that dnsmasq reads. It is data: nothing is run, written or opened.

A real dnsmasq with its real configuration, as the uid and with the rights of its service, in a network namespace of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.networld import inside
from tests.process.tapnets import Namespace, namespace, unable
from vmshell.dnsmasq.configuration import FOLDERS, HOST_ADDRESS
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.layout import Layout

__all__ = ["namespace"]
DNSMASQ = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin") or ""
REASON = unable() or ("" if DNSMASQ else "dnsmasq-base is not installed")
pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON or "-")]

SERVICE = 64322  # the uid of the service, which owns nothing
PATIENCE = 60.0
RIGHTS = "-all,+net_bind_service,+net_raw,+net_admin"


class Names:
    """dnsmasq, its folders of data, which the broker may write, and questions to it."""

    def __init__(self, space: Namespace, folder: Path) -> None:
        self.space = space
        self.folder = folder
        self.layout = Layout(**{name: str(folder / name) for name in ("etc", "state", "run", "log")}, embedded=False)
        for name in FOLDERS.values():
            os.makedirs(f"{self.layout.names}/{name}")
        os.makedirs(os.path.dirname(self.layout.dnsmasq_conf))
        os.chown(os.path.dirname(self.layout.dnsmasq_conf), SERVICE, SERVICE)
        space.run("ip", "addr", "add", f"{HOST_ADDRESS}/32", "dev", "lo")
        self.start()

    def start(self) -> None:
        """As the unit does: first the configuration, then dnsmasq."""
        caps = [f"--{kind}-caps={RIGHTS}" for kind in ("inh", "ambient")]
        who = [f"--reuid={SERVICE}", f"--regid={SERVICE}", "--clear-groups", "--no-new-privs", f"--bounding-set={RIGHTS}"]
        service = self.space.command("setpriv", *who, *caps)
        write = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "dnsmasq", self.layout.to_args()]
        subprocess.run([*service, *write], check=True, timeout=PATIENCE)
        run = [DNSMASQ, "--keep-in-foreground", f"--conf-file={self.layout.dnsmasq_conf}", "--pid-file=", "--log-facility=-"]
        self.process = subprocess.Popen([*service, *run], stderr=subprocess.DEVNULL)
        self.wait_for("127.0.0.9 begun.vm")

    def put(self, place: str, text: str) -> None:
        """A file that everybody may read, in one piece."""
        path = f"{self.layout.names}/{place}"
        beside = self.folder / "beside"
        beside.write_text(text)
        beside.chmod(0o644)
        os.rename(beside, path)

    def knows(self, name: str) -> bool:
        """Does it answer with an address of *name*?"""
        ask = inside(self.space, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        with ask:
            ask.settimeout(1.0)
            labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
            try:
                ask.sendto(struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0\0\1\0\1", (HOST_ADDRESS, 53))
                return ask.recv(2000)[6:8] != b"\0\0"
            except (TimeoutError, ConnectionRefusedError):
                return False

    def wait_for(self, line: str) -> None:
        """Have it learn one more line of hosts: all before has been read by then."""
        self.put("hosts/probe", line + "\n")
        end = time.monotonic() + PATIENCE
        while not self.knows(line.split()[1]):
            assert time.monotonic() < end and self.process.poll() is None, line
            time.sleep(0.05)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@pytest.fixture
def names(namespace: Namespace) -> Iterator[Names]:
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/var/tmp"))  # not below tmp_path, which is closed to everybody else
    folder.chmod(0o755)
    made = Names(namespace, folder)
    yield made
    made.process.kill()
    made.process.wait()
    shutil.rmtree(folder)


def test_n7_no_line_and_no_name_of_a_file_is_more_than_data(names: Names) -> None:
    """Each of dnsmasq's options, in each form in which a line may name one, in files of each folder."""
    open_folder = names.folder / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    program, other, mark = open_folder / "program", open_folder / "other", open_folder / "mark"
    program.write_text(f"#!/bin/sh\necho run >{mark}\n")
    program.chmod(0o755)
    other.write_text("198.51.100.7 other.vm\n")
    before = sorted(os.listdir(open_folder))
    said = subprocess.run([DNSMASQ, "--help"], capture_output=True, text=True, check=True).stdout
    options = sorted(set(re.findall(r"--([a-z0-9-]+)", said)))
    assert {"dhcp-script", "conf-file", "addn-hosts", "log-facility", "conf-script"} <= set(options)
    files = (program, other, open_folder / "written")
    shapes = ("{0}={1}", "{0},{1}", "--{0}={1}", "option:{0},{1}", "66,{1}", "@{1}", "|{1}", "`{1}`", "#include {1}")
    lines = [shape.format(option, file) for option in options for file in files for shape in shapes]
    for folder in FOLDERS.values():
        names.put(f"{folder}/1", "\n".join(lines) + "\n")
        names.put(f"{folder}/2", "10.77.0.9 " + "x" * 1_000_000)
        for odd in ("|touch mark", "$(touch mark)", "`touch mark`", "conf-file=3", "-", "a\nb", "\x7f\x1b[2J"):
            names.put(f"{folder}/{odd}", "\n".join(lines[:100]) + "\n")
    names.wait_for("127.0.0.10 after.vm")
    assert not names.knows("other.vm")
    assert names.stop() == 0
    names.start()  # which reads all of it anew
    names.wait_for("127.0.0.11 again.vm")
    assert not names.knows("other.vm")
    assert sorted(os.listdir(open_folder)) == before and not (names.folder / "mark").exists()


def test_n7_a_link_leads_to_nothing_that_is_closed_to_the_service(names: Names) -> None:
    closed = names.folder / "closed"
    closed.write_text("198.51.100.7 closed.vm\n")
    closed.chmod(0o600)
    for place in ("hosts/1", "hosts/2"):
        os.symlink(closed, f"{names.layout.names}/{place}")
    os.symlink(names.folder / "state", f"{names.layout.names}/hosts/3")
    names.wait_for("127.0.0.10 after.vm")
    assert not names.knows("closed.vm")
    names.stop()
    names.start()
    assert not names.knows("closed.vm")


def test_n7_a_file_that_never_ends_is_over_when_the_service_is_started_anew(names: Names) -> None:
    """A FIFO stops it. What stops it is its data, and gone with that."""
    os.mkfifo(names.folder / "fifo")
    os.rename(names.folder / "fifo", f"{names.layout.names}/hosts/1")
    end = time.monotonic() + PATIENCE
    while names.knows("begun.vm"):
        assert time.monotonic() < end
    assert names.stop() == 0
    os.unlink(f"{names.layout.names}/hosts/1")
    names.start()
