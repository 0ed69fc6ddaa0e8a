"""Every message between our processes, and what a VM's states are called. What a message is made of: see `fields.py`.

    request   {"id": 7, "verb": "boot", "vm": "web1"}
    progress  {"id": 7, "progress": "waiting for 2 other boots"}     any number, then one of
    reply     {"id": 7, "ok": {…}}          or
    error     {"id": 7, "error": {"code": "no-such-vm", "text": "…", "hint": "…"}}

Descriptors go one way: no request brings one, some replies do. An upload, whose bytes go through a pipe that a reply brings:

    request   {"id": 1, "verb": "put", "vm": "shelf", "object": "cd.iso", "format": "file"}
    reply     {"id": 1, "ok": {"name": "shelf", "object": "cd.iso"}}       and the writing end of a pipe
    request   {"id": 2, "verb": "done", "put": 1, "bytes": 3, "sha256": "ba78…"}
    reply     {"id": 2, "ok": {"name": "shelf", "object": "cd.iso", "size": 3, "format": "file"}}

The message has no field for who is asking: that is the socket's to say.
Runs in: every process. Stdlib only, no I/O at import.
"""

from __future__ import annotations

from .encoding import INT_MAX
from .errors import safe
from .fields import Message, bad, boolean, choice, field, integer, parsed, table, text
from .names import INTERFACE_RULE, check_name, check_object, check_vm_ref, is_interface
from .numbering import NUMBER_MAX
from .refusals import UnknownVerb, Upgraded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self, TypeVar

    T = TypeVar("T")

# --- states, as they stand in records, in `list` and on the wire ------------------------------------------------------

OFF = "off"  # defined, not running
CREATING = "creating"  # its disks are being made
QUEUED = "queued"  # waits for its turn to boot
STARTING = "starting"  # QEMU is being started
RUNNING = "running"
PAUSED = "paused"
STOPPING = "stopping"  # QEMU was told to end
FAILED = "failed"  # ended otherwise than asked; `last_error` says why; boots again like `off`

STATES = (OFF, CREATING, QUEUED, STARTING, RUNNING, PAUSED, STOPPING, FAILED)
ALIVE = (STARTING, RUNNING, PAUSED, STOPPING)  # a QEMU process exists

# What the relay may say about a VM. The broker acts on these words and on nothing else that comes from a guest.
WORDS = (
    "ready",  # console and QMP are connected, the guest may be started
    "running",
    "paused",
    "guest-shutdown",  # the guest switched itself off
    "guest-panic",
    "internal-error",  # QEMU's own name for "the CPU cannot run this"
    "io-error",  # the host's storage refused a write and the guest was stopped
    "output",  # the guest's first byte on the console since it was started
    "viewers",  # `count` says how many consoles are attached
    "unreachable",  # QEMU's sockets do not answer
    "unwatched",  # the VM was forgotten, as asked
)


# --- fields -----------------------------------------------------------------------------------------------------------


def vm_ref(value: object, name: str) -> str:
    return check_vm_ref(value)


def vm_name(value: object, name: str) -> str:
    return check_name(value)


def image_name(value: object, name: str) -> str:
    return check_name(value, "image")


def object_name(value: object, name: str) -> str:
    return check_object(value)


def word_list(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or len(value) > WORDS_MAX or not all(isinstance(word, str) for word in value):
        raise bad(name, value, f"a list of at most {WORDS_MAX} words")
    return value


def assignments(value: object, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > WORDS_MAX or not all(isinstance(word, str) for word in value.values()):
        raise bad(name, value, f"at most {WORDS_MAX} keys with a text each")
    return value


def openings(value: object, name: str) -> list[dict[str, object]]:
    if not isinstance(value, list) or len(value) > OPENINGS_MAX:
        raise bad(name, value, f"a list of at most {OPENINGS_MAX} openings")
    return [vars(Opening(**item)) if isinstance(item, dict) else _not_a_table(name, item) for item in value]


def _not_a_table(name: str, value: object) -> dict[str, object]:
    raise bad(name, value, "a table")


def numbers(value: object, name: str) -> list[int]:
    if not isinstance(value, list) or len(value) > NUMBERS_MAX or not all(type(item) is int and item >= 0 for item in value):
        raise bad(name, value, f"a list of at most {NUMBERS_MAX} numbers")
    return value


def few(check: Callable[[object, str], T]) -> Callable[[object, str], list[T]]:
    """A list of at most ASKED_MAX values, each of which *check* lets through."""

    def check_all(value: object, name: str) -> list[T]:
        if not isinstance(value, list) or len(value) > ASKED_MAX:
            raise bad(name, value, f"a list of at most {ASKED_MAX}")
        return [check(item, name) for item in value]

    return check_all


def group_names(value: object, name: str) -> list[str]:
    if not isinstance(value, list) or len(value) > GROUPS_IN_PART or not all(isinstance(item, str) for item in value):
        raise bad(name, value, f"a list of at most {GROUPS_IN_PART} names")
    return value


def digest(value: object, name: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or value.strip("0123456789abcdef"):
        raise bad(name, value, "a SHA-256 in hex")
    return value


def mac(value: object, name: str) -> str:
    """A unicast MAC in lower case, as `names.mac_address` writes it, or nothing."""
    octets = value.split(":") if isinstance(value, str) else []
    good = len(octets) == 6 and all(len(octet) == 2 and not octet.strip("0123456789abcdef") for octet in octets)
    if value != "" and not (good and not int(octets[0], 16) & 1):
        raise bad(name, value, "a MAC address like 06:00:00:00:00:2a")
    return str(value)


def address(value: object, name: str) -> str:
    """An IPv4 or IPv6 address, with `/PREFIX` where a network is meant, or nothing. Who uses it parses it."""
    if not isinstance(value, str) or len(value) > 49 or value.strip("0123456789abcdef.:/"):
        raise bad(name, value, "an address like 10.77.3.1")
    return value


def interface(value: object, name: str) -> str:
    """A network interface of the host, or nothing."""
    if not isinstance(value, str) or not (value == "" or is_interface(value)):
        raise bad(name, value, INTERFACE_RULE)
    return value


TEXT_MAX = 32 * 1024  # characters of a definition: a packet has 64 KiB
WORDS_MAX = 64
OPENINGS_MAX = 256
NUMBERS_MAX = 4096
ASKED_MAX, SHOWN_MAX = 16, 5  # images or accounts of one question, and how many things of each are named: all fits into a packet
UID_MAX = (1 << 32) - 2
LABEL_MAX = 80  # characters of a console's label
ATTACHED_IN_PART = 100  # users of consoles, of the longest labels there can be, escaped
ATTACHED_MAX = 1 << 14  # descriptors that a relay can have
GROUPS_IN_PART = 20  # of the longest names there can be, escaped: a packet has 64 KiB
SHELF = "shelf"  # where a VM is named: the objects that belong to no VM
NUMBER = integer(1, NUMBER_MAX)
PIPES = "pipes"  # what a console is, said by those who ask for one


# --- shell → broker ---------------------------------------------------------------------------------------------------


class Request(Message):
    """What a person's client may ask of the broker."""

    def brings_fds(self) -> bool:
        """Does the reply bring descriptors?"""
        return False


class VmRequest(Request):
    """A request about one VM: `name`, or `owner/name` for those who may."""

    vm: str = field(vm_ref)


class BringsConsole(Request):
    """A request whose reply can bring a console: the pipe to read from, and the pipe for keys (see `consoles.py`).

    Whoever asks for one says `"consoles": "pipes"`; a shell from before the pipes does not, and is told to log in again.
    """

    asks_by = ""  # the field that asks for the console; always, where there is none

    @classmethod
    def from_body(cls, body: dict[str, object]) -> Self:
        request = super().from_body({key: value for key, value in body.items() if key != "consoles"})
        if request.asks() and body.get("consoles") != PIPES:
            raise Upgraded()
        return request

    def to_body(self) -> dict[str, object]:
        return {**super().to_body(), **({"consoles": PIPES} if self.asks() else {})}

    def asks(self) -> bool:
        """Is a console wanted?"""
        return not self.asks_by or bool(getattr(self, self.asks_by))

    def brings_fds(self) -> bool:
        return self.asks()


class List(Request):
    """Own and shared VMs, in pages: `after` is the last row of the page before, as `owner/name`."""

    verb = "list"
    after: str = field(text(128), default="")
    all: bool = field(boolean, default=False)


class Info(VmRequest):
    """With `toml` the reply also holds the definition's text."""

    verb = "info"
    toml: bool = field(boolean, default=False)


class New(Request):
    """Sizes in MiB, so that no unit is ever guessed on the wire."""

    verb = "new"
    vm: str = field(vm_name)
    image: str = field(image_name)
    cpus: int = field(integer(1, 255), default=1)
    memory: int = field(integer(16, 1 << 24), default=512)
    disk: int = field(integer(0, 1 << 24), default=0)


class Define(BringsConsole):
    """Make a VM from the text of a `vm.toml`, or give one that exists another definition (not with `new`).

    With `once` the VM is booted at once and is gone when it ends; `vm` is then the stem of its name. The reply brings a console.
    """

    verb = "define"
    asks_by = "once"
    vm: str = field(vm_name)
    text: str = field(text(TEXT_MAX))
    new: bool = field(boolean, default=False)
    once: bool = field(boolean, default=False)


class Change(VmRequest):
    """Set keys of the definition from words, and put others back to their defaults (first)."""

    verb = "set"
    set: dict[str, str] = field(assignments, default={})
    unset: list[str] = field(word_list, default=[])


class Boot(VmRequest, BringsConsole):
    """Replies once the guest's CPUs run. With `console` the reply brings a console, attached before the first instruction.

    For this run only: `restore` goes on from a snapshot, `scratch` throws away what the guest writes.
    """

    verb = "boot"
    asks_by = "console"
    console: bool = field(boolean, default=False)
    restore: str = field(text(63), default="")
    scratch: bool = field(boolean, default=False)


class Shutdown(VmRequest):
    """Ask the guest to switch itself off; after `timeout` seconds give up, or with `force` pull the plug."""

    verb = "shutdown"
    force: bool = field(boolean, default=False)
    timeout: int = field(integer(1, 3600), default=60)


class Kill(VmRequest):
    verb = "kill"


class Reset(VmRequest):
    verb = "reset"


class Reboot(VmRequest):
    verb = "reboot"


class Rm(VmRequest):
    verb = "rm"


class Console(VmRequest, BringsConsole):
    """The reply brings a console of a VM that runs."""

    verb = "console"
    readonly: bool = field(boolean, default=False)
    replay: bool = field(boolean, default=True)


class Display(VmRequest):
    """The reply brings one end of a byte stream on which the VM's screen speaks RFB (VNC)."""

    verb = "display"

    def brings_fds(self) -> bool:
        return True


class Snapshot(VmRequest):
    """Save memory and disks of a running VM as `tag`; with `delete` forget that snapshot."""

    verb = "snapshot"
    tag: str = field(text(63))
    delete: bool = field(boolean, default=False)


class StoreRequest(VmRequest):
    """A request about the objects of one VM, or, with the name `shelf`, about those that belong to no VM."""


class Objects(StoreRequest):
    verb = "objects"


class DiskAdd(StoreRequest):
    """Make a blank disk of `size` MiB, and put it into the VM's definition."""

    verb = "disk-add"
    object: str = field(object_name)
    size: int = field(integer(1, 1 << 24))
    format: str = field(choice("qcow2", "raw"), default="qcow2")
    bus: str = field(text(16), default="")


class Put(StoreRequest):
    """Bring a file in: the reply brings the writing end of a pipe for its bytes; `done`, on the same connection, is to follow."""

    verb = "put"
    object: str = field(object_name)
    format: str = field(choice("raw", "qcow2", "file", "rom"))

    def brings_fds(self) -> bool:
        return True


class Done(Request):
    """All bytes of the file of request number `put` have been sent, so many and with this SHA-256.

    Replies once the file is an object. A connection that ends without it, or that says something else than what came, is an
    upload that broke off, and nothing is stored.
    """

    verb = "done"
    put: int = field(integer(0, INT_MAX))
    bytes: int = field(integer(0, INT_MAX))
    sha256: str = field(digest)


class Drop(StoreRequest):
    verb = "drop"
    object: str = field(object_name)


class Explain(Request):
    """Would `request` be allowed, and by which rules? Nothing is done. `user`: for whom, if an administrator asks."""

    verb = "explain"
    request: dict[str, object] = field(table)
    user: str = field(text(64), default="")


class LaunchLine(VmRequest):
    """The command that a boot would run; nothing is started (administrators)."""

    verb = "launch-line"


class Reload(Request):
    """Read the policy again (administrators)."""

    verb = "reload"


class ImageUsers(Request):
    """Which VMs stand on each of `images`, and which may stand on any, for their records cannot be read (administrators)."""

    verb = "image-users"
    images: list[str] = field(few(image_name), default=[])


class Unreadable(Request):
    """Whose records, lists of objects and addresses cannot be read (administrators)."""

    verb = "unreadable"


class Owned(Request):
    """What each of `uids` owns: VMs, half-made and unreadable ones too, and objects on its shelf (administrators)."""

    verb = "owned"
    uids: list[int] = field(few(integer(0, (1 << 32) - 2)), default=[])


class Networks(Request):
    """The networks that the peer may put cards on."""

    verb = "networks"


class Net(VmRequest):
    """A VM's network cards with live figures, and what is published of it."""

    verb = "net"


class NetHealth(Request):
    """What the host's network can do, and what is wrong with it (administrators); with `repair` put right as far as can be.

    In any case the broker looks again at who is in which group.
    """

    verb = "net-health"
    repair: bool = field(boolean, default=False)


class Connect(VmRequest):
    """The reply says at which `address` and `port` of this host's network the guest's `port` is reached."""

    verb = "connect"
    port: int = field(integer(1, 65535))


class Publish(VmRequest):
    """Let others reach `port` of the guest: `to` is a user, `@group` or `world`. With `remove` no longer; no `to` is all of them.

    `host_port` is the port of the host that leads there for the world; 0 means the same as `port`.
    """

    verb = "publish"
    port: int = field(integer(1, 65535))
    proto: str = field(choice("tcp", "udp"), default="tcp")
    to: str = field(text(65), default="")
    host_port: int = field(integer(0, 65535), default=0)
    remove: bool = field(boolean, default=False)


class HostKey(VmRequest):
    """Keep the host keys with which the guest's sshd first answered (lines without a host name); with `forget` keep none."""

    verb = "host-key"
    keys: list[str] = field(word_list, default=[])
    forget: bool = field(boolean, default=False)


class Images(Request):
    verb = "images"
    after: str = field(text(128), default="")


class Whoami(Request):
    verb = "whoami"


class Version(Request):
    verb = "version"


REQUESTS: dict[str, type[Request]] = {
    kind.verb: kind
    for kind in (
        *(List, Info, New, Define, Change, Boot, Shutdown, Kill, Reset, Reboot, Rm, Console, Display, Snapshot),
        *(Objects, DiskAdd, Put, Done, Drop, Explain, LaunchLine, Reload, ImageUsers, Owned, Unreadable, Images, Whoami, Version),
        *(Networks, Net, NetHealth, Connect, Publish, HostKey),
    )
}


def parse_request(body: dict[str, object]) -> Request:
    """The typed request in *body*; raises UnknownVerb, BadValue or BadName."""
    verb = body.get("verb")
    kind = REQUESTS.get(verb) if isinstance(verb, str) else None
    if kind is None:
        raise UnknownVerb(verb=safe(verb, 40))
    return kind.from_body(body)


# --- front → broker -------------------------------------------------------------------------------------------------


class Arrived(Message):
    """A user has connected, as the kernel says it; brings the broker's end of the connection to the child that serves them."""

    verb = "arrived"
    fds = 1
    uid: int = field(integer(0, UID_MAX))


# --- broker → relay and back ------------------------------------------------------------------------------------------


class ToRelay(Message):
    """What the relay may be asked."""


class ToRelayAboutVm(ToRelay):
    number: int = field(NUMBER)


class Watch(ToRelayAboutVm):
    """Take care of a VM: read its serial port and connect to its `qmp.sock`.

    Brings the serial port's two FIFOs, input and output (none if an earlier version started the VM: it has a `console.sock`), and
    behind them, when QEMU was just started, its error pipe.
    """

    verb = "watch"
    fds = 3
    log_max: int = field(integer(4096, 1 << 30), default=1 << 20)
    log: bool = field(boolean, default=True)


class Attach(ToRelayAboutVm):
    """A viewer of user `uid`; brings the pipe its keys come from, and the pipe for the guest's output.

    `label` is how `who` names it: the account's name, as much of it as there is room for.
    """

    verb = "attach"
    fds = 2
    uid: int = field(integer(0, UID_MAX))
    label: str = field(text(LABEL_MAX))
    readonly: bool = field(boolean, default=False)
    replay: bool = field(boolean, default=True)


class Attached(ToRelay):
    """Who has consoles? Replies with `users`, a list of `[uid, label]`: of all of them the next ATTACHED_IN_PART after *skip*."""

    verb = "attached"
    skip: int = field(integer(0, ATTACHED_MAX), default=0)


class Detach(ToRelay):
    """End all consoles of `uid` that are labelled `label`, whichever VM they show: its user is told `reason`, with its `code`."""

    verb = "detach"
    uid: int = field(integer(0, UID_MAX))
    label: str = field(text(LABEL_MAX))
    code: str = field(text(40))
    reason: str = field(text(200))


ORDERS = (
    "cont",
    "powerdown",
    "reset",
    "quit",
    "balloon",  # `value` MiB are the guest's from now on
    "link-up",  # NIC `value`
    "link-down",
    "insert",  # into CD drive `value` the read-only file whose descriptor comes beside it
    "eject",  # what is in CD drive `value`
    "display",  # the descriptor that comes beside it is a VNC client
    "snapshot-save",  # memory, and the disks of the bit mask `disks`, under number `value`
    "snapshot-delete",
    "log-on",  # keep the guest's output in the log from now on; never reaches QEMU
    "log-off",
    "nic-add",  # NIC `value` of `model` with `mac` on the tap that comes beside it; `port`: into the spare port of its number
    "nic-remove",  # NIC `value`
)
NIC_MODELS = ("virtio", "e1000e", "e1000", "rtl8139")


class Order(ToRelayAboutVm):
    """One of the few things we ever tell QEMU; its arguments are numbers of ours, never anybody's text."""

    verb = "order"
    fds = 1
    what: str = field(choice(*ORDERS))
    value: int = field(integer(0, 1 << 24), default=0)
    disks: int = field(integer(0, (1 << 32) - 1), default=0)
    mac: str = field(mac, default="")
    model: str = field(choice(*NIC_MODELS), default="virtio")
    port: bool = field(boolean, default=False)


class Drain(ToRelayAboutVm):
    """QEMU is gone: hand on what it said last. The answer comes after all that its monitor said."""

    verb = "drain"


class Forget(ToRelayAboutVm):
    """The VM has ended: tell its viewers `reason`, close everything; with `purge` delete its log."""

    verb = "forget"
    reason: str = field(text(200), default="")
    purge: bool = field(boolean, default=False)


TO_RELAY: dict[str, type[ToRelay]] = {kind.verb: kind for kind in (Watch, Attach, Attached, Detach, Order, Drain, Forget)}


class Event(Message):
    """Relay → broker: one closed word about one VM, and a small number where the word needs one."""

    verb = "event"
    number: int = field(NUMBER)
    word: str = field(choice(*WORDS))
    count: int = field(integer(0, 100_000), default=0)


def parse_to_relay(body: dict[str, object]) -> ToRelay:
    return parsed(body, TO_RELAY, "the relay")


# --- broker → tapnet --------------------------------------------------------------------------------------------------
#
# The broker says what there is to be, tapnet makes the kernel so. Each message is answered, in order, with `ok` or `error`.
# A connection begins with `settings`, then names every segment and port that exists, and ends that with `settle`: what was not
# named is removed. After that single messages change what there is.

NIC = integer(0, 15)
SEGMENT = integer(0, NUMBER_MAX)
SEGMENT_KINDS = ("private", "shared", "service", "bridged")
OUTSIDE = ("none", "internet", "all")


class Opening(Message):
    """One way to a port of a guest: from an interface (a user's bridge, a consumer's tap), or from the world by `host_port`."""

    source: str = field(interface, default="")
    proto: str = field(choice("tcp", "udp"), default="tcp")
    port: int = field(integer(1, 65535))
    host_port: int = field(integer(0, 65535), default=0)


class ToTapnet(Message):
    """What tapnet may be asked."""


class Settings(ToTapnet):
    """What holds for all networks. The pools contain every segment; sockets of *confined* uids reach their own VMs only."""

    verb = "settings"
    pool4: str = field(address)
    pool6: str = field(address, default="")
    confined: list[int] = field(numbers, default=[])


class Confine(ToTapnet):
    """More confined uids than `settings` had room for."""

    verb = "confine"
    uids: list[int] = field(numbers, default=[])


class Segment(ToTapnet):
    """A bridge: ours, with the gateway's addresses on it, or with `bridge` one that the host has.

    Of kind `bridged` it is the host's `bridge`, or a bridge of ours with VLAN `vlan` of the host's interface `parent` in it.
    Saying the same again changes nothing. It goes with its last port.
    """

    verb = "segment"
    segment: int = field(SEGMENT)
    kind: str = field(choice(*SEGMENT_KINDS), default="private")
    gateway4: str = field(address, default="")
    gateway6: str = field(address, default="")
    outside: str = field(choice(*OUTSIDE), default="none")
    bridge: str = field(interface, default="")
    parent: str = field(interface, default="")
    vlan: int = field(integer(0, 4094), default=0)


class Port(ToTapnet):
    """A tap on a segment, its filter, its limits. With `create` it must not exist and the reply brings its descriptor.

    *rate* is in kbit/s each way, 0 for none. *owner* is the uid whose own sockets on the host may reach it. Without addresses (a
    bridged network, whose addresses are not ours) only the MAC is held to. Not *isolated*, it reaches every port of its segment.
    """

    verb = "port"
    number: int = field(NUMBER)
    nic: int = field(NIC)
    segment: int = field(SEGMENT)
    mac: str = field(mac)
    address4: str = field(address, default="")
    address6: str = field(address, default="")
    isolated: bool = field(boolean, default=False)
    rate: int = field(integer(0, 100_000_000), default=0)
    owner: int = field(integer(0, (1 << 32) - 2), default=0)
    create: bool = field(boolean, default=False)


class Open(ToTapnet):
    """All the ways to this port of a VM there are from now on."""

    verb = "open"
    number: int = field(NUMBER)
    nic: int = field(NIC)
    openings: list[dict[str, object]] = field(openings, default=[])


class Unplug(ToTapnet):
    """The port and its filter are no longer wanted; one that does not exist is no error."""

    verb = "unplug"
    number: int = field(NUMBER)
    nic: int = field(NIC)


class Settle(ToTapnet):
    """All that exists has been named: remove the rest."""

    verb = "settle"


class Health(ToTapnet):
    """Replies with `features` (what this kernel has, by name) and `problems` (sentences)."""

    verb = "health"


TO_TAPNET: dict[str, type[ToTapnet]] = {
    kind.verb: kind for kind in (Settings, Confine, Segment, Port, Open, Unplug, Settle, Health)
}


def parse_to_tapnet(body: dict[str, object]) -> ToTapnet:
    return parsed(body, TO_TAPNET, "tapnet")


# --- broker → accounts helper -----------------------------------------------------------------------------------------
#
# One question, then its answer: `part` as often as it takes, then `found` as the reply.

ACCOUNT_NAME = text(256)


class ToAccounts(Message):
    """What may be asked about the host's accounts."""


class AboutUid(ToAccounts):
    """Whose is `uid`? The answer has `user`."""

    verb = "uid"
    uid: int = field(integer(0, UID_MAX))


class AboutUser(ToAccounts):
    """Who is `user`? The answer has `uid`, its parts all `groups`."""

    verb = "user"
    user: str = field(ACCOUNT_NAME)


class AboutGroup(ToAccounts):
    """Is there a group of that name?"""

    verb = "group"
    group: str = field(ACCOUNT_NAME)


class AboutMembers(ToAccounts):
    """Who is in `group`? The answer's parts have all `uids`."""

    verb = "members"
    group: str = field(ACCOUNT_NAME)


class Part(Message):
    """Some of what belongs to the answer that follows."""

    verb = "part"
    groups: list[str] = field(group_names, default=[])
    uids: list[int] = field(numbers, default=[])


class Found(Message):
    """The answer, or its end: whether there is such an account or group, and what was asked about it.

    Not *whole*, it is what is left while a database is silent: what there is, is so, and there may be more.
    """

    verb = "found"
    exists: bool = field(boolean, default=False)
    uid: int = field(integer(0, UID_MAX), default=0)
    user: str = field(ACCOUNT_NAME, default="")
    whole: bool = field(boolean, default=True)


TO_ACCOUNTS: dict[str, type[ToAccounts]] = {kind.verb: kind for kind in (AboutUid, AboutUser, AboutGroup, AboutMembers)}


def parse_to_accounts(body: dict[str, object]) -> ToAccounts:
    return parsed(body, TO_ACCOUNTS, "the accounts helper")
