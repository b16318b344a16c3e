"""What else shows the bytes of a disk: other names of it, and the loop devices on it."""

from collections.abc import Iterable

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.loop_files import Loop
from vmplug.host.block.sysfs import read_block_device
from vmplug.host.block.twins import read_lun, read_twins
from vmplug.host.block.usage import HostUsage
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot


def relate_block(device: BlockDevice, usage: HostUsage, root: HostRoot) -> BlockDevice:
    """The device with its twins and loop devices, which only a check needs.

    Raises AttributeReadError.
    """
    if device.loops is not None:
        return device
    lun = read_lun(device.sysfs_path, root) if device.sysfs_path else None
    names = usage.luns.get(lun, ()) if lun else ()
    twins = tuple(read_twins(device.sysfs_path, names, root)) if device.sysfs_path else ()
    known = device._replace(twins=twins)
    return known._replace(loops=_numbers(_loops_on(known, usage, root), root))


def relate_file(file: DiskFile, usage: HostUsage, root: HostRoot) -> DiskFile:
    """The file with its loop devices. Raises AttributeReadError."""
    if file.loops is not None:
        return file
    return file._replace(loops=_numbers(_loops_on(file, usage, root), root))


def _loops_on(disk: BlockDevice | DiskFile, usage: HostUsage, root: HostRoot) -> list[Loop]:
    """The loop devices on the disk, its partitions and its other names, except itself.

    Those on the file behind a loop device show its bytes too.
    """
    number = disk.devnum if isinstance(disk, BlockDevice) else None
    index = usage.loop_index
    own = index.by_number.get(number) if number else None
    found = [loop for node in disk.nodes for loop in index.find_on(node, root)]
    found += index.find_beside(own, root) if own else []
    others = {loop.devnum: loop for loop in found if loop is not own}
    return [
        others[number]
        for number in sorted(others, key=lambda number: (number.major, number.minor))
    ]


def _numbers(loops: Iterable[Loop], root: HostRoot) -> tuple[DevNum, ...]:
    """The loop devices and their partitions."""
    devices = (
        read_block_device(loop.devnum, loop.device_node, FoundBy.SYSFS, root) for loop in loops
    )
    return tuple(
        number
        for device in devices
        for number in (device.devnum, *(part.devnum for part in device.relatives))
    )
