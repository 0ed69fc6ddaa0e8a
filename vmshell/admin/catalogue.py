"""The image catalogue on disk: read it, say which VMs use an image, and change it so that nobody ever sees half an image.

An image is made in a hidden directory beside its place and exchanged with the old one in one step. A lock file keeps two
vmshell-admins apart, so a hidden directory found while holding the lock was left by one that was killed, and is deleted.
The old files live on for whoever has them open. A *disk* that VMs have overlays over is never replaced: their own disks
hold only the differences to it.
Runs in: vmshell-admin. Touches STATE/images; `usage.py` says who uses what.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .. import brokeraccount
from ..layout import Layout
from ..names import NAME_CHARS, check_name
from ..refusals import CatalogueBusy, ImageDamaged, ImageInUse, NoSuchImage
from . import usage

_HIDDEN = ".build-"
_DIRECTORY_MODE = 0o755  # of an image, and of all of them below a 0700 state directory; jobs of other uids get descriptors only
_SHARED_MODE = 0o750  # of all images below a state directory that others may enter: root's, and the broker's to read
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class Image:
    """What an image.toml says. *files* maps each file to its sha256."""

    name: str
    description: str = ""
    memory_min: int = 0
    boot: dict[str, str] = field(default_factory=dict)
    disk: str = ""
    disk_size: int = 0
    files: dict[str, str] = field(default_factory=dict)

    def to_toml(self, origin: str) -> str:
        """The image.toml; *origin* says in a comment what the image was made from."""
        lines = [f"# {origin}", f"description = {_quoted(self.description)}", f"memory_min = {self.memory_min}"]
        if self.boot:
            lines += ["", "[boot]", *(f"{key} = {_quoted(value)}" for key, value in self.boot.items())]
        if self.disk:
            lines += ["", "[disk]", f"file = {_quoted(self.disk)}", 'format = "raw"', f"size = {self.disk_size}"]
        lines += ["", "[sha256]", *(f"{_quoted(file)} = {_quoted(digest)}" for file, digest in self.files.items())]
        return "\n".join(lines) + "\n"


class Catalogue:
    """The images of one layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.path = layout.images

    def names(self) -> list[str]:
        try:
            found = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if name[:1].isalpha() and NAME_CHARS.issuperset(name))

    def exists(self, name: str) -> bool:
        return os.path.isdir(f"{self.path}/{check_name(name, 'image')}")

    def read(self, name: str) -> Image:
        """Raises NoSuchImage or ImageDamaged."""
        if not self.exists(name):
            raise NoSuchImage(image=name)
        try:
            with open(f"{self.path}/{name}/image.toml", "rb") as file:
                table = tomllib.load(file)
            boot, disk = table.get("boot", {}), table.get("disk", {})
            return Image(
                name=name,
                description=str(table.get("description", "")),
                memory_min=int(table.get("memory_min", 0)),
                boot={key: str(boot[key]) for key in ("kernel", "initrd", "cmdline") if key in boot},
                disk=str(disk.get("file", "")),
                disk_size=int(disk.get("size", 0)),
                files={str(file): str(digest) for file, digest in table.get("sha256", {}).items()},
            )
        except FileNotFoundError as exc:
            raise ImageDamaged(image=name, problem="its image.toml is missing") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as exc:
            raise ImageDamaged(image=name, problem=f"its image.toml cannot be read ({exc})") from exc

    def problem(self, image: Image) -> str:
        """What is wrong with *image*'s files, or an empty string. Reads them whole."""
        needed = {image.disk, image.boot.get("kernel", ""), image.boot.get("initrd", "")} - {""}
        unpinned = sorted(needed - image.files.keys())
        if unpinned:
            return f"{unpinned[0]} has no hash"
        for file, digest in image.files.items():
            if "/" in file:
                return f"{file} is not a name in its directory"
            try:
                if file_digest(f"{self.path}/{image.name}/{file}") != digest:
                    return f"{file} is not the file that was built"
            except FileNotFoundError:
                return f"{file} is missing"
        if image.disk and os.path.getsize(f"{self.path}/{image.name}/{image.disk}") != image.disk_size:
            return f"{image.disk} does not have the recorded size"
        return ""

    def must_be_unused(self, name: str, advice: str) -> None:
        """Raises ImageInUse, or CannotTell where nobody can say who uses it."""
        users = usage.users_of(self._layout, name)
        if users.count:
            raise ImageInUse(image=name, users=users, advice=advice)

    def must_be_replaceable(self, name: str) -> None:
        """Raises ImageInUse or CannotTell where VMs have overlays over the disk of *name*; a kernel may change under its VMs."""
        if not self.exists(name):
            return
        try:
            has_disk = bool(self.read(name).disk)
        except ImageDamaged:
            has_disk = False  # no VM can boot from it; building it again is the cure
        if has_disk:
            self.must_be_unused(name, f"build it beside the old one: `vmshell-admin image build {name} --as NAME`")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only vmshell-admin that changes the catalogue, which exists and is clean then; raises CatalogueBusy."""
        if not os.path.isdir(self.path):
            self._make_folder()
        lock = os.open(f"{self.path}/.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in os.listdir(self.path):
                if name.startswith(_HIDDEN):
                    shutil.rmtree(f"{self.path}/{name}", ignore_errors=True)
            yield
        except BlockingIOError as exc:
            raise CatalogueBusy() from exc
        finally:
            os.close(lock)

    def _make_folder(self) -> None:
        """Make the folder of all images, which nobody has made yet: for the broker to read, and where there is none, for oneself.

        One that is there belongs to whoever made it (tmpfiles, on an installed host), and so do its owner and mode.
        """
        group = None if self._layout.embedded or os.geteuid() != 0 else _broker_group()
        os.makedirs(self._layout.state, mode=0o700 if group is None else 0o711, exist_ok=True)
        os.mkdir(self.path, 0o700)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if group is not None:
                os.fchown(folder, -1, group)
            os.fchmod(folder, _DIRECTORY_MODE if group is None else _SHARED_MODE)
        finally:
            os.close(folder)

    @contextmanager
    def workspace(self) -> Iterator[str]:
        """A hidden directory on the catalogue's file system, gone afterwards whatever happens."""
        path = tempfile.mkdtemp(prefix=_HIDDEN, dir=self.path)
        try:
            yield path
        finally:
            # A program that was killed in the middle of its work may be at its last write still.
            for _ in range(50):
                shutil.rmtree(path, ignore_errors=True)
                if not os.path.lexists(path):
                    break
                time.sleep(0.1)

    def publish(self, folder: str, image: Image, origin: str) -> None:
        """Put *folder* (in a workspace) in the place of *image* with an image.toml that pins every file in it."""
        files = {file: file_digest(f"{folder}/{file}") for file in sorted(os.listdir(folder))}
        complete = Image(image.name, image.description, image.memory_min, image.boot, image.disk, image.disk_size, files)
        with open(f"{folder}/image.toml", "x", encoding="utf-8") as toml:
            toml.write(complete.to_toml(origin))
        for file in os.listdir(folder):
            os.chmod(f"{folder}/{file}", 0o444)
            _sync(f"{folder}/{file}")
        os.chmod(folder, _DIRECTORY_MODE)
        _sync(folder)
        self.must_be_replaceable(image.name)  # again: a VM may have been made of it during the build
        target = f"{self.path}/{image.name}"
        if os.path.lexists(target):
            _exchange(folder, target)
        else:
            os.rename(folder, target)
        _sync(self.path)

    def remove(self, name: str) -> None:
        """Take *name* away. Renamed first, so that nobody sees half of it; the workspace then deletes it."""
        with self.workspace() as hidden:
            os.rename(f"{self.path}/{name}", f"{hidden}/{name}")
            _sync(self.path)


def file_digest(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _exchange(one: str, other: str) -> None:
    """Swap two directories in one step, so that at each moment there is a whole image of that name."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), other)
    # A file system that cannot exchange (NFS, some FUSE): the image is away for a moment.
    aside = f"{one}.old"
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _broker_group() -> int | None:
    """The group of the broker's account, if this host has one."""
    try:
        return pwd.getpwnam(brokeraccount.NAME).pw_gid
    except KeyError:
        return None


def _quoted(text: str) -> str:
    # JSON's string syntax is TOML's basic string for everything we write.
    return json.dumps(text, ensure_ascii=True)
