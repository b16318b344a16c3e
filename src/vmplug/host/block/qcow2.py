"""qcow2 images: the facts in the header.

Source: QEMU docs/interop/qcow2.txt.
"""

import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from vmplug.host.block.formats import ImageFormat
from vmplug.host.file_id import file_id
from vmplug.host.kind import Identity, IdentityKind
from vmplug.host.root import HostRoot, describe
from vmplug.host.use.silent import require_answer

MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""Magic, version, backing file offset and length, cluster bits, virtual size in bytes, encryption,
entries and offset of the L1 table, offset and clusters of the refcount table, snapshots."""
_FACTS_BYTES = 32
VERSIONS = frozenset({2, 3})
HEADER_3 = struct.Struct(">QQQII")
"""What version 3 has after that: three sets of features, refcount order, length of the header."""
_EXTERNAL_DATA = 1 << 2
_CLUSTER_MAX = 2 << 20
"""The backing file's name is in the first cluster, 2 MiB at most; QEMU refuses others."""
_NAME_MAX = 1023


class Qcow2Header(NamedTuple):
    """The facts of a qcow2 header.

    `backing_file` is the text in the header, None when the image stands alone; `external_data`:
    the guest's data is in another file; `keeps_size`: QEMU does not change its size.
    """

    virtual_size_bytes: int
    backing_file: str | None
    external_data: bool
    keeps_size: bool = False


def read_qcow2_header(path: str, root: HostRoot) -> Qcow2Header | None:
    """The qcow2 header of the file at `path`; None when it is not a qcow2 image.

    Also None when it is cut short. Raises AttributeReadError when the file cannot be read. The
    header is not trusted: a guest may have written it into its raw disk.
    """
    head = root.read_at(path, 0, HEADER.size + HEADER_3.size)
    if not head.startswith(MAGIC) or len(head) < _FACTS_BYTES:
        return None
    _, version, name_offset, name_length, _, size = struct.unpack_from(">4sIQIIQ", head)
    features = 0
    if version >= 3 and len(head) >= HEADER.size + 8:
        (features,) = struct.unpack_from(">Q", head, HEADER.size)
    snapshots = HEADER.unpack_from(head)[11] if len(head) >= HEADER.size else 0
    backing = b""
    if name_offset > _CLUSTER_MAX:
        backing = b"(a name outside the header)"
    elif name_offset:
        backing = root.read_at(path, name_offset, min(name_length, _NAME_MAX))
    return Qcow2Header(
        virtual_size_bytes=size,
        backing_file=backing.decode(errors="replace") or None,
        external_data=bool(features & _EXTERNAL_DATA),
        keeps_size=version < 3 and snapshots > 0,  # QEMU block/qcow2.c, qcow2_co_truncate
    )


class ImageFile(NamedTuple):
    """A file of an image, with those that QEMU opens for it: what was checked of all of them.

    `thing` is what a file is, whatever has its name later (see `vmplug.host.check.thing`).
    """

    path: str
    format: ImageFormat
    is_device: bool
    file_id: str
    backing: "ImageFile | None" = None
    data_file: "ImageFile | None" = None
    thing: str | None = None

    @property
    def identity(self) -> Identity:
        """That of a disk or a file; a device's `file_id` begins as that does."""
        if self.is_device:
            return Identity(IdentityKind.BLOCK, self.file_id.partition(" ")[2])
        return Identity(IdentityKind.FILE, self.path)


def read_image(
    path: str, root: HostRoot, format_: ImageFormat = ImageFormat.QCOW2, depth: int = 0
) -> ImageFile:
    """The file of an image, and its backing and data files, by their canonical paths.

    ValueError says which of them vmplug cannot follow.
    """
    from vmplug.host.use.file_handle import identify_file  # noqa: PLC0415  ctypes costs 2 ms

    require_answer(path, root)
    path = root.real_path(path)
    status = root.stat(path)
    if status is None:
        raise ValueError(f"needs {path}, which is not there")
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise ValueError(f"needs {path}, which is {describe(status)}, and no file or disk")
    is_device = stat.S_ISBLK(status.st_mode)
    thing = None if is_device else identify_file(path, root)
    image = ImageFile(path, format_, is_device, file_id(status), thing=thing)
    if format_ is ImageFormat.RAW:
        return image
    if depth > _CHAIN_MAX:
        raise ValueError(f"has more than {_CHAIN_MAX} backing files")
    header = read_qcow2_header(path, root)
    if header is None:
        raise ValueError(f"needs {path}, which is not a qcow2 image")
    version = int.from_bytes(root.read_at(path, 4, 4), "big")
    if depth and version not in VERSIONS:
        raise ValueError(f"needs {path}, which is a qcow image of version {version}")
    extensions = dict(_extensions(path, root))
    if header.external_data:
        name = extensions.get(_DATA_FILE, b"").decode(errors="replace")
        if not name.startswith("/"):
            raise ValueError(f"has a data file without an absolute path ({name!r})")
        image = image._replace(data_file=read_image(name, root, ImageFormat.RAW))
    if header.backing_file is not None:
        image = image._replace(
            backing=_backing(image, header.backing_file, extensions, root, depth)
        )
    return image


_CHAIN_MAX = 32
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_EXTENSIONS_BYTES = 1 << 16


def _backing(
    image: ImageFile, name: str, extensions: dict[int, bytes], root: HostRoot, depth: int
) -> ImageFile:
    """QEMU takes a name with a colon before a slash for a protocol.

    Source: QEMU block.c, path_has_protocol and bdrv_get_full_backing_filename.
    """
    if ":" in name.partition("/")[0]:
        raise ValueError(f"has the backing file {name!r}, which is not a path")
    said = extensions.get(_BACKING_FORMAT, b"").decode(errors="replace")
    if said not in set(ImageFormat):
        what = f"of the format {said!r}" if said else "of no stated format"
        raise ValueError(f"has a backing file {what} ({name})")
    path = os.path.join(os.path.dirname(image.path), name)
    return read_image(path, root, ImageFormat(said), depth + 1)


def _extensions(path: str, root: HostRoot) -> Iterator[tuple[int, bytes]]:
    """The header's extensions, by their types; they end with type 0."""
    head = root.read_at(path, 0, _EXTENSIONS_BYTES)
    is_3 = int.from_bytes(head[4:8], "big") >= 3
    at = int.from_bytes(head[100:104], "big") if is_3 else HEADER.size
    while at + 8 <= len(head):
        kind, length = struct.unpack_from(">II", head, at)
        if kind == 0 or at + 8 + length > len(head):
            return
        yield kind, head[at + 8 : at + 8 + length]
        at += 8 + -(-length // 8) * 8
