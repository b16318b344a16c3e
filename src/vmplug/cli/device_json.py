"""A device as JSON: what is asked for, and what it is on the host."""

from typing import TYPE_CHECKING, Any

from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.device import HostDevice
from vmplug.host.kind import FoundBy
from vmplug.host.pci.group import VfioGroup
from vmplug.oci.info import DeviceInfo

if TYPE_CHECKING:
    from vmplug.oci.requests import Request


def container_path(info: "Request") -> str | None:
    """The path in the container; None for what has none there."""
    return info.container_path if isinstance(info, DeviceInfo) else None


def info_json(info: "Request") -> dict[str, Any]:
    """What is asked for; what OCI has no word for has neither path, type nor number.

    What a CDI name brought has `cdi_names`.
    """
    device = info if isinstance(info, DeviceInfo) else None
    return {
        "name": info.name,
        "container_path": container_path(info),
        "device_type": str(device.dev_type) if device else None,
        "major": device.major if device else None,
        "minor": device.minor if device else None,
        "read_only": info.read_only,
        **({"cdi_names": list(device.cdi_names)} if device and device.cdi_names else {}),
    }


def device_json(device: HostDevice) -> dict[str, Any]:
    """What it is on the host."""
    facts: dict[str, Any] = {
        "host_path": device.host_path,
        "kind": str(device.kind),
        "found_by": str(device.found_by),
    }
    if isinstance(device, BlockDevice | DiskFile):
        facts["size_bytes"] = device.size_bytes
        facts["host_read_only"] = device.read_only
    if isinstance(device, BlockDevice):
        facts["sysfs_path"] = device.sysfs_path
        if device.backing:
            facts["backing_file"] = device.backing.backing_file
            facts["backing_offset_bytes"] = device.backing.offset_bytes
            facts["backing_size_limit_bytes"] = device.backing.size_limit_bytes
            facts["backing_deleted"] = device.backing.deleted
    if isinstance(device, VfioGroup):
        facts["iommu_group"] = device.number
        facts["members"] = list(device.members)
    if isinstance(device, DiskFile):
        facts["pmem"] = device.found_by is FoundBy.BACKING_FILE
    return facts
