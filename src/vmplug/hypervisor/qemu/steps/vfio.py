"""IOMMU groups, as QMP commands: every function a vfio device of QEMU's.

A slot's other functions come before its function 0, at which the guest scans the slot.
Source: QEMU hw/acpi/pcihp.c, hw/vfio/pci.c, hw/vfio/iommufd.c.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from msgspec.structs import replace

from vmplug.address import qemu_id
from vmplug.drivers.place import CcwPlace, GroupPlace, PciPlace, Place, Places
from vmplug.drivers.plug import VFIODevice, VFIODevices
from vmplug.drivers.ports import VF_UUID, Command, Step
from vmplug.errors import NoFreePort
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.host.root import HostRoot
from vmplug.hypervisor.qemu.iommufd import IOMMUFD

_DOMAIN_MAX = 0xFFFF
"""QEMU 7.2 rejects larger ones for `host`; a function behind an Intel VMD has one."""


def plug_steps(plug: VFIODevices, place: Place) -> tuple[Step, ...]:
    """The commands that plug the whole group at `place`, each with its undo."""
    steps: list[Step] = []
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
        # QEMU gets open files, so that it needs no permission for the nodes; each is used at once.
        link = open_node_name(plug.id)
        take = Command("getfd", {"fdname": link}, descriptor=device.descriptor)
        yield Step(do=take, undo=Command("closefd", {"fdname": link}))
        source: dict[str, Any] = {"fd": link, "iommufd": IOMMUFD}
        if device.sysfs_path:  # by it QEMU recognizes mediated devices
            source["sysfsdev"] = device.sysfs_path
    elif device.bdf and device.bdf.domain <= _DOMAIN_MAX:
        source = {"host": str(device.bdf)}
    else:
        source = {"sysfsdev": device.sysfs_path}
    if device.vf_token:
        source[VF_UUID] = device.vf_token
    yield Step(
        do=Command("device_add", {"driver": driver, "id": name, **source, **properties}),
        undo=Command("device_del", {"id": name}),
    )


_OWN_MODEL = {VFIODeviceType.AP, VFIODeviceType.CCW}


def open_node_name(device_id: str) -> str:
    """The name of a member's open node in QEMU from `getfd` until its device uses it.

    It is the same for all members: so one that an attach has left is found again by the id.
    """
    return qemu_id(device_id, "fd")


def check_free(place: Place, offer: Places) -> None:
    """NoFreePort when another program has used the place since it was offered.

    QEMU 10 keeps the open node of a device that it refuses for its place; VFIO could not give the
    device back until QEMU ends.
    """
    wanted = place.places if isinstance(place, GroupPlace) else ()
    buses = {at.bus for at in wanted}
    ports = [port for port in offer.ports if port.bus in buses]
    free = {(port.bus, slot.slot) for port in ports for slot in port.free}
    for at in wanted:
        if (at.bus, at.slot.slot) not in free:
            raise NoFreePort(
                f"another device was plugged into {at.bus} meanwhile", hint="try again"
            )


def nodes(plug: VFIODevices) -> dict[str, str]:
    """The nodes that QEMU gets open, by device."""
    return {device.name: device.cdev_node for device in plug.devices if device.cdev_node}


def open_nodes(plug: VFIODevices, host: HostRoot) -> AbstractContextManager[dict[str, int]]:
    """Descriptors on these nodes. Raises AttributeReadError and NoSuchDevice."""
    from vmplug.host.pci.vfio import open_nodes as open_named  # noqa: PLC0415  3 ms

    return open_named(nodes(plug), host)


def opened(plug: VFIODevices, files: Mapping[str, int]) -> VFIODevices:
    """The group with its nodes open; `files` are the descriptors by the names of devices."""
    devices = [replace(device, descriptor=files.get(device.name)) for device in plug.devices]
    return replace(plug, devices=tuple(devices))
