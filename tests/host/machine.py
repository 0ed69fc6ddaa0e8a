"""A host of its own for a test: see the script `host` beside this for what it is made of.

    host = Host("t1"); host.boot(); host.install(); host.add_user("alice")
    status, out, err = host.run("alice", "list")          # through a real sshd
    host.down()
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import shlex
import shutil
import subprocess
import sys

import pexpect

from tests.guest_programs.machine_code import CODE
from tests.guests import disk_image, echo_image
from tests.host import netguest
from vmshell.layout import Layout

HERE = os.path.dirname(os.path.abspath(__file__))
TREE = os.path.dirname(os.path.dirname(HERE))
SCRIPT = f"{HERE}/host"
STATE = os.environ.get("VMSHELL_HOSTS", "/var/tmp/vmshell-hosts")
CHECKOUT = "/root/checkout"  # where the tree lies in the host
BUILD_SECONDS = 900
# What `make install` needs of the tree, so that somebody's build results do not travel along.
PARTS = ("Makefile", "setup.cfg", "pyproject.toml", "etc", "pam", "vmshell", "tapnet")


def why_not() -> str:
    """Empty, or the sentence why no host can run on this machine."""
    return subprocess.run([SCRIPT, "why"], capture_output=True, text=True, timeout=60).stdout.strip()


class Host:
    """One booted host. `put`, `exec` and `install` go in without ssh, as root; `run` and `spawn` are a user's real ssh."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dir = f"{STATE}/{name}"

    def boot(self) -> None:
        """Boot it; the machine's first one makes the image."""
        self._script("build", timeout=BUILD_SECONDS)
        self._script("boot", self.name, timeout=180)

    def down(self) -> None:
        self._script("down", self.name, timeout=120)

    def reboot(self) -> None:
        self._script("reboot", self.name, timeout=180)

    def exec(self, *argv: str, stdin: str = "", check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run *argv* as root in the host; with *check* a failure is an AssertionError that shows what was said."""
        done = subprocess.run([SCRIPT, "exec", self.name, *argv], input=stdin, capture_output=True, text=True, timeout=timeout)
        if check and done.returncode != 0:
            raise AssertionError(f"{argv} in {self.name}: status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def sh(self, script: str, *, check: bool = True, timeout: float = 120) -> str:
        """Run a line of shell as root in the host and return what it printed."""
        return self.exec("bash", "-c", script, check=check, timeout=timeout).stdout

    def put(self, folder: str, *paths: str) -> None:
        self._script("put", f"{self.name}:{folder}", *paths, timeout=120)

    def put_tree(self, tree: str = TREE) -> None:
        self.sh(f"rm -rf {CHECKOUT}")
        self.put(CHECKOUT, *(f"{tree}/{part}" for part in PARTS))

    def make(self, *targets: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.exec("make", "-s", "-C", CHECKOUT, *targets, check=check, timeout=300)

    def install(self, tree: str = TREE) -> None:
        self.put_tree(tree)
        self.make("install")

    def admin(self, *argv: str, stdin: str = "", check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return self.exec("vmshell-admin", *argv, stdin=stdin, check=check, timeout=timeout)

    def add_user(self, name: str) -> None:
        """Make *name* a vmshell account that `run` and `spawn` can log in to."""
        self.admin("user", "add", name, "--key", "-", stdin=self.public_key())

    def public_key(self) -> str:
        with open(f"{STATE}/key.pub", encoding="utf-8") as file:
            return file.read()

    def put_image(self, name: str) -> None:
        """Put the image *name* into the host's catalogue: `echo`, `netdemo`, a guest program, or what vmshell-admin builds."""
        self.put("/var/lib/vmshell/images", image(name, self.public_key()))
        self.sh("chmod 0755 /var/lib/vmshell/images")

    def uid(self, name: str) -> int:
        return int(self.exec("id", "-u", name).stdout)

    def gid(self, name: str) -> int:
        """The number of the group that *name* has by its account."""
        return int(self.exec("id", "-g", name).stdout)

    # --- as a user, over ssh ------------------------------------------------------------------------------------------

    def ssh(self, program: str = "ssh") -> list[str]:
        """The beginning of an ssh, scp or sftp command that reaches this host whatever host name it is given."""
        return [program, "-F", f"{self.dir}/ssh_config", "-o", "ConnectTimeout=20"]

    def run(
        self, user: str, command: str = "", *, options: tuple[str, ...] = (), stdin: str = "", timeout: float = 60
    ) -> tuple[int, str, str]:
        """`ssh user@host command`: exit status, standard output, standard error."""
        argv = [*self.ssh(), *options, f"{user}@{self.name}", *([command] if command else [])]
        done = subprocess.run(argv, input=stdin, capture_output=True, text=True, errors="surrogateescape", timeout=timeout)
        return done.returncode, done.stdout, done.stderr

    def spawn(self, user: str, command: str = "", *, options: tuple[str, ...] = (), timeout: float = 60) -> pexpect.spawn:
        """A login at a terminal."""
        argv = [*self.ssh(), "-tt", *options, f"{user}@{self.name}", *([command] if command else [])]
        return _spawn(argv, timeout)

    def console(self, *argv: str, timeout: float = 60) -> pexpect.spawn:
        """*argv* as root at a terminal of the host's own (login hangs up one that is not), as on its console."""
        return _spawn([SCRIPT, "exec", self.name, "script", "-qec", shlex.join(argv), "/dev/null"], timeout)

    # --- the network around it ----------------------------------------------------------------------------------------

    def outside(self, *argv: str) -> list[str]:
        """The command that runs *argv* on this machine in the hosts' network, beside them."""
        with open(f"{STATE}/lan/pid", encoding="ascii") as file:
            return ["nsenter", f"--net=/proc/{file.read().strip()}/ns/net", *argv]

    def number(self) -> int:
        """Which host of this machine it is; its address is 203.0.113 and this."""
        with open(f"{self.dir}/num", encoding="ascii") as file:
            return int(file.read())

    def _script(self, *argv: str, timeout: float) -> None:
        done = subprocess.run([SCRIPT, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise AssertionError(f"host {' '.join(argv[:2])}: status {done.returncode}\n{done.stdout}\n{done.stderr}")


def image(name: str, public_key: str) -> str:
    """The folder of an image, made once per machine and again whenever the code that makes it changes; by one at a time."""
    with open(f"{STATE}/.images", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _image(name, public_key)


def _image(name: str, public_key: str) -> str:
    sources = [*glob.glob(f"{TREE}/vmshell/admin/*.py"), f"{TREE}/tests/guests.py", netguest.__file__, str(netguest.FRAMES)]
    made_of = b"".join(open(path, "rb").read() for path in sorted(sources)) + public_key.encode()
    digest = hashlib.sha256(made_of).hexdigest()[:16]
    root = f"{STATE}/catalogue-{digest}"
    layout = Layout(etc=f"{root}/etc", state=root, run=f"{root}/run", log=f"{root}/log", embedded=True)
    if not os.path.exists(f"{layout.images}/{name}/image.toml"):
        for old in glob.glob(f"{STATE}/catalogue-*"):
            if old != root:
                shutil.rmtree(old, ignore_errors=True)
        os.makedirs(root, exist_ok=True)
        if name == "echo":
            echo_image(layout)
        elif name in CODE:
            disk_image(layout, name, CODE[name])
        elif name == "netdemo":
            _image("demo", public_key)
            netguest.build(layout, public_key)
        else:
            admin = [sys.executable, f"{TREE}/vmshell/__main__.py", "admin", "--layout", layout.to_args()]
            done = subprocess.run([*admin, "image", "build", name], capture_output=True, text=True, timeout=BUILD_SECONDS)
            assert done.returncode == 0, done.stderr
    return f"{layout.images}/{name}"


def _spawn(argv: list[str], timeout: float) -> pexpect.spawn:
    env = {**os.environ, "TERM": "xterm"}
    return pexpect.spawn(argv[0], argv[1:], timeout=timeout, encoding="utf-8", dimensions=(24, 100), env=env)


def name_for(module: str) -> str:
    """A host name nobody else on this machine uses: the test file's initials and our pid."""
    initials = "".join(word[0] for word in module.split(".")[-1].split("_") if word)
    return f"{initials}{os.getpid()}"[:15]


