"""The broker taken over: code of an attacker's own as its account on an installed host, outside its unit's hardening (N6, D07).

What it may do is end VMs and start QEMU in the jail; no file of root's or a user's, no process but VMs', no unit.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.host.machine import Host

pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

LIBRARY = "/usr/local/lib/vmshell/current"
PROLOGUE = f"""
import errno, json, os, signal, socket, subprocess, sys, time
sys.path.insert(0, {LIBRARY!r})
from vmshell import wire
from vmshell.launcher_messages import *
found = {{}}
def tries(name, act):
    try:
        found[name] = repr(act())
    except OSError as exc:
        found[name] = errno.errorcode.get(exc.errno, str(exc))
    except Exception as exc:
        found[name] = f"{{type(exc).__name__}}: {{exc}}"
def ask(path, body, fds=()):
    with wire.connect(path, 20) as sock:
        wire.send(sock, body, fds)
        while True:
            packet = wire.recv(sock, fds_allowed=1)
            if packet is None or packet.body.get("verb") != "ended":
                return packet and packet.body
def launcher(*fds, **body):
    # Again, when the true broker, which comes back too, has taken our place before the answer.
    for _ in range(50):
        try:
            answer = ask("/run/vmshell/launcher.sock", {{"id": 1, **body}}, fds)
        except ConnectionError:
            answer = None
        if answer:
            return answer
        time.sleep(0.2)
    raise TimeoutError("the launcher does not answer")
"""


@pytest.fixture(scope="module")
def web1(host: Host) -> Host:
    """alice's web1 runs."""
    host.put_image("echo")
    assert host.run("alice", "new web1 --image echo --memory 32M")[0] == 0
    assert host.run("alice", "boot web1")[0] == 0
    return host


def as_broker(host: Host, code: str) -> dict[str, Any]:
    """Run *code* as the broker's account, with its groups and nothing of its unit; what it `tries`, by name."""
    script = PROLOGUE + code + "\nprint(json.dumps(found))\n"
    words = ["setpriv", "--reuid=vmshell-broker", "--regid=vmshell-broker", "--init-groups", "--inh-caps=-all"]
    done = host.exec(*words, "/usr/bin/python3", "-I", "-", stdin=script, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_n6_no_file_of_others_can_be_written(web1: Host) -> None:
    paths = [
        *("/etc/vmshell/policy.toml", "/etc/passwd", "/etc/ssh/vmshell-keys/alice", "/etc/ssh/vmshell-keys/new"),
        *("/var/lib/vmshell/version", "/var/lib/vmshell/new", "/var/lib/vmshell/images/new"),
        "/var/lib/vmshell/images/echo/disk.raw",
        *("/var/lib/vmshell-home/.ssh", "/var/log/vmshell/1/console.log", "/var/log/vmshell/new"),
        *("/run/vmshell/new", "/run/vmshell/launcher.sock", "/run/systemd/system/new.service", "/run/vmshell-names/dnsmasq.conf"),
        f"{LIBRARY}/vmshell/launcher/main.py",
    ]
    code = f"""
for path in {paths!r}:
    tries("write " + path, lambda: os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
    tries("unlink " + path, lambda: os.unlink(path))
    tries("link " + path, lambda: os.symlink("/etc/shadow", path))
"""
    found = as_broker(web1, code)
    allowed = {"EACCES", "EPERM", "EEXIST", "ENOENT", "EISDIR", "EROFS", "ENXIO"}
    assert {name: said for name, said in found.items() if said not in allowed} == {}
    assert len(found) == 3 * len(paths)
    assert web1.exec("systemctl", "is-active", "vmshell-launcher.socket").stdout.strip() == "active"


def test_n6_no_process_is_signalled_but_vms(web1: Host) -> None:
    terminal = web1.spawn("alice", "console web1")
    terminal.expect_exact("is the key")
    code = """
for entry in os.listdir("/proc"):
    if entry.isdecimal():
        status = dict(line.split(":", 1) for line in open(f"/proc/{entry}/status") if ":" in line)
        uid = int(status["Uid"].split()[0])
        if uid != os.getuid():
            tries(f"{uid} {entry}", lambda: os.kill(int(entry), signal.SIGKILL))
for number in (0, -1, 0xB00000, 1 << 24, 1 << 40, True, "1", None):
    tries(f"launcher {number!r}", lambda: launcher(verb="signal", number=number, signal="kill")["ok"])
"""
    before = web1.exec("systemctl", "show", "-P", "MainPID", "vmshell-launcher", "vmshell-relay", "vmshell-tapnet").stdout
    found = as_broker(web1, code)
    mine = {name: said for name, said in found.items() if said not in ("EPERM", "ESRCH", "KeyError: 'ok'")}
    assert mine == {}
    assert any(name.startswith("0 ") for name in found) and any(name.startswith("2100000001 ") for name in found)
    assert web1.exec("systemctl", "show", "-P", "MainPID", "vmshell-launcher", "vmshell-relay", "vmshell-tapnet").stdout == before
    terminal.send("still here")
    terminal.expect_exact("still here")
    terminal.close(force=True)


def test_n6_no_unit_is_started_and_no_program_of_its_choice(web1: Host) -> None:
    code = """
def run(*argv):
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True).returncode
for argv in (
    ("systemctl", "start", "systemd-tmpfiles-setup.service"), ("systemctl", "stop", "vmshell-relay.service"),
    ("systemctl", "restart", "ssh.service"), ("systemd-run", "--scope", "/bin/true"), ("systemd-run", "/bin/true"),
    ("systemctl", "set-property", "vmshell.slice", "MemoryMax=1M"), ("pkexec", "/bin/true"), ("sudo", "-n", "/bin/true"),
):
    tries(" ".join(argv), lambda: "refused" if run(*argv) else "done")
jobs = [("storage", ["--", "/bin/sh"]), ("probe", ["kvm", "0"]), ("shell", []), ("broker", []), ("storage", ["x" * 201])]
for kind, words in jobs:
    reader, writer = os.pipe()
    tries(f"{kind} {words}", lambda: sorted(launcher(writer, verb="job", kind=kind, words=words)))
    os.close(writer)
    with open(reader, "rb") as output:
        found[f"{kind} {words} said"] = output.read(4096).decode()
"""
    found = as_broker(web1, code)
    programs = {name: said for name, said in found.items() if name.startswith(("system", "pkexec", "sudo"))}
    assert set(programs.values()) <= {"'refused'", "ENOENT"} and len(programs) == 8
    assert "usage" in found["storage ['--', '/bin/sh'] said"]
    assert found["shell []"] == found["broker []"] == "['error', 'id']"


def test_n7_dnsmasq_and_tapnet_obey_data_only(web1: Host) -> None:
    """The names service reads what the broker writes: whatever that is, no program is run and no file of root's read."""
    code = """
os.makedirs("/run/vmshell/names/dhcp-opts", exist_ok=True)
for folder in ("", "/hosts", "/dhcp-hosts", "/dhcp-opts"):
    for name in ("dnsmasq.conf", "zz"):
        text = "dhcp-script=/run/vmshell/broker/evil\\nconf-file=/etc/shadow\\n"
        tries(f"{folder}/{name}", lambda: open(f"/run/vmshell/names{folder}/{name}", "w").write(text))
with open("/run/vmshell/broker/evil", "w") as file:
    file.write("#!/bin/sh\\nid >/run/vmshell/names/ran\\n")
os.chmod("/run/vmshell/broker/evil", 0o755)
tries("restart", lambda: launcher(verb="restart-names")["ok"])
"""
    as_broker(web1, code)
    web1.sh("sleep 1; systemctl restart vmshell-names vmshell-broker")
    assert web1.run("alice", "kill web1")[0] == 0 and web1.run("alice", "boot web1")[0] == 0
    assert web1.exec("test", "-e", "/run/vmshell/names/ran", check=False).returncode != 0
    words = web1.sh("tr '\\0' '\\n' </proc/$(systemctl show -P MainPID vmshell-names)/cmdline")
    (conf,) = (word.removeprefix("--conf-file=") for word in words.split() if word.startswith("--conf-file="))
    assert "dhcp-script" not in web1.exec("cat", conf).stdout
    web1.sh("cd /run/vmshell/names; rm -f dnsmasq.conf */zz */dnsmasq.conf; systemctl restart vmshell-broker")


def test_the_real_broker_takes_its_place_again(web1: Host) -> None:
    """A second connection takes the first one's place; the broker comes back by itself, and VMs boot."""
    as_broker(web1, 'tries("x", lambda: launcher(verb="signal", number=1, signal="kill"))')
    status, out, err = web1.run("alice", "list")
    assert status == 0 and "web1" in out, err
    for _ in range(3):
        assert web1.run("alice", "new again --image echo --memory 32M")[0] == 0
        assert web1.run("alice", "boot again")[0] == 0
        assert web1.run("alice", "kill again")[0] == 0
        assert web1.run("alice", "rm again --yes")[0] == 0
