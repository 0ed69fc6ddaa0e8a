"""`ssh web1`: the OpenSSH client, told exactly what it may do, and the guest's host keys as they were first seen.

Nothing of the user's configures it: no file, no agent, no proxy, no forwarding, no escape key behind which it would open a command
line of its own (R20, A38). The broker keeps a VM's keys, so they are the same wherever one logs in from.
Runs in: the shell. Starts ssh as the user; touches a folder of its own for the known keys.
"""

from __future__ import annotations

import os

from .. import messages
from ..errors import BadValue, NotConnected, ProgramFailed, Usage, VmshellError, safe
from ..names import DIGITS, LOWER, check_vm_ref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .context import Context
    from .grammar import Values
    from .show import Row

SSH = "/usr/bin/ssh"
PORT = 22
USER = "root"
USER_CHARS = LOWER | DIGITS | frozenset("_-.")
FORGET = "--forget-key"
OPTIONS = (
    *("EscapeChar=none", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "Tunnel=no", "GatewayPorts=no"),
    *("ControlMaster=no", "ControlPath=none", "ControlPersist=no", "PermitLocalCommand=no", "ProxyCommand=none", "ProxyJump=none"),
    *("KnownHostsCommand=none", "PKCS11Provider=none", "IdentityAgent=none", "CanonicalizeHostname=no", "VerifyHostKeyDNS=no"),
    *("GlobalKnownHostsFile=/dev/null", "UpdateHostKeys=no", "HashKnownHosts=no", "CheckHostIP=no", "AddKeysToAgent=no"),
    *("ConnectTimeout=20", "ServerAliveInterval=30", "LogLevel=ERROR"),
)
FAILED = 255  # ssh's own exit status for what was not the remote command's
USAGE = f"ssh [USER@]NAME [COMMAND…], ssh -l USER NAME, ssh {FORGET} NAME"


def ssh(context: Context, values: Values) -> int:
    user, vm, command, forget = parse(values.words("words"))
    if forget:
        context.ask(messages.HostKey(vm=vm, forget=True))
        context.say(f"{safe(vm)}: its host keys are forgotten; the next `ssh {safe(vm)}` takes those it then finds")
        return 0
    address, port = place(context, vm)
    info = context.ask(messages.Info(vm=vm))
    stored = info.get("host_keys")
    keys = [str(key) for key in stored] if isinstance(stored, list) else []
    with _Folder(context) as folder:
        known = f"{folder}/known_hosts"
        _write(known, [f"{alias(vm)} {key}" for key in keys])
        status = run(context, arguments(user, address, port, alias(vm), known, pinned=bool(keys)), command)
        found = [line.partition(" ")[2] for line in _lines(known)]
    if not keys and found:
        context.ask(messages.HostKey(vm=vm, keys=found))
    if status == FAILED and keys:
        context.note(f"(if {safe(vm)} was installed anew, its host key is another: `ssh {FORGET} {safe(vm)}` forgets the old one)")
    return status


def parse(words: list[str]) -> tuple[str, str, list[str], bool]:
    """User, VM, command, and whether its keys are to be forgotten; raises Usage, BadValue or BadName."""
    user, forget = USER, False
    words = list(words)
    while words and words[0].startswith("-"):
        option = words.pop(0)
        if option == "-l" and words:
            user = words.pop(0)
        elif option == FORGET:
            forget = True
        else:
            raise Usage(problem=f"ssh takes no {safe(option, 20)} here", usage=USAGE)
    if not words:
        raise Usage(problem="ssh needs the name of a VM", usage=USAGE)
    name = words.pop(0)
    if "@" in name:
        user, _, name = name.rpartition("@")
    if not 0 < len(user) <= 32 or not USER_CHARS.issuperset(user) or user[0] in "-.":
        rule = "an account of the guest: a-z, 0-9, _ . and -, not beginning with - or ."
        raise BadValue(field="USER", value=safe(user, 40), rule=rule)
    return user, check_vm_ref(name), words, forget


def place(context: Context, vm: str) -> tuple[str, int]:
    """Address and port of the guest's sshd; raises NotConnected."""
    from .show import rows

    answer = context.ask(messages.Net(vm=vm))
    if answer.get("state") not in (messages.RUNNING, messages.PAUSED):
        raise NotConnected(vm=vm, problem=f"it is {safe(answer.get('state'), 20)}; `boot {safe(vm)}` starts it")
    for card in rows(answer.get("cards")):
        if card.get("address"):
            return safe(card["address"], 64), PORT
        port = forwarded(card)
        if port:
            return "127.0.0.1", port
    raise NotConnected(vm=vm, problem=f"it has no address, and no port of this host leads to its port {PORT}")


def forwarded(card: Row) -> int:
    """The port of this host that a session's card leads to the guest's sshd, or 0."""
    forwards = card.get("forward")
    for text in forwards if isinstance(forwards, list) else []:
        proto, host, guest = (str(text).split(":") + ["", ""])[:3]
        if proto == "tcp" and guest == str(PORT) and host.isdigit():
            return int(host)
    return 0


def alias(vm: str) -> str:
    """Under what name ssh knows the keys: addresses may be given to others."""
    return vm.replace("/", ".")


def arguments(user: str, address: str, port: int, known_as: str, known_hosts: str, *, pinned: bool) -> list[str]:
    strict = "yes" if pinned else "accept-new"
    options = (*OPTIONS, f"HostKeyAlias={known_as}", f"UserKnownHostsFile={known_hosts}", f"StrictHostKeyChecking={strict}")
    words = [SSH, "-F", "/dev/null", *(word for option in options for word in ("-o", option))]
    return [*words, "-p", str(port), "-l", user, "--", address]


def run(context: Context, argv: list[str], command: list[str]) -> int:
    """Start ssh on our own terminal and wait for it; returns its exit status."""
    from signal import SIG_DFL, SIGINT, SIGQUIT, signal

    terminal = context.terminal
    # As OpenSSH does: the words with blanks between them are for the guest's shell to read.
    argv = [*argv, *([" ".join(command)] if command else [])]
    environment = {"PATH": "/usr/bin:/bin", "TERM": os.environ.get("TERM", "dumb"), "LANG": "C.UTF-8", "HOME": "/nonexistent"}
    terminal.cooked()
    try:
        pid = os.posix_spawn(argv[0], argv, environment, setsigdef=[SIGINT, SIGQUIT])
    except OSError as exc:
        raise ProgramFailed(program="ssh", problem=exc.strerror or "it cannot be started") from exc
    # Ctrl-C is ssh's while it asks for a password, and the guest's afterwards.
    ours = signal(SIGINT, lambda number, frame: None)
    try:
        _, status = os.waitpid(pid, 0)
    finally:
        signal(SIGINT, ours or SIG_DFL)
        if context.interactive:
            terminal.quiet()
    return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else FAILED


class _Folder:
    """A fresh folder that nobody else can enter, deleted afterwards."""

    def __init__(self, context: Context) -> None:
        self._under = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"  # noqa: S108 - mkdtemp makes its own in it
        self.path = ""

    def __enter__(self) -> str:
        import tempfile

        try:
            self.path = tempfile.mkdtemp(prefix="vmshell-", dir=self._under)
        except OSError as exc:
            raise VmshellError() from exc
        return self.path

    def __exit__(self, *_: object) -> None:
        import shutil

        shutil.rmtree(self.path, ignore_errors=True)


def _write(path: str, lines: list[str]) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w", encoding="ascii") as file:
        file.write("".join(f"{line}\n" for line in lines))


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(16384).splitlines()
    except OSError:
        return []
