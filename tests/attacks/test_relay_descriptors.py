"""N7: a hostile broker hands a real relay every kind of descriptor for every use: QEMU sees what it may have, and no other."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.qmp_speaker import QmpSpeaker
from tests.process.networld import inside
from tests.process.relays import RelayProcess, console_pipes, until
from tests.process.tapnets import Namespace, unable
from tests.process.test_relay import Qemus, boot, descriptors, layout, qemus
from tests.unit.test_descriptors import kinds
from vmshell.layout import Layout
from vmshell.messages import Attach, Forget, Order, ToRelay, Watch

__all__ = ["kinds", "layout", "qemus"]

USES: dict[str, tuple[ToRelay, set[str]]] = {
    "insert": (Order(number=1, what="insert"), {"read", "theirs-public"}),
    "display": (Order(number=1, what="display"), {"stream", "stream-other"}),
    "nic-add": (Order(number=1, what="nic-add", value=2, mac="06:02:00:00:00:01"), set()),
}


@pytest.fixture
def journal(short_tmp: Path) -> Path:
    return short_tmp / "journal"


@pytest.fixture
def relay(layout: Layout, journal: Path) -> Iterator[RelayProcess]:
    with RelayProcess(layout, journal=str(journal)) as running:
        yield running


def handed(qemu: QmpSpeaker) -> int:
    """How many descriptors QEMU has been handed."""
    return len(qemu.fds)


@pytest.mark.parametrize("use", USES)
def test_n7_a_descriptor_of_another_kind_never_reaches_qemu(
    relay: RelayProcess, qemus: Qemus, kinds: dict[str, int], journal: Path, use: str
) -> None:
    qemu, _ = boot(relay, qemus)
    message, takes = USES[use]
    before = descriptors(relay)
    for name, fd in kinds.items():
        if name not in takes:
            answer = relay.ask(message, fd)
            assert answer["error"]["code"] == "protocol", name
            assert f"the descriptor of {use} is refused: " in answer["error"]["text"], name
    assert handed(qemu) == 0
    until(lambda: descriptors(relay) == before, "the last one to be closed")
    said = journal.read_text()
    assert f"relay: {message.verb}: the descriptor of {use} is refused: no " in said and "Traceback" not in said
    for name in sorted(takes & set(kinds)):
        assert "ok" in relay.ask(message, kinds[name]), name
    assert relay.process.poll() is None


def test_n7_a_console_is_two_pipes(relay: RelayProcess, qemus: Qemus, kinds: dict[str, int], journal: Path) -> None:
    """One that is read and one that is written: the relay waits for nothing else that a viewer holds the other end of."""
    boot(relay, qemus)
    before = descriptors(relay)
    attach = Attach(number=1, uid=1001, label="alice")
    with console_pipes() as ((keys, output), _):
        for name, fd in kinds.items():
            for use, fds in {"keys": (fd, output), "output": (keys, fd)}.items():
                if name != {"keys": "pipe-read", "output": "pipe-write"}[use]:
                    answer = relay.ask(attach, *fds)
                    assert answer["error"]["code"] == "protocol", name
                    assert f"the descriptor of {use} is refused: " in answer["error"]["text"], name
    until(lambda: descriptors(relay) == before, "the last one to be closed")
    said = journal.read_text()
    assert "relay: attach: the descriptor of keys is refused: no pipe" in said and "Traceback" not in said
    assert "ok" in relay.ask(attach, kinds["pipe-read"], kinds["pipe-write"])


def test_n7_an_error_pipe_is_a_pipe(relay: RelayProcess, qemus: Qemus, kinds: dict[str, int], journal: Path) -> None:
    """QEMU's: with anything else the VM that the relay knows stays the one it was."""
    boot(relay, qemus)
    before = descriptors(relay)
    for name in sorted(set(kinds) - {"pipe-read", "pipe-write", "fifo"}):
        said = relay.ask(Watch(number=1), kinds[name])["error"]["text"]
        assert "the descriptor of stderr is refused: " in said, name
    until(lambda: descriptors(relay) == before, "the last one to be closed")
    relay.tell(Order(number=1, what="powerdown"))
    assert "the descriptor of stderr is refused" in journal.read_text()
    relay.tell(Forget(number=1))
    relay.tell(Watch(number=1), kinds["pipe-read"])


TAPS = {"vt000001n2": True, "vt000001n3": False, "vt000002n2": False, "docker0t": False}


@pytest.mark.root
@pytest.mark.skipif(bool(unable()), reason=unable() or "-")
def test_n7_a_tap_is_that_of_the_card(relay: RelayProcess, qemus: Qemus, journal: Path) -> None:
    """Neither another VM's nor another card's, which has another filter, and none of somebody else's."""
    qemu, _ = boot(relay, qemus)
    space = Namespace()
    try:
        for name, right in TAPS.items():
            fd = inside(space, tap(name))
            answer = relay.ask(USES["nic-add"][0], fd)
            os.close(fd)
            assert ("ok" in answer) is right, (name, answer)
            assert handed(qemu) == 1
        assert "the descriptor of nic-add is refused: another tap than vt000001n2" in journal.read_text()
    finally:
        space.close()


def tap(name: str) -> Callable[[], int]:
    def make() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))  # TUNSETIFF: TAP, NO_PI
        return fd

    return make
