"""The demo guest: every file of it but the kernel and busybox. One tree, run from an initramfs or from a disk.

busybox is everything: init, getty, login, DHCP client, ACPI daemon. Two ways to start it:
- `demo`: the kernel unpacks the whole tree into memory; its first process is /init, a link to busybox's init.
- `demo-disk`: the initramfs holds only what finds the disk (`initrd_for_disk`); the tree is on the disk's ext4.
Runs in: vmshell-admin (makes text). The texts run in the guest.
"""

from __future__ import annotations

from . import cpio
from .cpio import Entry

# What the guest's machine has. evdev and button are the power button: without them `shutdown` would go unheard.
MODULES = ["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "button", "evdev", "qemu_fw_cfg", "ext4"]

# As `openssl passwd -6 -salt vmshelldemo demo` prints it: a password everybody knows (it stands in the greeting too).
_DEMO_SHADOW = "$6$vmshelldemo$O1mdJJCst41LBzrOfdkBzXovotaMrkFt.YXPF/79.kmIiXM5nIUr60/OHEtZeFMQUuipQYSK8C4lxnBlSNM6K."

_INITTAB = """\
::sysinit:/etc/rc.start
ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100
::once:/sbin/acpid -f -l /dev/null
::ctrlaltdel:/sbin/reboot
::shutdown:/etc/rc.stop
"""

# devtmpfs is there already when the initramfs of demo-disk has handed over.
_START = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
grep -q ' /dev devtmpfs ' /proc/mounts || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs -o mode=755 run /run
if [ -e /lib/modules/order ]; then . /lib/modules/load; fi
hostname -F /etc/hostname
syslogd -C16
ip link set lo up
if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    udhcpc -b -S -i eth0 -x "hostname:$(hostname)" -s /etc/udhcpc.script -p /run/udhcpc.pid >/dev/null 2>&1 &
fi
"""

_STOP = """\
#!/bin/sh
sync
mount -o remount,ro / 2>/dev/null
"""

_LOAD_MODULES = """\
while read -r module; do insmod "/lib/modules/$module"; done </lib/modules/order
"""

_UDHCPC = """\
#!/bin/sh
case "$1" in
bound|renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/$mask" dev "$interface"
    for gateway in $router; do ip route add default via "$gateway" dev "$interface"; break; done
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    ;;
deconfig)
    ip addr flush dev "$interface"
    ;;
esac
"""

_PROFILE = """\
export PATH=/sbin:/bin
export PS1='\\u@\\h:\\w\\$ '
"""

# Debian's usual greeting would name the distribution; this one names the way in.
_ISSUE = "\nvmshell demo image: log in as root, password demo\n\n"
_MOTD = "\nThis is a guest of your own. `poweroff` switches it off, `reboot` restarts it.\n\n"

_POWER_BUTTON = """\
#!/bin/sh
exec poweroff
"""

_INIT_FOR_DISK = """\
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
. /lib/modules/load
for try in 1 2 3 4 5 6 7 8 9 10; do
    [ -b /dev/vda1 ] && break
    sleep 0.2
done
if mount -t ext4 /dev/vda1 /root; then
    umount /proc /sys
    mount --move /dev /root/dev
    exec switch_root /root /sbin/init
fi
echo "demo-disk: /dev/vda1 cannot be mounted; this is a shell in the initramfs"
exec sh
"""


def tree(busybox: bytes, applets: list[str], hostname: str) -> list[Entry]:
    """The whole system, without modules and devices."""
    return [
        *_skeleton(busybox, applets),
        cpio.regular("etc/inittab", _INITTAB),
        cpio.regular("etc/rc.start", _START, 0o755),
        cpio.regular("etc/rc.stop", _STOP, 0o755),
        cpio.regular("etc/udhcpc.script", _UDHCPC, 0o755),
        cpio.directory("etc/acpi"),
        cpio.directory("etc/acpi/PWRF"),
        cpio.regular("etc/acpi/PWRF/00000080", _POWER_BUTTON, 0o755),
        cpio.regular("etc/hostname", f"{hostname}\n"),
        cpio.regular("etc/hosts", f"127.0.0.1 localhost {hostname}\n"),
        cpio.regular("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        cpio.regular("etc/shadow", f"root:{_DEMO_SHADOW}:20000::::::\n", 0o600),
        cpio.regular("etc/group", "root:x:0:\ntty:x:5:\n"),
        cpio.regular("etc/profile", _PROFILE),
        cpio.regular("etc/issue", _ISSUE),
        cpio.regular("etc/motd", _MOTD),
    ]


def initrd(system: list[Entry], modules: list[tuple[str, bytes]]) -> list[Entry]:
    """The initramfs that is the whole of `demo`."""
    return [*system, *_module_files(modules), *_devices(), cpio.symlink("init", "bin/busybox")]


def initrd_for_disk(busybox: bytes, applets: list[str], modules: list[tuple[str, bytes]]) -> list[Entry]:
    """The initramfs that finds the disk of `demo-disk` and hands over to it."""
    return [*_skeleton(busybox, applets), *_module_files(modules), *_devices(), cpio.regular("init", _INIT_FOR_DISK, 0o755)]


def _skeleton(busybox: bytes, applets: list[str]) -> list[Entry]:
    folders = ("bin", "dev", "etc", "lib", "lib/modules", "proc", "run", "sys", "usr", "var", "var/log", "mnt")
    return [
        *(cpio.directory(folder) for folder in folders),
        cpio.directory("root", 0o700),
        cpio.directory("tmp", 0o1777),
        cpio.symlink("sbin", "bin"),
        cpio.symlink("usr/bin", "../bin"),
        cpio.symlink("usr/sbin", "../bin"),
        cpio.regular("bin/busybox", busybox, 0o755),
        *(cpio.symlink(f"bin/{applet}", "busybox") for applet in applets if applet != "busybox"),
    ]


def _devices() -> list[Entry]:
    # The kernel opens /dev/console for /init before anything could mount a devtmpfs.
    return [cpio.character_device("dev/console", 5, 1), cpio.character_device("dev/null", 1, 3, 0o666)]


def _module_files(modules: list[tuple[str, bytes]]) -> list[Entry]:
    return [
        *(cpio.regular(f"lib/modules/{name}", data) for name, data in modules),
        cpio.regular("lib/modules/order", "".join(f"{name}\n" for name, _ in modules)),
        cpio.regular("lib/modules/load", _LOAD_MODULES),
    ]
