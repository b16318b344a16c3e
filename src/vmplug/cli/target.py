"""What a verb about the host's own devices acts on: a PCI function, or a node of VFIO."""

import re

from vmplug.address import Bdf
from vmplug.errors import SpecError
from vmplug.host.kind import FoundBy
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.mdev import UUID
from vmplug.host.pci.vfio import CDEV_NODE, GROUP_NODE, find_vfio_device, find_vfio_group
from vmplug.host.root import HostRoot

_SHORT_BDF = re.compile(r"[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\Z", re.ASCII)
"""As lspci(8) writes it on a host of one domain."""


def parse_function(text: str) -> Bdf:
    """`0000:3b:00.0`, or `3b:00.0` for domain 0000. Raises SpecError."""
    written = text.lower()
    try:
        return Bdf.parse(f"0000:{written}" if _SHORT_BDF.match(written) else written)
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


def parse_bdf(text: str) -> "Bdf":
    """`0000:3b:00.0`, or `3b:00.0` as lspci(8) writes it; SpecError for anything else."""
    from vmplug.address import Bdf  # noqa: PLC0415  most requests name none

    try:
        return Bdf.parse(f"0000:{text}" if _SHORT_BDF.match(text) else text)
    except ValueError as error:
        raise SpecError(text, str(error)) from None
