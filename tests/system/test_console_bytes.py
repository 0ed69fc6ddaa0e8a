"""The launch line under a real service manager: systemd-run, too, leaves the guest's console to the guest."""

from __future__ import annotations

import json

import pytest

from tests.host.machine import CHECKOUT, Host

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow]

# As the launcher does: the plan's whole line with a scope, its 0 and 1 the FIFOs. What was said there and what was complained of.
SCRIPT = f"""
import contextlib, json, os, sys, time
sys.path.insert(0, {CHECKOUT!r})
from vmshell.broker.lifecycle import serial_port
from vmshell.launch import jail, seccomp
from vmshell.launch.plan import DiskPlan, LaunchPlan
from vmshell.probe import guest
from vmshell.spawn import spawn

os.makedirs("/run/by-hand", exist_ok=True)
os.chdir("/run/by-hand")

def memfd(content, size):
    fd = os.memfd_create("file")
    os.write(fd, content)
    os.truncate(fd, max(size, len(content)))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd

def run(change):
    for name in serial_port.NAMES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    plan = LaunchPlan(
        number=7, accel="tcg", cpus=1, memory=32, disks=(DiskPlan(layers=((3, "raw"),), bootindex=1),), seccomp_fd=4, uid=61234,
        gid=61234, file_size_max=1 << 30, scope="by-hand.scope", oom_score_adj=500, paused=False, reboot_stops=True,
        cpu_model="Skylake-Server-IBRS,svm=off",
    )
    reader, errors = os.pipe()
    with contextlib.ExitStack() as stack:
        ends = serial_port.make(".", stack)
        ours = serial_port.open_both(".", stack)[1]
        os.set_blocking(ours, False)
        fds = [*ends, errors, memfd(guest.SECTOR, guest.DISK_SIZE), memfd(seccomp.program(), 0)]
        pid = spawn([change.get(word, word) for word in jail.command(plan)], dict(enumerate(fds)))
        os.close(errors)
        said = b""
        while True:
            ended = os.waitpid(pid, os.WNOHANG)[0]
            with contextlib.suppress(BlockingIOError):
                said += os.read(ours, 4096)
            if ended:
                break
            if guest.DONE in said:
                os.system("systemctl kill -s TERM by-hand.scope")
            time.sleep(0.1)
    complaints = b""
    while data := os.read(reader, 4096):
        complaints += data
    return [said.decode("latin-1"), complaints.decode("latin-1")]

print(json.dumps([run({{}}), run({{"TasksMax=97": "TasksMax=nonsense"}})]))
"""


def test_systemd_run_writes_nothing_to_the_console(bare_host: Host) -> None:
    bare_host.put_tree()
    good, refused = json.loads(bare_host.exec("python3", "-", stdin=SCRIPT).stdout)
    assert set(good[0]) <= set("12345V") and good[0].startswith("12345V")
    assert "warning: TCG" in good[1] and "terminating on signal 15" in good[1]
    assert refused[0] == "" and "TasksMax" in refused[1]
