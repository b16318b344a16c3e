"""statx(2) without asking the file system again, which Python has no call for.

stat(2) of a file on FUSE or NFS waits for its server, forever if that has stopped. What a file is
never changes, so what the kernel remembers is enough.
Source: statx(2), AT_STATX_DONT_SYNC; include/uapi/linux/stat.h.
"""

import ctypes
import errno
import os
import stat
import struct

import msgspec

from vmplug.errors import AttributeReadError
from vmplug.host.use.file_key import FileKey

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_WANTED = 0x1 | 0x100 | 0x1000
"""STATX_TYPE, STATX_INO and, since Linux 5.8, STATX_MNT_ID."""

_BUFFER_BYTES = 256
_LAYOUT = struct.Struct("=28xH2xQ88x4IQ")
"""stx_mode, stx_ino, stx_rdev_*, stx_dev_* and stx_mnt_id of struct statx."""

_ABSENT = frozenset({errno.ENOENT, errno.ESRCH, errno.ENOTDIR})
_statx = ctypes.CDLL(None, use_errno=True).statx


class Place(msgspec.Struct, frozen=True):
    """A file, and the number of the mount through which it is seen."""

    key: FileKey
    mount: int


def read_place(path: str) -> Place | None:
    """What a path, or a link of /proc, leads to; None when absent. Raises AttributeReadError."""
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    if _statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _WANTED, buffer):
        number = ctypes.get_errno()
        if number in _ABSENT:
            return None
        raise AttributeReadError(path, number)
    mode, inode, major, minor, dev_major, dev_minor, mount = _LAYOUT.unpack_from(buffer)
    kind = stat.S_IFMT(mode)
    if kind in {stat.S_IFBLK, stat.S_IFCHR}:
        return Place(FileKey(kind, os.makedev(major, minor), 0), mount)
    return Place(FileKey(kind, os.makedev(dev_major, dev_minor), inode), mount)
