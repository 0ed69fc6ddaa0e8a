"""The image `netdemo`: the demo guest, but its console takes commands from a program; with sshd (dropbear), scp, and raw frames.

What a guest needs beyond `demo` is a second archive behind its initramfs: the kernel unpacks one over the other.
"""

from __future__ import annotations

import gzip
import os
import subprocess
from pathlib import Path

from vmshell.admin import cpio
from vmshell.admin.catalogue import Catalogue, Image
from vmshell.admin.cpio import Entry
from vmshell.admin.packages import Packages
from vmshell.layout import Layout

PROGRAMS = {"bin/dropbear": "usr/sbin/dropbear", "bin/scp": "usr/bin/scp", "usr/lib/sftp-server": "usr/lib/openssh/sftp-server"}
LOADER = "lib64/ld-linux-x86-64.so.2"
LIBRARIES = "lib/x86_64-linux-gnu"
FRAMES = Path(__file__).parent.parent / "guest_programs/frames.c"

INITTAB = """\
::sysinit:/etc/rc.start
::once:/etc/rc.ssh
ttyS0::respawn:/etc/rc.agent
::ctrlaltdel:/sbin/reboot
::shutdown:/etc/rc.stop
"""
# Lines come in, each is run, what it says goes out: no prompt, no echo, no line editor.
AGENT = """\
#!/bin/sh
export PATH=/sbin:/bin
cd /root
stty -echo
echo agent ready
while read -r line; do eval "$line" </dev/null 2>&1; done
"""
DHCP = """\
#!/bin/sh
env >/run/lease
case "$1" in
bound|renew)
    ip addr replace "$ip/$mask" dev "$interface"
    ip route | grep -q ^default || ip route add default via "${router%% *}" dev "$interface"
    echo "search ${search:-$domain}" >/etc/resolv.conf
    for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
    hostname "${hostname:-unnamed}"
    ;;
esac
"""
SSH = """\
#!/bin/sh
mkdir -p /etc/dropbear
exec dropbear -R -F -E 2>/run/dropbear.log
"""


def entries(public_key: str, packages: str, frames: bytes) -> list[Entry]:
    """The second archive. *packages* is a folder with Debian packages unpacked."""
    found = [
        cpio.regular("etc/inittab", INITTAB),
        cpio.regular("etc/rc.agent", AGENT, 0o755),
        cpio.regular("etc/udhcpc.script", DHCP, 0o755),
        cpio.regular("etc/rc.ssh", SSH, 0o755),
        cpio.regular("etc/shells", "/bin/sh\n"),
        cpio.directory("root/.ssh", 0o700),
        cpio.regular("root/.ssh/authorized_keys", public_key, 0o600),
        cpio.directory("lib64"),
        cpio.directory(LIBRARIES),
        cpio.directory("usr/lib"),
        cpio.regular("bin/frames", frames, 0o755),
        cpio.regular(LOADER, _read(f"{packages}/{LOADER}"), 0o755),
    ]
    libraries: dict[str, str] = {}
    for target, source in PROGRAMS.items():
        found.append(cpio.regular(target, _read(f"{packages}/{source}"), 0o755))
        libraries |= _needed(packages, source)
    return found + [cpio.regular(f"{LIBRARIES}/{name}", _read(path)) for name, path in libraries.items()]


def build(layout: Layout, public_key: str) -> None:
    """Put the image into *layout*'s catalogue, where `demo` is; root logs in with *public_key*."""
    catalogue = Catalogue(layout)
    demo = catalogue.read("demo")
    with catalogue.locked(), catalogue.workspace() as work:
        packages = Packages(f"{layout.state}/packages", lambda text: None)
        for package in packages.fetch(_wanted).values():
            packages.unpack(package, f"{work}/packages")
        subprocess.run(["gcc", "-static", "-Os", "-Wall", "-o", f"{work}/frames", str(FRAMES)], check=True)
        more = cpio.archive(entries(public_key, f"{work}/packages", _read(f"{work}/frames")))
        os.mkdir(f"{work}/image")
        for name, behind in (("vmlinuz", b""), ("initrd.gz", gzip.compress(more, 6))):
            Path(work, "image", name).write_bytes(_read(f"{catalogue.path}/demo/{name}") + behind)
        image = Image(name="netdemo", description="Linux with sshd, for tests", memory_min=128, boot=demo.boot)
        catalogue.publish(f"{work}/image", image, "made for tests")


def _wanted(packages: Packages) -> list[str]:
    """The packages of the programs, and all libraries that these need."""
    waiting = ["dropbear-bin", "openssh-client", "openssh-sftp-server"]
    found = set(waiting)
    while waiting:
        for name in packages.depends(waiting.pop()):
            if name not in found and name.startswith(("lib", "zlib")):
                found.add(name)
                waiting.append(name)
    return sorted(found)


def _needed(packages: str, program: str) -> dict[str, str]:
    """The libraries that *program* loads, by name: its own loader says so."""
    folders = ":".join(f"{packages}/{folder}" for folder in (LIBRARIES, f"usr/{LIBRARIES}"))
    argv = [f"{packages}/{LOADER}", "--library-path", folders, "--list", f"{packages}/{program}"]
    listing = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines() if "=>" in line]
    return {row[0]: row[2] for row in rows if row[2].startswith(f"{packages}/") and "/" not in row[0]}


def _read(path: str) -> bytes:
    return Path(path).read_bytes()
