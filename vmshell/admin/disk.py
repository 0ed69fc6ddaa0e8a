"""A bootable disk made by an ordinary user: MBR, GRUB for a BIOS, one ext4 partition filled from a directory.

Nothing is installed or mounted: grub-mkimage and its modules come from an unpacked package, mke2fs fills the file system.

    sector 0           GRUB's boot.img with our partition table in it; it loads sector 1
    sectors 1…2047     GRUB's core.img, which finds /boot/grub/grub.cfg on the partition
    sector 2048…       ext4
Runs in: vmshell-admin. Touches the files it is told; starts grub-mkimage, mke2fs, debugfs.
"""

from __future__ import annotations

import os
import struct
import subprocess

from .cpio import Entry

SECTOR = 512
PARTITION_START = 2048  # sectors; 1 MiB, where partitions have begun for a decade
_TABLE = 446  # offset of the partition table in the MBR
_TOOL_TIMEOUT = 300

# Enough to find the kernel, show a menu on the serial port, and mend a broken menu by hand.
_GRUB_MODULES = ["biosdisk", "part_msdos", "ext2", "normal", "configfile", "linux", "serial", "terminal", "echo", "ls", "reboot"]

_GRUB_FIRST = """\
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
set root=(hd0,msdos1)
set prefix=(hd0,msdos1)/boot/grub
normal
"""

GRUB_CFG = """\
# Press Escape in the first second for the menu.
set timeout_style=hidden
set timeout=1
menuentry "vmshell demo-disk" {
    linux /boot/vmlinuz console=ttyS0 quiet panic=-1 cryptomgr.notests
    initrd /boot/initrd.gz
}
"""


class DiskError(Exception):
    """Why the disk could not be made, as a clause."""


def grub_core(unpacked: str, work: str) -> tuple[bytes, bytes]:
    """Return (boot.img, core.img) of the GRUB packages in *unpacked*."""
    modules = f"{unpacked}/usr/lib/grub/i386-pc"
    config, core = f"{work}/first.cfg", f"{work}/core.img"
    with open(config, "w", encoding="utf-8") as file:
        file.write(_GRUB_FIRST)
    command = [f"{unpacked}/usr/bin/grub-mkimage", "--format=i386-pc", "--prefix=(hd0,msdos1)/boot/grub"]
    command += [f"--directory={modules}", f"--config={config}", f"--output={core}", *_GRUB_MODULES]
    _run(command, {"LD_LIBRARY_PATH": f"{unpacked}/usr/lib/x86_64-linux-gnu:{unpacked}/lib/x86_64-linux-gnu"})
    with open(f"{modules}/boot.img", "rb") as boot, open(core, "rb") as image:
        return boot.read(), image.read()


def make_disk(path: str, size: int, root: str, entries: list[Entry], grub: tuple[bytes, bytes]) -> None:
    """Write the disk of *size* bytes to *path* with the directory *root* (made from *entries*) as its file system."""
    boot, core = grub
    if len(core) > (PARTITION_START - 1) * SECTOR:
        raise DiskError(f"GRUB's core has {len(core)} bytes, more than fits before the partition")
    with open(path, "xb") as disk:
        disk.truncate(size)
        disk.write(master_boot_record(boot, size // SECTOR - PARTITION_START))
        # boot.img and core.img's own first sector are built to find what follows at sectors 1 and 2.
        disk.write(core)
    _make_filesystem(path, (size - PARTITION_START * SECTOR) // 1024, root)
    _give_to_root(path, entries)


def master_boot_record(boot: bytes, sectors: int) -> bytes:
    """*boot*'s code with one bootable Linux partition of *sectors* from PARTITION_START on."""
    if len(boot) != SECTOR or boot[510:] != b"\x55\xaa":
        raise DiskError("GRUB's boot.img is not a boot sector")
    no_chs = b"\xfe\xff\xff"  # beyond what cylinders, heads and sectors can say: use the sector numbers
    partition = struct.pack("<B3sB3sII", 0x80, no_chs, 0x83, no_chs, PARTITION_START, sectors)
    return boot[:_TABLE] + partition + b"\0" * 48 + b"\x55\xaa"


def _make_filesystem(path: str, kibibytes: int, root: str) -> None:
    # The features switched off are newer than the GRUB of Debian 12. lazy_*: a guest must not grow its overlay by itself.
    options = f"offset={PARTITION_START * SECTOR},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    features = "^metadata_csum_seed,^orphan_file"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-O", features, "-E", options]
    _run([*command, "-d", root, path, f"{kibibytes}k"])


def _give_to_root(path: str, entries: list[Entry]) -> None:
    """mke2fs copies the owner of every file, and that is whoever builds."""
    lines = [f"set_inode_field /{entry.path} {owner} 0" for entry in entries for owner in ("uid", "gid")]
    script = "\n".join(lines) + "\n"
    complaints = _run(["debugfs", "-w", "-f", "-", f"{path}?offset={PARTITION_START * SECTOR}"], given=script).splitlines()
    # Line 1 is its version; it echoes each command and exits 0 whatever happened.
    bad = [line for line in complaints[1:] if line and not line.startswith("debugfs")]
    if bad:
        raise DiskError(f"debugfs says: {bad[0]}")


def _run(command: list[str], environ: dict[str, str] | None = None, given: str = "") -> str:
    """Run a tool; return what it said on standard error."""
    tool = os.path.basename(command[0])
    try:
        done = subprocess.run(
            command, env={**os.environ, "LC_ALL": "C", **(environ or {})}, input=given, capture_output=True, text=True,
            timeout=_TOOL_TIMEOUT, check=False,
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise DiskError(f"this host has no {tool}") from exc
    except subprocess.TimeoutExpired as exc:
        raise DiskError(f"{tool} took longer than {_TOOL_TIMEOUT} s") from exc
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise DiskError(f"{tool} says: {lines[-1] if lines else f'exit status {done.returncode}'}")
    return done.stderr
