"""What keeps QEMU from using a qcow2 image, or would silently lose its data.

Source: QEMU docs/interop/qcow2.txt; block/qcow2.c, qcow2_do_open.
"""

import struct
from collections.abc import Iterator

import msgspec

from vmplug.host.block.qcow2 import HEADER, HEADER_3, MAGIC, VERSIONS
from vmplug.host.root import HostRoot

_DIRTY, _CORRUPT, _EXTERNAL_DATA, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES = 0b11111
_RAW_EXTERNAL_DATA = 1 << 1
"""Of the features that a program may clear."""
_EXTENDED_L2_BITS = 14
_ZLIB, _ZSTD = 0, 1
_TABLE_MAX_BYTES, _REFCOUNTS_MAX_BYTES = 32 << 20, 8 << 20
_SNAPSHOT_BYTES, _SNAPSHOTS_MAX = 40, 65536
_OFFSET, _IN_USE = ((1 << 56) - 1) & ~511, 1 << 63
"""Of the entries of the tables L1 and L2."""
_NAME_MAX = 1023
_EXTENSIONS_BYTES = 1 << 16


class ImageFault(msgspec.Struct, frozen=True):
    """Why an image cannot be used, or not for writing, and the remedy.

    `file` is the backing file that has the fault, None for the image itself.
    """

    what: str
    remedy: str
    only_for_writing: bool = False
    file: str | None = None


def find_faults(path: str, size_bytes: int, root: HostRoot) -> list[ImageFault]:
    """What is wrong with a qcow2 image of that size; only the header and two tables are read."""
    head = root.read_at(path, 0, HEADER.size + HEADER_3.size)
    if not head.startswith(MAGIC):
        return []
    version = int.from_bytes(head[4:8], "big")
    if len(head) >= 8 and version not in VERSIONS:
        return [ImageFault(f"is a qcow image of version {version}", _CONVERT)]
    needed = HEADER.size + (HEADER_3.size if version == 3 else 0)
    if len(head) < needed:
        return [_cut_short("its header is truncated")]
    layout = _Layout.of(root.read_at(path, 0, _EXTENSIONS_BYTES), version)
    return list(_wrong_header(layout)) or list(_missing_parts(layout, path, size_bytes, root))


_CONVERT = "convert it (qemu-img convert -O qcow2 OLD NEW)"
_REPAIR = "qemu-img check shows the damage, and -r all repairs what it can; or restore a copy"


def _cut_short(what: str) -> ImageFault:
    return ImageFault(what, "copy the image again, or restore it: the copy is not complete")


class _Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a header that say where the parts of the image are.

    `is_cut`: an extension of the header ends after the space for it. `compression` is a number,
    `may_clear` the features that a program may clear.
    """

    cluster_bits: int
    virtual_size: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcounts_offset: int
    refcounts_clusters: int
    snapshots: int
    snapshots_offset: int
    name_offset: int
    name_bytes: int
    is_cut: bool
    features: int = 0
    may_clear: int = 0
    refcount_order: int = 4
    header_bytes: int = HEADER.size
    header_least: int = HEADER.size
    compression: int = _ZLIB

    @classmethod
    def of(cls, head: bytes, version: int) -> "_Layout":
        _, _, name, length, bits, size, crypt, entries, l1, ref, ref_size, snapshots, snap = (
            HEADER.unpack_from(head)
        )
        more, header_bytes = {}, HEADER.size
        if version >= 3:
            features, _, may_clear, order, header_bytes = HEADER_3.unpack_from(head, HEADER.size)
            compression_at = HEADER.size + HEADER_3.size
            has_compression = compression_at < min(header_bytes, len(head))
            more = {
                "features": features,
                "may_clear": may_clear,
                "refcount_order": order,
                "header_bytes": header_bytes,
                "header_least": compression_at,
                "compression": head[compression_at] if has_compression else _ZLIB,
            }
        return cls(
            cluster_bits=bits,
            virtual_size=size,
            encryption=crypt,
            l1_entries=entries,
            l1_offset=l1,
            refcounts_offset=ref,
            refcounts_clusters=ref_size,
            snapshots=snapshots,
            snapshots_offset=snap,
            name_offset=name,
            name_bytes=length,
            is_cut=_has_cut_extension(head, header_bytes, name or 1 << min(bits, 21)),
            **more,
        )


def _has_cut_extension(head: bytes, at: int, end: int) -> bool:
    """Whether an extension of the header is longer than the space up to `end`."""
    while at < end and at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        at += 8
        if length > end - at:
            return True
        if kind == 0:
            return False
        at += -(-length // 8) * 8
    return False


def _wrong_header(layout: _Layout) -> Iterator[ImageFault]:
    if unknown := layout.features & ~_KNOWN_FEATURES:
        bits = [str(bit) for bit in range(64) if unknown >> bit & 1]
        yield ImageFault(
            f"needs features that vmplug does not know (bit {', '.join(bits[:3])})", _CONVERT
        )
    if layout.features & _CORRUPT:
        yield ImageFault("is marked as corrupt", _REPAIR, only_for_writing=True)
    if layout.encryption:
        yield ImageFault(
            "is encrypted, and vmplug has no keys for QEMU",
            "decrypt it (qemu-img convert --image-opts), and let the guest encrypt its disk",
        )
    if not 9 <= layout.cluster_bits <= 21 or any(_impossible(layout)):
        yield ImageFault("has a header that no qcow2 image can have", _REPAIR)


def _impossible(layout: _Layout) -> Iterator[bool]:
    """What QEMU does not accept in a header, each of its conditions in turn."""
    cluster, features = 1 << layout.cluster_bits, layout.features
    tables = (
        (layout.l1_offset, layout.l1_entries * 8),
        (layout.refcounts_offset, layout.refcounts_clusters * cluster),
        (layout.snapshots_offset, layout.snapshots * _SNAPSHOT_BYTES),
    )
    yield from (at % cluster != 0 or at + length >= 1 << 63 for at, length in tables)
    yield layout.refcount_order > 6
    yield not 0 < layout.refcounts_clusters * cluster <= _REFCOUNTS_MAX_BYTES
    yield layout.snapshots > _SNAPSHOTS_MAX
    yield layout.header_bytes > cluster or layout.is_cut
    yield layout.header_bytes < layout.header_least
    yield layout.name_offset > cluster
    if layout.name_offset:
        yield layout.name_bytes > min(_NAME_MAX, cluster - layout.name_offset)
    yield layout.compression > _ZSTD
    yield bool(features & _COMPRESSION) is (layout.compression == _ZLIB)
    yield bool(layout.may_clear & _RAW_EXTERNAL_DATA and not features & _EXTERNAL_DATA)
    yield bool(features & _EXTENDED_L2) and layout.cluster_bits < _EXTENDED_L2_BITS


def _missing_parts(
    layout: _Layout, path: str, size_bytes: int, root: HostRoot
) -> Iterator[ImageFault]:
    """QEMU reads zeros behind the end of a file: the guest would silently lose its data."""
    cluster = 1 << layout.cluster_bits
    entry = 16 if layout.features & _EXTENDED_L2 else 8
    l1_needed = -(-layout.virtual_size // (cluster * (cluster // entry)))
    l1_bytes = layout.l1_entries * 8
    if layout.l1_entries < l1_needed or l1_bytes > _TABLE_MAX_BYTES:
        yield ImageFault("has an L1 table that does not fit its size", _REPAIR)
    elif layout.l1_offset + l1_bytes > size_bytes:
        yield _cut_short(f"has {size_bytes} bytes, and its L1 table ends after them")
    elif layout.refcounts_offset + layout.refcounts_clusters * cluster > size_bytes:
        yield _cut_short(f"has {size_bytes} bytes, and its refcount table ends after them")
    elif (
        layout.snapshots
        and layout.snapshots_offset + layout.snapshots * _SNAPSHOT_BYTES > size_bytes
    ):
        yield _cut_short(f"has {size_bytes} bytes, and its table of snapshots ends after them")
    elif not layout.features & _DIRTY:  # else its refcounts say nothing
        last = _last_cluster(layout, path, size_bytes, root)
        if last * cluster >= size_bytes:
            yield _cut_short(f"has {size_bytes} bytes, and uses a cluster at {last * cluster}")


def find_short_data(
    path: str, data_file: str, data_bytes: int, root: HostRoot
) -> Iterator[ImageFault]:
    """An external data file that ends before the image's last data, which has its guest's offset.

    QEMU reads zeros there too. Only for an image without other faults.
    """
    head = root.read_at(path, 0, _EXTENSIONS_BYTES)
    layout = _Layout.of(head, int.from_bytes(head[4:8], "big"))
    last = _last_data(layout, path, root)
    if last is not None and last >= data_bytes:
        yield _cut_short(
            f"needs {data_file}, which has {data_bytes} bytes, and has data at {last}"
        )


def _last_data(layout: _Layout, path: str, root: HostRoot) -> int | None:
    """Where the last data of the guest begins, in bytes; None without any."""
    cluster = 1 << layout.cluster_bits
    entry = 16 if layout.features & _EXTENDED_L2 else 8
    tables = root.read_at(path, layout.l1_offset, min(layout.l1_entries * 8, _TABLE_MAX_BYTES))
    for index in reversed(range(len(tables) // 8)):
        (table_at,) = struct.unpack_from(">Q", tables, index * 8)
        if table_at & _OFFSET:
            table = root.read_at(path, table_at & _OFFSET, cluster)
            used = (at for at in reversed(range(0, len(table), entry)) if _has_data(table, at))
            if (at := next(used, None)) is not None:
                return (index * (cluster // entry) + at // entry) * cluster
    return None


def _has_data(table: bytes, at: int) -> bool:
    """Whether the entry of a cluster says that it is in the data file; at 0 only a bit says so."""
    (found,) = struct.unpack_from(">Q", table.ljust(at + 8, b"\0"), at)
    return bool(found & (_OFFSET | _IN_USE))


def _last_cluster(layout: _Layout, path: str, size_bytes: int, root: HostRoot) -> int:
    """The number of the last cluster in use, or one shortly before it."""
    cluster = 1 << layout.cluster_bits
    table_bytes = min(layout.refcounts_clusters * cluster, _TABLE_MAX_BYTES)
    table = root.read_at(path, layout.refcounts_offset, table_bytes).rstrip(b"\0")
    if not table:
        return 0
    index = (len(table) - 1) // 8
    (block_offset,) = struct.unpack_from(">Q", table.ljust(index * 8 + 8, b"\0"), index * 8)
    block_at: int = block_offset & ~511
    if block_at >= size_bytes:  # up to 2 ** 64, which no file has
        return -(-block_at // cluster)
    block = root.read_at(path, block_at, cluster).rstrip(b"\0")
    per_block = cluster * 8 >> layout.refcount_order
    return index * per_block + ((max(len(block) - 1, 0) * 8) >> layout.refcount_order)
