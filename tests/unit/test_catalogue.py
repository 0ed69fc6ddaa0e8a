"""vmshell-admin: its verb table, and the image catalogue's rules, with images of a few bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.images import admin_command, run_admin
from vmshell.admin import catalogue as catalogue_module
from vmshell.admin import main as admin
from vmshell.admin import usage
from vmshell.admin.catalogue import Catalogue, Image
from vmshell.admin.verbs import Verb
from vmshell.errors import VmshellError
from vmshell.layout import Layout
from vmshell.refusals import CatalogueBusy, ImageDamaged, ImageInUse, NoSuchImage, Usage


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(etc=f"{tmp_path}/etc", state=f"{tmp_path}/state", run=f"{tmp_path}/run", log=f"{tmp_path}/log", embedded=True)


def publish(layout: Layout, name: str, *, disk: bool, contents: bytes = b"x" * 512) -> None:
    catalogue = Catalogue(layout)
    file = "disk.raw" if disk else "vmlinuz"
    boot = {} if disk else {"kernel": file, "cmdline": "quiet"}
    image = Image(name, 'a "quoted" \\ one', 96, boot, file if disk else "", 512 if disk else 0)
    with catalogue.locked(), catalogue.workspace() as work:
        folder = f"{work}/image"
        os.mkdir(folder)
        Path(folder, file).write_bytes(contents)
        catalogue.publish(folder, image, "made by a test")


def refer(layout: Layout, image: str, name: str = "web1", record: str = "") -> None:
    folder = Path(layout.vm_state(os.getuid(), name))
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(record or json.dumps({"images": [image]}))


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_published_image_is_whole_pinned_and_read_only(layout: Layout) -> None:
    publish(layout, "demo", disk=True)
    folder = Path(layout.images, "demo")
    table = tomllib.loads((folder / "image.toml").read_text())
    assert table["disk"] == {"file": "disk.raw", "format": "raw", "size": 512}
    assert table["sha256"] == {"disk.raw": hashlib.sha256(b"x" * 512).hexdigest()}
    assert table["description"] == 'a "quoted" \\ one'
    assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == {"image.toml": 0o444, "disk.raw": 0o444}
    assert folder.stat().st_mode & 0o777 == 0o755
    assert Path(layout.state).stat().st_mode & 0o777 == 0o700
    catalogue = Catalogue(layout)
    assert catalogue.names() == ["demo"]
    assert catalogue.problem(catalogue.read("demo")) == ""
    assert sorted(os.listdir(layout.images)) == [".lock", "demo"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_second_build_replaces_the_first_and_open_files_live_on(
    layout: Layout, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(layout, "demo", disk=False, contents=b"old")
    if not exchange:  # a file system without RENAME_EXCHANGE answers this flag with EINVAL
        monkeypatch.setattr("vmshell.admin.catalogue._RENAME_EXCHANGE", 0xFFFF)
    with open(f"{layout.images}/demo/vmlinuz", "rb") as old:
        refer(layout, "demo")  # a kernel may change under a VM
        publish(layout, "demo", disk=False, contents=b"new")
        assert old.read() == b"old"
        assert Path(f"/proc/self/fd/{old.fileno()}").read_bytes() == b"old"  # as QEMU opens it once more
    assert Path(layout.images, "demo", "vmlinuz").read_bytes() == b"new"
    assert sorted(os.listdir(layout.images)) == [".lock", "demo"]


def test_a_disk_with_overlays_over_it_is_never_replaced(layout: Layout) -> None:
    publish(layout, "demo-disk", disk=True, contents=b"a" * 512)
    publish(layout, "demo-disk", disk=True, contents=b"b" * 512)
    refer(layout, "demo-disk")
    with pytest.raises(ImageInUse) as caught:
        publish(layout, "demo-disk", disk=True, contents=b"c" * 512)
    assert "/web1" in str(caught.value)
    assert "--as NAME" in caught.value.advice()
    assert Path(layout.images, "demo-disk", "disk.raw").read_bytes() == b"b" * 512
    assert sorted(os.listdir(layout.images)) == [".lock", "demo-disk"]
    publish(layout, "demo-new", disk=True)


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"images": ["other"]}'])
def test_a_record_that_cannot_be_read_protects_every_disk(layout: Layout, record: str) -> None:
    publish(layout, "demo-disk", disk=True)
    folder = Path(layout.vm_state(os.getuid(), "broken"))
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(record)
    if record == '{"images": ["other"]}':
        assert usage.users_of(layout, "demo-disk").count == 0
    else:
        assert usage.users_of(layout, "demo-disk").count == 1


def test_a_vm_being_made_counts_and_one_being_deleted_does_not(layout: Layout) -> None:
    refer(layout, "demo-disk", ".new-4")
    refer(layout, "demo-disk", ".rm-5")
    Path(layout.vms, "next").write_text("6\n")
    assert usage.users_of(layout, "demo-disk").count == 1


def test_what_a_killed_build_left_is_cleaned_by_the_next(layout: Layout) -> None:
    publish(layout, "demo", disk=False)
    left = Path(layout.images, ".build-abc", "image")
    left.mkdir(parents=True)
    (left / "vmlinuz").write_bytes(b"half")
    assert Catalogue(layout).names() == ["demo"]
    with Catalogue(layout).locked():
        assert not left.parent.exists()


def test_two_builders_do_not_meet(layout: Layout) -> None:
    with Catalogue(layout).locked():
        done = run_admin(layout, "image", "rm", "demo")
        assert done.returncode == 3  # there is none; the lock is not even asked
        with pytest.raises(CatalogueBusy), Catalogue(layout).locked():
            pass
    publish(layout, "demo", disk=False)
    with Catalogue(layout).locked():
        done = run_admin(layout, "image", "rm", "demo")
    assert done.returncode == 6
    assert done.stderr.startswith("vmshell-admin: another vmshell-admin is at work on the image catalogue\n")


# --- list, check, rm --------------------------------------------------------------------------------------------------


def test_list_check_rm(layout: Layout) -> None:
    publish(layout, "demo", disk=False)
    publish(layout, "demo-disk", disk=True)
    refer(layout, "demo-disk")
    listed = run_admin(layout, "image", "list")
    assert listed.returncode == 0
    rows = [line.split() for line in listed.stdout.splitlines()]
    assert rows[0][:5] == ["NAME", "BOOTS", "SIZE", "MEMORY", "VMS"]
    assert [row[:2] + row[3:5] for row in rows[1:]] == [["demo", "kernel", "96M", "0"], ["demo-disk", "disk", "96M", "1"]]
    checked = run_admin(layout, "image", "check")
    assert (checked.returncode, checked.stdout) == (0, "demo: ok\ndemo-disk: ok\n")
    refused = run_admin(layout, "image", "rm", "demo-disk")
    assert refused.returncode == 4
    assert "is in use by" in refused.stderr
    assert "remove those VMs first" in refused.stderr
    removed = run_admin(layout, "image", "rm", "demo")
    assert (removed.returncode, removed.stdout) == (0, "demo: removed\n")
    assert sorted(os.listdir(layout.images)) == [".lock", "demo-disk"]


def test_check_finds_each_kind_of_damage(layout: Layout) -> None:
    damage = {"changed": "vmlinuz is not the file that was built", "gone": "vmlinuz is missing"}
    damage["unpinned"] = "vmlinuz has no hash"
    for name in [*damage, "toml", "noml"]:
        publish(layout, name, disk=False)
    folder = Path(layout.images)
    (folder / "changed/vmlinuz").unlink()
    (folder / "changed/vmlinuz").write_bytes(b"other")
    (folder / "gone/vmlinuz").unlink()
    for name, text in (("unpinned", '[boot]\nkernel = "vmlinuz"\n'), ("toml", "= nonsense")):
        (folder / name / "image.toml").unlink()
        (folder / name / "image.toml").write_text(text)
    (folder / "noml/image.toml").unlink()
    done = run_admin(layout, "image", "check")
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 7
    assert {name: lines[name] for name in damage} == {name: f"damaged: {text}" for name, text in damage.items()}
    assert lines["toml"].startswith("damaged: its image.toml cannot be read")
    assert lines["noml"] == "damaged: its image.toml is missing"
    listed = run_admin(layout, "image", "list")
    assert listed.returncode == 0
    assert listed.stdout.count("damaged: its image.toml") == 2


@pytest.mark.parametrize("name", ["../x", ".lock", "nothing", "Demo", "a\nb", "x" * 300, "é", "\x1b[31m"])
def test_names_that_are_none(layout: Layout, name: str) -> None:
    publish(layout, "demo", disk=False)
    for verb in ("check", "rm"):
        done = run_admin(layout, "image", verb, name)
        assert done.returncode in (2, 3)
        assert done.stderr.startswith("vmshell-admin: ")
        assert "\x1b" not in done.stderr
        assert "Traceback" not in done.stderr
    assert Catalogue(layout).names() == ["demo"]


def test_read_names_the_problem(layout: Layout) -> None:
    with pytest.raises(NoSuchImage):
        Catalogue(layout).read("demo")
    publish(layout, "demo", disk=False)
    Path(layout.images, "demo", "image.toml").chmod(0o644)
    Path(layout.images, "demo", "image.toml").write_text("sha256 = 7")
    with pytest.raises(ImageDamaged, match="cannot be read"):
        Catalogue(layout).read("demo")


# --- the verb table ---------------------------------------------------------------------------------------------------


def example(line: str) -> Verb:
    return Verb("do it", line, "", lambda context, args: None)


def test_an_argument_line_says_how_it_is_parsed() -> None:
    verb = example("IMAGE [--as NAME] [--yes] [FILE…]")
    args = verb.parse(["demo", "--as", "x", "--yes", "a", "--", "--b"])
    assert (args["IMAGE"], args["--as"], args.flag("--yes"), args.all("FILE")) == ("demo", "x", True, ["a", "--b"])
    assert verb.parse(["demo", "--as=y"]).get("--as") == "y"
    assert not verb.parse(["demo"]).flag("--yes")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "IMAGE is missing"), (["a", "b"], "too many"), (["a", "--no"], "no option"),
        (["a", "--as"], "needs a value"), (["a", "--yes=1"], "no value"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(words: list[str], problem: str) -> None:
    with pytest.raises(Usage, match=problem):
        example("IMAGE [--as NAME] [--yes]").parse(words)


def test_every_verb_is_found_by_its_words_and_stands_in_the_help() -> None:
    text = admin.help_text("")
    for verb in admin.VERBS:
        assert admin.find([*verb.words.split(), "x"]) == (verb, ["x"])
        assert f"  {verb.words}" in text
        assert verb.summary in text
    for words in (["nonsense"], ["image"], ["image", "nonsense"]):
        with pytest.raises(VmshellError):
            admin.find(words)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["help"], 0), ([], 0), (["--help"], 0), (["help", "image"], 0), (["image", "list", "--help"], 0), (["image", "list"], 0),
        (["help", "nonsense"], 2), (["nonsense"], 2), (["image"], 2), (["image", "build"], 2), (["image", "build", "windows"], 2),
        (["image", "build", "demo", "--as", "../x"], 2), (["--verbose", "help"], 2), (["image", "check", "demo"], 3),
    ],
)  # fmt: skip
def test_exit_statuses(layout: Layout, words: list[str], status: int) -> None:
    done = run_admin(layout, *words)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == bool(status)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a folder to a group")
def test_on_an_installed_host_the_folder_is_for_the_broker_to_read(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made as root where it is missing; one that is there, by tmpfiles say, keeps its owner and its mode."""
    as_host = Layout(etc=layout.etc, state=layout.state, run=layout.run, log=layout.log, embedded=False)
    group = 64_001

    def made(place: Layout) -> tuple[int, int, int]:
        with Catalogue(place).locked():
            status = os.stat(place.images)
            return status.st_uid, status.st_gid, status.st_mode & 0o7777

    monkeypatch.setattr(catalogue_module, "_broker_group", lambda: group)
    assert made(as_host) == (0, group, 0o750)
    os.chown(as_host.images, 64_002, 64_003)
    os.chmod(as_host.images, 0o711)
    assert made(as_host) == (64_002, 64_003, 0o711)
    shutil.rmtree(as_host.images)
    monkeypatch.setattr(catalogue_module, "_broker_group", lambda: None)
    assert made(as_host) == (0, os.getegid(), 0o755)
    shutil.rmtree(as_host.images)
    monkeypatch.setattr(catalogue_module, "_broker_group", lambda: group)
    assert made(layout) == (0, os.getegid(), 0o755)  # one's own session, though one is root


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_ordinary_user_may_not_touch_the_hosts_catalogue(layout: Layout) -> None:
    as_host = Layout(etc=layout.etc, state=layout.state, run=layout.run, log=layout.log, embedded=False)
    command = ["setpriv", "--reuid=65534", "--clear-groups", *admin_command(as_host, "image", "list", python="/usr/bin/python3")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "needs root" in done.stderr
    assert "--session" in done.stderr
