"""The initramfs writer and the reader of kernel modules, against the programs that know the formats."""

from __future__ import annotations

import lzma
import os
import stat
import subprocess
from pathlib import Path

import pytest

from vmshell.admin import cpio, disk, guest
from vmshell.admin.modules import ModuleMissing, Modules, depends

TREE = [
    cpio.directory("etc"),
    cpio.regular("etc/motd", "hällo\n"),
    cpio.regular("odd-length", b"12345", 0o600),
    cpio.regular("empty", b""),
    cpio.symlink("sbin", "bin"),
    cpio.directory("tmp", 0o1777),
]


@pytest.mark.parametrize("reader", [["cpio"], ["busybox", "cpio"]])
def test_other_programs_read_the_archive(reader: list[str]) -> None:
    entries = [*TREE, cpio.directory("dev"), cpio.character_device("dev/console", 5, 1)]
    listing = subprocess.run([*reader, "-tv"], input=cpio.archive(entries), capture_output=True, timeout=60, check=True)
    lines = listing.stdout.decode().splitlines()
    assert len(lines) == len(entries)
    by_name = {line.split(" -> ")[0].split()[-1]: line for line in lines}
    assert by_name["etc"].startswith("drwxr-xr-x")
    assert by_name["odd-length"].startswith("-rw-------")
    assert by_name["tmp"].startswith("drwxrwxrwt")
    assert by_name["sbin"].endswith("sbin -> bin")
    assert by_name["dev/console"].startswith("crw-------")
    assert all("root     root" in line or "0/0" in line for line in lines)
    if reader == ["cpio"]:  # busybox does not list them
        assert "5,   1" in by_name["dev/console"]


def test_unpacked_it_is_the_tree_again(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-idm", "--quiet"], cwd=tmp_path, input=cpio.archive(TREE), timeout=60, check=True)
    written = tmp_path / "written"
    cpio.write_tree(TREE, str(written))
    for root in (tmp_path, written):
        assert (root / "etc/motd").read_text() == "hällo\n"
        assert (root / "odd-length").read_bytes() == b"12345"
        assert (root / "empty").read_bytes() == b""
        assert os.readlink(root / "sbin") == "bin"
        assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
        assert stat.S_IMODE((root / "odd-length").stat().st_mode) == 0o600


def test_the_same_tree_gives_the_same_bytes() -> None:
    assert cpio.archive(TREE) == cpio.archive(list(TREE))
    assert len(cpio.archive(TREE)) % 512 == 0


def test_a_tree_on_disk_has_no_devices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no devices"):
        cpio.write_tree([cpio.character_device("console", 5, 1)], str(tmp_path))


def test_every_file_of_the_guest_has_its_folder_before_it() -> None:
    system = guest.tree(b"busybox", ["sh", "init"], "demo")
    modules = [("virtio.ko", b"")]
    for tree in (system, guest.initrd(system, modules), guest.initrd_for_disk(b"busybox", ["sh"], modules)):
        seen = {"", *(entry.path for entry in tree if entry.kind == stat.S_IFDIR)}
        paths = [entry.path for entry in tree]
        assert len(set(paths)) == len(paths)
        made: set[str] = {""}
        for entry in tree:
            assert os.path.dirname(entry.path) in made, entry.path
            if entry.kind == stat.S_IFDIR:
                made.add(entry.path)
        assert made == seen


@pytest.mark.parametrize("name", ["_START", "_STOP", "_UDHCPC", "_INIT_FOR_DISK", "_LOAD_MODULES", "_PROFILE", "_POWER_BUTTON"])
def test_the_guests_scripts_parse(name: str) -> None:
    subprocess.run(["busybox", "sh", "-n"], input=getattr(guest, name), text=True, timeout=60, check=True)


# --- modules ----------------------------------------------------------------------------------------------------------


def module(*needs: str) -> bytes:
    return b"\x7fELF code with depends=nothing in it\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    files = {
        "drivers/net/virtio_net.ko": module("virtio_ring", "net-failover"),
        "drivers/net/net_failover.ko.xz": lzma.compress(module("failover", "virtio")),
        "net/failover.ko": module(),
        "drivers/virtio/virtio_ring.ko": module("virtio"),
        "drivers/virtio/virtio.ko": module("builtin_thing"),
        "drivers/char/virtio-rng.ko": module("virtio"),
    }
    for name, data in files.items():
        path = tmp_path / "kernel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/lib/builtin-thing.ko\n")
    return tmp_path


def test_modules_come_after_those_they_need(kernel: Path) -> None:
    found = Modules(str(kernel)).in_order(["virtio_net", "virtio_rng", "ext4", "virtio-rng"])
    names = [name for name, _ in found]
    assert names == ["virtio.ko", "virtio_ring.ko", "failover.ko", "net_failover.ko", "virtio_net.ko", "virtio_rng.ko"]
    assert all(data.startswith(b"\x7fELF") for _, data in found)  # unpacked, whatever the package held


def test_a_missing_module_is_named(kernel: Path) -> None:
    with pytest.raises(ModuleMissing, match="has no module btrfs"):
        Modules(str(kernel)).in_order(["btrfs"])


def test_depends_of_a_real_module() -> None:
    assert depends(module("a-b", "c")) == ["a_b", "c"]
    assert depends(b"no such line") == []
    assert depends(module()) == []


# --- the disk's first sector ------------------------------------------------------------------------------------------


def test_the_boot_sector_keeps_grubs_code_and_gets_our_partition(tmp_path: Path) -> None:
    code = bytes(range(256)) + bytes(190)
    sector = disk.master_boot_record(code + bytes(64) + b"\x55\xaa", 260096)
    assert sector[:446] == code
    assert len(sector) == 512
    image = tmp_path / "disk"
    image.write_bytes(sector)
    os.truncate(image, 128 << 20)
    # By its short name: the columns of a long one run into each other.
    command = ["busybox", "fdisk", "-l", image.name]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    line = next(line for line in report.stdout.splitlines() if line.lstrip().startswith(f"{image.name}1"))
    assert {"*", "2048", "262143", "83", "Linux"} <= set(line.split())


@pytest.mark.parametrize("boot", [b"", b"\0" * 512, b"\0" * 510 + b"\x55\xaa\0"])
def test_what_is_no_boot_sector_is_refused(boot: bytes) -> None:
    with pytest.raises(disk.DiskError, match="not a boot sector"):
        disk.master_boot_record(boot, 1)
