"""Character devices: counted with the others, and never given to a hypervisor."""

from collections.abc import Iterator, Mapping

from vmplug.drivers.options import parse_options
from vmplug.host.device import CharDevice, DeviceType
from vmplug.host.safety import Code, Finding


def check_options(options: Mapping[str, str]) -> None:
    """SpecError for any option: there is nothing to choose."""
    parse_options(options, {}, "a character device")


def check_generic(device: CharDevice) -> Iterator[Finding]:
    """What speaks against counting it: a device of VFIO is not of this kind."""
    if device.kind is not DeviceType.GENERIC:
        yield Finding(
            Code.NO_DRIVER,
            f"{device.host_path} is a {device.kind} device, which this vmplug cannot plug",
            "leave it out of the bundle",
        )
