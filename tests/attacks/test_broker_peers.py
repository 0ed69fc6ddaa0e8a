"""Who the broker takes a peer for: the kernel's word and nothing else. Rows D09, D11, D12, D21, D29, A37."""

from __future__ import annotations

import json
import textwrap
import time

import pytest

from tests.host.machine import Host

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

# A protocol client written from scratch (A37): it has exactly the rights of the uid that connects.
CLIENT = textwrap.dedent(
    """
    import json, os, socket, sys
    become = int(sys.argv[1])
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect("/run/vmshell/broker.sock")
    if become >= 0:
        os.setgid(become); os.setuid(become)
    for text in sys.argv[2:]:
        try:
            sock.send(text.encode())
            answer = sock.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            answer = sock.recv(65536)  # refused at accept: what it said then is still there
        print(answer.decode())
    """
)
WHOAMI = '{"id":1,"verb":"whoami"}'


def ask(host: Host, prefix: list[str], *requests: str, become: int = -1) -> list[dict[str, object]]:
    """Send packets from a process started by *prefix*; the answers, or nothing if it could not even connect."""
    done = host.exec(*prefix, "/usr/bin/python3", "-IS", "-c", CLIENT, str(become), *requests, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]


def as_user(user: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"]


def test_A37_a_client_from_scratch_has_the_same_rights(host: Host) -> None:
    (answer,) = ask(host, as_user("alice"), WHOAMI)
    assert answer["ok"]["user"] == "alice"  # type: ignore[index]
    assert answer["ok"]["admin"] is False  # type: ignore[index]


def test_D11_root_of_a_user_namespace_is_still_its_outer_uid(host: Host) -> None:
    (answer,) = ask(host, [*as_user("alice"), "unshare", "--user", "--map-root-user"], WHOAMI)
    assert answer["ok"]["user"] == "alice"  # type: ignore[index]
    assert answer["ok"]["admin"] is False  # type: ignore[index]


def test_D11_who_connected_counts_not_what_it_became(host: Host) -> None:
    """The documented price of SO_PEERCRED: a root that connects and then drops keeps root's rights on that connection."""
    (answer,) = ask(host, [], WHOAMI, become=host.uid("alice"))
    assert answer["ok"]["user"] == "root"  # type: ignore[index]


def test_D12_a_name_in_the_message_is_refused(host: Host) -> None:
    (answer,) = ask(host, as_user("alice"), '{"id":1,"verb":"whoami","user":"root"}')
    assert answer["error"]["code"] == "bad-value"  # type: ignore[index]


def test_D29_what_is_an_administrators(host: Host) -> None:
    asked = {
        '{"id":1,"verb":"list","all":true}': "vms",
        '{"id":1,"verb":"image-users","images":["demo"]}': "images",
        '{"id":1,"verb":"owned","uids":[0]}': "owned",
    }
    for request, key in asked.items():
        (answer,) = ask(host, as_user("alice"), request)
        assert answer["error"]["code"] == "not-allowed"  # type: ignore[index]
        (answer,) = ask(host, [], request)
        assert key in answer["ok"]  # type: ignore[operator]


def test_D09_one_users_connections_leave_room_for_others(host: Host) -> None:
    hoard = textwrap.dedent(
        """
        import socket, time
        held = []
        for _ in range(200):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            sock.connect("/run/vmshell/broker.sock")
            held.append(sock)
        time.sleep(300)
        """
    )
    host.sh(f"systemd-run --quiet --unit=hoard --uid=alice --gid=vmusers /usr/bin/python3 -IS -c '{hoard}'")
    try:
        deadline = time.monotonic() + 90
        while "ok" in ask(host, as_user("alice"), WHOAMI)[0]:
            assert time.monotonic() < deadline, host.exec("systemctl", "status", "hoard", check=False).stdout
        (answer,) = ask(host, as_user("alice"), WHOAMI)
        assert answer["error"]["code"] == "too-many"  # type: ignore[index]
        (answer,) = ask(host, as_user("bob"), WHOAMI)
        assert answer["ok"]["user"] == "bob"  # type: ignore[index]
    finally:
        host.exec("systemctl", "stop", "hoard", check=False)


def test_D21_out_of_the_group_is_out_of_the_service(host: Host) -> None:
    """Membership is looked up at each connection: a session that still carries the group in its credentials does not help."""
    held = [
        "setpriv",
        "--reuid=bob",
        "--regid=bob",
        f"--groups={host.exec('getent', 'group', 'vmusers').stdout.split(':')[2]}",
        "--",
    ]
    assert "ok" in ask(host, held, WHOAMI)[0]
    host.exec("gpasswd", "-d", "bob", "vmusers")
    try:
        (answer,) = ask(host, held, WHOAMI)
        assert answer["error"]["code"] == "not-allowed"  # type: ignore[index]
    finally:
        host.exec("gpasswd", "-a", "bob", "vmusers")
    assert "ok" in ask(host, held, WHOAMI)[0]
