"""May this VM be like this, given what its owner already uses? Each rule of the policy, its answer, the sentence of a refusal.

Asked when a VM is defined or changed and again at every boot: limits may have been lowered since.
Used by: broker, admin. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from ..errors import VmshellError
from ..names import MIB
from ..refusals import OverLimit, PolicyDenied
from .definition import Definition, with_values
from .keys import KEYS
from .limitkinds import FEATURES, port_range
from .limits import LIMIT_KEYS, Limits, plain, shown
from .policy import Effective


@dataclass(frozen=True)
class Usage:
    """What counts against the limits: one VM's share, or a user's sum. Memory and disk in MiB."""

    vms: int = 0
    running: int = 0
    cpus: int = 0
    memory: int = 0
    disk: int = 0
    snapshots: int = 0
    nics: int = 0

    @classmethod
    def total(cls, shares: Iterable[Usage]) -> Usage:
        """The sum; CPUs and memory count only where something runs."""
        parts = [part if part.running else Usage(part.vms, 0, 0, 0, part.disk, part.snapshots, part.nics) for part in shares]
        return cls(**{item.name: sum(getattr(part, item.name) for part in parts) for item in fields(cls)})


@dataclass(frozen=True)
class Verdict:
    """One rule's answer, each part ready to print. *limit* and *used* are empty where no number decides."""

    rule: str
    section: str
    what: str
    asked: str
    used: str
    limit: str
    nearest: str
    ok: bool
    vm: str

    def error(self, vm: str = "") -> VmshellError:
        """The refusal, as somebody reads it who calls the VM *vm*."""
        said = {"vm": vm or self.vm, "what": self.what, "rule": self.rule, "section": self.section}
        if not self.limit:
            return PolicyDenied(**said, nearest=self.nearest)
        return OverLimit(**said, asked=self.asked, used=self.used, limit=self.limit, allowed=self.nearest)


def decide(
    vm: str, effective: Effective, definition: Definition, share: Usage, used: Usage, sizes: Mapping[str, int]
) -> list[Verdict]:
    """Every rule that concerns *vm* with this *definition*, kept or not, in a fixed order.

    *share* is what the VM would count, *used* what all else of its owner does, *sizes* the bytes of each object as a guest sees
    it, by its reference. A share of zero always fits: somebody over a lowered limit may still list, stop and delete.
    """
    asking = _Asking(vm, effective, definition, sizes)
    rules = (
        sums(vm, effective, share, used),
        asking.counts(),
        asking.files(),
        asking.names(),
        asking.features(),
        asking.grants(),
        asking.fixed(),
    )
    return [verdict for rule in rules for verdict in rule]


def refuse(verdicts: Iterable[Verdict], vm: str = "") -> None:
    """Raise the first refusal, OverLimit or PolicyDenied, if there is one."""
    for verdict in verdicts:
        if not verdict.ok:
            raise verdict.error(vm)


def fits(what: str, effective: Effective, share: Usage, used: Usage) -> None:
    """Raise OverLimit if *share* of *what*, which need not be a VM, does not fit beside *used*."""
    refuse(sums(what, effective, share, used))


def apply_fixed(definition: Definition, limits: Limits, *, only_unsaid: bool = False) -> Definition:
    """The definition with the policy's `fixed` values; with *only_unsaid*, but for keys that have another value than the default.

    The former is what boots. The latter is for a definition that somebody hands in: what was said against the policy stays, for
    `decide` to refuse it. Raises BadValue if the outcome is no VM.
    """
    values = {}
    for name, value in limits.fixed.items():
        said = getattr(definition, KEYS[name].attribute) != KEYS[name].default
        if not _is_fixed_so(definition, name, value) and not (said and only_unsaid):
            values[name] = value
    return with_values(definition, values) if values else definition


def _is_fixed_so(definition: Definition, name: str, value: object) -> bool:
    actual = getattr(definition, KEYS[name].attribute)
    if name == "machine.type" and value == definition.family:
        return True  # pinned to a version of it, as every machine is
    return bool(actual == KEYS[name].kind.check(value, name))


def sums(vm: str, effective: Effective, share: Usage, used: Usage) -> Iterator[Verdict]:
    """What one VM may have of something, and all of them together."""
    on = int(bool(share.running))
    for rule, what, asked, in_use in (
        ("vms_max", "VMs", share.vms, used.vms),
        ("running_max", "running VMs", share.running, used.running),
        ("cpus_max", "CPUs for one VM", share.cpus, 0),
        ("user_cpus", "CPUs in all", share.cpus * on, used.cpus),
        ("memory_max", "memory for one VM", share.memory, 0),
        ("user_memory", "memory in all", share.memory * on, used.memory),
        ("disk_size_max", "disk for one VM", share.disk, 0),
        ("user_disk", "disk in all", share.disk, used.disk),
        ("snapshots_max", "snapshots of one VM", share.snapshots, 0),
        ("user_snapshots", "snapshots in all", share.snapshots, used.snapshots),
        ("user_nics", "network cards in all", share.nics, used.nics),
    ):
        yield _number(vm, effective, rule, what, asked, in_use)


def _number(vm: str, effective: Effective, rule: str, what: str, asked: int, used: int = 0) -> Verdict:
    key, limit = LIMIT_KEYS[rule], getattr(effective.limits, rule)
    ok = not asked or used + asked <= limit
    asks, uses, most, free = (shown(key, number) for number in (asked, used, limit, max(0, limit - used)))
    return Verdict(rule, effective.section(rule), what, asks, uses, most, free, ok, vm)


class _Asking:
    """One question's facts; each method is a group of rules."""

    def __init__(self, vm: str, effective: Effective, definition: Definition, sizes: Mapping[str, int]) -> None:
        self.vm = vm
        self.effective = effective
        self.limits = effective.limits
        self.definition = definition
        self.sizes = sizes

    def counts(self) -> Iterator[Verdict]:
        definition = self.definition
        disks = [disk for disk in definition.disks if disk.type == "disk"]
        scratch = [self.sizes.get(disk.path, disk.size) for disk in definition.disks if disk.snapshot]
        key, memory = LIMIT_KEYS["memory_min"], shown(LIMIT_KEYS["memory_min"], definition.memory)
        least = f"from {shown(key, self.limits.memory_min)} to {shown(key, self.limits.memory_max)}"
        yield self._permission("memory_min", f"memory of {memory}", memory, least, definition.memory >= self.limits.memory_min)
        yield self._number("nics_max", "network cards for one VM", len(definition.nics))
        yield self._number("disks_max", "disks for one VM", len(disks))
        yield self._number("scratch_max", "disk to throw away", _mebibytes(sum(scratch)))
        yield self._number("option_roms_max", "option ROMs", len(definition.option_roms))

    def files(self) -> Iterator[Verdict]:
        """Kernel and initial RAM disk. Both are read into the guest's memory before it runs."""
        kernel, initrd = (self.sizes.get(ref, 0) for ref in (self.definition.kernel, self.definition.initrd))
        yield self._number("kernel_size_max", "kernel", _mebibytes(kernel))
        yield self._number("initrd_size_max", "initial RAM disk", _mebibytes(initrd))
        half = f"less than {_size(self.definition.memory * MIB // 2)}"
        enough = f"{half}, or memory.size = {_size((2 * initrd // MIB + 1) * MIB)}"
        asked, fits = _size(_mebibytes(initrd) * MIB), 2 * initrd < self.definition.memory * MIB
        yield Verdict("half of memory.size", "vm.toml", "initial RAM disk", asked, "0", half, enough, fits, self.vm)

    def names(self) -> Iterator[Verdict]:
        """Everything that is a name in one of the administrator's lists."""
        definition = self.definition
        yield self._name("machines", "machine.type", definition.family)
        yield self._name("cpu_models", "cpu.model", definition.cpu_model)
        yield self._name("firmware", "machine.firmware", definition.firmware)
        yield from self._images()
        if definition.video_shown != "none":
            yield self._name("video_models", "display.video", definition.video_shown)
        for index, nic in enumerate(definition.nics):
            yield self._name("networks", f"net{index}.network", nic.network)
            yield self._name("nic_models", f"net{index}.model", nic.model)

    def features(self) -> Iterator[Verdict]:
        """Each feature that the VM has."""
        definition = self.definition
        types = {disk.type for disk in definition.disks}
        buses = {definition.bus_of(disk) for disk in definition.disks}
        has = {
            "floppy": "floppy" in types,
            "cdrom": "cdrom" in types,
            "option_rom": bool(definition.option_roms),
            "kernel": any(ref and not ref.startswith(("image:", "library:")) for ref in (definition.kernel, definition.initrd)),
            "restore": bool(definition.restore),
            "snapshot": any(disk.snapshot for disk in definition.disks),
            "vnc": definition.display == "vnc",
            "agent": definition.agent,
            "usb-storage": "usb" in buses,
            "scsi": "scsi" in buses,
            "uefi": definition.firmware != "bios",
            "forward": any(nic.forward for nic in definition.nics),
            "geometry": any(disk.geometry for disk in definition.disks),
        }
        for feature, (what, instead) in FEATURES.items():
            if has[feature]:
                yield self._permission("deny", what, feature, instead, feature not in self.limits.deny)

    def grants(self) -> Iterator[Verdict]:
        """What nobody has without its being granted."""
        if self.definition.autostart:
            granted = self.limits.allow_autostart
            yield self._permission("allow_autostart", "autostart = true", "true", "autostart = false", granted)
        prefix, ports = self.limits.mac_prefix, port_range(self.limits.forward_ports)
        for index, nic in enumerate(self.definition.nics):
            if nic.mac:
                nearest = f"one that begins with {prefix}:, or none" if prefix else f"net{index}.mac left out"
                begins = bool(prefix) and nic.mac.startswith(f"{prefix}:")
                yield self._permission("mac_prefix", f"net{index}.mac = {nic.mac}", nic.mac, nearest, begins)
            for forward in nic.forward:
                what, nearest = f"port {forward.host} of the host", self.limits.forward_ports or "no port"
                yield self._permission("forward_ports", what, str(forward.host), nearest, forward.host in ports)
            network = self.effective.catalogues.networks.get(nic.network)
            if nic.forward and network is not None:
                what = f"net{index}.forward on network {nic.network} (kind {network.kind})"
                instead = "on a network of kind user; `publish` opens ports on the others"
                yield self._permission("networks", what, nic.network, instead, network.kind == "user")

    def fixed(self) -> Iterator[Verdict]:
        for name, value in self.limits.fixed.items():
            actual = plain(KEYS[name].kind.raw(getattr(self.definition, KEYS[name].attribute)))
            fits = _is_fixed_so(self.definition, name, value)
            yield self._permission("fixed", f"{name} = {actual}", actual, f"{name} = {plain(value)}", fits)

    # --- one verdict each ---------------------------------------------------------------------------------------------

    def _number(self, rule: str, what: str, asked: int) -> Verdict:
        return _number(self.vm, self.effective, rule, what, asked)

    def _name(self, catalogue: str, key: str, name: str) -> Verdict:
        allowed = self.effective.names(catalogue)
        known = name in self.effective.catalogues.names(catalogue)
        section = self.effective.section(catalogue) if known else "the catalogue"
        if catalogue == "networks" and name in self.effective.closed:
            section = f"the members of [networks.{name}]"
        nearest = ", ".join(allowed) or "none"
        return Verdict(catalogue, section, f"{key} = {name}", name, "", "", nearest, name in allowed, self.vm)

    def _images(self) -> Iterator[Verdict]:
        definition = self.definition
        refs = [definition.kernel, definition.initrd, *(disk.base for disk in definition.disks)]
        names = [definition.image, *(ref.removeprefix("image:") for ref in refs if ref.startswith("image:"))]
        allowed = self.limits.images
        for name in dict.fromkeys(filter(None, names)):
            fits = "*" in allowed or name in allowed
            yield self._permission("images", f"image {name}", name, ", ".join(allowed) or "no image", fits)

    def _permission(self, rule: str, what: str, asked: str, nearest: str, ok: bool) -> Verdict:
        return Verdict(rule, self.effective.section(rule), what, asked, "", "", nearest, ok, self.vm)


def _mebibytes(size: int) -> int:
    """*size* bytes in MiB, rounded up."""
    return -(-size // MIB)


def _size(size: int) -> str:
    return shown(LIMIT_KEYS["memory_max"], size // MIB)
