"""What the verbs do: each builds one request, shows the answer and returns the exit status.

Heavier parts (tables, the console) are imported by the verb that needs them: `ssh host list` pays for nothing else.
Runs in: the shell.
"""

from __future__ import annotations

import os
import sys

from ... import messages
from ...errors import EX_DONE, EX_REFUSED, VmshellError, safe
from ...names import check_vm_ref
from ...refusals import AskKillOrRm, Usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cli.grammar import Values
    from ..console.connection import Link
    from ..context import Context


# --- looking ---------------------------------------------------------------------------------------------------------


def list_vms(context: Context, values: Values) -> int:
    from ..ui import output

    rows: list[dict[str, object]] = []
    after, more = "", True
    while more:
        answer = context.ask(messages.List(after=after, all=values.flag("all")))
        page = output.rows(answer.get("vms"))
        rows += page
        more = answer.get("more") is True and bool(page)
        after = f"{page[-1].get('owner')}/{page[-1].get('name')}" if page else ""
    if values.flag("json"):
        output.document(context, {"vms": rows})
    elif not rows:
        context.note("no VMs yet: `new NAME --image IMAGE` makes one, `images` shows the catalogue")
    else:
        output.vm_table(context, rows, owners=values.flag("all"))
    return EX_DONE


def info(context: Context, values: Values) -> int:
    from ..ui import output

    answer = context.ask(messages.Info(vm=values.text("vm"), toml=values.flag("toml")))
    if values.flag("toml") and not values.flag("json"):
        for line in str(answer.get("toml", "")).splitlines():
            context.say(safe(line, 4096))
    elif values.flag("json"):
        output.document(context, answer)
    else:
        output.vm_details(context, answer)
    return EX_DONE


def images(context: Context, values: Values) -> int:
    from ..ui import output

    rows: list[dict[str, object]] = []
    after, more = "", True
    while more:
        answer = context.ask(messages.Images(after=after))
        page = output.rows(answer.get("images"))
        rows += page
        more = answer.get("more") is True and bool(page)
        after = str(page[-1].get("name")) if page else ""
    if values.flag("json"):
        output.document(context, {"images": rows})
    elif not rows:
        context.note("the catalogue is empty; the administrator fills it with `vmshell-admin image build demo`")
    else:
        output.image_table(context, rows)
    return EX_DONE


def whoami(context: Context, values: Values) -> int:
    from ..ui import output

    answer = context.ask(messages.Whoami())
    if values.flag("json"):
        output.document(context, answer)
    else:
        output.account(context, answer)
    return EX_DONE


def version(context: Context, values: Values) -> int:
    from ..ui import output

    answer = context.ask(messages.Version())
    if values.flag("json"):
        output.document(context, answer)
    else:
        output.versions(context, answer)
    return EX_DONE


# --- making and unmaking ---------------------------------------------------------------------------------------------


def new(context: Context, values: Values) -> int:
    if values.flag("from"):
        from . import define

        return define.new_from(context, values)
    from ..cli.requests import build

    answer = context.ask(build("new", values))
    _state(context, answer)
    context.note(f"`boot {safe(answer.get('name'))} --console` starts it and shows its console")
    return EX_DONE


def rm(context: Context, values: Values) -> int:
    vm = values.text("vm")
    if "." in vm:
        from . import storage

        return storage.drop(context, vm, asks=not values.flag("yes"))
    if not values.flag("yes"):
        if not (context.terminal.stdin_tty and context.terminal.stderr_tty):
            raise Usage(problem="rm asks for the VM's name, and there is no terminal to ask on", usage=f"rm {vm} --yes")
        context.ask(messages.Info(vm=vm))  # first the refusal for a VM that is not there, then the question
        answer = ask_line(context, f"This deletes {vm} and its disks for good. Type its name to go on: ")
        if answer not in (vm, vm.rpartition("/")[2]):
            context.note(f"{vm} was not deleted")
            return EX_REFUSED
    _state(context, context.ask(messages.Rm(vm=vm)))
    return EX_DONE


def ask_line(context: Context, question: str) -> str:
    """Ask on the terminal. What was typed before the question does not answer it."""
    terminal = context.terminal
    terminal.cooked()
    terminal.discard_keys()
    context.take_typed_ahead()
    sys.stderr.write(question)
    sys.stderr.flush()
    answer = os.read(0, 4096)
    if context.interactive:
        terminal.quiet()
    if not answer.endswith(b"\n"):
        sys.stderr.write("\n")
    return answer.decode("utf-8", "replace").strip()


def destroy(context: Context, values: Values) -> int:
    raise AskKillOrRm(vm=values.optional("vm") or "NAME")


# --- power -----------------------------------------------------------------------------------------------------------


def boot(context: Context, values: Values) -> int:
    from ..cli.requests import build

    vm = values.text("vm")
    pattern, attach = values.optional("wait"), values.flag("console")
    if pattern is None:
        if values.flag("timeout"):
            raise Usage(problem="--timeout says how long to wait for --wait", usage="boot NAME --wait REGEX [--timeout S]")
        if attach:
            return boot_attached(context, vm, build("boot", values))
        answer = context.ask(build("boot", values))
        _state(context, answer)
        _say_if_slow(context, answer)
        return EX_DONE
    from ..console.connection import ask_console
    from ..console.wait_for_text import Waiter

    waiter = Waiter(context, vm, pattern, values.number("timeout", 300), show=attach)  # a bad pattern boots nothing
    answer, link = ask_console(context, build("boot", values))
    try:
        waiter.wait(link)
    except BaseException:
        link.close()
        raise
    if attach:
        return _attach(context, vm, link)
    link.close()
    _state(context, answer)
    return EX_DONE


def boot_attached(context: Context, vm: str, request: messages.Request | None = None) -> int:
    """Boot, with the console attached before the guest's first instruction."""
    from ..console.connection import ask_console

    answer, link = ask_console(context, request or messages.Boot(vm=vm, console=True))
    _say_if_slow(context, answer)
    return _attach(context, vm, link)


def make_attached(context: Context, request: messages.Define) -> int:
    """Make and boot a VM in one request, with the console attached."""
    from ..console.connection import ask_console

    answer, link = ask_console(context, request)
    _say_if_slow(context, answer)
    return _attach(context, str(answer.get("name")), link)


def shutdown(context: Context, values: Values) -> int:
    request = messages.Shutdown(vm=values.text("vm"), force=values.flag("force"), timeout=values.number("timeout", 60))
    _state(context, context.ask(request))
    return EX_DONE


def kill(context: Context, values: Values) -> int:
    _state(context, context.ask(messages.Kill(vm=values.text("vm"))))
    return EX_DONE


def reset(context: Context, values: Values) -> int:
    _state(context, context.ask(messages.Reset(vm=values.text("vm"))))
    return EX_DONE


def reboot(context: Context, values: Values) -> int:
    _state(context, context.ask(messages.Reboot(vm=values.text("vm"))))
    return EX_DONE


def _state(context: Context, answer: dict[str, object]) -> None:
    context.say(f"{safe(answer.get('name'))}: {safe(answer.get('state'))}")


def _say_if_slow(context: Context, answer: dict[str, object]) -> None:
    if answer.get("accel") == "tcg":
        context.note("(emulated: this host has no KVM that works, so expect a slow guest)")


# --- console ---------------------------------------------------------------------------------------------------------


def console(context: Context, values: Values) -> int:
    from ..console.connection import ask_console
    from ..console.viewer import Options

    escape = values.number("escape", 0x1D)
    readonly, replay = values.flag("readonly"), not values.flag("no-replay")
    options = Options(readonly=readonly, replay=replay, escape=escape, raw=values.flag("raw"))
    vm = values.text("vm")
    try:
        _, link = ask_console(context, messages.Console(vm=vm, readonly=options.readonly, replay=options.replay))
    except VmshellError as error:
        terminal = context.terminal
        if error.code != "wrong-state" or not (terminal.stdin_tty and terminal.stdout_tty) or options.readonly:
            raise
        return _offer_boot(context, vm, error)
    return _attach(context, vm, link, options)


def _offer_boot(context: Context, vm: str, error: VmshellError) -> int:
    context.note(f"{error.sentence()}. Press b to boot it, any other key to go back.")
    terminal = context.terminal
    terminal.discard_keys()
    terminal.raw()
    try:
        key = os.read(0, 1)
    finally:
        if context.interactive:
            terminal.quiet()
        else:
            terminal.cooked()
    return boot_attached(context, vm) if key in (b"b", b"B") else error.exit_status


def _attach(context: Context, vm: str, link: Link, options: object = None) -> int:
    from ..console.viewer import Options, Viewer

    assert options is None or isinstance(options, Options)
    return Viewer(context, vm, link, options or Options()).run()


def bare_name(context: Context, name: str) -> int:
    """A VM's name alone means its console (Lish); raises NoSuchVm when there is none."""
    from ..cli.grammar import Values as Given

    return console(context, Given({"vm": check_vm_ref(name)}))


# --- the shell itself ------------------------------------------------------------------------------------------------


def help(context: Context, values: Values) -> int:
    from ..cli import help

    context.say(help.topic(values.optional("topic"), context.terminal.columns() or 80))
    return EX_DONE


def leave(context: Context, values: Values) -> int:
    context.leaving = True
    return EX_DONE
