"""QEMU's own arguments, from a plan (rules R4, R5, R7). The same words work with QEMU 7.2 (Debian 12) and 10 (Debian 13).

What is left out on purpose: every option that was removed after 7.2, `-nographic` and `mux` (they bring a monitor to the
guest's user), `-drive` (it probes formats), `-daemonize`, `-runas`, `-chroot`, and any option that names a host file.

What others call things by, over QMP: the format node of disk i is `disk<i>` and the file under it `disk<i>-file`; its device is
`dev<i>`, of the k-th CD-ROM drive `cd<k>`; `nic<k>` on `n<k>`; `balloon0`; the character devices `ser0`, `agent0` and `qmp0`.
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count

from .devices import DiskPlan, NicPlan
from .plan import LaunchPlan

QEMU = "/usr/bin/qemu-system-x86_64"  # inside the jail; what stands there is bound by `jail.py`

# TCG keeps translated code in a buffer that grows to 1 GiB by default. Fixed, so that a VM's memory has a known ceiling.
TCG_BUFFER = 256  # MiB

CPU = {
    # No virtualisation inside the guest: nested KVM is a large piece of the host kernel to offer to strangers.
    "kvm": "host,vmx=off,svm=off",
    # x86-64-v2, which current distributions are built for; `max` boots Linux a quarter slower under TCG (la57, wide vectors).
    "tcg": "qemu64,svm=off,ssse3=on,sse4.1=on,sse4.2=on,popcnt=on,rdrand=on",
}

# Each with a fixed size: the MiB beside it are in the VM's ceiling (`jail.memory_ceiling`).
VIDEO = {
    "std": ("VGA,id=video0,vgamem_mb=16", 16),
    "virtio": ("virtio-vga,id=video0,max_hostmem=67108864", 72),
    "cirrus": ("cirrus-vga,id=video0,vgamem_mb=4", 4),
}

# A full host file system pauses the guest (it can go on later); a read error is the guest's to handle.
_ERRORS = ",werror=stop,rerror=report"
_DISK = {
    "virtio": f"virtio-blk-pci{_ERRORS}",
    "sata": f"ide-hd{_ERRORS}",
    "ide": f"ide-hd{_ERRORS}",
    "scsi": f"scsi-hd{_ERRORS}",
    "usb": f"usb-storage{_ERRORS}",
    "fdc": "floppy",
}
_CDROM = {"sata": "ide-cd", "ide": "ide-cd", "scsi": "scsi-cd"}
# Where the k-th drive of a bus is.
_PLACE = {
    "virtio": "",
    "sata": ",bus=ide.{k}",
    "ide": ",bus=ide.{channel},unit={unit}",
    "scsi": ",bus=scsi0.0,scsi-id={k}",
    "usb": ",bus=usb0.0",
    "fdc": ",bus={fdc},unit={k}",
}
_IDE_CDROMS = (2, 3, 1, 0)  # which of the four on ide a CD-ROM is: the second channel's master first. Disks have what is left
_FDC_BUS = {"q35": "fdc0.0", "pc": "floppy-bus.0"}

_NIC = {"virtio": "virtio-net-pci", "e1000e": "e1000e", "e1000": "e1000", "rtl8139": "rtl8139"}


def qemu_argv(plan: LaunchPlan) -> list[str]:
    """QEMU and all its arguments, as they stand inside the jail."""
    return [
        QEMU,
        # No debug-threads and no user text: `-name x,process=sshd` renames the process (threat B02).
        *("-name", f"guest=vm-{plan.number},debug-threads=off"),
        *("-no-user-config", "-nodefaults"),
        # With `-vnc none` nobody listens; viewers come as descriptors, over QMP.
        *(("-vnc", "none") if plan.display == "vnc" else ("-display", "none")),
        *("-vga", "none", "-serial", "none", "-parallel", "none", "-monitor", "none"),
        *(("-k", plan.keymap) if plan.keymap else ()),
        *_machine(plan),
        # Ticks that the host could not give are given later, so that the clocks of old guests do not lag.
        *("-rtc", f"base={plan.clock},clock=host,driftfix=slew", "-msg", "timestamp=on"),
        *("-action", f"reboot={'shutdown' if plan.reboot_stops else 'reset'},shutdown=poweroff,panic=shutdown"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        *_monitor(plan),
        *_serial(plan),
        # PCI slots follow the order here: interfaces come before what may come and go, because guests name them by slot.
        *("-object", "rng-builtin,id=rng0", "-device", "virtio-rng-pci,id=rngdev0,rng=rng0,max-bytes=1024,period=1000"),
        *_nics(plan.nics),
        *_extras(plan),
        *_disks(plan),
        *_spare_ports(plan),
        *_boot(plan),
        *(["-S"] if plan.paused else []),
    ]


def _machine(plan: LaunchPlan) -> list[str]:
    sata = "on" if any(disk.bus == "sata" for disk in plan.disks) else "off"
    flash = ",pflash0=fwcode,pflash1=fwvars" if plan.firmware else ""
    acpi = "on" if plan.acpi else "off"
    accel = f"tcg,tb-size={TCG_BUFFER}" if plan.accel == "tcg" else "kvm"
    return [
        *("-machine", f"{plan.machine},acpi={acpi},usb=off,vmport=off,smbus=off,sata={sata},dump-guest-core=off{flash}"),
        *("-accel", accel),
        *("-cpu", plan.cpu_model or CPU[plan.accel]),
        *("-smp", f"cpus={plan.cpus},maxcpus={plan.cpus},sockets=1,cores={plan.cpus},threads=1"),
        *("-m", f"size={plan.memory}M"),
    ]


def _monitor(plan: LaunchPlan) -> list[str]:
    if plan.qmp_fd is None:
        return []
    return [*_socket("qmp0", plan.qmp_fd), "-mon", "chardev=qmp0,mode=control,pretty=off"]


def _serial(plan: LaunchPlan) -> list[str]:
    # Not a socket: a serial port writes byte by byte, and a socket would hold 278 such packets where a pipe holds 64 KiB.
    chardev = ["-chardev", "stdio,id=ser0,signal=off"]
    # Without a serial port it stays, silent: whoever watches the VM need not know the difference.
    return [*chardev, *(["-device", "isa-serial,id=serial0,chardev=ser0"] if plan.serial else [])]


def _socket(name: str, fd: int) -> list[str]:
    # Listening sockets: a client may go and come back while the VM runs, which a socket pair would not allow.
    return ["-chardev", f"socket,id={name},fd={fd},server=on,wait=off"]


def _nics(nics: tuple[NicPlan, ...]) -> list[str]:
    words: list[str] = []
    for index, nic in enumerate(nics):
        words += ["-netdev", _cable(nic, index)] if nic.connected else []
        cable = f"netdev=n{index}," if nic.connected else ""
        # No boot ROM where nobody boots from it.
        boot = "romfile=" if nic.bootindex is None else f"bootindex={nic.bootindex}"
        words += ["-device", f"{_NIC[nic.model]},{cable}id=nic{index},mac={nic.mac},{boot}"]
    return words


def _spare_ports(plan: LaunchPlan) -> list[str]:
    """Where cards may be put while the machine runs: q35 takes them in ports only, `pc` anywhere. By the number of the card."""
    numbers = range(len(plan.nics), len(plan.nics) + plan.spare_nics) if plan.family == "q35" else ()
    return [word for number in numbers for word in ("-device", f"pcie-root-port,id=port{number},chassis={number + 1}")]


def _cable(nic: NicPlan, index: int) -> str:
    if nic.tap_fd is not None:
        return f"tap,id=n{index},fd={nic.tap_fd},vhost=off"
    if nic.stream_fd is not None:
        return f"stream,id=n{index},server=off,addr.type=fd,addr.str={nic.stream_fd}"
    forwards = "".join(f",hostfwd={word}:127.0.0.1:{port}-:{to}" for word, port, to in nic.forwards)
    # The jail's network namespace is empty and `restrict` refuses what is left: DHCP answers, nothing is reachable.
    return f"user,id=n{index},restrict=on,ipv6=off{forwards}"


def _extras(plan: LaunchPlan) -> list[str]:
    """The devices that a plan may have one of."""
    words: list[str] = []
    if plan.balloon:
        words += ["-device", "virtio-balloon-pci,id=balloon0"]
    if plan.agent_fd is not None:
        words += [*_socket("agent0", plan.agent_fd), "-device", "virtio-serial-pci,id=vser0,max_ports=2"]
        words += ["-device", "virtserialport,id=agentport0,bus=vser0.0,nr=1,chardev=agent0,name=org.qemu.guest_agent.0"]
    if plan.video != "none":
        words += ["-device", VIDEO[plan.video][0]]
    if plan.usb:
        # One port more than can be asked for: into the last one QEMU would put a hub.
        words += ["-device", "qemu-xhci,id=usb0,p2=10,p3=10"]
    if plan.tablet:
        words += ["-device", "usb-tablet,id=tablet0,bus=usb0.0"]
    return words


def _disks(plan: LaunchPlan) -> list[str]:
    words: list[str] = []
    if any(disk.bus == "scsi" for disk in plan.disks):
        words += ["-device", "virtio-scsi-pci,id=scsi0"]
    words += _floppy_controller(plan)
    cdroms = 0
    for index, (disk, place) in enumerate(zip(plan.disks, _places(plan), strict=True)):
        node = f"disk{index}"
        words += _layers(node, disk)
        device = f"{_DISK[disk.bus]},id=dev{index}{place}"
        if disk.kind == "cdrom":
            device = f"{_CDROM[disk.bus]},id=cd{cdroms}{place}"
            cdroms += 1
        if disk.layers:
            device += f",drive={node}"
        if disk.bootindex is not None and disk.kind != "floppy":
            device += f",bootindex={disk.bootindex}"
        if disk.geometry is not None:
            device += ",cyls={},heads={},secs={},bios-chs-trans={}".format(*disk.geometry)
        words += ["-device", device]
    return words


def _floppy_controller(plan: LaunchPlan) -> list[str]:
    """None where no floppy is (CVE-2015-3456), but machine pc always has its own. It, not the drive, knows the boot order."""
    floppies = [disk for disk in plan.disks if disk.kind == "floppy"]
    order = [f"bootindex{letter}={disk.bootindex}" for letter, disk in zip("AB", floppies, strict=False) if disk.bootindex]
    if plan.family == "pc":
        return [word for option in order for word in ("-global", f"isa-fdc.{option}")]
    return ["-device", ",".join(["isa-fdc,id=fdc0", *order])] if floppies else []


def _places(plan: LaunchPlan) -> Iterator[str]:
    """Where each drive is plugged in: in the order of the plan, but for CD-ROMs on ide."""
    numbers = {bus: count() for bus in _PLACE}
    cdroms = sum(disk.kind == "cdrom" and disk.bus == "ide" for disk in plan.disks)
    ide = {"cdrom": iter(_IDE_CDROMS), "disk": iter(sorted(_IDE_CDROMS[cdroms:]))}
    for disk in plan.disks:
        k = next(ide[disk.kind] if disk.bus == "ide" else numbers[disk.bus])
        yield _PLACE[disk.bus].format(k=k, channel=k // 2, unit=k % 2, fdc=_FDC_BUS[plan.family])


def _layers(node: str, disk: DiskPlan) -> list[str]:
    """The nodes of a drive, the lowest first: *node*, over `<node>-base1`, over `<node>-base2`."""
    words: list[str] = []
    below: str | None = None
    for depth, (fd, format) in reversed(list(enumerate(disk.layers))):
        name = f"{node}-base{depth}" if depth else node
        # `backing` always stands there: without it QEMU opens the name written in the image (threat B10).
        extra: dict[str, object] = {"backing": below} if format == "qcow2" else {}
        words += _nodes(name, fd, format, readonly=disk.readonly or depth > 0, extra=extra)
        below = name
    return words


def _nodes(node: str, fd: int, driver: str, *, readonly: bool, extra: dict[str, object] | None = None) -> list[str]:
    """The descriptor as a set, the file on it, and the format on that, declared and never probed (threat B09)."""
    file: dict[str, object] = {"driver": "file", "node-name": f"{node}-file", "filename": f"/dev/fdset/{fd}"}
    top: dict[str, object] = {"driver": driver, "node-name": node, "file": f"{node}-file"}
    # The node's mode must be the descriptor's: QEMU refuses a writable node on a read-only descriptor, as it should.
    mode: dict[str, object] = {"read-only": True, "auto-read-only": False} if readonly else {"discard": "unmap"}
    top_mode: dict[str, object] = {"read-only": True} if readonly else {"discard": "unmap"}
    return [
        *("-add-fd", f"fd={fd},set={fd}"),
        *("-blockdev", json.dumps({**file, **mode}, separators=(",", ":"))),
        *("-blockdev", json.dumps({**top, **(extra or {}), **top_mode}, separators=(",", ":"))),
    ]


def _boot(plan: LaunchPlan) -> list[str]:
    words = ["-boot", f"strict=on,menu={'on' if plan.boot_menu else 'off'}"]
    if plan.firmware is not None:
        code_fd, vars_fd = plan.firmware
        words += [*_nodes("fwcode", code_fd, "raw", readonly=True), *_nodes("fwvars", vars_fd, "raw", readonly=False)]
    if plan.loadvm is not None:
        words += ["-loadvm", f"s{plan.loadvm}"]
    # ROM, kernel and initrd do not understand /dev/fdset; /proc/self/fd is a fresh open and needs the file to be readable by all.
    for fd in plan.option_rom_fds:
        words += ["-option-rom", f"/proc/self/fd/{fd}"]
    if plan.kernel_fd is not None:
        words += ["-kernel", f"/proc/self/fd/{plan.kernel_fd}"]
        words += ["-initrd", f"/proc/self/fd/{plan.initrd_fd}"] if plan.initrd_fd is not None else []
        # Always given, so that the text never stands where an option could.
        words += ["-append", plan.cmdline]
    return words
