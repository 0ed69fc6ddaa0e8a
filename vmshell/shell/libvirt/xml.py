"""The XML document of a libvirt domain: read without trust, and with a mark on everything that somebody asked for.

It comes from elsewhere, so it may be hostile: no document type, no entities, a bounded size and depth.
Runs in: the shell, for `domain.py`. Pure functions.
"""

from __future__ import annotations

from xml.parsers import expat

from ...errors import BadValue, safe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE_MAX = 256 << 10
DEPTH_MAX = 24
ELEMENTS_MAX = 5000
LINES_MAX = 200

NO_KEY = "there is no key for it"
HOST_DEVICE = "devices of the host are nobody's to hand over"
HOST_FILE = "it names a file of the host"
BROKER = "the broker says how the host runs VMs"
ALWAYS = "every VM has it where it is needed"
NO_SOUND = "VMs have no sound"
NETWORK = "networks are the administrator's; the key net0.network"
POLICY = "the policy says how much of the host a VM gets"

WHY = {
    "domain@id": "it is the number of a VM that ran elsewhere",
    "domain/uuid": "each VM has one of its own and keeps it",
    "domain/metadata": "it is other programs'",
    "domain/currentMemory": "the balloon is moved with the key memory.size",
    "domain/qemu:commandline": "options of QEMU are never taken over; `kvm` reads those that there are keys for",
    "domain/memoryBacking": BROKER,
    "domain/memtune": POLICY,
    "domain/blkiotune": POLICY,
    "domain/cputune": POLICY,
    "domain/numatune": BROKER,
    "domain/iothreads": BROKER,
    "domain/resource": POLICY,
    "domain/seclabel": BROKER,
    "domain/sysinfo": "what the firmware says about the host is always the same",
    "domain/launchSecurity": BROKER,
    "domain/pm": "VMs sleep with `pause`",
    "domain/cpu/topology": "processors are laid out by the broker",
    "domain/cpu/feature": "flags of processors are the administrator's to give",
    "domain/cpu/numa": BROKER,
    "domain/clock/timer": "the clock's other properties are set by the broker",
    "domain/os/nvram": "each VM gets its own",
    "domain/os/loader": "the firmware comes from the administrator's catalogue",
    "domain/os/bios": NO_KEY,
    "domain/devices/emulator": "which QEMU runs is the administrator's to say",
    "domain/devices/hostdev": HOST_DEVICE,
    "domain/devices/redirdev": HOST_DEVICE,
    "domain/devices/smartcard": HOST_DEVICE,
    "domain/devices/tpm": HOST_DEVICE,
    "domain/devices/filesystem": "folders of the host are not shown to guests; bring files in with `put`",
    "domain/devices/shmem": "memory is not shared with other programs",
    "domain/devices/controller": ALWAYS,
    "domain/devices/hub": ALWAYS,
    "domain/devices/sound": NO_SOUND,
    "domain/devices/audio": NO_SOUND,
    "domain/devices/watchdog": "VMs have no watchdog",
    "domain/devices/panic": "a VM that panics is ended",
    "domain/devices/parallel": "VMs have no parallel port",
    "domain/devices/vsock": NO_KEY,
    "domain/devices/disk/auth": "secrets have no place in a definition",
    "domain/devices/disk/encryption": "secrets have no place in a definition",
    "domain/devices/disk/backingStore": "an object stands alone: `qemu-img convert` makes one file of it first",
    "domain/devices/disk/iotune": POLICY,
    "domain/devices/interface/target": "taps are named by the broker",
    "domain/devices/interface/script": "nothing of the host is run for a guest",
    "domain/devices/interface/bandwidth": NETWORK,
    "domain/devices/interface/filterref": NETWORK,
    "domain/devices/interface/vlan": NETWORK,
    "domain/devices/interface/backend": NETWORK,
    "domain/devices/interface/source": NETWORK,
    "domain/devices/interface/rom": HOST_FILE,
    "domain/devices/graphics@passwd": "secrets have no place in a definition; `display NAME` checks who looks",
}


class Node:
    """An element; what was read of it is marked."""

    __slots__ = ("attributes", "children", "path", "tag", "text", "used", "why")

    def __init__(self, tag: str, attributes: dict[str, str], path: str) -> None:
        self.tag = tag
        self.attributes = attributes
        self.children: list[Node] = []
        self.path = path
        self.text = ""
        self.used: set[str] | None = None  # the attributes that were read; None while the element itself is not
        self.why = ""

    def take(self, name: str) -> str:
        """An attribute, read."""
        self.mark().add(name)
        return self.attributes.get(name, "")

    def mark(self) -> set[str]:
        if self.used is None:
            self.used = set()
        return self.used

    def all(self, tag: str) -> list[Node]:
        """The children of that name, read."""
        found = [child for child in self.children if child.tag == tag]
        for child in found:
            child.mark()
        return found

    def child(self, tag: str) -> Node | None:
        """The first child of that name, read; a second one stays unread."""
        found = next((child for child in self.children if child.tag == tag), None)
        if found is not None:
            found.mark()
        return found

    def words(self, tag: str) -> str:
        child = self.child(tag)
        return child.text.strip() if child else ""

    def value(self, tag: str, attribute: str) -> str:
        child = self.child(tag)
        return child.take(attribute) if child else ""

    def done(self) -> None:
        """The element with all that is in it says nothing that would have to be reported."""
        self.mark().update(self.attributes)
        for child in self.children:
            child.done()

    def leave(self, why: str) -> None:
        """Not taken over, whatever was read of it."""
        self.why = why


def bad_domain(value: str, rule: str) -> BadValue:
    return BadValue(field="the domain", value=safe(value, 60), rule=rule)


def parse(text: str) -> Node:
    raw = text.encode("utf-8", "replace")
    if len(raw) > SIZE_MAX:
        raise bad_domain("too long", f"at most {SIZE_MAX >> 10} KiB")
    root = Node("", {}, "")
    stack = [root]
    count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if len(stack) > DEPTH_MAX or count > ELEMENTS_MAX:
            raise bad_domain("too deep or too large", f"at most {DEPTH_MAX} levels and {ELEMENTS_MAX} elements")
        above = stack[-1]
        node = Node(tag, attributes, f"{above.path}/{tag}" if above.path else tag)
        above.children.append(node)
        stack.append(node)

    def end(tag: str) -> None:
        stack.pop()

    def chars(data: str) -> None:
        stack[-1].text += data

    def doctype(*_: object) -> None:
        # Entities are declared there: without it none can be expanded, from a file or a billion times.
        raise bad_domain("a document type", "plain elements, without a DOCTYPE")

    parser = expat.ParserCreate("utf-8")  # whatever the document says about itself
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = chars
    parser.StartDoctypeDeclHandler = doctype
    parser.EntityDeclHandler = doctype
    try:
        parser.Parse(raw, True)
    except expat.ExpatError as exc:
        raise bad_domain("no XML", f"{expat.errors.messages[exc.code]} in line {exc.lineno}") from None
    top = root.children[0]
    if top.tag != "domain":
        raise bad_domain(f"<{top.tag}>", "what `virsh dumpxml VM` prints starts with <domain>")
    return top


def left_out(top: Node, notes: list[tuple[str, str]]) -> list[str]:
    """One line for each thing that was not read; the same thing many times is one line."""
    counts: dict[str, int] = {}
    for path, why in [*_unread(top), *notes]:
        line = f"{safe(path.removeprefix('domain/'), 100)}: {safe(why, 200)}"
        counts[line] = counts.get(line, 0) + 1
    lines = [f"{line} ({count} times)" if count > 1 else line for line, count in counts.items()]
    return [*lines[:LINES_MAX], *([f"and {len(lines) - LINES_MAX} more"] if len(lines) > LINES_MAX else [])]


def _unread(node: Node) -> Iterator[tuple[str, str]]:
    if node.used is None or node.why:
        yield node.path, node.why or WHY.get(node.path, NO_KEY)
        return
    for name in node.attributes:
        if name not in node.used and name.partition(":")[0] != "xmlns":
            yield f"{node.path}@{name}", WHY.get(f"{node.path}@{name}", NO_KEY)
    for child in node.children:
        yield from _unread(child)
