"""qcow2 headers: writing the one of an empty disk, and judging one that came from somewhere else (rule R3 of the design).

Written here and not left to qemu-img: an image's header can name other files of the host (backing file, external data file),
so it is judged before any program that would follow those names looks at it. All numbers are big-endian; the format is
QEMU's docs/interop/qcow2.txt.
Runs in: the storage worker, in tests. Pure functions of bytes.
"""

from __future__ import annotations

import struct

MAGIC = b"QFI\xfb"
SIZE_MIN = 1 << 20
SIZE_MAX = 16 << 40
CLUSTER_BITS = 16
HEADER_READ = 4096  # what `check` needs to see of a file; the header proper and its extensions are far smaller

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_V3_LENGTH = _V2.size + _V3.size  # 104
_EXTENSION = struct.Struct(">II")

_CLUSTER = 1 << CLUSTER_BITS
_L2_ENTRIES = _CLUSTER // 8
_REFCOUNT_BITS_16 = 4  # as a power of two
_L1_BYTES_MAX = 32 << 20  # QEMU's own limits
_REFCOUNT_TABLE_BYTES_MAX = 8 << 20

# Incompatible features: dirty (0) is mended at opening, compression type (3) and extended L2 (4) name no other file.
# External data file (2) does; corrupt (1) and everything unknown is refused with it.
_FEATURES_ALLOWED = 1 << 0 | 1 << 3 | 1 << 4
_DATA_FILE = 1 << 2
_CORRUPT = 1 << 1

_END, _BACKING_FORMAT, _DATA_FILE_NAME, _ENCRYPTION = 0, 0xE2792ACA, 0x44415441, 0x0537BE77


class BadImage(ValueError):
    """Why an image is refused, as a clause."""


def check_size(size: int) -> None:
    """Raises BadImage unless *size* bytes is a disk we make."""
    if not SIZE_MIN <= size <= SIZE_MAX or size % 512:
        raise BadImage(f"a disk has {SIZE_MIN} to {SIZE_MAX} bytes in whole sectors, not {size}")


def empty(size: int) -> tuple[list[tuple[int, bytes]], int]:
    """An empty disk of *size* bytes: the (offset, bytes) to write into an empty file, and the length to give the file.

    cluster 0       header
    cluster 1       refcount table: one entry, which counts 2 GiB of file; QEMU makes the table longer when it must
    cluster 2       that refcount block: every cluster here is in use once
    cluster 3…      L1 table, all zero: nothing is allocated
    """
    check_size(size)
    l1_entries = _ceil(size, _CLUSTER * _L2_ENTRIES)
    l1_clusters = _ceil(l1_entries * 8, _CLUSTER)
    clusters = 3 + l1_clusters
    header = _V2.pack(
        MAGIC, 3, 0, 0, CLUSTER_BITS, size, 0, l1_entries, 3 * _CLUSTER, 1 * _CLUSTER, 1, 0, 0
    )  # backing offset and size 0, no encryption, no snapshots  # fmt: skip
    features = _V3.pack(0, 0, 0, _REFCOUNT_BITS_16, _V3_LENGTH)
    parts = [
        (0, header + features + _EXTENSION.pack(_END, 0)),
        (1 * _CLUSTER, struct.pack(">Q", 2 * _CLUSTER)),
        (2 * _CLUSTER, struct.pack(">H", 1) * clusters),
    ]
    return parts, clusters * _CLUSTER


def check(head: bytes, file_size: int, size_max: int = SIZE_MAX) -> int:
    """Judge a qcow2 file by its first HEADER_READ bytes and its length; return its virtual size or raise BadImage."""
    if len(head) < _V2.size:
        raise BadImage("it is shorter than a qcow2 header")
    (
        magic, version, backing_offset, backing_length, cluster_bits, size, encryption,
        l1_entries, l1_offset, table_offset, table_clusters, snapshots, _snapshots_offset,
    ) = _V2.unpack_from(head)  # fmt: skip
    if magic != MAGIC:
        raise BadImage("it is not a qcow2 image")
    if version not in (2, 3):
        raise BadImage(f"it is qcow2 of version {version}; versions 2 and 3 are known")
    if backing_offset or backing_length:
        raise BadImage("it names a backing file; flatten it first")
    if encryption:
        raise BadImage("it is encrypted")
    if snapshots:
        raise BadImage(f"it holds {snapshots} snapshots")
    if not 9 <= cluster_bits <= 21:
        raise BadImage(f"its clusters have 2^{cluster_bits} bytes; 2^9 to 2^21 are known")
    if not 0 < size <= size_max:
        raise BadImage(f"its size is {size} bytes; at most {size_max} are allowed here")
    cluster = 1 << cluster_bits
    header_length = _check_version_3(head, cluster) if version == 3 else _V2.size
    extended = version == 3 and bool(_V3.unpack_from(head, _V2.size)[0] & 1 << 4)
    # An L2 table is one cluster; its entries have 8 bytes, extended ones 16.
    l1_needed = _ceil(size, cluster * (cluster // (16 if extended else 8)))
    if not l1_needed <= l1_entries <= _L1_BYTES_MAX // 8:
        raise BadImage(f"its L1 table has {l1_entries} entries; {l1_needed} are needed")
    if not 0 < table_clusters * cluster <= _REFCOUNT_TABLE_BYTES_MAX:
        raise BadImage(f"its refcount table has {table_clusters} clusters")
    _check_table("L1 table", l1_offset, l1_entries * 8, cluster, file_size)
    _check_table("refcount table", table_offset, table_clusters * cluster, cluster, file_size)
    _check_extensions(head[:cluster], header_length, cluster)
    return int(size)


def _check_version_3(head: bytes, cluster: int) -> int:
    """Judge the fields that version 3 added; return the header's length."""
    if len(head) < _V3_LENGTH:
        raise BadImage("it is shorter than a qcow2 header")
    incompatible, _compatible, _autoclear, refcount_order, length = _V3.unpack_from(head, _V2.size)
    if incompatible & _DATA_FILE:
        raise BadImage("it keeps its data in another file")
    if incompatible & _CORRUPT:
        raise BadImage("it is marked corrupt")
    if incompatible & ~_FEATURES_ALLOWED:
        raise BadImage(f"it needs features that are not known here ({incompatible:#x})")
    if refcount_order > 6:
        raise BadImage(f"its reference counts have 2^{refcount_order} bits")
    if not _V3_LENGTH <= length <= min(cluster, HEADER_READ) or length % 8:
        raise BadImage(f"its header claims {length} bytes")
    return int(length)


def _check_extensions(area: bytes, at: int, cluster: int) -> None:
    """Walk the extensions from *at* on; any that names another file or does not fit is refused, unknown ones may be ignored."""
    while at + _EXTENSION.size <= len(area):
        kind, length = _EXTENSION.unpack_from(area, at)
        if kind == _END:
            return
        if kind in (_BACKING_FORMAT, _DATA_FILE_NAME):
            raise BadImage("its header names another file")
        if kind == _ENCRYPTION:
            raise BadImage("it is encrypted")
        at += _EXTENSION.size + _ceil(length, 8) * 8
    # They may also end with the first cluster, if that is where we are.
    if at > len(area) or len(area) < cluster:
        raise BadImage("its header extensions do not end where they should")


def _check_table(what: str, offset: int, length: int, cluster: int, file_size: int) -> None:
    if not offset or offset % cluster:
        raise BadImage(f"its {what} does not start on a cluster")
    if offset + length > file_size:
        raise BadImage(f"its {what} lies beyond the end of the file")


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit)
