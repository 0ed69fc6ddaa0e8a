"""Make the process fit to run as somebody's login shell, before anything else happens (threats A11, A23 to A28, A31, A35).

What it inherits was chosen by whoever logged in: descriptors, environment, signal dispositions, working directory, locale.
Runs in: the shell, as the user. Touches only its own process.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from signal import SIG_DFL, SIG_IGN, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, signal
    from types import FrameType, TracebackType
else:
    # The C module below `signal`, which would import `enum` for it: a quarter of the start-up.
    from _signal import SIG_DFL, SIG_IGN, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, signal

TERM_CHARS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._+-")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SESSION_VARIABLES = ("HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME")


def open_missing_descriptors() -> None:
    """Put /dev/null where descriptor 0, 1 or 2 is closed, so that nothing we open ever becomes somebody's output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open("/dev/null", os.O_RDWR)
            if opened != number:
                os.dup2(opened, number, inheritable=True)
                os.close(opened)
            else:
                os.set_inheritable(number, True)
    # Python leaves None where a descriptor was missing at its start.
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)


def use_utf8() -> None:
    """Speak UTF-8 whatever the locale says; what cannot be encoded (half a surrogate pair from argv) is spelled out."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]


def reduce_environment(*, session: bool) -> str | None:
    """Keep an allow-list of variables, each matched to a pattern; return SSH_ORIGINAL_COMMAND, which is taken out."""
    found = dict(os.environ)
    kept = {"TERM": safe_term(found.get("TERM", "")), "PATH": PATH, "LC_ALL": "C.UTF-8"}
    # prompt_toolkit would ask the terminal where its cursor is: an answer that a slow line mixes with typed keys.
    kept["PROMPT_TOOLKIT_NO_CPR"] = "1"
    if found.get("NO_COLOR"):
        kept["NO_COLOR"] = "1"
    for name in ("COLUMNS", "LINES"):
        value = found.get(name, "")
        if value.isascii() and value.isdigit() and len(value) <= 4:
            kept[name] = value
    if session:
        kept.update({name: found[name] for name in SESSION_VARIABLES if found.get(name, "").startswith("/")})
    os.environ.clear()
    os.environ.update(kept)
    return found.get("SSH_ORIGINAL_COMMAND")


def safe_term(value: str) -> str:
    """The terminal's type if it looks like one, else `dumb`."""
    return value if 0 < len(value) <= 32 and TERM_CHARS.issuperset(value) else "dumb"


def no_core_files() -> None:
    """A core file would hold what was typed."""
    from resource import RLIMIT_CORE, setrlimit

    try:
        setrlimit(RLIMIT_CORE, (0, 0))
    except (ValueError, OSError):
        pass


def quiet_excepthook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """The last resort: one sentence instead of a traceback with paths and values (rule R25)."""
    if not issubclass(kind, (KeyboardInterrupt, SystemExit, BrokenPipeError)):
        os.write(2, b"vmshell: something went wrong inside vmshell; nothing was lost\n")


class Signals:
    """What the signals of a terminal do here.

    Ctrl-C raises KeyboardInterrupt only while `interruptible` (a command runs) and is otherwise ignored; hang-up and
    termination call `at_end` (which gives the terminal back) and leave at once, from wherever we are.
    """

    def __init__(self) -> None:
        self.interruptible = False
        self.at_end: Callable[[], None] | None = None

    def install(self) -> None:
        # A stopped login shell would hand the terminal to whatever started it (A24); a core dump by Ctrl-\ serves nobody.
        for number in (SIGTSTP, SIGTTIN, SIGTTOU, SIGQUIT):
            signal(number, SIG_IGN)
        signal(SIGCHLD, SIG_DFL)  # ignored, it would have the kernel bury what we start, and its pid would be anybody's
        signal(SIGINT, self._on_interrupt)
        for number in (SIGHUP, SIGTERM):
            signal(number, self._on_end)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interruptible:
            raise KeyboardInterrupt

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        try:
            if self.at_end is not None:
                self.at_end()
        finally:
            # Not an exception: it would have to find its way through code that is in the middle of anything.
            os._exit(128 + number)
