"""The check of `vmshell-admin doctor` that is about what the broker has written down: records, lists of objects, addresses.

Runs in: vmshell-admin, as whoever typed it. Asks the broker.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import VmshellError
from ..messages import Unreadable
from .asking import ask
from .findings import ANSWER_PATIENCE, FAIL, OK, WARN, Finding
from .usage import some
from .verbs import Context


def check_records(context: Context) -> Iterator[Finding]:
    try:
        answer = ask(context.layout, Unreadable(), ANSWER_PATIENCE)
        vms, shelves, addresses = some(answer.table("vms")), some(answer.table("shelves")), answer.text("addresses")
    except VmshellError as exc:
        yield Finding(WARN, f"nobody can say whether all records are whole: {exc.sentence()}", "run doctor as root")
        return
    if vms.count:
        cure = "a backup of record.json, vm.toml or disks/objects.json, put back; or `rm` takes the VM away"
        yield Finding(FAIL, f"what is written down about {vms} cannot be read", cure)
    if shelves.count:
        cure = "a backup of objects.json, put back; or its owner deletes what is on it"
        yield Finding(FAIL, f"the list of the objects on {shelves} cannot be read", cure)
    if addresses:
        cure = "a backup of net/addresses.log, put back; without one, away with the file, and every VM gets a new address"
        yield Finding(FAIL, f"the list of addresses cannot be used: {addresses}; VMs without one do not boot", cure)
    if not vms.count and not shelves.count and not addresses:
        yield Finding(OK, "all that the broker has written down can be read")
