"""`ssh web1`: the OpenSSH client, told exactly what it may do, and the guest's host keys as they were first seen.

Nothing of the user's configures it: no file, no key, no agent, no proxy, no forwarding, and no escape key behind which it would
open a command line of its own (R20, A38). The broker keeps a VM's keys, so they are the same wherever one logs in from.
Runs in: the shell. Starts ssh as the user; touches a folder of its own for the known keys and ssh's messages.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import tempfile

from ... import messages
from ...errors import EX_DONE, VmshellError, safe
from ...refusals import ProgramFailed, StorageFailed, Usage
from ..cli.values import split_login
from .network import must_own_stdin, place_of
from .ssh_messages import Said

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cli.grammar import Values
    from ..context import Context

PROGRAM = "/usr/bin/ssh"
PORT = 22
USER = "root"
REFUSED = 255  # ssh's own exit status: it did not log in, or lost the guest
FOLDER_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/_-")  # no blank, no % (ssh expands it)
OPTIONS = (
    *("EscapeChar=none", "ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "Tunnel=no", "GatewayPorts=no"),
    *("ControlMaster=no", "ControlPath=none", "ControlPersist=no", "PermitLocalCommand=no", "ProxyCommand=none"),
    *("ProxyJump=none", "KnownHostsCommand=none", "PKCS11Provider=none", "SecurityKeyProvider=internal", "IdentityAgent=none"),
    *("AddKeysToAgent=no", "EnableSSHKeysign=no", "ForkAfterAuthentication=no", "CanonicalizeHostname=no"),
    *("IdentityFile=none", "IdentitiesOnly=yes"),
    *("VerifyHostKeyDNS=no", "CheckHostIP=no", "UpdateHostKeys=no", "HashKnownHosts=no", "GlobalKnownHostsFile=/dev/null"),
    "VisualHostKey=yes",  # the one word by which it tells that a pinned key was found to be right; see ssh_said.py
    *("LogLevel=INFO", "ConnectTimeout=20"),
    # Without an escape key a guest that no longer answers would hold the terminal for ever.
    *("ServerAliveInterval=20", "ServerAliveCountMax=6"),
)


class HostKeyChanged(VmshellError):
    """{vm} shows another host key than the one that was kept: it was installed anew, or something else answers in its place"""

    hint = "if you know why: `ssh --forget-key {vm}`, then once more"


def ssh(context: Context, values: Values) -> int:
    user, vm = split_login(values.text("target"))
    command, login = values.words("command"), values.optional("login")
    if values.flag("forget-key"):
        context.ask(messages.HostKey(vm=vm, forget=True))
        context.say(f"{safe(vm)}: its host keys are forgotten; the next `ssh {safe(vm)}` keeps those it then finds")
        return EX_DONE
    if user and login:
        raise Usage(problem="ssh was given two users", usage="ssh [USER@]NAME [COMMAND…]")
    must_own_stdin(context, "ssh")
    address, port = place_of(context.ask(messages.Connect(vm=vm, port=PORT)))
    pinned = context.ask(messages.Info(vm=vm)).get("host_keys")
    keys = [str(key) for key in pinned] if isinstance(pinned, list) else []
    session = Session(context, vm, keys)
    return session.run(user or login or USER, address, port, command, tty=values.flag("tty"))


def arguments(folder: str, vm: str, user: str, address: str, port: int, *, pinned: bool, tty: bool) -> list[str]:
    """The command line up to the remote command. Every word is ours but *user* and *address*, and `--` ends the options."""
    options = [
        *OPTIONS,
        f"HostKeyAlias={alias(vm)}",
        f"UserKnownHostsFile={folder}/known_hosts",
        f"StrictHostKeyChecking={'yes' if pinned else 'accept-new'}",
        f"RequestTTY={'force' if tty else 'auto'}",
    ]
    words = [PROGRAM, "-F", "/dev/null", "-E", f"{folder}/said"]
    for option in options:
        words += ["-o", option]
    return [*words, "-p", str(port), "-l", user, "--", address]


def alias(vm: str) -> str:
    """Under what name ssh knows the keys (addresses may be given to others): one of a-z, 0-9 and '-'."""
    return vm.rpartition("/")[2]


def all_among(keys: list[str], kept: object) -> bool:
    """Whether *kept*, the broker's answer, holds each of *keys*; what may stand behind a key (a comment) is no part of it."""
    known = [str(key).split()[:2] for key in kept] if isinstance(kept, list) else []
    return all(key.split()[:2] in known for key in keys)


def after_a_guest() -> bytes:
    """The reset of `console --raw`, and what that one need not do because it has seen which modes are on.

    The cursor stays where it is: whoever switched nothing on goes on below the guest's last line.
    """
    from ..console.terminal_filter import Filter
    from ..console.viewer import RAW_RESET

    main_screen, no_margins = b"\x1b[?47l", b"\x1b7\x1b[r\x1b8"
    return main_screen + no_margins + Filter().reset() + RAW_RESET


class Session:
    """One run of ssh, with a folder of its own that is gone afterwards."""

    def __init__(self, context: Context, vm: str, keys: list[str]) -> None:
        self._context = context
        self._vm = vm
        self._keys = keys
        self._kept = bool(keys)
        self._problem: VmshellError | None = None
        self._others_kept = False
        self._said = b""
        self._pid = 0
        self._folder = ""

    def run(self, user: str, address: str, port: int, command: list[str], *, tty: bool) -> int:
        """Returns ssh's exit status, which is the remote command's; raises HostKeyChanged."""
        context, terminal, signals = self._context, self._context.terminal, self._context.signals
        heard = Said(user, address, port, pinned=bool(self._keys))
        at_end, interruptible = signals.at_end, signals.interruptible

        def end() -> None:
            self._close()
            if at_end is not None:
                at_end()

        signals.at_end = end
        signals.interruptible = False  # Ctrl-C is ssh's while it asks for a password, and the guest's afterwards
        try:
            self._make_folder()
            said = os.open(f"{self._folder}/said", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            terminal.cooked()
            if terminal.stdout_tty and not terminal.dumb:
                reset = after_a_guest()
                terminal.hold_reset(lambda: reset)
            try:
                argv = arguments(self._folder, self._vm, user, address, port, pinned=bool(self._keys), tty=tty)
                # As OpenSSH does: the words, with blanks between them, are for the guest's shell to read.
                status = self._start_and_wait([*argv, *command], said, heard)
            finally:
                os.close(said)
                self._give_terminal_back()
        finally:
            self._close()
            signals.at_end, signals.interruptible = at_end, interruptible
        if self._others_kept or (heard.changed and status == REFUSED):
            raise HostKeyChanged(vm=self._vm)
        for line in heard.changed:
            self._show(f"guest: {line}")
        if self._problem is not None:
            context.note(f"(the host key of {safe(self._vm)} was not kept: {self._problem.sentence()})")
        return status if status >= 0 else 128 - status

    def _make_folder(self) -> None:
        under = os.environ.get("XDG_RUNTIME_DIR", "")
        if not (under and FOLDER_CHARS.issuperset(under) and os.access(under, os.W_OK)):
            under = "/tmp"  # noqa: S108 - what is made in it is new and nobody else's
        try:
            self._folder = tempfile.mkdtemp(prefix="vmshell-", dir=under)
            os.mkfifo(f"{self._folder}/said", 0o600)
            with open(f"{self._folder}/known_hosts", "x", encoding="ascii", errors="replace") as file:
                file.write("".join(f"{alias(self._vm)} {key}\n" for key in self._keys))
        except OSError as error:
            raise StorageFailed(problem=f"no folder in {under} ({(error.strerror or str(error)).lower()})") from error

    def _start_and_wait(self, argv: list[str], said: int, heard: Said) -> int:
        environment = {"TERM": os.environ.get("TERM", "dumb"), "LANG": "C.UTF-8"}
        try:
            self._pid = os.posix_spawn(PROGRAM, argv, environment, setsigdef=[signal.SIGPIPE, signal.SIGINT])
        except OSError as error:
            raise ProgramFailed(program="ssh", problem=(error.strerror or str(error)).lower()) from error
        ended = os.pidfd_open(self._pid)
        try:
            poll = select.poll()
            poll.register(said, select.POLLIN)
            poll.register(ended, select.POLLIN)
            while True:
                ready = dict(poll.poll())
                if said in ready:
                    self._hear(os.read(said, 65536), heard)
                elif ended in ready:
                    break
        finally:
            os.close(ended)
        self._hear(b"\n" if self._said else b"", heard)
        self._keep()
        pid, self._pid = self._pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _hear(self, data: bytes, heard: Said) -> None:
        """What ssh itself has to say goes on to the person, but for what we say better."""
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            shown = heard.hear(line.decode("utf-8", "replace").strip())
            if heard.added:
                self._keep()
            if shown and not self._others_kept:
                self._show(shown)

    def _show(self, line: str) -> None:
        # The terminal may be raw by now: a line break needs its carriage return.
        self._context.note(safe(line, 1000) + ("\r" if self._context.terminal.stderr_tty else ""))

    def _keep(self) -> None:
        """Have the broker keep the keys that ssh has just accepted, once; where others were kept meanwhile, end ssh."""
        if self._kept:
            return
        with open(f"{self._folder}/known_hosts", encoding="ascii", errors="replace") as file:
            keys = [line.strip().partition(" ")[2] for line in file]
        if not keys:
            return
        self._kept = True
        try:
            answer, _ = self._context.broker.call(messages.HostKey(vm=self._vm, keys=keys))
        except VmshellError as error:
            self._problem = error
            return
        if not all_among(keys, answer.get("keys")):
            self._others_kept = True
            os.kill(self._pid, signal.SIGKILL)  # of the others ssh takes note only when its connection next says something

    def _give_terminal_back(self) -> None:
        """In sane modes, and without what the guest's last bytes made it type: no prompt after us may read that (E03)."""
        terminal, interactive = self._context.terminal, self._context.interactive
        terminal.restore()  # writes the reset first
        if terminal.stdin_tty and (terminal.stdout_tty or interactive):
            terminal.quiet()  # what is not a whole line yet is seen, and nothing is echoed
            terminal.drain_answers()
            if not interactive:
                terminal.cooked()

    def _close(self) -> None:
        """End ssh if it still runs (we are to end), and leave nothing behind."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)  # as above
            self._pid = 0
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
