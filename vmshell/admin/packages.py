"""Debian packages without installing them: resolve, download, keep, verify, unpack. Works as any user.

apt decides which version and checks the signatures; a package is kept in the cache and used again as long as it has the size
and hash that apt names. Where the host's package lists are missing or older than the mirror, we fetch lists of our own into
the cache: an ordinary user cannot refresh the host's, and root should not be surprised by it.
Runs in: vmshell-admin. Touches its cache directory; starts apt-cache, apt-get, dpkg-deb.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

APT_TIMEOUT = 900  # seconds; a slow mirror and 30 MB

_PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_URI = re.compile(r"'(?P<uri>[^']+)' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})")
_DEPENDS = re.compile(r"^ *\|?(?:Pre)?Depends: (\S+)$", re.MULTILINE)


class PackageError(Exception):
    """Why the packages could not be had, as a clause."""


@dataclass(frozen=True)
class Package:
    file: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.file.partition("_")[0]

    @property
    def version(self) -> str:
        return self.file.split("_")[1].replace("%3a", ":")


class Packages:
    """A cache directory and the packages in it."""

    def __init__(self, cache: str, say: Callable[[str], None]) -> None:
        self.debs = f"{cache}/debs"
        self._own_lists = f"{cache}/apt"
        self._say = say
        self._options: list[str] = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        for tool in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise PackageError(f"this host has no {tool}; images are built from Debian's packages on a Debian host")
        os.makedirs(self.debs, exist_ok=True)

    def fetch(self, wanted: Callable[[Packages], list[str]]) -> dict[str, Package]:
        """Have every package that *wanted* names in the cache; return them by name. Raises PackageError.

        *wanted* is asked again when the lists were renewed: a kernel's package name holds its version.
        """
        try:
            return self._fetch(wanted(self))
        except PackageError as exc:
            problem = str(exc)
        fetched_before = os.path.isdir(self._own_lists)
        self._use_own_lists()
        if fetched_before:
            try:
                return self._fetch(wanted(self))
            except PackageError:
                pass  # old by now, too
        self._say(f"{problem}; fetching package lists of our own from the mirror")
        # Without the error mode an unreachable mirror is a warning, and the old lists would be taken for new.
        self._run(["apt-get", *self._options, "-o", "APT::Update::Error-Mode=any", "update"])
        return self._fetch(wanted(self))

    def depends(self, name: str) -> list[str]:
        """The packages that *name* depends on by name."""
        output = self._run(["apt-cache", *self._options, "depends", "--no-recommends", "--no-suggests", name])
        return [found for found in _DEPENDS.findall(output) if _PACKAGE.fullmatch(found)]

    def unpack(self, package: Package, target: str) -> None:
        """Unpack *package*'s files below *target*.

        The files are written here and not by dpkg-deb's own tar, which would go on writing after we were interrupted.
        """
        command = ["dpkg-deb", "--fsys-tarfile", f"{self.debs}/{package.file}"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                    for member in archive:
                        _extract(archive, member, target)
            except tarfile.TarError as exc:
                raise PackageError(f"{package.file} cannot be unpacked ({exc})") from exc
            finally:
                process.stdout.close()  # else a dpkg-deb with more to say waits for ever, and we for it

    def _fetch(self, names: list[str]) -> dict[str, Package]:
        output = self._run(["apt-get", *self._options, "download", "--print-uris", *names])
        packages = [
            Package(found["file"], int(found["size"]), found["sha256"]) for found in map(_URI.match, output.splitlines()) if found
        ]
        by_name = {package.name: package for package in packages}
        absent = [name for name in names if name not in by_name]
        if absent:
            raise PackageError(f"the package lists do not have {absent[0]}")
        missing = [package for package in packages if not self._is_whole(f"{self.debs}/{package.file}", package)]
        if missing:
            self._download(missing)
        return by_name

    def _download(self, packages: list[Package]) -> None:
        total = sum(package.size for package in packages)
        self._say(f"downloading {', '.join(package.name for package in packages)} ({total / 1e6:.1f} MB)")
        self._remove_parts()
        with tempfile.TemporaryDirectory(prefix="part-", dir=self.debs) as part:
            pins = [f"{package.name}={package.version}" for package in packages]
            self._run(["apt-get", *self._options, "download", *pins], cwd=part)
            for package in packages:
                if not self._is_whole(f"{part}/{package.file}", package):
                    raise PackageError(f"{package.file} arrived damaged")
                self._forget_older(package)
                os.replace(f"{part}/{package.file}", f"{self.debs}/{package.file}")

    def _remove_parts(self) -> None:
        for name in os.listdir(self.debs):
            if name.startswith("part-"):
                shutil.rmtree(f"{self.debs}/{name}", ignore_errors=True)

    def _forget_older(self, package: Package) -> None:
        for file in os.listdir(self.debs):
            if file.startswith(f"{package.name}_"):
                os.unlink(f"{self.debs}/{file}")

    def _use_own_lists(self) -> None:
        lists, archives = f"{self._own_lists}/lists", f"{self._own_lists}/cache"
        for folder in (f"{lists}/partial", f"{archives}/archives/partial"):
            os.makedirs(folder, exist_ok=True)
        self._options += ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}"]

    @staticmethod
    def _is_whole(path: str, package: Package) -> bool:
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != package.size:
                    return False
                return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256
        except FileNotFoundError:
            return False

    @staticmethod
    def _run(command: list[str], cwd: str | None = None) -> str:
        environ = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                command, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                timeout=APT_TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired as exc:
            raise PackageError(f"{command[0]} took longer than {APT_TIMEOUT} s") from exc
        if done.returncode == 0:
            return done.stdout
        complaints = [line.removeprefix("E: ") for line in done.stderr.splitlines() if line.startswith(("E: ", "dpkg-deb: "))]
        raise PackageError(f"{command[0]} says: {complaints[0] if complaints else f'exit status {done.returncode}'}")


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, target: str) -> None:
    """Write one file, folder or link. Owners and dates are of no use here, and devices are in no package."""
    path = os.path.normpath(f"{target}/{member.name}")
    if path != target and not path.startswith(f"{target}/"):
        raise tarfile.TarError(f"{member.name} lies outside")
    if member.isdir():
        os.makedirs(path, exist_ok=True)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if member.issym():
        os.symlink(member.linkname, path)
    elif member.islnk():
        os.link(os.path.normpath(f"{target}/{member.linkname}"), path)
    elif source := archive.extractfile(member):
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, member.mode & 0o700)) as file:
            shutil.copyfileobj(source, file, 1 << 20)
