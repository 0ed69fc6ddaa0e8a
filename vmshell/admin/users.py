"""`vmshell-admin user add|list|remove`: make an account one that gets vmshell and nothing else of the host.

What confines an account, each of them worth little without the others (threats A04–A13, A32, A33): the group that sshd's drop-in
matches; vmshell as its shell; an empty home that is root's, so that `~/.ssh/rc`, `~/.pam_environment`, `~/.forward` and user
units have no place to be; keys that only root writes; no cron, at or lingering.
Runs in: vmshell-admin, as root. Touches the account database (through shadow's own programs), /etc/ssh/vmshell-keys, cron.deny
and at.deny.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

from ..errors import VmshellError
from ..messages import NetHealth
from ..refusals import AccountRefused, BadName, CannotTell, NotAllowed, ProgramFailed
from . import usage
from .asking import ask
from .verbs import Arguments, Context

SHELL = "/usr/local/bin/vmshell"
HOME = "/var/lib/vmshell-home"
KEYS = "/etc/ssh/vmshell-keys"
GROUP = "vmusers"
LINGER = "/var/lib/systemd/linger"
FIRST_UID = 1000  # below it are the system's own accounts
NOBODY = 65534
# Ways to root, to disks or to QEMU that a login shell does not close.
STRONG_GROUPS = ("root", "sudo", "adm", "wheel", "disk", "shadow", "docker", "lxd", "kvm", "libvirt")

_NAME = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
_ENV = {"PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def add(context: Context, args: Arguments) -> None:
    """Make the account NAME usable: created if need be, confined in any case. Says each thing it does; twice is as once."""
    _must_be_root("user add")
    name = check_account_name(args["NAME"])
    entry = _entry(name)
    if entry is not None:
        _refuse_system_account(entry)
    _refuse_unprepared()
    keys = read_keys(args["--key"]) if args.flag("--key") else ""
    if entry is None:
        # `*` is no password that could match, yet not the `!` that makes an sshd without PAM refuse the key too.
        place = ("--no-create-home", "--home-dir", HOME, "--shell", SHELL)
        _run("useradd", *place, "--user-group", "--groups", GROUP, "--password", "*", "--", name)
        context.say(f"created the account {name}, without a password")
    else:
        if entry.pw_dir != HOME and not args.flag("--keep-home"):
            _refuse_in_use(entry)
        _confine(context, entry, keep_home=args.flag("--keep-home"))
    if keys:
        _write_keys(context, name, keys)
    elif not os.path.exists(f"{KEYS}/{name}"):
        context.say(f"{name} has no key and cannot log in over SSH yet: `vmshell-admin user add {name} --key FILE`")
    _edit_deny_files(context, name, present=True)
    _no_linger(context, name)
    for problem, cure in weaknesses(pwd.getpwnam(name)):
        context.say(f"WARNING: {name}: {problem} ({cure})")
    _tell_broker(context)
    print(f"{name}: ready")


def show(context: Context, args: Arguments) -> None:
    """The accounts that vmshell is for: members of the group, and whoever has the shell."""
    rows = [("NAME", "UID", "SHELL", "HOME", "KEYS", "VMS")]
    accounts = confined_accounts()
    vms = _vm_counts(context, accounts)
    for entry in accounts:
        keys = _read(f"{KEYS}/{entry.pw_name}")
        rows.append(
            (
                entry.pw_name,
                str(entry.pw_uid),
                "vmshell" if entry.pw_shell == SHELL else entry.pw_shell,
                "shared" if entry.pw_dir == HOME else entry.pw_dir,
                str(sum(1 for line in keys.splitlines() if line.strip() and not line.startswith("#"))),
                vms.get(entry.pw_uid, "?"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def remove(context: Context, args: Arguments) -> None:
    """Take NAME's access away; the account too if `user add` made it and it owns nothing (its uid may go to someone else)."""
    _must_be_root("user remove")
    name = check_account_name(args["NAME"])
    entry = _entry(name)
    if entry is None or name not in {known.pw_name for known in confined_accounts()}:
        raise AccountRefused(account=name, problem="it is no vmshell account (`vmshell-admin user list` shows them)")
    delete = entry.pw_dir == HOME and not args.flag("--keep-account")
    if delete:
        _refuse_owner(context, entry)
    _end_sessions(entry)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{KEYS}/{name}")
        context.say(f"removed {KEYS}/{name}")
    if delete:
        _refuse_owner(context, entry)  # again: its sessions may have made something until they ended
        _edit_deny_files(context, name, present=False)
        _run("userdel", "--", name)
        context.say(f"deleted the account {name}")
    else:
        _run("usermod", "--shell", "/usr/sbin/nologin", "--", name)
        if name in _members():
            _run("gpasswd", "--delete", name, GROUP)
        context.say(f"the account {name} stays, with /usr/sbin/nologin as its shell")
    _tell_broker(context)
    print(f"{name}: removed")


# --- what is checked before anything is changed -----------------------------------------------------------------------


def check_account_name(name: str) -> str:
    """Return *name* if it may be an account and a file name (R24 for people's accounts), else raise BadName."""
    if not _NAME.fullmatch(name):
        raise BadName(what="account", value=name, rule="1 to 32 of a-z, 0-9, '_', '-' and '.', starting with a letter or '_'")
    return name


def read_keys(source: str) -> str:
    """Return the public keys in the file *source* (`-`: standard input), each judged by ssh-keygen; raises AccountRefused."""
    try:
        with open(0 if source == "-" else source, encoding="utf-8", closefd=source != "-") as file:
            text = file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise AccountRefused(account=source, problem=f"the key file cannot be read ({reason})") from exc
    if "PRIVATE KEY" in text:
        raise AccountRefused(account=source, problem="this is a private key; give the .pub file beside it")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    for line in lines:
        check = subprocess.run(["ssh-keygen", "-l", "-f", "-"], input=line + "\n", text=True, capture_output=True, env=_ENV)
        if check.returncode != 0:
            raise AccountRefused(account=source, problem="it holds a line that is no public SSH key")
    if not lines:
        raise AccountRefused(account=source, problem="it holds no key")
    return "\n".join(lines) + "\n"


def _tell_broker(context: Context) -> None:
    """It looks again at who is a member, for what sshd may forward depends on it. Without one there is nobody to tell."""
    with contextlib.suppress(VmshellError):
        ask(context.layout, NetHealth())


def _must_be_root(what: str) -> None:
    if os.geteuid() != 0:
        raise NotAllowed(what=f"`{what}`", who="root")


def _refuse_system_account(entry: pwd.struct_passwd) -> None:
    if entry.pw_uid < FIRST_UID or entry.pw_uid == NOBODY:
        raise AccountRefused(account=entry.pw_name, problem=f"it is an account of the system (uid {entry.pw_uid})")


def _refuse_in_use(entry: pwd.struct_passwd) -> None:
    """What already runs as the account was never confined, and usermod would stop half-way."""
    if _has_processes(entry.pw_uid):
        name = entry.pw_name
        raise AccountRefused(account=name, problem=f"it is logged in; end that first with `loginctl terminate-user {name}`")


def _refuse_owner(context: Context, entry: pwd.struct_passwd) -> None:
    """D22: a uid that owns anything is not given free, nor one of which nobody can say what it owns."""
    owned = usage.belongings(context.layout, entry.pw_uid, entry.pw_name)
    if owned.count:
        raise AccountRefused(
            account=entry.pw_name,
            problem=f"it owns {owned}, which a later account with its uid would inherit;"
            f" `vmshell-admin user remove {entry.pw_name} --keep-account` only takes the login away",
        )


def _refuse_unprepared() -> None:
    """Without group, shell or home the account would be half confined: better none."""
    try:
        grp.getgrnam(GROUP)
    except KeyError:
        raise AccountRefused(account=GROUP, problem="the group does not exist; `make install` creates it") from None
    for path in (SHELL, HOME):
        if not os.path.exists(path):
            raise AccountRefused(account=path, problem="it does not exist; `make install` puts it in place")


# --- the steps --------------------------------------------------------------------------------------------------------


def _confine(context: Context, entry: pwd.struct_passwd, *, keep_home: bool) -> None:
    """An account that exists: shell, group, home; and a word about what a shell cannot close."""
    name = entry.pw_name
    if entry.pw_shell != SHELL:
        _run("usermod", "--shell", SHELL, "--", name)
        context.say(f"shell of {name}: {entry.pw_shell or 'none'} → {SHELL}")
    if name not in _members():
        _run("usermod", "--append", "--groups", GROUP, "--", name)
        context.say(f"{name} joined the group {GROUP}")
    if entry.pw_dir != HOME and not keep_home:
        _run("usermod", "--home", HOME, "--", name)
        context.say(f"home of {name}: {entry.pw_dir} → {HOME} (the old one stays where it is)")


def _write_keys(context: Context, name: str, keys: str) -> None:
    path = f"{KEYS}/{name}"
    os.makedirs(KEYS, mode=0o755, exist_ok=True)
    if _read(path) == keys:
        return
    _replace(path, keys)
    context.say(f"{path}: {keys.count(chr(10))} key(s); only root can change them")


def _edit_deny_files(context: Context, name: str, *, present: bool) -> None:
    # at.deny comes with the package `at`. With neither it nor at.allow, `at` is root's alone; making one would open it to others.
    for path, may_create in (("/etc/cron.deny", True), ("/etc/at.deny", False)):
        if not os.path.exists(path) and not (may_create and present):
            continue
        lines = _read(path).splitlines()
        wanted = with_line(lines, name) if present else [line for line in lines if line.strip() != name]
        if wanted != lines:
            _replace(path, "".join(f"{line}\n" for line in wanted))
            context.say(f"{path}: {name} {'added' if present else 'removed'}")


def with_line(lines: list[str], name: str) -> list[str]:
    return lines if name in (line.strip() for line in lines) else [*lines, name]


def _no_linger(context: Context, name: str) -> None:
    """User units of a lingering account start with the host, without any login."""
    if os.path.exists(f"{LINGER}/{name}"):
        _quietly("loginctl", "disable-linger", name)
        context.say(f"{name} no longer lingers")


def _end_sessions(entry: pwd.struct_passwd) -> None:
    """End whatever runs as the account, and wait for it: userdel refuses while anything does. VMs run under uids of their own."""
    for way in ("terminate-user", "kill-user", "kill-user"):
        signal = ("--signal=KILL",) if way == "kill-user" else ()
        _quietly("loginctl", way, *signal, entry.pw_name)
        end = time.monotonic() + 5
        while time.monotonic() < end:
            if not _has_processes(entry.pw_uid):
                return
            time.sleep(0.1)


def _has_processes(uid: int) -> bool:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError):
            if os.stat(f"/proc/{pid}").st_uid == uid:
                return True
    return False


def weaknesses(entry: pwd.struct_passwd) -> Iterator[tuple[str, str]]:
    """Each way out of vmshell that is open to an account of ours, and its cure."""
    name = entry.pw_name
    again = f"vmshell-admin user add {name}"
    if entry.pw_shell != SHELL:
        yield f"its shell is {entry.pw_shell or '/bin/sh'}", again
    if name not in _members():
        yield f"it is not in {GROUP}, so sshd does not confine it", again
    if entry.pw_dir != HOME:
        yield f"what lies in {entry.pw_dir} (.pam_environment, .forward, user units) can run outside vmshell", again
    strong = [group for group in STRONG_GROUPS if group in _groups_of(entry)]
    if strong:
        yield f"it is also in {', '.join(strong)}, which gives more than vmshell does", f"gpasswd --delete {name} {strong[0]}"
    if may_use_timers(name, "cron", when_no_file=True):
        yield "it may use cron, which runs commands outside vmshell", again
    if may_use_timers(name, "at", when_no_file=False):
        yield "it may use at, which runs commands outside vmshell", again
    if os.path.exists(f"{LINGER}/{name}"):
        yield "it lingers: its user units start with the host", f"loginctl disable-linger {name}"


def may_use_timers(name: str, program: str, *, when_no_file: bool) -> bool:
    """Cron's and at's own rule: an allow file alone decides, else the deny file names who may not."""
    if os.path.exists(f"/etc/{program}.allow"):
        return name in _read(f"/etc/{program}.allow").split()
    if os.path.exists(f"/etc/{program}.deny"):
        return name not in _read(f"/etc/{program}.deny").split()
    return when_no_file


# --- looking ----------------------------------------------------------------------------------------------------------


def confined_accounts() -> list[pwd.struct_passwd]:
    """Every account with the shell or in the group, by name."""
    members = _members()
    return sorted((e for e in pwd.getpwall() if e.pw_shell == SHELL or e.pw_name in members), key=lambda e: e.pw_name)


def _members() -> set[str]:
    try:
        group = grp.getgrnam(GROUP)
    except KeyError:
        return set()
    return set(group.gr_mem) | {entry.pw_name for entry in pwd.getpwall() if entry.pw_gid == group.gr_gid}


def _groups_of(entry: pwd.struct_passwd) -> set[str]:
    names = set()
    for gid in os.getgrouplist(entry.pw_name, entry.pw_gid):
        with contextlib.suppress(KeyError):
            names.add(grp.getgrgid(gid).gr_name)
    return names


def _vm_counts(context: Context, accounts: list[pwd.struct_passwd]) -> dict[int, str]:
    """By uid, how many VMs each of *accounts* has; nothing, and a word about it, where nobody can say."""
    if os.geteuid() != 0:
        return {}
    try:
        return usage.vm_counts(context.layout, [entry.pw_uid for entry in accounts])
    except CannotTell as exc:
        context.say(exc.sentence())
        return {}


def _entry(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _replace(path: str, text: str) -> None:
    """Write a file of root's, readable by all, in one rename."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{path}.new")
    with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)


def _run(*argv: str) -> None:
    """Run one of the host's own account programs; its words go into the error."""
    if shutil.which(argv[0], path=_ENV["PATH"]) is None:
        raise ProgramFailed(program=argv[0], problem="it is not installed")
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_ENV)
    if done.returncode != 0:
        raise ProgramFailed(program=argv[0], problem=" ".join(done.stdout.split()) or f"exit status {done.returncode}")


def _quietly(*argv: str) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_ENV)
