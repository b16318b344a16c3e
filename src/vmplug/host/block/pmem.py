"""Persistent memory: files that a guest can map as an NVDIMM.

The guest's kernel maps such a file directly (DAX) when it begins with the information block that
the kernel writes for a namespace in mode fsdax; the data follows it.
Source: Linux drivers/nvdimm/pfn.h, struct nd_pfn_sb; drivers/nvdimm/pfn_devs.c.
"""

import struct
from typing import NamedTuple

from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

PFN_OFFSET_BYTES = 4096
PFN_SIGNATURE = b"NVDIMM_PFN_INFO"
_DATA_OFFSET = struct.Struct("<56xQ")
"""`dataoff` follows the signature, two UUIDs, flags and the version."""


class PfnInfo(NamedTuple):
    """The information block; `data_offset_bytes` is None when it is truncated."""

    data_offset_bytes: int | None


def read_pfn_info(path: str, root: HostRoot) -> PfnInfo | None:
    """The information block of the file at `path`; None when there is none, or it is unreadable.

    The block is not trusted: a guest may have written it.
    """
    try:
        block = root.read_at(path, PFN_OFFSET_BYTES, _DATA_OFFSET.size)
    except AttributeReadError:
        return None
    if not block.startswith(PFN_SIGNATURE):
        return None
    whole = len(block) == _DATA_OFFSET.size
    return PfnInfo(_DATA_OFFSET.unpack(block)[0] if whole else None)
