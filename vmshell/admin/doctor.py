"""`vmshell-admin doctor`: one line for each thing that must be so on this host, and the cure where it is not.

A check is a function that yields findings; the rows of `CHECKS` name them. It changes nothing.
Runs in: vmshell-admin, as whoever typed it; what only root can see is said to be unseen.
"""

from __future__ import annotations

import os
import platform
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator

from ..errors import VmshellError, safe
from ..installed import PACKAGE_DIR
from ..messages import NetHealth, Version, Whoami
from ..refusals import BrokerDown
from . import own_records, users
from .asking import ask
from .doctor_network import check_names, check_network, check_routing
from .doctor_records import check_records
from .doctor_rights import check_rights
from .findings import ANSWER_PATIENCE, ENV, FAIL, OK, WARN, Finding, output, problem_of, states
from .verbs import Arguments, Context

QEMU_OLDEST = (7, 2)
PROBE_PATIENCE = 60.0  # seconds
LISTS_OF_SHELLS = "/etc/shells"
PROCESSES = ("launcher", "front", "broker", "relay", "tapnet")
UNITS = tuple(f"vmshell-{name}.{kind}" for name in PROCESSES for kind in ("socket", "service"))
# What sshd must answer for a member of the group, lower case as `sshd -T` prints it.
SSHD_WANTED = {
    "forcecommand": users.SHELL,
    "disableforwarding": "yes",
    "x11forwarding": "no",
    "permittunnel": "no",
    "permituserrc": "no",
    "permituserenvironment": "no",
    "authorizedkeysfile": f"{users.KEYS}/%u",
}
# Where the administrator has opened forwarding (etc/examples/40-vmshell-forwarding.conf), these instead.
SSHD_FORWARDING = {
    "disableforwarding": "no",
    "allowtcpforwarding": "local",
    "allowstreamlocalforwarding": "no",
    "allowagentforwarding": "no",
    "gatewayports": "no",
}


def run(context: Context, args: Arguments) -> int:
    """Print what every check finds; 0 if none failed (warnings do not count), else 1."""
    failed = False
    checks = SESSION_CHECKS if context.layout.embedded else CHECKS
    for subject, check in checks:
        for finding in check(context):
            failed = failed or finding.level == FAIL
            print(f"{finding.level:<4}  {subject:<13} {safe(finding.text)}")
            if finding.cure:
                print(f"{'':20}→ {safe(finding.cure)}")
    return 1 if failed else 0


# --- what runs VMs ----------------------------------------------------------------------------------------------------


def check_qemu(context: Context) -> Iterator[Finding]:
    path = shutil.which("qemu-system-x86_64", path=ENV["PATH"])
    if path is None:
        yield Finding(FAIL, "qemu-system-x86_64 is not installed", "apt-get install qemu-system-x86")
        return
    version = output(path, "--version")
    found = re.search(r"version (\d+)\.(\d+)", version)
    if found is None:
        yield Finding(FAIL, f"{path} does not say its version: {version[:80]}", "apt-get install --reinstall qemu-system-x86")
    elif tuple(map(int, found.groups())) < QEMU_OLDEST:
        yield Finding(FAIL, f"QEMU {found[1]}.{found[2]} is too old", "7.2 (Debian 12) or later is needed")
    else:
        yield Finding(OK, f"QEMU {found[1]}.{found[2]}")
    for program, package in (("qemu-img", "qemu-utils"), ("setpriv", "util-linux"), ("prlimit", "util-linux")):
        if shutil.which(program, path=ENV["PATH"]) is None:
            yield Finding(FAIL, f"{program} is not installed", f"apt-get install {package}")
    if platform.machine() != "x86_64":
        yield Finding(FAIL, f"this host is {platform.machine()}; VMs here are x86_64 and their seccomp filter is too")


def check_jail(context: Context) -> Iterator[Finding]:
    """bubblewrap, started as a VM's uid would start it."""
    if shutil.which("bwrap", path=ENV["PATH"]) is None:
        yield Finding(FAIL, "bubblewrap is not installed", "apt-get install bubblewrap")
        return
    mounts = "--ro-bind /usr /usr --symlink usr/lib64 /lib64 --symlink usr/lib /lib --proc /proc --dev /dev"
    drop = "setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --bounding-set=-all --" if os.geteuid() == 0 else ""
    problem = problem_of(*drop.split(), "bwrap", "--unshare-all", *mounts.split(), "/usr/bin/true")
    if problem:
        cure = "user namespaces may be off: sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000"
        yield Finding(FAIL, f"bubblewrap cannot make a jail: {problem}", cure)
    else:
        yield Finding(OK, "bubblewrap makes jails in user namespaces")


def check_acceleration(context: Context) -> Iterator[Finding]:
    try:
        facts = _facts(context)
    except VmshellError as exc:
        problem = f"what the broker found out about this host cannot be told: {exc.sentence()}"
        yield Finding(WARN, problem, "journalctl -u vmshell-broker")
        return
    if not facts:
        yield Finding(WARN, "nobody has looked at this host since it booted; the broker does when it starts")
    elif facts.get("problem"):
        yield Finding(FAIL, f"the broker cannot run VMs: {facts['problem']}", "journalctl -u vmshell-broker")
    elif facts.get("accel") == "kvm":
        yield Finding(OK, "KVM")
    else:
        reason = facts.get("reason") or "KVM is not used"
        yield Finding(WARN, f"no KVM: guests are emulated, perhaps 10 to 20 times slower ({reason})")


def _facts(context: Context) -> dict[str, str]:
    """What the broker says once it has looked at the host, by starting guests; in session mode also what it noted before."""
    try:
        answer = ask(context.layout, Version(), PROBE_PATIENCE)
        return {key: answer.text(key) for key in ("accel", "reason", "problem")}
    except BrokerDown:
        if not context.layout.embedded:
            raise
        return own_records.host_facts(context.layout)


# --- our own installation ---------------------------------------------------------------------------------------------


def check_code(context: Context) -> Iterator[Finding]:
    """Code that root runs may be changed by root alone, and so may every folder above it (A18)."""
    loose = list(_loose(PACKAGE_DIR)) + [path for path in (users.SHELL, "/usr/local/sbin/vmshell-admin") if _is_loose(path)]
    if loose:
        more = f" and {len(loose) - 1} more" if len(loose) > 1 else ""
        yield Finding(FAIL, f"others than root can change {loose[0]}{more}", f"chown root:root {loose[0]}; chmod go-w {loose[0]}")
    elif not os.path.exists(users.SHELL):
        yield Finding(FAIL, f"{users.SHELL} does not exist", "make install")
    else:
        yield Finding(OK, f"{os.path.dirname(PACKAGE_DIR)} belongs to root and is not writable by others")


def check_units(context: Context) -> Iterator[Finding]:
    if not os.path.isdir("/run/systemd/system"):
        yield Finding(FAIL, "this host does not run systemd", "`vmshell --session` needs none")
        return
    found = states(*UNITS)
    down = [unit for unit in UNITS if found.get(unit) != "active"]
    if down:
        words = ", ".join(f"{unit} is {found.get(unit, 'unknown')}" for unit in down)
        yield Finding(FAIL, words, f"systemctl start {' '.join(down)}; journalctl -u 'vmshell-*'")
    else:
        yield Finding(OK, "launcher, front, broker, relay and tapnet are active")


def check_sockets(context: Context) -> Iterator[Finding]:
    """The broker answers, and its socket is for the group only."""
    path = context.layout.broker_socket
    try:
        ask(context.layout, Whoami(), ANSWER_PATIENCE).number("uid")
        yield Finding(OK, "the broker answers")
    except VmshellError as exc:
        yield Finding(FAIL, exc.sentence(), "systemctl restart vmshell-front vmshell-broker; journalctl -u 'vmshell-*'")
    if os.path.exists(path) and os.stat(path).st_mode & stat.S_IWOTH:
        yield Finding(WARN, "accounts outside vmusers can reach the broker's socket", "systemctl restart vmshell-broker.socket")


PIPE_PAGES, PIPE_PAGES_WANTED = "/proc/sys/fs/pipe-user-pages-soft", 65536


def check_pipes(context: Context) -> Iterator[Finding]:
    """Pipes that users hold may not make those of others small."""
    try:
        with open(PIPE_PAGES, encoding="ascii") as file:
            pages = int(file.read())
    except (OSError, ValueError):
        return
    if 0 < pages < PIPE_PAGES_WANTED:
        words = f"fs.pipe-user-pages-soft is {pages}: a user who lets pipes grow makes others' consoles and uploads slow"
        yield Finding(WARN, words, f"sysctl fs.pipe-user-pages-soft={PIPE_PAGES_WANTED}")
    else:
        yield Finding(OK, "there is room for the pipes of consoles and uploads")


def check_images(context: Context) -> Iterator[Finding]:
    try:
        names = sorted(os.listdir(context.layout.images))
    except FileNotFoundError:
        names = []
    except OSError as exc:
        yield Finding(WARN, f"the image catalogue cannot be read ({exc.strerror})", "run doctor as root")
        return
    whole = [name for name in names if os.path.exists(f"{context.layout.images}/{name}/image.toml")]
    if whole:
        yield Finding(OK, ", ".join(whole))
    else:
        cure = "vmshell-admin --session image build demo" if context.layout.embedded else "vmshell-admin image build demo"
        yield Finding(WARN, "the catalogue holds no image, so nobody can make a VM", cure)


# --- what confines the accounts ---------------------------------------------------------------------------------------


def check_sshd(context: Context) -> Iterator[Finding]:
    """What sshd would do for a member of the group (R18): asked of sshd itself, not read from files."""
    accounts = users.confined_accounts()
    if shutil.which("sshd", path=ENV["PATH"]) is None:
        yield Finding(WARN, "there is no sshd", "apt-get install openssh-server")
        return
    if os.geteuid() != 0:
        yield Finding(WARN, "only root can ask sshd for its configuration", "run doctor as root")
        return
    if not accounts:
        cure = "vmshell-admin user add NAME --key FILE"
        yield Finding(WARN, "no account has vmshell yet, so there is nobody to ask sshd about", cure)
        return
    for entry in accounts:
        done = subprocess.run(
            ["sshd", "-T", "-C", f"user={entry.pw_name},host=localhost,addr=127.0.0.1"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, env=ENV,
        )  # fmt: skip
        if done.returncode != 0:
            yield Finding(FAIL, f"sshd refuses its configuration: {' '.join(done.stderr.split())}", "sshd -t")
            return
        wrong = list(sshd_problems(done.stdout, confined=_sockets_are_confined(context)))
        if wrong:
            cure = f"make install; then look with sshd -T -C user={entry.pw_name}"
            yield Finding(FAIL, f"for {entry.pw_name} sshd has {'; '.join(wrong)}", cure)
        else:
            yield Finding(OK, f"{entry.pw_name} gets vmshell and nothing else")


def _sockets_are_confined(context: Context) -> bool:
    """Does the packet filter hold these accounts' own sockets to their VMs? Not what the policy says: what is in force."""
    try:
        return ask(context.layout, NetHealth(), ANSWER_PATIENCE).number("confined") > 0
    except VmshellError:
        return False


def sshd_problems(answer: str, *, confined: bool = False) -> Iterator[str]:
    """Each way in which *answer* (what `sshd -T -C user=…` printed) lets an account out of vmshell.

    sshd may forward for accounts whose sockets are *confined*.
    """
    settings: dict[str, list[str]] = {}
    for line in answer.splitlines():
        key, _, value = line.partition(" ")
        settings.setdefault(key, []).append(value.strip())
    forwards = confined and settings.get("disableforwarding") == ["no"]
    for key, wanted in {**SSHD_WANTED, **(SSHD_FORWARDING if forwards else {})}.items():
        have = " ".join(settings.get(key, ["nothing"]))
        if have != wanted:
            yield f"{key} {have} (should be {wanted})"
    accepted = [value for value in settings.get("acceptenv", []) if value != "none"]
    if accepted:
        yield f"acceptenv {' '.join(accepted)} (should be none)"


def check_shells(context: Context) -> Iterator[Finding]:
    """A shell in /etc/shells may be changed away by chsh and ignored by `su -s` (A32)."""
    try:
        with open(LISTS_OF_SHELLS, encoding="utf-8", errors="replace") as file:
            listed = users.SHELL in (line.strip() for line in file)
    except FileNotFoundError:
        listed = False
    if listed:
        cure = f"remove-shell {users.SHELL}"
        yield Finding(FAIL, f"{users.SHELL} is in /etc/shells: chsh and `su -s /bin/sh` lead out of it", cure)
    else:
        yield Finding(OK, "vmshell is not in /etc/shells")


def check_accounts(context: Context) -> Iterator[Finding]:
    """Each account by itself: shell, home, groups, timers, lingering."""
    accounts = users.confined_accounts()
    for entry in accounts:
        for problem, cure in users.weaknesses(entry):
            yield Finding(WARN, f"{entry.pw_name}: {problem}", cure)
    if accounts and not any(True for entry in accounts for _ in users.weaknesses(entry)):
        yield Finding(OK, f"{len(accounts)} confined")


def check_pam(context: Context) -> Iterator[Finding]:
    """`pam_env user_readenv=1` (Debian 12's sshd, login, su) reads ~/.pam_environment: LD_PRELOAD into the shell (A12)."""
    reading = [service for service in ("sshd", "login", "su", "su-l") if _reads_user_env(f"/etc/pam.d/{service}")]
    exposed = [entry.pw_name for entry in users.confined_accounts() if not _home_is_roots(entry)]
    if reading and exposed:
        cure = f"give them the shared home (`vmshell-admin user add NAME`), or take user_readenv=1 out of /etc/pam.d/{reading[0]}"
        where = f"PAM reads ~/.pam_environment for {', '.join(reading)}"
        yield Finding(FAIL, f"{where}, and the home of {', '.join(exposed)} is not root's", cure)
    else:
        yield Finding(OK, "no account can set variables through ~/.pam_environment")
    if not os.path.exists("/etc/pam.d/vmshell"):
        yield Finding(FAIL, "/etc/pam.d/vmshell is missing; PAM would fall back to a stack that is not ours", "make install")


def _reads_user_env(path: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return any("pam_env" in line and "user_readenv=1" in line for line in file if not line.lstrip().startswith("#"))
    except OSError:
        return False


def _home_is_roots(entry: pwd.struct_passwd) -> bool:
    try:
        status = os.stat(entry.pw_dir)
    except OSError:
        return True  # what does not exist holds no file
    return status.st_uid == 0 and not status.st_mode & 0o022


# --- helpers ----------------------------------------------------------------------------------------------------------


def _loose(folder: str) -> Iterator[str]:
    """Everything in *folder*, and every folder above it, that others than root can write."""
    above = folder
    while above != "/":
        above = os.path.dirname(above)
        if _is_loose(above):
            yield above
    for path, folders, files in os.walk(folder):
        yield from (found for found in (path, *(os.path.join(path, name) for name in (*folders, *files))) if _is_loose(found))


def _is_loose(path: str) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if stat.S_ISLNK(status.st_mode):
        return status.st_uid != 0
    return status.st_uid != 0 or bool(status.st_mode & 0o022)


SESSION_CHECKS = (("qemu", check_qemu), ("jail", check_jail), ("acceleration", check_acceleration), ("images", check_images))
CHECKS = (
    ("qemu", check_qemu),
    ("jail", check_jail),
    ("code", check_code),
    ("units", check_units),
    ("broker", check_sockets),
    ("acceleration", check_acceleration),
    ("network", check_network),
    ("names", check_names),
    # After those that have just been started by being asked.
    ("rights", check_rights),
    ("routing", check_routing),
    ("records", check_records),
    ("pipes", check_pipes),
    ("images", check_images),
    ("sshd", check_sshd),
    ("shells", check_shells),
    ("accounts", check_accounts),
    ("pam", check_pam),
)
