"""The line around QEMU: each program drops what it must, then becomes the next one (rules R6, R8, R9, R11).

    systemd-run --scope   memory, task and CPU limits by cgroup, where systemd runs          (plan.scope)
    choom                 the kernel takes a VM before it takes the broker                    (plan.oom_score_adj)
    setpriv               the VM's own uid and gid, no capabilities, never any again
    prlimit               no core files, no locked memory, a cap on every file
    bwrap                 every namespace of its own; our seccomp filter; then QEMU, which adds its own filter

Standard input and output are the guest's serial port, so none of them may read the one or write to the other: what they have to
say goes to standard error.
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

from .argv import QEMU, TCG_BUFFER, VIDEO, qemu_argv
from .plan import LaunchPlan

SYSTEMD_RUN = "/usr/bin/systemd-run"
CHOOM = "/usr/bin/choom"
SETPRIV = "/usr/bin/setpriv"
PRLIMIT = "/usr/bin/prlimit"
BWRAP = "/usr/bin/bwrap"

# What QEMU reads: its libraries, its firmware with the keymaps, and the boot ROMs of interfaces. Nothing else of the host exists.
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
LOADER = "/usr/lib64"
FIRMWARE = ("/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu")

VNC_MEMORY = 96  # MiB: a copy of the screen, and what a few slow viewers have not yet taken
LAYER_MEMORY = 8  # MiB: the tables that QEMU keeps of a qcow2 file, enough for 64 GiB


def command(plan: LaunchPlan, *, qemu: str = QEMU, bwrap: str = BWRAP, brief: bool = False) -> list[str]:
    """The whole argument list. *qemu* and *bwrap* are the programs on the host; inside, QEMU always stands at its usual place.

    *brief* is for the probe's guests: they end with the process that started them, and after ten seconds of CPU time. A VM must
    not: it outlives its broker, and bwrap's --die-with-parent follows the *thread* that started it (R10).
    """
    return [
        *_scope(plan),
        *([CHOOM, "-n", str(plan.oom_score_adj), "--"] if plan.oom_score_adj is not None else []),
        *_setpriv(plan),
        *_prlimit(plan, brief),
        *_bwrap(plan, qemu, bwrap, brief),
        *qemu_argv(plan),
    ]


def memory_ceiling(plan: LaunchPlan) -> int:
    """MiB that the VM's cgroup may hold: the guest's memory, QEMU itself, and what grows with CPUs and page tables (F02)."""
    screen = (VIDEO[plan.video][1] if plan.video != "none" else 0) + (VNC_MEMORY if plan.display == "vnc" else 0)
    tables = LAYER_MEMORY * sum(format == "qcow2" for disk in plan.disks for _, format in disk.layers)
    translator = TCG_BUFFER if plan.accel == "tcg" else 0
    return plan.memory + 128 + 8 * plan.cpus + plan.memory // 64 + translator + screen + tables


def _scope(plan: LaunchPlan) -> list[str]:
    if plan.scope is None:
        return []
    return [
        *(SYSTEMD_RUN, "--scope", "--quiet", "--collect", f"--unit={plan.scope}", f"--slice={plan.slice}"),
        # Threads: one for each CPU, up to 64 that do disk I/O, and QEMU's few own.
        *("-p", f"MemoryMax={memory_ceiling(plan)}M", "-p", f"TasksMax={plan.cpus + 96}"),
        *("-p", f"CPUWeight={plan.cpu_weight}"),
        "--",
    ]


def _setpriv(plan: LaunchPlan) -> list[str]:
    words = [SETPRIV]
    if plan.uid is not None:
        # /dev/kvm is opened by QEMU itself, by group; nobody else's group comes along, and root's never.
        groups = f"--groups={plan.kvm_gid}" if plan.accel == "kvm" and plan.kvm_gid else "--clear-groups"
        # The bounding set needs CAP_SETPCAP, so only root can empty it; without root no_new_privs makes it moot.
        words += [f"--reuid={plan.uid}", f"--regid={plan.gid}", groups, "--bounding-set=-all"]
    return [*words, "--no-new-privs", "--inh-caps=-all", "--"]


def _prlimit(plan: LaunchPlan, brief: bool) -> list[str]:
    # KVM takes descriptors for each CPU and each virtqueue, of which a disk has one for each CPU; a layer takes three.
    files = 256 + 10 * len(plan.disks) + (8 + 2 * len(plan.disks)) * plan.cpus
    words = [PRLIMIT, "--core=0", f"--nofile={files}", f"--fsize={plan.file_size_max}", "--memlock=0"]
    return [*words, *(["--cpu=10"] if brief else []), "--"]


def _bwrap(plan: LaunchPlan, qemu: str, bwrap: str, brief: bool) -> list[str]:
    return [
        bwrap,
        *("--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--as-pid-1", "--cap-drop", "ALL"),
        *(("--die-with-parent",) if brief else ()),
        *("--clearenv", "--hostname", "vm"),
        *("--add-seccomp-fd", str(plan.seccomp_fd)),
        *(("--info-fd", str(plan.info_fd)) if plan.info_fd is not None else ()),
        *(("--block-fd", str(plan.block_fd)) if plan.block_fd is not None else ()),
        *("--ro-bind", qemu, QEMU, "--ro-bind", LIBRARIES, LIBRARIES, "--ro-bind", LOADER, LOADER),
        *(word for path in FIRMWARE for word in ("--ro-bind-try", path, path)),
        *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        # Without the host's zone local time would be UTC in there.
        *(("--ro-bind-try", "/etc/localtime", "/etc/localtime") if plan.clock == "localtime" else ()),
        # No --dev: a tty and a ptmx are doors QEMU does not need. Without /dev/null it finds no OFD locks and locks no disk.
        *("--proc", "/proc", "--dev-bind", "/dev/null", "/dev/null"),
        *(("--dev-bind", "/dev/kvm", "/dev/kvm") if plan.accel == "kvm" else ()),
        *("--chdir", "/", "--remount-ro", "/"),
        "--",
    ]
