"""A device with everything that shows its bytes, or leaves the host with it."""

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.relations import relate_block, relate_file
from vmplug.host.block.sysfs import read_block_device
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.image_files import list_image_files
from vmplug.host.device import HostDevice
from vmplug.host.finding import Access
from vmplug.host.kind import FoundBy, Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot


def relate_device(device: HostDevice, usage: HostUsage, root: HostRoot) -> HostDevice:
    """The device with its relatives, on which VMs may have claims. Raises AttributeReadError."""
    match device:
        case BlockDevice():
            return relate_block(device, usage, root)
        case DiskFile():
            return relate_file(device, usage, root)
        case VfioGroup():
            return relate_group(device, usage, root)
        case _:
            return device


def relate_image(file: DiskFile, usage: HostUsage, root: HostRoot) -> DiskFile:
    """The image with the other files that it makes QEMU open. Raises AttributeReadError."""
    written, only_read = dict[Identity, None](), dict[Identity, None]()
    for other, how in list_image_files(file.image, Access(read_only=False), root):
        known = relate_device(other, usage, root)
        names = dict.fromkeys((known.identity, *known.related_identities))
        if how.read_only:
            only_read |= names
        else:
            written |= names
    return file._replace(written=tuple(written), only_read=tuple(only_read))


def relate_group(group: VfioGroup, usage: HostUsage, root: HostRoot) -> VfioGroup:
    """The group with everything that shows the bytes of its disks. Raises AttributeReadError."""
    numbers = dict.fromkeys(group.partitions)
    for part in group.disks:
        found = read_block_device(part.devnum, part.device_node, FoundBy.SYSFS, root)
        disk = relate_block(found, usage, root)
        numbers |= dict.fromkeys(part.devnum for part in disk.same_bytes)
        numbers |= dict.fromkeys(disk.loops or ())
    return group._replace(partitions=tuple(numbers))
