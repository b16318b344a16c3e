"""Loop devices and the files behind them.

Source: Documentation/ABI/testing/sysfs-block-loop.
"""

import os
from typing import NamedTuple

from vmplug.host.root import HostRoot

_DELETED = " (deleted)"


class LoopBacking(NamedTuple):
    """The part of a file that a loop device shows.

    `offset_bytes` is None where the host does not say, `size_limit_bytes` when the device reaches
    to the end of the file. `deleted`: the file has lost the name it was opened by. The device
    works, but no path leads to its data.
    """

    backing_file: str
    offset_bytes: int | None = 0
    size_limit_bytes: int | None = None
    deleted: bool = False

    def overlaps(self, other: "LoopBacking") -> bool:
        """Whether the other shows bytes of the same part of the file; True where unknown."""
        if self.offset_bytes is None or other.offset_bytes is None:
            return True
        first, last = sorted((self, other), key=lambda part: part.offset_bytes or 0)
        if first.size_limit_bytes is None:
            return True
        assert first.offset_bytes is not None
        assert last.offset_bytes is not None
        return last.offset_bytes < first.offset_bytes + first.size_limit_bytes


def read_backing_file(sysfs_path: str, root: HostRoot) -> LoopBacking | None:
    """The file behind a loop device; None when `sysfs_path` is not a configured one.

    Raises AttributeReadError when the kernel's answer cannot be read.
    """
    name = root.read_attribute(f"{sysfs_path}/loop/backing_file")
    if not name:
        return None
    path = os.fsdecode(name.removesuffix(b"\n"))
    # The kernel marks a deleted file in the text itself; a file may really be called that.
    deleted = path.endswith(_DELETED) and root.stat_or_none(path) is None
    return LoopBacking(
        backing_file=path.removesuffix(_DELETED) if deleted else path,
        offset_bytes=root.read_int(f"{sysfs_path}/loop/offset"),
        size_limit_bytes=root.read_int(f"{sysfs_path}/loop/sizelimit") or None,
        deleted=deleted,
    )
