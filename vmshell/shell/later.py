"""The verbs that few logins use: their code is imported when they are called, so that `ssh host list` does not pay for them.

Runs in: the shell.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .context import Context
    from .grammar import Values


def set_keys(context: Context, values: Values) -> int:
    from . import defining

    return defining.set_keys(context, values)


def unset_keys(context: Context, values: Values) -> int:
    from . import defining

    return defining.unset_keys(context, values)


def define(context: Context, values: Values) -> int:
    from . import defining

    return defining.define(context, values)


def kvm(context: Context, values: Values) -> int:
    from . import defining

    return defining.kvm(context, values)


def import_libvirt(context: Context, values: Values) -> int:
    from . import defining

    return defining.import_libvirt(context, values)


def explain(context: Context, values: Values) -> int:
    from . import explain as module

    return module.explain(context, values)


def snapshot(context: Context, values: Values) -> int:
    from . import storing

    return storing.snapshot(context, values)


def snapshots(context: Context, values: Values) -> int:
    from . import storing

    return storing.snapshots(context, values)


def display(context: Context, values: Values) -> int:
    from . import storing

    return storing.display(context, values)


def disk(context: Context, values: Values) -> int:
    from . import storing

    return storing.disk(context, values)


def put(context: Context, values: Values) -> int:
    from . import storing

    return storing.put(context, values)


def objects(context: Context, values: Values) -> int:
    from . import storing

    return storing.objects(context, values)


def networks(context: Context, values: Values) -> int:
    from . import networking

    return networking.networks(context, values)


def net(context: Context, values: Values) -> int:
    from . import networking

    return networking.net(context, values)


def publish(context: Context, values: Values) -> int:
    from . import networking

    return networking.publish(context, values)


def unpublish(context: Context, values: Values) -> int:
    from . import networking

    return networking.unpublish(context, values)


def connect(context: Context, values: Values) -> int:
    from . import networking

    return networking.connect(context, values)


def ssh(context: Context, values: Values) -> int:
    from . import ssh as module

    return module.ssh(context, values)
