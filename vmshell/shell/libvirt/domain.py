"""A libvirt domain (`virsh dumpxml`) read into a definition: what there is a key for, and a line for everything else.

Every element and attribute that is not understood is reported by construction: what was read is marked, the rest is listed.
Runs in: the shell, for the verb that imports it. Pure functions.
"""

from __future__ import annotations

from ...names import LOWER, MIB, NAME_CHARS, NAME_MAX
from .devices import Devices
from .draft import Draft, Table
from .xml import Node, bad_domain, left_out, parse

UNITS = {"b": 1, "bytes": 1, "KB": 1000, "k": 1 << 10, "KiB": 1 << 10, "MB": 10**6, "M": MIB, "MiB": MIB}
UNITS.update({"GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TB": 10**12, "T": 1 << 40, "TiB": 1 << 40})
BOOT_DEVICES = {"hd": "disk", "cdrom": "cdrom", "fd": "floppy", "network": "net"}


def read_domain(xml_text: str) -> tuple[Table, list[str], list[str]]:
    """The definition's tables, a line for everything left out, and the objects that must be brought in with `put`.

    Raises BadValue for what is no domain of a PC, or is a hostile document.
    """
    top = parse(xml_text)
    draft = Draft()
    _Domain(top, draft).read()
    return draft.table, left_out(top, draft.notes), draft.objects


class _Domain:
    """The machine itself; `Devices` reads what is attached to it."""

    def __init__(self, top: Node, draft: Draft) -> None:
        self.top = top
        self.draft = draft
        self.put = draft.put
        self.note = draft.note

    def read(self) -> None:
        top = self.top
        if top.take("type") not in ("kvm", "qemu", ""):
            raise bad_domain(f"of type {top.attributes['type']}", "a VM of KVM or QEMU")
        self._name()
        self._os(top.child("os") or Node("os", {}, "domain/os"))
        self._hardware()
        Devices(top.child("devices") or Node("devices", {}, "domain/devices"), self.draft).read()
        self._boot_order()

    def _name(self) -> None:
        top = self.top
        given = top.words("name")
        name = "".join(char if char in NAME_CHARS else "-" for char in given.lower()).lstrip("0123456789-")[:NAME_MAX].rstrip("-")
        if name and name[0] in LOWER:
            self.draft.table["name"] = name
        if given and name != given:
            self.draft.notes.append(("domain/name", f"{given} became {name}" if name else f"{given} is no name here"))
        text = top.words("description") or top.words("title")
        line = " ".join(text.split())
        self.put(top, "description", line.encode("utf-8", "replace")[:1024].decode("utf-8", "ignore"))

    # machine

    def _os(self, os: Node) -> None:
        kind = os.child("type")
        if kind is not None:
            if kind.text.strip() != "hvm":
                raise bad_domain(kind.text.strip() or "of no type", "a whole machine, <type>hvm</type>")
            if kind.take("arch") not in ("", "x86_64", "i686"):
                raise bad_domain(f"for {kind.attributes['arch']}", "a PC, x86_64 or i686")
            self._machine(kind, kind.take("machine"))
        self._firmware(os)
        if os.words("kernel"):
            self._kernel(os)
        if os.value("bootmenu", "enable") == "yes":
            self.put(os, "boot.menu", True)

    def _kernel(self, os: Node) -> None:
        for tag, key in (("kernel", "boot.kernel"), ("initrd", "boot.initrd")):
            node = os.child(tag)
            if node is not None and node.text.strip():
                self.put(node, key, self.draft.object(node.text.strip()))
        cmdline = os.child("cmdline")
        if cmdline is not None:
            self.put(cmdline, "boot.cmdline", cmdline.text.strip())

    def _machine(self, node: Node, machine: str) -> None:
        family = "q35" if "q35" in machine else "pc"
        if machine.partition("-")[0] not in ("", "pc", "q35"):
            self.note(node, f"machine {machine}: pc or q35, and pc is taken")
        elif machine not in ("", "pc", "q35"):
            self.note(node, f"machine {machine} became {family}, pinned to today's version")
        self.put(node, "machine.type", family)

    def _firmware(self, os: Node) -> None:
        """`<os firmware="efi">`, or a loader that is flash; the loader's file is left out."""
        loader = next((child for child in os.children if child.tag == "loader"), None)
        if os.take("firmware") == "efi" or (loader is not None and loader.attributes.get("type") == "pflash"):
            self.put(os, "machine.firmware", "uefi")

    def _hardware(self) -> None:
        top = self.top
        memory = top.child("memory")
        if memory is not None:
            self._memory(memory)
        cpus = top.child("vcpu")
        if cpus is not None:
            text = cpus.text.strip()
            self.put(cpus, "cpu.count", int(text) if text.isascii() and text.isdigit() and len(text) < 6 else text)
            cpus.take("placement")
        self._cpu()
        features = top.child("features")
        self.put(top, "machine.acpi", bool(features and features.child("acpi")))
        for tag in ("apic", "pae"):
            if features and (node := features.child(tag)):
                node.done()
        self._clock()
        for tag in ("on_poweroff", "on_crash", "on_reboot"):
            self._event(tag)

    def _memory(self, node: Node) -> None:
        text, unit = node.text.strip(), node.take("unit") or "KiB"
        if not (text.isascii() and text.isdigit() and len(text) < 16) or unit not in UNITS:
            self.note(node, f"{text} {unit} is no size")
            return
        self.put(node, "memory.size", f"{-(-int(text) * UNITS[unit] // MIB)}M")

    def _cpu(self) -> None:
        cpu = self.top.child("cpu")
        if cpu is None:
            return
        for name in ("check", "migratable", "match"):
            cpu.take(name)
        if cpu.take("mode") in ("host-passthrough", "host-model", "maximum"):
            self.put(cpu, "cpu.model", "host")
        elif (model := cpu.child("model")) is not None:
            model.take("fallback")
            self.put(model, "cpu.model", model.text.strip())

    def _clock(self) -> None:
        clock = self.top.child("clock")
        if clock is None:
            return
        offset = clock.take("offset")
        if offset in ("utc", "localtime"):
            self.put(clock, "machine.clock", offset)
        elif offset:
            self.note(clock, f"offset {offset}: utc or localtime, and utc is taken")

    def _event(self, tag: str) -> None:
        node = self.top.child(tag)
        what = node.text.strip() if node else ""
        if node is None or (tag != "on_reboot" and what == "destroy"):
            return
        if tag == "on_reboot" and what in ("restart", "destroy"):
            self.put(node, "machine.on_reboot", "restart" if what == "restart" else "stop")
        else:
            node.leave(f"{what}: restart or destroy; restart is taken" if tag == "on_reboot" else "a VM that has ended is gone")

    def _boot_order(self) -> None:
        os = self.top.child("os")
        if os is None:
            return
        names = [name for _, name in sorted(self.draft.order)]
        there = self.draft.devices
        for node in os.all("boot"):
            kind = BOOT_DEVICES.get(node.take("dev"), "")
            found = [name for name in there if kind and name.startswith(kind) and name not in names]
            if not found:
                node.leave("this VM has no such device")
            names += found[:1]
        if names:
            self.put(os, "boot.order", names)
