"""The launch line as a pure function: whole lines against golden files, and what must hold for every plan.

The golden files are one word a line. After a wanted change run this file once with VMSHELL_GOLDEN=write and read the diff.
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmshell.launch import jail, seccomp
from vmshell.launch.argv import qemu_argv
from vmshell.launch.plan import DiskPlan, LaunchPlan, NicPlan

GOLDEN = Path(__file__).parent.parent / "golden"


def plan(**changes: Any) -> LaunchPlan:
    values: dict[str, Any] = {
        "number": 42,
        "accel": "tcg",
        "cpus": 1,
        "memory": 256,
        "console_fd": 7,
        "qmp_fd": 8,
        "info_fd": 11,
        "seccomp_fd": 12,
        "uid": 61234,
        "gid": 61234,
        "file_size_max": 2147483648,
    }
    return LaunchPlan(**{**values, **changes})


PLANS = {
    "kernel": plan(kernel_fd=5, initrd_fd=6, cmdline="console=ttyS0 quiet", nics=(NicPlan(mac="06:00:00:00:00:2a"),)),
    "disk": plan(disks=(DiskPlan(fd=4, format="qcow2", base_fd=3, base_format="raw"),)),
    "disks": plan(
        disks=(
            DiskPlan(fd=3, format="qcow2", base_fd=4, base_format="qcow2"),
            DiskPlan(fd=5, format="raw"),
            DiskPlan(fd=6, format="raw", readonly=True),
            DiskPlan(fd=9, format="qcow2"),
        ),
        machine="pc",
    ),
    "nothing": plan(paused=False),
    "kvm": plan(accel="kvm", kvm_gid=106, cpus=4, memory=4096, kernel_fd=5),
    "unprivileged": plan(uid=None, gid=None, kernel_fd=5, initrd_fd=6, cmdline="console=ttyS0"),
    "unprivileged-kvm": plan(uid=None, gid=None, accel="kvm", kernel_fd=5),
    "scoped": plan(scope="vmshell-vm-42.scope", slice="vmshell.slice", oom_score_adj=500, cpus=2, memory=1024, cpu_weight=50),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_whole_line(name: str) -> None:
    """What stands in the golden file is what runs: a change of the line is a change that somebody read."""
    line = "\n".join(jail.command(PLANS[name])) + "\n"
    golden = GOLDEN / f"launch-{name}.txt"
    if os.environ.get("VMSHELL_GOLDEN") == "write":
        golden.write_text(line, encoding="utf-8")
    assert line == golden.read_text(encoding="utf-8")


# --- B01, B02, B03, B04, B41: nothing that a person chose is in the line --------------------------------------------------

fds = st.integers(3, 65536)
macs = st.integers(0, 0xFFFFFF).map(lambda n: f"06:00:00:{n >> 16:02x}:{n >> 8 & 255:02x}:{n & 255:02x}")
cmdlines = st.text(st.characters(exclude_categories=("C", "Z")), max_size=200) | st.sampled_from(
    ["-snapshot", "--", "a,b=c", "json:{}", "-monitor stdio", "x -S", "$(id)"]
)


@st.composite
def plans(draw: st.DrawFn) -> LaunchPlan:
    """Any plan that the constructor takes."""
    numbers = iter(draw(st.lists(fds, min_size=12, max_size=12, unique=True)))
    disks = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(("raw", "qcow2", "overlay")))
        if kind == "overlay":
            base = draw(st.sampled_from(("raw", "qcow2")))
            disks.append(DiskPlan(fd=next(numbers), format="qcow2", base_fd=next(numbers), base_format=base))
        else:
            disks.append(DiskPlan(fd=next(numbers), format=kind, readonly=draw(st.booleans())))
    kernel = draw(st.booleans())
    root = draw(st.booleans())
    return plan(
        number=draw(st.integers(0, 0xFFFFFF)),
        machine=draw(st.sampled_from(("q35", "pc"))),
        accel=draw(st.sampled_from(("kvm", "tcg"))),
        cpus=draw(st.integers(1, 255)),
        memory=draw(st.integers(1, 1 << 24)),
        console_fd=next(numbers),
        qmp_fd=next(numbers),
        info_fd=next(numbers),
        seccomp_fd=next(numbers),
        kernel_fd=next(numbers) if kernel else None,
        initrd_fd=next(numbers) if kernel else None,
        cmdline=draw(cmdlines) if kernel else "",
        disks=tuple(disks),
        nics=tuple(NicPlan(mac=mac) for mac in draw(st.lists(macs, max_size=2))),
        uid=61000 if root else None,
        gid=61000 if root else None,
        kvm_gid=draw(st.none() | st.integers(1, 70000)),
        oom_score_adj=draw(st.none() | st.integers(-1000, 1000)),
        paused=draw(st.booleans()),
    )


def shape(word: str) -> str:
    """*word* with every MAC and every number taken out."""
    return re.sub(r"\d+", "N", re.sub(r"mac=[0-9a-f:]{17}", "mac=M", word))


def without_cmdline(words: list[str]) -> list[str]:
    if "-append" not in words:
        return words
    place = words.index("-append")
    return words[: place + 1] + words[place + 2 :]


# Every word that may stand in a line, numbers taken out: from the golden plans, whose lines are read by people, and two more.
MORE = (plan(oom_score_adj=-900), plan(disks=(DiskPlan(fd=3, format="qcow2", readonly=True),)))
VOCABULARY = {shape(word) for known in (*PLANS.values(), *MORE) for word in without_cmdline(jail.command(known))}


@given(plans())
def test_b01_b02_a_line_is_made_of_numbers_and_fixed_words(any_plan: LaunchPlan) -> None:
    """B01, B02, B41: but for the guest's own command line every word is one of a closed set, its numbers apart."""
    for word in without_cmdline(jail.command(any_plan)):
        assert shape(word) in VOCABULARY, word


@given(plans())
def test_b03_the_command_line_of_the_guest_is_one_word_behind_append(any_plan: LaunchPlan) -> None:
    """B03: whatever it holds, it is the value of -append, as it was given, and changes no other word."""
    words = qemu_argv(any_plan)
    if any_plan.kernel_fd is None:
        assert "-append" not in words
        return
    place = words.index("-append") + 1
    assert words[place] == any_plan.cmdline
    any_plan.cmdline = "something else"
    assert qemu_argv(any_plan) == [*words[:place], "something else", *words[place + 1 :]]


@given(plans())
def test_b09_b10_formats_and_backing_files_are_always_declared(any_plan: LaunchPlan) -> None:
    """B09, B10: every node has a driver, every qcow2 node says what is behind it, and files come by descriptor only."""
    words = qemu_argv(any_plan)
    nodes = [json.loads(words[i + 1]) for i, word in enumerate(words) if word == "-blockdev"]
    names = {node["node-name"] for node in nodes}
    for node in nodes:
        assert node["driver"] in ("file", "raw", "qcow2")
        if node["driver"] == "file":
            assert re.fullmatch(r"/dev/fdset/\d+", node["filename"])
        if node["driver"] == "qcow2":
            assert node["backing"] is None or node["backing"] in names
    given_fds = [int(m[1]) for word in words if (m := re.match(r"fd=(\d+),set=", word))]
    assert sorted(given_fds) == sorted(fd for disk in any_plan.disks for fd in (disk.fd, disk.base_fd) if fd is not None)
    assert "-drive" not in words


@given(plans())
def test_b15_b16_b32_no_monitor_and_no_default_devices(any_plan: LaunchPlan) -> None:
    """B15, B16, B30, B31, B32: no display, no multiplexed console, nothing that listens but our two sockets."""
    words = qemu_argv(any_plan)
    for option in ("-nodefaults", "-no-user-config"):
        assert option in words
    for option in ("-display", "-vga", "-serial", "-parallel", "-monitor"):
        assert words[words.index(option) + 1] == "none"
    assert not {"-nographic", "-vnc", "-spice", "-gdb", "-s", "-daemonize", "-runas", "-chroot", "-incoming", "-loadvm"} & set(
        without_cmdline(words)
    )
    assert not [word for word in without_cmdline(words) if "mux=on" in word]
    assert sum(word.startswith("socket,") for word in words) == 2


# What was removed or renamed between QEMU 7.2 and 11 must not come back into the line.
@given(plans())
def test_no_option_that_later_qemus_lack(any_plan: LaunchPlan) -> None:
    gone = {"-no-acpi", "-no-hpet", "-singlestep", "-async-teardown", "-chroot", "-runas", "-portrait", "-rotate", "-audio-help"}
    assert not gone & set(without_cmdline(qemu_argv(any_plan)))


# --- the jail -------------------------------------------------------------------------------------------------------------


@given(plans())
def test_b39_every_layer_is_in_every_line(any_plan: LaunchPlan) -> None:
    """B39: there is no plan without sandbox, filters, namespaces and no_new_privs."""
    words = jail.command(any_plan)
    for word in ("--no-new-privs", "--unshare-all", "--unshare-user", "--disable-userns", "--clearenv", "--add-seccomp-fd"):
        assert word in words
    assert words[words.index("--cap-drop") + 1] == "ALL"
    assert words[words.index("-sandbox") + 1] == "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    assert ("--bounding-set=-all" in words) == (any_plan.uid is not None)
    assert "--die-with-parent" not in words
    assert all(word.startswith("/") for word in words if word.endswith(("setpriv", "prlimit", "bwrap", "choom", "systemd-run")))


def test_b45_groups() -> None:
    """B45, R8: the kvm group comes along only with KVM, and root's group never."""
    assert "--groups=106" in jail.command(plan(accel="kvm", kvm_gid=106))
    assert "--clear-groups" in jail.command(plan(accel="tcg", kvm_gid=106))
    assert "--clear-groups" in jail.command(plan(accel="kvm", kvm_gid=0))
    assert "/dev/kvm" not in jail.command(plan(accel="tcg", kvm_gid=106))


def test_f01_f04_the_scope_has_limits() -> None:
    """F01, F02, F04: memory, tasks and weight are the plan's, and stand before the program."""
    words = jail.command(PLANS["scoped"])
    assert words[0] == "/usr/bin/systemd-run"
    scope = words[: words.index("--")]
    assert f"MemoryMax={1024 + 128 + 16 + 16 + 256}M" in scope
    assert "TasksMax=98" in scope
    assert "CPUWeight=50" in scope
    assert words[words.index("--") + 1 :][:4] == ["/usr/bin/choom", "-n", "500", "--"]


def test_r10_only_the_probes_guests_die_with_their_parent() -> None:
    usual = jail.command(plan())
    brief = jail.command(plan(), brief=True)
    assert [word for word in brief if word not in usual] == ["--cpu=10", "--die-with-parent"]
    assert [word for word in brief if word not in ("--cpu=10", "--die-with-parent")] == usual


# --- what a plan refuses --------------------------------------------------------------------------------------------------

BAD: list[dict[str, Any]] = [
    {"number": -1},
    {"number": 1 << 24},
    {"number": True},
    {"number": "42,process=sshd"},
    {"machine": "microvm"},
    {"machine": "q35,accel=kvm"},
    {"accel": "kvm:tcg"},
    {"cpus": 0},
    {"cpus": 256},
    {"cpus": "1"},
    {"memory": 0},
    {"memory": 1.5},
    {"console_fd": 2},
    {"console_fd": 8},
    {"qmp_fd": None},
    {"uid": 0, "gid": 0},
    {"uid": 61234, "gid": 0},
    {"uid": 61234, "gid": None},
    {"initrd_fd": 5},
    {"cmdline": "console=ttyS0"},
    {"kernel_fd": 5, "cmdline": "a\nb"},
    {"kernel_fd": 5, "cmdline": "a\0b"},
    {"kernel_fd": 5, "cmdline": "\x1b[2J"},
    {"kernel_fd": 5, "cmdline": "\udcff"},
    {"kernel_fd": 5, "cmdline": "é" * 1024},
    {"scope": "x"},
    {"scope": "-x.scope"},
    {"scope": "a b.scope"},
    {"scope": "../x.scope"},
    {"slice": "x.scope"},
    {"oom_score_adj": 1001},
    {"file_size_max": -1},
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_plan_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        plan(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"fd": 3, "format": "vmdk"},
        {"fd": 3, "format": "raw", "base_fd": 4, "base_format": "raw"},
        {"fd": 3, "format": "qcow2", "base_fd": 4},
        {"fd": 3, "format": "qcow2", "base_fd": 4, "base_format": "vdi"},
        {"fd": 0, "format": "raw"},
        {"fd": "3,set=9", "format": "raw"},
    ],
    ids=str,
)
def test_a_disk_refuses(bad: dict[str, Any]) -> None:
    """B13, B14: two formats, by descriptor."""
    with pytest.raises(ValueError, match=r"."):
        DiskPlan(**bad)


@pytest.mark.parametrize(
    "mac", ["", "06:00:00:00:00", "06:00:00:00:00:2A", "07:00:00:00:00:01", "06:00:00:00:00:2a,x=y", "06:0:00:00:00:2aa"]
)
def test_a_nic_refuses(mac: str) -> None:
    """E33: a MAC is made by us from the VM's number."""
    with pytest.raises(ValueError, match=r"."):
        NicPlan(mac=mac)


# --- the filter, run by an interpreter of its own instructions ------------------------------------------------------------

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def judge(number: int, arguments: tuple[int, ...] = (), arch: int = 0xC000003E) -> int:
    """What the kernel would answer: classic BPF over a struct seccomp_data, as documented in seccomp(2)."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    code = list(struct.iter_unpack("=HBBI", seccomp.program()))
    at = accumulator = 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("=I", data, value)
            case 0x15:
                at += if_true if accumulator == value else if_false
            case 0x35:
                at += if_true if accumulator >= value else if_false
            case 0x45:
                at += if_true if accumulator & value else if_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"an instruction nobody wrote: {operation:#x}")


def test_b39_the_filter_call_by_call() -> None:
    """B39, R9: exactly the listed calls are refused, of all numbers there are."""
    refused = {number for number in range(1024) if judge(number) == EPERM}
    assert refused == set(seccomp.DENIED.values())
    assert len(seccomp.DENIED) == len(refused)
    assert judge(435) == ENOSYS
    assert {judge(number) for number in range(1024) if number != 435} == {ALLOW, EPERM}


@pytest.mark.parametrize("request_", seccomp.DENIED_IOCTLS.values(), ids=hex)
def test_e28_ioctls_are_refused_whatever_stands_above_their_32_bits(request_: int) -> None:
    """E28: the kernel ignores the upper half of a request, so it must not help."""
    assert judge(16, (5, request_)) == EPERM
    assert judge(16, (5, request_ | 0xDEAD << 32)) == EPERM
    assert judge(16, (request_, 0x5401)) == ALLOW


def test_namespaces_by_clone_are_refused_and_threads_are_not() -> None:
    """B39: a thread's flags as the C library sets them, and each namespace flag."""
    assert judge(56, (0x003D0F00,)) == ALLOW
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert judge(56, (0x003D0F00 | flag,)) == EPERM


def test_other_architectures_and_x32() -> None:
    """R9: i386 calls (int 0x80) kill, x32 numbers are refused: both have other numbers for the same calls."""
    assert judge(101, arch=0x40000003) == KILL
    assert judge(0x40000000) == judge(0x40000000 | 101) == judge(0xFFFFFFFF) == EPERM
