"""iommufd: one object of QEMU's for all devices of a VM, so that its memory is mapped once.

It belongs to the VM, like a root port, and not to a device. The first attach that needs it creates
it, and later ones find it by its name in QEMU. It is not in the journal, and stays until QEMU
ends. It costs one descriptor and, while no device uses it, no memory. Removing it would not help:
QEMU 10 never closes a descriptor that it got for one, not even when it refuses the object. So
vmplug looks for it and creates it in one batch, without commands of other clients in between.
Source: QEMU backends/iommufd.c; measured on QEMU 10.0.
"""

from collections.abc import Generator
from typing import Any

from vmplug.drivers.plug import Plug, VFIODevices
from vmplug.drivers.ports import Command, Step
from vmplug.errors import CommandError
from vmplug.host.pci.iommu import IOMMU_NODE
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.abilities import IOMMUFD as TYPE
from vmplug.hypervisor.qemu.qom import qom_list
from vmplug.hypervisor.qmp.monitor import Monitor

IOMMUFD = "vmplug.iommufd"
"""Its name in QEMU, and before that of the open /dev/iommu. It is not a device's: see qemu_id."""


def needs_iommufd(plug: Plug) -> bool:
    """Whether QEMU uses the own node of any of its devices."""
    return isinstance(plug, VFIODevices) and any(device.cdev_node for device in plug.devices)


def iommufd_steps(descriptor: int | None = None) -> tuple[Step, ...]:
    """The commands that create the object; there is no undo."""
    name = {"fdname": IOMMUFD}
    properties = {"qom-type": TYPE, "id": IOMMUFD, "fd": IOMMUFD}
    return (
        Step(
            do=Command("getfd", name, descriptor=descriptor),
            undo=Command("closefd", name),
        ),
        Step(do=Command("object-add", properties), undo=None),
    )


def has_iommufd(monitor: Monitor) -> bool:
    """Whether the VM has the object."""
    return _is_in(monitor.execute(qom_list("/objects")))


def missing_steps(plug: Plug, monitor: Monitor) -> tuple[Step, ...]:
    """The commands that create the object, if the plug needs it and the VM has none."""
    return iommufd_steps() if needs_iommufd(plug) and not has_iommufd(monitor) else ()


def make_iommufd(monitor: Monitor, host: HostRoot) -> None:
    """Make the object unless the VM has it; raises AttributeReadError and CommandError."""
    if has_iommufd(monitor):
        return
    from vmplug.host.pci.vfio import open_nodes  # noqa: PLC0415  3 ms

    with open_nodes({TYPE: IOMMU_NODE}, host) as files:
        try:
            monitor.converse(_make(files[TYPE]))
        except CommandError:
            # A client of another monitor may have been faster: QEMU has several.
            if not has_iommufd(monitor):
                raise


def _make(descriptor: int) -> Generator[Command, Any, None]:
    if _is_in((yield qom_list("/objects"))):
        return
    take, make = iommufd_steps(descriptor)
    yield take.do
    try:
        yield make.do
    except CommandError:
        if take.undo:
            yield take.undo
        raise


def _is_in(objects: list[dict[str, str]]) -> bool:
    return any(entry["name"] == IOMMUFD for entry in objects)
