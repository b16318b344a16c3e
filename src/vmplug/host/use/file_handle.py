"""What distinguishes a file from a later one with its inode number, which is soon reused.

The handle of a file is what NFS knows it by; the generation is what file systems keep beside the
inode. Neither needs privileges, and writing, renaming and truncating leave both as they are.
Source: name_to_handle_at(2); include/uapi/linux/fs.h, FS_IOC_GETVERSION; measured with Linux 6.1
to 6.18 on ext4, xfs, btrfs and tmpfs. Overlay has handles since 6.5, 9p has neither.
"""

import ctypes
import os

from vmplug.host.root import HostRoot

_AT_FDCWD = -100
_FLAGS = (0, 0x200)
"""AT_HANDLE_FID, since Linux 6.5: a handle that can be compared, though not opened."""

_HANDLE_BYTES_MAX = 128
_HEAD_BYTES = 8
_FS_IOC_GETVERSION = 0x80087601

_name_to_handle_at = ctypes.CDLL(None, use_errno=True).name_to_handle_at


def identify_file(path: str, root: HostRoot) -> str | None:
    """The file or directory that has a path now; None when absent."""
    status = root.stat_or_none(path)
    if status is None:
        return None
    mark = None
    if root.is_live:
        mark = read_file_mark(path, root)
    return f"file {status.st_dev}:{status.st_ino} {mark or 'without a handle'}"


def read_file_mark(path: str, root: HostRoot) -> str | None:
    """The handle, else the generation, of a file of the running host; None without both."""
    for flags in _FLAGS:
        if handle := _read_handle(path, flags):
            return handle
    generation = root.ask_node(path, _FS_IOC_GETVERSION, 8) if os.path.isfile(path) else None
    return f"generation {int.from_bytes(generation[:4], 'little')}" if generation else None


def _read_handle(path: str, flags: int) -> str | None:
    """The type and the bytes of struct file_handle; None where the file system has no handles."""
    size = _HANDLE_BYTES_MAX.to_bytes(4, "little")
    buffer = ctypes.create_string_buffer(size, _HEAD_BYTES + _HANDLE_BYTES_MAX)
    mount = ctypes.c_int()
    name = os.fsencode(path)
    if _name_to_handle_at(_AT_FDCWD, name, buffer, ctypes.byref(mount), flags):
        return None
    length = int.from_bytes(buffer.raw[:4], "little")
    return f"handle {buffer.raw[4 : _HEAD_BYTES + length].hex()}"
