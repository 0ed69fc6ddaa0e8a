"""The storage worker: empty disks that QEMU accepts, headers it must refuse (R3; threats B10, B11, C07, C09), a full disk;
files from a user's pipe (B13, B14), taken in a cage that is really shut."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guests import option_rom
from vmshell.installed import PACKAGE_DIR
from vmshell.shell.ui.terminal import write_all
from vmshell.storage import cage, qcow2
from vmshell.storage import put as intake
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
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and answer["status"] == done.returncode
    return done.returncode, answer.get("problem", "")


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


@pytest.mark.parametrize(
    "words",
    ["", "rm", "create", "verify", "check-header vmdk", "check-overlay x", "put", "put raw", "put vmdk 9", "put raw x"],
)
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


@pytest.mark.slow
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


# --- put --------------------------------------------------------------------------------------------------------------


def came(data: bytes, size: int | None = None) -> dict[str, object]:
    """What the job says of *data*, of which a guest sees *size* bytes."""
    return {"size": len(data) if size is None else size, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


class Put:
    """A `put` job under way; `pipe` is the sender's end, the job's file is *path*."""

    def __init__(self, path: Path, kind: str, size_max: int, *, flags: int = os.O_RDWR, file_size_max: int = 0) -> None:
        path.touch()
        self.path = path
        theirs, self.pipe = os.pipe()
        fd = os.open(path, flags | os.O_CLOEXEC)

        def child() -> None:
            os.close(self.pipe)
            high = [os.dup2(fd, 100), os.dup2(theirs, 101)]
            for number, source in enumerate(high, 3):
                os.dup2(source, number)
            if file_size_max:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_max, file_size_max))

        command = [sys.executable, "-IS", f"{PACKAGE_DIR}/__main__.py", "storage", "put", kind, str(size_max)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # 100 and 101 stay open in it: the job is to close what it was not meant to have.
        self.process = subprocess.Popen(command, preexec_fn=child, close_fds=False, **pipes)  # type: ignore[call-overload]
        os.close(fd)
        os.close(theirs)

    def send(self, *parts: bytes) -> None:
        """Send until the job wants no more."""
        with contextlib.suppress(BrokenPipeError):
            for part in parts:
                write_all(self.pipe, part)

    def end(self) -> tuple[int, dict[str, object]]:
        """Close the pipe; the job's status and answer. What it says to people and to the broker is the same."""
        os.close(self.pipe)
        out, err = self.process.communicate(timeout=120)
        answer = json.loads(out)
        assert out.count(b"\n") == 1
        assert err == b"" and answer.pop("status") == self.process.returncode
        if self.process.returncode:
            assert self.path.stat().st_size == 0
        else:
            assert self.path.stat().st_size in (answer["size"], answer["bytes"])
        return self.process.returncode, answer


def put(path: Path, kind: str, size_max: int, *parts: bytes) -> tuple[int, dict[str, object]]:
    job = Put(path, kind, size_max)
    job.send(*parts)
    return job.end()


def refusal(path: Path, kind: str, size_max: int, *parts: bytes) -> str:
    status, answer = put(path, kind, size_max, *parts)
    assert status == 1
    assert set(answer) == {"problem"}
    return str(answer["problem"])


@pytest.mark.parametrize("size", [1, 511, 512, 4096, MIB, MIB + 1, 3 * MIB + 4095])
def test_a_raw_disk_comes_in_whole_and_in_whole_sectors(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    whole = -(-size // 512) * 512
    assert put(tmp_path / "disk", "raw", 4 * MIB, data) == (0, came(data, whole))
    assert (tmp_path / "disk").read_bytes() == data.ljust(whole, b"\0")
    assert storage("check-header", "raw", files=(tmp_path / "disk",)) == (0, "")


def test_however_it_is_delivered_it_is_the_same_file(tmp_path: Path) -> None:
    data = b"".join(bytes([number]) * number for number in range(1, 100)) + bytes(10_000) + b"end"
    drops = (data[at : at + 7] for at in range(0, len(data), 7))
    assert put(tmp_path / "file", "file", MIB, *drops) == (0, came(data))
    assert (tmp_path / "file").read_bytes() == data


def test_zeros_take_no_room(tmp_path: Path) -> None:
    """A mostly empty disk costs what is in it, wherever that lies."""
    zeros = bytes(MIB)
    parts = [b"first", *[zeros] * 300, b"middle", *[zeros] * 212, bytes(5000) + b"last"]
    size = 5 + 300 * MIB + 6 + 212 * MIB + 5004
    disk = tmp_path / "disk"
    whole = -(-size // 512) * 512
    status, answer = put(disk, "raw", GIB, *parts)
    assert (status, answer["size"], answer["bytes"]) == (0, whole, size)
    assert disk.stat().st_blocks * 512 <= 64 * 1024
    with disk.open("rb") as file:
        for at, data in ((0, b"first"), (5 + 300 * MIB, b"middle"), (size - 4, b"last")):
            file.seek(at - 1 if at else 0)
            assert file.read(len(data) + 2).strip(b"\0") == data
    only = tmp_path / "only"
    assert put(only, "raw", GIB, zeros) == (0, came(zeros))
    assert only.stat().st_blocks == 0


def receive(path: Path, stream: int, idle: float) -> dict[str, object]:
    """Take *stream* in here."""
    path.touch()
    with path.open("r+b") as file:
        return intake.receive(file.fileno(), stream, "file", 100, idle=idle)


def test_a_silent_sender_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    out, into = os.pipe()
    os.write(into, b"abc")
    with pytest.raises(BadImage, match="nothing came for 0 seconds"):
        receive(tmp_path / "file", out, idle=0.3)
    assert (tmp_path / "file").stat().st_size == 0
    os.close(out)
    os.close(into)
    assert intake.IDLE_MAX == 600


def test_a_job_ends_when_nobody_listens_any_more(tmp_path: Path) -> None:
    """The broker has given the upload up, or has ended: whoever holds the pipe's other end cannot keep the job."""
    job = Put(tmp_path / "file", "file", 100)
    job.send(b"abc")
    assert job.process.stdout is not None
    job.process.stdout.close()
    assert job.process.wait(60) == 1
    with pytest.raises(BrokenPipeError):
        os.write(job.pipe, b"more")
    assert (tmp_path / "file").stat().st_size == 0
    os.close(job.pipe)


def test_that_something_comes_shows_in_the_files_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what fills no buffer yet, and of zeros, which are not written."""
    monkeypatch.setattr(intake, "MARK", 0.0)
    out, into = os.pipe()
    path = tmp_path / "file"
    path.touch()
    with path.open("r+b") as file, concurrent.futures.ThreadPoolExecutor(1) as pool:
        taken = pool.submit(intake.receive, file.fileno(), out, "file", MIB)
        for size in (1, 2, 70_000):
            write_all(into, bytes(size - path.stat().st_size))
            until = time.monotonic() + 60
            while path.stat().st_size < size:
                assert time.monotonic() < until
                time.sleep(0.01)
        os.close(into)
        assert taken.result(60) == came(bytes(70_000))
    os.close(out)


@pytest.mark.parametrize("kind", intake.KINDS)
def test_nothing_is_not_a_file(tmp_path: Path, kind: str) -> None:
    assert refusal(tmp_path / "file", kind, GIB) == "it is empty"


def test_too_much_is_refused_at_once(tmp_path: Path) -> None:
    """C07: refused at the limit, however much would still come."""
    said = refusal(tmp_path / "file", "file", 5_000_000, *[b"x" * MIB] * 1000)
    assert said.endswith("bytes or more; at most 5000000 are allowed here")
    assert 5_000_000 < int(said.split()[2]) < 5_100_000
    assert "at most 4999680 are" in refusal(tmp_path / "raw", "raw", 5_000_000, b"x" * 4_999_681)
    assert put(tmp_path / "fits", "file", 100, b"x" * 100)[0] == 0


def test_a_file_with_contents_is_not_put_over(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_text("somebody's")
    job = Put(disk, "file", 100)
    job.send(b"x")
    assert job.process.wait(60) == 1
    assert disk.read_text() == "somebody's"
    os.close(job.pipe)


def test_no_space_for_an_upload_is_status_2(tmp_path: Path) -> None:
    job = Put(tmp_path / "disk", "file", GIB, file_size_max=70_000)
    job.send(b"x" * 5_000_000)
    assert job.end() == (2, {"problem": "File too large"})
    job = Put(tmp_path / "other", "file", GIB, flags=os.O_RDONLY)
    job.send(b"x")
    assert job.end()[0] == 3


def test_a_qcow2_image_of_qemus_comes_in(tmp_path: Path) -> None:
    image = made_by_qemu(tmp_path / "image")
    qemu_io = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", str(image)]
    subprocess.run(qemu_io, capture_output=True, check=True, timeout=60)
    data = image.read_bytes()
    taken = tmp_path / "taken"
    assert put(taken, "qcow2", 64 * MIB, data) == (0, came(data, 64 * MIB))
    assert taken.read_bytes() == data
    said = f"its size is {64 * MIB} bytes; at most {64 * MIB - 512} are allowed here"
    assert refusal(tmp_path / "large", "qcow2", 64 * MIB - 512, data) == said


@pytest.mark.parametrize("cluster", ["512", "64k"])
def test_a_full_qcow2_image_fits_its_own_limit(tmp_path: Path, cluster: str) -> None:
    """The limit on the file leaves room for the tables of a disk that is written all over."""
    options = ("-o", f"cluster_size={cluster},refcount_bits=64")
    image = made_by_qemu(tmp_path / "image", *options, size="8M")
    qemu_io = ["qemu-io", "-t", "unsafe", "-f", "qcow2", "-c", "write -P 7 0 8M", str(image)]
    subprocess.run(qemu_io, capture_output=True, check=True, timeout=60)
    assert 8 * MIB < image.stat().st_size < 8 * MIB * 17 // 16
    assert put(tmp_path / "taken", "qcow2", 8 * MIB, image.read_bytes())[0] == 0
    assert intake.bytes_max("qcow2", 1 << 80) < 1 << 45


def test_hostile_qcow2_images_are_refused_by_their_first_bytes(tmp_path: Path) -> None:
    """B10, B11, C09: whatever length comes behind the header, and as soon as the header is there."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MIB)
    backed = made_by_qemu(tmp_path / "backed", "-b", str(secret), "-F", "raw").read_bytes()
    job = Put(tmp_path / "1", "qcow2", 4 * GIB)
    job.send(backed, *[bytes(MIB)] * 4000)
    with pytest.raises(BrokenPipeError):  # it did not want all that
        os.write(job.pipe, b"x")
    assert job.end() == (1, {"problem": "it names a backing file; flatten it first"})
    data = made_by_qemu(tmp_path / "data", "-o", f"data_file={tmp_path}/other,data_file_raw=on").read_bytes()
    assert refusal(tmp_path / "2", "qcow2", GIB, data) == "it keeps its data in another file"
    good = made_by_qemu(tmp_path / "good").read_bytes()
    assert "beyond the end" in refusal(tmp_path / "3", "qcow2", GIB, good[:70_000])
    assert refusal(tmp_path / "4", "qcow2", GIB, good[:50]) == "it is shorter than a qcow2 header"


@pytest.mark.parametrize("magic", [b"# Disk DescriptorFile\n", b"KDMV", b"conectix", b"vhdxfile", b"QFI\xfb\0\0\0\x01", b"QED\0"])
def test_other_formats_are_refused(tmp_path: Path, magic: bytes) -> None:
    """B13, B14."""
    assert "qcow2" in refusal(tmp_path / "disk", "qcow2", GIB, magic.ljust(100_000, b"x"))


def test_a_raw_disk_that_says_it_is_qcow2_stays_raw(tmp_path: Path) -> None:
    """B09: what is declared counts, here as later."""
    data = made_by_qemu(tmp_path / "image", "-b", "/etc/passwd", "-F", "raw", "-u").read_bytes()
    assert put(tmp_path / "disk", "raw", GIB, data)[0] == 0
    assert (tmp_path / "disk").read_bytes().startswith(data)


def test_option_roms(tmp_path: Path) -> None:
    rom = option_rom("x")
    assert put(tmp_path / "1", "rom", GIB, rom) == (0, came(rom))
    assert put(tmp_path / "2", "rom", GIB, rom + b"data behind it")[0] == 0
    assert "55 AA" in refusal(tmp_path / "3", "rom", GIB, b"MZ" + rom[2:])
    assert "add up" in refusal(tmp_path / "4", "rom", GIB, rom[:-1] + bytes([rom[-1] ^ 1]))
    assert refusal(tmp_path / "5", "rom", GIB, rom[:-1]) == f"its header claims {len(rom)} bytes; it has {len(rom) - 1}"
    assert "claims 0 bytes" in refusal(tmp_path / "6", "rom", GIB, b"\x55\xaa")
    assert "claims 0 bytes" in refusal(tmp_path / "7", "rom", GIB, b"\x55\xaa\0" + rom[3:])
    assert "at most 262144 are" in refusal(tmp_path / "8", "rom", GIB, rom.ljust(262145, b"\0"))


@pytest.mark.parametrize("size", intake.FLOPPIES.values())
def test_floppies_have_a_floppys_size(tmp_path: Path, size: int) -> None:
    assert put(tmp_path / "1", "floppy", 4 * MIB, bytes(size)) == (0, came(bytes(size)))
    said = refusal(tmp_path / "2", "floppy", 4 * MIB, bytes(size + 512))
    assert said.startswith(f"it has {size + 512} bytes, which no floppy has; the sizes are 160K, 180K, 320K")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(intake.KINDS))
def test_no_stream_crashes_the_intake(noise: bytes, kind: str) -> None:
    """Noise as a stream: judged, never an exception of another kind, and nothing is left of what was refused."""
    fd = os.memfd_create("intake")
    out, into = os.pipe()
    os.write(into, noise)
    os.close(into)
    try:
        answer = intake.receive(fd, out, kind, 1000)
    except BadImage:
        assert os.fstat(fd).st_size == 0
    else:
        assert os.fstat(fd).st_size in (answer["size"], answer["bytes"])
        assert answer["bytes"] == len(noise)
    finally:
        os.close(out)
        os.close(fd)


# --- the cage ---------------------------------------------------------------------------------------------------------


def caged(before: str, inside: str) -> tuple[int, str]:
    """Run *inside* in the cage, with what *before* prepared; the exit status (minus the signal) and what it printed."""
    code = f"""
import ctypes, mmap, os, resource, select, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
{before}
from vmshell.storage import cage
cage.enter(1 << 20)
{inside}
os.write(1, b"still here")
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(PACKAGE_DIR).parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


KILLED = (-signal.SIGSYS, "")


@pytest.mark.parametrize(
    "inside",
    [
        "open('/etc/passwd')", "os.open('/dev/null', os.O_RDONLY)", "os.stat('/')", "os.listdir('/')", "os.unlink('/nowhere')",
        "os.mkdir('/nowhere/x')", "os.chmod(0, 0)", "os.readlink('/proc/self/exe')", "os.fchmod(0, 0)", "os.fstat(0)",
        "os.fork()", "os.posix_spawn('/bin/true', [], {})", "os.execv('/bin/true', ['true'])", "libc.prctl(4, 1, 0, 0, 0)",
        "threading.Thread(target=print).start()", "libc.ptrace(0, 0, 0, 0)", "os.kill(os.getppid(), 0)", "os.kill(1, 0)",
        "socket.socket()", "socket.socketpair()", "sock.connect('/run/x')", "sock.send(b'x')", "sock.recv(1)", "sock.recvmsg(1)",
        "os.dup(1)", "os.pipe()", "os.memfd_create('x')", "os.sendfile(1, 0, 0, 1)", "mmap.mmap(3, 4096)", "os.setuid(0)",
        "resource.setrlimit(resource.RLIMIT_AS, (1, 1))", "os.posix_fallocate(0, 0, 1)", "time.sleep(0.01)",
    ],
)  # fmt: skip
@pytest.mark.slow
def test_the_cage_is_shut(inside: str) -> None:
    """Whatever a taken-over job would do first ends it, before it has any effect."""
    before = "sock = socket.socket(socket.AF_UNIX)\nos.dup2(sock.fileno(), 4)\nsock = socket.socket(fileno=4)"
    assert caged(before, inside) == KILLED


@pytest.mark.slow
def test_every_call_that_is_not_named_is_shut() -> None:
    """Each call there is, and some that there will be, all arguments zero: one process for each, forked for speed."""
    code = """
import ctypes, json, os
from vmshell.storage import cage
libc = ctypes.CDLL(None)
survived = []
for number in range(520):
    pid = os.fork()
    if not pid:
        cage.enter(1 << 20)
        libc.syscall(ctypes.c_long(number), *[ctypes.c_long(0)] * 6)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -31:
        survived.append(number)
print(json.dumps(survived))
"""
    command = [sys.executable, "-c", code]
    options = {"cwd": Path(PACKAGE_DIR).parent, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(command, check=True, **options)  # type: ignore[call-overload]
    protection_none = 10  # mprotect to no access at all; mmap with no arguments asks for a file's
    probes = {335, 336}  # a kernel's own trampolines, which it lets through every filter and nobody else may use
    assert set(json.loads(done.stdout)) - probes == {*cage.ALLOWED.values(), protection_none}


@pytest.mark.parametrize(
    "inside",
    [
        "call(9, 0, 4096, 7, 0x22, -1, 0)",  # mmap: anonymous, but executable
        "call(9, 0, 4096, 5, 0x22, -1, 0)",
        "call(9, 0, 4096, 1, 0x2, 0, 0)",  # of a file
        "call(10, address, 4096, 5)",  # mprotect to executable
        "call(0x40000000 + 0, 0, 0, 0)",  # x32: its read
        "call(0x40000000 + 39)",
    ],
)
@pytest.mark.slow
def test_no_new_code_and_no_other_tables_of_calls(inside: str) -> None:
    before = "page = mmap.mmap(-1, 4096)\naddress = ctypes.addressof(ctypes.c_char.from_buffer(page))"
    assert caged(before, inside) == KILLED


@pytest.mark.slow
def test_the_calls_of_32_bit_programs_are_shut() -> None:
    """Their numbers mean other calls: 3 is read here and close there; code that makes one is laid out before the cage closes."""
    before = """
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b800000000" "cd80" "c3"))  # mov eax, 0; int 0x80; ret
function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
"""
    status, said = caged(before, "function()")
    assert status in (-signal.SIGSYS, -signal.SIGSEGV)  # the latter where the kernel has no such calls at all
    assert said == ""


def test_what_the_job_needs_is_open() -> None:
    inside = """
os.read(0, 1); os.readv(0, [bytearray(1)]); bytearray(50 << 20); signal.signal(2, print); time.monotonic()
poll = select.poll(); poll.register(0); poll.poll(0)
"""
    assert caged("", inside) == (0, "still here")
    # The limits: too much memory is an exception that the job survives, another descriptor is not to be had.
    assert caged("", "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    pass") == (0, "still here")


@pytest.mark.slow
def test_a_running_job_is_in_its_cage(tmp_path: Path) -> None:
    job = Put(tmp_path / "file", "file", 10 * MIB)
    job.send(b"abc")
    folder = Path(f"/proc/{job.process.pid}")
    until = time.monotonic() + 60
    while "Seccomp:\t2" not in (folder / "status").read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "NoNewPrivs:\t1" in (folder / "status").read_text()
    limits = (folder / "limits").read_text()
    for name, value in (("file size", 10 * MIB), ("open files", 5), ("processes", 0), ("core file size", 0), ("cpu time", 62)):
        assert any(line.startswith(f"Max {name} ") and line.split()[-3] == str(value) for line in limits.splitlines()), name
    if os.geteuid() == 0:
        assert sorted(os.listdir(folder / "fd")) == ["0", "1", "2", "3", "4"]
        assert (folder / "mem").stat().st_uid == 0  # not to be dumped: nobody of the job's uid may look into it
    assert job.end() == (0, came(b"abc"))


@pytest.mark.slow
def test_without_a_cage_nothing_is_taken_in(tmp_path: Path) -> None:
    """A kernel that refuses the filter: the job ends before it has read a byte."""
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
        "from vmshell.storage import cage, main; cage.program = lambda: b'x' * 8; sys.exit(main.main(['put', 'file', '100']))"
    )
    theirs, ours = os.pipe()
    os.write(ours, b"abc")
    file = tmp_path / "file"
    file.touch()
    with file.open("r+b") as opened:
        fds = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 50) for one in (opened, theirs)]
    command = [sys.executable, "-c", code, *map(str, fds)]
    options = {"cwd": Path(PACKAGE_DIR).parent, "pass_fds": fds, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
    assert (done.returncode, done.stdout, done.stderr) == (3, '{"status": 3, "problem": "Invalid argument"}\n', "")
    assert os.read(theirs, 100) == b"abc"
    assert file.stat().st_size == 0
    for fd in (*fds, ours, theirs):
        os.close(fd)
