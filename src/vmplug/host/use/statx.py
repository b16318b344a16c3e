"""statx(2) without asking the file system again, which Python has no call for.

stat(2) of a file on FUSE or NFS waits for its server, forever if that has stopped. The kind and
number of a device node never change, so what the kernel remembers is enough.
Source: statx(2), AT_STATX_DONT_SYNC; include/uapi/linux/stat.h.
"""

import ctypes
import errno
import os

from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError

_AT_FDCWD = -100
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TYPE = 0x1
_BUFFER_BYTES = 256
_MODE, _RDEV_MAJOR, _RDEV_MINOR = 28, 128, 132
_KIND_MASK = 0o170000

_statx = ctypes.CDLL(None, use_errno=True).statx


def read_node(path: str) -> tuple[int, DevNum] | None:
    """The kind of a file, such as S_IFCHR, and its device number; None when absent.

    Raises AttributeReadError.
    """
    buffer = ctypes.create_string_buffer(_BUFFER_BYTES)
    if _statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC, _STATX_TYPE, buffer):
        number = ctypes.get_errno()
        if number in {errno.ENOENT, errno.ESRCH}:
            return None
        raise AttributeReadError(path, number)
    mode = int.from_bytes(buffer.raw[_MODE : _MODE + 2], "little")
    major, minor = (
        int.from_bytes(buffer.raw[at : at + 4], "little") for at in (_RDEV_MAJOR, _RDEV_MINOR)
    )
    return mode & _KIND_MASK, DevNum(major, minor)
