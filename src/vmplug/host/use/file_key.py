"""What a file is, whatever its names are: enough to compare it with what processes have open."""

import os
import stat
from typing import Self

import msgspec

from vmplug.devnum import DevNum


class FileKey(msgspec.Struct, frozen=True):
    """A device by its number, anything else by its file system and inode.

    `kind` is S_IFBLK, S_IFREG and so on; `device` is st_rdev of a device node, whose `inode` is 0.
    """

    kind: int
    device: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The file with that status."""
        kind = stat.S_IFMT(status.st_mode)
        if kind in {stat.S_IFBLK, stat.S_IFCHR}:
            return cls(kind, status.st_rdev, 0)
        return cls(kind, status.st_dev, status.st_ino)

    @classmethod
    def of_node(cls, kind: int, number: DevNum) -> Self:
        """The device with that number; `kind` is S_IFBLK or S_IFCHR."""
        return cls(kind, os.makedev(number.major, number.minor), 0)
