"""What one user may have and what the host does: every key of `policy.toml`, its built-in value, its kind and its meaning.

One row for a key: it feeds the reader, `vmshell-admin policy show`, and the tests of etc/policy.toml and vmshell-policy(5).
Used by: broker, shell, admin, tapnet, dnsmasq. Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..numbering import UID_BASE, UID_BASES
from .limitkinds import Account, Addresses, Domain, Features, Fixed, Names, Octets, Options, Pool4, Pool6, PortRange
from .values import Bool, Choice, Int, Kind, Size

GIB = 1024  # in MiB
MANY = 1_000_000
ALL = ("*",)  # of an allow-list: every name that the catalogue has

MACHINES = ("q35", "pc")
NIC_MODELS = ("virtio", "e1000e", "e1000", "rtl8139")
VIDEO_MODELS = ("std", "virtio", "cirrus")


@dataclass(frozen=True)
class Limits:
    """What one user may have. Memory and files in MiB; `user_*` are sums over VMs, for CPUs and memory over running ones."""

    vms_max: int = 10
    running_max: int = 4
    cpus_max: int = 2
    user_cpus: int = 4
    memory_min: int = 16
    memory_max: int = 2 * GIB
    user_memory: int = 4 * GIB
    disks_max: int = 8
    disk_size_max: int = 32 * GIB
    user_disk: int = 64 * GIB
    scratch_max: int = 8 * GIB
    snapshots_max: int = 5
    user_snapshots: int = 20
    nics_max: int = 2
    user_nics: int = 8
    kernel_size_max: int = 64
    initrd_size_max: int = 512
    option_roms_max: int = 2
    cpu_weight: int = 100
    allow_autostart: bool = False
    mac_prefix: str = "06"
    forward_ports: str = ""
    published_max: int = 16
    net_rate: int = 0
    changes_per_minute: int = 240
    boots_per_minute: int = 120
    consoles_per_minute: int = 240
    connections_per_minute: int = 600
    deny: tuple[str, ...] = ("usb-storage",)
    # Plain values by the keys of a definition, as TOML gives them. Not part of the hash, being a dict; never changed.
    fixed: dict[str, Any] = field(default_factory=dict, hash=False)
    machines: tuple[str, ...] = ALL
    cpu_models: tuple[str, ...] = ALL
    firmware: tuple[str, ...] = ALL
    networks: tuple[str, ...] = ALL
    images: tuple[str, ...] = ALL
    nic_models: tuple[str, ...] = ALL
    video_models: tuple[str, ...] = ALL
    wrapper_options: tuple[str, ...] | None = None  # None: all that the tables of the `kvm` verb allow


# One's own machine in session mode: the host itself is the limit.
SESSION_LIMITS = Limits(
    vms_max=1000,
    running_max=500,
    cpus_max=255,
    user_cpus=10_000,
    memory_max=1024 * GIB,
    user_memory=4096 * GIB,
    disks_max=32,
    disk_size_max=16 * 1024 * GIB,
    user_disk=64 * 1024 * GIB,
    scratch_max=1024 * GIB,
    snapshots_max=1000,
    user_snapshots=MANY,
    nics_max=16,
    user_nics=10_000,
    kernel_size_max=GIB,
    initrd_size_max=16 * GIB,
    option_roms_max=8,
    forward_ports="1024-65535",
    changes_per_minute=0,
    boots_per_minute=0,
    consoles_per_minute=0,
    connections_per_minute=0,
    deny=(),
)


@dataclass(frozen=True)
class HostPolicy:
    """`accel`: auto, kvm or tcg. `uid_base` + a VM's number is its QEMU's uid. `boots_at_once` 0 means one per core."""

    accel: str = "auto"
    uid_base: int = UID_BASE
    boots_at_once: int = 0
    log_size_max: int = 1 << 20
    group: str = "vmusers"
    connections_max: int = 32
    ipv4_pool: str = "10.77.0.0/16"
    ipv6_pool: str = ""
    segment_prefix: int = 24
    dns_domain: str = "vm"
    dns_servers: tuple[str, ...] = ()
    ssh_forwarding: bool = False


class PolicyKey:
    """One row: the kind that checks it, and what it means."""

    __slots__ = ("help", "kind", "name")

    def __init__(self, name: str, kind: Kind, help: str) -> None:
        self.name = name
        self.kind = kind
        self.help = help


def _rows(*rows: tuple[str, Kind, str]) -> dict[str, PolicyKey]:
    return {name: PolicyKey(name, kind, help) for name, kind, help in rows}


_COUNT = Int(0, MANY)
_SUM = Size(0, 1 << 30)

LIMIT_KEYS = _rows(
    ("vms_max", _COUNT, "VMs of one user"),
    ("running_max", _COUNT, "of them running"),
    ("cpus_max", Int(1, 255), "CPUs of one VM"),
    ("user_cpus", _COUNT, "CPUs of all running VMs of one user"),
    ("memory_min", Size(16, 1 << 24), "memory that one VM must have"),
    ("memory_max", Size(16, 1 << 24), "memory of one VM"),
    ("user_memory", _SUM, "memory of all running VMs of one user"),
    ("disks_max", Int(0, 32), "disks of one VM; CD and floppy drives do not count"),
    ("disk_size_max", _SUM, "disks and other objects of one VM, in the size that the guest sees"),
    ("user_disk", _SUM, "the same of all VMs of one user, and the shelf"),
    ("scratch_max", _SUM, "disks of one VM whose changes are thrown away (snapshot = true)"),
    ("snapshots_max", Int(0, 1000), "saved states of one VM"),
    ("user_snapshots", _COUNT, "saved states of all VMs of one user"),
    ("nics_max", Int(0, 16), "network cards of one VM"),
    ("user_nics", _COUNT, "network cards of all VMs of one user"),
    ("kernel_size_max", Size(0, GIB), "a kernel that is booted directly"),
    ("initrd_size_max", Size(0, 16 * GIB), "its initial RAM disk; always less than half of the VM's memory"),
    ("option_roms_max", Int(0, 8), "option ROMs of one VM"),
    ("cpu_weight", Int(1, 10_000), "share of the CPUs when they are scarce, 100 being anybody's"),
    ("allow_autostart", Bool(), "whether VMs may boot with the host"),
    ("mac_prefix", Octets(), "how a MAC address of the user's own choice must begin; empty: no such choice"),
    ("forward_ports", PortRange(), "ports of the host, LOW-HIGH, that may lead to a guest; empty: none"),
    ("published_max", Int(0, 4096), "ports that one user may publish; 0: none"),
    ("net_rate", Int(0, 100_000_000), "kbit/s of one network card, each way; 0: no limit"),
    ("changes_per_minute", _COUNT, "VMs, disks and other things that one user makes, changes and deletes; 0: no limit"),
    ("boots_per_minute", _COUNT, "boots, reboots and resets of one user; 0: no limit"),
    ("consoles_per_minute", _COUNT, "consoles and screens that one user opens; 0: no limit"),
    ("connections_per_minute", _COUNT, "connections of one user to the service, and to ports of guests; 0: no limit"),
    ("deny", Features(), "what VMs may not have at all"),
    ("fixed", Fixed(), "keys of a VM's definition that have this value and no other"),
    ("machines", Names("machine"), "machines to choose from"),
    ("cpu_models", Names("CPU model"), "CPU models to choose from"),
    ("firmware", Names("firmware"), "firmware to choose from"),
    ("networks", Names("network"), "networks to choose from"),
    ("images", Names("image"), "images to make VMs from"),
    ("nic_models", Names("network card"), "network cards to choose from"),
    ("video_models", Names("graphics card"), "graphics cards to choose from; none is always allowed"),
    ("wrapper_options", Options(), "QEMU's own options that the `kvm` verb takes; * is every one it knows"),
)

HOST_KEYS = _rows(
    ("accel", Choice("auto", "kvm", "tcg"), "auto: KVM if a probe guest really runs under it, else TCG (emulation)"),
    ("uid_base", Int(UID_BASES.start, UID_BASES.stop - 1), "QEMU of the VM with number N runs as this plus N"),
    ("boots_at_once", Int(0, 1024), "guests that boot at a time; 0: one for each core"),
    ("log_size_max", Size(4096, 1 << 30, unit=1), "a VM's console log before it is rotated; one old one is kept"),
    ("group", Account("group"), "who may use the service"),
    ("connections_max", Int(1, 65_536), "open connections of one user"),
    ("ipv4_pool", Pool4(), "the network that every segment's addresses are from"),
    ("ipv6_pool", Pool6(), "the same for IPv6, a /64 for each segment; empty: no IPv6"),
    ("segment_prefix", Int(9, 30), "how long the IPv4 prefix of one segment is"),
    ("dns_domain", Domain(), "VMs are NAME.USER.DOMAIN"),
    ("dns_servers", Addresses(), "whom to ask for other names; empty: whom the host asks"),
    ("ssh_forwarding", Bool(), "sshd forwards for users: their sockets on the host then reach their own VMs and nothing else"),
)


def shown(key: PolicyKey, value: Any) -> str:
    """*value* of *key* as a person reads it: `2G`, `true`, `q35, pc`."""
    return plain(key.kind.raw(value))


def plain(value: Any) -> str:
    """A value of TOML without its quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} = {plain(item)}" for name, item in value.items()) or "none"
    return str(value) if value != "" else "none"
