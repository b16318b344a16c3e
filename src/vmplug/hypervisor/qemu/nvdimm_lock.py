"""QEMU's lock on the file of persistent memory, which QEMU itself does not take.

vmplug opens the file once more, takes the lock that QEMU takes for a disk, and passes this open
file to QEMU. QEMU keeps it: the lock lasts as long as the VM has the file, not as vmplug runs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec.structs import replace

from vmplug.devnum import key_of
from vmplug.drivers.plug import BlockDrive
from vmplug.errors import AttributeReadError, InUse
from vmplug.host.file_id import pinned
from vmplug.host.finding import Code
from vmplug.host.root import THIS_HOST
from vmplug.host.use.openers import Wanted, read_open_files
from vmplug.host.use.qemu_lock import take_lock


@contextmanager
def locked(drive: BlockDrive) -> Iterator[BlockDrive]:
    """The drive with its lock, which ends with this unless QEMU has the open file too.

    Raises InUse where another QEMU has the file, NoSuchDevice where the path leads to another one.
    """
    assert drive.file_id
    with pinned(drive.file, drive.file_id) as pin:
        descriptor = _open_locked(pin, drive)
    try:
        yield replace(drive, lock=descriptor)
    finally:
        os.close(descriptor)


def _open_locked(pin: int, drive: BlockDrive) -> int:
    try:
        descriptor = os.open(f"/proc/self/fd/{pin}", os.O_RDONLY | os.O_CLOEXEC)
        if take_lock(descriptor, read_only=drive.read_only, share_rw=drive.share_rw):
            return descriptor
    except OSError as error:  # ENOLCK: a network file system without its lock daemon
        raise AttributeReadError(drive.file, error.errno) from error
    os.close(descriptor)
    raise _in_use(drive.file)


def _in_use(path: str) -> InUse:
    """It was free when it was checked, or the check was overruled."""
    status = THIS_HOST.stat_or_none(path)
    wanted: Wanted = {key_of(status): path} if status else {}
    found = read_open_files(THIS_HOST).find(wanted)
    holders = ", ".join(f"process {opener.pid} ({opener.name})" for opener in found)
    return InUse(
        path,
        f"{path} is locked by another QEMU or qemu-storage-daemon"
        + (f"; it is open in {holders}" if holders else ""),
        codes=(Code.IMAGE_LOCKED,),
        hint="the VM is unchanged; stop the other one first",
    )
