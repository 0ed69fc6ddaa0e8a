"""The jail as it is, not as it is written: a real QEMU in it, read from /proc, and a probe in QEMU's place that tries the doors.

The probe is a small C program, because no interpreter exists in there. Every refusal has its counterpart without our filter,
so that a test does not pass because the kernel would have refused anyway.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vm.jailed import Jailed, read_until
from vmshell.broker.lifecycle import serial_port
from vmshell.launch import seccomp
from vmshell.probe import guest

UID = 61234
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="a VM's own uid needs root")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="the probe in QEMU's place is built with gcc")
pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not os.path.exists("/usr/bin/qemu-system-x86_64"), reason="QEMU is not installed"),
    pytest.mark.skipif(not os.path.exists("/usr/bin/bwrap"), reason="bubblewrap is not installed"),
]

# As root: with the VM's uid. As root, dropped to an ordinary user: what session mode does. As an ordinary user: that, truly.
WAYS = ["vm-uid", "ordinary-user"] if os.geteuid() == 0 else ["ordinary-user"]


class Way:
    """How the line is started: by root for a VM's uid, or by an ordinary user for itself."""

    def __init__(self, name: str) -> None:
        self.plan_uid = UID if name == "vm-uid" else None
        drop = name == "ordinary-user" and os.geteuid() == 0
        self.prefix: tuple[str, ...] = ()
        if name == "vm-uid":
            # The broker may have groups; the VM may not.
            self.prefix = ("/usr/bin/setpriv", "--groups=4,24,27", "--")
        elif drop:
            self.prefix = ("/usr/bin/setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--")
        self.uid = UID if name == "vm-uid" else NOBODY if drop else os.geteuid()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    return Way(request.param)


@pytest.fixture
def disk(short_tmp: Path) -> Path:
    """A boot disk that needs no kernel: the acceleration probe's sector, which counts its stages on the console."""
    path = short_tmp / "disk.raw"
    path.write_bytes(guest.SECTOR.ljust(guest.DISK_SIZE, b"\0"))
    path.chmod(0o600)
    return path


# --- a real QEMU, read from /proc -----------------------------------------------------------------------------------------


def test_b39_b45_r8_identity_capabilities_and_filters(short_tmp: Path, disk: Path, way: Way) -> None:
    """B39, B45, R8, R9: the VM's uid four times and its gid, no group, no capability, no_new_privs, two filters."""
    with Jailed(short_tmp, uid=way.plan_uid, prefix=way.prefix, disks=((disk, "raw", None),)) as vm:
        vm.qmp().close()
        status = vm.status()
        assert status["Uid"] == [str(way.uid)] * 4
        if os.geteuid() == 0:
            assert status["Gid"] == [str(way.uid)] * 4
            assert status["Groups"] == []
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[kind][0], 16) == 0, kind
        if way.plan_uid is not None:
            assert int(status["CapBnd"][0], 16) == 0
        assert status["NoNewPrivs"] == ["1"]
        assert status["Seccomp"] == ["2"]
        assert status["Seccomp_filters"] == ["2"]
        assert status["NSpid"][-1] == "1", "alone in a pid namespace"
        for namespace in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
            assert os.readlink(f"/proc/{vm.pid}/ns/{namespace}") != os.readlink(f"/proc/self/ns/{namespace}"), namespace


def test_b40_descriptors_are_ours_and_qemus_own(short_tmp: Path, disk: Path, way: Way) -> None:
    """B40: nothing but the standard three, what the plan lends, and QEMU's own event descriptors; the loader's two are closed."""
    with Jailed(short_tmp, uid=way.plan_uid, prefix=way.prefix, disks=((disk, "raw", None),)) as vm:
        vm.qmp().close()
        folder = f"/proc/{vm.pid}/fd"
        seen = {}
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):  # the QMP connection of this test, closed just now
                seen[int(fd)] = os.readlink(f"{folder}/{fd}")
        ours = set(vm.given.values())
        own = {fd: link for fd, link in seen.items() if fd > 2 and link not in ours}
        for link in own.values():
            assert link.startswith(
                ("anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:[signalfd]", "/memfd:", "socket:")
            ), own
        # A socket that is not lent is the QMP connection of this test, perhaps not yet closed.
        assert len([link for link in own.values() if link.startswith("socket:")]) <= 1
        assert vm.plan.qmp_fd is not None
        assert seen[vm.plan.qmp_fd] == vm.given[vm.plan.qmp_fd], "it keeps its number"
        assert [seen[fd] for fd in (0, 1)] == [f"{short_tmp}/{name}" for name in serial_port.NAMES] and seen[2].startswith(
            "pipe:"
        )
        assert vm.plan.info_fd not in seen or not seen[vm.plan.info_fd].startswith("pipe:")


def test_b29_b41_r6_nothing_of_the_host_is_in_sight(short_tmp: Path, disk: Path, way: Way) -> None:
    """B29, B41, R6: an empty environment, no path of ours in the command line, a root folder with next to nothing."""
    with Jailed(short_tmp, uid=way.plan_uid, prefix=way.prefix, disks=((disk, "raw", None),)) as vm:
        vm.qmp().close()
        environ = {word.partition(b"=")[0] for word in vm.proc("environ").split(b"\0") if word}
        assert environ <= {b"PWD"}, "bwrap itself sets PWD=/"
        assert b"of the broker" not in vm.proc("environ")
        assert str(short_tmp).encode() not in vm.proc("cmdline")
        root = f"/proc/{vm.pid}/root"
        if os.geteuid() == 0 or way.plan_uid is None:
            assert set(os.listdir(root)) == {"usr", "lib", "lib64", "proc", "dev"}
            assert os.listdir(f"{root}/usr/bin") == ["qemu-system-x86_64"]
            assert set(os.listdir(f"{root}/usr/share")) <= {"qemu", "seabios"}
            assert os.listdir(f"{root}/dev") == ["null"]
        mounts = [line.split()[1].decode() for line in vm.proc("mounts").splitlines()]
        assert set(mounts) <= {
            "/",
            "/proc",
            "/dev/null",
            "/usr/bin/qemu-system-x86_64",
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib64",
            "/usr/share/qemu",
            "/usr/share/seabios",
            "/usr/lib/ipxe/qemu",
        } | {mount for mount in mounts if mount.startswith("/proc/")}


# --- it works -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["q35", "pc"])
def test_a_disk_boots(short_tmp: Path, disk: Path, way: Way, machine: str) -> None:
    """Disk boot, its CPUs stopped until they are told to go; QMP's client may go and another come."""
    with Jailed(short_tmp, uid=way.plan_uid, prefix=way.prefix, disks=((disk, "raw", None),), machine=machine) as vm:
        first = vm.qmp()
        assert first.ask("query-status")["status"] in ("prelaunch", "paused")
        first.close()
        qmp = vm.qmp()
        qmp.ask("cont")
        assert guest.DONE in read_until(vm.console, guest.DONE)
        assert qmp.ask("query-status")["status"] == "running"
        qmp.ask("quit")
        qmp.close()
        assert vm.process.wait(60) == 0


@needs_root
def test_b10_r4_an_overlay_reads_its_base_by_descriptor_only(short_tmp: Path, disk: Path) -> None:
    """B10, R4, B43: base and overlay belong to root, mode 0600; the header's backing name, a lie, is never followed."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    decoy = short_tmp / "decoy.raw"
    decoy.write_bytes(b"\0" * guest.DISK_SIZE)
    overlay = short_tmp / "overlay.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(decoy), "-F", "raw", str(overlay)], check=True, timeout=60
    )
    overlay.chmod(0o600)
    before = disk.read_bytes()
    with Jailed(short_tmp, uid=UID, disks=((overlay, "qcow2", disk),)) as vm:
        qmp = vm.qmp()
        qmp.ask("cont")
        assert guest.DONE in read_until(vm.console, guest.DONE), "it booted from the base, not from the decoy"
        qmp.close()
    assert disk.read_bytes() == before


@needs_root
def test_d18_one_disk_is_never_in_two_machines(short_tmp: Path, disk: Path) -> None:
    """D18: QEMU locks the disk in the jail too (it needs /dev/null to find out that it can)."""
    other = short_tmp / "other"
    other.mkdir()
    with Jailed(short_tmp, uid=UID, disks=((disk, "raw", None),)) as vm:
        vm.qmp().close()
        with Jailed(other, uid=UID + 1, disks=((disk, "raw", None),)) as second:
            _, errors = second.process.communicate(timeout=60)
            assert second.process.returncode == 1
            assert b'Failed to get "write" lock' in errors


# --- in QEMU's place ------------------------------------------------------------------------------------------------------

Told = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def probe_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    lists = {"DENIED": seccomp.DENIED, "IOCTLS": seccomp.DENIED_IOCTLS}
    header = folder / "lists.h"
    rows = {name: ", ".join(f'{{"{key}", {value}}}' for key, value in table.items()) for name, table in lists.items()}
    header.write_text("".join(f"#define {name} {row}\n" for name, row in rows.items()), encoding="utf-8")
    built = folder / "probe"
    source = Path(__file__).parent / "in_qemus_place.c"
    subprocess.run(["gcc", "-O1", "-static", "-include", str(header), "-o", str(built), str(source)], check=True, timeout=120)
    return built


def tell(short_tmp: Path, file: Path, program: Path, way: Way, change: Callable[[list[str]], list[str]] = list) -> Told:
    """Run the probe in QEMU's place, *file* given to it read-only. Returns kind → name → 0 or the errno."""
    here = short_tmp / "probe"
    shutil.copy(program, here)
    here.chmod(0o755)
    with Jailed(short_tmp, uid=way.plan_uid, prefix=way.prefix, qemu=str(here), change=change, kernel=file) as vm:
        _, errors = vm.process.communicate(timeout=60)
        output = vm.console.lying()
    told: Told = defaultdict(dict)
    for line in output.decode().splitlines():
        kind, name, result = line.split(" ")
        told[kind][name] = -int(result)
    assert told["end"] == {"end": 0}, (output[-300:], errors)
    return told


def without_filter(words: list[str]) -> list[str]:
    place = words.index("--add-seccomp-fd")
    return words[:place] + words[place + 2 :]


@needs_gcc
def test_b39_every_denied_call_is_refused(short_tmp: Path, disk: Path, probe_program: Path, way: Way) -> None:
    """B39, E28, R9: ptrace, bpf, keyctl, io_uring, userfaultfd, mounts …, the tap ioctls and TIOCSTI all answer EPERM."""
    told = tell(short_tmp, disk, probe_program, way)
    assert told["call"] == dict.fromkeys(seccomp.DENIED, errno.EPERM)
    assert told["ioctl"] == dict.fromkeys(seccomp.DENIED_IOCTLS, errno.EPERM)
    assert told["clone"] == {"clone3": errno.ENOSYS, "newuser": errno.EPERM}


@needs_gcc
def test_without_our_filter_the_same_calls_come_through(short_tmp: Path, disk: Path, probe_program: Path, way: Way) -> None:
    """The counterpart: it is our filter that refused, for the calls that need no capability."""
    told = tell(short_tmp, disk, probe_program, way, without_filter)
    free = (
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "keyctl",
        "unshare",
        "name_to_handle_at",
        "move_pages",
        "mbind",
        "kcmp",
    )
    assert {name: told["call"][name] for name in free if told["call"][name] == errno.EPERM} == {}
    assert errno.EPERM not in told["ioctl"].values()
    assert told["clone"] == {"clone3": errno.EINVAL, "newuser": errno.EINVAL}


@needs_gcc
def test_r6_the_world_from_inside(short_tmp: Path, disk: Path, probe_program: Path, way: Way) -> None:
    """R6, B20, F13: no environment, no network but lo, nobody else's process, no shell, nowhere to write."""
    told = tell(short_tmp, disk, probe_program, way)
    assert set(told["environ"]) <= {"PWD=/"}
    assert set(told["root"]) == {"usr", "lib", "lib64", "proc", "dev"}
    assert set(told["dev"]) == {"null"}
    assert set(told["bin"]) == {"qemu-system-x86_64"}
    assert {name for name in told["proc"] if name.isdigit()} == {"1"}
    assert [line for line in told["net"] if ":" in line and "lo:" not in line] == []
    assert told["exec"] == {"/bin/sh": errno.ENOENT}
    assert told["write"] == {"/": errno.EROFS}
    limits = {line.split("__")[0]: [word for word in line.split("_") if word] for line in told["limit"]}
    assert limits["Max_core_file_size"][4:6] == ["0", "0"]
    assert limits["Max_locked_memory"][3:5] == ["0", "0"]
    assert limits["Max_file_size"][3:5] == [str(1 << 30)] * 2


@needs_root
@needs_gcc
def test_b43_r4_a_given_file_cannot_be_opened_anew(short_tmp: Path, disk: Path, probe_program: Path) -> None:
    """B43, R4: a root-owned 0600 file can be read by the descriptor, and not be opened by it, to write or to read."""
    assert disk.stat().st_uid == 0
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600
    told = tell(short_tmp, disk, probe_program, Way("vm-uid"))
    assert told["read"] == {"given": 0}
    assert told["reopen"] == {"read-write": errno.EACCES, "read-only": errno.EACCES}


@needs_root
@needs_gcc
def test_b43_counterpart_a_file_of_the_vms_uid_could_be(short_tmp: Path, disk: Path, probe_program: Path) -> None:
    """The counterpart of B43, and the reason for R4: owned by the VM's uid, the read-only descriptor becomes a writable one."""
    os.chown(disk, UID, UID)
    told = tell(short_tmp, disk, probe_program, Way("vm-uid"))
    assert told["reopen"] == {"read-write": 0, "read-only": 0}


@needs_root
def test_b39_no_user_namespaces_no_start(short_tmp: Path, disk: Path) -> None:
    """B39: where the jail cannot be built QEMU does not run without it."""
    # A user namespace of the test's own, in which the making of further ones is switched off.
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    prefix = ("/usr/bin/unshare", "--user", "--map-root-user", "/bin/sh", "-c", shell, "sh")
    with Jailed(short_tmp, uid=None, prefix=prefix, disks=((disk, "raw", None),)) as vm:
        _, errors = vm.process.communicate(timeout=60)
        assert vm.process.returncode not in (0, None)
        assert b"bwrap: " in errors
        assert b"namespace" in errors


def test_b39_no_bwrap_no_start(short_tmp: Path, disk: Path, way: Way) -> None:
    """B39: without bubblewrap the line fails before QEMU; nothing falls back to less."""

    def no_bwrap(words: list[str]) -> list[str]:
        return ["/nonexistent/bwrap" if word == "/usr/bin/bwrap" else word for word in words]

    with Jailed(short_tmp, uid=way.plan_uid, prefix=way.prefix, disks=((disk, "raw", None),), change=no_bwrap) as vm:
        assert vm.process.wait(60) == 127
