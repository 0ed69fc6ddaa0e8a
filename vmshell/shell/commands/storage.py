"""The verbs about what a VM is made of: blank disks, files brought in, objects, snapshots, and its screen.

Runs in: the shell. Touches standard input and output, and the descriptors that come with answers.
"""

from __future__ import annotations

from ... import messages
from ...errors import EX_DONE, EX_REFUSED, BadValue, safe
from ...refusals import Usage
from ..cli.values import split_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cli.grammar import Values
    from ..context import Context

ENDINGS = {".qcow2": "qcow2", ".img": "raw", ".raw": "raw", ".fd": "raw", ".ima": "raw", ".flp": "raw", ".rom": "rom"}
FORMATS = ("raw", "qcow2", "file", "rom")
HINTS = {
    "file": "`set {vm} boot.kernel={ref}`, boot.initrd or cdrom0 use it",
    "raw": "`set {vm} {device}={ref}` puts it in",
    "qcow2": "`set {vm} {device}={ref}` puts it in",
    "rom": "`set {vm} boot.option_rom={ref}` uses it",
}


def disk(context: Context, values: Values) -> int:
    from ..cli.requests import build

    answer = context.ask(build("disk", values))
    where, name = values.text("vm"), values.text("object")
    context.say(f"{safe(where)}.{safe(name)}: made")
    if where != messages.SHELF:
        from .define import say_changes

        say_changes(context, answer)
    return EX_DONE


def put(context: Context, values: Values) -> int:
    """The broker's answer brings a pipe that a job reads; only that job ever sees the bytes."""
    import os

    from ..ui.progress import Progress
    from . import upload

    ref = values.text("object")
    where, name = split_object(ref)
    format = values.optional("format") or next((kind for end, kind in ENDINGS.items() if name.endswith(end)), "file")
    if format not in FORMATS:
        raise BadValue(field="--format", value=safe(format, 20), rule=f"one of {', '.join(FORMATS)}")
    upload.check_stdin(context.terminal, ref)
    must_own_stdin(context, "put")
    meter = upload.Meter(context.terminal, upload.size_of(0))
    pending = context.broker.begin(messages.Put(vm=where, object=name, format=format))
    try:
        _, (pipe,) = context.broker.finish(pending, fds=1)
        begun = pending.number
        try:
            sent, digest = upload.send(pipe, 0, meter)
        finally:
            meter.clear()
            os.close(pipe)
        pending.ask(messages.Done(put=begun, bytes=sent, sha256=digest))
        answer, _ = context.broker.finish(pending, Progress(context.terminal))
    finally:
        pending.close()  # before `done`, this gives the upload up
    context.say(f"{safe(ref)}: {_size(answer)} {format}")
    vm = "NAME" if where == messages.SHELF else where
    inside = f"shelf:{name}" if where == messages.SHELF else name
    context.note(HINTS[format].format(vm=vm, ref=inside, device="floppy0 or disk1"))
    return EX_DONE


def must_own_stdin(context: Context, verb: str) -> None:
    """At a prompt, and where requests come line by line, standard input is not the verb's."""
    if not context.single:
        problem = f"{verb} reads standard input, which is where your requests come from"
        raise Usage(problem=problem, usage=f"ssh HOST {verb} … < FILE")


def _size(answer: dict[str, object]) -> str:
    from ...names import format_size

    size = answer.get("size")
    return format_size(size) if isinstance(size, int) else "?"


def objects(context: Context, values: Values) -> int:
    from ..ui import output

    where = values.optional("vm") or messages.SHELF
    answer = context.ask(messages.Objects(vm=where))
    rows = output.rows(answer.get("objects"))
    library = answer.get("library")
    names = [safe(name, 80) for name in library] if isinstance(library, list) else []
    if values.flag("json"):
        output.document(context, answer)
        return EX_DONE
    if rows:
        output.object_table(context, rows)
    else:
        context.note(f"no objects yet: `put {where}.NAME < FILE` brings one in, `disk add {where} NAME --size 2G` makes one")
    if names:
        context.say("library: " + ", ".join(names))
    return EX_DONE


def drop(context: Context, ref: str, *, asks: bool) -> int:
    """`rm VM.OBJECT`."""
    from .machines import ask_line

    where, name = split_object(ref)
    if asks:
        if not (context.terminal.stdin_tty and context.terminal.stderr_tty):
            raise Usage(problem="rm asks for the name, and there is no terminal to ask on", usage=f"rm {ref} --yes")
        if ask_line(context, f"This deletes {ref} for good. Type its name to go on: ") not in (ref, name):
            context.note(f"{ref} was not deleted")
            return EX_REFUSED
    context.ask(messages.Drop(vm=where, object=name))
    context.say(f"{ref}: removed")
    return EX_DONE


def snapshot(context: Context, values: Values) -> int:
    from ..cli.requests import build

    answer = context.ask(build("snapshot", values))
    done = "forgotten" if values.flag("delete") else "saved"
    context.say(f"{safe(answer.get('name'))}: {safe(answer.get('tag'))} {done}")
    return EX_DONE


def snapshots(context: Context, values: Values) -> int:
    from ..ui import output

    answer = context.ask(messages.Info(vm=values.text("vm")))
    rows = output.rows(answer.get("snapshots"))
    if values.flag("json"):
        output.document(context, {"snapshots": rows})
    elif rows:
        output.snapshot_table(context, rows)
    else:
        context.note("no snapshots: `snapshot NAME TAG` makes one while the VM runs")
    return EX_DONE


# --- the screen ------------------------------------------------------------------------------------------------------


def display(context: Context, values: Values) -> int:
    """Bytes between standard input and output and QEMU's VNC server, until either side closes."""
    import socket

    from ..client import pump

    if context.terminal.stdin_tty or context.terminal.stdout_tty:
        raise Usage(
            problem="display speaks RFB on standard input and output, which is for a viewer and not for a terminal",
            usage="socat TCP-LISTEN:5901,bind=127.0.0.1 EXEC:'ssh HOST display NAME', and a viewer on 127.0.0.1:5901",
        )
    must_own_stdin(context, "display")
    _, (fd,) = context.ask_fds(messages.Display(vm=values.text("vm")), 1)
    with socket.socket(fileno=fd) as stream:
        try:
            pump.run(context.terminal, stream)
        except OSError:
            pass  # the viewer or the VM is gone
    return EX_DONE
