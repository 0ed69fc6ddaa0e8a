"""`make demo`: build the demo image, boot it in session mode, and leave you at the shell beside it.

Without a terminal it plays the same by itself: every command it types and every line that comes back is printed, the guest's
own among them; the exit status is 0 only if the guest really answered. Runs as oneself; needs no root.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect

BIN = Path(sys.executable).parent
SHELL = [str(BIN / "vmshell"), "--session"]
ADMIN = [str(BIN / "vmshell-admin"), "--session"]
BOOT_PATIENCE = 300  # seconds: emulated guests on a busy machine
DETACH = "\x1dd"
GUEST_PROMPT = r"~ ?# "


def main() -> int:
    say("an image to start from, made from Debian's packages (kept for the next time)")
    if "demo" not in run(SHELL, "images", show=False).split():
        run(ADMIN, "image", "build", "demo")
    return stay() if sys.stdin.isatty() and sys.stdout.isatty() else play()


def stay() -> int:
    """Boot the VM `demo` (made now, or left from the last time) and hand the terminal to the shell."""
    if '"demo"' not in run(SHELL, "list", "--json", show=False):
        run(SHELL, "new", "demo", "--image", "demo", "--memory", "256M")
    state = run(SHELL, "list", "--json", show=False)
    if not re.search(r'"name": ?"demo"[^}]*"state": ?"running"', state):
        run(SHELL, "boot", "demo")
    run(SHELL, "list")
    say(
        "you are at the shell now: `console demo` for the guest (root, password demo), ^] d to come back, `help`, `exit`"
    )
    os.execv(SHELL[0], SHELL)


def play() -> int:
    """The same without a person: boot, log in, type, detach, attach again, shut down, delete."""
    name = "demo-play"
    subprocess.run([*SHELL, "kill", name], capture_output=True, check=False)
    subprocess.run([*SHELL, "rm", name, "--yes"], capture_output=True, check=False)
    run(SHELL, "version")
    run(SHELL, "new", name, "--image", "demo", "--memory", "256M")
    run(SHELL, "list")
    try:
        say("boot it with the console attached, log in, ask the guest for its kernel, detach")
        kernel = on_console([*SHELL, "boot", name, "--console"], log_in=True)
        run(SHELL, "list")
        say("attach again: the guest went on meanwhile, and its last lines are still there")
        if on_console([*SHELL, "console", name], log_in=False) != kernel:
            say("the second look did not find the same guest")
            return 1
        run(SHELL, "shutdown", name)
    finally:
        subprocess.run([*SHELL, "kill", name], capture_output=True, check=False)
        subprocess.run([*SHELL, "rm", name, "--yes"], capture_output=True, check=False)
    run(SHELL, "list")
    say(f"done: a guest with kernel {kernel} was booted, spoken to, left, found again and shut down")
    return 0


def on_console(command: list[str], *, log_in: bool) -> str:
    """Type on a guest's console through the shell, echo all of it, and return the kernel release that the guest named."""
    print(f"$ {shown(command)}", flush=True)
    console = pexpect.spawn(
        command[0], command[1:], encoding="utf-8", codec_errors="replace", timeout=BOOT_PATIENCE, dimensions=(24, 100)
    )
    console.logfile_read = Plain()
    console.expect("is the key")
    if log_in:
        console.expect("login: ")
        console.send("root\r")
        console.expect("assword: ")
        console.send("demo\r")
        console.expect(GUEST_PROMPT)
    # The marker is broken up in what is typed, so that its echo does not look like the answer.
    console.send('echo kernel""-is $(uname -r)\r')
    console.expect(r"kernel-is (\S+)\s")  # to the end of the line: output comes in pieces
    kernel = str(console.match.group(1))
    console.expect(GUEST_PROMPT)
    console.send(DETACH)
    console.expect(pexpect.EOF)
    console.close()
    print(flush=True)
    if console.exitstatus:
        raise SystemExit(f"the console ended with status {console.exitstatus}")
    return kernel


class Plain:
    """Standard output without the terminal's control sequences, for logs."""

    def write(self, text: str) -> None:
        sys.stdout.write(re.sub(r"\x1b(\[[0-9;?<=>!]*[a-zA-Z]|[()][0AB]|[=>78cM])|[\x0f\r]", "", text))

    def flush(self) -> None:
        sys.stdout.flush()


def run(program: list[str], *arguments: str, show: bool = True) -> str:
    """Run a command of ours, print it and what it says; a failure ends the demo with its status."""
    if show:
        print(f"$ {shown([*program, *arguments])}", flush=True)
    if show and program is ADMIN:
        subprocess.run([*program, *arguments], check=True)
        return ""
    done = subprocess.run([*program, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    if show:
        print(done.stdout, flush=True)
    return done.stdout


def shown(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def say(sentence: str) -> None:
    print(f"--- {sentence}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
