"""What becomes of QEMU's options: each with its class, the reason in a few words, and what there is instead.

Three sources have a class: the page of 2007 that drew the line first (56 forms, `page`), QEMU 7.2 and what later versions added
(`today`), and for some options the form that is given (`FORMS`). `translate.py` reads it; a test holds it against the page's list
and against the `-help` of the QEMU that is installed.

allowed: a person's to say.  denied: it would reach the host, or other people.  unused: always the same here, or without a point.
Runs in: the shell. Pure data.
"""

from __future__ import annotations

ALLOWED, DENIED, UNUSED = "allowed", "denied", "unused"
SHOWN = {ALLOWED: "allowed", DENIED: "denied", UNUSED: "not used"}


class Option:
    """One row. *argument* is empty where QEMU takes none; *page* and *today* are empty where that source has no such option."""

    __slots__ = ("argument", "instead", "name", "page", "reason", "today")

    def __init__(self, name: str, argument: str, page: str, today: str, reason: str, instead: str) -> None:
        self.name = name
        self.argument = argument
        self.page = page
        self.today = today
        self.reason = reason
        self.instead = instead

    @property
    def verdict(self) -> str:
        """The class of an option of which no form is accepted: the page's word where it has one."""
        return self.page or self.today


A, D, U = ALLOWED, DENIED, UNUSED
LEAVE_OUT = "leave it out"
NO_WINDOW = "there is no window on a server"
NO_SOUND = "it opens the host's sound devices, or writes a file"
ANY_FILE = "it reads a file of the host"
NET_KEYS = "-nic user, or the keys net0.network and net0.forward"
FORWARD = "-nic user,hostfwd=tcp::HOSTPORT-:GUESTPORT"
CONSOLE = "the serial port is the console: `console NAME`"
MONITOR = "it is full control of QEMU and of the files it can open"
VERBS = "the verbs (boot, shutdown, pause, snapshot, …) do what is safe of it"
DRIVE = "-drive file=NAME,if=virtio,format=raw|qcow2"
SCREEN = "-vnc :1, and then `display NAME`"
DEVICES_REASON = "most of the 256 devices are code for a guest to attack, some are the host's own"
MACHINE_REASON = "the machine's other properties reach the host"
NAMED = "it opens, overwrites or deletes what it names"
PUT = "bring files in with `put`, on a disk or an ISO image"
FIRMWARE = "the key machine.firmware: bios or uefi"
RELAY = "the VM runs on without the caller, and its output is in `log NAME`"
NO_TCG = "which accelerator runs VMs is the administrator's to say"
XEN = "it belongs to Xen"
OTHER_TARGET = "it belongs to other processors"
DEBUG = "it is for the debugging of QEMU itself"
GDB = "it lets anybody who reaches it read and write the guest's memory"
SET_UP = "VMs are started with it, or with what is stronger"

_ROWS: tuple[tuple[str, str, str, str, str, str], ...] = (
    # machine, processors, memory
    ("-M", "machine", U, D, MACHINE_REASON, "-M pc or -M q35 alone; the key machine.type"),
    ("-machine", "machine", "", A, MACHINE_REASON, "-machine pc|q35[,acpi=off]; the key machine.type"),
    ("-cpu", "model", "", A, "flags open nested virtualization and the host's tuning", "-cpu NAME alone; the key cpu.model"),
    ("-smp", "n", U, A, "sockets, cores and threads are laid out by the broker", "-smp N; the key cpu.count"),
    ("-m", "megs", D, A, "memory for hotplug would stand outside every limit", "-m SIZE; the key memory.size"),
    ("-accel", "accelerator", "", U, NO_TCG, LEAVE_OUT),
    ("-enable-kvm", "", "", U, "KVM is used wherever the host has it", LEAVE_OUT),
    ("-no-kvm", "", D, "", "without KVM QEMU is no boundary between guest and host", LEAVE_OUT),
    ("-numa", "…", "", D, "it places the guest's memory on the host", "nothing; VMs of this size have one node"),
    ("-mem-path", "file", "", D, "it makes a file of the host the guest's memory", "-m SIZE"),
    ("-mem-prealloc", "", "", D, "it takes memory from the host that nobody uses yet", LEAVE_OUT),
    ("-overcommit", "…", "", D, "it pins the host's memory, or keeps its processors busy", LEAVE_OUT),
    ("-no-acpi", "", A, A, "", "the key machine.acpi"),
    ("-no-hpet", "", "", U, "no VM has a HPET", LEAVE_OUT),
    ("-no-reboot", "", A, A, "", "the key machine.on_reboot"),
    ("-no-shutdown", "", "", U, "it would keep the memory of a VM that has ended", LEAVE_OUT),
    ("-action", "event=what", "", A, "what stays after the end is not the guest's to say", "-action reboot=reset|shutdown"),
    ("-watchdog-action", "action", "", U, "VMs have no watchdog", LEAVE_OUT),
    ("-rtc", "base=…", "", A, "its other properties are set by the broker", "-rtc base=utc|localtime, machine.clock"),
    ("-localtime", "", A, "", "", "the key machine.clock"),
    ("-no-rtc", "", D, "", "it is about one device of the host, and about 2007", LEAVE_OUT),
    ("-icount", "…", "", D, "it counts instructions without KVM, and writes files", "nothing"),
    ("-singlestep", "", "", U, DEBUG, LEAVE_OUT),
    ("-win2k-hack", "", D, D, "it slows down every disk, for one installer of the year 2000", "nothing"),
    ("-global", "driver.property=value", "", D, "it sets any property of any device", "the VM's keys; `help keys` lists them"),
    ("-set", "group.id.arg=value", "", D, "it changes what was already checked", "say it in the option itself"),
    ("-readconfig", "file", "", D, "a file could say any other option", "the options themselves, or a vm.toml"),
    ("-writeconfig", "file", "", D, "it writes a file of the host", "--save NAME keeps the definition"),
    ("-name", "name", "", A, "the other names are the process's", "--name NAME"),
    ("-uuid", "uuid", "", U, "each VM has one of its own and keeps it", LEAVE_OUT),
    ("-smbios", "…", "", D, "it copies files of the host into the guest, or forges an identity", "nothing"),
    ("-acpitable", "…", "", D, "it copies files of the host into the guest", "nothing"),
    ("-fw_cfg", "…", "", D, "it copies files of the host into the guest", PUT),
    ("-tpmdev", "…", "", D, "it hands over the host's TPM, or needs another program beside QEMU", "nothing yet"),
    # disks
    ("-fda", "file", A, A, "", "the keys floppy0.…"),
    ("-fdb", "file", A, A, "", "the keys floppy1.…"),
    ("-hda", "file", A, A, "", "the keys disk0.…"),
    ("-hdb", "file", A, A, "", "the keys disk1.…"),
    ("-hdc", "file", U, A, "", "the keys disk2.…"),
    ("-hdd", "file", U, A, "", "the keys disk3.…"),
    ("-cdrom", "file", A, A, "", "the keys cdrom0.…"),
    ("-snapshot", "", A, A, "", "the key disk0.snapshot"),
    ("-hdachs", "c,h,s[,t]", A, "", "", "the key disk0.geometry"),
    ("-drive", "file=…", "", D, "it guesses formats, opens other protocols and leaves the quota", DRIVE),
    ("-blockdev", "…", "", U, "disks are opened by the broker, by number", DRIVE),
    ("-mtdblock", "file", "", D, "no PC has such a disk", "-hda FILE"),
    ("-sd", "file", "", D, "no VM has a card reader", "-hda FILE"),
    ("-pflash", "file", "", D, "it is firmware from a file of the host", FIRMWARE),
    ("-no-fd-bootchk", "", U, U, "a guest can boot any floppy that has a boot signature", LEAVE_OUT),
    ("-add-fd", "…", "", U, "open files are passed by the broker", LEAVE_OUT),
    ("-fsdev", "…", "", D, "it shows a folder of the host to the guest", PUT),
    ("-virtfs", "…", "", D, "it shows a folder of the host to the guest", PUT),
    ("-iscsi", "…", "", D, "storage on the network is the administrator's", "-hda FILE"),
    ("-object", "…", "", U, "most objects are files and devices of the host", LEAVE_OUT),
    # what is booted
    ("-boot", "[a|c|d|n]", A, A, "a splash would be a file of the host", "-boot order=,menu=,strict=; the key boot.order"),
    ("-kernel", "bzImage", A, A, "", "the key boot.kernel"),
    ("-append", "cmdline", A, A, "", "the key boot.cmdline"),
    ("-initrd", "file", A, A, "", "the key boot.initrd"),
    ("-option-rom", "rom", A, A, "", "the key boot.option_rom"),
    ("-loadvm", "tag", A, A, "", "the key boot.restore; `rollback NAME`"),
    ("-dtb", "file", "", D, "no PC has a device tree", "nothing"),
    ("-shim", "file", "", D, ANY_FILE, "-kernel FILE alone"),
    ("-bios", "file", "", D, "it is firmware from a file of the host", FIRMWARE),
    ("-L", "path", D, D, "firmware and keymaps would come from any folder", FIRMWARE),
    ("-incoming", "…", "", D, "a running machine would come from the network, or from a program", "-loadvm TAG"),
    ("-S", "", U, U, "every VM starts so, is checked, and then goes on", "`pause NAME` stops it once it runs"),
    ("-only-migratable", "", "", U, "VMs have no other devices", LEAVE_OUT),
    # network
    ("-net", "…", D, D, "network access is the administrator's to give", NET_KEYS),
    ("-nic", "…", "", D, "network access is the administrator's to give", NET_KEYS),
    ("-netdev", "…", "", U, "network access is the administrator's to give", NET_KEYS),
    ("-tftp", "prefix", D, "", "it serves a folder of the host", PUT),
    ("-bootp", "file", "", D, "it serves a file of the host", PUT),
    ("-smb", "dir", D, "", "it starts a file server on the host", PUT),
    ("-redir", "tcp:host-port::guest-port", D, "", "it takes ports of the host on every address", FORWARD),
    # screen, keyboard, sound, USB
    ("-display", "type", "", A, "other screens need a session on the host", SCREEN),
    ("-vnc", "display", A, A, "QEMU itself listens nowhere", SCREEN),
    ("-spice", "…", "", D, "it listens on the network and reads certificates of the host", SCREEN),
    ("-nographic", "", D, D, "it puts QEMU's monitor on the terminal", "no screen is the default; " + CONSOLE),
    ("-curses", "", "", U, "it would need QEMU on your terminal", CONSOLE),
    ("-sdl", "", "", U, NO_WINDOW, "-vnc :1"),
    ("-vga", "card", "", A, "other cards are more for a guest to attack", "-vga std|cirrus|virtio|none; the key display.video"),
    ("-std-vga", "", U, "", "", "-vga std; the key display.video"),
    ("-full-screen", "", U, U, NO_WINDOW, LEAVE_OUT),
    ("-no-quit", "", U, "", NO_WINDOW, LEAVE_OUT),
    ("-portrait", "", "", U, "no PC has such a screen", LEAVE_OUT),
    ("-rotate", "deg", "", U, "no PC has such a screen", LEAVE_OUT),
    ("-k", "language", U, A, "", "the key display.keymap"),
    ("-usb", "", D, U, "a controller is there when a tablet or a disk needs one", "-usbdevice tablet"),
    ("-usbdevice", "name", D, D, "it hands over devices and files of the host", "-usbdevice tablet"),
    ("-device", "driver", "", U, DEVICES_REASON, "the disks, cards and the tablet by name"),
    ("-soundhw", "card", U, "", NO_SOUND, LEAVE_OUT),
    ("-audio", "…", "", D, NO_SOUND, LEAVE_OUT),
    ("-audiodev", "…", "", D, NO_SOUND, LEAVE_OUT),
    ("-audio-help", "", U, U, "it prints the host's sound settings", LEAVE_OUT),
    # lines to the outside
    ("-serial", "dev", D, A, NAMED, CONSOLE),
    ("-parallel", "dev", D, D, NAMED, LEAVE_OUT),
    ("-debugcon", "dev", "", D, NAMED, CONSOLE),
    ("-chardev", "…", "", U, NAMED, LEAVE_OUT),
    ("-vmchannel", "di:DI,dev", D, "", NAMED, "the key agent gives the guest agent its port"),
    ("-balloon", "dev", D, "", "who gets the host's memory is the administrator's to say", "every VM has one"),
    ("-echr", "chr", "", U, "the console has a key of its own", "`console NAME --escape ^A`"),
    ("-monitor", "dev", D, D, MONITOR, VERBS),
    ("-qmp", "dev", "", D, MONITOR, VERBS),
    ("-qmp-pretty", "dev", "", D, MONITOR, VERBS),
    ("-mon", "…", "", U, MONITOR, VERBS),
    ("-preconfig", "", "", D, MONITOR, LEAVE_OUT),
    ("-gdb", "dev", "", D, GDB, "nothing yet"),
    ("-s", "", D, D, GDB, "nothing yet"),
    ("-p", "port", D, "", GDB, "nothing yet"),
    # the process
    ("-d", "item", D, D, "it fills the host's disk and tells about the host", RELAY),
    ("-D", "logfile", "", D, "it overwrites a file of the host", RELAY),
    ("-dfilter", "range", "", D, "it belongs to -d", RELAY),
    ("-trace", "…", "", D, "it overwrites a file of the host", RELAY),
    ("-msg", "…", "", U, "how QEMU's messages look is the broker's to say", RELAY),
    ("-pidfile", "file", D, D, "it overwrites a file of the host and deletes it later", "`info NAME` knows the VM"),
    ("-daemonize", "", U, U, "every VM runs on without the caller", "the key autostart boots it with the host"),
    ("-dump-vmstate", "file", "", D, "it overwrites a file of the host", "nothing"),
    ("-perfmap", "", "", D, "it writes a file of the host", "nothing"),
    ("-jitdump", "", "", D, "it writes a file of the host", "nothing"),
    ("-seed", "number", "", D, "it makes the guest's random numbers predictable", LEAVE_OUT),
    ("-plugin", "file", "", D, "it runs a program of the caller's in QEMU", "nothing"),
    ("-enable-sync-profile", "", "", D, DEBUG, LEAVE_OUT),
    ("-qtest", "dev", "", D, "it is full control of the machine's devices and memory", "nothing"),
    ("-qtest-log", "file", "", D, "it overwrites a file of the host", "nothing"),
    ("-compat", "…", "", U, DEBUG, LEAVE_OUT),
    ("-sandbox", "on", "", U, SET_UP, LEAVE_OUT),
    ("-chroot", "dir", "", U, SET_UP, LEAVE_OUT),
    ("-runas", "user", "", U, SET_UP, LEAVE_OUT),
    ("-run-with", "…", "", U, SET_UP, LEAVE_OUT),
    ("-nodefaults", "", "", U, SET_UP, LEAVE_OUT),
    ("-no-user-config", "", "", U, SET_UP, LEAVE_OUT),
    ("-nodefconfig", "", "", U, SET_UP, LEAVE_OUT),
    ("-async-teardown", "", "", U, "a helper would outlive the VM", LEAVE_OUT),
    ("-xen-domid", "id", "", D, XEN, LEAVE_OUT),
    ("-xen-attach", "", "", D, XEN, LEAVE_OUT),
    ("-xen-domid-restrict", "", "", D, XEN, LEAVE_OUT),
    ("-g", "WxH", "", U, OTHER_TARGET, LEAVE_OUT),
    ("-prom-env", "variable=value", "", U, OTHER_TARGET, LEAVE_OUT),
    ("-semihosting", "", "", U, OTHER_TARGET, LEAVE_OUT),
    ("-semihosting-config", "…", "", U, OTHER_TARGET, LEAVE_OUT),
    ("-old-param", "", "", U, OTHER_TARGET, LEAVE_OUT),
    ("-h", "", "", U, "it prints QEMU's own help", "`help kvm`"),
    ("-help", "", "", U, "it prints QEMU's own help", "`help kvm`"),
    ("-version", "", "", U, "it prints QEMU's version", "`version`"),
)

OPTIONS: dict[str, Option] = {row[0]: Option(*row) for row in _ROWS}

# A bare word is a disk image to QEMU, and so it would be -hda under another name.
POSITIONAL = Option("disk image", "", "", D, "a word without an option before it", "-hda FILE")

# Forms of an option whose class is not that of the option: (option, form) -> class, reason, instead.
FORMS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("-display", "sdl"): (U, NO_WINDOW, SCREEN),
    ("-display", "gtk"): (U, NO_WINDOW, SCREEN),
    ("-display", "curses"): (U, "it would need QEMU on your terminal", CONSOLE),
    ("-display", "spice-app"): (D, "it starts a program on the host", SCREEN),
    ("-display", "egl-headless"): (D, "it uses the host's graphics card", "-display none"),
    ("-display", "dbus"): (D, "it joins the host's message bus", SCREEN),
    ("-serial", "stdio"): (U, "it puts the console on the terminal, which a verb of its own does", CONSOLE),
    ("-serial", "mon:stdio"): (U, "it puts the console on the terminal, which a verb of its own does", CONSOLE),
    ("-accel", "tcg"): (D, "without KVM QEMU is no boundary between guest and host", LEAVE_OUT),
    ("-action", "shutdown"): (U, "a VM that has ended is gone", LEAVE_OUT),
    ("-action", "panic"): (U, "a VM that panics is ended", LEAVE_OUT),
    ("-action", "watchdog"): (U, "VMs have no watchdog", LEAVE_OUT),
    # backends of -netdev, -nic and -net
    ("-netdev", "tap"): (U, "taps are made and passed by the broker", "-nic user, and the key net0.network"),
    ("-netdev", "bridge"): (D, "it runs a program with root's rights", "-nic user, and the key net0.network"),
    ("-netdev", "l2tpv3"): (D, "it sends raw frames in the host's name", NET_KEYS),
    ("-netdev", "socket"): (D, "it takes ports of the host, or connects in its name", NET_KEYS),
    ("-netdev", "stream"): (D, "it takes ports of the host, or connects in its name", NET_KEYS),
    ("-netdev", "dgram"): (D, "it takes ports of the host, or connects in its name", NET_KEYS),
    ("-netdev", "vde"): (D, "it joins a switch by the path of its socket", NET_KEYS),
    ("-netdev", "vhost-user"): (D, "it shares the guest's memory with another program", NET_KEYS),
    ("-netdev", "vhost-vdpa"): (D, "it hands over a device of the host", NET_KEYS),
    ("-netdev", "hubport"): (D, "it joins networks that are kept apart", NET_KEYS),
    ("-netdev", "passt"): (D, "it starts a program on the host", NET_KEYS),
    # devices that every VM has, or gets where another needs them
    ("-device", "virtio-balloon"): (U, "every VM has one", LEAVE_OUT),
    ("-device", "virtio-rng"): (U, "every VM has one", LEAVE_OUT),
    ("-device", "isa-serial"): (U, "every VM has one", CONSOLE),
    ("-device", "virtio-serial"): (U, "it is there with the guest agent's port", "the key agent"),
    ("-device", "virtserialport"): (U, "it is there with the guest agent's port", "the key agent"),
    ("-device", "virtio-scsi"): (U, "it is there when a disk needs it", LEAVE_OUT),
    ("-device", "isa-fdc"): (U, "it is there when a floppy needs it", LEAVE_OUT),
    ("-device", "ahci"): (U, "a q35 machine has one", "-M q35"),
    ("-device", "qemu-xhci"): (U, "it is there when the tablet or a disk needs it", LEAVE_OUT),
    ("-device", "nec-usb-xhci"): (U, "a controller is there when the tablet or a disk needs it", LEAVE_OUT),
    ("-device", "usb-ehci"): (U, "a controller is there when the tablet or a disk needs it", LEAVE_OUT),
    ("-device", "piix3-usb-uhci"): (U, "a controller is there when the tablet or a disk needs it", LEAVE_OUT),
    ("-device", "usb-kbd"): (U, "every VM with a screen has a keyboard", LEAVE_OUT),
    ("-device", "usb-mouse"): (U, "the tablet is the pointer", "-device usb-tablet"),
    ("-device", "vfio-pci"): (D, "it hands over a device of the host", "nothing"),
    ("-device", "usb-host"): (D, "it hands over a device of the host", "nothing"),
    ("-device", "virtio-input-host"): (D, "it reads the host's keyboard", "nothing"),
    ("-device", "loader"): (D, "it copies a file of the host into the guest's memory", "-kernel FILE"),
    ("-device", "virtio-9p"): (D, "it shows a folder of the host to the guest", PUT),
    ("-device", "ivshmem-plain"): (D, "it shares memory with other programs of the host", "nothing"),
    ("-device", "ivshmem-doorbell"): (D, "it shares memory with other programs of the host", "nothing"),
}

HOW_IT_IS_READ = "how the host reads and writes disks is the broker's to say"
BY_POLICY = "the rate of disks is the policy's to say"
NETWORK_ITSELF = "addresses and names of a network are the administrator's to say"
TAPS = "taps are made and passed by the broker"

# Parts of an argument that people often give, refused like all that is not read: (option, part) -> reason, instead.
# The parts of -nic and -net are those of -netdev.
PARTS: dict[tuple[str, str], tuple[str, str]] = {
    **{("-drive", name): (HOW_IT_IS_READ, LEAVE_OUT) for name in ("cache", "aio", "discard", "detect-zeroes", "copy-on-read")},
    **{("-drive", name): (HOW_IT_IS_READ, LEAVE_OUT) for name in ("werror", "rerror", "auto-read-only", "locking")},
    **{("-drive", name): (BY_POLICY, LEAVE_OUT) for name in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr", "group")},
    ("-drive", "bus"): ("a place on a bus is given by index=", "index=N"),
    ("-drive", "unit"): ("a place on a bus is given by index=", "index=N"),
    ("-device", "id"): ("nothing refers to it", LEAVE_OUT),
    ("-device", "bus"): ("the broker finds each device its place", LEAVE_OUT),
    ("-device", "addr"): ("the broker finds each device its place", LEAVE_OUT),
    ("-device", "romfile"): (ANY_FILE, LEAVE_OUT),
    ("-netdev", "smb"): ("it starts a file server on the host", PUT),
    ("-netdev", "tftp"): ("it serves a folder of the host", PUT),
    ("-netdev", "bootfile"): ("it serves a file of the host", "-kernel FILE"),
    ("-netdev", "guestfwd"): ("it runs a program of the host for the guest", "nothing"),
    ("-netdev", "vlan"): ("VMs have no hubs; each card is on one network", LEAVE_OUT),
    **{("-netdev", name): (NETWORK_ITSELF, LEAVE_OUT) for name in ("net", "host", "dns", "dhcpstart", "restrict", "hostname")},
    **{("-netdev", name): (NETWORK_ITSELF, LEAVE_OUT) for name in ("ipv4", "ipv6", "dnssearch", "domainname")},
    **{("-netdev", name): (TAPS, LEAVE_OUT) for name in ("fd", "ifname", "script", "downscript", "helper", "br", "vhost")},
    ("-machine", "accel"): (NO_TCG, LEAVE_OUT),
    ("-boot", "splash"): ("it copies a file of the host into the guest", LEAVE_OUT),
    ("-boot", "splash-time"): ("it belongs to splash", LEAVE_OUT),
    ("-boot", "once"): ("an order holds for every boot", "order=, and later the key boot.order"),
    ("-boot", "reboot-timeout"): ("the firmware tries once", LEAVE_OUT),
    ("-name", "process"): ("it gives QEMU's process another name", "--name NAME"),
    ("-name", "debug-threads"): (SET_UP, LEAVE_OUT),
}
