"""The one table of verbs: names, arguments, options and help. It feeds the parser, `help`, completion and the man page.

Runs in: the shell. Pure data; what a verb does stands in `actions.py`.
"""

from __future__ import annotations

from . import actions
from .grammar import Word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .context import Context
    from .grammar import Values


class Argument:
    """A word that stands after the verb. *kind* is a row of `grammar.CHECKS` (`vm` also tells completion what to offer)."""

    __slots__ = ("kind", "metavar", "name", "optional")

    def __init__(self, name: str, kind: str = "vm", *, metavar: str = "NAME", optional: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.metavar = metavar
        self.optional = optional


class Option:
    """`--name` (a flag), `--name VALUE` or `--name=VALUE`."""

    __slots__ = ("help", "kind", "metavar", "name", "required")

    def __init__(self, name: str, kind: str, metavar: str, help: str, *, required: bool = False) -> None:
        self.name = name
        self.kind = kind
        self.metavar = metavar
        self.help = help
        self.required = required

    def usage(self) -> str:
        text = f"--{self.name} {self.metavar}" if self.metavar else f"--{self.name}"
        return text if self.required else f"[{text}]"


def flag(name: str, help: str) -> Option:
    return Option(name, "flag", "", help)


class Verb:
    """One row."""

    __slots__ = ("aliases", "arguments", "detail", "help", "hidden", "name", "options", "run")

    def __init__(
        self,
        name: str,
        aliases: str,
        arguments: tuple[Argument, ...],
        options: tuple[Option, ...],
        help: str,
        detail: str,
        run: Callable[[Context, Values], int],
        *,
        hidden: bool = False,
    ) -> None:
        self.name = name
        self.aliases = tuple(aliases.split())
        self.arguments = arguments
        self.options = options
        self.help = help
        self.detail = detail
        self.run = run
        self.hidden = hidden

    def usage(self) -> str:
        words = [self.name]
        words += [f"[{argument.metavar}]" if argument.optional else argument.metavar for argument in self.arguments]
        words += [option.usage() for option in sorted(self.options, key=lambda option: not option.required)]
        return " ".join(words)


NAME = Argument("vm")
JSON = flag("json", "one JSON document instead of a table")

TABLE: tuple[Verb, ...] = (
    Verb(
        "list", "ls", (), (flag("all", "everybody's VMs (administrators)"), JSON),
        "your VMs and how they are",
        "Name, state, processors, memory, image, address, uptime, and how many consoles are attached.",
        actions.list_vms,
    ),
    Verb(
        "info", "show status", (NAME,), (JSON,),
        "everything about one VM",
        "With live figures while it runs, and the last error if there was one.",
        actions.info,
    ),
    Verb(
        "new", "create", (Argument("vm", "new-vm"),),
        (
            Option("image", "image", "IMAGE", "what it starts from; `images` shows the catalogue", required=True),
            Option("cpus", "number", "N", "processors (1)"),
            Option("memory", "mebibytes", "SIZE", "memory, like 512M or 2G"),
            Option("disk", "mebibytes", "SIZE", "size of an additional empty disk, like 10G"),
        ),
        "make a VM from an image",
        "The name is 1 to 31 of a-z, 0-9 and '-', starting with a letter. The VM is off at first; `boot` starts it.",
        actions.new,
    ),
    Verb(
        "boot", "start", (NAME,),
        (
            flag("console", "attach to its console before the first instruction"),
            Option("wait", "text", "REGEX", "return once the guest has printed this"),
            Option("timeout", "seconds", "S", "how long to wait for it (300 s)"),
        ),
        "start a VM",
        "Returns once its processors run; with --wait once the guest has printed what was asked for "
        "(exit status 8 when it did not in time, 7 when the VM ended before).",
        actions.boot,
    ),
    Verb(
        "console", "attach serial", (NAME,),
        (
            flag("readonly", "look, do not type"),
            flag("no-replay", "without the last output from before"),
            Option("escape", "key", "^X", "another key than ^] for the console's own commands"),
            flag("raw", "pass every byte to the terminal, also those that make it answer or change its settings"),
        ),
        "the serial console; a VM's name alone does the same",
        "^] is the key for the console's own commands: ^] . leaves (the VM runs on), ^] ? shows the others. "
        "Text goes through unchanged; control sequences that could make your terminal answer, "
        "change its title or its clipboard are left out unless --raw is given.",
        actions.console,
    ),
    Verb(
        "shutdown", "stop poweroff", (NAME,),
        (
            flag("force", "pull the plug if it has not switched itself off in time"),
            Option("timeout", "seconds", "S", "how long to wait (60 s)"),
        ),
        "ask the guest to switch itself off",
        "Waits until it has. Without --force the VM goes on running when the guest does not listen.",
        actions.shutdown,
    ),
    Verb(
        "kill", "", (NAME,), (),
        "pull the plug (disks are kept)",
        "At once, without asking the guest: what it had not written to its disks is lost.",
        actions.kill,
    ),
    Verb(
        "reset", "", (NAME,), (),
        "press the reset button",
        "At once, without asking the guest.",
        actions.reset,
    ),
    Verb(
        "reboot", "restart", (NAME,), (),
        "ask the guest to start again",
        "The guest shuts its programs down first; `reset` does it without asking.",
        actions.reboot,
    ),
    Verb(
        "rm", "delete", (NAME,), (flag("yes", "do not ask"),),
        "delete a VM and its disks",
        "On a terminal it asks for the VM's name first. There is no way back.",
        actions.rm,
    ),
    Verb("images", "", (), (JSON,), "the catalogue to make VMs from", "", actions.images),
    Verb("whoami", "", (), (JSON,), "your account, limits and what is used of them", "", actions.whoami),
    Verb("version", "", (), (JSON,), "versions, and what this host lacks", "", actions.version),
    Verb(
        "help", "?", (Argument("topic", "text", metavar="VERB", optional=True),), (),
        "this list, or more about one verb",
        "Other topics: keys (of the console), exit-status, quoting.",
        actions.help,
    ),
    Verb("exit", "quit logout", (), (), "leave; running VMs run on", "Ctrl-D does the same.", actions.leave),
    # Never acted on: to virsh it means `kill`, to others `rm`.
    Verb("destroy", "undefine", (Argument("vm", "text", optional=True),), (), "", "", actions.destroy, hidden=True),
)

BY_WORD: dict[str, Verb] = {word: verb for verb in TABLE for word in (verb.name, *verb.aliases)}


def visible() -> list[Verb]:
    return [verb for verb in TABLE if not verb.hidden]


def wants_help(words: list[Word]) -> bool:
    """`boot --help` and `--help` are asked everywhere; here they mean `help boot`."""
    return any(word.text in ("--help", "-h") for word in words)
