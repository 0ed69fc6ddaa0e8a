"""What doctor makes of nft's listing and of an sshd that forwards."""

from __future__ import annotations

import json

import pytest

from vmshell.admin import doctor, doctor_network

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
    assert doctor_network.closed_chains(listing(closed)) == name
    assert doctor_network.closed_chains(listing(closed, rule("filter", "docker0"))) == name
    assert doctor_network.closed_chains(listing(closed, rule("filter", "vtb*"))) == []
    assert doctor_network.closed_chains(listing(closed, rule("vmshell", "vtb*"))) == name


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
    assert doctor_network.closed_chains(listing(harmless)) == []


@pytest.mark.parametrize("text", ["", "nft: not found", "[]", '{"nftables": []}'])
def test_a_listing_that_is_none(text: str) -> None:
    assert doctor_network.closed_chains(text) == [] and not doctor_network.opened(text)
