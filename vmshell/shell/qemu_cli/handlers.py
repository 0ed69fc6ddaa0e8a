"""What each option of QEMU becomes: the handlers behind `translate.py`, and how their findings come together.

Runs in: the shell, for the verb `kvm` alone. Pure functions.
"""

from __future__ import annotations

from ...errors import VmshellError
from ...names import check_name
from . import drives, interfaces
from .drives import Disks
from .interfaces import Network
from .options import DENIED, FORMS, SCREEN
from .words import Draft, Given, Missing, Refused, number, object_ref, on_off

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Table = dict[str, object]
    Place = tuple[str, int | None, Given | None]

LETTERS = {"a": "floppy", "c": "disk", "d": "cdrom", "n": "net"}
VIDEO_CARDS = ("std", "cirrus", "virtio", "none")
VIDEO_DEVICES = {"VGA": "std", "virtio-vga": "virtio", "cirrus-vga": "cirrus"}


class Reading:
    """One command line on its way to a definition."""

    def __init__(self, resolve: Callable[[str], str]) -> None:
        self.implied: list[str] = []  # what QEMU, and so the definition, has without being told
        self.draft = Draft(resolve)
        self.disks = Disks(self.draft)
        self.network = Network(self.draft)
        self.order: tuple[Given, str] | None = None
        self.strict = False
        self.roms: list[str] = []
        self.called = ""
        self.beside: list[tuple[Given, str, Missing]] = []  # options that need another key

    def put(self, given: Given, key: str, value: object) -> None:
        self.draft.put(given, key, value)

    def form(self, given: Given, form: str) -> None:
        """Refuse a form that has a reason of its own."""
        if (given.option.name, form) in FORMS:
            verdict, reason, instead = FORMS[given.option.name, form]
            raise Refused(reason, instead, verdict)

    # machine

    def machine(self, given: Given) -> None:
        found = dict(given.properties("type", ("type", "acpi")))
        if "type" in found:
            if not found["type"].startswith(("q35", "pc")):
                raise Refused(f"{found['type'] or 'nothing'} is no machine that VMs are", given.option.instead)
            self.put(given, "machine.type", found["type"])
        if "acpi" in found:
            self.put(given, "machine.acpi", on_off("acpi", found["acpi"]))

    def cpu(self, given: Given) -> None:
        for _, value in given.properties("model", ("model",)):
            self.put(given, "cpu.model", value)

    def smp(self, given: Given) -> None:
        for _, value in given.properties("cpus", ("cpus",)):
            self.put(given, "cpu.count", number("cpus", value, 255))

    def memory(self, given: Given) -> None:
        """Megabytes unless a unit is named, as QEMU has it."""
        for _, value in given.properties("size", ("size",)):
            size = f"{value}M" if value.isascii() and value.isdigit() else value
            self.put(given, "memory.size", size)

    def no_acpi(self, given: Given) -> None:
        self.put(given, "machine.acpi", False)

    def no_reboot(self, given: Given) -> None:
        self.put(given, "machine.on_reboot", "stop")

    def action(self, given: Given) -> None:
        for event, what in given.properties("", ("reboot", "shutdown", "panic", "watchdog")):
            if ("-action", event) in FORMS:
                verdict, reason, instead = FORMS["-action", event]
                given.refuse_part(f"{event}={what}", reason, instead, verdict)
            elif what not in ("reset", "shutdown"):
                given.refuse_part(f"{event}={what}", "a reboot is a reset or a shutdown")
            else:
                self.put(given, "machine.on_reboot", "restart" if what == "reset" else "stop")

    def rtc(self, given: Given) -> None:
        for _, base in given.properties("", ("base",)):
            self.put(given, "machine.clock", base)

    def localtime(self, given: Given) -> None:
        self.put(given, "machine.clock", "localtime")

    def name(self, given: Given) -> None:
        for _, value in given.properties("guest", ("guest",)):
            try:
                name = check_name(value)
            except VmshellError as exc:
                raise Refused(exc.sentence(), given.option.instead) from None
            if self.called not in ("", name):
                raise Refused("another -name already said otherwise", "say it once")
            self.called = name
            given.row.became = f"name={name}"

    # what is booted

    def boot(self, given: Given) -> None:
        for name, value in given.properties("order", ("order", "menu", "strict")):
            if name == "menu":
                self.put(given, "boot.menu", on_off(name, value))
            elif name == "strict":
                self.strict = on_off(name, value)
                given.row.became = f"{given.row.became} {name}={value}".strip()
            elif not value or set(value) - set(LETTERS) or len(set(value)) != len(value):
                raise Refused(f"{value} is not made of a, c, d and n, each once", "a floppy, c disk, d CD drive, n network")
            elif self.order is not None and self.order[1] != value:
                raise Refused(f"{self.order[0].row.option} already said otherwise", "say it once")
            else:
                self.order = (given, value)

    def kernel(self, given: Given) -> None:
        self.put(given, "boot.kernel", object_ref(given.value, self.draft.resolve, images=True))

    def initrd(self, given: Given) -> None:
        self.put(given, "boot.initrd", object_ref(given.value, self.draft.resolve, images=True))
        self.needs(given, "boot.kernel", "an initial RAM disk is for a kernel", "-kernel FILE beside it")

    def append(self, given: Given) -> None:
        self.put(given, "boot.cmdline", given.value)
        self.needs(given, "boot.kernel", "a command line is for a kernel", "-kernel FILE beside it")

    def option_rom(self, given: Given) -> None:
        ref = object_ref(given.value, self.draft.resolve)
        if ref in self.roms:
            raise Refused("it stands there twice", "say it once")
        self.roms.append(ref)
        given.row.became = f"boot.option_rom={ref}"

    def loadvm(self, given: Given) -> None:
        self.put(given, "boot.restore", given.value)

    def needs(self, given: Given, key: str, reason: str, instead: str) -> None:
        self.beside.append((given, key, Missing(reason, instead)))

    # screen

    def display(self, given: Given) -> None:
        kind = given.value.partition(",")[0].partition("=")[0]
        self.form(given, kind)
        if kind == "vnc":
            return self.vnc(given, given.value.removeprefix("vnc").removeprefix("="))
        if given.value != "none":
            raise Refused(f"{given.value} is no screen of a VM", given.option.instead)
        given.row.became = "display.type=none"  # a -vnc beside it goes on, as with QEMU

    def vnc(self, given: Given, value: str | None = None) -> None:
        """Where QEMU would have listened is not listened to: `display NAME` brings a viewer in."""
        where, *parts = (given.value if value is None else value).split(",")
        host, colon, screen = where.rpartition(":")
        network = bool(colon) and screen.isdigit() and "/" not in host and host.partition(":")[0] not in ("unix", "fd")
        if where != "none" and not network:
            raise Refused("it names no display", given.option.instead)
        if not all(parts):
            raise Refused("there is a comma too many", given.option.instead)
        for part in parts:
            given.refuse_part(part, "who sees the screen is checked by `display NAME`", SCREEN)
        self.put(given, "display.type", "vnc")
        given.row.reason = f"{where} is not listened on; viewers come in by `display NAME`"

    def vga(self, given: Given) -> None:
        if given.value not in VIDEO_CARDS:
            raise Refused(given.option.reason, given.option.instead)
        self.put(given, "display.video", given.value)

    def std_vga(self, given: Given) -> None:
        self.put(given, "display.video", "std")

    def keymap(self, given: Given) -> None:
        self.put(given, "display.keymap", given.value)
        self.needs(given, "display.type", "a keyboard is for a screen", "-vnc :1 beside it")

    def usbdevice(self, given: Given) -> None:
        if given.value != "tablet":
            disk = given.value.startswith("disk:")
            raise Refused(given.option.reason, DISK_ON_USB if disk else given.option.instead)
        self.put(given, "display.tablet", True)

    # devices

    def device(self, given: Given) -> None:
        driver = given.value.partition(",")[0].removeprefix("driver=")
        if driver in drives.DEVICES:
            self.disks.device(given, driver)
        elif driver in interfaces.DEVICES:
            self.network.device(given, driver)
        elif driver == "usb-tablet" or driver in VIDEO_DEVICES:
            given.properties("driver", ("driver",))
            key, value = ("display.video", VIDEO_DEVICES[driver]) if driver in VIDEO_DEVICES else ("display.tablet", True)
            self.put(given, key, value)
        else:
            self.form(given, driver)
            self.form(given, driver.removesuffix("-pci"))
            raise Refused(given.option.reason, given.option.instead)

    def snapshot(self, given: Given) -> None:
        self.disks.snapshot = given

    def geometry(self, given: Given) -> None:
        if self.disks.geometry is not None:
            raise Refused("it stands there twice", "say it once")
        self.disks.geometry = given

    def outside(self, given: Given) -> None:
        """-serial, -accel: some forms have reasons of their own, none is accepted."""
        self.form(given, given.value.partition(",")[0])
        raise Refused(given.option.reason, given.option.instead, DENIED if given.option.page else given.option.verdict)

    # --- all together -------------------------------------------------------------------------------------------------

    def finish(self) -> Table:
        """The definition's tables, as `tomllib` would have given them."""
        if "machine.type" not in self.draft.values:
            self.draft.values["machine.type"] = "pc"
            self.implied.append("machine.type=pc")
        disks = self.disks.finish()
        cards = self.network.finish()
        if not self.network.mentioned:
            self.implied.append("net0: network=users")
        for given, key, missing in self.beside:
            if key not in self.draft.values:
                self.draft.attempt(given, missing.throw)
        order = self._order()
        if order:
            self.draft.values["boot.order"] = order
        if self.roms:
            self.draft.values["boot.option_rom"] = self.roms
        table: Table = {"name": self.called} if self.called else {}
        for key, value in self.draft.values.items():
            section, _, word = key.partition(".")
            inner = table.setdefault(section, {})
            assert isinstance(inner, dict)
            inner[word] = value
        if disks:
            table["disk"] = disks
        if cards:
            table["net"] = cards
        return table

    def _order(self) -> list[str]:
        """Devices with a bootindex, then the letters' devices, then what QEMU would try after them (unless strict)."""
        drives: list[Place] = [(drive.name, drive.bootindex, drive.device) for drive in self.disks.drives]
        cards: list[Place] = [(f"net{index}", card.bootindex, card.given) for index, card in enumerate(self.network.cards)]
        if not self.network.mentioned:
            cards.append(("net0", None, None))
        indexed = [(index, name, given) for name, index, given in [*drives, *cards] if index is not None]
        indexed.sort(key=lambda place: place[0])
        for (index, _, _), (after, _, given) in zip(indexed, indexed[1:], strict=False):
            if index == after and given is not None:
                self.draft.attempt(given, Refused(f"bootindex {index} is there twice", "another number").throw)
        order = [name for _, name, _ in indexed]
        names = [name for name, _, _ in [*drives, *cards]]
        if self.order is not None:
            order += [name for name in self._lettered(names) if name not in order]
        if order and not self.strict:
            order += [name for letter in "cad" for name in names if name.startswith(LETTERS[letter]) and name not in order]
        if self.order is not None and not self.order[0].row.refused:
            row = self.order[0].row
            row.became = f"boot.order={','.join(order)} {row.became}".strip()
        return order

    def _lettered(self, names: list[str]) -> list[str]:
        """The first device of each letter's kind, as QEMU and the BIOS have it."""
        assert self.order is not None
        given, letters = self.order
        found = [name for letter in letters for name in names if name == f"{LETTERS[letter]}0"]
        if not found:
            kinds = " or ".join(LETTERS[letter] for letter in letters)
            missing = Missing(f"there is no {kinds} among the options", "-cdrom, -hda or -fda FILE beside it")
            self.draft.attempt(given, missing.throw)
        return found


DISK_ON_USB = "-drive file=NAME,if=none,id=stick and -device usb-storage,drive=stick"

HANDLERS: dict[str, Callable[[Reading, Given], None]] = {
    "-M": Reading.machine,
    "-machine": Reading.machine,
    "-cpu": Reading.cpu,
    "-smp": Reading.smp,
    "-m": Reading.memory,
    "-no-acpi": Reading.no_acpi,
    "-no-reboot": Reading.no_reboot,
    "-action": Reading.action,
    "-rtc": Reading.rtc,
    "-localtime": Reading.localtime,
    "-name": Reading.name,
    "-boot": Reading.boot,
    "-kernel": Reading.kernel,
    "-initrd": Reading.initrd,
    "-append": Reading.append,
    "-option-rom": Reading.option_rom,
    "-loadvm": Reading.loadvm,
    "-display": Reading.display,
    "-vnc": Reading.vnc,
    "-vga": Reading.vga,
    "-std-vga": Reading.std_vga,
    "-k": Reading.keymap,
    "-usbdevice": Reading.usbdevice,
    "-device": Reading.device,
    "-snapshot": Reading.snapshot,
    "-hdachs": Reading.geometry,
    "-serial": Reading.outside,
    "-accel": Reading.outside,
    **{name: lambda reading, given: reading.disks.file(given) for name in drives.PLACES},
    "-drive": lambda reading, given: reading.disks.drive(given),
    "-net": lambda reading, given: reading.network.net(given),
    "-nic": lambda reading, given: reading.network.nic(given),
    "-netdev": lambda reading, given: reading.network.netdev(given),
    "-redir": lambda reading, given: reading.network.redirect(given),
}
