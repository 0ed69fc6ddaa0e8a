"""A broker that lies to the launcher: every field and every descriptor of every request, from the broker's own uid.

Whatever is wrong is refused by its field, to the broker and in the journal; nothing was started for it, the process stays and so
does its number of descriptors. Rows A29, B01, B09, C16, E31, R2: no word of the broker's reaches a root process but
as a choice out of a closed list.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.process.launchers import (
    BROKER,
    SOMEBODY,
    TUN,
    Launcher,
    Lent,
    begun,
    full_plan,
    small_plan,
    status,
    tap,
    uploads,
)
from tests.process.relays import until
from vmshell import wire
from vmshell.launch.plan import LAUNCHERS_OWN, OUTPUT, PIPE, LaunchPlan
from vmshell.numbering import JOBS_MAX, NUMBER_MAX, tap_name

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be a launcher")]

VM = 5


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    folder = Path(tempfile.mkdtemp(prefix="vms-", dir="/var/tmp"))
    folder.chmod(0o755)
    with Launcher(folder) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def unharmed(launcher: Launcher) -> Iterator[None]:
    """After each group of attacks: the same process, with as many descriptors, nothing started, nobody under a wrong uid."""
    launcher.signal(1)
    before, errors = launcher.descriptors(), launcher.journal().count("Error:")
    yield
    assert launcher.process.poll() is None, launcher.journal()[-2000:]
    assert launcher.ask({"verb": "signal", "number": 1, "signal": "kill"})[0]["ok"] == {}  # it still answers
    until(lambda: not launcher.running(), "all of its uids to end")
    until(lambda: not launcher.children(), "its children to end")
    until(lambda: launcher.descriptors() <= before, f"its descriptors to be {before} again")
    assert launcher.journal().count("Error:") == errors, launcher.journal()[-2000:]  # no exception that nobody thought of


@pytest.fixture
def lent(launcher: Launcher) -> Iterator[Lent]:
    with Lent(launcher.folder) as made:
        yield made


# --- descriptors ------------------------------------------------------------------------------------------------------

# What a descriptor may be for; all others are refused.
GOOD = {
    "read": {
        "ours r",
        "ours r 0644",
        "root's r 0644",
        "root's r 0666",
        "somebody's r 0644",
        "somebody's r 0666",
        "proc r",
        "sys r",
    },
    "written": {"ours rw", "ours rw append", "ours rw 0000"},
    "listener": {"listener"},
    "stream": {"stream", "stream ours", "stream whose peer is gone"},
    "pipe": {"fifo rw"},
    f"tap {tap_name(VM, 0)}": {"tap"},
}


def descriptors_of_all_kinds(lent: Lent) -> dict[str, int]:
    """A table of what a descriptor can be, by name."""
    keep, folder = lent.keep, lent.folder
    r, w, rw = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
    made = {
        "ours r": lent.file(r),
        "ours r 0644": lent.file(r, mode=0o644),
        "ours w": lent.file(w),
        "ours rw": lent.file(rw),
        "ours rw append": lent.file(rw | os.O_APPEND),
        "ours rw 0000": lent.file(rw, mode=0),
        "ours w append": lent.file(w | os.O_APPEND),
        "ours path": lent.file(os.O_PATH),
        "proc r": keep(os.open("/proc/version", r)),
        "proc rw": keep(os.open("/proc/self/mem", rw)),
        "sys r": keep(os.open("/sys/kernel/mm/transparent_hugepage/enabled", r)),
        "proc rw too": keep(os.open("/proc/self/oom_score_adj", rw)),
        "folder": keep(os.open(folder, r)),
        "folder path": keep(os.open(folder, os.O_PATH)),
        "null": keep(os.open("/dev/null", rw)),
        "zero r": keep(os.open("/dev/zero", r)),
        "memfd of root's": keep(os.memfd_create("m")),
        "tap": keep(tap(tap_name(VM, 0))),
        "tap of another card": keep(tap(tap_name(VM, 1))),
        "tap of another VM": keep(tap(tap_name(VM + 1, 0))),
        "tap of another name": keep(tap("tap0")),
        "tap without Ethernet": keep(tap(tap_name(VM, 0), TUN)),
        "tap without a name": keep(os.open("/dev/net/tun", rw)),
        "pidfd": keep(os.pidfd_open(os.getpid())),
        "listener": lent.listener(),
        "stream": lent.stream(),
    }
    for name, owner in (("root's", 0), ("somebody's", SOMEBODY)):
        for word, flags in (("r", r), ("w", w), ("rw", rw), ("path", os.O_PATH)):
            for mode in (0o600, 0o644, 0o666):
                made[f"{name} {word} {mode:04o}"] = lent.file(flags, mode=mode, owner=owner)
        made[f"{name} r 0640"] = lent.file(r, mode=0o640, owner=owner)
    fifo = str(folder / "a-fifo")
    os.mkfifo(fifo)
    made["fifo rw"] = keep(os.open(fifo, rw))
    made["fifo r"] = keep(os.open(fifo, r | os.O_NONBLOCK))
    made["fifo w"] = keep(os.open(fifo, w))
    made["fifo path"] = keep(os.open(fifo, os.O_PATH))
    made["pipe r"], made["pipe w"] = map(keep, os.pipe())
    return {**made, **_sockets(lent), **_events(lent)}


def _sockets(lent: Lent) -> dict[str, int]:
    def held(sock: socket.socket) -> socket.socket:
        lent.stack.callback(sock.close)
        return sock

    def made(family: int, kind: int) -> socket.socket:
        return held(socket.socket(family, kind))

    table = {
        f"unix {kind.name}": made(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM)
    }
    table["bound"] = made(socket.AF_UNIX, socket.SOCK_STREAM)
    table["bound"].bind(f"{lent.folder}/bound")
    table["packets listening"] = made(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    table["packets listening"].bind(f"{lent.folder}/packets")
    table["packets listening"].listen()
    table["stream ours"], table["packets"] = made(socket.AF_UNIX, socket.SOCK_STREAM), made(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener = made(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{lent.folder}/to-connect")
    listener.listen()
    table["stream ours"].connect(f"{lent.folder}/to-connect")
    table["packets"].connect(f"{lent.folder}/packets")
    table["datagrams"] = held(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0])
    gone, peer = socket.socketpair()
    peer.close()
    table["stream whose peer is gone"] = held(gone)
    table["tcp"], table["udp"] = made(socket.AF_INET, socket.SOCK_STREAM), made(socket.AF_INET, socket.SOCK_DGRAM)
    table["tcp listening"], table["tcp connected"] = (
        made(socket.AF_INET, socket.SOCK_STREAM),
        made(socket.AF_INET, socket.SOCK_STREAM),
    )
    table["tcp listening"].bind(("127.0.0.1", 0))
    table["tcp listening"].listen()
    table["tcp connected"].connect(table["tcp listening"].getsockname())
    table["tcp6"], table["netlink"] = made(socket.AF_INET6, socket.SOCK_STREAM), made(socket.AF_NETLINK, socket.SOCK_RAW)
    # Families whose sockets have no name: the first that asks for it is told off.
    for name, family, kind in (("nameless", socket.AF_ALG, socket.SOCK_SEQPACKET), ("nameless too", 44, socket.SOCK_RAW)):
        with contextlib.suppress(OSError):
            table[name] = made(family, kind)
    return {name: sock.fileno() for name, sock in table.items()}


def _events(lent: Lent) -> dict[str, int]:
    import select

    epoll = select.epoll()
    lent.stack.callback(epoll.close)
    return {"epoll": epoll.fileno(), "terminal": lent.keep(os.openpty()[0])}


def test_every_descriptor_of_every_kind_in_every_place(launcher: Launcher, lent: Lent) -> None:
    """E31, R2, B09: whatever is of another kind, owner or mode than its place wants is refused by the place's name."""
    table = full_plan(lent, VM)
    body, fds = lent.request(VM, table)
    kinds = descriptors_of_all_kinds(lent)
    plan = LaunchPlan(**table, number=VM, seccomp_fd=len(fds) + 2)
    standard = [("stdin", len(fds), PIPE), ("stdout", len(fds) + 1, PIPE), ("stderr", len(fds) + 2, OUTPUT)]
    places = [*plan.lent(), *standard]
    assert {kind for _, _, kind in places} == {*GOOD, OUTPUT}
    assert len(places) == len(fds)
    wrong: list[tuple[str, str, object]] = []
    for name, number, kind in places:
        for what, fd in kinds.items():
            if what in ({"pipe w", "fifo w"} if kind == OUTPUT else GOOD[kind]):
                continue
            swapped = list(fds)
            swapped[number - 3] = fd
            answer, pidfd = launcher.ask(body, tuple(swapped))
            text = answer.get("error", {}).get("text", "")
            if pidfd >= 0 or answer.get("error", {}).get("code") != "launch-refused" or f"{name}: " not in text:
                wrong.append((name, what, answer))
            elif text not in launcher.journal()[-2000:]:
                wrong.append((name, what, "not in the journal"))
            assert launcher.children() == {}, (name, what)
    assert not wrong, (len(wrong), wrong[:10])


def test_what_is_right_is_started_under_its_own_uid(launcher: Launcher, lent: Lent) -> None:
    """And nothing that is right is refused: each good descriptor in a place of its kind; R6, R8: uid, gid, groups, no rights."""
    table = full_plan(lent, VM)
    body, fds = lent.request(VM, table)
    kinds = descriptors_of_all_kinds(lent)
    places = {kind: number for _, number, kind in LaunchPlan(**table, number=VM, seccomp_fd=len(fds) + 2).lent()}
    for kind, names in GOOD.items():
        for name in names:
            swapped = list(fds)
            swapped[places[kind] - 3] = kinds[name]
            pid, pidfd = launcher.started(body, tuple(swapped))
            os.close(pidfd)
            until(lambda: len(launcher.of(launcher.base + VM)) == 2, f"the jail with {name}")
            for child in launcher.of(launcher.base + VM):
                assert status(child, "Uid") == status(child, "Gid") == [launcher.base + VM] * 4
                assert status(child, "Groups") == []
                assert status(child, "NoNewPrivs") == [1]
            assert status(pid, "CapEff", 16) == status(pid, "CapPrm", 16) == status(pid, "CapBnd", 16) == [0]
            launcher.end(VM)
            until(lambda: not launcher.children(), "the jail to be reaped")


def test_descriptors_missing_extra_twice_and_far_too_many(launcher: Launcher, lent: Lent) -> None:
    body, fds = lent.request(VM, small_plan(lent))
    more = lent.file(os.O_RDONLY)
    for lend in (fds[1:], fds[:-1], fds[:1], (*fds, fds[-1]), (*fds[:-1], more, fds[-1]), (*fds, *[more] * (128 - len(fds)))):
        assert "descriptor" in launcher.refused(body, lend)
    assert "descriptors: standard input, output and error" in launcher.refused(body)
    plan = body["plan"]
    for number in (plan["block_fd"], 5, 6):  # used twice; the filter's; nobody's
        text = launcher.refused({**body, "plan": {**plan, "qmp_fd": number}}, fds)
        assert "descriptor" in text, text


# --- values -----------------------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 6, 255, 256, 1 << 31, 1 << 32, 1 << 53, -(1 << 53)),
    *(
        "",
        "a",
        "-",
        "--reuid=0",
        "kvm,help",
        "tcg,x=y",
        "a" * 5000,
        "é",
        "\u202e",
        "q35\n",
        "\t",
        "\x7f",
        "root",
        "file=/etc/shadow",
    ),
    *([], [[]], [None], [1], ["a"], [[3, "raw"]], [0] * 65, {}, {"a": {"b": []}}, [{}], [[[[[[]]]]]]),
]


def attempt(launcher: Launcher, body: dict[str, Any], fds: tuple[int, ...], field: str) -> None:
    """Refused with the field's name, or else a whole VM under its own uid."""
    answer, pidfd = launcher.ask(body, fds)
    if pidfd < 0:
        text = answer["error"]["text"]
        assert answer["error"]["code"] in ("launch-refused", "bad-value"), (field, answer)
        assert any(word in text for word in _names_of(field)), (field, text)
        assert text[:200] in launcher.journal()[-6000:], text
        return
    os.close(pidfd)
    number = body["number"]
    until(lambda: launcher.of(launcher.base + number) or not launcher.children(), "the jail or its end")
    assert {uid for _, uid in launcher.running()} <= {launcher.base + number}
    launcher.end(number)
    until(lambda: not launcher.children(), "the jail to be reaped")


# A refusal names the field, or the one that it does not go with.
_NAMED_BY = {
    "kernel_fd": ("kernel", "descriptor"),
    "initrd_fd": ("initrd", "kernel", "descriptor"),
    "firmware": ("firmware", "variables", "descriptor", "loadvm"),
    "machine": ("machine", "bus"),
    "kind": ("kind", "bus", "layers", "geometry", "readonly", "disks"),
    "readonly": ("readonly", "layers"),
    "connected": ("connected", "stream_fd", "forwards", "nics"),
    "layers": ("layer", "format"),
    "geometry": ("cyls", "heads", "secs", "trans"),
    "forwards": ("protocol", "port", "connected"),
    "option_rom_fds": ("option_rom",),
    "disks": ("layers",),
    "nics": ("mac",),
}
_HOLD_DESCRIPTORS = ("layers", "disks", "nics", "firmware", "option_rom_fds")


def _names_of(field: str) -> tuple[str, ...]:
    stem = field.removesuffix("_fd")
    descriptors = ("descriptor",) if stem != field or field in _HOLD_DESCRIPTORS else ()
    return (*_NAMED_BY.get(field, ()), field, stem, *descriptors)


def test_every_key_of_a_plan_with_every_nasty_value(launcher: Launcher, lent: Lent) -> None:
    """B01-B04, N6: of the plan, of a disk and of an interface."""
    table = full_plan(lent, VM)
    body, fds = lent.request(VM, table)
    for key in sorted(frozenset(LaunchPlan.fields) - LAUNCHERS_OWN):
        for value in NASTY:
            attempt(launcher, {**body, "plan": {**table, key: value}}, fds, key)
    for group, kind in (("disks", ("layers", "kind", "bus", "readonly", "geometry", "bootindex")), ("nics", _NIC_KEYS)):
        for key in kind:
            for value in NASTY:
                items = [{**table[group][0], key: value}, *table[group][1:]]
                attempt(launcher, {**body, "plan": {**table, group: items}}, fds, key)


_NIC_KEYS = ("mac", "model", "forwards", "bootindex", "connected", "tap_fd", "stream_fd")


def test_inner_lists_with_every_nasty_value(launcher: Launcher, lent: Lent) -> None:
    """A layer's pair, a forward's three, a geometry's four, the firmware's two."""
    table = full_plan(lent, VM)
    body, fds = lent.request(VM, table)
    for value in NASTY:
        for pair in ([value, "raw"], [3, value], [3, "raw", value], value):
            disk = {**table["disks"][0], "layers": [pair]}
            attempt(launcher, {**body, "plan": {**table, "disks": [disk, *table["disks"][1:]]}}, fds, "layers")
        for row in ([value, 2000, 22], ["tcp", value, 22], ["tcp", 2000, value], value):
            nic = {"mac": "06:00:00:00:00:03", "forwards": [row]}
            attempt(launcher, {**body, "plan": {**table, "nics": [*table["nics"][:2], nic]}}, fds, "forwards")
        for four in ([value, 16, 63, "lba"], [1, value, 63, "lba"], [1, 16, value, "lba"], [1, 16, 63, value]):
            disk = {**table["disks"][0], "geometry": four}
            attempt(launcher, {**body, "plan": {**table, "disks": [disk, *table["disks"][1:]]}}, fds, "geometry")
        for two in ([value, 11], [10, value], [10, 11, value], [value]):
            attempt(launcher, {**body, "plan": {**table, "firmware": two}}, fds, "firmware")


def test_what_only_the_launcher_says_and_keys_nobody_knows(launcher: Launcher, lent: Lent) -> None:
    """R6: no uid, no scope, no filter of the broker's choice; and no unknown key anywhere."""
    table = full_plan(lent, VM)
    body, fds = lent.request(VM, table)
    for key in (*sorted(LAUNCHERS_OWN), "run_as", "", "self", "kind", "__class__", "a" * 3000, "uid "):
        for value in (0, None, "vmshell.slice", 3):
            text = launcher.refused({**body, "plan": {**table, key: value}}, fds)
            assert key[:40] in text and ("the launcher's own" if key in LAUNCHERS_OWN else "plan has no such field") in text
            for group in ("disks", "nics"):
                if key not in table[group][0] and key not in ("kind",):
                    items = [{**table[group][0], key: value}]
                    assert f"{group[:-1]} has no such field" in launcher.refused({**body, "plan": {**table, group: items}}, fds)
    for key in ("uid", "fds", "", "self", "cls", "verb "):
        for request in (body, {"verb": "signal", "number": 1, "signal": "kill"}, {"verb": "job", "kind": "storage"}):
            text = launcher.refused({**request, key: 0}, () if request["verb"] == "signal" else fds)
            assert key in text and "no such field" in text, text


def test_numbers_out_of_range(launcher: Launcher, lent: Lent) -> None:
    body, fds = lent.request(VM, small_plan(lent))
    numbers: list[object] = [0, -1, NUMBER_MAX + 1, NUMBER_MAX + 1 + JOBS_MAX, 1 << 32, 1 << 53, True, "5", None, [5], {}]
    for number in numbers:
        for request, lend in (
            (body, fds),
            ({"verb": "signal", "signal": "kill"}, ()),
            ({"verb": "signal", "signal": "term"}, ()),
        ):
            assert "number" in launcher.refused({**request, "number": number}, lend)
    for word in ("KILL", "stop", "9", 9, None, ["kill"], "kill\n", ""):
        assert "signal" in launcher.refused({"verb": "signal", "number": 1, "signal": word})
    for number in (1, 77, NUMBER_MAX):
        for word in ("term", "kill"):
            launcher.signal(number, word)  # that there is none is no error
    for missing in ("number", "plan"):
        assert missing in launcher.refused({key: value for key, value in body.items() if key != missing}, fds)
    for plan in (None, [], "x", 3, [body["plan"]]):
        assert "plan" in launcher.refused({**body, "plan": plan}, fds)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(sorted(LaunchPlan.fields)) | st.text(max_size=8).filter(lambda key: "\0" not in key),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(1 << 53), 1 << 53)
            | st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1), max_size=20),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["layers", "mac", "kind", "x"]), inner, max_size=3)
            ),
            max_leaves=8,
        ),
        max_size=8,
    )
)
def test_plans_of_any_kind(launcher: Launcher, plan: dict[str, Any]) -> None:
    with Lent(launcher.folder) as lent:
        body, fds = lent.request(VM, small_plan(lent))
        for table in (plan, {**body["plan"], **plan}):
            answer, pidfd = launcher.ask({**body, "plan": table}, fds)
            if pidfd >= 0:
                os.close(pidfd)
                launcher.end(VM)
            else:
                assert answer["error"]["code"] in ("launch-refused", "bad-value"), answer


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_jobs_of_nasty_words(launcher: Launcher, lent: Lent) -> None:
    """E31: options, paths and control characters are words of our own program's, or refused."""
    for kind in ("", "storage ", "broker", "launcher", "../storage", "--reuid=0", None, 1, ["storage"], "STORAGE"):
        assert "kind" in launcher.refused({"verb": "job", "kind": kind, "words": []}, (lent.errors,))
    none: list[object] = [["a"] * 65, ["a" * 201], ["a\n"], ["\x1b[2J"], ["\x7f"], ["\u202e"], [1], [None], [["a"]], "create", {}]
    for value in none:
        assert "words" in launcher.refused({"verb": "job", "kind": "storage", "words": value}, (lent.errors,))
    assert "output" in launcher.refused({"verb": "job", "kind": "storage", "words": []})
    for name, fd in descriptors_of_all_kinds(lent).items():
        if name not in ("pipe w", "fifo w"):
            assert "output" in launcher.refused({"verb": "job", "kind": "storage", "words": []}, (fd,)), name
    for words in (["--reuid=0"], ["--", "sh"], ["-c", "id"], ["/etc/shadow"], [""], ["create", "--reuid=0"], ["x"] * 64, []):
        said = answer_of_job(launcher, words)
        assert said["status"] == 1 and "usage" in said["problem"], said


def answer_of_job(launcher: Launcher, words: list[str], kind: str = "storage", *lent: int) -> dict[str, Any]:
    """Run a job to its end; what its last line says."""
    reader, writer = os.pipe()
    try:
        _, pidfd = launcher.started({"verb": "job", "kind": kind, "words": words}, (*lent, writer))
    finally:
        os.close(writer)
    os.close(pidfd)
    with open(reader, encoding="utf-8") as output:
        said: dict[str, Any] = json.loads(output.read().splitlines()[-1])
    until(lambda: not launcher.running(), "the job to end")
    return said


def test_each_job_has_a_uid_and_no_rights_and_there_are_so_many(launcher: Launcher, lent: Lent) -> None:
    """E31: no job can meet another; of the sixty-fifth the broker is told that there is no room."""
    with uploads(launcher, lent, JOBS_MAX) as jobs:
        assert sorted(jobs.values()) == list(launcher.jobs)
        for pid, uid in jobs.items():
            assert status(pid, "Uid") == status(pid, "Gid") == [uid] * 4
            assert status(pid, "Groups") == []
            assert status(pid, "NoNewPrivs") == [1]
            for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert status(pid, name, 16) == [0]
        assert "in use" in launcher.refused({"verb": "job", "kind": "storage", "words": []}, (lent.errors,))
    until(lambda: answer_of_job(launcher, []), "the uids to come back")


def test_a_probe_has_a_jobs_uid_and_no_group_but_kvms(launcher: Launcher, lent: Lent) -> None:
    folder = lent.folder / "probe"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    fd = lent.keep(os.open(folder, os.O_RDONLY))
    pid, pidfd = launcher.started({"verb": "job", "kind": "probe", "words": ["tcg"]}, (fd, lent.errors))
    os.close(pidfd)
    begun(pid)
    (uid,) = set(status(pid, "Uid"))
    assert uid in launcher.jobs
    device = os.stat("/dev/kvm").st_gid if os.path.exists("/dev/kvm") else 0
    assert status(pid, "Groups") == ([device] if device else [])
    assert status(pid, "CapEff", 16) == status(pid, "CapBnd", 16) == [0]
    until(lambda: not launcher.running(), "the probe and its guests to end")
    assert json.loads(os.read(lent.said, 65536).splitlines()[-1])["accel"] == "tcg"


def test_a_probe_takes_nobodys_uid(launcher: Launcher, lent: Lent) -> None:
    """Its second word is for root's own session; here it has no right to become anybody."""
    folder = lent.keep(os.open(lent.folder, os.O_RDONLY))
    for uid in (0, BROKER, launcher.base + 1):
        said = answer_of_job(launcher, ["tcg", str(uid)], "probe", folder)
        assert said["problem"]


# --- the connection ---------------------------------------------------------------------------------------------------


def test_verbs_that_are_none_and_descriptors_that_nobody_asked_for(launcher: Launcher, lent: Lent) -> None:
    for verb in ("", "boot", "LAUNCH", None, 3, ["launch"], {"launch": 1}, "ended", "a" * 60000, "launch\n"):
        assert "verb" in launcher.refused({"verb": verb, "number": {"a": [verb]} if verb != "a" * 60000 else 1})
    assert "verb" in launcher.refused({})
    for body in ({"verb": "signal", "number": 1, "signal": "kill"}, {"verb": "restart-names"}):
        assert "descriptors: " in launcher.refused(body, (lent.errors,))


def test_packets_that_are_none_end_the_connection_and_nothing_else(launcher: Launcher, lent: Lent) -> None:
    deep = b'{"a":' * 40 + b"1" + b"}" * 40
    for packet in (
        b"\0",
        b"{",
        b"[]",
        b"1",
        b"\xff\xfe",
        b'{"id":1.5}',
        b'{"id":1,"id":2}',
        deep,
        b'{"verb":"\\u0000"}',
        b"a" * 70000,
    ):
        before = launcher.descriptors()
        launcher.broker.sendall(packet)
        assert launcher.broker.recv(1 << 16) == b""
        launcher.broker.close()
        launcher.broker = launcher.connect()
        launcher.signal(1)
        assert launcher.descriptors() == before
    for ident in (-1, "a", None, 1 << 53, [1]):
        wire.send(launcher.broker, {"id": ident, "verb": "restart-names", "x": 1})
        answer, _ = launcher.receive()
        assert "error" in answer
    many = [lent.errors] * 240
    wire.send(launcher.broker, {"id": 1, "verb": "restart-names"}, tuple(many))
    assert launcher.broker.recv(1 << 16) == b""
    launcher.broker.close()
    launcher.broker = launcher.connect()


def test_five_thousand_requests_in_a_row(launcher: Launcher, lent: Lent) -> None:
    body, fds = lent.request(VM, {**small_plan(lent), "cpus": 0})
    for index in range(5000):
        answer, _ = launcher.ask(body, fds) if index % 2 else launcher.ask({"verb": "signal", "number": 0, "signal": "kill"})
        assert "error" in answer


def test_a_broker_that_does_not_read_is_hung_up_on(launcher: Launcher) -> None:
    """D05: the launcher waits for nobody; the next connection is served."""
    launcher.broker.settimeout(1)
    with contextlib.suppress(OSError):
        for ident in range(20_000):
            wire.send(launcher.broker, {"id": ident, "verb": "no such"})
    first, launcher.broker = launcher.broker, launcher.connect()
    launcher.signal(1)
    assert "does not take its answers" in launcher.journal()
    first.close()


def test_another_uid_is_refused_and_a_second_connection_takes_the_firsts_place(launcher: Launcher) -> None:
    """D11, D12: who connected counts, by the kernel's word; root itself is not the broker."""
    for uid in (SOMEBODY, 0, launcher.base + VM, launcher.jobs.start):
        with launcher.connect(uid) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                wire.send(sock, {"id": 1, "verb": "signal", "number": 1, "signal": "kill"})
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1 << 16) == b""
        assert f"refused a connection of uid {uid}" in launcher.journal()
        launcher.signal(1)  # the broker's own stays
    first, launcher.broker = launcher.broker, launcher.connect()
    launcher.signal(1)
    with contextlib.suppress(ConnectionResetError):
        assert first.recv(1 << 16) == b""
    first.close()


def test_a_number_runs_once_and_a_new_connection_ends_what_the_last_one_left(launcher: Launcher) -> None:
    with Lent(launcher.folder) as lent:
        body, fds = lent.request(VM, small_plan(lent))
        pid, pidfd = launcher.started(body, fds)
        assert "number: VM 5 runs already" in launcher.refused(body, fds)
        until(lambda: len(launcher.of(launcher.base + VM)) == 2, "the jail")
        first, launcher.broker = launcher.broker, launcher.connect()
        first.close()
        second, other = launcher.started(body, fds)
        assert second != pid
        until(lambda: pid not in launcher.of(launcher.base + VM), "the first jail to end")
        until(lambda: len(launcher.of(launcher.base + VM)) == 2, "the second jail")
        os.close(pidfd)
        os.close(other)
        launcher.end(VM)
