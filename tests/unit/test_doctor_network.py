"""What doctor makes of nft's listing and of an sshd that forwards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmshell.admin import doctor, doctor_network, findings
from vmshell.admin.verbs import Arguments, Context
from vmshell.layout import Layout

Capture = pytest.CaptureFixture[str]

FORWARDS = """\
forcecommand /usr/local/bin/vmshell
disableforwarding no
allowtcpforwarding local
allowstreamlocalforwarding no
allowagentforwarding no
gatewayports no
x11forwarding no
permittunnel no
permituserrc no
permituserenvironment no
authorizedkeysfile /etc/ssh/vmshell-keys/%u
acceptenv none
"""


def test_sshd_may_forward_only_for_sockets_that_are_confined() -> None:
    assert list(doctor.sshd_problems(FORWARDS, confined=True)) == []
    assert list(doctor.sshd_problems(FORWARDS)) == ["disableforwarding no (should be yes)"]


@pytest.mark.parametrize("key", doctor.SSHD_FORWARDING)
def test_every_setting_of_forwarding_counts(key: str) -> None:
    line = next(line for line in FORWARDS.splitlines() if line.startswith(f"{key} "))
    wider = FORWARDS.replace(line, f"{key} all")
    assert [problem for problem in doctor.sshd_problems(wider, confined=True) if problem.startswith(key)]
    assert list(doctor.sshd_problems(FORWARDS.replace(f"{line}\n", ""), confined=True))


def chain(family: str, table: str, hook: str, policy: str) -> dict[str, object]:
    return {"chain": {"family": family, "table": table, "name": hook.upper(), "hook": hook, "policy": policy}}


def rule(table: str, interface: str) -> dict[str, object]:
    match = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": interface}}
    return {"rule": {"family": "ip", "table": table, "chain": "FORWARD", "expr": [match, {"accept": None}]}}


def listing(*items: dict[str, object]) -> str:
    return json.dumps({"nftables": [{"metainfo": {"version": "1.0.6"}}, *items]})


def test_closed_chains_of_others() -> None:
    closed = chain("ip", "filter", "forward", "drop")
    name = ["nftables chain FORWARD of table ip filter"]
    assert doctor_network.closed_chains(listing(closed), ipv6=False) == name
    assert doctor_network.closed_chains(listing(closed, rule("filter", "docker0")), ipv6=False) == name
    assert doctor_network.closed_chains(listing(closed, rule("filter", "vtb*")), ipv6=False) == []
    assert doctor_network.closed_chains(listing(closed, rule("vmshell", "vtb*")), ipv6=False) == name
    six = listing(chain("ip6", "filter", "forward", "drop"))
    assert doctor_network.closed_chains(six, ipv6=True) == ["nftables chain FORWARD of table ip6 filter"]
    assert doctor_network.closed_chains(six, ipv6=False) == []


def jump(chain: str, target: str) -> dict[str, object]:
    return {"rule": {"family": "ip", "table": "filter", "chain": chain, "expr": [{"jump": {"target": target}}]}}


def test_a_rule_counts_for_the_chain_that_leads_to_it() -> None:
    """As ufw has it: a rule for what comes in opens nothing for what passes through."""
    items = [chain("ip", "filter", hook, "drop") for hook in ("input", "forward")]
    ways = (("INPUT", "before"), ("before", "user-input"), ("FORWARD", "user-forward"), ("user-forward", "FORWARD"))
    items += [jump(*way) for way in ways]
    items.append({"rule": {"family": "ip", "table": "filter", "chain": "user-input", "expr": [{"match": {"right": "vtb*"}}]}})
    assert doctor_network.closed_chains(listing(*items), ipv6=False) == ["nftables chain FORWARD of table ip filter"]


@pytest.mark.parametrize(
    "harmless",
    [
        chain("ip", "filter", "forward", "accept"),
        chain("ip", "filter", "output", "drop"),
        chain("bridge", "filter", "forward", "drop"),
        chain("inet", "vmshell", "forward", "drop"),
        {"chain": {"family": "ip", "table": "filter", "name": "mine"}},
    ],
)
def test_chains_that_are_not_in_the_way(harmless: dict[str, object]) -> None:
    assert doctor_network.closed_chains(listing(harmless), ipv6=False) == []


@pytest.mark.parametrize("text", ["", "nft: not found", "[]", '{"nftables": []}'])
def test_a_listing_that_is_none(text: str) -> None:
    assert doctor_network.closed_chains(text, ipv6=False) == [] and not doctor_network.opened(text)


def test_every_check_runs_where_programs_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Without nft, systemctl and everything else: findings, and none that says OK of what nobody could look at."""
    monkeypatch.setitem(findings.ENV, "PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    isdir = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system" or isdir(path))
    places = {name: str(tmp_path / name) for name in ("etc", "state", "run", "log")}
    assert doctor.run(Context(Layout(**places, embedded=False)), Arguments()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line[6:].startswith(doctor.CHECKS[-1][0]) for line in lines)
    assert any(line.startswith("WARN  routing") and "there is no nft" in line for line in lines)
    assert not any(line.startswith("OK    routing") for line in lines)
    assert any(line.startswith("FAIL  units") and "vmshell-broker.socket is unknown" in line for line in lines)
