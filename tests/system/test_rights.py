"""Who of ours may do what on an installed host, by the kernel's word; and that `vmshell-admin doctor` sees each deviation."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.host.machine import Host
from vmshell.admin.doctor_rights import SERVICES, Service, deviations, parse_status

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

LIBDIR = "/usr/local/lib/vmshell"
DROP_IN = "/run/systemd/system/{unit}.d/99-test.conf"


def main_pid(host: Host, unit: str) -> int:
    return int(host.exec("systemctl", "show", "-P", "MainPID", unit).stdout)


def rights(host: Host) -> list[str]:
    """What doctor says of rights, a line each."""
    done = host.admin("doctor", check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stdout.splitlines() if line[6:].startswith("rights ")]


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_each_service_has_the_rights_of_the_table(host: Host, service: Service) -> None:
    text = host.exec("cat", f"/proc/{main_pid(host, service.unit)}/status").stdout
    assert list(deviations(service, host.uid(service.account), parse_status(text))) == []


def test_doctor_says_so_in_one_line(host: Host) -> None:
    (line,) = rights(host)
    assert line.startswith("OK ")


def test_nothing_of_ours_is_roots_but_the_launcher(host: Host) -> None:
    """`ps`, as a person would look."""
    rows = [row.split(None, 2) for row in host.exec("ps", "-eo", "pid,uid,args", "--no-headers").stdout.splitlines()]
    ours = [int(pid) for pid, uid, words in rows if uid == "0" and re.search(r"/vmshell/(launcher/)?__main__\.py", words)]
    assert ours == [main_pid(host, "vmshell-launcher.service")]


@pytest.fixture
def changed(host: Host, request: pytest.FixtureRequest) -> Iterator[tuple[Host, str]]:
    """A unit with a line more, and afterwards as it was."""
    unit, line = request.param
    path = DROP_IN.format(unit=unit)
    host.sh(f"mkdir -p $(dirname {path}); printf '[Service]\\n{line}\\n' >{path}")
    host.sh(f"systemctl daemon-reload; systemctl restart {unit}")
    yield host, unit
    host.sh(f"rm {path}; systemctl daemon-reload; systemctl restart {unit}")


@pytest.mark.parametrize(
    "changed",
    [
        ("vmshell-relay.service", "CapabilityBoundingSet=CAP_KILL"),
        ("vmshell-relay.service", "AmbientCapabilities=CAP_NET_ADMIN\\nCapabilityBoundingSet=CAP_NET_ADMIN"),
        ("vmshell-tapnet.service", "CapabilityBoundingSet=CAP_SYS_ADMIN"),
        ("vmshell-launcher.service", "CapabilityBoundingSet=CAP_KILL"),
        ("vmshell-names.service", "AmbientCapabilities=CAP_DAC_OVERRIDE\\nCapabilityBoundingSet=CAP_DAC_OVERRIDE"),
        ("vmshell-broker.service", "CapabilityBoundingSet=CAP_SETUID"),
    ],
    indirect=True,
    ids=lambda value: " ".join(value),
)
def test_doctor_sees_a_unit_with_more_rights(changed: tuple[Host, str]) -> None:
    host, unit = changed
    found = rights(host)
    assert any(line.startswith(f"FAIL  rights        {unit} (pid ") for line in found), found
    assert not any(line.startswith("OK ") for line in found)


def test_doctor_sees_a_process_of_ours_that_is_roots(host: Host) -> None:
    """The relay's code, started by root beside the unit; and a process under a VM's uid that kept a capability."""
    layout = "/etc/vmshell:/var/lib/vmshell:/run/other:/var/log/other:0"
    host.sh("mkdir -p /run/other /var/log/other")
    host.sh(f"systemd-run --quiet --unit=stray /usr/bin/python3 -IS {LIBDIR}/current/vmshell/__main__.py relay {layout}")
    kept = "--reuid 2100000009 --regid 2100000009 --clear-groups --inh-caps=+kill --ambient-caps=+kill"
    host.sh(f"systemd-run --quiet --unit=kept setpriv {kept} -- sleep 600")
    try:
        stray, keeper = main_pid(host, "stray"), main_pid(host, "kept")
        found = rights(host)
    finally:
        host.sh("systemctl stop stray kept; rm -r /run/other /var/log/other")
    assert f"FAIL  rights        pid {stray} is our relay and runs as root" in found
    assert any(line.startswith(f"FAIL  rights        pid {keeper} runs under uid 2100000009") for line in found), found
