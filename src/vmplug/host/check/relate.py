"""A device with everything that shows its bytes, or leaves the host with it.

Of an image these are also the files that QEMU opens for it: data goes there, or comes from there.
"""

from collections.abc import Iterator

from msgspec.structs import replace

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.block.relations import relate_block, relate_file
from vmplug.host.block.sysfs import read_block_device, read_disk_file
from vmplug.host.block.usage import HostUsage
from vmplug.host.device import HostDevice
from vmplug.host.finding import Access
from vmplug.host.kind import FoundBy, Identity
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot, node_number


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


def list_image_files(
    image: ImageFile | None, access: Access, root: HostRoot
) -> Iterator[tuple[BlockDevice | DiskFile, Access]]:
    """The other files of an image, with what the VM may do to each: backing files are only read.

    None is an image whose header names no file, or one that vmplug does not follow.
    """
    if image is None:
        return
    reading = replace(access, read_only=True)
    for file, how in ((image.data_file, access), (image.backing, reading)):
        if file:
            yield _read(file, root), how
            yield from list_image_files(file, how, root)


def _read(file: ImageFile, root: HostRoot) -> BlockDevice | DiskFile:
    status = root.stat(file.path)
    if file.is_device and status:
        return read_block_device(node_number(status), file.path, FoundBy.FILE, root)
    return read_disk_file(file.path, root)
