"""What `vmshell-admin user` and `doctor` decide without touching a host; the rest is tests/system/test_install.py."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vmshell.admin import doctor, users
from vmshell.refusals import AccountRefused, BadName

TREE = Path(__file__).resolve().parents[2]

GOOD_SSHD = f"""\
x11forwarding no
permituserrc no
disableforwarding yes
forcecommand {users.SHELL}
authorizedkeysfile /etc/ssh/vmshell-keys/%u
acceptenv none
permittunnel no
permituserenvironment no
"""


@pytest.mark.parametrize("name", ["alice", "a", "_svc", "j.doe", "a-b_c.1", "x" * 32])
def test_account_names(name: str) -> None:
    assert users.check_account_name(name) == name


BAD_NAMES = ["", ".", "..", "../x", "a/b", "-x", "1a", "Alice", "a b", "a\n", "a\0", "älice", "x" * 33, "a:b", ".a"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_account_names(name: str) -> None:
    with pytest.raises(BadName):
        users.check_account_name(name)


def test_a_line_is_added_once() -> None:
    assert users.with_line(["bob"], "alice") == ["bob", "alice"]
    assert users.with_line(["bob", " alice "], "alice") == ["bob", " alice "]


def test_keys_are_public_keys(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = Path(f"{key}.pub").read_text()
    both = tmp_path / "both"
    both.write_text(f"# mine\n\n{public}{public}")
    assert users.read_keys(str(both)) == public * 2
    with pytest.raises(AccountRefused, match="private key"):
        users.read_keys(str(key))
    both.write_text(f"{public}nonsense\n")
    with pytest.raises(AccountRefused, match="no public SSH key"):
        users.read_keys(str(both))
    with pytest.raises(AccountRefused, match="cannot be read"):
        users.read_keys(str(tmp_path))
    both.write_bytes(b"\xff\xfe")
    with pytest.raises(AccountRefused, match="not text"):
        users.read_keys(str(both))


def test_sshd_is_judged_by_what_it_answers() -> None:
    assert list(doctor.sshd_problems(GOOD_SSHD)) == []


@pytest.mark.parametrize("line", GOOD_SSHD.splitlines())
def test_every_sshd_setting_counts(line: str) -> None:
    key, _, value = line.partition(" ")
    other = {"yes": "no", "no": "yes", "none": "LANG"}.get(value, "/bin/sh")
    assert [problem for problem in doctor.sshd_problems(GOOD_SSHD.replace(line, f"{key} {other}")) if problem.startswith(key)]
    if key != "acceptenv":
        assert list(doctor.sshd_problems(GOOD_SSHD.replace(f"{line}\n", "")))


def install_sh(verb: str, destdir: Path) -> None:
    env = {**os.environ, "DESTDIR": str(destdir)}
    done = subprocess.run(["sh", f"{TREE}/etc/install.sh", verb], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_laid_out_below_destdir(tmp_path: Path) -> None:
    """What a package would hold: no host is touched, no placeholder is left, all is readable and only root's to write."""
    install_sh("install", tmp_path)
    files = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    wanted = {"usr/local/bin/vmshell", "etc/pam.d/vmshell", "etc/vmshell/policy.toml", "usr/local/share/man/man1/vmshell.1"}
    assert wanted <= set(files)
    assert "etc/shells" not in files
    for name, path in files.items():
        assert path.stat().st_mode & 0o022 == 0, name
        assert path.stat().st_mode & 0o444 == 0o444, name
        if not name.startswith("usr/local/lib/vmshell/"):
            assert not set(path.read_text().split("@")) & {"LIBDIR", "DISTDIR", "VERBS"}, name
    install_sh("uninstall", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
