"""An inventory as JSON: the keys of `vmplug host --json`."""

from collections.abc import Iterable
from typing import Any

from vmplug.host.block.inventory import Disk, Pmem, Use
from vmplug.host.inventory import HostFunction, HostMediated, Inventory, StoredSocket
from vmplug.host.pci.function import Bar
from vmplug.host.pci.mdev import MdevType
from vmplug.host.pci.pci_ids import PciNames
from vmplug.host.pci.uses import NetInterface


def inventory_json(inventory: Inventory, names: PciNames) -> dict[str, Any]:
    """The document; a fact that the host does not give is null."""
    return {
        "pci": [_function_json(entry, names) for entry in inventory.pci],
        "block": [_disk_json(disk) for disk in inventory.block],
        "vhost_user": [_socket_json(socket) for socket in inventory.vhost_user],
        "pmem": [_pmem_json(pmem) for pmem in inventory.pmem],
        "mdev_types": [_mdev_type_json(kind) for kind in inventory.mdev_types],
        "mdev": [_mediated_json(entry) for entry in inventory.mdev],
        "unreadable": list(inventory.unreadable),
    }


def _hex(number: int | None, digits: int) -> str | None:
    return None if number is None else f"0x{number:0{digits}x}"


def _function_json(entry: HostFunction, names: PciNames) -> dict[str, Any]:
    function = entry.function
    vendor, device = function.vendor_id, function.device_id
    return {
        "address": str(function.bdf),
        "class": _hex(function.class_code, 6),
        "class_name": names.find_class(function.class_code),
        "vendor": _hex(vendor, 4),
        "vendor_name": names.find_vendor(vendor),
        "device": _hex(device, 4),
        "device_name": names.find_device(vendor, device),
        "driver": function.driver,
        "iommu_group": function.iommu_group,
        "numa_node": function.numa_node,
        "pcie": function.pcie,
        "is_bridge": None if function.class_code is None else function.is_bridge,
        "bars": None if function.bars is None else [_bar_json(bar) for bar in function.bars],
        "physfn": str(function.physfn) if function.physfn else None,
        "virtfns": [str(bdf) for bdf in entry.virtfns],
        "reset_methods": None if entry.reset_methods is None else list(entry.reset_methods),
        "group_node": entry.group_node,
        "cdev_node": entry.cdev_node,
        "block": list(entry.disks),
        "networks": [_network_json(network) for network in entry.networks],
        "held_by": _uses_json(entry.uses),
        "unreadable": list(function.unreadable),
    }


def _bar_json(bar: Bar) -> dict[str, Any]:
    return {
        "number": bar.number,
        "start": bar.start,
        "size_bytes": bar.size_bytes,
        "is_memory": bar.is_memory,
        "is_64bit": bar.is_64bit,
        "is_prefetchable": bar.is_prefetchable,
        "is_large": bar.is_large,
        "is_assigned": bar.is_assigned,
    }


def _network_json(network: NetInterface) -> dict[str, Any]:
    return {
        "name": network.name,
        "has_default_route": network.has_default_route,
        "has_address": network.has_address,
        "master": network.master,
    }


def _uses_json(uses: Iterable[Use]) -> list[dict[str, Any]]:
    return [{"kind": use.kind, "device": use.device, "detail": use.detail} for use in uses]


def _disk_json(disk: Disk) -> dict[str, Any]:
    facts = disk.facts
    backing = facts.backing if facts else None
    return {
        "name": disk.name,
        "device_node": disk.device_node,
        "major": disk.devnum.major if disk.devnum else None,
        "minor": disk.devnum.minor if disk.devnum else None,
        "size_bytes": facts.size_bytes if facts else None,
        "sector_bytes": facts.sector_bytes if facts else None,
        "read_only": facts.read_only if facts else None,
        "removable": facts.removable if facts else None,
        "disk": disk.disk,
        "pci": str(disk.function) if disk.function else None,
        "holders": None if facts is None or facts.holders is None else list(facts.holders),
        "mounts": None
        if "mount" in disk.unknown
        else [use.detail for use in disk.uses if use.kind == "mount"],
        "is_swap": None
        if "swap" in disk.unknown
        else any(use.kind == "swap" for use in disk.uses),
        "backing_file": backing.backing_file if backing else None,
        "backing_offset_bytes": backing.offset_bytes if backing else None,
        "backing_deleted": backing.deleted if backing else None,
        "held_by": _uses_json(disk.uses),
        "unreadable": list(disk.unreadable),
    }


def _socket_json(socket: StoredSocket) -> dict[str, Any]:
    return {
        "device_node": socket.device_node,
        "major": socket.devnum.major,
        "minor": socket.devnum.minor,
        "kind": str(socket.kind),
        "socket_path": socket.socket_path,
        "problem": socket.problem,
        "held_by": _uses_json(socket.uses),
    }


def _pmem_json(pmem: Pmem) -> dict[str, Any]:
    return {
        "name": pmem.name,
        "device_node": pmem.device_node,
        "mode": pmem.mode,
        "size_bytes": pmem.size_bytes,
        "numa_node": pmem.numa_node,
        "held_by": _uses_json(pmem.uses),
        "unreadable": list(pmem.unreadable),
    }


def _mdev_type_json(kind: MdevType) -> dict[str, Any]:
    return {
        "parent": kind.parent,
        "name": kind.name,
        "title": kind.title,
        "available": kind.available,
        "device_api": kind.device_api,
        "unreadable": list(kind.unreadable),
    }


def _mediated_json(entry: HostMediated) -> dict[str, Any]:
    device = entry.device
    return {
        "uuid": entry.uuid,
        "kind": str(device.type) if device else None,
        "parent": device.parent if device else None,
        "mdev_type": entry.mdev_type,
        "iommu_group": entry.iommu_group,
        "group_node": entry.group_node,
        "cdev_node": entry.cdev_node,
        "ap_queues": list(device.ap_queues) if device else None,
        "held_by": _uses_json(entry.uses),
        "unreadable": list(entry.unreadable),
    }
