"""A host whose account database is slow or silent: a real broker in system mode, with accounts of its own in a mount namespace.

Its accounts helper is stopped by a signal, as one that waits for a directory server does not move either.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.session import Client, Session
from vmshell import wire
from vmshell.broker.services.accounts import LOOK
from vmshell.broker.services.accounts_helper import PATIENCE
from vmshell.errors import VmshellError
from vmshell.installed import PACKAGE_DIR
from vmshell.layout import STATE_VERSION, Layout
from vmshell.messages import List, Whoami

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="plays several users"),
]
UIDS = {"alice": 31001, "bob": 31002, "carol": 31003, "dave": 31004}
MEMBERS = ("alice", "bob", "carol")
BIND = 'mount --bind "$1/passwd" /etc/passwd; mount --bind "$1/group" /etc/group; shift; exec "$@"'


class Crowd(Session):
    """A broker for several users, who are accounts in files of the test's own."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        super().__init__(layout, "unshare", "--mount", "sh", "-ec", BIND, "sh", str(folder))
        self.folder = folder
        self.set_accounts(UIDS, MEMBERS)

    def set_accounts(self, uids: dict[str, int], members: tuple[str, ...]) -> None:
        """Change the files in place: they are mounted as they are."""
        lines = [f"{name}:x:{uid}:{uid}::/:/bin/sh\n" for name, uid in {"root": 0, "vmshell-relay": 31000, **uids}.items()]
        (self.folder / "passwd").write_text("".join(lines))
        groups = {"root": (0, ()), "vmusers": (32000, members), **{name: (uid, ()) for name, uid in uids.items()}}
        (self.folder / "group").write_text("".join(f"{name}:x:{gid}:{','.join(of)}\n" for name, (gid, of) in groups.items()))

    def as_user(self, name: str) -> Client:
        os.seteuid(UIDS[name])
        try:
            return self.client()
        finally:
            os.seteuid(0)

    def whoami(self, name: str) -> Any:
        with self.as_user(name) as client:
            return client.ask(Whoami())["user"]

    def helper(self) -> int:
        (pid,) = self.pids("accounts")
        return pid


@pytest.fixture
def crowd(short_tmp: Path) -> Iterator[Crowd]:
    roots = {name: str(short_tmp / name) for name in ("etc", "state", "run", "log")}
    for root in roots.values():
        os.makedirs(root)
    layout = Layout(**roots, embedded=False)
    Path(layout.policy).write_text('[host]\naccel = "tcg"\ngroup = "vmusers"\n')
    Path(layout.state_mark).write_text(f"state {STATE_VERSION}\n")
    os.chmod(short_tmp, 0o755)
    running = Crowd(layout, short_tmp)
    with running:
        yield running


def refused(crowd: Crowd, name: str) -> str:
    with pytest.raises(VmshellError) as caught, crowd.as_user(name) as client:
        client.receive()
    return caught.value.code


def test_g19_a_directory_that_is_silent_stops_nobody_but_strangers(crowd: Crowd) -> None:
    assert [crowd.whoami(name) for name in ("alice", "bob")] == ["alice", "bob"]
    first = crowd.helper()
    os.kill(first, signal.SIGSTOP)
    time.sleep(2.1)  # what is known of alice and bob is no longer fresh
    with crowd.as_user("carol") as carol:
        for name in ("alice", "bob", "alice"):
            assert crowd.whoami(name) == name
        assert crowd.pids("accounts") == [first], "and carol's question is still open"
        carol.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            wire.recv(carol.sock)
        carol.sock.settimeout(60)
        with pytest.raises(VmshellError) as caught:
            carol.receive()
        assert caught.value.code == "accounts-silent"
    crowd.wait_for(lambda: crowd.pids("accounts") not in ([first], []), "another helper", 60)
    assert [crowd.whoami(name) for name in ("carol", "alice")] == ["carol", "alice"]
    assert "no answer about uid 31003 in 5 s" in crowd.errors()


def test_g19_root_is_let_in_whatever_nobody_says(crowd: Crowd) -> None:
    os.kill(crowd.helper(), signal.SIGSTOP)
    with crowd.client() as root:
        assert root.ask(List(all=True))["vms"] == []


def test_g19_a_helper_that_is_killed_is_there_again_with_the_next_question(crowd: Crowd) -> None:
    for name in ("alice", "bob", "carol"):
        os.kill(crowd.helper(), signal.SIGKILL)
        assert crowd.whoami(name) == name
        crowd.wait_for(lambda: len(crowd.pids("accounts")) == 1, "one helper", 60)


def test_g19_a_broker_that_is_killed_leaves_no_helper_that_hangs(crowd: Crowd) -> None:
    before = crowd.helper()
    os.kill(before, signal.SIGSTOP)
    crowd.kill_broker()
    crowd.wait_for(lambda: crowd.pids("accounts") == [], "the helper to end", 60)


def start_without_helper(crowd: Crowd, *known: str) -> None:
    """Another broker, that remembers *known*: in its namespace the folder of the helper's code is empty."""
    saved = Path(crowd.layout.broker_run, "accounts.json")
    crowd.wait_for(
        lambda: saved.exists() and all(f'["user", "{name}"' in saved.read_text() for name in known), "it to be kept", 60
    )
    crowd.kill_broker()
    crowd.wait_for(lambda: set(crowd.pids()) <= set(crowd.pids("front")), "everything but the front to end", 60)
    crowd.wrap = (*crowd.wrap[:3], "-ec", f'mount -t tmpfs none "{PACKAGE_DIR}/accounts"; {BIND}', *crowd.wrap[5:])
    crowd.start_broker()


def test_g19_a_broker_that_is_started_in_an_outage_knows_who_was_who(crowd: Crowd) -> None:
    assert crowd.whoami("alice") == "alice"
    start_without_helper(crowd, "alice")
    assert crowd.whoami("alice") == "alice"
    assert refused(crowd, "carol") == "accounts-silent"


def test_g19_nobody_loses_a_connection_in_an_outage(crowd: Crowd) -> None:
    """Nobody is a member any more, and no helper ever says so."""
    assert [crowd.whoami(name) for name in ("alice", "bob")] == ["alice", "bob"]
    start_without_helper(crowd, "alice", "bob")
    with crowd.as_user("alice") as alice, crowd.as_user("bob") as bob:
        assert bob.ask(Whoami())["user"] == "bob"
        crowd.set_accounts({"alice": 31001}, ())
        time.sleep(3 * LOOK + PATIENCE)
        assert bob.ask(Whoami())["user"] == "bob" and alice.ask(Whoami())["user"] == "alice"


def test_d21_out_of_the_group_is_out_with_the_next_request(crowd: Crowd) -> None:
    with crowd.as_user("bob") as bob:
        assert bob.ask(Whoami())["user"] == "bob"
        crowd.set_accounts(UIDS, ("alice",))
        with pytest.raises(VmshellError) as caught:
            bob.ask(Whoami())
        assert caught.value.code in ("not-allowed", "access-ended")
        assert refused(crowd, "bob") == "not-allowed"
    crowd.set_accounts(UIDS, MEMBERS)
    assert crowd.whoami("bob") == "bob"


@pytest.mark.parametrize("gone", [False, True], ids=["left the group", "account deleted"])
def test_g18_who_is_out_loses_every_connection_unasked(crowd: Crowd, gone: bool) -> None:
    """Each hears why; nobody else hears anything."""
    with contextlib.ExitStack() as stack:
        alice = stack.enter_context(crowd.as_user("alice"))
        bobs = [stack.enter_context(crowd.as_user("bob")) for _ in range(3)]
        for client in (alice, *bobs):
            assert client.ask(Whoami())["user"] in ("alice", "bob")
        crowd.set_accounts({name: uid for name, uid in UIDS.items() if name != "bob" or not gone}, ("alice", "carol"))
        for client in bobs:
            with pytest.raises(VmshellError) as caught:
                client.receive()
            why = "the account bob is gone" if gone else "you are no longer a member of the group vmusers"
            assert (caught.value.code, str(caught.value)) == ("access-ended", f"you may no longer use vmshell here: {why}")
            assert wire.recv(client.sock) is None
        assert alice.ask(Whoami())["user"] == "alice"
    assert refused(crowd, "bob") == "not-allowed"
    assert '"event": "access-ended", "uid": 31002, "user": "bob", "connections": 3' in crowd.errors()


def test_d22_a_connection_is_its_accounts_and_not_the_next_ones(crowd: Crowd) -> None:
    """bob goes, and dave gets his uid: what bob has opened is not dave's."""
    with crowd.as_user("bob") as bob:
        assert bob.ask(Whoami())["user"] == "bob"
        crowd.set_accounts({"alice": 31001, "dave": UIDS["bob"]}, ("alice", "dave"))
        with pytest.raises(VmshellError) as caught:
            bob.ask(Whoami())
        assert caught.value.code in ("not-allowed", "access-ended")
    assert crowd.whoami("bob") == "dave"


def test_who_is_no_member_is_told_so(crowd: Crowd) -> None:
    assert refused(crowd, "dave") == "not-allowed"
