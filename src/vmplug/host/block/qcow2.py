"""qcow2 images: the facts in the header.

Source: QEMU docs/interop/qcow2.txt.
"""

import struct
from typing import NamedTuple

from vmplug.host.root import HostRoot

MAGIC = b"QFI\xfb"
HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""Magic, version, backing file offset and length, cluster bits, virtual size in bytes, encryption,
entries and offset of the L1 table, offset and clusters of the refcount table, snapshots."""
_FACTS_BYTES = 32
HEADER_3 = struct.Struct(">QQQII")
"""What version 3 has after that: three sets of features, refcount order, length of the header."""
_EXTERNAL_DATA = 1 << 2
_CLUSTER_MAX = 2 << 20
"""The backing file's name is in the first cluster, 2 MiB at most; QEMU refuses others."""
_NAME_MAX = 1023


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
    backing = b""
    if name_offset > _CLUSTER_MAX:
        backing = b"(a name outside the header)"
    elif name_offset:
        backing = root.read_at(path, name_offset, min(name_length, _NAME_MAX))
    return Qcow2Header(
        virtual_size_bytes=size,
        backing_file=backing.decode(errors="replace") or None,
        external_data=bool(features & _EXTERNAL_DATA),
    )
