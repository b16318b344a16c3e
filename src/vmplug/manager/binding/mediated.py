"""Mediated devices: created, and removed unless in use."""

from contextlib import suppress

import msgspec

from vmplug.address import Bdf
from vmplug.host.pci.mdev_create import create_mediated
from vmplug.host.pci.vfio import find_vfio_device
from vmplug.journal.journal import Journal
from vmplug.manager.binding.subdevices import remove_unused
from vmplug.manager.setup import DEFAULT_SETUP, Setup


class CreatedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A mediated device that was created. A VM opens `/dev/vfio/{iommu_group}`."""

    uuid: str
    parent: str
    type_name: str
    iommu_group: int | None


def create_mediated_device(
    parent: str, type_name: str, *, uuid: str | None = None, setup: Setup = DEFAULT_SETUP
) -> CreatedDevice:
    """Create a mediated device of a type that a parent offers; it is gone after the next boot.

    `parent` is the address of a PCI function, or another device's name in sysfs. Without a `uuid`
    one is drawn. Raises SpecError, NoSuchDevice, BindError; then there is none.
    """
    with suppress(ValueError):  # such as mtty, which is not an address
        parent = str(Bdf.parse_written(parent))
    made = create_mediated(parent, type_name, setup.host, uuid=uuid)
    number = find_vfio_device(made, setup.host).number
    return CreatedDevice(uuid=made, parent=parent, type_name=type_name, iommu_group=number)


def remove_mediated_device(uuid: str, *, setup: Setup = DEFAULT_SETUP) -> None:
    """Remove a mediated device. Raises NoSuchDevice, BindError, and InUse while it is in use."""
    with Journal.open(setup.state_dir) as journal:
        remove_unused(uuid.lower(), journal=journal, host=setup.host)
