"""The one table of verbs: names, arguments, options and help. It feeds the parser, `help`, completion and the man page.

Runs in: the shell. Pure data; what a verb does stands in `commands/`.
"""

from __future__ import annotations

from ..commands import machines
from . import late_imports
from .grammar import Argument, Option, Verb, flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .grammar import Word


NAME = Argument("vm")
JSON = flag("json", "one JSON document instead of a table")

TABLE: tuple[Verb, ...] = (
    Verb(
        "list",
        "ls",
        (),
        (flag("all", "everybody's VMs (administrators)"), JSON),
        "your VMs and how they are",
        "Name, state, processors, memory, image, address, uptime, and how many consoles are attached.",
        machines.list_vms,
    ),
    Verb(
        "info",
        "show status",
        (NAME,),
        (JSON, flag("toml", "its definition, as `define` takes it")),
        "everything about one VM",
        "With live figures while it runs, what waits for the next boot, and the last error if there was one.",
        machines.info,
    ),
    Verb(
        "new",
        "create",
        (Argument("vm", "new-vm"),),
        (
            Option("image", "image", "IMAGE", "what it starts from; `images` shows the catalogue"),
            Option("from", "dash", "-", "a definition on standard input instead of an image"),
            Option("cpus", "number", "N", "processors (1)"),
            Option("memory", "mebibytes", "SIZE", "memory, like 512M or 2G"),
            Option("disk", "mebibytes", "SIZE", "size of its disk, like 10G"),
        ),
        "make a VM from an image or a definition",
        "The name is 1 to 31 of a-z, 0-9 and '-', starting with a letter. The VM is off at first; `boot` starts it.",
        machines.new,
    ),
    Verb(
        "set",
        "",
        (NAME, Argument("assignments", "assignment", metavar="KEY=VALUE", many=True)),
        (),
        "change keys of a VM's definition",
        "`help keys-of-vm` lists the keys; devices are called disk0, cdrom0, floppy0, net0 and so on, and the next free number "
        "makes a new one: `set web1 cdrom0=shelf:debian.iso boot.order=cdrom0,disk0`. On a running VM the balloon, the medium "
        "of a CD drive, a cable (net0.link) and console.log follow at once; it says what waits for the next boot.",
        late_imports.set_keys,
    ),
    Verb(
        "unset",
        "",
        (NAME, Argument("keys", "text", metavar="KEY", many=True)),
        (),
        "put keys back to their defaults, or take devices out",
        "`unset web1 disk1` takes the disk out of the VM; its object stays, and `rm web1.OBJECT` deletes it.",
        late_imports.unset_keys,
    ),
    Verb(
        "define",
        "",
        (Argument("vm", "new-vm"),),
        (),
        "give a VM the definition on standard input",
        "A new VM, or all of an old one's definition: `ssh HOST define web1 < web1.toml`. `info web1 --toml` prints such a text.",
        late_imports.define,
    ),
    Verb(
        "kvm",
        "qemu",
        (Argument("words", "text", metavar="OPTION", many=True),),
        (),
        "run a VM by QEMU's own options, as far as they are allowed",
        "`kvm -hda root -cdrom debian-12.iso -boot d -snapshot` boots such a VM once, with its console, and forgets it when it "
        "ends; --save NAME keeps it instead, --explain only shows what each option becomes. Files are objects of your shelf "
        "(`put shelf.NAME`) or of the administrator's library. What is refused gets a line with the reason and what to use.",
        late_imports.kvm,
        raw=True,
    ),
    Verb(
        "import-libvirt",
        "",
        (Argument("vm", "new-vm"),),
        (),
        "make a VM from a libvirt domain on standard input",
        "`virsh dumpxml web1 | ssh HOST import-libvirt web1`. What has no key here is listed; disks are brought in with `put`.",
        late_imports.import_libvirt,
    ),
    Verb(
        "explain",
        "",
        (Argument("words", "text", metavar="VERB …", many=True),),
        (),
        "which rules a request would meet, and what would be allowed",
        "`explain boot web1`, `explain set web1 memory=8G`, `explain new web2 --image demo --memory 8G`: nothing is done.",
        late_imports.explain,
        raw=True,
    ),
    Verb(
        "boot",
        "start",
        (NAME,),
        (
            flag("console", "attach to its console before the first instruction"),
            Option("restore", "text", "TAG", "go on from this snapshot instead of starting anew"),
            flag("snapshot", "throw away at its end what it writes to its disks"),
            Option("wait", "text", "REGEX", "return once the guest has printed this"),
            Option("timeout", "seconds", "S", "how long to wait for it (300 s)"),
        ),
        "start a VM",
        "Returns once its processors run; with --wait once the guest has printed what was asked for "
        "(exit status 8 when it did not in time, 7 when the VM ended before).",
        machines.boot,
    ),
    Verb(
        "console",
        "attach serial",
        (NAME,),
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
        machines.console,
    ),
    Verb(
        "shutdown",
        "stop poweroff",
        (NAME,),
        (
            flag("force", "pull the plug if it has not switched itself off in time"),
            Option("timeout", "seconds", "S", "how long to wait (60 s)"),
        ),
        "ask the guest to switch itself off",
        "Waits until it has. Without --force the VM goes on running when the guest does not listen.",
        machines.shutdown,
    ),
    Verb(
        "kill",
        "",
        (NAME,),
        (),
        "pull the plug (disks are kept)",
        "At once, without asking the guest: what it had not written to its disks is lost.",
        machines.kill,
    ),
    Verb(
        "reset",
        "",
        (NAME,),
        (),
        "press the reset button",
        "At once, without asking the guest.",
        machines.reset,
    ),
    Verb(
        "reboot",
        "restart",
        (NAME,),
        (),
        "ask the guest to start again",
        "The guest shuts its programs down first; `reset` does it without asking.",
        machines.reboot,
    ),
    Verb(
        "snapshot",
        "",
        (NAME, Argument("tag", "text", metavar="TAG")),
        (flag("delete", "forget it"),),
        "save a running VM's memory and disks under a name",
        "`boot NAME --restore TAG` goes on from there. All its writable disks must be qcow2.",
        late_imports.snapshot,
    ),
    Verb("snapshots", "", (NAME,), (JSON,), "the snapshots of a VM", "", late_imports.snapshots),
    Verb(
        "display",
        "vnc",
        (NAME,),
        (),
        "the screen of a VM, as RFB (VNC) on standard input and output",
        "For a viewer's helper: `socat TCP-LISTEN:5901,bind=127.0.0.1 EXEC:'ssh HOST display web1'`, then a viewer on "
        "127.0.0.1:5901. The VM needs display.type = vnc.",
        late_imports.display,
    ),
    Verb(
        "rm",
        "delete",
        (Argument("vm", "vm-or-object"),),
        (flag("yes", "do not ask"),),
        "delete a VM and its disks, or one object (VM.OBJECT)",
        "On a terminal it asks for the name first. There is no way back.",
        machines.rm,
    ),
    Verb(
        "disk",
        "",
        (Argument("what", "add", metavar="add"), NAME, Argument("object", "object-name", metavar="OBJECT")),
        (
            Option("size", "mebibytes", "SIZE", "how large, like 2G", required=True),
            Option("format", "text", "FORMAT", "qcow2 (grows as it is written) or raw"),
            Option("bus", "text", "BUS", "virtio, sata or ide, scsi, usb"),
        ),
        "make a blank disk and put it into a VM",
        "With `shelf` for NAME it belongs to no VM, and definitions call it shelf:OBJECT.",
        late_imports.disk,
    ),
    Verb(
        "put",
        "",
        (Argument("object", "object", metavar="VM.OBJECT"),),
        (Option("format", "text", "FORMAT", "raw, qcow2, file or rom; else by the name's ending"),),
        "bring a file in from standard input",
        "`ssh HOST put web1.kernel < bzImage`; `put shelf.debian.iso` brings it to your shelf. Formats are never guessed from "
        "the contents: .qcow2 is qcow2, .img .raw .fd are raw disks, .rom an option ROM, everything else a file to read only.",
        late_imports.put,
    ),
    Verb(
        "objects",
        "files",
        (Argument("vm", "vm", optional=True),),
        (JSON,),
        "the disks and files of a VM; without a name, of your shelf and the library",
        "",
        late_imports.objects,
    ),
    Verb("networks", "", (), (JSON,), "the networks that VMs may be on", "", late_imports.networks),
    Verb(
        "net",
        "",
        (NAME,),
        (flag("follow", "what each card carries, every second until Ctrl-C", short="f"), JSON),
        "a VM's network cards, their addresses and traffic, and what is published",
        "`set NAME net0=NETWORK` changes a card's network at the next boot, `set NAME net0.link=down` pulls its cable at once; "
        "the last card comes and goes while the VM runs where the machine can do that.",
        late_imports.net,
    ),
    Verb(
        "connect",
        "nc",
        (Argument("place", "place", metavar="NAME:PORT"), Argument("port", "tcp-port", metavar="PORT", optional=True)),
        (),
        "standard input and output to a TCP port of a guest",
        "For other programs: `ssh -o ProxyCommand='ssh HOST connect web1:22' root@web1`, and scp the same way. The end of the "
        "input is passed on to the guest; it is over when the guest closes.",
        late_imports.connect,
    ),
    Verb(
        "ssh",
        "",
        (
            Argument("target", "login-at", metavar="[USER@]NAME"),
            Argument("command", "text", metavar="COMMAND", optional=True, many=True),
        ),
        (
            Option("login", "login", "USER", "as whom, if not root", short="l"),
            flag("tty", "give the command a terminal", short="t"),
            flag("forget-key", "forget the guest's host keys: it was installed anew"),
        ),
        "log in to a guest by ssh, or run a command there",
        "As root if no user is named. The guest's host keys are kept from the first time on and compared ever after. Your own "
        "key stays with you, so a password is asked for; to use the key go through `connect`. The exit status is the command's, "
        "or 255 when ssh could not log in.",
        late_imports.ssh,
        hands_on=True,
    ),
    Verb(
        "publish",
        "",
        (NAME, Argument("port", "port", metavar="PORT[/udp]", optional=True)),
        (Option("to", "grantee", "WHOM", "USER, @GROUP, world, or world:PORT for another port of this host"), JSON),
        "let others reach a port of a VM; without a port, list what is published",
        "`publish web1 80 --to bob`: the VMs on bob's private network reach web1 there. `--to world:8080`: port 8080 of the host "
        "leads there (by IPv4, from outside the host), if your limits allow it. On a service network members reach what "
        "providers publish. What is closed is closed for connections that stand, too.",
        late_imports.publish,
    ),
    Verb(
        "unpublish",
        "",
        (NAME, Argument("port", "port", metavar="PORT[/udp]")),
        (Option("to", "grantee", "WHOM", "only for these; else for all"),),
        "no longer let others reach a port of a VM",
        "",
        late_imports.unpublish,
    ),
    Verb("images", "", (), (JSON,), "the catalogue to make VMs from", "", machines.images),
    Verb("whoami", "", (), (JSON,), "your account, limits and what is used of them", "", machines.whoami),
    Verb("version", "", (), (JSON,), "versions, and what this host lacks", "", machines.version),
    Verb(
        "help",
        "?",
        (Argument("topic", "text", metavar="VERB", optional=True),),
        (),
        "this list, or more about one verb",
        "Other topics: keys (of the console), exit-status, quoting.",
        machines.help,
    ),
    Verb("exit", "quit logout", (), (), "leave; running VMs run on", "Ctrl-D does the same.", machines.leave),
    # Never acted on: to virsh it means `kill`, to others `rm`.
    Verb("destroy", "undefine", (Argument("vm", "text", optional=True),), (), "", "", machines.destroy, hidden=True),
)

BY_WORD: dict[str, Verb] = {word: verb for verb in TABLE for word in (verb.name, *verb.aliases)}


def visible() -> list[Verb]:
    return [verb for verb in TABLE if not verb.hidden]


def wants_help(words: list[Word], verb: Verb) -> bool:
    """`boot --help` and `--help` are asked everywhere; here they mean `help boot`. Another program's words keep theirs."""
    if verb.raw or verb.hands_on:
        words = words[:1]
    return any(word.text in ("--help", "-h") for word in words)
