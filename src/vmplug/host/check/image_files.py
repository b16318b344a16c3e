"""The files that QEMU opens for an image: its data goes there, or comes from there."""

from collections.abc import Iterator

from msgspec.structs import replace

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.qcow2 import ImageFile
from vmplug.host.block.sysfs import read_block_device, read_disk_file
from vmplug.host.finding import Access
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot, node_number


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
