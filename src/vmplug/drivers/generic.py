"""Character devices: counted with the others, and never given to a hypervisor."""

from collections.abc import Iterator, Mapping

from vmplug.drivers.options import parse_options
from vmplug.host.device import CharDevice
from vmplug.host.finding import Code, Finding

_WITHOUT_IOMMU = ("/dev/vfio/noiommu-", "/dev/vfio/devices/noiommu-")
"""The nodes of groups and devices. Source: vfio_group_alloc, vfio_device_set_noiommu."""


def check_options(options: Mapping[str, str]) -> None:
    """SpecError for any option: there are none."""
    parse_options(options, {}, "a character device")


def check_generic(device: CharDevice) -> Iterator[Finding]:
    """Reasons not to count it: a group without an IOMMU does not protect the host from the VM."""
    if device.host_path.startswith(_WITHOUT_IOMMU):
        yield Finding(
            Code.NO_IOMMU,
            f"{device.host_path} has no IOMMU: the VM could write to all of the host's memory",
            "enable the IOMMU (intel_iommu=on, or in the firmware), and name the group's node",
        )
