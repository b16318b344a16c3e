"""IOMMU groups, as QMP commands: every function a vfio device of QEMU's.

A slot's other functions come before its function 0: with that the guest looks at all of them.
Source: QEMU hw/acpi/pcihp.c, hw/vfio/pci.c, qapi/qom.json (IOMMUFDProperties).
"""

from collections.abc import Iterator
from typing import Any

from vmplug.address import qemu_id
from vmplug.drivers.base import Command, Step, VFIODevice, VFIODevices
from vmplug.drivers.place import CcwPlace, GroupPlace, PciPlace, Place
from vmplug.host.mdev import VFIODeviceType
from vmplug.hypervisor.qemu.front import object_step

IOMMU_NODE = "/dev/iommu"
_IOMMUFD = "iommufd"
_DOMAIN_MAX = 0xFFFF
"""QEMU 7.2 takes no larger one for `host`; a function behind an Intel VMD has one."""


def plug_steps(plug: VFIODevices, place: Place) -> tuple[Step, ...]:
    """The commands that plug the whole group at `place`, each with the one that takes it back."""
    steps = list(_open_iommufd(plug))
    match place:
        case GroupPlace():
            pairs = list(zip(plug.devices, place.places, strict=True))
            shared = {(p.bus, p.slot.slot) for _, p in pairs if p.slot.function}
            numbered = sorted(enumerate(pairs), key=lambda pair: _order(pair[1][1]))
            for number, (device, where) in numbered:
                location: dict[str, Any] = {"bus": where.bus, "addr": _address(where)}
                if (where.bus, where.slot.slot) in shared:
                    location |= {"multifunction": True}
                steps += _device(plug, number, device, location | _pci_properties(plug))
        case CcwPlace():
            steps += _device(plug, 0, plug.devices[0], {"devno": place.devno.qemu})
        case _:
            steps += _device(plug, 0, plug.devices[0], {})
    return tuple(steps)


def _order(place: PciPlace) -> tuple[str, int, int]:
    return (place.bus, place.slot.slot, -place.slot.function)


def _address(place: PciPlace) -> str:
    """QEMU's `addr`, hexadecimal: `0x1f.7`."""
    return hex(place.slot.slot) + (f".{place.slot.function}" if place.slot.function else "")


def _pci_properties(plug: VFIODevices) -> dict[str, Any]:
    properties: dict[str, Any] = {} if plug.rom else {"romfile": ""}
    if plug.vendor_id is not None:
        properties["x-pci-vendor-id"] = plug.vendor_id
    if plug.device_id is not None:
        properties["x-pci-device-id"] = plug.device_id
    return properties


def device_name(plug: VFIODevices, number: int) -> str:
    """QEMU's id of a group's device."""
    return qemu_id(plug.id, f"f{number}" if number else "")


def _device(
    plug: VFIODevices, number: int, device: VFIODevice, properties: dict[str, Any]
) -> Iterator[Step]:
    driver = device.type.value if device.type in _OWN_MODEL else VFIODeviceType.NORMAL.value
    name = device_name(plug, number)
    if device.cdev_node:
        link = qemu_id(plug.id, f"fd{number}")
        yield _take(link)
        source: dict[str, Any] = {"fd": link, _IOMMUFD: qemu_id(plug.id, _IOMMUFD)}
    elif device.bdf and device.bdf.domain <= _DOMAIN_MAX:
        source = {"host": str(device.bdf)}
    else:
        source = {"sysfsdev": device.sysfs_path}
    yield Step(
        do=Command("device_add", {"driver": driver, "id": name, **source, **properties}),
        undo=Command("device_del", {"id": name}),
    )


_OWN_MODEL = {VFIODeviceType.AP, VFIODeviceType.CCW}


def _open_iommufd(plug: VFIODevices) -> Iterator[Step]:
    """One iommufd for the group; QEMU gets open files, so that it needs no right to the nodes."""
    if any(device.cdev_node for device in plug.devices):
        link = qemu_id(plug.id, "fd")
        yield _take(link)
        yield object_step(_IOMMUFD, qemu_id(plug.id, _IOMMUFD), {"fd": link})


def _take(link: str) -> Step:
    return Step(do=Command("getfd", {"fdname": link}), undo=Command("closefd", {"fdname": link}))


def nodes(plug: VFIODevices) -> dict[str, str]:
    """The nodes that QEMU gets open, by the names that the steps have for them."""
    own = {
        qemu_id(plug.id, f"fd{number}"): device.cdev_node
        for number, device in enumerate(plug.devices)
        if device.cdev_node
    }
    return {qemu_id(plug.id, "fd"): IOMMU_NODE, **own} if own else {}
