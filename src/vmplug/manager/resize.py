"""What size a disk may be given."""

from vmplug.devnum import DevNum
from vmplug.errors import PolicyError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.device import HostDevice
from vmplug.host.kind import DeviceType
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.oci.info import DeviceInfo, DevType


def is_disk(record: DeviceRecord) -> bool:
    """Whether QEMU has a block node of it, whose size can change."""
    is_plugged = record.guest_address is not None
    return is_plugged and record.kind is DeviceType.BLOCK and record.can_be_unplugged


def new_size(
    record: DeviceRecord, hold: Attachment, host: HostRoot, size_bytes: int | None
) -> int:
    """The size in bytes that the guest is to see; `size_bytes` is the one that was asked for.

    Raises PolicyError for what would cut data off, or what only the host can do.
    """
    device = resolve(_request_for(record, hold), host)
    now = _size_bytes(device, record)
    wanted = now if size_bytes is None else size_bytes
    if wanted < now:
        raise PolicyError(
            f"{hold.host_path} has {now} bytes; making it smaller would lose data",
            hint="detach it first and cut it with the tool of its file system",
        )
    if isinstance(device, BlockDevice) and wanted != now:
        raise PolicyError(
            f"{hold.host_path} has {now} bytes and only the host can make it grow",
            hint="grow the device on the host first, then resize without a size",
        )
    return wanted


def _size_bytes(device: HostDevice, record: DeviceRecord) -> int:
    """What the guest may see: a qcow2 image has a size of its own inside."""
    if isinstance(device, DiskFile) and device.qcow2 and record.options.get("format") == "qcow2":
        return device.qcow2.virtual_size_bytes
    size_bytes = device.size_bytes if isinstance(device, BlockDevice | DiskFile) else None
    return size_bytes or 0


def _request_for(record: DeviceRecord, hold: Attachment) -> DeviceInfo:
    """A request that finds the disk of an attachment again."""
    kind, _, what = record.identity.partition(":")
    return DeviceInfo(
        container_path=hold.name,
        dev_type=DevType.BLOCK,
        devnum=DevNum.parse(what) if kind == "block" else None,
        host_path=what if kind == "file" else None,
    )
