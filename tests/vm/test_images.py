"""`vmshell-admin image build`, and the images it makes booted for real under TCG: by QEMU alone and through the launch line."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.images import ROOT, admin_command, admin_layout, demo_images, run_admin
from tests.vm.jailed import Jailed, Qmp, read_until
from vmshell.admin.catalogue import Catalogue
from vmshell.admin.packages import PackageError, Packages
from vmshell.launch.devices import NicPlan
from vmshell.layout import Layout
from vmshell.numbering import mac_address

pytestmark = [pytest.mark.vm, pytest.mark.slow]

PATIENCE = 120
PROMPT = "# "


class Guest:
    """An image under plain QEMU, its serial port on a pseudo-terminal."""

    def __init__(self, images: Path, name: str, folder: Path) -> None:
        image = images / name
        self.qmp_path = folder / "qmp.sock"
        if name == "demo":
            cmdline = Catalogue(admin_layout(images.parent.parent)).read(name).boot["cmdline"]
            what = ["-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd.gz"), "-append", cmdline]
        else:
            overlay = folder / "overlay.qcow2"
            base = ["-b", str(image / "disk.raw"), "-F", "raw"]
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, str(overlay)], check=True, timeout=60)
            what = ["-drive", f"file={overlay},format=qcow2,if=virtio"]
        command = ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-machine", "q35,accel=tcg", "-m", "96"]
        command += ["-serial", "stdio", "-qmp", f"unix:{self.qmp_path},server=on,wait=off", "-device", "virtio-rng-pci"]
        command += ["-netdev", "user,id=n0,restrict=on", "-device", "virtio-net-pci,netdev=n0,romfile=", *what]
        self.console = pexpect.spawn("qemu-system-x86_64", command, timeout=PATIENCE, encoding="utf-8", codec_errors="replace")

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.console.close(force=True)

    def log_in(self, name: str) -> None:
        self.console.expect(f"{name} login: ")
        self.console.sendline("root")
        self.console.expect("Password: ")
        self.console.sendline("demo")
        self.console.expect(f"root@{name}:")
        self.console.expect(PROMPT)
        self.run("stty cols 500")  # the shell there folds long lines

    def run(self, command: str) -> str:
        """What *command* prints, without its echo."""
        self.console.sendline(f"{command}; echo 'that is ''all'")
        self.console.expect_exact("that is all")
        text: str = self.console.before
        self.console.expect(PROMPT)
        return text.partition("\n")[2].replace("\r", "")

    def power_button(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(self.qmp_path))
            qmp = Qmp(sock)
            qmp.ask("system_powerdown")
            qmp.file.close()


@pytest.fixture(scope="module")
def images() -> Path:
    return demo_images()


@pytest.fixture
def guest(images: Path, short_tmp: Path, request: pytest.FixtureRequest) -> Iterator[Guest]:
    with Guest(images, request.param, short_tmp) as running:
        running.console.expect("vmshell demo image: log in as root, password demo")
        running.log_in(request.param)
        yield running


# --- what the guests do -----------------------------------------------------------------------------------------------


def power_off(guest: Guest) -> None:
    begun = time.monotonic()
    guest.power_button()
    guest.console.expect(pexpect.EOF)
    assert "Power down" in guest.console.before
    assert time.monotonic() - begun < 20


def has_address(guest: Guest) -> None:
    said = guest.run("for try in $(seq 60); do ip -4 addr show eth0 | grep inet && break; sleep 1; done")
    assert "inet 10.0.2.15/24" in said


@pytest.mark.parametrize("guest", ["demo"], indirect=True)
def test_demo_kernel_network_password_panic_and_power_button(guest: Guest) -> None:
    assert guest.run("uname -r").strip().endswith("-cloud-amd64")
    has_address(guest)
    assert guest.run("stat -c '%u %g' /bin/busybox /etc/shadow / | sort -u") == "0 0\n"
    assert guest.run("stat -c %a /etc/shadow /tmp /root") == "600\n1777\n700\n"
    assert "not found" not in guest.run("dmesg; logread")
    guest.console.sendline("exit")
    guest.console.expect("demo login: ")
    guest.console.sendline("root")
    guest.console.expect("Password: ")
    guest.console.sendline("wrong")
    guest.console.expect("Login incorrect")
    guest.log_in("demo")
    guest.console.sendline("echo c >/proc/sysrq-trigger")
    guest.console.expect("Kernel panic")
    guest.log_in("demo")
    power_off(guest)


@pytest.mark.parametrize("guest", ["demo"], indirect=True)
def test_reboot_and_poweroff_typed_in_the_guest(guest: Guest) -> None:
    guest.console.sendline("reboot")
    guest.console.expect("Restarting system")
    guest.log_in("demo")
    guest.console.sendline("poweroff")
    guest.console.expect(pexpect.EOF)


@pytest.mark.parametrize("guest", ["demo-disk"], indirect=True)
def test_what_is_written_to_demo_disk_survives_a_reboot(guest: Guest, images: Path) -> None:
    before = (images / "demo-disk/disk.raw").stat()
    guest.run("echo kept across boots >/root/kept; sync")
    assert "/dev/vda1 on / type ext4 (rw" in guest.run("mount")
    guest.console.sendline("reboot")
    guest.log_in("demo-disk")
    assert guest.run("cat /root/kept") == "kept across boots\n"
    assert guest.run("uname -r").strip().endswith("-cloud-amd64")
    has_address(guest)
    power_off(guest)
    after = (images / "demo-disk/disk.raw").stat()
    assert (before.st_mtime_ns, before.st_blocks) == (after.st_mtime_ns, after.st_blocks)


def test_a_base_disk_is_sparse(images: Path) -> None:
    disk = (images / "demo-disk/disk.raw").stat()
    assert disk.st_size == 128 << 20
    assert disk.st_blocks * 512 < 40 << 20


@pytest.mark.parametrize("name", ["demo", "demo-disk"])
def test_through_the_launch_line(images: Path, short_tmp: Path, name: str) -> None:
    """As root with a uid of its own, which owns none of the files."""
    image = Catalogue(admin_layout(images.parent.parent)).read(name)
    values: dict[str, Any] = {"memory": image.memory_min, "nics": (NicPlan(mac=mac_address(7, 0)),), "paused": False}
    if image.boot:
        values |= {"kernel": images / name / image.boot["kernel"], "initrd": images / name / image.boot["initrd"]}
        values["cmdline"] = image.boot["cmdline"]
    else:
        overlay = short_tmp / "overlay.qcow2"
        empty = [*admin_command(admin_layout(short_tmp), "x")[:3], "storage", "create", str(image.disk_size)]
        with overlay.open("xb") as file:
            subprocess.run(empty, preexec_fn=lambda: os.dup2(file.fileno(), 3) and None, close_fds=False, check=True, timeout=60)
        values["disks"] = ((overlay, "qcow2", images / name / image.disk),)
    with Jailed(short_tmp, uid=64000 if os.geteuid() == 0 else None, **values) as vm:
        said = read_until(vm.console, f"{name} login: ".encode(), PATIENCE)
        assert f"{name} login: ".encode() in said, vm.process.stderr
        qmp = vm.qmp()
        begun = time.monotonic()
        qmp.ask("system_powerdown")
        said = read_until(vm.console, b"Power down", 60)
        assert b"Power down" in said
        vm.process.wait(20)
        assert time.monotonic() - begun < 20
        qmp.close()


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(short_tmp: Path) -> Layout:
    return admin_layout(short_tmp / "host")


def left_in(layout: Layout) -> list[str]:
    return sorted(os.listdir(layout.images)) if os.path.isdir(layout.images) else []


def children_of(pid: int) -> list[str]:
    """The command lines of all processes below *pid*."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found += [folder.joinpath("cmdline").read_text(), *children_of(int(folder.name))]
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def test_a_second_build_replaces_the_first_without_a_download(images: Path, place: Layout) -> None:
    first = run_admin(place, "image", "build", "demo")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("demo: ready (")
    inode = os.stat(f"{place.images}/demo").st_ino
    second = run_admin(place, "image", "build", "demo")
    assert second.returncode == 0
    assert "downloading" not in first.stderr + second.stderr  # the fixture has fetched them
    assert os.stat(f"{place.images}/demo").st_ino != inode
    assert left_in(place) == [".lock", "demo"]
    assert Catalogue(place).problem(Catalogue(place).read("demo")) == ""


def test_a_damaged_package_in_the_cache_is_fetched_again(images: Path, place: Layout, short_tmp: Path) -> None:
    cache = short_tmp / "cache"
    shutil.copytree(ROOT / "packages", cache)
    busybox = next(cache.glob("vmshell/debs/busybox-static_*"))
    whole = busybox.read_bytes()
    busybox.write_bytes(whole[:-1] + b"!")
    (cache / "vmshell/debs/part-old").mkdir()
    done = run_admin(place, "image", "build", "demo", cache=cache)
    assert done.returncode == 0, done.stderr
    assert "downloading busybox-static (" in done.stderr
    assert busybox.read_bytes() == whole
    assert not list(cache.glob("vmshell/debs/part-*"))


def apt_config(folder: Path, text: str) -> dict[str, str]:
    """An apt that sees the world as *text* says."""
    folder.joinpath("lists/partial").mkdir(parents=True)
    config = folder / "apt.conf"
    config.write_text(f'Dir::State::Lists "{folder}/lists";\nDir::Cache "{folder}";\nAcquire::Retries "0";\n{text}')
    return {"APT_CONFIG": str(config)}


def test_without_package_lists_we_fetch_our_own(place: Layout, short_tmp: Path) -> None:
    cache = short_tmp / "cache"
    environ = apt_config(short_tmp / "apt", "")
    done = run_admin(place, "image", "build", "demo", cache=cache, **environ)
    assert done.returncode == 0, done.stderr
    assert "fetching package lists of our own from the mirror" in done.stderr
    assert not list((short_tmp / "apt/lists").glob("*Packages*"))  # the host's stay as they were
    assert left_in(place) == [".lock", "demo"]
    again = run_admin(place, "image", "build", "demo", cache=cache, **environ)
    assert again.returncode == 0
    assert "fetching" not in again.stderr + again.stdout


def test_no_mirror_is_one_sentence(place: Layout, short_tmp: Path) -> None:
    sources = short_tmp / "sources.list"
    sources.write_text("deb [trusted=yes] http://127.0.0.1:9/debian bookworm main\n")
    environ = apt_config(short_tmp / "apt", f'Dir::Etc::SourceList "{sources}";\nDir::Etc::SourceParts "/dev/null";\n')
    begun = time.monotonic()
    done = run_admin(place, "image", "build", "demo", cache=short_tmp / "cache", **environ)
    assert done.returncode == 69
    *_, sentence, hint = done.stderr.splitlines()
    assert sentence.startswith("vmshell-admin: image demo was not built: apt-get says: ")
    assert hint == "  nothing was changed"
    assert "Traceback" not in done.stderr
    assert left_in(place) == [".lock"]
    assert time.monotonic() - begun < 60


def test_no_apt_is_one_sentence(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(short_tmp))
    with pytest.raises(PackageError, match="this host has no apt-get"):
        Packages(str(short_tmp), print)


@pytest.mark.parametrize(("name", "most"), [("demo", 12), ("demo-disk", 16)])
def test_no_space_leaves_nothing(images: Path, place: Layout, name: str, most: int) -> None:
    """RLIMIT_FSIZE stands in for a full disk: the same errors at the same places, and no root needed."""
    command = admin_command(place, "image", "build", name)
    environ = {**os.environ, "XDG_CACHE_HOME": str(ROOT / "packages")}

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most << 20, most << 20))

    done = subprocess.run(command, env=environ, preexec_fn=child, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 69, done.stderr
    assert f"image {name} was not built: " in done.stderr
    assert "Traceback" not in done.stderr
    assert left_in(place) == [".lock"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a file system of its own")
def test_a_full_disk_leaves_nothing(images: Path, place: Layout) -> None:
    os.makedirs(place.state)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", place.state], check=True)
    try:
        done = run_admin(place, "image", "build", "demo-disk")
        assert done.returncode == 69, done.stderr
        assert "No space left on device" in done.stderr
        assert left_in(place) == [".lock"]
    finally:
        subprocess.run(["umount", place.state], check=True)


@pytest.mark.parametrize(
    ("name", "moment"),
    [("SIGINT", "unpacking linux"), ("SIGKILL", "unpacking linux"), ("SIGTERM", "writing a disk"), ("SIGHUP", "unpacking busy")],
)
def test_an_interrupted_build_leaves_nothing(images: Path, place: Layout, name: str, moment: str) -> None:
    environ = {**os.environ, "XDG_CACHE_HOME": str(ROOT / "packages")}
    command = admin_command(place, "image", "build", "demo-disk")
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        while not process.stderr.readline().startswith(moment):
            assert process.poll() is None
        process.send_signal(signal.Signals[name])
        rest = process.communicate(timeout=60)[1]
    if name == "SIGKILL":
        assert any(entry.startswith(".build-") for entry in left_in(place))
        assert Catalogue(place).names() == []
    else:
        assert process.returncode == 130
        assert rest.endswith("vmshell-admin: interrupted\n")
        assert children_of(process.pid) == []
        assert left_in(place) == [".lock"]
    with Catalogue(place).locked():
        assert left_in(place) == [".lock"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_ordinary_user_builds_the_same_disk(images: Path, short_tmp: Path) -> None:
    """Every file in it belongs to root, though the builder is not root."""
    uid = 64321
    home = short_tmp / "home"
    (home / ".cache/vmshell").mkdir(parents=True)
    shutil.copytree(ROOT / "packages/vmshell/debs", home / ".cache/vmshell/debs")
    subprocess.run(["chown", "-R", f"{uid}:{uid}", str(home)], check=True)
    layout = Layout(etc=f"{home}/e", state=f"{home}/s", run=f"{home}/r", log=f"{home}/l", embedded=True)
    command = admin_command(layout, "image", "build", "demo-disk", python="/usr/bin/python3")
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "env", "-i", f"HOME={home}", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    partition = f"{layout.images}/demo-disk/disk.raw?offset={1 << 20}"
    for path in ("/", "/bin", "/bin/busybox", "/bin/sh", "/etc/shadow", "/boot/grub/grub.cfg", "/sbin"):
        debugfs = ["/usr/sbin/debugfs", "-R", f"stat {path}", partition]
        said = subprocess.run(debugfs, capture_output=True, text=True, timeout=60, check=True)
        owner = next(line for line in said.stdout.splitlines() if line.startswith("User:")).split()
        assert owner[:4] == ["User:", "0", "Group:", "0"], path
    assert Catalogue(layout).problem(Catalogue(layout).read("demo-disk")) == ""
