"""Session mode's way out: a guest behind passt is reached by its forward and by `connect`, and reaches no loopback of ours."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.consoles import Viewer
from tests.images import install_images
from tests.session import Session
from vmshell import messages
from vmshell.broker.host.processes import children, start_ticks
from vmshell.broker.network import passt
from vmshell.layout import Layout
from vmshell.refusals import ReportedError

pytestmark = [pytest.mark.vm, pytest.mark.timeout(400)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def session(layout: Layout) -> Iterator[Session]:
    if not passt.available():
        pytest.skip("passt is not installed")
    install_images(layout)
    os.makedirs(layout.etc, exist_ok=True)
    Path(layout.policy).write_text('[host]\naccel = "tcg"\n')
    with Session(layout) as session:
        yield session


def login(viewer: Viewer) -> None:
    viewer.wait_output("login:", 240)
    viewer.type("root\r")
    viewer.wait_output("assword:")
    viewer.type("demo\r")
    viewer.wait_output("# ")


def test_out_by_passt_and_in_by_a_forward(session: Session) -> None:
    port, secret = free_port(), socket.create_server(("127.0.0.1", 0))
    session.ask(messages.New(vm="web1", image="demo", memory=128))
    session.ask(messages.Change(vm="web1", set={"net0.forward": f"tcp:{port}:80"}))
    with session.client() as client:
        _, fds = client.ask_fds(messages.Boot(vm="web1", console=True))
    viewer = Viewer(fds)
    login(viewer)
    viewer.type("for i in $(seq 60); do ip addr show eth0 | grep -q 'inet ' && break; sleep 1; done; echo go''t-it\r")
    viewer.wait_output("got-it", 120)
    viewer.type("mkdir -p /w; echo from the guest >/w/index.html; httpd -h /w; echo ser''ves\r")
    viewer.wait_output("serves")

    # Through the forward, and through `connect`, which finds it.
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        assert b"from the guest" in fetched(sock)
    answer = session.ask(messages.Connect(vm="web1", port=80))
    assert (answer["address"], answer["port"]) == ("127.0.0.1", port)
    with socket.create_connection((answer["address"], answer["port"]), 60) as sock:
        assert b"from the guest" in fetched(sock)
    with pytest.raises(ReportedError, match="no port leads there: set web1 net0.forward=tcp:10022:22"):
        session.ask(messages.Connect(vm="web1", port=22))

    # B20: neither by the gateway's address nor by its own does the guest reach what listens on the host's loopback.
    reached: list[bool] = []
    listener = threading.Thread(target=lambda: reached.append(accepts(secret)), daemon=True)
    listener.start()
    inner = secret.getsockname()[1]
    viewer.type(
        f"for to in $(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p') 127.0.0.1; do "
        f"nc -w 3 $to {inner} </dev/null && echo in''side; done; echo tri''ed\r"
    )
    viewer.wait_output("tried", 60)
    assert b"inside" not in viewer.output
    secret.close()
    listener.join(10)
    assert reached in ([], [False])

    # A broker that starts again still knows the way.
    assert session.broker is not None
    (frame_filter,) = (
        pid for pid in children(session.broker.pid) if b"framefilter" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    )
    session.kill_broker()
    session.start_broker()
    assert session.ask(messages.Connect(vm="web1", port=80))["port"] == port

    # passt goes with its QEMU, and the frame filter between them.
    assert start_ticks(frame_filter)
    session.ask(messages.Kill(vm="web1"))
    session.wait_for(lambda: not passts(port) and not start_ticks(frame_filter), "passt and the sieve to end", 60)
    viewer.close()

    # A port that somebody else has by now would lead whoever asks for web1 to them.
    taken = pytest.raises(ReportedError, match=f"port {port} of this host cannot lead to the guest")
    with socket.create_server(("127.0.0.1", port)), taken:
        session.ask(messages.Boot(vm="web1"))
    assert session.ask(messages.Boot(vm="web1"))["state"] == "running"

    # And one that has ended before its QEMU has left the port to anybody.
    assert session.ask(messages.Connect(vm="web1", port=80))["port"] == port
    before = session.errors().count("passt-ended")
    for pid in passts(port):
        os.kill(int(pid), signal.SIGKILL)
    session.wait_for(lambda: session.errors().count("passt-ended") > before, "the end of passt to be heard", 60)
    session.wait_for(lambda: "framefilter-ended" in session.errors(), "the end of the frame filter to be heard", 60)
    with pytest.raises(ReportedError, match="no passt leads to it: boot it again"):
        session.ask(messages.Connect(vm="web1", port=80))


def fetched(sock: socket.socket) -> bytes:
    sock.settimeout(60)
    sock.sendall(b"GET /index.html HTTP/1.0\r\n\r\n")
    data = b""
    while part := sock.recv(4096):
        data += part
    return data


def accepts(listener: socket.socket) -> bool:
    listener.settimeout(20)
    try:
        listener.accept()
    except OSError:
        return False
    return True


def passts(port: int) -> list[str]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0].endswith(b"passt") and any(word.startswith(f"127.0.0.1/{port}:".encode()) for word in words):
                found.append(entry)
    return found


def test_without_passt_a_session_says_so(layout: Layout) -> None:
    """Its guests have QEMU's own network, which leads nowhere; `version` names the cure."""
    with Session(layout) as session:
        lacks = " ".join(session.ask(messages.Version())["lacks"])
    assert ("apt-get install passt" in lacks) is (shutil.which("passt") is None)
