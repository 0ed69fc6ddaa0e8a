"""`networks`, `net`, `publish`, `unpublish`: what they ask, what they show, what they refuse."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.broker import ROW, FakeBroker
from tests.fakes.shell import REPOSITORY, environment, leave, run, spawn, starter
from vmshell.layout import Layout
from vmshell.refusals import NoPortToReach, NoSuchVm, PortTaken

LONG = 60  # seconds
NETWORK = {
    **{"name": "users", "kind": "private", "subnet": "10.77.3.0/24", "subnet6": "", "outside": "internet"},
    **{"isolated": False, "role": "member", "cards": 2},
}
CARD = {
    **{"name": "net0", "network": "users", "kind": "private", "model": "virtio", "mac": "06:00:00:00:00:2a"},
    **{"address": "10.77.3.2", "address6": "fd00:77::2", "link": "up", "tap": "vt00002an0", "dns": "web1.alice.vm"},
    **{"forward": [], "rate": 100_000, "rx_bytes": 5 << 20, "tx_bytes": 2048, "rx_packets": 4000, "tx_packets": 20},
}
PUBLISHED = [
    {"port": 80, "proto": "tcp", "to": "bob", "host_port": 0},
    {"port": 53, "proto": "udp", "to": "world", "host_port": 5353},
]
EVIL = "\x1b]0;t\a\u202e\n"


@pytest.fixture
def broker(layout: Layout) -> Iterator[FakeBroker]:
    with FakeBroker(layout) as fake:
        fake.answers["networks"] = {"networks": [NETWORK], "domain": "vm"}
        fake.answers["net"] = {"name": "web1", "state": "running", "domain": "vm", "cards": [CARD], "published": PUBLISHED}
        fake.answers["publish"] = lambda body: {"name": body["vm"], "proto": "tcp", "to": "", "host_port": 0, **body}
        yield fake


def test_networks(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "networks")
    heading, row = done.stdout.decode().splitlines()
    assert heading.split() == ["NAME", "KIND", "SUBNET", "OUTSIDE", "ROLE", "CARDS"]
    assert row.split() == ["users", "private", "10.77.3.0/24", "internet", "member", "2"]
    assert json.loads(run(short_tmp, broker.layout, "networks", "--json").stdout) == broker.answers["networks"]
    broker.answers["networks"] = {"networks": []}
    done = run(short_tmp, broker.layout, "networks")
    assert (done.returncode, done.stdout) == (0, b"") and b"no network" in done.stderr


def test_net(broker: FakeBroker, short_tmp: Path) -> None:
    done = run(short_tmp, broker.layout, "net", "web1")
    assert [line.split(maxsplit=1) for line in done.stdout.decode().splitlines()] == [
        ["net0", "users (private), link up"],
        ["address", "10.77.3.2, fd00:77::2"],
        ["name", "web1.alice.vm"],
        ["mac", "06:00:00:00:00:2a (virtio)"],
        ["rate", "at most 100000 kbit/s each way"],
        ["traffic", "received 5M in 4000 packets, sent 2K in 20 packets"],
        ["published", "80/tcp to bob"],
        ["published", "53/udp to world, by port 5353 of this host"],
    ]
    assert json.loads(run(short_tmp, broker.layout, "net", "web1", "--json").stdout) == broker.answers["net"]


def test_net_of_a_vm_without_cards_and_of_one_in_session_mode(broker: FakeBroker, short_tmp: Path) -> None:
    broker.answers["net"] = {"name": "web1", "state": "off", "cards": [], "published": []}
    done = run(short_tmp, broker.layout, "net", "web1")
    assert (done.returncode, done.stdout) == (0, b"") and b"no network cards" in done.stderr
    broker.answers["net"] = {"state": "off", "cards": [{"name": "net0", "network": "user", "forward": ["tcp:10022:22"]}]}
    assert b"forwards  tcp:10022:22\n" in run(short_tmp, broker.layout, "net", "web1").stdout


def test_info_and_list_show_addresses(broker: FakeBroker, short_tmp: Path) -> None:
    row = {**ROW, "address": "10.77.3.2"}
    broker.answers["info"] = {**row, "host_keys": ["ssh-ed25519 AAAA", "ssh-rsa AAAA"], "published": PUBLISHED}
    broker.answers["list"] = {"vms": [row], "more": False}
    shown = run(short_tmp, broker.layout, "info", "web1").stdout.decode()
    assert [line.split(maxsplit=1)[1] for line in shown.splitlines() if line.startswith(("address", "published"))] == [
        "10.77.3.2",
        "80/tcp to bob, 53/udp to world, by port 5353 of this host",
    ]
    assert "host keys    2 kept\n" in shown
    assert b"10.77.3.2" in run(short_tmp, broker.layout, "list").stdout
    for width, there in ((100, True), (40, False)):
        child = spawn(short_tmp, broker.layout, "list", size=(24, width))
        assert leave(child) == 0 and ("10.77.3.2" in child.before) is there


def test_what_others_chose_is_escaped(broker: FakeBroker, short_tmp: Path) -> None:
    broker.answers["networks"] = {"networks": [dict.fromkeys(NETWORK, EVIL), "x", 5]}
    card = dict.fromkeys(CARD, EVIL) | {"forward": [EVIL, 7]}
    broker.answers["net"] = {"name": EVIL, "state": EVIL, "cards": [card, None], "published": [dict.fromkeys(PUBLISHED[0], EVIL)]}
    for words in (["networks"], ["net", "web1"], ["net", "web1", "-f"], ["publish", "web1"]):
        done = run(short_tmp, broker.layout, *words)
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).decode().replace("\n", "").isprintable()


# --- --follow -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def brisk(short_tmp: Path) -> None:
    """The shell that is started draws ten lines a second."""
    path = Path(starter(short_tmp))
    main, pace = "os._exit(main(", "from vmshell.shell.commands import network\n\nnetwork.PACE = 0.1\n"
    text = path.read_text()
    assert main in text
    path.write_text(text.replace(main, pace + main))


def growing(broker: FakeBroker, ticks: int = 1000) -> None:
    """About a MiB more at every answer; after *ticks* the VM is off."""
    asked = [0]

    def answer(body: dict[str, object]) -> dict[str, object]:
        asked[0] += 1
        card = {**CARD, "rx_bytes": asked[0] << 20, "tx_bytes": 4096}
        return {"name": "web1", "state": "running" if asked[0] <= ticks else "off", "cards": [card]}

    broker.answers["net"] = answer


def test_follow_ends_with_the_vm(broker: FakeBroker, short_tmp: Path, brisk: None) -> None:
    growing(broker, 2)
    done = run(short_tmp, broker.layout, "net", "web1", "--follow")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0 and len(lines) == 2 and b"web1 is off" in done.stderr
    for line in lines:
        assert line.startswith("net0: received ") and line.endswith("/s, sent 0/s") and "0/s, sent" not in line.partition(",")[0]


def test_follow_as_json_is_a_document_a_line(broker: FakeBroker, short_tmp: Path, brisk: None) -> None:
    growing(broker, 2)
    lines = run(short_tmp, broker.layout, "net", "web1", "-f", "--json").stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["running", "off"]


def test_follow_until_ctrl_c(broker: FakeBroker, short_tmp: Path) -> None:
    growing(broker)
    command = [starter(short_tmp), "--layout", broker.layout.to_args(), "net", "web1", "-f"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as shell:
        assert shell.stdout is not None and shell.stderr is not None
        assert shell.stdout.readline().startswith(b"net0: received ")  # comes at once, though it goes to a pipe
        shell.send_signal(signal.SIGINT)
        assert shell.wait(LONG) == 0 and shell.stderr.read() == b""


def test_follow_on_a_terminal_draws_over_its_line(broker: FakeBroker, short_tmp: Path, brisk: None) -> None:
    for term, start in (("xterm", "\rnet0: received"), ("dumb", "net0: received")):
        growing(broker)
        child = spawn(short_tmp, broker.layout, "net", "web1", "-f", term=term, size=(24, 40))
        for _ in range(2):
            child.expect_exact(start)
        assert ("\n" in child.before) is (term == "dumb")
        child.send("\x03")
        assert leave(child) == 0


def test_a_reader_that_leaves_ends_it(broker: FakeBroker, short_tmp: Path, brisk: None) -> None:
    growing(broker)
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" --layout "$1" net web1 -f | true', starter(short_tmp), broker.layout.to_args()],
        env=environment(),
        capture_output=True,
        timeout=LONG,
    )
    assert done.stderr == b""


# --- publishing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        (["publish", "web1", "80", "--to", "bob"], {"port": 80, "to": "bob"}),
        (["publish", "web1", "53/udp", "--to=@staff"], {"port": 53, "proto": "udp", "to": "@staff"}),
        (["publish", "--to", "world", "web1", "80/tcp"], {"port": 80, "to": "world"}),
        (["publish", "web1", "65535", "--to", "world:8080"], {"port": 65535, "to": "world", "host_port": 8080}),
        (["publish", "web1", "1", "--to", "first.last+corp"], {"port": 1, "to": "first.last+corp"}),
        (["unpublish", "web1", "80"], {"port": 80, "remove": True}),
        (["unpublish", "web1", "53/udp", "--to", "world"], {"port": 53, "proto": "udp", "to": "world", "remove": True}),
    ],
)
def test_what_is_asked(broker: FakeBroker, short_tmp: Path, words: list[str], request_: dict[str, object]) -> None:
    done = run(short_tmp, broker.layout, *words)
    assert done.returncode == 0 and done.stderr == b""
    body = {key: value for key, value in broker.requests[-1].items() if key not in ("id", "verb", "vm")}
    assert body == request_ and broker.verbs() == ["publish"]


def test_what_is_said(broker: FakeBroker, short_tmp: Path) -> None:
    def said(*words: str) -> str:
        return str(run(short_tmp, broker.layout, *words).stdout.decode())

    assert said("publish", "web1", "80", "--to", "world:8080") == "published: 80/tcp to world, by port 8080 of this host\n"
    assert said("unpublish", "web1", "80") == "web1: 80/tcp is no longer published\n"
    assert said("unpublish", "web1", "53/udp", "--to", "bob") == "web1: 53/udp is no longer published to bob\n"
    assert said("publish", "web1").splitlines() == [
        "published: 80/tcp to bob",
        "published: 53/udp to world, by port 5353 of this host",
    ]
    assert json.loads(said("publish", "web1", "--json")) == {"published": PUBLISHED}
    assert json.loads(said("publish", "web1", "80", "--to", "bob", "--json"))["to"] == "bob"
    broker.answers["net"] = {"published": []}
    assert b"nothing is published" in run(short_tmp, broker.layout, "publish", "web1").stderr


def test_what_the_broker_refuses(broker: FakeBroker, short_tmp: Path) -> None:
    for error, status in ((PortTaken(port=8080), 4), (NoPortToReach(vm="web1", port="80/tcp"), 3), (NoSuchVm(vm="web1"), 3)):
        broker.answers["publish"] = error
        done = run(short_tmp, broker.layout, "unpublish", "web1", "80")
        assert (done.returncode, done.stdout) == (status, b"") and error.sentence().encode() in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["networks", "users"],
        ["networks", "-f"],
        ["net"],
        ["net", "web1", "web2"],
        ["net", "web1", "-x"],
        ["net", "web1", "-f", "--follow"],
        ["net", "web1", "--follow=1"],
        ["net", "web1", "-ff"],
        ["publish"],
        ["publish", "web1", "80"],
        ["publish", "web1", "--to", "bob"],
        ["publish", "web1", "http", "--to", "bob"],
        ["publish", "web1", "0", "--to", "bob"],
        ["publish", "web1", "65536", "--to", "bob"],
        ["publish", "web1", "-80", "--to", "bob"],
        ["publish", "web1", "80/", "--to", "bob"],
        ["publish", "web1", "80/sctp", "--to", "bob"],
        ["publish", "web1", "/udp", "--to", "bob"],
        ["publish", "web1", "80", "--to", ""],
        ["publish", "web1", "80", "--to", "@"],
        ["publish", "web1", "80", "--to", "@@staff"],
        ["publish", "web1", "80", "--to", "-x"],
        ["publish", "web1", "80", "--to", "@-x"],
        ["publish", "web1", "80", "--to", "a b"],
        ["publish", "web1", "80", "--to", "a/b"],
        ["publish", "web1", "80", "--to", "bob:80"],
        ["publish", "web1", "80", "--to", "world:"],
        ["publish", "web1", "80", "--to", "world:0"],
        ["publish", "web1", "80", "--to", "world:80:80"],
        ["publish", "web1", "80", "--to", "x" * 65],
        ["publish", "web1", "80", "--to", "b\x1b[2J"],
        ["publish", "web1", "80", "--to", "bob", "--to", "bob"],
        ["publish", "web1", "80", "443", "--to", "bob"],
        ["publish", "../../x", "80", "--to", "bob"],
        ["publish", "Web1", "80", "--to", "bob"],
        ["unpublish", "web1"],
        ["unpublish", "web1", "x"],
        ["unpublish", "web1", "80", "--to", "-x"],
        ["unpublish", "web1", "80", "--json"],
    ],
)
def test_bad_words_are_refused_before_anything_is_sent(broker: FakeBroker, short_tmp: Path, words: list[str]) -> None:
    done = run(short_tmp, broker.layout, *words)
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.startswith(b"vmshell: ")
    assert done.stderr.decode().replace("\n", "").isprintable()
    assert broker.requests == []


def test_a_list_of_vms_does_not_pay_for_networks(broker: FakeBroker, short_tmp: Path) -> None:
    """P1: what few logins use is not loaded by the others."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from vmshell.shell.main import main\n"
        "status = main(['--layout', sys.argv[2], 'list']); print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    broker.answers["list"] = {"vms": [ROW], "more": False}
    command = ["/usr/bin/python3", "-IS", "-c", code, str(REPOSITORY), broker.layout.to_args()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LONG)
    loaded = set(done.stderr.split())
    assert done.returncode == 0 and "vmshell.shell.ui.output" in loaded
    shell = {
        f"vmshell.shell.{name}"
        for name in ("commands.network", "commands.ssh", "client.pump", "console.viewer", "commands.storage", "cli.help")
    }
    assert not loaded & {*shell, "json", "socket", "signal", "tempfile", "shutil", "random", "enum", "re"}


def test_a_broker_that_is_restarted_is_asked_again(broker: FakeBroker, short_tmp: Path) -> None:
    with subprocess.Popen(
        [starter(short_tmp), "--layout", broker.layout.to_args()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    ) as shell:
        assert shell.stdin is not None and shell.stdout is not None
        for _ in range(2):
            shell.stdin.write(b"publish web1\n")
            shell.stdin.flush()
            assert shell.stdout.readline() == b"published: 80/tcp to bob\n"
            shell.stdout.readline()
            broker.drop_clients()
        shell.stdin.close()
        assert shell.wait(LONG) == 0
