"""QEMU's own arguments, from a plan (rules R4, R5, R7). The same words work with QEMU 7.2 (Debian 12) and 10 (Debian 13).

What is left out on purpose: every option that was removed after 7.2, `-nographic` and `mux` (they bring a monitor to the
guest's user), `-drive` (it probes formats), `-daemonize`, `-runas`, `-chroot`, and any option that names a host file.
Used by: broker, probe, admin. Touches nothing.
"""

from __future__ import annotations

import json

from .plan import DiskPlan, LaunchPlan, NicPlan

QEMU = "/usr/bin/qemu-system-x86_64"  # inside the jail; what stands there is bound by `jail.py`

# TCG keeps translated code in a buffer that grows to 1 GiB by default. Fixed, so that a VM's memory has a known ceiling.
TCG_BUFFER = 256  # MiB

CPU = {
    # No virtualisation inside the guest: nested KVM is a large piece of the host kernel to offer to strangers.
    "kvm": "host,vmx=off,svm=off",
    # x86-64-v2, which current distributions are built for; `max` boots Linux a quarter slower under TCG (la57, wide vectors).
    "tcg": "qemu64,svm=off,ssse3=on,sse4.1=on,sse4.2=on,popcnt=on,rdrand=on",
}


def qemu_argv(plan: LaunchPlan) -> list[str]:
    """QEMU and all its arguments, as they stand inside the jail."""
    return [
        QEMU,
        # No debug-threads and no user text: `-name x,process=sshd` renames the process (threat B02).
        *("-name", f"guest=vm-{plan.number},debug-threads=off"),
        *("-no-user-config", "-nodefaults"),
        *("-display", "none", "-vga", "none", "-serial", "none", "-parallel", "none", "-monitor", "none"),
        *_machine(plan),
        *("-rtc", "base=utc", "-msg", "timestamp=on"),
        *("-action", "reboot=reset,shutdown=poweroff,panic=shutdown"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *_sockets(plan),
        *("-object", "rng-builtin,id=rng0", "-device", "virtio-rng-pci,rng=rng0,max-bytes=1024,period=1000"),
        *_disks(plan.disks),
        *_nics(plan.nics),
        *_boot(plan),
        *(["-S"] if plan.paused else []),
    ]


def _machine(plan: LaunchPlan) -> list[str]:
    accel = f"tcg,tb-size={TCG_BUFFER}" if plan.accel == "tcg" else "kvm"
    return [
        *("-machine", f"{plan.machine},usb=off,vmport=off,smbus=off,sata=off,dump-guest-core=off"),
        *("-accel", accel),
        *("-cpu", CPU[plan.accel]),
        *("-smp", f"cpus={plan.cpus},maxcpus={plan.cpus},sockets=1,cores={plan.cpus},threads=1"),
        *("-m", f"size={plan.memory}M"),
    ]


def _sockets(plan: LaunchPlan) -> list[str]:
    # Listening sockets: a client may go and come back while the VM runs, which a socket pair would not allow.
    return [
        *("-chardev", f"socket,id=ser0,fd={plan.console_fd},server=on,wait=off", "-device", "isa-serial,chardev=ser0"),
        *("-chardev", f"socket,id=qmp0,fd={plan.qmp_fd},server=on,wait=off", "-mon", "chardev=qmp0,mode=control,pretty=off"),
    ]


def _disks(disks: tuple[DiskPlan, ...]) -> list[str]:
    words: list[str] = []
    fdset = 0
    for index, disk in enumerate(disks):
        node = f"disk{index}"
        # `backing` always stands there: without it QEMU opens the name written in the image (threat B10).
        backing: dict[str, object] = {"backing": None} if disk.format == "qcow2" else {}
        if disk.base_fd is not None and disk.base_format is not None:
            fdset += 1
            inner: dict[str, object] = {"backing": None} if disk.base_format == "qcow2" else {}
            words += _nodes(f"{node}-base", fdset, disk.base_fd, disk.base_format, readonly=True, extra=inner)
            backing = {"backing": f"{node}-base"}
        fdset += 1
        words += _nodes(node, fdset, disk.fd, disk.format, readonly=disk.readonly, extra=backing)
        # A full host file system pauses the guest (it can go on later); a read error is the guest's to handle.
        words += ["-device", f"virtio-blk-pci,drive={node},id=vd{index},bootindex={index + 1},werror=stop,rerror=report"]
    return words


def _nodes(node: str, fdset: int, fd: int, driver: str, *, readonly: bool, extra: dict[str, object]) -> list[str]:
    """The descriptor as a set, the file on it, and the format on that, declared and never probed (threat B09)."""
    file: dict[str, object] = {"driver": "file", "node-name": f"{node}-file", "filename": f"/dev/fdset/{fdset}"}
    top: dict[str, object] = {"driver": driver, "node-name": node, "file": f"{node}-file"}
    # The node's mode must be the descriptor's: QEMU refuses a writable node on a read-only descriptor, as it should.
    mode: dict[str, object] = {"read-only": True, "auto-read-only": False} if readonly else {"discard": "unmap"}
    top_mode: dict[str, object] = {"read-only": True} if readonly else {"discard": "unmap"}
    return [
        *("-add-fd", f"fd={fd},set={fdset}"),
        *("-blockdev", json.dumps({**file, **mode}, separators=(",", ":"))),
        *("-blockdev", json.dumps({**top, **extra, **top_mode}, separators=(",", ":"))),
    ]


def _nics(nics: tuple[NicPlan, ...]) -> list[str]:
    words: list[str] = []
    for index, nic in enumerate(nics):
        # The jail's network namespace is empty and `restrict` refuses what is left: DHCP answers, nothing is reachable.
        words += ["-netdev", f"user,id=n{index},restrict=on,ipv6=off"]
        words += ["-device", f"virtio-net-pci,netdev=n{index},id=nic{index},mac={nic.mac},romfile="]
    return words


def _boot(plan: LaunchPlan) -> list[str]:
    if plan.kernel_fd is None:
        return ["-boot", "strict=on"]
    # Kernel and initrd do not understand /dev/fdset; /proc/self/fd is a fresh open and needs the file to be readable by all.
    words = ["-kernel", f"/proc/self/fd/{plan.kernel_fd}"]
    if plan.initrd_fd is not None:
        words += ["-initrd", f"/proc/self/fd/{plan.initrd_fd}"]
    # Always given, so that the text never stands where an option could.
    return [*words, "-append", plan.cmdline]
