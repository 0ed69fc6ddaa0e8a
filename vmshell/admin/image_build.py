"""The recipes: which packages `demo` and `demo-disk` need, and how their files are made. Each takes seconds; none needs root.

Runs in: vmshell-admin. Touches the directories it is given; starts busybox (its list of applets) and the tools of `disk.py`.
"""

from __future__ import annotations

import gzip
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from . import cpio, disk, guest
from .catalogue import Image
from .modules import Modules
from .packages import Package, Packages

KERNEL = "linux-image-cloud-amd64"  # the package that names the current kernel; virtual machines' hardware only, hence small
# notests: the self-tests of algorithms nobody uses here cost a tenth of the boot under TCG.
CMDLINE = "console=ttyS0 quiet panic=-1 cryptomgr.notests"
MEMORY_MIN = 96  # MiB; seen: 64 is too little to unpack kernel and initramfs
DISK_SIZE = 128 << 20
_GZIP_LEVEL = 6

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What a recipe works with: unpacked packages, a place for its files, a place for the rest."""

    name: str
    release: str
    packages: str
    target: str
    work: str
    say: Say


@dataclass(frozen=True)
class Recipe:
    packages: tuple[str, ...]
    make: Callable[[Job], Image]


def build(recipe: Recipe, name: str, packages: Packages, work: str, say: Say) -> tuple[str, Image, str]:
    """Make the image in *work*; return its directory, what it is, and what it was made from."""
    got = packages.fetch(lambda now: [*kernel_packages(now), *recipe.packages])
    unpacked, target = f"{work}/packages", f"{work}/image"
    os.mkdir(target)
    for package in got.values():
        say(f"unpacking {package.name} {package.version}")
        packages.unpack(package, unpacked)
    image = recipe.make(Job(name, _release(unpacked), unpacked, target, work, say))
    return target, image, _origin(got)


def kernel_packages(packages: Packages) -> list[str]:
    """The kernel's package, by way of the package that only depends on it, and any that hold its modules."""
    found: list[str] = []
    waiting = [KERNEL]
    while waiting:
        for name in packages.depends(waiting.pop()):
            if re.fullmatch(r"linux-(image|modules|binary)-[0-9].*", name) and name not in found:
                found.append(name)
                waiting.append(name)
    return found or [KERNEL]  # which then is reported as what the lists do not have


def make_demo(job: Job) -> Image:
    """The whole system in an initramfs, started by the kernel directly."""
    busybox, applets = _busybox(job.packages)
    system = guest.tree(busybox, applets, job.name)
    modules = Modules(f"{_lib_modules(job.packages)}/{job.release}").in_order(guest.MODULES)
    job.say(f"writing an initramfs with busybox and {len(modules)} modules")
    _write(f"{job.target}/initrd.gz", _compressed(guest.initrd(system, modules)))
    _write(f"{job.target}/vmlinuz", _kernel(job))
    return Image(
        name=job.name,
        description=f"Linux {job.release} and busybox in memory: up in seconds, forgets everything when off",
        memory_min=MEMORY_MIN,
        boot={"kernel": "vmlinuz", "initrd": "initrd.gz", "cmdline": CMDLINE},
    )


def make_demo_disk(job: Job) -> Image:
    """The same system on a disk that boots by itself."""
    busybox, applets = _busybox(job.packages)
    modules = Modules(f"{_lib_modules(job.packages)}/{job.release}").in_order(guest.MODULES)
    boot = [
        cpio.directory("boot"),
        cpio.regular("boot/vmlinuz", _kernel(job)),
        cpio.regular("boot/initrd.gz", _compressed(guest.initrd_for_disk(busybox, applets, modules))),
        cpio.directory("boot/grub"),
        cpio.regular("boot/grub/grub.cfg", disk.GRUB_CFG),
    ]
    system = [*guest.tree(busybox, applets, job.name), *boot]
    root = f"{job.work}/root"
    cpio.write_tree(system, root)
    job.say(f"writing a disk of {DISK_SIZE >> 20} MiB with GRUB and ext4")
    disk.make_disk(f"{job.target}/disk.raw", DISK_SIZE, root, system, disk.grub_core(job.packages, job.work))
    return Image(
        name=job.name,
        description=f"Linux {job.release} and busybox on an ext4 disk, started by GRUB: keeps what you write",
        memory_min=MEMORY_MIN,
        disk="disk.raw",
        disk_size=DISK_SIZE,
    )


RECIPES = {
    "demo": Recipe(("busybox-static",), make_demo),
    # libdevmapper: grub-mkimage is linked with it, and a small host does not have it.
    "demo-disk": Recipe(("busybox-static", "grub-pc-bin", "grub-common", "libdevmapper1.02.1"), make_demo_disk),
}


def _lib_modules(packages: str) -> str:
    # /lib became /usr/lib between Debian 12 and 13.
    for folder in (f"{packages}/usr/lib/modules", f"{packages}/lib/modules"):
        if os.path.isdir(folder):
            return folder
    raise FileNotFoundError(2, "the kernel package holds no modules", packages)


def _release(packages: str) -> str:
    return os.listdir(_lib_modules(packages))[0]


def _kernel(job: Job) -> bytes:
    with open(f"{job.packages}/boot/vmlinuz-{job.release}", "rb") as file:
        return file.read()


def _busybox(packages: str) -> tuple[bytes, list[str]]:
    path = next(path for path in (f"{packages}/usr/bin/busybox", f"{packages}/bin/busybox") if os.path.isfile(path))
    listing = subprocess.run([path, "--list"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)
    with open(path, "rb") as file:
        return file.read(), [applet for applet in listing.stdout.split() if "/" not in applet]


def _compressed(entries: list[cpio.Entry]) -> bytes:
    return gzip.compress(cpio.archive(entries), _GZIP_LEVEL, mtime=0)


def _write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)


def _origin(packages: dict[str, Package]) -> str:
    return "made from " + ", ".join(f"{package.name} {package.version}" for package in packages.values())
