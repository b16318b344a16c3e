"""What thing a device is, whatever its name leads to later.

A name, a number and an address can each lead to another thing: a file is replaced under its name,
a loop device gets another file, a function is swapped. The text that `identify` makes differs
then. Only equal or not matters.
"""

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.sysfs import find_disk_path
from vmplug.host.device import HostDevice, SharedDirectory
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot
from vmplug.host.use.file_handle import read_file_mark


def identify(device: HostDevice, root: HostRoot) -> str | None:
    """The thing that a device is now; None for a kind without one, or where it is unknown.

    A file or directory is its device and inode with its handle, else its generation. A block
    device is its number and `diskseq`, a partition also its start: it may grow. A function is its
    address with the inode of its directory in sysfs, which a swapped one does not have.
    Source: Documentation/ABI/testing/sysfs-block, diskseq. Raises AttributeReadError.
    """
    match device:
        case DiskFile() | SharedDirectory():
            return identify_file(device.host_path, root)
        case BlockDevice(sysfs_path=str(path)):
            return identify_block(device.devnum, path, root)
        case VfioGroup():
            parts = [identify_member(path, root) for path in device.member_paths.values()]
            return " ".join(["vfio", *parts]) if parts and all(parts) else None
        case _:
            return None


def identify_file(path: str, root: HostRoot) -> str | None:
    """The file or directory that has a path now; None when absent."""
    status = root.stat_or_none(path)
    if status is None:
        return None
    mark = None
    if root.is_live:
        mark = read_file_mark(path, root)
    return f"file {status.st_dev}:{status.st_ino} {mark or 'without a handle'}"


def identify_block(number: DevNum, sysfs_path: str, root: HostRoot) -> str:
    """The block device that has a number now; the path has no links. Raises AttributeReadError."""
    disk = find_disk_path(sysfs_path, root)
    names = [f"{disk}/diskseq", *([f"{sysfs_path}/start"] if disk != sysfs_path else [])]
    words = [root.read_int(name) for name in names]
    return " ".join(["block", str(number), *(str(word or "-") for word in words)])


def identify_member(path: str, root: HostRoot) -> str:
    """The function or mediated device that has a directory in sysfs now; empty when absent."""
    status = root.stat_or_none(path)
    return f"{path.rpartition('/')[2]}:{status.st_ino}" if status else ""
