"""Our seccomp filter (rule R9), the second beside QEMU's own `-sandbox`: what QEMU never needs and a taken-over QEMU would want.

Classic BPF for x86-64, loaded by bubblewrap's `--add-seccomp-fd` just before QEMU starts. Everything listed answers EPERM;
the rest is QEMU's own filter's to judge. Its filter, with everything denied, still lets all of these through.
Used by: launcher, broker, probe. Touches nothing.
"""

from __future__ import annotations

import errno

from ..bpf import ALLOW, ANY_BIT, ARCH, AT_LEAST, AUDIT_ARCH_X86_64, EQUAL, ERRNO, KILL, LOAD, NR, RETURN, argument, assemble

X32_BIT = 0x40000000  # the x32 calls have numbers of their own: refused as a whole

# x86-64 numbers; the groups say why a call is here.
# fmt: off
DENIED = {
    # other processes' memory, registers and descriptors
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "process_madvise": 440, "pidfd_getfd": 438, "kcmp": 312,
    # large kernel interfaces with a history of holes
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "add_key": 248, "request_key": 249, "keyctl": 250, "memfd_secret": 447,
    # files by handle, past every mount namespace
    "name_to_handle_at": 303, "open_by_handle_at": 304,
    # namespaces and mounts
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "mount_setattr": 442,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    # the machine itself
    "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313, "delete_module": 176, "swapon": 167,
    "swapoff": 168, "reboot": 169, "acct": 163, "quotactl": 179, "quotactl_fd": 443, "sethostname": 170, "setdomainname": 171,
    "iopl": 172, "ioperm": 173, "syslog": 103, "settimeofday": 164, "clock_settime": 227, "adjtimex": 159,
    "clock_adjtime": 305,
    # memory placement (to be allowed again where NUMA binding is wanted)
    "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "migrate_pages": 256, "move_pages": 279,
}
# fmt: on
IOCTL = 16
CLONE = 56
CLONE3 = 435

# What the holder of a tap descriptor could do to the host's interface without any privilege (threats E26, E28), and
# what types into another terminal.
DENIED_IOCTLS = {
    "TUNSETPERSIST": 0x400454CB,
    "TUNSETOWNER": 0x400454CC,
    "TUNSETGROUP": 0x400454CE,
    "TUNSETCARRIER": 0x400454E2,
    "SIOCSIFHWADDR": 0x8924,
    "TIOCSTI": 0x5412,
    "TIOCLINUX": 0x541C,
}

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: a thread needs none of them.
NAMESPACE_FLAGS = 0x7E020000


def program() -> bytes:
    """The filter as an array of `struct sock_filter`, ready for `--add-seccomp-fd`."""
    return assemble(
        [
            (LOAD, ARCH, "next", "next"),
            (EQUAL, AUDIT_ARCH_X86_64, "next", "kill"),
            (LOAD, NR, "next", "next"),
            (AT_LEAST, X32_BIT, "deny", "next"),
            *((EQUAL, number, "deny", "next") for number in sorted(DENIED.values())),
            # clone3 hides its flags behind a pointer; ENOSYS makes the C library use clone.
            (EQUAL, CLONE3, "enosys", "next"),
            (EQUAL, CLONE, "clone", "next"),
            (EQUAL, IOCTL, "next", "allow"),
            # The kernel looks at 32 bits of the request, so do we.
            (LOAD, argument(1), "next", "next"),
            *((EQUAL, request, "deny", "next") for request in sorted(DENIED_IOCTLS.values())),
            (RETURN, ALLOW, "next", "next"),
            (LOAD, argument(0), "next", "next"),
            (ANY_BIT, NAMESPACE_FLAGS, "deny", "allow"),
            (RETURN, ALLOW, "next", "next"),
            (RETURN, ERRNO | errno.EPERM, "next", "next"),
            (RETURN, ERRNO | errno.ENOSYS, "next", "next"),
            (RETURN, KILL, "next", "next"),
        ],
        {"clone": -6, "allow": -4, "deny": -3, "enosys": -2, "kill": -1},
    )
