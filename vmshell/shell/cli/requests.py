"""From a verb's values to the message that asks for it; shared by the verb itself and by `explain`.

Runs in: the shell. Pure functions.
"""

from __future__ import annotations

from ... import messages
from ...refusals import Usage
from .values import split_object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .grammar import Values


def _new(values: Values) -> messages.Request:
    if not values.flag("image"):
        raise Usage(problem="new needs --image IMAGE, or --from - and a definition", usage="new NAME --image IMAGE")
    given: dict[str, int] = {name: values.number(name, 0) for name in ("cpus", "memory", "disk") if values.flag(name)}
    return messages.New(vm=values.text("vm"), image=values.text("image"), **given)


def _set(values: Values) -> messages.Request:
    pairs = [word.partition("=") for word in values.words("assignments")]
    if not pairs:
        raise Usage(problem="set needs KEY=VALUE", usage="set NAME KEY=VALUE…")
    return messages.Change(vm=values.text("vm"), set={key: value for key, _, value in pairs})


def _unset(values: Values) -> messages.Request:
    if not values.words("keys"):
        raise Usage(problem="unset needs a KEY", usage="unset NAME KEY…")
    return messages.Change(vm=values.text("vm"), unset=values.words("keys"))


def _boot(values: Values) -> messages.Request:
    return messages.Boot(
        vm=values.text("vm"),
        console=values.flag("console") or values.flag("wait"),
        restore=values.optional("restore") or "",
        scratch=values.flag("snapshot"),
    )


def _disk(values: Values) -> messages.Request:
    return messages.DiskAdd(
        vm=values.text("vm"),
        object=values.text("object"),
        size=values.number("size", 0),
        format=values.optional("format") or "qcow2",
        bus=values.optional("bus") or "",
    )


def _rm(values: Values) -> messages.Request:
    name = values.text("vm")
    if "." in name:
        where, object_name = split_object(name)
        return messages.Drop(vm=where, object=object_name)
    return messages.Rm(vm=name)


def _snapshot(values: Values) -> messages.Request:
    return messages.Snapshot(vm=values.text("vm"), tag=values.text("tag"), delete=values.flag("delete"))


BUILDERS: dict[str, Callable[[Values], messages.Request]] = {
    "new": _new,
    "set": _set,
    "unset": _unset,
    "boot": _boot,
    "disk": _disk,
    "rm": _rm,
    "snapshot": _snapshot,
    **{
        kind.verb: lambda values, kind=kind: kind(vm=values.text("vm"))  # type: ignore[misc]
        for kind in (
            messages.Info,
            messages.Shutdown,
            messages.Kill,
            messages.Reset,
            messages.Reboot,
            messages.Console,
            messages.Display,
        )
    },
}


def build(verb: str, values: Values) -> messages.Request:
    """The message of a request of *verb*; raises Usage or what is wrong with its values."""
    return BUILDERS[verb](values)
