"""What `check` and `attach` want to know of a disk besides its identity.

The content of a disk whose format is stated as raw belongs to its guest: vmplug never reads it.
"""

import os
from collections.abc import Iterator

from msgspec.structs import replace

from vmplug.devnum import DevNum
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.block.formats import HEAD_BYTES, LUKS, TAIL_BYTES, ImageFormat, find_format
from vmplug.host.block.image_faults import ImageFault, find_faults, find_short_data
from vmplug.host.block.qcow2 import ImageFile, read_image
from vmplug.host.block.queue import read_queue
from vmplug.host.block.sysfs import SIZE_UNIT_BYTES, find_disk_path, read_block_device
from vmplug.host.block.twins import read_own_name
from vmplug.host.kind import FoundBy
from vmplug.host.root import HostRoot
from vmplug.host.use.questions import Questions

_AIO_EVENTS = 1024
"""What one context of QEMU takes. Source: QEMU block/linux-aio.c, MAX_EVENTS."""
_DIRECT_IO_MAX = 4096
"""QEMU tries no larger unit. Source: QEMU block/file-posix.c, raw_probe_alignment."""
_FLATTEN = "flatten it (qemu-img convert -O qcow2 OLD NEW): vmplug opens only what it can check"
_PATIENCE_S, _LEAST_S = 1.0, 0.1
"""How long a block device may take to answer; the read of a dead one would never end. The latter
also after others of the request were silent: no tenant can make many of them."""


def look_into(
    device: BlockDevice | DiskFile,
    stated: ImageFormat | None,
    root: HostRoot,
    questions: Questions | None = None,
) -> BlockDevice | DiskFile:
    """The device with the facts of its queue and of the content that the request leaves open.

    Block devices are read only on the running host, once for the `questions` of a request. Raises
    AttributeReadError.
    """
    device = device._replace(has_aio=has_aio_context(root))
    if isinstance(device, BlockDevice) and device.sysfs_path:
        disk_path = find_disk_path(device.sysfs_path, root)
        device = device._replace(
            queue=read_queue(device.sysfs_path, disk_path, root),
            own_name=read_own_name(device.sysfs_path, disk_path, root),
        )
    if isinstance(device, DiskFile):
        device = _with_room(device, root)
    match device, stated:
        case DiskFile(), None:
            path, size = device.host_path, device.size_bytes
            head = root.read_at(path, 0, HEAD_BYTES)
            tail = root.read_at(path, max(size - TAIL_BYTES, 0), TAIL_BYTES)
            return device._replace(looks_like=find_format(head, tail, path))
        case DiskFile(), ImageFormat.QCOW2:
            return _look_into_image(device, root)
        case BlockDevice(), None if root.is_live:
            asked = questions or Questions()
            facts = asked.once(
                ("content", device.devnum), lambda: _read_block(device, asked, root)
            )
            return device._replace(looks_like=facts.looks_like, is_silent=facts.is_silent)
        case _:
            return device


def _look_into_image(device: DiskFile, root: HostRoot) -> DiskFile:
    """The image with its faults and, where its header names other files, with those."""
    faults = find_faults(device.host_path, device.size_bytes, root)
    header, image = device.qcow2, None
    if header and (header.backing_file or header.external_data):
        try:
            image = read_image(device.host_path, root)
        except ValueError as error:
            faults.append(ImageFault(str(error), _FLATTEN))
    if image and not faults:
        faults += _short_data(image, root)
    below = image.backing if image else None
    while below and below.format is ImageFormat.QCOW2:
        found = find_faults(below.path, _size_of(below, root), root)
        found = found or list(_short_data(below, root))
        faults += [replace(fault, file=below.path) for fault in found]
        below = below.backing
    return device._replace(faults=tuple(faults), image=image)


def _short_data(image: ImageFile, root: HostRoot) -> Iterator[ImageFault]:
    if data_file := image.data_file:
        size_bytes = _size_of(data_file, root)
        yield from find_short_data(image.path, data_file.path, size_bytes, root)


def _size_of(file: ImageFile, root: HostRoot) -> int:
    if not file.is_device:
        return root.size(file.path) or 0
    number = DevNum.parse(file.identity.key)
    return read_block_device(number, file.path, FoundBy.FILE, root).size_bytes or 0


def has_aio_context(root: HostRoot) -> bool:
    """Whether another QEMU would get its context for aio=native; True where nothing says no."""
    used, most = (root.read_int(f"/proc/sys/fs/aio-{name}") for name in ("nr", "max-nr"))
    return used is None or most is None or used + _AIO_EVENTS <= most


def _with_room(device: DiskFile, root: HostRoot) -> DiskFile:
    """The file with its unit of direct I/O where its end needs one, and what it lacks on disk."""
    status = root.stat(device.host_path)
    if status is None:
        return device
    is_odd = device.direct_io and device.size_bytes % _DIRECT_IO_MAX
    unallocated = max(device.size_bytes - status.st_blocks * SIZE_UNIT_BYTES, 0)
    return device._replace(
        direct_io_bytes=root.direct_io_unit(device.host_path) if is_odd else None,
        unallocated_bytes=unallocated,
        free_bytes=_free_bytes(device.host_path, root) if unallocated else None,
    )


def _free_bytes(path: str, root: HostRoot) -> int | None:
    """What a program that is not root may still write there.

    None for a file that has gone, and without a limit: a tmpfs with size=0, a ramfs.
    """
    facts = root.read_file_system(path)
    return facts.f_bavail * facts.f_frsize if facts and facts.f_blocks else None


def _read_block(device: BlockDevice, asked: Questions, root: HostRoot) -> BlockDevice:
    """A LUKS header does not count: on a block device it is the guest's own encryption.

    What is in use is not read: a mount holds half-read pages, for which there is no read without
    waiting. Neither is what cannot answer. Another finding gives the reason in each case.
    """
    is_suspended = root.read_int(f"{device.sysfs_path}/dm/suspended")
    lacks_disc = device.removable and root.lacks_disc(device.device_node)
    is_closed = root.open_errno(device.device_node, os.O_EXCL) is not None
    if is_suspended or lacks_disc or is_closed:
        return device
    head = asked.within(
        lambda patience_s: _read_head(device.device_node, max(patience_s, _LEAST_S), root),
        _PATIENCE_S,
        is_vain=lambda found: found is None,
    )
    found = find_format(head or b"")
    is_silent = head is None
    return device._replace(looks_like=None if found == LUKS else found, is_silent=is_silent)


def _read_head(path: str, patience_s: float, root: HostRoot) -> bytes | None:
    head = root.read_within(path, HEAD_BYTES, patience_s)
    if head == b"":  # some of device-mapper, and zram on Linux 6.12
        from vmplug.host.program import read_start  # noqa: PLC0415  subprocess: 2 ms

        return read_start(path, HEAD_BYTES, timeout_s=patience_s)
    return head
