"""The verbs that ask the running broker: what a boot would run, which rules a request would meet, and to read the policy again.

Runs in: vmshell-admin. Touches the broker's socket; `policy test` runs the shell's own `explain`.
"""

from __future__ import annotations

import subprocess
import sys

from .. import messages
from ..errors import EX_DONE, EX_REFUSED
from ..installed import PACKAGE_DIR, PYTHON_FLAGS
from ..refusals import TimedOut
from .asking import ask
from .verbs import Arguments, Context

WORD_MAX = 4096  # characters of one word of a launch line
EXPLAIN_PATIENCE = 60.0  # seconds


def launch_line(context: Context, args: Arguments) -> None:
    """The exact command, one word a line with its values; nothing is started."""
    context.must_be_root("looking at launch lines")
    answer = ask(context.layout, messages.LaunchLine(vm=args["USER/VM"]))
    print(shell_words(answer.texts("argv", WORD_MAX)))


def shell_words(words: list[str]) -> str:
    """A command over several lines, each option with its values, quoted so that a shell would read the same words."""
    import shlex

    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines or word.startswith("/usr/bin/"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return " \\\n  ".join(lines)


def load(context: Context, args: Arguments) -> None:
    """Have the broker take the policy file as it is now; a broken one is refused with its line, and the old one stays."""
    context.must_be_root("loading the policy")
    later = ask(context.layout, messages.Reload()).texts("later")
    context.say("the policy is in force")
    if later:
        context.say(f"these keys of [host] wait for a restart of the broker: {', '.join(later)}")


def repair(context: Context, args: Arguments) -> int:
    """Have the network service compare the host's network with what runs: missing parts come back, what nobody wants goes."""
    context.must_be_root("repairing the network")
    problems = ask(context.layout, messages.NetHealth(repair=True)).texts("problems")
    for problem in problems:
        context.say(problem)
    if not problems:
        context.say("the network is as it should be")
    return EX_REFUSED if problems else EX_DONE


def test(context: Context, args: Arguments) -> int:
    """`explain` for somebody else. The shell reads the request, so that it is read as its user's would be."""
    context.must_be_root("testing the policy for others")
    words = ["explain", "--as", args["USER"], args["VERB"], *args.all("WORD")]
    where = ["--layout", context.layout.to_args()]
    command = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "shell", *where, *words]
    sys.stdout.flush()
    try:
        # The shell waits as long as a person does. Root's question has an end, whatever the broker makes of it.
        return subprocess.run(command, timeout=EXPLAIN_PATIENCE).returncode
    except subprocess.TimeoutExpired:
        raise TimedOut(vm="the VM service", what="answer", seconds=int(EXPLAIN_PATIENCE)) from None
