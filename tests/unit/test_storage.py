"""The storage worker: empty disks that QEMU accepts, headers it must refuse (R3; threats B10, B11, C07, C09), a full disk."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmshell.layout import PACKAGE_DIR
from vmshell.storage import qcow2
from vmshell.storage.qcow2 import BadImage

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40


def storage(*words: str, files: tuple[Path, ...] = (), flags: int = os.O_RDWR, file_size_max: int = 0) -> tuple[int, str]:
    """Run the worker with *files* as descriptors 3, 4, …; return its status and what it said."""
    fds = [os.open(file, flags | os.O_CLOEXEC) for file in files]

    def child() -> None:
        # Out of the way first: a descriptor may already sit where another one is to go.
        high = [os.dup2(fd, 100 + number) for number, fd in enumerate(fds)]
        for number, fd in enumerate(high):
            os.dup2(fd, 3 + number)
        os.closerange(3 + len(fds), 200)
        if file_size_max:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_max, file_size_max))

    command = [sys.executable, "-IS", f"{PACKAGE_DIR}/__main__.py", "storage", *words]
    try:
        done = subprocess.run(command, preexec_fn=child, close_fds=False, capture_output=True, text=True, timeout=60, check=False)
    finally:
        for fd in fds:
            os.close(fd)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == (1 if done.returncode else 0)
    return done.returncode, done.stderr.strip()


def qemu_img(*words: str) -> str:
    return subprocess.run(["qemu-img", *words], capture_output=True, text=True, timeout=60, check=True).stdout


def write_empty(path: Path, size: int) -> Path:
    parts, length = qcow2.empty(size)
    with path.open("wb") as file:
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
        file.truncate(length)
    return path


# --- create -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [MIB, MIB + 512, 512 * MIB, 512 * MIB + 512, 10 * GIB, TIB, 16 * TIB])
def test_qemu_finds_nothing_wrong_with_an_empty_disk(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    assert storage("create", str(size), files=(disk,)) == (0, "")
    report = json.loads(qemu_img("check", "-f", "qcow2", "--output=json", str(disk)))
    assert report["check-errors"] == 0
    assert report.get("leaks", 0) == report.get("corruptions", 0) == 0
    info = json.loads(qemu_img("info", "-f", "qcow2", "--output=json", str(disk)))
    assert info["virtual-size"] == size
    assert info["cluster-size"] == 65536
    assert info["format-specific"]["data"]["compat"] == "1.1"
    assert "backing-filename" not in info
    assert disk.stat().st_blocks * 512 <= 64 * 1024  # lazily allocated
    assert storage("check-overlay", files=(disk,)) == (0, "")


def test_an_empty_disk_can_be_written_to_its_last_sector(tmp_path: Path) -> None:
    disk = write_empty(tmp_path / "disk", 5 * GIB)
    last = f"-P 7 {5 * GIB - 65536} 65536"
    qemu_io = ["qemu-io", "-f", "qcow2", "-c", f"write {last}", "-c", f"read {last}", str(disk)]
    assert "verification failed" not in subprocess.run(qemu_io, capture_output=True, text=True, check=True, timeout=60).stdout
    qemu_img("check", "-f", "qcow2", str(disk))
    assert storage("check-header", "qcow2", files=(disk,)) == (0, "")


@pytest.mark.parametrize("size", ["0", "1048575", str(MIB + 1), str(16 * TIB + 512), str(1 << 61), "9" * 400, "-1", "1G", ""])
def test_absurd_sizes_are_refused_before_anything_is_written(tmp_path: Path, size: str) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    status, said = storage("create", size, files=(disk,))
    assert status == 1
    assert said
    assert disk.stat().st_size == 0


def test_a_file_with_contents_is_not_overwritten(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text("somebody's")
    assert storage("create", str(MIB), files=(disk,)) == (1, "the file for the new disk is not empty")
    assert disk.read_text() == "somebody's"


def test_no_space_is_status_2_and_leaves_an_empty_file(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    status, said = storage("create", str(GIB), files=(disk,), file_size_max=70_000)
    assert (status, said) == (2, "File too large")
    assert disk.stat().st_size == 0


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a file system of its own")
def test_a_full_file_system_is_status_2(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        (tmp_path / "filler").write_bytes(b"x" * 60_000)
        disk = tmp_path / "disk"
        disk.touch()
        assert storage("create", str(GIB), files=(disk,)) == (2, "No space left on device")
        assert disk.stat().st_size == 0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_trouble_is_status_3(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    assert storage("create", str(MIB), files=(disk,), flags=os.O_RDONLY)[0] == 3
    assert storage("create", str(MIB)) == (3, "Bad file descriptor")


@pytest.mark.parametrize("words", ["", "rm", "create", "verify", "check-header vmdk", "check-header", "check-overlay x"])
def test_unknown_jobs_are_refused(words: str) -> None:
    assert storage(*words.split())[0] == 1


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_tells_the_whole_from_the_damaged(tmp_path: Path) -> None:
    contents = [b"kernel" * 500_000, b""]
    files = [tmp_path / str(number) for number in range(len(contents))]
    for file, data in zip(files, contents, strict=True):
        file.write_bytes(data)
    digests = [hashlib.sha256(data).hexdigest() for data in contents]
    assert storage("verify", *digests, files=tuple(files), flags=os.O_RDONLY) == (0, "")
    files[1].write_bytes(b"!")
    status, said = storage("verify", *digests, files=tuple(files), flags=os.O_RDONLY)
    assert (status, said) == (1, "file 2 of 2 is not what its recorded hash says")
    assert storage("verify", digests[0].upper(), files=(files[0],))[0] == 1
    assert storage("verify", *digests, files=(files[0],))[0] == 3


# --- check-header -----------------------------------------------------------------------------------------------------


def made_by_qemu(path: Path, *options: str, size: str = "64M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, str(path), size)
    return path


@pytest.mark.parametrize(
    "options",
    [(), ("-o", "compat=0.10"), ("-o", "cluster_size=512"), ("-o", "cluster_size=2M"), ("-o", "lazy_refcounts=on"),
     ("-o", "extended_l2=on"), ("-o", "compression_type=zstd"), ("-o", "refcount_bits=1")],
)  # fmt: skip
def test_honest_images_pass(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert storage("check-header", "qcow2", files=(made_by_qemu(tmp_path / "disk", *options),)) == (0, "")


def test_images_that_name_other_files_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    backed = made_by_qemu(tmp_path / "backed", "-b", str(secret), "-F", "raw")
    assert storage("check-header", "qcow2", files=(backed,)) == (1, "it names a backing file; flatten it first")
    data = made_by_qemu(tmp_path / "data", "-o", f"data_file={tmp_path}/other,data_file_raw=on")
    assert storage("check-header", "qcow2", files=(data,)) == (1, "it keeps its data in another file")
    # The bit cleared, the name left in: no reader would follow it today, and it is still refused.
    with data.open("r+b") as file:
        file.seek(72)
        file.write(bytes(8))
    assert storage("check-header", "qcow2", files=(data,)) == (1, "its header names another file")
    assert secret.read_bytes() == b"s" * MIB


def test_snapshots_and_encryption_are_refused(tmp_path: Path) -> None:
    image = made_by_qemu(tmp_path / "disk")
    qemu_img("snapshot", "-c", "one", str(image))
    assert storage("check-header", "qcow2", files=(image,)) == (1, "it holds 1 snapshots")
    secret = ("--object", "secret,id=s,data=abc")
    encrypted = made_by_qemu(tmp_path / "encrypted", *secret, "-o", "encrypt.format=aes,encrypt.key-secret=s")
    assert storage("check-header", "qcow2", files=(encrypted,)) == (1, "it is encrypted")


FIELDS = {"magic": 0, "version": 4, "backing": 8, "backing_size": 16, "cluster_bits": 20, "size": 24, "crypt": 32, "l1_size": 36}
FIELDS |= {"l1_offset": 40, "table_offset": 48, "table_clusters": 56, "snapshots": 60}
FIELDS |= {"incompatible": 72, "order": 96, "length": 100}
WIDE = {"backing", "size", "l1_offset", "table_offset", "incompatible"}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("magic", 0x514649FA, "not a qcow2"), ("version", 1, "version 1"), ("version", 4, "version 4"),
        ("backing", 1 << 40, "backing"), ("backing_size", 9, "backing"), ("cluster_bits", 8, "clusters"),
        ("cluster_bits", 0xFFFFFFFF, "clusters"), ("size", 0, "size"), ("size", 1 << 61, "size"),
        ("crypt", 1, "encrypted"), ("l1_size", 0, "L1"), ("l1_size", 0xFFFFFFFF, "L1"),
        ("l1_offset", 0, "L1"), ("l1_offset", 1, "L1"), ("l1_offset", 1 << 62, "L1"), ("table_offset", 0, "refcount"),
        ("table_offset", 1 << 40, "refcount"), ("table_clusters", 0, "refcount"), ("table_clusters", 0xFFFFFFFF, "refcount"),
        ("snapshots", 1, "snapshots"), ("incompatible", 2, "corrupt"), ("incompatible", 4, "another file"),
        ("incompatible", 1 << 5, "not known"), ("incompatible", 1 << 63, "not known"), ("order", 7, "reference counts"),
        ("length", 0, "header"), ("length", 108, "header"), ("length", 0xFFFFFFF8, "header"),
    ],
)  # fmt: skip
def test_each_hostile_field_is_named(field: str, value: int, words: str) -> None:
    parts, length = qcow2.empty(GIB)
    head = bytearray(parts[0][1].ljust(qcow2.HEADER_READ, b"\0"))
    struct.pack_into(">Q" if field in WIDE else ">I", head, FIELDS[field], value)
    with pytest.raises(BadImage, match=words):
        qcow2.check(bytes(head), length)


@pytest.mark.parametrize(
    "extension",
    [struct.pack(">II", 0x12345678, 0xFFFFFFFF), struct.pack(">II", 0x12345678, 5000), struct.pack(">II", 0x12345678, 0) * 600],
)
def test_header_extensions_that_do_not_end_are_refused(extension: bytes) -> None:
    parts, length = qcow2.empty(GIB)
    head = (parts[0][1][:104] + extension)[: qcow2.HEADER_READ].ljust(qcow2.HEADER_READ, b"\0")
    with pytest.raises(BadImage, match="do not end"):
        qcow2.check(head, length)


def test_unknown_extensions_are_stepped_over() -> None:
    parts, length = qcow2.empty(GIB)
    harmless = struct.pack(">II", 0x12345678, 5) + b"hello\0\0\0"
    head = parts[0][1][:104] + harmless
    assert qcow2.check(head.ljust(qcow2.HEADER_READ, b"\0"), length) == GIB
    with pytest.raises(BadImage, match="another file"):
        qcow2.check((head + struct.pack(">II", 0x44415441, 4) + b"/etc").ljust(qcow2.HEADER_READ, b"\0"), length)


def test_the_size_limit_is_the_callers(tmp_path: Path) -> None:
    disk = write_empty(tmp_path / "disk", GIB)
    assert storage("check-header", "qcow2", str(GIB), files=(disk,)) == (0, "")
    assert storage("check-header", "qcow2", str(GIB - 1), files=(disk,))[0] == 1
    assert storage("check-overlay", str(GIB - 1), files=(disk,))[0] == 1


def test_raw_is_judged_by_its_length_only(tmp_path: Path) -> None:
    raw = write_empty(tmp_path / "disk", MIB)  # what a guest wrote into it changes nothing (B09)
    assert storage("check-header", "raw", files=(raw,)) == (0, "")
    os.truncate(raw, 1000)
    assert storage("check-header", "raw", files=(raw,))[0] == 1
    os.truncate(raw, 0)
    assert storage("check-header", "raw", files=(raw,))[0] == 1
    os.truncate(raw, 15 * TIB)
    assert storage("check-header", "raw", files=(raw,)) == (0, "")
    assert storage("check-header", "raw", str(TIB), files=(raw,))[0] == 1


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    begun = time.monotonic()
    assert storage("check-header", "qcow2", files=(fifo,)) == (1, "it is not a regular file")
    assert storage("verify", "00", files=(fifo,)) == (1, "it is not a regular file")
    assert time.monotonic() - begun < 20


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_no_header_crashes_the_check(data: st.DataObject) -> None:
    """Mutations of a good header, and noise behind a good magic: judged, never an exception of another kind."""
    good = qcow2.empty(GIB)[0][0][1]
    head = bytearray(good.ljust(qcow2.HEADER_READ, b"\0"))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, 160))
        noise = data.draw(st.binary(min_size=1, max_size=16))
        head[at : at + len(noise)] = noise
    cut = data.draw(st.sampled_from([qcow2.HEADER_READ, qcow2.HEADER_READ, 512, 104, 80, 72, 10, 0]))
    file_size = data.draw(st.sampled_from([4 * 65536, 1 << 40, 4096, 0]))
    try:
        size = qcow2.check(bytes(head[:cut]), file_size)
    except BadImage as exc:
        assert str(exc)
    else:
        assert 0 < size <= qcow2.SIZE_MAX
        assert head[8:20] == bytes(12)
        assert not int.from_bytes(head[32:36], "big")
        assert int.from_bytes(head[4:8], "big") == 2 or not head[79] & 4
