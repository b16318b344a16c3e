"""Choose the driver of a device: one table from its kind to the driver.

Each driver but that of disks is imported when a request needs it: they cost 5 ms together.
"""

from collections.abc import Mapping
from typing import assert_never

from vmplug.drivers.block import BlockDiskDriver
from vmplug.drivers.generic import check_options
from vmplug.drivers.ports import PlugDriver
from vmplug.host.block.device import BlockDevice, DiskFile
from vmplug.host.device import (
    CharDevice,
    EntropySource,
    HostDevice,
    OpenConnection,
    SharedDirectory,
)
from vmplug.host.kind import DeviceType
from vmplug.host.pci.group import VfioGroup
from vmplug.host.vhost_user.device import VhostUserSocket
from vmplug.oci.info import DeviceInfo
from vmplug.oci.requests import NetInfo, Request, RngInfo, ShareInfo, VfioInfo


def select_driver(request: Request, device: HostDevice) -> PlugDriver | None:
    """The driver for a request and its device, with the request's options.

    None for a device that is only counted. Raises SpecError for options that are wrong.
    """
    match request:
        case ShareInfo():
            from vmplug.drivers.share import ShareDriver  # noqa: PLC0415  see the top

            return ShareDriver.parse(request.tag, device, request.driver_options)
        case RngInfo():
            from vmplug.drivers.rng import RngDriver  # noqa: PLC0415

            return RngDriver.parse(request.driver_options)
        case NetInfo():
            return _vhost_user(DeviceType.VHOST_USER_NET, request.driver_options)
        case VfioInfo():
            return _vfio(request.driver_options)
        case DeviceInfo():
            return _select_by_device(request, device)
        case _:
            assert_never(request)


def _select_by_device(request: DeviceInfo, device: HostDevice) -> PlugDriver | None:
    match device:
        case BlockDevice() | DiskFile():
            return BlockDiskDriver.parse(request.driver_options)
        case VhostUserSocket():
            return _vhost_user(device.kind, request.driver_options)
        case VfioGroup():
            return _vfio(request.driver_options)
        case CharDevice():
            check_options(request.driver_options)
            return None
        case SharedDirectory() | OpenConnection() | EntropySource():
            raise AssertionError(f"{request.name} is not a {device.kind}")
        case _:
            assert_never(device)


def _vhost_user(kind: DeviceType, options: Mapping[str, str]) -> PlugDriver:
    from vmplug.drivers.vhost_user import VhostUserDriver  # noqa: PLC0415

    return VhostUserDriver.parse(kind, options)


def _vfio(options: Mapping[str, str]) -> PlugDriver:
    from vmplug.drivers.vfio import VfioDriver  # noqa: PLC0415

    return VfioDriver.parse(options)
