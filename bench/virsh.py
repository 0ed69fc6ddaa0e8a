"""P5: `vmshell boot` beside `virsh start` of the equal domain, whole commands, under a libvirtd of our own.

That libvirtd and its virtlogd run in mount, process and network namespaces made here: what they keep is in memory, they see no
other libvirt and no firewall, and no init, polkit, cgroup or security module takes part. They see no /dev/kvm either: where it
is there but does not run, libvirt looks at QEMU anew at each start, seconds long; so it is measured at its best. The rest is
libvirt's default: QEMU as an ordinary user with a /dev of its own, seccomp, its output and the console's in virtlogd's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

from bench.boot import VM, prepared
from bench.figures import Row, compared, installed, place, skipped
from tests.images import install_images
from vmshell.launch.argv import CPU, QEMU
from vmshell.messages import Kill

WHAT = "`boot` against `virsh start` of the equal domain"
MEMORY = 256
PAIRS = 7
PROGRAMS = ("virsh", "libvirtd", "virtlogd", "unshare", "mount")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# The shell is process 1 of the namespace: it must go on waiting, or QEMUs that ended would stay zombies and `virsh destroy` would
# not see them gone. It waits for `cat`, which ends with our end of the pipe; process 1 takes everybody else with it.
INIT = """
set -e
exec 3<&0
for folder in /run /var/lib /var/cache /var/log /etc/libvirt; do mount -t tmpfs -o mode=755 none $folder; done
mkdir /run/dev
mount -t tmpfs -o mode=755 none /run/dev
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /run/dev
mkdir /run/dev/pts /run/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 none /run/dev/pts
mount -t tmpfs -o mode=1777 none /run/dev/shm
ln -s pts/ptmx /run/dev/ptmx
umount --recursive --lazy /dev
mount --move /run/dev /dev
mkdir -p /var/log/libvirt/qemu
cp "$0"/*.conf /etc/libvirt
for file in passwd group; do
    { cat /etc/$file; cat "$0/$file"; } >/run/$file
    mount --bind /run/$file /etc/$file
done
cat <&3 >/dev/null &
cat=$!
virtlogd &
{ libvirtd || :; kill $cat; } &
wait $cat
"""

FILES = {
    "qemu.conf": 'security_driver = "none"\ncgroup_controllers = []\n',
    "libvirtd.conf": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\n',
    # Debian's account for QEMU comes with another package than the daemon. Where it exists, its own line comes first and counts.
    "passwd": "libvirt-qemu:x:64055:64055::/nonexistent:/usr/sbin/nologin\n",
    "group": "libvirt-qemu:x:64055:\n",
}

DOMAIN = """<domain type="qemu">
  <name>{name}</name>
  <memory unit="MiB">{memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch="x86_64" machine="q35">hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/><vmport state="off"/></features>
  <cpu mode="custom" match="exact" check="none"><model fallback="forbid">{cpu}</model>{cpu_features}</cpu>
  <clock offset="utc"/>
  <devices>
    <emulator>{qemu}</emulator>
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
    <interface type="user"><mac address="06:00:00:00:00:01"/><model type="virtio"/><rom enabled="no"/></interface>
    <serial type="pty"><log file="/var/log/libvirt/qemu/{name}.console"/></serial>
    <rng model="virtio"><rate bytes="1024" period="1000"/><backend model="builtin"/></rng>
  </devices>
</domain>
"""


def rows() -> list[Row]:
    why = _why_not()
    if why:
        return [skipped("P5", WHAT, why)]
    with contextlib.ExitStack() as stack:
        try:
            session = stack.enter_context(prepared("demo", MEMORY, install_images))
        except (AssertionError, subprocess.CalledProcessError) as error:
            return [skipped("P5", WHAT, f"the demo image cannot be built ({str(error)[:80]})")]
        folder = stack.enter_context(place())
        xml = _domain(Path(session.layout.images, "demo"), folder)
        try:
            virsh = stack.enter_context(_libvirtd(folder))
            _timed([*virsh, "define", xml])
        except RuntimeError as error:
            return [skipped("P5", WHAT, str(error))]
        boot = [installed(folder)[1], "--layout", session.layout.to_args(), "boot", VM]

        def ours() -> float:
            took = _timed(boot)
            session.ask(Kill(vm=VM))
            return took

        def theirs() -> float:
            took = _timed([*virsh, "start", VM])
            _timed([*virsh, "destroy", VM])
            return took

        return [compared("P5", WHAT, ours, theirs, 0.35, PAIRS)]


def _why_not() -> str:
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    if os.geteuid():
        return "only root can start a libvirtd apart from the host's"
    return "" if os.path.isdir("/etc/libvirt") else "there is no /etc/libvirt to put a private one over"


def _timed(argv: list[str]) -> float:
    """A whole command that must succeed; returns its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        argv,
        env={"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    took = time.perf_counter() - began
    if done.returncode:
        said = " ".join(done.stdout.decode("utf-8", "replace").split())
        raise RuntimeError(f"{os.path.basename(argv[0])} {argv[-2]} {argv[-1]}: {said[-200:]}")
    return took


def _domain(image: Path, folder: Path) -> str:
    """Write the domain that is equal to our VM of *image*; returns its file's name. libvirt gives the files away: copies."""
    boot = tomllib.loads((image / "image.toml").read_text(encoding="utf-8"))["boot"]
    for name in ("kernel", "initrd"):
        shutil.copyfile(image / boot[name], folder / name)
    model, *words = CPU["tcg"].split(",")
    features = [word.split("=") for word in words]
    policies = {"on": "require", "off": "disable"}
    text = DOMAIN.format(
        name=VM,
        memory=MEMORY,
        kernel=folder / "kernel",
        initrd=folder / "initrd",
        cmdline=escape(boot.get("cmdline", "")),
        cpu=model,
        cpu_features="".join(f'<feature policy="{policies[value]}" name="{name}"/>' for name, value in features),
        qemu=QEMU,
    )
    xml = folder / "domain.xml"
    xml.write_text(text, encoding="utf-8")
    return str(xml)


@contextlib.contextmanager
def _libvirtd(folder: Path) -> Iterator[list[str]]:
    """A libvirtd that is ready; gives the words that begin each `virsh` command. At the end nothing of it is left.

    Should we be killed, the pipe closes all the same.
    """
    conf, log = folder / "conf", folder / "libvirtd.log"
    conf.mkdir()
    for name, text in FILES.items():
        (conf / name).write_text(text, encoding="ascii")
    namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*namespaces, "sh", "-c", INIT, str(conf)],
            env={"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/"},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        # Its socket is reached from here through its root folder; entering its namespaces would cost each `virsh` time.
        socket = f"/proc/{process.pid}/root/run/libvirt/libvirt-sock"
        virsh = ["virsh", "--quiet", "--connect", f"qemu+unix:///system?socket={socket}"]
        until = time.monotonic() + 60
        while True:
            try:
                _timed([*virsh, "list", "--all"])
                break
            except RuntimeError as error:
                if process.poll() is not None or time.monotonic() > until:
                    said = " ".join(log.read_text("utf-8", "replace").split())
                    raise RuntimeError(f"libvirtd does not start: {said[-150:] or error}") from error
            time.sleep(0.1)
        yield virsh
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
