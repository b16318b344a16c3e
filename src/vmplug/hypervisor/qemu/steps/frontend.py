"""The front end of a device: its model by the bus it sits on, and its place there."""

from typing import Any, assert_never

from vmplug.address import qemu_id
from vmplug.drivers.place import (
    ApPlace,
    CcwPlace,
    GroupPlace,
    LeasePlace,
    MemorySlot,
    MmioPlace,
    PciPlace,
    Place,
    ScsiPlace,
)
from vmplug.drivers.ports import Command, Step

_WITHOUT_SUFFIX = {"vhost-user-blk", "vhost-user-scsi"}
"""Models that have the same name on virtio-mmio. Source: `-device help` of QEMU 7.2."""


def virtio_step(
    model: str,
    device_id: str,
    place: Place,
    properties: dict[str, Any],
    *,
    backend: str | None = None,
) -> Step:
    """The step that plugs a virtio device: `virtio-rng` is virtio-rng-pci, -ccw or -device.

    `addr` is always set: QEMU would choose a slot that the guest never scans. `backend` is the
    process that QEMU waits for during the command.
    """
    match place:
        case PciPlace():
            driver = f"{model}-pci"
            where = {"bus": place.bus, "addr": hex(place.slot.slot)}
        case CcwPlace():
            driver, where = f"{model}-ccw", {"devno": place.devno.qemu}
        case MmioPlace():
            driver = model if model in _WITHOUT_SUFFIX else f"{model}-device"
            where = {"bus": place.bus}
        case ScsiPlace() | MemorySlot() | GroupPlace() | ApPlace() | LeasePlace():
            raise AssertionError(f"{model} cannot be plugged at {place}")
        case _:
            assert_never(place)
    return device_step(driver, device_id, where | properties, backend=backend)


def device_step(
    driver: str, device_id: str, properties: dict[str, Any], *, backend: str | None = None
) -> Step:
    """The step that plugs any device; its properties by QEMU's names."""
    name = qemu_id(device_id)
    return Step(
        do=Command("device_add", {"driver": driver, "id": name, **properties}, backend=backend),
        undo=Command("device_del", {"id": name}),
    )


def object_step(qom_type: str, name: str, properties: dict[str, Any]) -> Step:
    """The step that creates an object."""
    return Step(
        do=Command("object-add", {"qom-type": qom_type, "id": name, **properties}),
        undo=Command("object-del", {"id": name}),
    )
