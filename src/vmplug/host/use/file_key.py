"""What a file is, whatever its names are: enough to compare it with what processes have open."""

import os
import stat

from vmplug.devnum import DevNum

FileKey = tuple[int, int, int]
"""A device by its kind and number, with 0; anything else by kind, file system and inode.

The kind is S_IFBLK, S_IFREG and so on. One is made for every open file of the host.
"""


def key_of(status: os.stat_result) -> FileKey:
    """The file with that status."""
    kind = stat.S_IFMT(status.st_mode)
    if kind in {stat.S_IFBLK, stat.S_IFCHR}:
        return kind, status.st_rdev, 0
    return kind, status.st_dev, status.st_ino


def key_of_node(kind: int, number: DevNum) -> FileKey:
    """The device with that number; the kind is S_IFBLK or S_IFCHR."""
    return kind, os.makedev(number.major, number.minor), 0
