"""QEMU's lock on a disk: OFD locks on single bytes of the file, one for each permission.

Byte 100 + n is locked by those that have a permission, 200 + n by those that deny it to others; 0
is to read, 1 to write, 3 to resize. They belong to the open file, and stay until all descriptors
of it are closed. Source: QEMU block/file-posix.c, include/block/block-common.h.
"""

import fcntl
import os
import struct

_LAYOUT = "hhqqi4x"
"""struct flock on 64-bit Linux. Source: include/uapi/asm-generic/fcntl.h."""
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37

_HAS, _DENIES = 100, 200
_READ, _WRITE = 0, 1
_AGAINST_WRITING = ((100, 200),)
_AGAINST_READING = ((101, 1), (103, 1), (200, 1))


def is_locked(descriptor: int, *, read_only: bool) -> bool:
    """Whether another open file of it has a lock that keeps QEMU from reading or writing it."""
    ranges = _AGAINST_READING if read_only else _AGAINST_WRITING
    return any(_is_range_locked(descriptor, start, length) for start, length in ranges)


def take_lock(descriptor: int, *, read_only: bool, share_rw: bool) -> bool:
    """Lock the open file as a QEMU with that disk does; False when another does not let it.

    Like QEMU it takes the lock before it checks: of two that do so at once not both succeed.
    """
    has = [_READ] if read_only else [_READ, _WRITE]
    denies = [] if share_rw else [_WRITE]
    try:
        for start in [*(_HAS + n for n in has), *(_DENIES + n for n in denies)]:
            fcntl.fcntl(descriptor, _F_OFD_SETLK, _lock(fcntl.F_RDLCK, start, 1))
    except BlockingIOError:  # a write lock, which QEMU never takes
        return False
    against = [*(_DENIES + n for n in has), *(_HAS + n for n in denies)]
    return not any(_is_range_locked(descriptor, start, 1) for start in against)


def _is_range_locked(descriptor: int, start: int, length: int) -> bool:
    answer = fcntl.fcntl(descriptor, _F_OFD_GETLK, _lock(fcntl.F_WRLCK, start, length))
    return bool(struct.unpack(_LAYOUT, answer)[0] != fcntl.F_UNLCK)


def _lock(kind: int, start: int, length: int) -> bytes:
    return struct.pack(_LAYOUT, kind, os.SEEK_SET, start, length, 0)
