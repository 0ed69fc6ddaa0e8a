"""The devices of a libvirt domain: disks, network cards, screen, lines.

Runs in: the shell, for `domain.py`. Pure functions.
"""

from __future__ import annotations

from ...model.definition import BUSES
from ...model.keys import DISK_KEYS, NET_KEYS
from .draft import Draft, Table
from .xml import HOST_DEVICE, NETWORK, Node

GRAPHICS_LISTEN = "QEMU listens nowhere; `display NAME` brings a viewer in"
VIDEO = {"vga": "std", "virtio": "virtio", "cirrus": "cirrus", "none": "none"}
AGENT = "org.qemu.guest_agent.0"


class Devices:
    """Everything below `<devices>`."""

    def __init__(self, devices: Node, draft: Draft) -> None:
        self.devices = devices
        self.draft = draft
        self.put = draft.put
        self.note = draft.note

    def read(self) -> None:
        self._disks(self.devices)
        self._cards(self.devices)
        self._screen(self.devices)
        self._lines(self.devices)

    # disks

    def _disks(self, devices: Node) -> None:
        for node in devices.all("disk"):
            entry = self._disk(node)
            if entry is not None:
                self._boot_place(node, self.draft.device(str(entry.get("type", "disk")), entry))

    def _disk(self, node: Node) -> Table | None:
        kind = node.take("device") or "disk"
        if kind not in BUSES:
            node.leave(f"a {kind} is the host's own")
            return None
        source = node.child("source")
        if node.take("type") != "file":
            node.leave(f"a disk of type {node.attributes.get('type', 'none')} is no file; `put` its contents")
            return None
        file = source.take("file") if source else ""
        if not file and kind != "cdrom":
            node.leave("it names no file")
            return None
        form = node.value("driver", "type") or "raw"
        if form not in ("raw", "qcow2"):
            node.leave(f"its format is {form}; `qemu-img convert` makes qcow2 of it first")
            return None
        if driver := node.child("driver"):
            driver.take("name")
        for empty in node.all("backingStore"):
            if empty.children or empty.attributes:
                empty.used = None
        entry: Table = {"path": self.draft.object(file)} if file else {}
        if kind != "disk":
            entry["type"] = kind
        bus = self._bus(node, kind)
        if bus:
            entry["bus"] = bus
        if kind == "disk":
            entry["format"] = form
        elif form != "raw":
            self.note(node, f"a {kind} is raw")
        self._writes(node, kind, entry)
        self._geometry(node, entry)
        return entry

    def _bus(self, node: Node, kind: str) -> str:
        """The bus as it is called here; where this machine has none of it, what takes its place."""
        bus, device = node.value("target", "bus"), node.value("target", "dev")
        bus = bus or {"hd": "ide", "sd": "scsi", "vd": "virtio"}.get(device[:2], "")
        allowed = BUSES[kind][self.draft.family]
        if not bus or bus in allowed:
            return bus
        instead = {"ide": "sata", "sata": "ide"}.get(bus, "")
        taken = instead if instead in allowed else ""
        self.note(node, f"bus {bus}: a {self.draft.family} machine has none for a {kind}; {taken or 'the usual one'} is taken")
        return taken

    def _writes(self, node: Node, kind: str, entry: Table) -> None:
        readonly, transient = node.child("readonly"), node.child("transient")
        if kind == "cdrom":
            return
        if readonly is not None:
            entry["readonly"] = True
        elif transient is not None:
            entry["snapshot"] = True

    def _geometry(self, node: Node, entry: Table) -> None:
        geometry = node.child("geometry")
        if geometry is None:
            return
        if entry.get("bus") != "ide" or "type" in entry:
            geometry.leave("only a disk on ide has one")
            return
        value: Table = {}
        for name in ("cyls", "heads", "secs"):
            text = geometry.take(name)
            value[name] = int(text) if text.isascii() and text.isdigit() and len(text) < 7 else text
        if trans := geometry.take("trans"):
            value["trans"] = trans
        if self.draft.takes(geometry, DISK_KEYS["geometry"], value):
            entry["geometry"] = value

    # network

    def _cards(self, devices: Node) -> None:
        for node in devices.all("interface"):
            kind = node.take("type")
            if kind not in ("network", "bridge", "user"):
                node.leave(NETWORK if kind != "hostdev" else HOST_DEVICE)
                continue
            entry: Table = {"network": "users"}
            model = node.child("model")
            if model is not None and model.take("type") and self.draft.takes(model, NET_KEYS["model"], model.attributes["type"]):
                entry["model"] = model.attributes["type"]
            if node.value("mac", "address"):
                self.note(node, "mac: it is made from the VM's number; the key net0.mac sets another")
            if node.value("link", "state") == "down":
                entry["link"] = "down"
            forwards = self._forwards(node)
            if forwards:
                entry["forward"] = forwards
            self._boot_place(node, self.draft.device("net", entry))

    def _forwards(self, node: Node) -> list[str]:
        found = []
        for group in node.all("portForward"):
            proto = group.take("proto")
            for ports in group.all("range"):
                forward = f"{proto}:{ports.take('start')}:{ports.take('to') or ports.take('start')}"
                if self.draft.takes(ports, NET_KEYS["forward"], [forward]):
                    found.append(forward)
        return found

    # screen, keyboard, lines

    def _screen(self, devices: Node) -> None:
        screen = next((node for node in devices.all("graphics") if node.attributes.get("type") == "vnc"), None)
        for node in devices.all("graphics"):
            if node is not screen:
                node.take("type")
                node.leave("VMs have one screen, of type vnc")
        if screen is not None:
            screen.take("type")
            for name in ("port", "autoport", "listen", "websocket", "socket"):
                if screen.take(name) not in ("", "-1", "yes"):
                    self.note(screen, GRAPHICS_LISTEN)
                    break
            for listen in screen.all("listen"):
                listen.done()
            self.put(screen, "display.type", "vnc")
            self.put(screen, "display.keymap", screen.take("keymap"))
        video = devices.child("video")
        model = video.child("model") if video else None
        if model is not None:
            kind = model.take("type")
            if kind in VIDEO:
                self.put(model, "display.video", VIDEO[kind])
            else:
                self.note(model, f"{kind}: one of {', '.join(VIDEO)}, and the usual one is taken")
        self._inputs(devices, screen is not None)

    def _inputs(self, devices: Node, screen: bool) -> None:
        tablet = False
        for node in devices.all("input"):
            kind = node.take("type")
            if kind in ("tablet", "mouse", "keyboard"):
                node.take("bus")
                tablet = tablet or kind == "tablet"
            else:
                node.leave(HOST_DEVICE)
        if tablet or screen:
            self.put(devices, "display.tablet", tablet)

    def _lines(self, devices: Node) -> None:
        """Serial ports and channels. A VM always has its console; where it leads on the host is not taken over."""
        serials = [*devices.all("serial"), *devices.all("console")]
        for node in serials:
            if node.take("type") in ("pty", "stdio", "null"):
                node.done()
            else:
                node.leave("it leads to a file or port of the host; the serial port is the console: `console NAME`")
        for extra in devices.all("serial")[1:]:
            extra.leave("VMs have one serial port")
        for node in devices.all("channel"):
            target = next((child for child in node.children if child.tag == "target"), None)
            if target is not None and target.attributes.get("name") == AGENT:
                node.done()
                self.put(node, "agent", True)
            else:
                node.leave("the guest agent's is the only channel")
        for node in devices.all("memballoon"):
            if node.attributes.get("model") == "none":
                node.leave("every VM has one")
            else:
                node.done()
        for node in devices.all("rng"):
            backend = node.words("backend")
            if backend in ("", "/dev/urandom", "/dev/random"):
                node.done()
            else:
                node.leave("every VM has one, fed by the host's random numbers")

    def _boot_place(self, node: Node, device: str) -> None:
        """`<boot order="1"/>` of a device."""
        boot = node.child("boot")
        order = boot.take("order") if boot else ""
        if order.isascii() and order.isdigit() and len(order) < 5:
            self.draft.order.append((int(order), device))
