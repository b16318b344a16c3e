"""Choose the driver of a device: one table from its kind to the driver."""

from typing import assert_never

from vmplug.drivers.block import BlockDiskDriver
from vmplug.drivers.generic import check_options
from vmplug.drivers.ports import PlugDriver
from vmplug.drivers.rng import RngDriver
from vmplug.drivers.share import ShareDriver
from vmplug.drivers.vfio import VfioDriver
from vmplug.drivers.vhost_user import VhostUserDriver
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
            return ShareDriver.parse(request.tag, device, request.driver_options)
        case RngInfo():
            return RngDriver.parse(request.driver_options)
        case NetInfo():
            return VhostUserDriver.parse(DeviceType.VHOST_USER_NET, request.driver_options)
        case VfioInfo():
            return VfioDriver.parse(request.driver_options)
        case DeviceInfo():
            return _select_by_device(request, device)
        case _:
            assert_never(request)


def _select_by_device(request: DeviceInfo, device: HostDevice) -> PlugDriver | None:
    match device:
        case BlockDevice() | DiskFile():
            return BlockDiskDriver.parse(request.driver_options)
        case VhostUserSocket():
            return VhostUserDriver.parse(device.kind, request.driver_options)
        case VfioGroup():
            return VfioDriver.parse(request.driver_options)
        case CharDevice():
            check_options(request.driver_options)
            return None
        case SharedDirectory() | OpenConnection() | EntropySource():
            raise AssertionError(f"{request.name} is not a {device.kind}")
        case _:
            assert_never(device)
