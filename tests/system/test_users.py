"""Two people on one installed host, through a real sshd: one's own VMs work, and the other's cannot be told to exist."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator

import pexpect
import pytest

from tests import guests
from tests.host.machine import Host

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.vm, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 240  # seconds for an emulated Linux on a busy machine
DETACH = "\x1dd"
PROMPT = r"~ ?# "


@pytest.fixture(scope="module")
def users(host: Host) -> Iterator[Host]:
    """alice and bob, and a catalogue with a real Linux (`demo`) and a boot sector that echoes (`echo`)."""
    host.put_image("demo")
    host.put_image("echo")
    yield host


@pytest.fixture
def web1(users: Host) -> Host:
    """alice's only VM, `web1`, an echo guest that runs: as the test before left it, or made anew."""
    if states(users, "alice") != {"web1": "running"}:
        for name in states(users, "alice"):
            users.run("alice", f"kill {name}")
            assert users.run("alice", f"rm {name} --yes")[0] == 0
        assert users.run("alice", "new web1 --image echo --memory 32M")[0] == 0
        assert users.run("alice", "boot web1 --wait ready --timeout 120", timeout=150)[0] == 0
    return users


def states(host: Host, user: str) -> dict[str, str]:
    status, out, err = host.run(user, "list --json")
    assert status == 0, err
    return {row["name"]: row["state"] for row in json.loads(out)["vms"]}


def attach(host: Host, user: str) -> pexpect.spawn:
    """A console of web1, past the point where the terminal itself would echo."""
    console = host.spawn(user, "console web1")
    console.expect_exact("console of web1")
    return console


def detach(console: pexpect.spawn) -> None:
    console.send(DETACH)
    console.expect(pexpect.EOF)
    console.close()
    assert console.exitstatus == 0


def echoes(console: pexpect.spawn, word: str) -> None:
    """The guest answers what is typed: a terminal in raw mode shows it once, and only the guest can have."""
    console.send(word)
    console.expect_exact(word)


# --- one person's whole way -------------------------------------------------------------------------------------------


def test_the_whole_way(users: Host) -> None:
    """Log in, make a VM, boot it with its console, type on it, leave it, find it running, shut it down."""
    terminal = users.spawn("alice", timeout=PATIENCE)
    terminal.expect_exact("vmshell>")
    terminal.sendline("list")
    terminal.sendline("new first --image demo --memory 256M")
    terminal.expect_exact("first: off")
    terminal.sendline("boot first --console")
    terminal.expect("login: ")
    terminal.send("root\r")
    terminal.expect("assword: ")
    terminal.send("demo\r")
    terminal.expect(PROMPT)
    terminal.send('echo kernel""-is $(uname -r)\r')
    terminal.expect(r"kernel-is (\d+\.\d+\.\S+)")
    terminal.expect(PROMPT)
    terminal.send(DETACH)
    terminal.expect_exact("vmshell>")
    assert states(users, "alice") == {"first": "running"}
    terminal.sendline("shutdown first")
    terminal.expect_exact("first: off")
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    assert states(users, "alice") == {"first": "off"}
    assert users.run("alice", "rm first --yes")[0] == 0
    no_vm_is_left(users)


def no_vm_is_left(users: Host) -> None:
    wait_for(lambda: users.sh("systemctl list-units --no-legend --plain 'vmshell-vm-*'") == "")
    wait_for(lambda: users.sh("ls /run/vmshell/vms") == "")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("list", 0),
        ("images", 0),
        ("whoami", 0),
        ("help", 0),
        ("frobnicate", 2),
        ("info nothing", 3),
        ("boot nothing", 3),
        ("console nothing", 3),
        ("new x --image nothing", 3),
        ("new X --image echo", 2),
        ("new ../x --image echo", 2),
        ("new x --image echo --memory lots", 2),
        ("new x --image echo --memory 900G", 5),
        ("info", 2),
        ("exit", 0),
    ],
)
def test_exit_statuses_over_ssh(users: Host, command: str, status: int) -> None:
    got, out, err = users.run("bob", command)
    assert got == status, out + err
    assert "Traceback" not in err
    assert status == 0 or err.count("\n") <= 3, err
    assert states(users, "bob") == {}


def test_states_over_ssh(web1: Host) -> None:
    assert web1.run("alice", "boot web1")[0] == 4
    assert web1.run("alice", "rm web1 --yes")[0] == 4
    assert web1.run("alice", "new web1 --image echo")[0] == 4
    assert web1.run("alice", "kill web1")[0] == 0
    assert states(web1, "alice") == {"web1": "off"}
    assert web1.run("alice", "kill web1")[0] in (0, 4)


def test_it_runs_on_after_logout_and_shows_its_last_output(web1: Host) -> None:
    console = attach(web1, "alice")
    echoes(console, "before-logout")
    console.close(force=True)  # the connection is simply gone
    assert states(web1, "alice") == {"web1": "running"}
    again = attach(web1, "alice")
    again.expect_exact("before-logout")
    echoes(again, "after-login")
    detach(again)


# --- the other person -------------------------------------------------------------------------------------------------


def test_bob_sees_nothing_of_alice(web1: Host) -> None:
    status, out, _ = web1.run("bob", "list --json")
    assert status == 0 and json.loads(out)["vms"] == []
    status, out, _ = web1.run("bob", "list --all --json")
    assert "web1" not in out and "alice" not in out


VERBS = ["info", "boot", "console", "shutdown", "kill", "reset", "reboot", "rm --yes"]


@pytest.mark.parametrize("verb", VERBS)
def test_bob_cannot_tell_alices_vm_from_none(web1: Host, verb: str) -> None:
    """R13: for every verb the same words and status, whether the VM is another's, or the owner or the VM does not exist."""
    word, *options = verb.split()

    def answer(vm: str) -> tuple[int, str]:
        status, out, err = web1.run("bob", " ".join([word, vm, *options]))
        return status, (out + err).replace(vm, "VM")

    assert answer("alice/web1") == answer("alice/nothing") == answer("nobody-here/web1")
    assert answer("alice/web1")[0] == 3
    assert answer("web1") == answer("nothing")
    assert states(web1, "alice") == {"web1": "running"}


def test_bobs_own_vm_may_have_the_same_name(web1: Host) -> None:
    assert web1.run("bob", "new web1 --image echo --memory 32M")[0] == 0
    assert states(web1, "bob") == {"web1": "off"} and states(web1, "alice") == {"web1": "running"}
    assert web1.run("bob", "rm web1 --yes")[0] == 0
    assert states(web1, "bob") == {} and states(web1, "alice") == {"web1": "running"}


def test_an_account_outside_the_group_reaches_no_socket(web1: Host) -> None:
    connect = "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect('/run/vmshell/broker.sock')"
    done = web1.exec("setpriv", "--reuid=games", "--regid=games", "--clear-groups", "python3", "-c", connect, check=False)
    assert done.returncode != 0 and "PermissionError" in done.stderr


def test_everything_a_definition_can_say_over_ssh(web1: Host) -> None:
    """Files come in through ssh, a VM is made of them, changed, explained, booted; the wrapper runs one; root sees the line."""
    kernel = guests.kernel("mine").decode("utf-8", "surrogateescape")
    disk = guests.disk(guests.bootsector("shelved")).decode("utf-8", "surrogateescape")
    definition = '[memory]\nsize = "64M"\n[boot]\nkernel = "bzImage"\ncmdline = "a=1 b"\n'
    status, out, err = web1.run("alice", "define made", stdin=definition)
    assert (status, out) == (0, "made: off\n") and "not there yet: bzImage" in err, err
    status, out, err = web1.run("alice", "put made.bzImage", stdin=kernel)
    assert status == 0 and out.startswith("made.bzImage: "), err
    assert web1.run("alice", "put shelf.root.img", stdin=disk)[0] == 0
    assert web1.run("bob", "objects")[1] == "" and web1.run("bob", "objects made")[0] == 3
    assert web1.run("alice", "disk add made data --size 1G")[0] == 0
    status, _, err = web1.run("alice", "boot made --wait 'initrd none' --timeout 120", timeout=180)
    assert status == 0, err
    status, out, err = web1.run("alice", "set made cpu.count=2 console.log=off")
    assert status == 0 and "at the next boot: cpu.count" in err and "changed now: console.log" in err
    assert web1.run("alice", "kill made")[0] == 0
    status, out, _ = web1.run("alice", "explain set made memory=8G")
    assert status == 1 and "memory_max in the built-in limits" in out and "allowed now: 2G" in out
    once = web1.run("alice", "kvm -hda root.img -m 32 -snapshot", timeout=180)
    assert "boot from shelved 80" in once[1], once
    assert web1.run("alice", "kill kvm1")[0] == 0 and web1.run("alice", "info kvm1")[0] == 3
    status, _, err = web1.run("alice", "kvm -hda root.img -monitor stdio")
    assert status == 1 and err.startswith("-monitor stdio: denied: ")

    line = web1.admin("launch-line", "alice/made").stdout
    assert "systemd-run" in line and "setpriv" in line and "bzImage" not in line
    assert "memory_max" in web1.admin("policy", "test", "alice", "set", "made", "memory=8G", check=False).stdout
    web1.sh("printf '[user.alice]\\nmemory_max = \"9G\"\\n' >>/etc/vmshell/policy.toml")
    web1.sh("vmshell-admin policy check && systemctl reload vmshell-broker")
    wait_for(lambda: web1.run("alice", "explain set made memory=8G")[0] == 0)
    assert "[user.alice]" in web1.admin("policy", "show", "alice").stdout
    assert web1.run("alice", "rm made --yes")[0] == 0 and web1.run("alice", "rm shelf.root.img --yes")[0] == 0


# --- what runs on the host --------------------------------------------------------------------------------------------


def qemu_pid(host: Host) -> int:
    return int(host.exec("pgrep", "-x", "qemu-system-x86").stdout)


def test_qemus_process(web1: Host) -> None:
    """Uid, rights, filters, mounts, descriptors, limits: as the kernel tells them."""
    pid = qemu_pid(web1)
    lines = web1.exec("cat", f"/proc/{pid}/status").stdout.splitlines()
    status = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    assert len(set(status["Uid"])) == len(set(status["Gid"])) == 1
    assert int(status["Uid"][0]) > 2_100_000_000 and status["Groups"] == []
    assert {"".join(status[f"Cap{kind}"]) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == ["1"] and status["Seccomp_filters"] == ["2"]
    mounts = {line.split()[4] for line in web1.exec("cat", f"/proc/{pid}/mountinfo").stdout.splitlines()}
    assert mounts <= {
        "/", "/proc", "/dev/null", "/dev/urandom", "/usr/bin/qemu-system-x86_64",
        "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/share/qemu", "/usr/share/seabios", "/usr/lib/ipxe/qemu",
    }  # fmt: skip
    targets = web1.sh(f"readlink /proc/{pid}/fd/*").splitlines()
    files = {target for target in targets if target.startswith("/") and target not in ("/dev/null", "/dev/net/tun")}
    folder = "/var/lib/vmshell/vms/" + str(web1.uid("alice"))
    port = {file for file in files if re.fullmatch(r"/run/vmshell/vms/\d+/(input|output)", file)}  # its serial port
    assert len(port) == 2 and files == {f"{folder}/web1/disks/root", "/var/lib/vmshell/images/echo/disk.raw", *port}
    assert targets.count("/dev/net/tun") == 1  # its tap
    assert "/vmshell.slice/vmshell-vm-" in web1.exec("cat", f"/proc/{pid}/cgroup").stdout
    scope = web1.sh("systemctl list-units --plain --no-legend 'vmshell-vm-*' | cut -d' ' -f1").strip()
    shown = web1.exec("systemctl", "show", "-p", "MemoryMax", "-p", "TasksMax", scope).stdout
    assert re.search(r"MemoryMax=\d+\n", shown) and re.search(r"TasksMax=\d+\n", shown)
    spaces = web1.sh(f"readlink /proc/{{{pid},1}}/ns/{{mnt,net,pid,ipc,uts,user,cgroup}}")
    assert len(set(spaces.split())) == 14


def test_kill_9_of_broker_and_relay(web1: Host) -> None:
    """systemd starts them again, the guest never stops, the console that was attached goes on or can be attached again."""
    pid = qemu_pid(web1)
    console = attach(web1, "alice")
    echoes(console, "attached")
    web1.sh("systemctl kill -s KILL --kill-whom=main vmshell-broker")
    echoes(console, "without-broker")  # the broker was never in the way of these bytes
    detach(console)
    for turn in range(3):
        # They are started again after a moment: there must be somebody to kill.
        wait_for(lambda: "\n0\n" not in f"\n{web1.sh('systemctl show -P MainPID vmshell-relay vmshell-broker')}\n")
        web1.sh("systemctl kill -s KILL --kill-whom=main vmshell-relay vmshell-broker")
        wait_for(lambda: web1.run("alice", "list")[0] == 0)
        again = attach(web1, "alice")
        echoes(again, f"turn-{turn}")
        detach(again)
    assert qemu_pid(web1) == pid
    assert states(web1, "alice") == {"web1": "running"}


def test_an_attached_console_outlives_the_relay(web1: Host) -> None:
    """systemd keeps its descriptors: the same terminal goes on where it was, and nobody is told anything."""
    console = attach(web1, "alice")
    echoes(console, "before")
    before = web1.sh("systemctl show -P MainPID vmshell-relay")
    assert int(web1.sh("systemctl show -P NFileDescriptorStore vmshell-relay")) >= 4  # serial port, errors, viewer
    web1.sh("systemctl kill -s KILL --kill-whom=main vmshell-relay")
    wait_for(lambda: web1.sh("systemctl show -P MainPID vmshell-relay") not in (before, "0\n"))
    echoes(console, "afterwards")
    assert "went away" not in str(console.before)
    detach(console)


def test_an_upgrade_under_a_running_vm(web1: Host) -> None:
    pid = qemu_pid(web1)
    web1.make("install")
    wait_for(lambda: web1.run("alice", "list")[0] == 0)
    assert qemu_pid(web1) == pid and states(web1, "alice") == {"web1": "running"}
    console = attach(web1, "alice")
    echoes(console, "upgraded")
    console.close(force=True)
    assert web1.admin("doctor", check=False).returncode == 0
    done = web1.make("uninstall", check=False)
    assert done.returncode != 0 and qemu_pid(web1) == pid


def test_a_reboot_of_the_host_leaves_no_vm_half_alive(web1: Host) -> None:
    web1.reboot()
    wait_for(lambda: web1.run("alice", "list")[0] == 0)
    assert states(web1, "alice")["web1"] in ("off", "failed")
    assert web1.run("alice", "boot web1 --wait ready --timeout 120", timeout=150)[0] == 0
    assert states(web1, "alice") == {"web1": "running"}


# --- the other ways to log in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [("su", "-", "alice"), ("login", "-f", "alice"), ("su", "alice")], ids=["su-", "login", "su"])
def test_login_without_ssh(users: Host, argv: tuple[str, ...]) -> None:
    if argv[0] == "login" and "util-linux" in users.exec("login", "--version", check=False).stdout:
        pytest.skip("this release's login hangs its terminal up first, which only a real line survives")
    terminal = users.console(*argv)
    terminal.expect_exact("vmshell>")
    terminal.sendline("whoami")
    terminal.expect_exact("alice (uid")
    terminal.sendline("exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


def test_su_with_a_command(users: Host) -> None:
    done = users.exec("su", "-", "alice", "-c", "whoami")
    assert "alice" in done.stdout
    assert users.exec("su", "-", "alice", "-c", "id", check=False).returncode == 2


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.2)
