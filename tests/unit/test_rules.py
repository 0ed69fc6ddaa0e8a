"""The packet filter as text: what is written was parsed first, and changes lead where the whole would have led."""

from __future__ import annotations

import random
import subprocess
from typing import Any

import pytest

from tapnet import rules
from tapnet.state import State
from tests.process.tapnets import Namespace, unable
from vmshell.errors import BadValue
from vmshell.messages import Opening, Port, Segment, Settings


def state(*ports: Port, **openings: list[Opening]) -> State:
    made = State(settings=Settings(pool4="10.77.0.0/16", pool6="fd77::/48"), confined=frozenset({1001, 1002}))
    made.segments = {
        1: Segment(segment=1, gateway4="10.77.1.1/24", gateway6="fd77:0:0:1::1/64", outside="internet"),
        2: Segment(segment=2, gateway4="10.77.2.1/24", kind="service"),
        3: Segment(segment=3, kind="bridged", bridge="br0"),
    }
    made.ports = {(port.number, port.nic): port for port in ports}
    return made


def port(number: int, segment: int = 1, **more: Any) -> Port:
    own: dict[str, Any] = {"mac": f"06:00:00:00:00:{number:02x}", "owner": 1000 + number}
    own |= {} if segment == 3 else {"address4": f"10.77.{segment}.{number + 1}"}
    return Port(number=number, nic=0, segment=segment, **{**own, **more})


def some_ports() -> list[Port]:
    first = port(1, rate=8000, address6="fd77:0:0:1::2")
    return [first, port(2), port(3, 2, isolated=True), port(4, 2), port(5, 3), port(6, rate=1)]


OPENINGS = {
    (1, 0): [Opening(port=80, source="vtb000002"), Opening(port=80, host_port=8080), Opening(port=53, proto="udp", host_port=53)],
    (2, 0): [Opening(port=81, host_port=8080)],
    (4, 0): [Opening(port=5432, source="vt000003n0")],
}


def test_a_tap_that_no_set_knows_is_mute() -> None:
    text = rules.everything(state())
    assert 'iifname "vt*" jump guest' in text and text.count("iifname . ether saddr != @macs drop") == 3
    assert "elements" not in text.partition("table inet")[0], "no port, no element"


def test_what_a_port_brings() -> None:
    (mine, *_) = some_ports()
    text = rules.adding(state(mine), [mine])
    assert '"vt000001n0" . 06:00:00:00:00:01 . 10.77.1.2' in text and '"vt000001n0" . 10.77.1.2' in text
    assert "fe80::400:ff:fe00:1" in text and "fd77::1:400:ff:fe00:1" in text and "1001 . 10.77.1.2" in text
    assert "add limit bridge vmshell vt000001n0 rate over 1000 kbytes/second" in text
    assert rules.removing(state(mine), [mine]).count("delete element") == rules.adding(state(mine), [mine]).count("add element")


def test_two_that_want_one_port_of_the_host() -> None:
    """The broker refuses the second; were it not to, the first keeps it, and the filter is still a filter."""
    made = state(*some_ports())
    made.openings = OPENINGS
    assert rules.everything(made).count("tcp . 8080 :") == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("mac", "06:00:00:00:00:01; accept"), ("mac", "06:00"), ("address4", "10.77.1.2 }; flush ruleset"), ("address4", "x")],
)
def test_no_field_reaches_the_text_as_it_is(field: str, value: str) -> None:
    try:
        more: dict[str, Any] = {field: value}
        bad = port(1, **more)
    except BadValue:
        return  # the message already refuses it
    with pytest.raises(ValueError):
        rules.adding(state(bad), [bad])


@pytest.mark.parametrize("source", ['x"; drop', "a b", "", "sixteen-chars-xx", "br%d"])
def test_no_source_reaches_the_text_as_it_is(source: str) -> None:
    made = state(*some_ports())
    try:
        made.openings = {(1, 0): [Opening(port=80, source=source)]}
    except BadValue:
        return
    assert rules.opening(made) == rules.opening(state(*some_ports()))  # without a source it is the world's, by no port


@pytest.mark.skipif(bool(unable()), reason=unable() or "-")
@pytest.mark.slow  # the kernel waits a moment at each of its changes
def test_changes_lead_where_the_whole_would_have_led() -> None:
    """Ports and openings come and go a hundred times; then everything at once gives the same tables."""
    chance = random.Random(4)
    space = Namespace()

    def load(text: str) -> None:
        done = subprocess.run(space.command("nft", "-f", "-"), input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def listing() -> list[str]:
        # What a set holds is in the order in which it came.
        return sorted(part.strip().rstrip(",") for part in space.filter().replace(" = { ", "\n").replace(", ", "\n").splitlines())

    try:
        every = {(one.number, one.nic): one for one in some_ports()}
        now = state()
        load(rules.everything(now))
        for _ in range(100):
            key, before = chance.choice(list(every)), rules.shape(now)
            if key in now.ports:
                load(rules.removing(now, [now.ports.pop(key)]))
            else:
                now.ports[key] = every[key]
                load(rules.adding(now, [every[key]]))
            if rules.shape(now) != before:
                load(rules.everything(now))
            now.openings = {key: ways for key, ways in OPENINGS.items() if chance.random() < 0.5}
            load(rules.opening(now))
        by_steps = listing()
        load(rules.everything(now))
        assert listing() == by_steps
        load(rules.everything(now))  # and again, over itself
        assert listing() == by_steps
    finally:
        space.close()
