"""A host whose accounts are partly in an LDAP directory: a small Debian in namespaces, with slapd and nslcd.

No service manager: its processes are children of one shell, and end with it. The image is made once per machine (about 60 s).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from tests.host.machine import STATE, TREE

PACKAGES = "python3,libnss-ldapd,nslcd,slapd,util-linux,procps"
SUITE = "bookworm"
BASE = f"{STATE}/directory-{SUITE}"
# ann is in the directory only; bob is in the files, and in the directory's group staff2.
ENTRIES = """\
dn: dc=example,dc=net
objectClass: dcObject
objectClass: organization
o: example
dc: example

dn: uid=ann,dc=example,dc=net
objectClass: account
objectClass: posixAccount
uid: ann
cn: ann
uidNumber: 20001
gidNumber: 20000
homeDirectory: /

dn: cn=staff2,dc=example,dc=net
objectClass: posixGroup
cn: staff2
gidNumber: 20000
memberUid: bob
"""
SERVER = """\
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/nis.schema
modulepath /usr/lib/ldap
moduleload back_mdb
database mdb
directory /srv/ldap
suffix dc=example,dc=net
"""
MOUNTS = """\
set -e
mount -t overlay none -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
mount -t proc none "$2/root/proc"
mount --bind /dev "$2/root/dev"
mount -t tmpfs -o mode=755 none "$2/root/run"
exec chroot "$2/root" sh /srv/start
"""
START = """\
set -e
mkdir -p /srv/ldap /run/slapd /run/nslcd
install -d -m 0755 /run/vmshell
chown nslcd /run/nslcd
slapadd -q -f /srv/slapd.conf -l /srv/entries.ldif
slapd -h ldapi:/// -f /srv/slapd.conf
nslcd
echo ready
exec cat
"""
FILES = {
    "srv/entries.ldif": ENTRIES,
    "srv/slapd.conf": SERVER,
    "srv/start": START,
    "etc/nslcd.conf": "uid nslcd\ngid nslcd\nuri ldapi:///\nbase dc=example,dc=net\n",
    "etc/nsswitch.conf": "passwd: files ldap\ngroup: files ldap\n",
}
MORE = {"etc/passwd": "bob:x:1002:1002::/:/bin/sh\nvmshell-relay:x:900:900::/:/bin/sh\n", "etc/group": "bob:x:1002:\n"}


def why_not() -> str:
    """Empty, or the sentence why there can be none on this machine. The first call makes the image."""
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        return "a host with a directory needs root and mmdebstrap"
    os.makedirs(STATE, exist_ok=True)
    with open(f"{STATE}/.directory-lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return "" if os.path.exists(f"{BASE}/.done") else _build()


def _build() -> str:
    shutil.rmtree(BASE, ignore_errors=True)
    sources = [path for path in ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list") if os.path.exists(path)]
    command = ["mmdebstrap", "--quiet", "--variant=minbase", '--aptopt=APT::Install-Recommends "false"', f"--include={PACKAGES}"]
    made = subprocess.run([*command, SUITE, BASE, *sources[:1]], capture_output=True, text=True, timeout=900)
    if made.returncode:
        shutil.rmtree(BASE, ignore_errors=True)
        return f"a directory server's packages cannot be had here: {made.stderr.strip()[-200:]}"
    Path(f"{BASE}/.done").touch()
    return ""


class Directory:
    """`with Directory(folder) as directory:` the host runs; what is changed in it is gone with *folder*."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("upper", "work", "root"):
            (folder / name).mkdir()
        for path, text in FILES.items():
            self._write(path, text)
        for path, text in MORE.items():
            self._write(path, Path(BASE, path).read_text() + text)
        shutil.copytree(f"{TREE}/vmshell", folder / "upper/opt/vmshell", ignore=shutil.ignore_patterns("__pycache__"))
        self._init: subprocess.Popen[str] | None = None
        self._pid = 0

    def _write(self, path: str, text: str) -> None:
        target = self.folder / "upper" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def __enter__(self) -> Directory:
        spaces = ["unshare", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child"]
        self._init = subprocess.Popen(
            [*spaces, "sh", "-c", MOUNTS, "sh", BASE, str(self.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._init.stdout is not None
        assert self._init.stdout.readline() == "ready\n"
        self._pid = int(Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text())
        return self

    def __exit__(self, *_: object) -> None:
        assert self._init is not None
        self._init.communicate(timeout=60)  # its shell ends at the end of its input, and with it the namespace

    def command(self, *argv: str) -> list[str]:
        """What runs *argv* in it, as root."""
        return ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--net", "--ipc", "--root", "--wd=/", "--", *argv]

    def run(self, *argv: str) -> str:
        return subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=120, check=True).stdout
