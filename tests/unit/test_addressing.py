"""Addresses from numbers: every one in its own subnet, none twice; and account names in DNS, where no two may be one."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from vmshell.model.addressing import FIRST_HOST, LABEL_MAX, Plan, label
from vmshell.names import NAME_CHARS


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    length = draw(st.integers(8, 28))
    prefix = draw(st.integers(max(9, length + 1), 30))
    pool4 = ipaddress.IPv4Network((draw(st.integers(1, 223)) << 24, 8))
    pool4 = next(pool4.subnets(new_prefix=length))
    pool6 = draw(st.sampled_from(["", "fd12:3456:789a::/48", "fd00::/56", "2001:db8::/32"]))
    return Plan(str(pool4), pool6, prefix)


@st.composite
def placed(draw: st.DrawFn) -> tuple[Plan, list[tuple[int, int]]]:
    """A plan, and places of two cards in it: the first and the last ones as well."""
    plan = draw(plans())
    segments = st.integers(0, plan.segments - 1) | st.sampled_from([0, plan.segments - 1])
    hosts = st.integers(FIRST_HOST, FIRST_HOST + plan.hosts - 1) | st.sampled_from([FIRST_HOST, FIRST_HOST + plan.hosts - 1])
    return plan, draw(st.lists(st.tuples(segments, hosts), min_size=2, max_size=2))


def test_numbers_are_places() -> None:
    plan = Plan("10.77.0.0/16", "fd12:3456:789a::/48", 24)
    assert (plan.segments, plan.hosts) == (256, 253)
    assert (str(plan.subnet4(3)), plan.gateway4(3), plan.address4(3, 2)) == ("10.77.3.0/24", "10.77.3.1/24", "10.77.3.2")
    assert (plan.gateway6(3), plan.address6(3, 0x1F)) == ("fd12:3456:789a:3::1/64", "fd12:3456:789a:3::1f")
    assert (str(plan.subnet6(0x1F)), plan.address4(255, 254)) == ("fd12:3456:789a:1f::/64", "10.77.255.254")
    small = Plan("192.168.4.0/28", "", 30)
    assert (small.segments, small.hosts) == (4, 1)
    assert (small.address4(3, 2), small.gateway4(3)) == ("192.168.4.14", "192.168.4.13/30")
    assert small.subnet6(0) is None and small.gateway6(0) == small.address6(0, 2) == ""


def test_there_are_as_many_segments_as_the_smaller_pool_has() -> None:
    assert Plan("10.0.0.0/8", "fd00::/56", 24).segments == 256
    assert Plan("10.0.0.0/24", "fd00::/48", 26).segments == 4


@given(placed())
def test_every_address_is_in_its_subnet_and_is_nobody_elses(found: tuple[Plan, list[tuple[int, int]]]) -> None:
    plan, places = found
    for segment, host in places:
        subnet, address = plan.subnet4(segment), ipaddress.IPv4Address(plan.address4(segment, host))
        gateway = ipaddress.IPv4Interface(plan.gateway4(segment))
        assert gateway.network == subnet and address in subnet
        assert address not in (gateway.ip, subnet.network_address, subnet.broadcast_address)
        six, address6 = plan.subnet6(segment), plan.address6(segment, host)
        assert (six is None) == (address6 == "") == (plan.gateway6(segment) == "")
        if six is not None:
            gateway6 = ipaddress.IPv6Interface(plan.gateway6(segment))
            assert gateway6.network == six and ipaddress.IPv6Address(address6) in six
            assert ipaddress.IPv6Address(address6) != gateway6.ip
    (one, other), addresses = places, [(plan.address4(*place), plan.address6(*place)) for place in places]
    assert (addresses[0][0] == addresses[1][0]) == (one == other)
    assert not addresses[0][1] or (addresses[0][1] == addresses[1][1]) == (one == other)


@given(plans())
def test_the_segments_fill_the_pool_and_go_no_further(plan: Plan) -> None:
    first, last = plan.subnet4(0), plan.subnet4(plan.segments - 1)
    whole = ipaddress.IPv4Network(f"{first.network_address}/{first.prefixlen - (plan.segments - 1).bit_length()}")
    assert last.broadcast_address == whole.broadcast_address and first.subnet_of(whole)


def test_small_plans_have_all_their_addresses_once() -> None:
    plan = Plan("172.16.9.0/26", "fd00::/56", 28)
    places = [(segment, host) for segment in range(plan.segments) for host in range(FIRST_HOST, FIRST_HOST + plan.hosts)]
    for address in (plan.address4, plan.address6):
        assert len({address(*place) for place in places}) == len(places) == 4 * 13


# --- accounts in DNS --------------------------------------------------------------------------------------------------


def test_an_account_is_its_name_or_its_uid() -> None:
    rows = {
        "alice": "alice", "web-2": "web-2", "u": "u", "u2b": "u2b", "a" * 63: "a" * 63,
        "Alice": "u7", "bob.b": "u7", "DOM\\vm": "u7", "svc_db": "u7", "7up": "u7", "-x": "u7", "x-": "u7", "jürgen": "u7",
        "a" * 64: "u7", "": "u7", "u1000": "u7", "u7": "u7", "u007": "u7", "a\n": "u7", "u٧": "u7",
    }  # fmt: skip
    assert {owner: label(owner, 7) for owner in rows} == rows


# As many as can be that look like a uid's label.
OWNERS = st.text(st.sampled_from("u019aA-._é"), max_size=5) | st.integers(0, 20).map(lambda uid: f"u{uid}") | st.text(max_size=80)


@given(OWNERS, st.integers(0, 20), OWNERS, st.integers(0, 20))
def test_no_two_accounts_have_the_same_label(one: str, uid: int, other: str, other_uid: int) -> None:
    if one != other and uid != other_uid:
        assert label(one, uid) != label(other, other_uid)


@given(OWNERS, st.integers(0, (1 << 32) - 2))
def test_it_is_always_a_label(owner: str, uid: int) -> None:
    made = label(owner, uid)
    assert 0 < len(made) <= LABEL_MAX and NAME_CHARS.issuperset(made) and not made.startswith("-") and not made.endswith("-")
    assert made in (owner, f"u{uid}")
