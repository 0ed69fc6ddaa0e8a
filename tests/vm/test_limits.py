"""Limits and policy under a real broker: fifty boots at once, a policy that changes while VMs run, what `explain` says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.guests import echo_image, halt_image
from tests.images import run_admin
from tests.session import Session
from vmshell import messages
from vmshell.broker.host.processes import cpu_seconds
from vmshell.broker.lifecycle.boot_queue import SILENT_CPU
from vmshell.layout import Layout
from vmshell.refusals import ReportedError

pytestmark = pytest.mark.vm

HOST = '[host]\naccel = "tcg"\nconnections_max = 256\nboots_at_once = 4\n'


@pytest.fixture
def limited(layout: Layout) -> Iterator[Session]:
    echo_image(layout)
    write(layout, '[defaults]\nrunning_max = 7\nuser_memory = "320M"\nmemory_max = "64M"\n')
    with Session(layout) as session:
        yield session


def write(layout: Layout, text: str) -> None:
    Path(layout.policy).write_text(HOST + text)


def running(session: Session) -> list[str]:
    return [row["name"] for row in session.ask(messages.List())["vms"] if row["state"] == "running"]


def test_fifty_boots_at_once_never_exceed_a_limit_by_one(limited: Session) -> None:
    """D17: the sum of memory allows five of them, whatever the order."""
    names = [f"vm{number}" for number in range(50)]
    for name in names:
        limited.ask(messages.New(vm=name, image="echo", memory=64))

    def boot(name: str) -> str:
        try:
            limited.ask(messages.Boot(vm=name))
        except ReportedError as exc:
            assert exc.code == "over-limit"
            return exc.sentence()
        return ""

    with ThreadPoolExecutor(50) as pool:
        told = list(pool.map(boot, names))
    assert told.count("") == 5 == len(running(limited))
    refused = next(text for text in told if text)
    assert "64M memory in all; the limit is 320M and 320M are in use (user_memory in [defaults])" in refused
    for name in running(limited):
        limited.ask(messages.Kill(vm=name))


def test_a_policy_changes_under_ten_running_vms(limited: Session) -> None:
    write(limited.layout, "[defaults]\nrunning_max = 10\n")
    assert run_admin(limited.layout, "policy", "load").returncode == 0
    for number in range(10):
        limited.ask(messages.New(vm=f"vm{number}", image="echo", memory=16))
        limited.ask(messages.Boot(vm=f"vm{number}"))
    pids = sorted(limited.qemu_pids())
    limited.ask(messages.New(vm="more", image="echo", memory=16))
    user = limited.ask(messages.Whoami())["user"]

    # A broken file: refused with its line, and the old one holds.
    write(limited.layout, "[defaults]\nrunning_max = 12\nvms_max = maybe\n")
    done = run_admin(limited.layout, "policy", "load")
    assert done.returncode == 69 and "line 7" in done.stderr, done.stderr
    with pytest.raises(ReportedError, match="the limit is 10 and 10 are in use"):
        limited.ask(messages.Boot(vm="more"))
    os.chmod(limited.layout.policy, 0o666)
    assert "writable by others" in run_admin(limited.layout, "policy", "load").stderr
    os.chmod(limited.layout.policy, 0o644)

    # A narrower section, in force from the next request on.
    write(limited.layout, f"[defaults]\nrunning_max = 1\n[user.{user}]\nrunning_max = 11\n")
    assert run_admin(limited.layout, "policy", "load").returncode == 0
    tested = run_admin(limited.layout, "policy", "test", user, "boot", "more")
    assert tested.returncode == 0 and f"[user.{user}]" in tested.stdout, tested
    limited.ask(messages.Boot(vm="more"))
    write(limited.layout, "[defaults]\nrunning_max = 1\n")
    assert run_admin(limited.layout, "policy", "load").returncode == 0
    assert sorted(set(limited.qemu_pids()) & set(pids)) == pids
    assert len(running(limited)) == 11
    limited.ask(messages.Kill(vm="more"))
    tested = run_admin(limited.layout, "policy", "test", user, "boot", "more")
    assert tested.returncode == 1 and "running_max" in tested.stdout and "the limit is 1 and 10 are in use" in tested.stdout
    line = run_admin(limited.layout, "launch-line", "vm0")
    assert line.returncode == 0 and "bwrap" in line.stdout and "-nodefaults" in line.stdout, line
    shown = run_admin(limited.layout, "policy", "show", user)
    assert shown.returncode == 0 and "running_max" in shown.stdout


def test_what_is_refused_leaves_the_definition_as_it_was(limited: Session) -> None:
    limited.ask(messages.New(vm="vm", image="echo", memory=32))
    (path,) = Path(limited.layout.vms).glob("*/vm/vm.toml")
    before = path.read_bytes()
    for request in (
        messages.Change(vm="vm", set={"memory": "65M"}),
        messages.Change(vm="vm", set={"memory": "ten"}),
        messages.Change(vm="vm", set={"cpu.model": "EPYC,+vmx"}),
        messages.Change(vm="vm", set={"cpu.model": "nosuch"}),
        messages.Change(vm="vm", set={"net0.network": "bridge0"}),
        messages.Change(vm="vm", set={"disk0": "../../etc/passwd"}),
        messages.Change(vm="vm", set={"disk0": "json:{}"}),
        messages.Change(vm="vm", set={"disk0.format": "raw"}),
        messages.Change(vm="vm", set={"boot.kernel": "/boot/vmlinuz"}),
        messages.Change(vm="vm", set={"autostart": "yes"}),
        messages.Define(vm="vm", text="name = 'vm'\n[machine]\nfirmware = 'evil'\n"),
        messages.Define(vm="vm", text="name = 'vm'\nargs = '-monitor stdio'\n"),
        messages.Define(vm="vm", text="[[disk]]\npath = 'x'\nsize = '99T'\n"),
        messages.DiskAdd(vm="vm", object="big", size=1 << 24),
    ):
        with pytest.raises(ReportedError) as caught:
            limited.ask(request)
        assert caught.value.sentence().isprintable()
        assert path.read_bytes() == before, request
    assert limited.ask(messages.Objects(vm="vm"))["objects"][0]["name"] == "root"
    answer = limited.ask(messages.Explain(request=messages.Change(vm="vm", set={"memory": "1G"}).to_body()))
    assert not answer["allowed"]
    (rule,) = [row for row in answer["rules"] if not row["ok"]]
    assert (rule["rule"], rule["asked"], rule["limit"], rule["nearest"]) == ("memory_max", "1G", "64M", "64M")


def test_a_definition_of_a_newer_version_is_shown_and_neither_booted_nor_changed(limited: Session) -> None:
    limited.ask(messages.New(vm="vm", image="echo", memory=32))
    (path,) = Path(limited.layout.vms).glob("*/vm/vm.toml")
    text = "version = 2\n" + path.read_text() + "[tpm]\nversion = 2\n"
    path.write_text(text)
    limited.kill_broker()
    limited.start_broker()
    answer = limited.ask(messages.Info(vm="vm", toml=True))
    assert (answer["toml"], answer["memory"], answer["state"]) == (text, 32, "failed")
    for request in (messages.Boot(vm="vm"), messages.Change(vm="vm", set={"memory": "16M"})):
        with pytest.raises(ReportedError, match="newer version"):
            limited.ask(request)
    assert path.read_text() == text


def test_a_run_that_is_refused_leaves_no_vm(limited: Session) -> None:
    """`kvm …` over a limit, or with an object that is not there: told why, and nothing stays."""
    large = '[memory]\nsize = "128M"\n'
    empty = '[memory]\nsize = "32M"\n[[disk]]\npath = "shelf:none"\n'
    for text, code in ((large, "over-limit"), (empty, "no-such-object")):
        with pytest.raises(ReportedError) as caught:
            limited.ask(messages.Define(vm="kvm", text=text, new=True, once=True))
        assert caught.value.code == code
        assert limited.ask(messages.List())["vms"] == []


def test_silent_guests_give_their_places_back_without_using_a_cpu(layout: Layout) -> None:
    """F15: four of them in turn on one place, then one that speaks; each would have kept the place for a minute."""
    halt_image(layout)
    echo_image(layout)
    Path(layout.policy).write_text('[host]\naccel = "tcg"\nboots_at_once = 1\n')
    names = ["h0", "h1", "h2", "h3", "echo"]
    with Session(layout) as session:
        for name in names:
            session.ask(messages.New(vm=name, image=name if name == "echo" else "halt", memory=16))
        with session.client() as client:
            for name in names:
                client.send(messages.Boot(vm=name))
            answers = [client.receive()[0]["name"] for _ in names]
        assert answers == names, "in the order in which they were asked for"
        spent = [cpu_seconds(session.ask(messages.Info(vm=name))["pid"]) for name in names[:-1]]
        assert max(spent) < SILENT_CPU / 2, spent
