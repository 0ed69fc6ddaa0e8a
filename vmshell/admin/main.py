"""`vmshell-admin [--session] VERB …`: the table of its verbs, and the way from what was typed to one of them.

Without `--session` a verb works on this host's installation, with it on the caller's own.
Runs in: a process of its own, as whoever typed it.
"""

from __future__ import annotations

import os
import pwd
import signal
import sys

from ..errors import EX_INTERRUPTED, VmshellError
from ..layout import Layout
from ..refusals import UnknownVerb, Usage
from . import broker, doctor, images, policies, users
from .verbs import Arguments, Context, Verb


def _help(context: Context, args: Arguments) -> None:
    print(help_text(" ".join(args.all("VERB"))), end="")


VERBS = (
    Verb("image build", "IMAGE [--as NAME]", "make `demo` or `demo-disk` from Debian's packages", images.build),
    Verb("image list", "", "the catalogue: name, size, how it boots, how many VMs use it", images.show),
    Verb("image check", "[NAME…]", "read every file of the images and compare its hash", images.check),
    Verb("image rm", "NAME", "take an image that no VM uses out of the catalogue", images.remove),
    Verb(
        "user add",
        "NAME [--key FILE] [--keep-home]",
        "make an account that gets vmshell and nothing else; FILE holds public keys",
        users.add,
    ),  # fmt: skip
    Verb("user list", "", "the accounts that have vmshell", users.show),
    Verb("user remove", "NAME [--keep-account]", "take an account's access away; its VMs are kept", users.remove),
    Verb("policy check", "[FILE]", "is FILE (else the one in force) a valid policy, and what is odd about it?", policies.check),
    Verb("policy load", "", "have the running service take the policy file as it is now", broker.load),
    Verb("policy test", "USER VERB [WORD…]", "would this request of USER be allowed, and by which rules?", broker.test),
    Verb("network repair", "", "put back what is missing of bridges, taps and packet filter; VMs run on", broker.repair),
    Verb("launch-line", "USER/VM", "the command that booting this VM would run; nothing is started", broker.launch_line),
    Verb("policy show", "USER", "what holds for an account: each key, its value, and which section says so", policies.show),
    Verb("doctor", "", "look at everything this host needs, one line each, with the cure", doctor.run),
    Verb("help", "[VERB…]", "this list, or one verb", _help),
)

USAGE = "vmshell-admin [--session] VERB …"


def main(argv: list[str]) -> int:
    """Run the verb in *argv* (without the program's name) and return the exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"  # an ordinary user's has no sbin, root's may hold anything
    try:
        layout, words = _layout(argv)
        verb, rest = find(words)
        status = verb.run(Context(layout), verb.parse(rest))
        sys.stdout.flush()
        return status or 0
    except VmshellError as exc:
        _complain(str(exc), exc.advice())
        return exc.exit_status
    except KeyboardInterrupt:
        _complain("interrupted")
        return EX_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EX_INTERRUPTED


def find(words: list[str]) -> tuple[Verb, list[str]]:
    """Return the verb that *words* begin with and the words after it; raises UnknownVerb or Usage."""
    if not words or words[0] in ("-h", "--help"):
        words = ["help"]
    by_words = {tuple(verb.words.split()): verb for verb in VERBS}
    for length in (2, 1):
        verb = by_words.get(tuple(words[:length]))
        if verb is not None:
            rest = words[length:]
            return (by_words[("help",)], verb.words.split()) if "--help" in rest else (verb, rest)
    group = [verb.words for verb in VERBS if verb.words.split()[0] == words[0]]
    if group:
        raise Usage(problem=f"{words[0]} what? There are: {', '.join(group)}", usage=f"vmshell-admin {words[0]} …")
    raise UnknownVerb(verb=words[0])


def help_text(words: str) -> str:
    """The whole list, or the verbs that begin with *words*."""
    chosen = [verb for verb in VERBS if f"{verb.words} ".startswith(f"{words} ")] if words else list(VERBS)
    if not chosen:
        raise UnknownVerb(verb=words)
    lines = [f"usage: {USAGE}", ""] if not words else []
    for verb in chosen:
        lines += [f"  {verb.words} {verb.line}".rstrip(), f"      {verb.summary}"]
    if not words:
        lines += ["", "  --session works on your own VMs and images instead of the host's installation"]
    return "\n".join(lines) + "\n"


def _layout(argv: list[str]) -> tuple[Layout, list[str]]:
    words = list(argv)
    layout = Layout.system()
    while words and words[0] in ("--session", "--layout"):
        option = words.pop(0)
        if option == "--session":
            layout = Layout.session(dict(os.environ), os.getuid(), _home())
        elif not words:
            raise Usage(problem="--layout needs a value", usage=USAGE)
        else:
            layout = Layout.from_args(words.pop(0))  # for our own processes and tests
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help"):
        raise Usage(problem=f"there is no option {words[0]!r}", usage=USAGE)
    return layout, words


def _home() -> str:
    home = os.environ.get("HOME", "")
    return home if home.startswith("/") else pwd.getpwuid(os.getuid()).pw_dir


def _terminate(_signal: int, _frame: object) -> None:
    # As an exception, so that every half-made file is cleaned away on the way out.
    raise KeyboardInterrupt


def _complain(text: str, hint: str = "") -> None:
    print(f"vmshell-admin: {text}" + (f"\n  {hint}" if hint else ""), file=sys.stderr)


def entry() -> None:
    """The console script of an installed package."""
    sys.exit(main(sys.argv[1:]))
