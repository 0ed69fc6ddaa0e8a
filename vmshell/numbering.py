"""What follows from a number: a VM's uid, taps and MAC addresses, a segment's bridge, a job's uid.

Runs in: every process. Stdlib only, no I/O.
"""

from __future__ import annotations

# A VM's number has six hex digits in tap names, three octets in MACs; from 0xb00000 on taps would be called like bridges.
NUMBER_MAX = 0xAFFFFF
UID_BASE = 2_100_000_000  # QEMU of VM number N runs as this plus N, unless the policy says another; jobs behind all of them
JOBS_MAX = 64
# Below are people, services and `nobody`; above what bubblewrap can write into a user namespace's map, an int of C's.
UID_BASES = range(65_537, (1 << 31) - NUMBER_MAX - JOBS_MAX)


def uids_of_jobs(base: int) -> range:
    """The uids of helpers that are nobody's VM: behind those of all VMs."""
    return range(base + NUMBER_MAX + 1, base + NUMBER_MAX + 1 + JOBS_MAX)


def tap_name(number: int, nic: int) -> str:
    """The tap of NIC *nic* (0..15) of VM *number*: `vt` + six hex digits + `n` + one, 10 of the 15 characters allowed."""
    return f"vt{number:06x}n{nic:x}"


def bridge_name(segment: int) -> str:
    """The bridge of a segment of ours: `vtb` + six hex digits."""
    return f"vtb{segment:06x}"


def mac_address(number: int, nic: int, host: int = 0) -> str:
    """The MAC of NIC *nic* of VM *number* on host *host* (0..255): locally administered, unique by arithmetic."""
    return f"06:{nic:02x}:{host:02x}:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"
