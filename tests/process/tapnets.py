"""A real tapnet in a network namespace of its own: started, spoken to as the broker does, killed; and frames for its taps."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmshell import wire
from vmshell.installed import PACKAGE_DIR, PYTHON_FLAGS
from vmshell.layout import Layout
from vmshell.messages import Port, Segment, Settings, Settle, ToTapnet

PATIENCE = 60.0
SETTINGS = Settings(pool4="10.77.0.0/16", pool6="fd77::/48")
# What the tests ask for, and a broker may ask of tapnet.
POLICY = """\
[host]
ipv6_pool = "fd77::/48"
ssh_forwarding = true
[defaults]
forward_ports = "1024-65535"
[networks.wide]
kind = "shared"
outside = "all"
""" + "".join(
    f'[networks.{name}]\nkind = "bridged"\n{place}\n'
    for name, place in {
        **{bridge: f'bridge = "{bridge}"' for bridge in ("host0", "host9", "wire0")},
        **{f"{parent}-12": f'parent = "{parent}"\nvlan = 12' for parent in ("wire0", "wire9")},
    }.items()
)

COUNTER = itertools.count()


def unable() -> str:
    """Why this machine cannot run these tests, or nothing."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    for program in ("ip", "nft"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not os.path.exists("/dev/net/tun"):
        return "there is no /dev/net/tun"
    done = subprocess.run(["unshare", "-n", "nft", "add table bridge x"], capture_output=True, text=True)
    return f"no nftables in a network namespace: {done.stderr.strip()}" if done.returncode else ""


class Namespace:
    """A network namespace with a name; what runs in it sees nothing of the host's network."""

    def __init__(self) -> None:
        self.name = f"vms{os.getpid()}-{next(COUNTER)}"
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.run("ip", "link", "set", "lo", "up")

    def command(self, *argv: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *argv]

    def run(self, *argv: str, check: bool = True) -> str:
        done = subprocess.run(self.command(*argv), capture_output=True, text=True)
        assert not check or done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def set(self, key: str, value: str) -> None:
        """Write *value* to a file below /proc/sys/net."""
        self.run("sh", "-c", f"echo {value} >/proc/sys/net/{key}")

    def links(self) -> dict[str, str]:
        """Every interface but lo, with its flags."""
        lines = self.run("ip", "-o", "link", "show").splitlines()
        return {line.split(": ")[1].split("@")[0]: line.split("<")[1].split(">")[0] for line in lines if " lo: " not in line}

    def detail(self, name: str) -> str:
        return self.run("ip", "-d", "link", "show", "dev", name)

    def filter(self) -> str:
        """Our two tables as `nft` shows them."""
        return self.run("nft", "-s", "list", "ruleset")

    def close(self) -> None:
        for pid in subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", self.name], check=True)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


class Tapnet:
    """The process and the broker's connection to it.

    *before* is a command that ends by running the one after it; *policy* is root's; *journal* gets what the process says.
    """

    def __init__(
        self,
        namespace: Namespace,
        folder: Path,
        before: tuple[str, ...] = (),
        connect: bool = True,
        policy: str = POLICY,
        journal: Path | None = None,
    ) -> None:
        self.namespace = namespace
        folder.mkdir(exist_ok=True)
        parts = {name: str(folder / name) for name in ("etc", "state", "run", "log")}
        self.layout = Layout(**parts, embedded=False)
        self.put_policy(policy)
        self.before = before
        self._journal = journal
        self._ids = itertools.count(1)
        self.start(connect)

    def start(self, connect: bool = True) -> None:
        code = [sys.executable, PYTHON_FLAGS, f"{PACKAGE_DIR}/__main__.py", "tapnet", self.layout.to_args()]
        with open(self._journal, "a") if self._journal else contextlib.nullcontext() as stderr:
            self.process = subprocess.Popen(self.namespace.command(*self.before, *code), stderr=stderr)
        if connect:
            self.broker = self.connect()

    def put_policy(self, text: str) -> None:
        """Write root's policy, which tapnet reads by itself."""
        os.makedirs(self.layout.etc, exist_ok=True)
        beside = f"{self.layout.etc}/new"
        Path(beside).write_text(text)
        os.chmod(beside, 0o644)
        os.rename(beside, self.layout.policy)

    def connect(self) -> wire.Socket:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return wire.connect(self.layout.tapnet_socket, PATIENCE)
            assert self.process.poll() is None and time.monotonic() < end, "tapnet does not listen"
            time.sleep(0.01)

    def send(self, message: ToTapnet) -> int:
        ident = next(self._ids)
        wire.send(self.broker, {"id": ident, **message.to_body()})
        return ident

    def receive(self) -> tuple[int, dict[str, Any], int]:
        """The next answer: its number, `{"ok"}` or `{"error"}`, a descriptor (-1: none)."""
        packet = wire.recv(self.broker, fds_allowed=1)
        assert packet is not None, "tapnet has closed the connection"
        body: dict[str, Any] = packet.body
        return body.pop("id"), body, packet.take_fd() if packet.fds else -1

    def ask(self, message: ToTapnet) -> tuple[dict[str, Any], int]:
        ident = self.send(message)
        answered, body, fd = self.receive()
        assert answered == ident
        return body, fd

    def tell(self, *messages: ToTapnet) -> None:
        """Send *messages* that answer with nothing but `ok`."""
        idents = [self.send(message) for message in messages]
        for ident in idents:
            answered, body, fd = self.receive()
            assert (answered, fd) == (ident, -1) and "ok" in body, body

    def refused(self, message: ToTapnet) -> str:
        """The sentence with which *message* is refused."""
        body, fd = self.ask(message)
        assert fd == -1 and "error" in body, body
        text: str = body["error"]["text"]
        assert "\n" not in text and len(text) < 300
        return text

    def plug(self, port: Port) -> int:
        body, fd = self.ask(port)
        assert "ok" in body and fd >= 0, body
        return fd

    def settle(self, *messages: ToTapnet) -> None:
        self.tell(SETTINGS, *messages, Settle())

    def kill(self) -> None:
        self.broker.close()
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                assert self.process.wait(PATIENCE) == 0
            finally:
                self.process.kill()
        self.broker.close()

    def __enter__(self) -> Tapnet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Thief:
    """Somebody who makes our table one that the kernel gives to nobody else (`flags owner`)."""

    def __init__(self, namespace: Namespace) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(namespace.command("nft", "-i"), stdin=subprocess.PIPE, stdout=quiet, stderr=quiet)
        assert self._process.stdin is not None
        again = b"add table bridge vmshell; delete table bridge vmshell; add table bridge vmshell"
        self._process.stdin.write(again + b" { flags owner; }\n")
        self._process.stdin.flush()
        end = time.monotonic() + PATIENCE
        while "flags owner" not in namespace.filter():
            assert time.monotonic() < end
            time.sleep(0.01)

    def leave(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)


# --- what is asked for ------------------------------------------------------------------------------------------------


def segment(number: int = 1, **more: Any) -> Segment:
    return Segment(**{"segment": number, "gateway4": f"10.77.{number}.1/24", "outside": "internet", **more})


def mac(number: int, nic: int = 0) -> str:
    return f"06:{nic:02x}:00:{number >> 16 & 255:02x}:{number >> 8 & 255:02x}:{number & 255:02x}"


def port(number: int, create: bool = True, **more: Any) -> Port:
    """Card 0 of VM *number*, on segment 1."""
    own = address(number, more.get("segment", 0))
    defaults = {"number": number, "nic": 0, "segment": 1, "mac": mac(number), "address4": own, "create": create}
    return Port(**{**defaults, **more})


def address(number: int, segment: int = 0) -> str:
    """VM *number*'s on a segment; if that is not named, on the one that VMs of such numbers are on."""
    return f"10.77.{segment or number // 250 + 1}.{number + 1 if number < 250 else number % 250 + 2}"


# --- frames -----------------------------------------------------------------------------------------------------------


def datagram(sender: int, receiver: int, payload: bytes, dport: int = 7777) -> bytes:
    """A UDP datagram from VM *sender* to VM *receiver*, as the guest's card hands it over."""
    source, target = (socket.inet_aton(address(number)) for number in (sender, receiver))
    udp = struct.pack("!HHHH", 40000, dport, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0x4000, 64, 17, 0, source, target)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    header = header[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + header[12:]
    ethernet = bytes.fromhex((mac(receiver) + mac(sender)).replace(":", "")) + b"\x08\x00"
    return ethernet + header + udp


def payloads(fd: int, seconds: float, wanted: Callable[[], bool] = lambda: False) -> Iterator[bytes]:
    """The payload of every datagram to port 7777 that comes out of the tap *fd* for so long, or until *wanted()* is met."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not wanted():
        if select.select([fd], [], [], min(left, 0.05))[0]:
            frame = os.read(fd, 1 << 16)
            if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == struct.pack("!H", 7777):
                yield frame[42:]


def passes(source: int, target: int, sender: int, receiver: int, seconds: float = 5.0) -> bool:
    """Does a datagram that VM *sender* sends through its tap *source* come out of *target*?"""
    mark = os.urandom(8)
    os.write(source, datagram(sender, receiver, mark))
    return any(payload == mark for payload in payloads(target, seconds))
