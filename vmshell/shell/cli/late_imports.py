"""The verbs that few logins use: their code is imported when they are called, so that `ssh host list` does not pay for them.

Runs in: the shell.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..context import Context
    from .grammar import Values


def set_keys(context: Context, values: Values) -> int:
    from ..commands import define

    return define.set_keys(context, values)


def unset_keys(context: Context, values: Values) -> int:
    from ..commands import define

    return define.unset_keys(context, values)


def define(context: Context, values: Values) -> int:
    from ..commands import define

    return define.define(context, values)


def kvm(context: Context, values: Values) -> int:
    from ..commands import define

    return define.kvm(context, values)


def import_libvirt(context: Context, values: Values) -> int:
    from ..commands import define

    return define.import_libvirt(context, values)


def explain(context: Context, values: Values) -> int:
    from ..commands import explain as module

    return module.explain(context, values)


def snapshot(context: Context, values: Values) -> int:
    from ..commands import storage

    return storage.snapshot(context, values)


def snapshots(context: Context, values: Values) -> int:
    from ..commands import storage

    return storage.snapshots(context, values)


def display(context: Context, values: Values) -> int:
    from ..commands import storage

    return storage.display(context, values)


def disk(context: Context, values: Values) -> int:
    from ..commands import storage

    return storage.disk(context, values)


def put(context: Context, values: Values) -> int:
    from ..commands import storage

    return storage.put(context, values)


def objects(context: Context, values: Values) -> int:
    from ..commands import storage

    return storage.objects(context, values)


def networks(context: Context, values: Values) -> int:
    from ..commands import network

    return network.networks(context, values)


def net(context: Context, values: Values) -> int:
    from ..commands import network

    return network.net(context, values)


def publish(context: Context, values: Values) -> int:
    from ..commands import network

    return network.publish(context, values)


def unpublish(context: Context, values: Values) -> int:
    from ..commands import network

    return network.unpublish(context, values)


def connect(context: Context, values: Values) -> int:
    from ..commands import network

    return network.connect(context, values)


def ssh(context: Context, values: Values) -> int:
    from ..commands import ssh as module

    return module.ssh(context, values)
