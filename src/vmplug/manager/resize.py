"""Decide the new size of a disk."""

from vmplug.errors import NotAttached, PolicyError
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.check.thing import identify
from vmplug.host.device import HostDevice
from vmplug.host.kind import DeviceType
from vmplug.host.resolve import resolve
from vmplug.host.root import HostRoot
from vmplug.journal.records import Attachment, DeviceRecord
from vmplug.oci.info import DeviceInfo, DevType


def new_size(
    record: DeviceRecord, hold: Attachment, host: HostRoot, size_bytes: int | None
) -> int:
    """The new size in bytes for the guest; `size_bytes` is the requested one.

    Raises NotAttached for what is not a disk of QEMU. Raises StateError if another disk has the
    name now, or may have it. Raises PolicyError if data would be lost, if only the host can
    resize it, if the VM only reads it, or if QEMU could not do it or not open it again.
    """
    if not _is_disk(record):
        raise NotAttached(
            f"{hold.host_path} is not a disk whose size can change in VM {record.vm}"
        )
    device = resolve(_request_for(record, hold), host)
    if error := record.why_not(identify(device, host)):
        raise error
    if record.read_only:  # QEMU block/io.c, bdrv_co_truncate, whatever the size
        raise PolicyError(
            f"VM {record.vm} has {hold.host_path} read-only: QEMU changes no size of what it "
            "may not write",
            hint="detach it and attach it again: it comes with its new size",
        )
    now = _size_bytes(device, record)
    wanted = now if size_bytes is None else size_bytes
    if wanted < now:
        raise PolicyError(
            f"{hold.host_path} has {now} bytes; making it smaller would lose data",
            hint="detach it first, then shrink it with the tool of its file system",
        )
    if isinstance(device, BlockDevice) and wanted != now:
        raise PolicyError(
            f"{hold.host_path} has {now} bytes and only the host can grow it",
            hint="grow the device on the host first, then run vmplug resize without a size",
        )
    if isinstance(device, DiskFile):
        _check_file(device, wanted, is_qcow2=_is_qcow2(device, record), host=host)
    return wanted


def _check_file(device: DiskFile, wanted: int, *, is_qcow2: bool, host: HostRoot) -> None:
    """PolicyError for a size that QEMU refuses, or with which it could not open the file again."""
    path = device.host_path
    if is_qcow2 and device.qcow2 and device.qcow2.keeps_size:
        raise PolicyError(
            f"{path} is a qcow2 image of version 2 with snapshots inside: QEMU does not change "
            "its size",
            hint="detach it first; then qemu-img amend -o compat=1.1 makes it version 3, or "
            "qemu-img snapshot -d deletes a snapshot",
        )
    is_direct = device.direct_io and not is_qcow2
    unit = host.direct_io_unit(path) if is_direct else device.sector_bytes
    if wanted % unit:
        raise PolicyError(
            f"{path} would have {wanted} bytes, which is not a multiple of {unit}",
            hint=f"the next size that fits is --size {-(-wanted // unit) * unit}",
        )


def _is_qcow2(device: DiskFile, record: DeviceRecord) -> bool:
    return device.qcow2 is not None and record.options.get("format") == "qcow2"


def _is_disk(record: DeviceRecord) -> bool:
    """Whether QEMU has a block node for it, whose size can change."""
    is_plugged = record.guest_address is not None
    return is_plugged and record.kind is DeviceType.BLOCK and record.can_be_unplugged


def _size_bytes(device: HostDevice, record: DeviceRecord) -> int:
    """The size for the guest: a qcow2 image has its own size inside."""
    if isinstance(device, DiskFile) and device.qcow2 and _is_qcow2(device, record):
        return device.qcow2.virtual_size_bytes
    size_bytes = device.size_bytes if isinstance(device, BlockDevice | DiskFile) else None
    return size_bytes or 0


def _request_for(record: DeviceRecord, hold: Attachment) -> DeviceInfo:
    """A request for the disk of an attachment."""
    identity = record.identity
    return DeviceInfo(
        container_path=hold.name,
        dev_type=DevType.BLOCK,
        devnum=identity.devnum,
        host_path=identity.path,
    )
