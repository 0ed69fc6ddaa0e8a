"""`make install` on a real host: what is there afterwards, that it confines, upgrades, and goes away without the users' VMs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pexpect
import pytest

from tests.host.machine import CHECKOUT, Host

# The first test of a machine makes the hosts' image, as fast as the package mirror is.
pytestmark = [pytest.mark.system, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(900)]

PROCESSES = ("broker", "launcher", "relay", "tapnet")
SOCKETS = tuple(f"vmshell-{name}.socket" for name in PROCESSES)
UNITS = (*SOCKETS, *(f"vmshell-{name}.service" for name in PROCESSES), "vmshell-names.service")
VMS = "/var/lib/vmshell/vms"
LIBDIR = "/usr/local/lib/vmshell"
CODE = f"{LIBDIR}/current"
LIBNFTABLES = "/usr/lib/x86_64-linux-gnu/libnftables.so.1"
DROP_IN = "/etc/ssh/sshd_config.d/50-vmshell.conf"


def version_of(host: Host) -> str:
    """The name of the version in force."""
    return host.exec("basename", host.exec("readlink", CODE).stdout.strip()).stdout.strip()


def main_pid(host: Host, unit: str) -> int:
    return int(host.exec("systemctl", "show", "-P", "MainPID", unit).stdout)


# --- what is there ----------------------------------------------------------------------------------------------------


def test_units_are_active_and_nothing_failed(host: Host) -> None:
    assert host.exec("systemctl", "is-active", *UNITS).stdout.split() == ["active"] * len(UNITS)
    assert host.exec("systemctl", "is-enabled", *SOCKETS, "vmshell-broker.service").stdout.split() == ["enabled"] * (
        len(SOCKETS) + 1
    )
    assert host.sh("systemctl --failed --no-legend --plain").strip() == ""


def test_systemd_understands_every_line(host: Host) -> None:
    done = host.exec("systemd-analyze", "verify", *UNITS, "vmshell.slice", check=False)
    assert "vmshell" not in done.stdout + done.stderr


def test_each_service_has_the_rights_it_should(host: Host) -> None:
    def status(unit: str) -> dict[str, str]:
        lines = host.exec("cat", f"/proc/{main_pid(host, unit)}/status").stdout.splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    launcher = status("vmshell-launcher")
    # setgid 6, setuid 7, setpcap 8
    assert int(launcher["CapBnd"], 16) == int(launcher["CapEff"], 16) == 1 << 6 | 1 << 7 | 1 << 8
    # QEMU's two filters are counted from none: what the launcher has, QEMU inherits.
    assert launcher["Seccomp_filters"] == "0" and launcher["NoNewPrivs"] == "1"
    # net_bind_service 10, net_admin 12, net_raw 13
    rights = {"broker": 0, "relay": 0, "tapnet": 1 << 12, "names": 1 << 10 | 1 << 12 | 1 << 13}
    for unit in (f"vmshell-{name}" for name in rights):
        service = status(unit)
        assert {int(service[f"Cap{kind}"], 16) for kind in ("Bnd", "Prm", "Eff")} == {rights[unit.removeprefix("vmshell-")]}
        assert service["Uid"].split() == [str(host.uid(unit))] * 4
        assert service["NoNewPrivs"] == "1" and service["Seccomp"] == "2"


def test_tapnet_opens_no_device_but_one(host: Host) -> None:
    pid = main_pid(host, "vmshell-tapnet")
    groups = host.exec("cat", f"/proc/{pid}/cgroup").stdout
    allowed = host.sh(f"cat /sys/fs/cgroup/devices$(grep :devices: /proc/{pid}/cgroup | cut -d: -f3)/devices.list", check=False)
    if ":devices:" not in groups or not allowed:
        pytest.skip("which devices a cgroup may use is in no file here")
    assert "c 10:200 rw" in allowed and "a *:* rwm" not in allowed and "b *:*" not in allowed.replace("b *:* m", "")


def test_the_broker_sees_the_hosts_own_boot_id(host: Host) -> None:
    """By it the broker tells running VMs from those of another boot. Some hardening options mount a /proc with another one."""
    path = "/proc/sys/kernel/random/boot_id"
    seen = host.exec("nsenter", "-t", str(main_pid(host, "vmshell-broker")), "-m", "cat", path).stdout
    assert seen == host.exec("cat", path).stdout


def test_only_the_launcher_is_root(host: Host) -> None:
    owners = host.sh("ps -eo user:20,args | grep '[/]usr/local/lib/vmshell/'").splitlines()
    starters = [line.split()[3] for line in owners if line.startswith("root ")]
    assert starters == [f"{LIBDIR}/current/vmshell/launcher/__main__.py"]


def test_no_line_of_a_unit_runs_with_more_rights_than_its_user(host: Host) -> None:
    """`+` or `!` before a command, and a StateDirectory, which would give the broker what is root's."""
    for unit in ("vmshell-broker.service", "vmshell-relay.service", "vmshell-tapnet.service", "vmshell-names.service"):
        lines = [line for line in host.exec("systemctl", "cat", unit).stdout.splitlines() if not line.startswith("#")]
        assert not [line for line in lines if re.match(r"Exec\w+=[-@:]*[+!]", line)], unit
        assert not [line for line in lines if line.startswith(("StateDirectory=", "PermissionsStartOnly="))], unit


def test_a_jail_can_mount_its_proc_below_the_launcher(host: Host) -> None:
    """A hardening option that masks /proc would only show when the first VM starts, as bubblewrap's refusal."""
    jail = "bwrap --unshare-all --ro-bind /usr /usr --symlink usr/lib64 /lib64 --symlink usr/lib /lib --proc /proc --dev /dev"
    drop = "setpriv --reuid 2100000001 --regid 2100000001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all --"
    host.sh(f"nsenter -t {main_pid(host, 'vmshell-launcher')} -m -n {drop} {jail} /usr/bin/test -d /proc/self")


def test_the_launcher_may_start_scopes(host: Host) -> None:
    """systemd-run from inside the launcher's own bounds, as a VM is started, and its way down to the VM's uid."""
    host.sh(
        "systemd-run --quiet --wait --pipe -p CapabilityBoundingSet='CAP_SETUID CAP_SETGID CAP_SETPCAP'"
        " -p NoNewPrivileges=yes -p ProtectSystem=strict -p ProtectHome=yes -p PrivateNetwork=yes -p PrivateTmp=yes"
        " -p InaccessiblePaths=-/var/lib/vmshell"
        " systemd-run --quiet --scope --slice=vmshell.slice -p MemoryMax=100M"
        " setpriv --reuid 2100000001 --regid 2100000001 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
        " grep -q vmshell.slice /proc/self/cgroup"
    )


def test_sockets_are_for_those_they_are_for(host: Host) -> None:
    assert host.sh("cd /run/vmshell; stat -c '%n %a %U %G' . *.sock broker vms names").splitlines() == [
        ". 755 root root",
        "broker.sock 660 root vmusers",
        "front.sock 600 vmshell-broker vmshell-broker",
        "launcher.sock 600 vmshell-broker vmshell-broker",
        "relay.sock 600 vmshell-broker vmshell-broker",
        "tapnet.sock 600 vmshell-broker vmshell-broker",
        "broker 700 vmshell-broker vmshell-broker",
        "vms 750 vmshell-broker vmshell-relay",
        "names 755 vmshell-broker vmshell-broker",
    ]
    assert host.sh("cd /var/lib/vmshell; stat -c '%n %a %U %G' . * ../vmshell-home /var/log/vmshell").splitlines() == [
        ". 711 root root",
        "images 750 root vmshell-broker",
        "net 700 vmshell-broker vmshell-broker",
        "shelf 700 vmshell-broker vmshell-broker",
        "version 644 root root",
        "vms 700 vmshell-broker vmshell-broker",
        "../vmshell-home 755 root root",
        "/var/log/vmshell 700 vmshell-relay vmshell-relay",
    ]
    groups = host.sh(f"grep Groups: /proc/{main_pid(host, 'vmshell-broker')}/status").split()[1:]
    assert {int(group) for group in groups} == {host.gid("vmshell-broker"), host.gid("vmshell-relay")}
    assert host.exec("getent", "group", "vmusers").stdout.strip().endswith(":alice,bob")


def test_code_is_roots_and_compiled(host: Host) -> None:
    """A18: nothing in the tree, nor above it, that others may write."""
    loose = "! -uid 0 -o -perm /022 ! -type l"
    assert host.sh(f"find {LIBDIR} /usr/local/bin/vmshell /usr/local/sbin/vmshell-admin {loose}").strip() == ""
    assert host.sh(f"ls -A {LIBDIR}").split() == ["current", "versions"]
    assert host.sh(f"ls -A {LIBDIR}/versions").split() == [version_of(host)]
    compiled = host.sh(f"find {LIBDIR} -name '*.pyc' | wc -l")
    assert int(compiled) == int(host.sh(f"find {LIBDIR} -name '*.py' | wc -l"))


def test_starters_name_the_installed_code(host: Host) -> None:
    for path in ("/usr/local/bin/vmshell", "/usr/local/sbin/vmshell-admin"):
        text = host.exec("cat", path).stdout
        assert text.startswith("#!/usr/bin/") and text.splitlines()[0].endswith("python3 -IS")
        assert CODE in text and "@" not in text


def test_man_pages_are_readable(host: Host) -> None:
    # The verbs in vmshell(1) are put there by `make install`, from the shell's own table.
    pages = {"vmshell.1": "boot NAME [--console]", "vmshell-admin.8": "user add", "vmshell-policy.5": "uid_base"}
    for page, words in pages.items():
        path = f"/usr/local/share/man/man{page[-1]}/{page}"
        done = host.exec("man", "--warnings", "-l", path)
        text = " ".join(re.sub(".\b", "", done.stdout).split())  # filled lines have wider blanks
        assert words in text and not done.stderr
        assert host.sh(f"realpath $(man -w {page[-1]} {page[:-2]})").strip() == path


def test_sshd_takes_its_configuration(host: Host) -> None:
    host.exec("sshd", "-t")
    assert host.exec("systemctl", "is-active", "ssh").stdout.strip() == "active"


# --- accounts ---------------------------------------------------------------------------------------------------------


def test_user_add_twice_changes_nothing(host: Host) -> None:
    files = "/etc/passwd /etc/group /etc/shadow /etc/cron.deny /etc/at.deny /etc/ssh/vmshell-keys/alice"
    before = host.sh(f"cat {files}")
    done = host.admin("user", "add", "alice", "--key", "-", stdin=host.public_key())
    assert done.stdout == "alice: ready\n" and done.stderr == ""
    assert host.sh(f"cat {files}") == before


def test_an_account_has_nothing_of_its_own_on_disk(host: Host) -> None:
    entry = host.exec("getent", "passwd", "alice").stdout.strip().split(":")
    assert entry[5:] == ["/var/lib/vmshell-home", "/usr/local/bin/vmshell"]
    assert host.exec("getent", "shadow", "alice").stdout.split(":")[1] == "*"
    assert host.sh("stat -c '%a %U' /etc/ssh/vmshell-keys /etc/ssh/vmshell-keys/alice").splitlines() == ["755 root", "644 root"]
    assert host.sh("ls -A /var/lib/vmshell-home").strip() == ""
    assert host.sh("ls /var/lib/systemd/linger 2>/dev/null | grep -c alice", check=False).strip() == "0"


BAD_ACCOUNTS = ["root", "daemon", "nobody", "sshd", "../x", "Alice", "a b", "-x", "", "x" * 33, "a\nb", "älice"]


@pytest.mark.parametrize("name", BAD_ACCOUNTS)
def test_user_add_refuses(host: Host, name: str) -> None:
    before = host.sh("cat /etc/passwd; ls /etc/ssh/vmshell-keys")
    done = host.admin("user", "add", "--", name, check=False)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert host.sh("cat /etc/passwd; ls /etc/ssh/vmshell-keys") == before


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("ssh-ed25519 nonsense\n", "no public SSH key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n", "private key"),
        ("\n# only a remark\n", "no key"),
        ("\x1b[31m\n", "no public SSH key"),
    ],
)
def test_user_add_refuses_bad_keys(host: Host, text: str, word: str) -> None:
    done = host.admin("user", "add", "dave", "--key", "-", stdin=text, check=False)
    assert done.returncode == 1 and word in done.stderr
    assert host.exec("getent", "passwd", "dave", check=False).returncode != 0


def test_user_add_takes_in_an_account_that_exists(host: Host) -> None:
    host.sh("useradd -m -s /bin/bash -G sudo erin")
    said = host.admin("user", "add", "erin", "--key", "-", stdin=host.public_key()).stderr
    assert "/bin/bash → /usr/local/bin/vmshell" in said and "/home/erin → /var/lib/vmshell-home" in said
    assert "WARNING: erin: it is also in sudo" in said
    host.admin("user", "remove", "erin", "--keep-account")
    assert host.exec("getent", "passwd", "erin").stdout.strip().endswith(":/usr/sbin/nologin")
    assert "erin" not in host.exec("getent", "group", "vmusers").stdout


def test_user_list(host: Host) -> None:
    rows = [line.split() for line in host.admin("user", "list").stdout.splitlines()]
    assert rows[0][0] == "NAME"
    for name, row in zip(("alice", "bob"), rows[1:3], strict=True):
        assert [row[0], *row[2:5]] == [name, "vmshell", "shared", "1"]


def test_user_remove_ends_the_login_and_the_account(host: Host) -> None:
    host.add_user("carl")
    session = host.spawn("carl")
    wait_for(lambda: host.exec("pgrep", "-u", "carl", "-f", "vmshell", check=False).returncode == 0)
    host.admin("user", "remove", "carl")
    session.expect_exact([pexpect.EOF])
    session.close()
    assert host.exec("getent", "passwd", "carl", check=False).returncode != 0
    assert host.exec("test", "-e", "/etc/ssh/vmshell-keys/carl", check=False).returncode != 0
    assert "carl" not in host.sh("cat /etc/cron.deny /etc/at.deny")
    assert host.run("carl", "list")[0] == 255


def test_user_remove_does_not_free_the_uid_of_vms(host: Host) -> None:
    """D22: the next account with this uid would own them."""
    host.add_user("dora")
    own = f"{VMS}/{host.uid('dora')}"
    host.sh(f"mkdir -p {own}/web1; chown -R --reference={VMS} {own}; chmod -R 700 {own}")
    done = host.admin("user", "remove", "dora", check=False)
    assert done.returncode == 1 and "web1" in done.stderr
    host.exec("getent", "passwd", "dora")
    assert [row.split()[-1] for row in host.admin("user", "list").stdout.splitlines() if row.startswith("dora")] == ["1"]
    host.admin("user", "remove", "dora", "--keep-account")
    assert host.exec("getent", "passwd", "dora").stdout.strip().endswith(":/usr/sbin/nologin")
    host.sh(f"rm -r {own}; userdel dora")


def test_without_the_broker_nothing_is_taken_away(host: Host) -> None:
    """D22: nobody can say what an account owns, or who uses an image; the login alone can be taken."""
    host.add_user("dora")
    image = "/var/lib/vmshell/images/lone"
    host.sh(f"mkdir -p {image}; echo 'description = \"x\"' >{image}/image.toml")
    host.sh("systemctl stop vmshell-broker.socket vmshell-broker.service")
    try:
        removed, rm = (host.admin(*words, check=False) for words in (("user", "remove", "dora"), ("image", "rm", "lone")))
        listed = host.admin("user", "list")
        kept = host.admin("user", "remove", "dora", "--keep-account")
    finally:
        host.sh("systemctl start vmshell-broker.socket vmshell-broker.service")
    assert removed.returncode == rm.returncode == 69
    assert "nobody can say what dora owns" in removed.stderr and "nobody can say which VMs use image lone" in rm.stderr
    assert [row.split()[-1] for row in listed.stdout.splitlines() if row.startswith("dora")] == ["?"]
    assert kept.stdout == "dora: removed\n"
    assert host.exec("getent", "passwd", "dora").stdout.strip().endswith(":/usr/sbin/nologin")
    assert host.admin("image", "rm", "lone").stdout == "lone: removed\n"
    host.sh("userdel dora")


# --- doctor -----------------------------------------------------------------------------------------------------------


def doctor(host: Host) -> tuple[int, str]:
    done = host.admin("doctor", check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_doctor_finds_nothing_wrong(host: Host) -> None:
    status, text = doctor(host)
    assert status == 0 and "FAIL" not in text, text
    subjects = ("qemu", "jail", "code", "units", "rights", "broker", "network", "names", "routing", "shells", "pam")
    for subject in (*subjects, "sshd          alice"):
        assert f"OK    {subject}" in text, text


def test_doctor_waits_for_what_is_just_being_restarted(host: Host) -> None:
    """The broker has the names service restarted whenever an address has changed: that is no fault."""
    folder = "/run/systemd/system/vmshell-names.service.d"
    host.sh(f"mkdir -p {folder}; printf '[Service]\\nExecStartPre=/bin/sleep 3\\n' >{folder}/slow.conf; systemctl daemon-reload")
    try:
        host.sh("systemctl restart --no-block vmshell-names")
        status, text = doctor(host)
    finally:
        host.sh(f"rm -r {folder}; systemctl daemon-reload")
    assert status == 0 and "OK    names" in text and "OK    rights" in text, text


@pytest.mark.parametrize(
    ("breaks", "mends", "line"),
    [
        ("echo /usr/local/bin/vmshell >>/etc/shells", "sed -i '/vmshell/d' /etc/shells", "FAIL  shells"),
        (f"chmod g+w {CODE}/vmshell/broker", f"chmod g-w {CODE}/vmshell/broker", "FAIL  code"),
        (f"chmod o+w {LIBDIR}", f"chmod o-w {LIBDIR}", "FAIL  code"),
        ("chmod o+w /usr/local/lib", "chmod o-w /usr/local/lib", "FAIL  code"),
        (f"mv {DROP_IN} /root/", f"mv /root/50-vmshell.conf {DROP_IN}", "FAIL  sshd"),
        (
            "printf 'Match User alice\\n DisableForwarding no\\n' >/etc/ssh/sshd_config.d/10-other.conf",
            "rm /etc/ssh/sshd_config.d/10-other.conf",
            "FAIL  sshd",
        ),
        ("systemctl stop vmshell-relay.socket", "systemctl start vmshell-relay.socket vmshell-relay.service", "FAIL  units"),
        ("systemctl stop vmshell-names", "systemctl start vmshell-names", "FAIL  names"),
        ("mv /usr/sbin/dnsmasq /root/", "mv /root/dnsmasq /usr/sbin/", "FAIL  names"),
        ("systemctl stop vmshell-tapnet.socket", "systemctl start vmshell-tapnet.socket vmshell-tapnet.service", "FAIL  network"),
        ("chmod 600 /dev/net/tun", "chmod 666 /dev/net/tun", "FAIL  network"),
        (f"mv {LIBNFTABLES} /root/", f"mv /root/libnftables.so.1 {LIBNFTABLES}", "FAIL  network"),
        ("mv /usr/bin/bwrap /root/", "mv /root/bwrap /usr/bin/", "FAIL  jail"),
        ("mv /etc/pam.d/vmshell /root/", "mv /root/vmshell /etc/pam.d/", "FAIL  pam"),
        ("usermod -d /tmp alice", "usermod -d /var/lib/vmshell-home alice", "FAIL  pam"),
    ],
)
def test_doctor_sees(host: Host, breaks: str, mends: str, line: str) -> None:
    if "usermod" in breaks and "user_readenv=1" not in host.exec("cat", "/etc/pam.d/sshd").stdout:
        pytest.skip("this release's sshd does not read ~/.pam_environment")
    host.sh(breaks)
    try:
        status, text = doctor(host)
    finally:
        host.sh(mends)
    assert line in text, text
    assert status == 1 and "→" in text


@pytest.mark.parametrize(
    ("breaks", "mends", "words"),
    [
        ("sed -i /alice/d /etc/cron.deny", "echo alice >>/etc/cron.deny", "cron"),
        ("loginctl enable-linger alice", "loginctl disable-linger alice", "lingers"),
        ("gpasswd -a alice adm", "gpasswd -d alice adm", "adm"),
    ],
)
def test_doctor_warns_of_weak_accounts(host: Host, breaks: str, mends: str, words: str) -> None:
    host.sh(breaks)
    try:
        status, text = doctor(host)
    finally:
        host.sh(mends)
    assert status == 0
    assert any(row.startswith("WARN  accounts") and "alice" in row and words in row for row in text.splitlines()), text


# --- installing again, and a host that is not as it should be ---------------------------------------------------------


def test_the_launcher_refuses_code_that_others_can_write(host: Host) -> None:
    """A18: what is root looks at its own code, and at every folder above the one that the link leads to."""
    host.sh(f"chmod o+w {LIBDIR}/versions")
    try:
        done = host.exec("systemctl", "restart", "vmshell-launcher", check=False)
        assert done.returncode != 0
        assert "can be written by others" in host.sh("journalctl -b -u vmshell-launcher --no-pager")
    finally:
        host.sh(f"chmod o-w {LIBDIR}/versions; systemctl restart vmshell-launcher")


def test_installing_again_is_the_upgrade(host: Host) -> None:
    """New code takes over, what runs in vmshell.slice runs on, the administrator's policy stays."""
    start_pretended_vm(host, "vmshell-vm-9999.scope")
    pid = main_pid(host, "vmshell-broker")
    host.sh("echo '# mine' >>/etc/vmshell/policy.toml")
    said = host.make("install", "KVM=1").stdout
    assert "kept your /etc/vmshell/policy.toml" in said
    assert host.sh("tail -n 1 /etc/vmshell/policy.toml") == "# mine\n"
    assert main_pid(host, "vmshell-broker") not in (0, pid)
    assert host.exec("systemctl", "is-active", "vmshell-vm-9999.scope").stdout.strip() == "active"
    host.exec("systemctl", "stop", "vmshell-vm-9999.scope")
    status, text = doctor(host)
    assert status == 0, text


def test_installing_the_same_again_changes_no_file(host: Host) -> None:
    """Not even a folder's time: nothing is written beside and renamed that is there already."""
    listing = "find /usr/local /etc /var/lib/vmshell /var/lib/vmshell-home -printf '%p %i %m %u %g %s %T@ %C@ %l\n' | sort"
    host.make("install", "KVM=1")
    before = host.sh(listing).splitlines()
    host.make("install", "KVM=1")
    assert host.sh(listing).splitlines() == before


def test_a_damaged_version_is_put_anew(host: Host) -> None:
    module = f"{CODE}/vmshell/names.py"
    for damage in (f"echo >>{module}", f"rm {module}", f"chmod o+w {CODE}/vmshell", f"echo >{CODE}/vmshell/socket.py"):
        host.sh(damage)
        host.make("install", "KVM=1")
        host.sh(f'cd {CODE} && diff -r -x __pycache__ vmshell {CHECKOUT}/vmshell && test -z "$(find . -perm /022)"')
        assert host.sh(f"ls -A {LIBDIR}/versions").split() == [version_of(host)]


def test_a_version_stays_while_somebody_has_it(host: Host) -> None:
    """Who is logged in imports late, and gets what belongs to the version that he began with."""
    first = version_of(host)
    session = host.spawn("alice")
    session.expect_exact("vmshell> ")
    versions = [install_another(host, number) for number in range(1, 4)]
    assert len({first, *versions}) == 4
    # The one in force, the one before, and the one that the session has.
    assert set(host.sh(f"ls -A {LIBDIR}/versions").split()) == {first, *versions[1:]}
    assert host.sh(f"basename $(readlink {LIBDIR}/previous)").strip() == versions[1]
    for unit in PROCESSES:
        held = host.sh(f"readlink /proc/{main_pid(host, f'vmshell-{unit}')}/fd/*", check=False)
        assert f"{LIBDIR}/versions/{versions[2]}" in held.split(), unit
    host.sh(f"echo 'raise ValueError' >{CODE}/vmshell/shell/commands/network.py")
    session.sendline("networks")
    session.expect_exact("internet")
    session.sendline("exit")
    session.expect_exact([pexpect.EOF])
    session.close()
    host.install()
    assert set(host.sh(f"ls -A {LIBDIR}/versions").split()) == {first, versions[2]}
    assert version_of(host) == first


def test_code_of_before_there_were_versions_stays_while_it_runs(host: Host) -> None:
    """It lay in the folder itself; its processes hold nothing, and are told by their command line."""
    old = f"{LIBDIR}/vmshell/__main__.py"
    host.sh(f"mkdir {LIBDIR}/vmshell {LIBDIR}/tapnet; echo 'import time; time.sleep(600)' >{old}")
    host.sh(f"systemd-run --quiet --unit=old-shell /usr/bin/python3 -IS {old}")
    host.make("install")
    host.sh(f"test -e {old} && test -e {LIBDIR}/tapnet && systemctl stop old-shell")
    host.make("install")
    host.sh(f"test ! -e {LIBDIR}/vmshell && test ! -e {LIBDIR}/tapnet")


def test_a_drop_in_that_sshd_refuses_is_taken_back(host: Host) -> None:
    before = host.exec("cat", DROP_IN).stdout
    drop_in = f"{CHECKOUT}/etc/sshd_config.d/50-vmshell.conf"
    host.sh(f"cp {drop_in} /root/good; echo '    PermitUserEnvironment no' >>{drop_in}")  # not allowed inside Match
    try:
        done = host.make("install", check=False)
    finally:
        host.sh(f"mv /root/good {drop_in}")
    assert done.returncode != 0 and "sshd refuses" in done.stderr
    assert host.exec("cat", DROP_IN).stdout == before
    host.exec("sshd", "-t")
    # Not even a first installation leaves the refused file behind.
    host.sh(f"mv {DROP_IN} /root/kept; cp {drop_in} /root/good; echo '    PermitUserEnvironment no' >>{drop_in}")
    assert host.make("install", check=False).returncode != 0
    host.sh(f"mv /root/good {drop_in}; test ! -e {DROP_IN}; mv /root/kept {DROP_IN}")


def test_it_survives_a_reboot(host: Host) -> None:
    """Nobody connects: what the broker brings back with the host does not wait for a first client."""
    host.reboot()
    wait_for(lambda: host.exec("systemctl", "is-active", *UNITS, check=False).stdout.split() == ["active"] * len(UNITS))
    assert "OK    broker" in doctor(host)[1]


# --- and away again, last ---------------------------------------------------------------------------------------------


def test_uninstall_waits_for_running_vms(host: Host) -> None:
    start_pretended_vm(host, "vmshell-vm-9998.scope")
    done = host.make("uninstall", check=False)
    assert done.returncode != 0 and "VMs are running: 1" in done.stderr
    assert host.exec("systemctl", "is-active", "vmshell-broker.socket").stdout.strip() == "active"
    host.exec("systemctl", "stop", "vmshell-vm-9998.scope")


def test_uninstall_keeps_what_is_the_users(host: Host) -> None:
    host.sh("mkdir -p -m 700 /var/lib/vmshell/vms/1000/web1 && echo disk >/var/lib/vmshell/vms/1000/web1/disk")
    host.sh("echo '# mine' >>/etc/vmshell/policy.toml")
    # Ours, as tapnet leaves them when it is stopped, and somebody else's.
    host.sh("ip link add vtb000007 type bridge; ip link set vtb000007 alias vmshell; ip link add vtb-theirs type bridge")
    host.sh("nft add table bridge vmshell; nft add table inet vmshell; nft add table inet theirs")
    said = host.make("uninstall").stdout
    links = host.sh("ip -br link")
    assert "vtb000007" not in links and "vtb-theirs" in links
    assert host.sh("nft list tables") == "table inet theirs\n"
    assert "127.77.0.53" not in host.sh("ip addr")
    host.sh("ip link del vtb-theirs; nft delete table inet theirs")
    assert "alice bob" in said and "/var/lib/vmshell" in said
    assert host.exec("cat", "/var/lib/vmshell/vms/1000/web1/disk").stdout == "disk\n"
    assert host.sh("tail -n 1 /etc/vmshell/policy.toml") == "# mine\n"
    left = host.sh("find /boot /etc /home /opt /run /srv /tmp /usr /var/cache /var/spool /var/tmp -xdev -iname '*vmshell*'")
    assert sorted(left.split()) == ["/etc/ssh/vmshell-keys", "/etc/vmshell"]
    assert host.sh("systemctl list-units --all --no-legend --plain 'vmshell*'").strip() == ""
    host.exec("sshd", "-t")
    assert host.run("alice", "list")[0] == 255  # the shell is gone, so sshd lets nobody in
    host.sh("rm -r /var/lib/vmshell/vms/1000/web1")  # no VM: `doctor` would say that it cannot be read


def test_and_installed_again_the_users_are_back(host: Host) -> None:
    host.make("install")
    status, text = doctor(host)
    assert status == 0, text


def install_another(host: Host, number: int) -> str:
    """Install code that differs from the tree's, and return its version's name."""
    host.sh(f"echo '# {number}' >{CHECKOUT}/vmshell/another.py")
    host.make("install")
    return version_of(host)


def start_pretended_vm(host: Host, scope: str) -> None:
    """Something in vmshell.slice where a VM would be."""
    host.sh(f"systemd-run --quiet --scope --slice=vmshell.slice --unit={scope} sleep 600 </dev/null >/dev/null 2>&1 &")
    wait_for(lambda: host.exec("systemctl", "is-active", scope, check=False).returncode == 0)


def wait_for(happened: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
