"""The verbs that ask the running broker: what a boot would run, which rules a request would meet, and to read the policy again.

Runs in: vmshell-admin. Touches the broker's socket; `policy test` becomes the shell's own `explain`.
"""

from __future__ import annotations

import os
import sys

from .. import messages, wire
from ..errors import EX_DONE, EX_REFUSED, BrokerDown, ProtocolError, from_wire, safe
from ..layout import PACKAGE_DIR, PYTHON_FLAGS
from .verbs import Arguments, Context

TIMEOUT = 30.0  # seconds; a broker that has just started may look at the host first


def ask(context: Context, request: messages.Request) -> dict[str, object]:
    """Send one request and return its answer; raises what the broker refused with."""
    try:
        sock = wire.connect(context.layout.broker_socket, TIMEOUT)
        with sock:
            wire.send(sock, {"id": 1, **request.to_body()})
            while (packet := wire.recv(sock)) is not None:
                if "error" in packet.body:
                    raise from_wire(packet.body["error"])
                answer = packet.body.get("ok")
                if isinstance(answer, dict):
                    return answer
    except OSError as exc:
        raise BrokerDown(problem=(exc.strerror or str(exc) or "no answer").lower()) from exc
    raise ProtocolError(problem="the broker closed the connection")


def launch_line(context: Context, args: Arguments) -> None:
    """The exact command, one word a line with its values; nothing is started."""
    context.must_be_root("looking at launch lines")
    answer = ask(context, messages.LaunchLine(vm=args["USER/VM"]))
    words = answer.get("argv")
    print(shell_words([str(word) for word in words] if isinstance(words, list) else []))


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
    later = ask(context, messages.Reload()).get("later")
    context.say("the policy is in force")
    if isinstance(later, list) and later:
        context.say(f"these keys of [host] wait for a restart of the broker: {', '.join(map(str, later))}")


def repair(context: Context, args: Arguments) -> int:
    """Have the network service compare the host's network with what runs: missing parts come back, what nobody wants goes."""
    context.must_be_root("repairing the network")
    problems = ask(context, messages.NetHealth(repair=True)).get("problems")
    for problem in problems if isinstance(problems, list) else []:
        context.say(safe(problem, 300))
    if not problems:
        context.say("the network is as it should be")
    return EX_REFUSED if problems else EX_DONE


def test(context: Context, args: Arguments) -> None:
    """`explain` for somebody else. The shell reads the request, so that it is read as its user's would be."""
    context.must_be_root("testing the policy for others")
    words = ["explain", "--as", args["USER"], args["VERB"], *args.all("WORD")]
    where = ["--layout", context.layout.to_args()]
    command = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "shell", *where, *words]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # noqa: S606 - our own code, and there is no shell near
