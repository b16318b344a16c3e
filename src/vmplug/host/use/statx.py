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
from collections.abc import Iterable, Iterator

from vmplug.devnum import FileKey
from vmplug.errors import AttributeReadError

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_WANTED = 0x1 | 0x100 | 0x1000
"""STATX_TYPE, STATX_INO and, since Linux 5.8, STATX_MNT_ID."""

_BUFFER_BYTES = 256
_LAYOUT = struct.Struct("=28xH2xQ88x4IQ")
"""stx_mode, stx_ino, stx_rdev_*, stx_dev_* and stx_mnt_id of struct statx."""

_ABSENT = frozenset({errno.ENOENT, errno.ESRCH, errno.ENOTDIR})
_KIND_MASK = 0o170000
_DEVICES = frozenset({stat.S_IFBLK, stat.S_IFCHR})
_unpack = _LAYOUT.unpack_from
_statx = ctypes.CDLL(None, use_errno=True).statx


Place = tuple[FileKey, int]
"""A file, and the number of the mount through which it is seen."""


def read_place(path: str) -> Place | None:
    """What a path, or a link of /proc, leads to; None when absent. Raises AttributeReadError."""
    directory, _, name = path.rpartition("/")
    return next((place for _, place in read_places(directory, [name])), None)


def read_places(directory: str, names: Iterable[str]) -> Iterator[tuple[str, Place]]:
    """The same for names in a directory, without those that are absent."""
    buffer, above = ctypes.create_string_buffer(_BUFFER_BYTES), os.fsencode(f"{directory}/")
    for name in names:
        if _statx(_AT_FDCWD, above + os.fsencode(name), _AT_STATX_DONT_SYNC, _WANTED, buffer):
            number = ctypes.get_errno()
            if number in _ABSENT:
                continue
            raise AttributeReadError(f"{directory}/{name}", number)
        mode, inode, major, minor, dev_major, dev_minor, mount = _unpack(buffer)
        kind = mode & _KIND_MASK
        if kind in _DEVICES:
            yield name, ((kind, os.makedev(major, minor), 0), mount)
        else:
            yield name, ((kind, os.makedev(dev_major, dev_minor), inode), mount)
