"""DevNum: what names a device on the host. FileKey: what a file is, whatever its names are.

They are separate from the guest's addresses, which a lookup of a device does not need.
"""

import os
import stat
from typing import NamedTuple, Self

MAJOR_MAX = (1 << 12) - 1
MINOR_MAX = (1 << 20) - 1
"""The kernel keeps 12 bits of major and 20 of minor. Source: include/linux/kdev_t.h."""


class _Pair(NamedTuple):
    major: int
    minor: int


class DevNum(_Pair):
    """A device number, `major:minor`; whether it is char or block always stands beside it.

    Raises ValueError when the kernel could not hold it.
    """

    __slots__ = ()

    def __new__(cls, major: int, minor: int) -> Self:
        """Check the numbers."""
        if not 0 <= major <= MAJOR_MAX:
            raise ValueError(f"major {major} is not in 0..{MAJOR_MAX}")
        if not 0 <= minor <= MINOR_MAX:
            raise ValueError(f"minor {minor} is not in 0..{MINOR_MAX}")
        return super().__new__(cls, major, minor)

    @classmethod
    def parse(cls, text: str) -> Self:
        """`8:0` as the kernel writes it in `dev` files; ValueError for anything else."""
        major, colon, minor = text.partition(":")
        if not (colon and is_decimal(major) and is_decimal(minor)):
            raise ValueError(f"{text!r} is not MAJOR:MINOR")
        return cls(int(major), int(minor))

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"


def is_decimal(text: str) -> bool:
    """Whether `text` is a number as the kernel writes it: ASCII digits, no sign."""
    return text.isascii() and text.isdigit()


FileKey = tuple[int, int, int]
"""A device by its kind and number, with 0; anything else by kind, file system and inode.

The kind is S_IFBLK, S_IFREG and so on. It is enough to compare it with what processes have
open: one is made for every open file of the host.
"""


def key_of(status: os.stat_result) -> FileKey:
    """The file with that status."""
    kind = stat.S_IFMT(status.st_mode)
    if kind in {stat.S_IFBLK, stat.S_IFCHR}:
        return kind, status.st_rdev, 0
    return kind, status.st_dev, status.st_ino


def key_of_inode(major: str, minor: str, inode: str) -> FileKey:
    """The regular file that the kernel writes as a super block in hexadecimal, and an inode."""
    return stat.S_IFREG, os.makedev(int(major, 16), int(minor, 16)), int(inode)


def key_of_node(kind: int, number: DevNum) -> FileKey:
    """The device with that number; the kind is S_IFBLK or S_IFCHR."""
    return kind, os.makedev(number.major, number.minor), 0
