"""What `vmshell-admin doctor` makes of /proc/PID/status, with texts of our own; tests/system/test_rights.py has the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vmshell.admin import doctor_rights
from vmshell.admin.doctor_rights import SERVICES, Service, deviations, parse_status, suspicion
from vmshell.admin.findings import FAIL, OK, WARN
from vmshell.admin.verbs import Context
from vmshell.layout import Layout
from vmshell.model.policy import HostPolicy
from vmshell.numbering import uids_of_jobs

UID = 990
VMS = range(2_100_000_000, 2_100_000_100)
LAUNCHER = ["/usr/bin/python3", "-IS", "/usr/local/lib/vmshell/current/vmshell/launcher/__main__.py"]
STARTED = ["/usr/bin/python3", "-IS", "/usr/local/lib/vmshell/vmshell/__main__.py"]
INSTALLED = "/etc/vmshell:/var/lib/vmshell:/run/vmshell:/var/log/vmshell:0"


def status(uid: int = 0, capabilities: int = 0, **changes: str) -> str:
    fields = {
        "Name": "python3",
        "Uid": "\t".join([str(uid)] * 4),
        **{f"Cap{name}": f"{capabilities:016x}" for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")},
        "NoNewPrivs": "1",
        "Seccomp": "2",
        "Seccomp_filters": "12",
        **changes,
    }
    return "".join(f"{key}:\t{value}\n" for key, value in fields.items())


def right(service: Service) -> str:
    """As the kernel shows a service that is as it should be."""
    uid = 0 if service.account == "root" else UID
    text = status(uid, sum(1 << number for number in service.capabilities))
    return text if service.filtered else text.replace("Seccomp:\t2", "Seccomp:\t0")


def problems(service: Service, text: str) -> list[str]:
    return list(deviations(service, 0 if service.account == "root" else UID, parse_status(text)))


def named(name: str) -> Service:
    return next(service for service in SERVICES if service.name == name)


def test_the_table_is_what_was_decided() -> None:
    """Issue 9: root with three capabilities, the broker with none."""
    found = {service.name: (service.account, sum(1 << number for number in service.capabilities)) for service in SERVICES}
    assert found == {
        "launcher": ("root", 0x1C0),
        "front": ("vmshell-front", 0),
        "broker": ("vmshell-broker", 0),
        "relay": ("vmshell-relay", 0),
        "tapnet": ("vmshell-tapnet", 0x1000),
        "names": ("vmshell-names", 0x3400),
    }


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_what_is_as_it_should_be(service: Service) -> None:
    assert problems(service, right(service)) == []
    # Root's capabilities are not inherited by what it starts, and nothing makes them ambient.
    assert problems(service, right(service).replace("CapInh:", "CapInh:\t0\nOld:").replace("CapAmb:", "CapAmb:\t0\nOld2:")) == []


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
@pytest.mark.parametrize("key", ["CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb"])
def test_one_capability_more_is_seen_in_every_set(service: Service, key: str) -> None:
    have = sum(1 << number for number in service.capabilities) | 1 << 21
    (problem,) = problems(service, right(service).replace(f"{key}:", f"{key}:\t{have:x}\nOld:"))
    assert key in problem and "capability 21" in problem


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("broker", "Uid:", "Uid:\t0\t0\t0\t0\nOld:", "runs under uid 0 and not 990, vmshell-broker"),
        ("broker", "Uid:", "Uid:\t990\t990\t0\t990\nOld:", "runs under uid 990, 0 and not 990"),
        ("launcher", "Uid:", "Uid:\t990\t990\t990\t990\nOld:", "and not 0, root"),
        ("launcher", "CapEff:", "CapEff:\t1ffffffffff\nOld:", "has CapEff 41 capabilities and not setgid, setuid, setpcap"),
        ("launcher", "CapBnd:", "CapBnd:\t1c1\nOld:", "has CapBnd capability 0, setgid, setuid, setpcap and not"),
        ("tapnet", "CapEff:", "CapEff:\t0\nOld:", "has CapEff no capability and not net_admin"),
        ("relay", "Seccomp:\t2", "Seccomp:\t0", "has no seccomp filter"),
        ("names", "NoNewPrivs:\t1", "NoNewPrivs:\t0", "may gain rights"),
    ],
)
def test_each_deviation_is_said(name: str, old: str, new: str, words: str) -> None:
    (problem,) = problems(named(name), right(named(name)).replace(old, new))
    assert words in problem


@pytest.mark.parametrize("text", ["", "Uid:\n", "CapEff:\tnonsense\n", "\x00\n:::\n"])
def test_what_the_kernel_does_not_say_is_no_good_sign(text: str) -> None:
    for service in SERVICES:
        assert len(problems(service, text)) >= 6


# --- the rest of the host ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "command", "words"),
    [
        (status(0), [*STARTED, "broker", INSTALLED], "is our broker and runs as root"),
        (status(0), [*STARTED, "storage", "verify"], "is our storage and runs as root"),
        (status(0), [*LAUNCHER, "/etc/vmshell/policy.toml"], "is our launcher and runs as root"),
        (status(UID, Uid="990\t0\t990\t990"), [*STARTED, "relay", INSTALLED], "is our relay"),
        (status(0), ["python3", "/usr/local/lib/vmshell-0.9/vmshell/__main__.py", "probe"], "is our probe"),
        (status(2_100_000_007, 1 << 12), ["qemu"], "runs under uid 2100000007, which is a VM's or a job's, and has net_admin"),
        (status(2_100_000_099, CapBnd="1c0"), [], "has setgid, setuid, setpcap"),
        (status(UID, Uid="0\t2100000007\t0\t0", CapEff="1"), [], "has capability 0"),
    ],
)  # fmt: skip
def test_what_has_more_rights_than_it_should(text: str, command: list[str], words: str) -> None:
    assert words in suspicion(parse_status(text), command, VMS)


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (status(0, 0x1FFFFFFFFFF), ["/usr/lib/systemd/systemd"]),
        (status(0), []),
        (status(0), [*STARTED, "auth", "1000", "login"]),
        (status(0), [*STARTED, "admin", "doctor"]),
        (status(0), [*STARTED, "shell", "--layout", INSTALLED, "explain"]),
        (status(0), STARTED),
        (status(0), [*STARTED, "broker", "/root/.config/vmshell:/root/s:/run/user/0/vmshell:/root/l:1"]),
        (status(0), [*LAUNCHER, "/root/.config/vmshell/policy.toml", "3"]),
        (status(UID), [*STARTED, "broker", INSTALLED]),
        (status(2_100_000_007), ["qemu-system-x86_64"]),
        (status(2_100_000_099), [*STARTED, "storage", "verify"]),
        (status(1000, 0x1FFFFFFFFFF), ["bash"]),
        ("", []),
    ],
)
def test_what_has_not(text: str, command: list[str]) -> None:
    assert suspicion(parse_status(text), command, VMS) == ""


def test_the_uids_are_the_policys(tmp_path: Path) -> None:
    layout = Layout(**{name: f"{tmp_path}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)
    default = HostPolicy().uid_base
    context = Context(layout)
    uids = doctor_rights._uids(context)
    assert default + 1 in uids and all(uid in uids for uid in uids_of_jobs(default)) and default - 1 not in uids
    os.makedirs(layout.etc)
    Path(layout.policy).write_text("[host]\nuid_base = 2000000000\n")
    assert 2_000_000_001 in doctor_rights._uids(context) and default not in doctor_rights._uids(context)
    Path(layout.policy).write_text("nonsense")
    assert default in doctor_rights._uids(context)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be seen as root")
@pytest.mark.parametrize(
    ("starter", "words", "kind"),
    [("__main__.py", ["broker", INSTALLED], "broker"), ("launcher/__main__.py", ["/etc/vmshell/policy.toml"], "launcher")],
)
def test_a_process_of_ours_that_stays_roots_is_found_in_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starter: str, words: list[str], kind: str
) -> None:
    """And what is on its way down, or has ended by the second look, is not."""
    monkeypatch.setattr(doctor_rights, "SECOND_LOOK", 0.05)
    path = tmp_path / "vmshell" / starter
    path.parent.mkdir(parents=True)
    path.write_text("import sys; print(flush=True); sys.stdin.read()")
    command = [sys.executable, str(path), *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        found = [finding.text for finding in doctor_rights._others(0, VMS)]
        assert f"pid {process.pid} is our {kind} and runs as root" in found
        assert not any(f"pid {process.pid} " in finding.text for finding in doctor_rights._others(process.pid, VMS))
        before = doctor_rights._look(0, VMS)
        process.stdin.close()
        process.wait(60)
    assert any(pid == process.pid for pid, _ in before)
    assert not any(f"pid {process.pid} " in finding.text for finding in doctor_rights._others(0, VMS))


def test_services_that_do_not_run_are_not_said_to_be_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout = Layout(**{name: f"{tmp_path}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)
    monkeypatch.setattr(doctor_rights, "_others", lambda launcher, uids: iter(()))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for said in ("", "0\n\n0\n\n0\n\n0\n\n0\n", "Failed to connect to bus", "1\n"):
        monkeypatch.setattr(doctor_rights, "output", lambda *argv, said=said: said)
        assert [finding.level for finding in doctor_rights.check_rights(Context(layout))] == [WARN] * len(SERVICES)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (finding,) = doctor_rights.check_rights(Context(layout))
    assert finding.level == WARN and "root" in finding.text


def test_one_line_when_all_is_well_and_one_for_each_thing_that_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout = Layout(**{name: f"{tmp_path}/{name}" for name in ("etc", "state", "run", "log")}, embedded=False)
    texts = {index + 10: right(service) for index, service in enumerate(SERVICES)}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor_rights, "_others", lambda launcher, uids: iter(()))
    monkeypatch.setattr(doctor_rights, "output", lambda *argv: "\n\n".join(map(str, texts)))
    monkeypatch.setattr(doctor_rights, "read_status", lambda pid: parse_status(texts[pid]))
    monkeypatch.setattr("pwd.getpwnam", lambda name: SimpleNamespace(pw_uid=0 if name == "root" else UID))
    assert [finding.level for finding in doctor_rights.check_rights(Context(layout))] == [OK]
    texts[12] = status(0, 0x1E1, Seccomp="0")
    found = list(doctor_rights.check_rights(Context(layout)))
    assert [finding.level for finding in found] == [FAIL] * 7
    assert all("vmshell-broker.service (pid 12)" in finding.text and "make install" in finding.cure for finding in found)
