"""Threat rows B01-B08 and B15-B36, as far as they are values of a definition or QEMU options: each tried in every text key.

What the wrapper makes of the options themselves is in tests/unit/test_wrapper.py; here the broker is asked, as R12 wants it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guests import echo_image
from tests.session import Session
from vmshell import messages
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.model.keys import DISK_KEYS, KEYS, NET_KEYS
from vmshell.model.values import Bool, Int, Size
from vmshell.refusals import ReportedError

ROWS = {
    "B01": "x,file=/etc/passwd,format=raw",
    "B02": "x,process=sshd",
    "B03": "-snapshot",
    "B04": 'json:{"driver":"file","filename":"/etc/passwd"}',
    "B05": "nbd:127.0.0.1:10901",
    "B06": "fat:rw:/etc",
    "B07": "blkdebug::root",
    "B08": "/dev/fdset/1",
    "B08b": "/proc/self/fd/3",
    "B15": "mon:stdio",
    "B19": "exec:id",
    "B23": "user,guestfwd=tcp:10.0.2.100:1-cmd:id",
    "B24": "tap,script=/tmp/x",
    "B25": "/etc/passwd",
    "B26": "file:/tmp/x",
    "B29": "../../../usr/lib/evil.so",
    "B31": "0.0.0.0:1,password=off",
    "B33": "drive.disk0.file=/etc/passwd",
    "B35": "vfio-pci,host=00:02.0",
    "B36": "tcg,thread=multi",
}
# The two keys whose text is a person's own; neither is ever an option's value.
FREE = {"description", "boot.cmdline"}


@pytest.fixture(scope="module")
def words() -> list[str]:
    plain = [key.name for key in KEYS.values() if not isinstance(key.kind, Bool | Int | Size)]
    disk = [f"disk0.{name}" for name, key in DISK_KEYS.items() if name != "type" and not isinstance(key.kind, Bool | Size)]
    return [*plain, *disk, *(f"net0.{name}" for name in NET_KEYS)]


@pytest.fixture
def vm(layout: Layout) -> Iterator[Session]:
    echo_image(layout)
    with Session(layout) as session:
        session.ask(messages.New(vm="vm", image="echo", memory=32))
        session.put("vm.kernel", b"kernel")
        yield session


@pytest.mark.vm
def test_b01_to_b36_hostile_values_of_every_text_key(vm: Session, words: list[str]) -> None:
    """Refused, or in no argument of the launch line but the kernel's own command line, whole and alone."""
    for row, value in ROWS.items():
        for key in words:
            request = messages.Change(vm="vm", set={key: value})
            if key not in FREE:
                with pytest.raises(ReportedError) as caught:
                    vm.ask(request)
                assert caught.value.exit_status in (1, 2, 3), (row, key, caught.value)
        vm.ask(messages.Change(vm="vm", set={"description": value, "boot.kernel": "kernel", "boot.cmdline": value}))
        argv = vm.ask(messages.LaunchLine(vm="vm"))["argv"]
        assert argv[argv.index("-append") + 1] == value, row
        assert [word for word in argv if value in word and word != argv[argv.index("-append") + 1]] == [], row


@pytest.mark.vm
def test_b25_names_that_are_no_names(vm: Session) -> None:
    """B02, B03, B04: whatever stands where a name belongs is refused before anything looks for it."""
    for value in (*ROWS.values(), "", "a" * 65, ".hidden", "a/b", "\u0430", "objects.json"):
        for request in (
            lambda value=value: messages.Define(vm=value, text="", new=True),
            lambda value=value: messages.DiskAdd(vm="vm", object=value, size=1),
            lambda value=value: messages.Drop(vm="vm", object=value),
        ):
            with pytest.raises(VmshellError) as caught:
                vm.ask(request())
            assert caught.value.exit_status in (2, 3, 4), (value, caught.value)
    left = [row["name"] for row in vm.ask(messages.Objects(vm="vm"))["objects"]]
    assert left == ["kernel", "root"]
