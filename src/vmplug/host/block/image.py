"""Disk image files: the facts in the header of a qcow2 file.

Source: QEMU docs/interop/qcow2.txt.
"""

import struct
from enum import StrEnum
from typing import NamedTuple

from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

_MAGIC = b"QFI\xfb"
_HEADER = ">4sIQIIQ"
"""Magic, version, backing file offset and length, cluster bits, virtual size in bytes."""
_INCOMPATIBLE_OFFSET = 72
_EXTERNAL_DATA = 1 << 2
_CLUSTER_MAX = 2 << 20
"""The backing file's name is in the first cluster, 2 MiB at most; QEMU refuses others."""


class ImageFormat(StrEnum):
    """Formats a regular file may hold, as QEMU's block drivers call them."""

    RAW = "raw"
    QCOW2 = "qcow2"


class Qcow2Header(NamedTuple):
    """The facts of a qcow2 header.

    `backing_file` is the text in the header, None when the image stands alone; `external_data`:
    the guest's data is in another file.
    """

    virtual_size_bytes: int
    backing_file: str | None
    external_data: bool


def read_qcow2_header(path: str, root: HostRoot) -> Qcow2Header | None:
    """The qcow2 header of the file at `path`; None when it is not a qcow2 image.

    Raises AttributeReadError when the header is truncated or the file cannot be read. The header
    is not trusted: a guest may have written it into its raw disk.
    """
    head = root.read_at(path, 0, 104)
    if not head.startswith(_MAGIC):
        return None
    if len(head) < struct.calcsize(_HEADER):
        raise AttributeReadError(path, why="its qcow2 header is truncated")
    _, version, name_offset, name_length, _, size = struct.unpack_from(_HEADER, head)
    features = 0
    if version >= 3 and len(head) >= _INCOMPATIBLE_OFFSET + 8:
        (features,) = struct.unpack_from(">Q", head, _INCOMPATIBLE_OFFSET)
    backing = b""
    if name_offset > _CLUSTER_MAX:
        backing = b"(a name outside the header)"
    elif name_offset:
        backing = root.read_at(path, name_offset, min(name_length, 1023))
    return Qcow2Header(
        virtual_size_bytes=size,
        backing_file=backing.decode(errors="replace") or None,
        external_data=bool(features & _EXTERNAL_DATA),
    )
