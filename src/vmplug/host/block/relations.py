"""What else shows the bytes of a disk: other names of it, loop devices, what is behind those."""

from collections.abc import Iterable, Iterator, Sequence

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile, DiskPart
from vmplug.host.block.loop_files import Loop
from vmplug.host.block.sysfs import find_block_node, find_named_block, read_block_device
from vmplug.host.block.twins import read_lun_names, read_twins
from vmplug.host.block.usage import HostUsage
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot


def relate_block(device: BlockDevice, usage: HostUsage, root: HostRoot) -> BlockDevice:
    """The device with its twins, what is behind it, and its loop devices: only a check needs them.

    Raises AttributeReadError.
    """
    if device.loops is not None:
        return device
    files = [name for path in device.below_files for name in (path, *usage.other_names(path))]
    known = device._replace(below_files=tuple(dict.fromkeys(files)))
    known = known._replace(twins=tuple(_twins(known, usage, root)))
    known = known._replace(behind=tuple(_behind(known, usage, root)))
    return known._replace(loops=_numbers(_loops_on(known, usage), root))


def relate_file(file: DiskFile, usage: HostUsage, root: HostRoot) -> DiskFile:
    """The file with its names in overlays and its loop devices. Raises AttributeReadError."""
    if file.loops is not None:
        return file
    known = file._replace(other_names=usage.other_names(file.host_path))
    return known._replace(loops=_numbers(_loops_on(known, usage), root))


def _twins(device: BlockDevice, usage: HostUsage, root: HostRoot) -> list[DiskPart]:
    path = device.sysfs_path
    if path is None:
        return []
    names = read_lun_names(path, root)
    disks = dict.fromkeys(disk for name in names for disk in usage.luns.get(name, ()))
    return read_twins(path, disks, root)


def _behind(device: BlockDevice, usage: HostUsage, root: HostRoot) -> Iterator[DiskPart]:
    """What it is built on, where the kernel lets others use that too.

    A loop device claims nothing, and device-mapper and md claim a LUN only under one of its names.
    """
    known = {device.devnum, *(part.devnum for part in device.same_bytes)}
    found, waiting = dict[DevNum, DiskPart](), [*known, *device.below]
    while waiting:
        loop = usage.loop_index.by_number.get(waiting.pop())
        number = _number_behind(loop, root) if loop else None
        if number is None or number in known or number in found:
            continue
        disk = _read(number, root)
        found[number] = DiskPart(number, disk.device_node, disk.holders or (), is_whole=True)
        for part in (*disk.relatives, *_twins(disk, usage, root)):
            found.setdefault(part.devnum, part)
        waiting += [number, *disk.below, *(part.devnum for part in disk.relatives)]
    for number in device.below:
        if number not in found:
            for part in _twins(_read(number, root), usage, root):
                if part.devnum not in device.below:
                    found.setdefault(part.devnum, part)
    yield from (part for number, part in found.items() if number not in known)


def _read(number: DevNum, root: HostRoot) -> BlockDevice:
    node = find_block_node(number, root) or f"/dev/block/{number}"
    return read_block_device(number, node, FoundBy.SYSFS, root)


def _number_behind(loop: Loop, root: HostRoot) -> DevNum | None:
    """The block device that a loop device is on; None for a file."""
    if loop.opened is not None:
        return loop.opened.devnum
    return None if loop.backing.deleted else find_named_block(loop.backing.backing_file, root)


def _loops_on(disk: BlockDevice | DiskFile, usage: HostUsage) -> list[Loop]:
    """The loop devices on the disk, its partitions and its other names, except its own.

    Those on the file behind a loop device show its bytes too, unless they are on other parts of
    that: so one has the partitions of an image where the kernel does not find them.
    """
    index, own = usage.loop_index, list[Loop]()
    if isinstance(disk, BlockDevice):
        numbers = (disk.devnum, *disk.below, *(part.devnum for part in disk.same_bytes))
        own = [loop for number in numbers if (loop := index.by_number.get(number))]
    found = [loop for node in disk.nodes for loop in index.find_on(node)]
    found += [beside for loop in own for beside in index.find_beside(loop)]
    others = {loop.devnum: loop for loop in found if loop not in own and _overlaps(loop, own)}
    return [
        others[number]
        for number in sorted(others, key=lambda number: (number.major, number.minor))
    ]


def _overlaps(loop: Loop, own: Sequence[Loop]) -> bool:
    """Whether a loop device may show bytes of the own ones, also if it is not on their file."""
    beside = [one for one in own if one.opened is not None and one.opened == loop.opened]
    return not beside or any(one.backing.overlaps(loop.backing) for one in beside)


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
