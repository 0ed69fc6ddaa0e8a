"""A broker that was taken over and what vmshell-admin, as root, makes of its answers and files. Rows R1, R12, R25, A30, D22, D24.

Whatever it says, or does not say: one sentence, within a time limit; nothing is taken away, nothing of its own is opened by path.
"""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hostile import HostileBroker, Lingering, Packet
from tests.images import run_admin
from vmshell.admin import asking, broker, doctor, usage, users
from vmshell.admin.asking import ask
from vmshell.admin.catalogue import Catalogue, Image
from vmshell.admin.doctor_network import check_network
from vmshell.admin.findings import FAIL, OK
from vmshell.admin.verbs import Arguments, Context
from vmshell.errors import ProtocolError, VmshellError
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import Layout
from vmshell.messages import Whoami
from vmshell.refusals import BrokerDown, CannotTell, ImageInUse, TimedOut

Capture = pytest.CaptureFixture[str]
GENEROUS = 120.0  # seconds: far from what is right, and farther from what hangs
ESCAPE = "\x1b]0;owned\x07\u202e"
NOBODY: dict[str, object] = {"count": 0, "first": []}
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="the host's catalogue is root's")


@pytest.fixture
def layout(short_tmp: Path, unsynced: None) -> Layout:
    """An installed host's, as far as vmshell-admin can tell; with the images `demo`, a kernel, and `base`, a disk."""
    parts = {name: f"{short_tmp}/{name}" for name in ("etc", "state", "run", "log")}
    made = Layout(**parts, embedded=False)
    for name, file in (("demo", "vmlinuz"), ("base", "disk.raw")):
        disk = file if name == "base" else ""
        image = Image(name, "", 96, {} if disk else {"kernel": file}, disk, 512 if disk else 0)
        catalogue = Catalogue(made)
        with catalogue.locked(), catalogue.workspace() as work:
            os.mkdir(f"{work}/image")
            Path(work, "image", file).write_bytes(b"x" * 512)
            catalogue.publish(f"{work}/image", image, "made by a test")
    return made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For those that get no answer; those that do are not measured by it."""
    monkeypatch.setattr(asking, "PATIENCE", 20.0)


def ok(**answer: object) -> bytes:
    return json.dumps({"id": 1, "ok": answer}).encode()


def arguments(**values: str) -> Arguments:
    args = Arguments()
    for name, value in values.items():
        args.add(name, value)
    return args


def user() -> Arguments:
    return arguments(**{"USER/VM": "alice/web1"})


# Everything that asks, and has no use for an answer that is not as agreed.
ASKING: dict[str, Callable[[Layout], object]] = {
    "users of an image": lambda layout: usage.users_of(layout, "demo"),
    "counts of users": lambda layout: usage.user_counts(layout, ["demo", "base"]),
    "belongings": lambda layout: usage.belongings(layout, 1000, "alice"),
    "counts of VMs": lambda layout: usage.vm_counts(layout, [1000]),
    "launch-line": lambda layout: broker.launch_line(Context(layout), user()),
    "policy load": lambda layout: broker.load(Context(layout), Arguments()),
    "network repair": lambda layout: broker.repair(Context(layout), Arguments()),
}
NO_ANSWERS: dict[str, bytes] = {
    "nothing": b"{}",
    "no result": b'{"id":1}',
    "a number": b'{"id":1,"ok":5}',
    "an empty result": ok(),
    "another's result": b'{"id":2,"ok":{"count":0,"first":[],"argv":[],"later":[],"problems":[],"features":{}}}',
    "no JSON": b"\x00\xff\x1b[2J",
    "too deep": b'{"id":1,"ok":' + b"[" * 1000 + b"]" * 1000 + b"}",
    "too large": b'{"id":1,"ok":{"x":"' + b"x" * 100_000 + b'"}}',
    "an error of numbers": b'{"id":1,"error":{"code":5,"text":[],"hint":{}}}',
    "an error that is none": b'{"id":1,"error":null}',
    "an error with escapes": json.dumps({"id": 1, "error": dict.fromkeys(("code", "text", "hint"), ESCAPE * 900)}).encode(),
}
WRONG: list[Any] = [None, True, -1, 1 << 60, "0", ESCAPE, [None], [[[]]], ["x", 1], {"a": 1}, [{}], [{"count": "1"}]]


def one_sentence(error: VmshellError) -> None:
    text = f"{error}{error.advice()}"
    assert text.isprintable() and len(str(error)) < 1000 and error.exit_status


@NEEDS_ROOT
@pytest.mark.parametrize("packet", NO_ANSWERS.values(), ids=NO_ANSWERS)
@pytest.mark.parametrize("what", ASKING)
def test_what_is_no_answer_is_one_sentence(layout: Layout, what: str, packet: bytes) -> None:
    with HostileBroker(layout, [packet]), pytest.raises(VmshellError) as caught:
        ASKING[what](layout)
    one_sentence(caught.value)


@NEEDS_ROOT
@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("what", ASKING)
def test_values_of_the_wrong_kind(layout: Layout, what: str, wrong: object) -> None:
    """In every place of every answer, at the top and in its rows."""
    row = {"count": wrong, "first": wrong, "vms": wrong, "problem": ""}
    places = [dict.fromkeys(("argv", "later", "problems", "images", "unreadable", "owned"), wrong)]
    places += [{"images": [row] * count, "unreadable": NOBODY, "owned": [row] * count} for count in (1, 2)]
    for place in places:
        with HostileBroker(layout, [ok(**place)]), pytest.raises(VmshellError) as caught:
            ASKING[what](layout)
        one_sentence(caught.value)


def test_a_count_that_contradicts_its_names_is_no_count(layout: Layout) -> None:
    """`0`, and yet a name: believed one way it would delete what the other way forbids."""
    rows: list[dict[str, object]] = [{"count": 0, "first": ["alice/web1"]}, {"count": 3, "first": []}, {"first": []}]
    for row in [*rows, {"count": 9, "first": ["alice/web1"] * 9}]:
        with HostileBroker(layout, [ok(images=[row], unreadable=NOBODY)]), pytest.raises(CannotTell):
            usage.users_of(layout, "demo")
    for images in ([], [NOBODY, NOBODY]):
        with HostileBroker(layout, [ok(images=images, unreadable=NOBODY)]), pytest.raises(CannotTell):
            usage.users_of(layout, "demo")
    nothing = {**NOBODY, "vms": 0, "problem": "a folder"}
    with HostileBroker(layout, [ok(owned=[nothing])]), pytest.raises(CannotTell, match="a folder"):
        usage.belongings(layout, 1000, "alice")


@NEEDS_ROOT
def test_escapes_never_reach_the_terminal(layout: Layout, capfd: Capture) -> None:
    row = {"count": 1, "first": [ESCAPE * 500]}
    with HostileBroker(layout, [ok(images=[row], unreadable=row)]):
        done = run_admin(layout, "image", "rm", "demo")
        assert done.returncode == ImageInUse.exit_status and "image demo is in use by \\x1b]0;owned" in done.stderr
        shown = done.stdout + done.stderr
    with HostileBroker(layout, [ok(argv=[ESCAPE, "-x", ESCAPE], later=[ESCAPE], problems=[ESCAPE], features={}, uid=0)]):
        broker.launch_line(Context(layout), user())
        broker.load(Context(layout), Arguments())
        broker.repair(Context(layout), Arguments())
    with HostileBroker(layout, [ok(accel="tcg", reason=ESCAPE, problem=ESCAPE)]):
        (finding,) = doctor.check_acceleration(Context(layout))
        shown += finding.text
    shown += "".join(capfd.readouterr())
    assert shown.count("owned") >= 6 and shown.replace("\n", "").isprintable()


# --- no answer at all -------------------------------------------------------------------------------------------------


PROGRESS = b'{"id":1,"progress":"soon"}'


@pytest.mark.parametrize(
    ("packets", "again"),
    [([], b""), ([], PROGRESS), ([PROGRESS] * 50, b"")],
    ids=["silence", "progress-for-ever", "progress-and-silence"],
)
def test_a_conversation_ends(layout: Layout, packets: list[Packet], again: bytes) -> None:
    begun = time.monotonic()
    with HostileBroker(layout, packets, again=again), pytest.raises(BrokerDown, match="no answer in time"):
        ask(layout, Whoami(), 0.3)
    assert time.monotonic() - begun < GENEROUS


def test_a_closed_connection_and_no_socket_are_a_broker_that_is_down(layout: Layout) -> None:
    with HostileBroker(layout, [], closes=True), pytest.raises(BrokerDown, match="closed the connection"):
        ask(layout, Whoami())
    with HostileBroker(layout, [PROGRESS], closes=True), pytest.raises(BrokerDown, match="closed the connection"):
        ask(layout, Whoami())
    with pytest.raises(BrokerDown):
        ask(layout, Whoami())


@NEEDS_ROOT
def test_policy_test_ends_too(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell asks there, which has all the patience of a person."""
    monkeypatch.setattr(broker, "EXPLAIN_PATIENCE", 1.0)
    with HostileBroker(layout, [], again=PROGRESS), pytest.raises(TimedOut, match="the VM service did not answer within 1 s"):
        broker.test(Context(layout), arguments(USER="root", VERB="boot", WORD="web1"))


# --- descriptors ------------------------------------------------------------------------------------------------------


@NEEDS_ROOT
@pytest.mark.parametrize("place", ["beside the answer", "behind it", "beside progress"])
def test_D07_a_descriptor_that_takes_its_time_to_close_holds_nobody_up(layout: Layout, place: str) -> None:
    """Whoever received it, or closed the socket in which it lies, would wait for ten minutes."""
    answer = ok(images=[NOBODY], unreadable=NOBODY)
    begun = time.monotonic()
    with Lingering() as lingering:
        bad = lingering.take()
        packets: dict[str, list[Packet]] = {
            "beside the answer": [(answer, bad)],
            "behind it": [answer, (PROGRESS, bad)],
            "beside progress": [(PROGRESS, bad), answer],
        }
        with HostileBroker(layout, packets[place]):
            done = run_admin(layout, "image", "rm", "demo")
        assert time.monotonic() - begun < GENEROUS
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) is (place == "behind it") is not Catalogue(layout).exists("demo")
    assert place == "behind it" or "brings what nobody asked for" in done.stderr


def test_an_answer_with_a_descriptor_is_none(layout: Layout) -> None:
    def held() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{fd}") == os.devnull for fd in os.listdir("/proc/self/fd"))

    before = held()
    with HostileBroker(layout, [(ok(uid=0), os.open(os.devnull, os.O_RDONLY))]), pytest.raises(ProtocolError):
        ask(layout, Whoami())
    assert held() == before


# --- nothing is taken away on no answer -------------------------------------------------------------------------------


@NEEDS_ROOT
@pytest.mark.parametrize(
    "packet", [None, ok(), ok(images=[], unreadable={}), b'{"id":1,"error":{"code":"unknown-verb","text":"?"}}']
)
def test_without_an_answer_images_stay(layout: Layout, packet: bytes | None) -> None:
    def asked() -> None:
        done = run_admin(layout, "image", "rm", "demo")
        assert done.returncode == CannotTell.exit_status
        assert done.stderr.startswith("vmshell-admin: nobody can say which VMs use image demo: ")
        assert len(done.stderr.splitlines()) == 2
        with pytest.raises(CannotTell):
            Catalogue(layout).must_be_replaceable("base")
        Catalogue(layout).must_be_replaceable("demo")  # a kernel may change under its VMs
        Catalogue(layout).must_be_replaceable("new")
        listed = run_admin(layout, "image", "list")
        assert listed.returncode == 0 and "nobody can say which VMs use which image" in listed.stderr
        assert [line.split()[4] for line in listed.stdout.splitlines()] == ["VMS", "?", "?"]

    if packet is None:
        asked()
    else:
        with HostileBroker(layout, [packet]):
            asked()
    assert Catalogue(layout).names() == ["base", "demo"]


def test_D22_without_an_answer_no_uid_is_given_free(layout: Layout) -> None:
    """What stops `user remove` is raised before anything is changed."""
    entry = pwd.getpwuid(os.getuid())
    with pytest.raises(CannotTell, match=f"nobody can say what {entry.pw_name} owns"):
        users._refuse_owner(Context(layout), entry)
    with HostileBroker(layout, [ok(owned=[{}])]), pytest.raises(CannotTell):
        users._refuse_owner(Context(layout), entry)
    with HostileBroker(layout, [ok(owned=[{"vms": 0, "count": 0, "first": [], "problem": ""}])]):
        users._refuse_owner(Context(layout), entry)


# --- its files --------------------------------------------------------------------------------------------------------

# Says each path below a folder that is looked at, however: Python tells an audit hook before it asks the kernel.
WATCHED = """
import os, sys
sys.path.insert(0, {root!r})
def hook(event, args):
    for arg in args if event.startswith(("open", "os.")) else ():
        if isinstance(arg, (str, bytes)) and os.fsdecode(arg).startswith({folders!r}):
            os.write(2, b"LOOKED: " + os.fsencode(arg) + b"\\n")
sys.addaudithook(hook)
from vmshell.admin.main import main
sys.exit(main({words!r}))
"""


@pytest.mark.parametrize("words", [["image", "list"], ["image", "rm", "demo"], ["user", "list"], ["doctor"]], ids=" ".join)
@pytest.mark.parametrize("embedded", [False, True], ids=["installed", "session"])
@NEEDS_ROOT
def test_R1_root_opens_no_file_of_the_brokers_by_path(layout: Layout, words: list[str], embedded: bool) -> None:
    """They are traps: FIFOs, whose opening would hang. In session mode they are one's own, and are read: that the hook sees."""
    place = Layout(etc=layout.etc, state=layout.state, run=layout.run, log=layout.log, embedded=embedded)
    folder, facts = Path(layout.vm_state(0, "web1")), Path(layout.host_facts)
    for path in (folder / "record.json", facts):
        path.parent.mkdir(parents=True)
        path.write_text("{}") if embedded else os.mkfifo(path)
    mine = (layout.vms, f"{layout.state}/shelf", f"{layout.state}/net", layout.broker_run, layout.run_vms)
    script = WATCHED.format(root=os.path.dirname(PACKAGE_DIR), folders=mine, words=["--layout", place.to_args(), *words])
    answer = ok(images=[NOBODY] * (2 if words[-1] == "list" else 1), unreadable=NOBODY, owned=[])
    with HostileBroker(place, [answer]):
        done = subprocess.run([sys.executable, "-IS", "-c", script], capture_output=True, text=True, timeout=GENEROUS)
    assert "Traceback" not in done.stderr
    reads = embedded and words[0] == "image"
    assert ("LOOKED" in done.stderr) is reads, done.stderr


# --- what doctor makes of it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packet", [*NO_ANSWERS.values(), ok(uid=[], accel=7, reason={}, problem=[])])
def test_doctor_says_ok_of_nothing_that_was_not_answered(layout: Layout, packet: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with HostileBroker(layout, [packet]):
        (answers,) = doctor.check_sockets(Context(layout))
        (acceleration,) = doctor.check_acceleration(Context(layout))
        network = list(check_network(Context(layout)))
        assert not doctor._sockets_are_confined(Context(layout))
    assert answers.level == FAIL and acceleration.level != OK
    assert not any(finding.level == OK and "answers" in finding.text for finding in network)


def test_doctor_needs_no_file_for_what_the_broker_found_out(layout: Layout) -> None:
    def found(**facts: str) -> str:
        with HostileBroker(layout, [ok(**{"accel": "", "reason": "", "problem": "", **facts})]):
            (finding,) = doctor.check_acceleration(Context(layout))
        return f"{finding.level} {finding.text}"

    assert found(accel="kvm") == "OK KVM"
    assert found(accel="tcg", reason="no /dev/kvm").endswith("(no /dev/kvm)")
    assert found(problem="no QEMU") == "FAIL the broker cannot run VMs: no QEMU"
    (finding,) = doctor.check_acceleration(Context(layout))
    assert finding.level != OK and "the VM service does not answer" in finding.text
