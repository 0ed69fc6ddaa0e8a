"""Addresses on disk: a line for each change; nothing is lost by a power cut, a full disk, a damaged line or an older version."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from vmshell.broker.network.addresses import WITHOUT_SUBNET, Addresses, write_old_file
from vmshell.broker.runtime import change_log
from vmshell.model.addressing import Plan
from vmshell.refusals import NoAddress, StorageFailed

PLAN = Plan("10.77.0.0/16", "", 24)
ALICE = (1001, "alice")


@pytest.fixture
def path(tmp_path: Path, unsynced: None) -> str:
    return str(tmp_path / "net/addresses.json")


def opened(path: str, plan: Plan = PLAN) -> Addresses:
    made = Addresses(path, plan)
    made.load()
    return made


def log(path: str) -> Path:
    return Path(path).with_suffix(".log")


def card(addresses: Addresses, number: int, owner: tuple[int, str] = ALICE) -> tuple[int, int]:
    segment = addresses.segment("users", owner, subnet=True)
    return segment, addresses.host("users", segment, number, 0)


def state(addresses: Addresses) -> Any:
    cards = {segment: cards.hosts for segment, cards in addresses._hosts.items()}
    return addresses._segments, cards, addresses._private, addresses._count


def test_a_change_adds_a_line_however_many_there_are(path: str) -> None:
    addresses = opened(path)
    for number in range(1, 201):
        card(addresses, number)
    before = log(path).read_bytes()
    card(addresses, 201)
    after = log(path).read_bytes()
    assert after.startswith(before) and after.count(b"\n") == before.count(b"\n") + 1
    assert state(opened(path)) == state(addresses)


def test_whatever_happens_the_file_says_what_is_believed(path: str) -> None:
    """Also across the file's being written anew, and with pools that become others."""
    rng = random.Random(20261128)
    addresses = opened(path)
    for _ in range(4000):
        number = rng.randrange(1, 60)
        try:
            if rng.random() < 0.4:
                addresses.release(number)
            elif rng.random() < 0.1:
                addresses.segment(f"#br{rng.randrange(3)}", None, subnet=False)
            else:
                card(addresses, number, (1000 + number % 7, "x"))
        except NoAddress:
            pass
        if rng.random() < 0.01:
            addresses = opened(path, rng.choice([PLAN, Plan("10.77.0.0/24", "", 28), Plan("10.77.0.0/22", "", 24)]))
    assert not addresses.damaged and state(opened(path, addresses.plan)) == state(addresses)
    taken = [host for cards in addresses._hosts.values() for host in cards.hosts.values()]
    assert len(taken) == sum(len(cards.taken) for cards in addresses._hosts.values())
    assert log(path).read_bytes().count(b"\n") <= 2 * addresses._count + change_log.ANEW + 2, "it does not grow for ever"
    assert len(addresses._free[True]) <= 70


def test_the_lowest_segment_that_is_free_is_given(path: str) -> None:
    addresses = opened(path)
    given = [card(addresses, number, (number, "x"))[0] for number in range(1, 6)]
    assert given == [0, 1, 2, 3, 4]
    for number in (4, 2):
        addresses.release(number)
    assert opened(path).segment("users", (9, "x"), subnet=True) == 1
    assert [addresses.segment("users", (uid, "x"), subnet=True) for uid in (9, 10, 11)] == [1, 3, 5]
    assert addresses.segment("#br0", None, subnet=False) == WITHOUT_SUBNET


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_power_cut_tore_never_counted(path: str, cut: int) -> None:
    addresses = opened(path)
    card(addresses, 1)
    whole = log(path).read_bytes()
    card(addresses, 2)
    torn = log(path).read_bytes()[:-cut]
    log(path).write_bytes(torn)
    again = opened(path)
    assert again.known_host(0, 1, 0) is not None and again.known_host(0, 2, 0) is None and not again.damaged
    card(again, 3)
    assert log(path).read_bytes().startswith(whole) and state(opened(path)) == state(again)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_what_a_full_disk_did_not_take_is_not_there(path: str, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    addresses = opened(path)
    card(addresses, 1)
    before, descriptors = state(opened(path)), os.listdir("/proc/self/fd")

    def full(*arguments: Any) -> int:
        if call == "pwrite":
            real_write(arguments[0], arguments[1][:7], arguments[2])  # half of it fits
        raise OSError(errno.ENOSPC, "No space left on device")

    real_write = os.pwrite
    with monkeypatch.context() as trouble:
        trouble.setattr(os, call, full)
        with pytest.raises(StorageFailed, match="the disk is full"):
            addresses.host("users", 0, 2, 0)
        with pytest.raises(StorageFailed, match="the disk is full"):
            addresses.release(1)
    assert state(addresses) == before and os.listdir("/proc/self/fd") == descriptors
    card(addresses, 3)
    assert state(opened(path)) == state(addresses)


DAMAGE = [
    b"x\n",
    b"{}\n",
    b"[]\n",
    b"[1.5]\n",
    b'["nonsense", 1]\n',
    b'["segment", "users/x/y", 1]\n',
    b'["segment", 1, 1]\n',
    b'["segment", "a"]\n',
    b'["segment", "a", -1]\n',
    b'["card", 0, 1, 1]\n',
    b'["card", 0, "9/0", 2]\n',  # that address is VM 1's
    b'["card", 0, "x", 5]\n',
    b"\xff\n",
    b"[" * 3000 + b"\n",
    b"x" * 5000 + b"\n",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_costs_nobody_the_address_he_has_and_gives_none_out(path: str, damage: bytes) -> None:
    addresses = opened(path)
    card(addresses, 1)
    text = log(path).read_bytes() + damage
    log(path).write_bytes(text)
    again = opened(path)
    assert again.damaged and card(again, 1) == (0, 2)
    for change in (lambda: card(again, 5), lambda: again.release(1), lambda: again.segment("other", None, subnet=True)):
        with pytest.raises(StorageFailed, match="the list of addresses cannot be used"):
            change()
    assert log(path).read_bytes() == text, "it is the administrator's to look at"


def test_the_old_file_is_taken_over_whole_and_once(path: str) -> None:
    cards = {str(segment): {f"{number}/0": number + 2 for number in range(200)} for segment in range(200)}
    segments = {f"users/{2000 + segment}/u{segment}": segment for segment in range(200)}
    os.makedirs(os.path.dirname(path))
    Path(path).write_text(json.dumps({"version": 1, "segments": segments, "cards": cards}, indent=1))
    assert os.path.getsize(path) > 1 << 19
    addresses = opened(path)
    assert not addresses.damaged and not os.path.exists(path)
    assert addresses._segments == segments and addresses.known_host(199, 199, 0) == 201
    assert state(opened(path)) == state(addresses)
    Path(path).write_text("a broker that was killed in between leaves both")
    assert state(opened(path)) == state(addresses) and not os.path.exists(path)


def test_an_old_file_that_cannot_be_written_anew_stays(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(os.path.dirname(path))
    Path(path).write_text(json.dumps({"version": 1, "segments": {"users/1001/alice": 4}, "cards": {"4": {"1/0": 7}}}))

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as trouble:
        trouble.setattr(os, "fsync", full)
        first = opened(path)
    assert first.known_host(4, 1, 0) == 7 and first.damaged
    second = opened(path)
    assert not second.damaged and card(second, 1) == (4, 7)


def test_the_older_version_gets_its_list_back(path: str) -> None:
    """As `etc/migrate.sh back` has it written: an older broker, and this one after it, know every address again."""
    addresses = opened(path)
    for number in (1, 2, 3):
        card(addresses, number)
    addresses.release(2)
    write_old_file(path)
    before = state(addresses)
    log(path).unlink()
    assert state(opened(path))[:3] == before[:3]
    assert not Path(path).exists(), "taken over"


def test_a_damaged_log_is_not_handed_back_in_part(path: str) -> None:
    card(opened(path), 1)
    log(path).write_bytes(log(path).read_bytes() + b"?\n")
    with pytest.raises(StorageFailed, match="cannot be read"):
        write_old_file(path)
    assert not Path(path).exists()
