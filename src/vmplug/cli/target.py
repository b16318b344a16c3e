"""What a verb about the host's own devices acts on: a PCI function, or a node of VFIO."""

from vmplug.address import Bdf
from vmplug.errors import SpecError
from vmplug.host.kind import FoundBy
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.mdev import UUID
from vmplug.host.pci.vfio import CDEV_NODE, GROUP_NODE, find_vfio_device, find_vfio_group
from vmplug.host.root import HostRoot


def parse_function(text: str) -> Bdf:
    """`0000:3b:00.0`, or `3b:00.0` for domain 0000. Raises SpecError."""
    try:
        return Bdf.parse_written(text)
    except ValueError:
        raise SpecError(
            repr(text), "no address of a PCI function", hint="write 0000:3b:00.0 or 3b:00.0"
        ) from None


def find_group(text: str, host: HostRoot) -> VfioGroup:
    """The group that a function, a mediated device's UUID or a node of VFIO names.

    Raises SpecError for anything else, and NoSuchDevice.
    """
    if GROUP_NODE.match(text) or CDEV_NODE.match(text):
        return find_vfio_group(text, host, devnum=None, found_by=FoundBy.FILE)
    if UUID.match(text):
        return find_vfio_device(text, host)
    try:
        bdf = parse_function(text)
    except SpecError:
        raise SpecError(
            repr(text),
            "no address of a PCI function and no node of VFIO",
            hint="write 0000:3b:00.0, 3b:00.0 or /dev/vfio/26",
        ) from None
    return find_vfio_device(str(bdf), host)
