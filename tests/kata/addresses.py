"""Addresses: PCI slots, paths and bridges, SCSI addresses, names in QEMU."""

from collections.abc import Callable
from typing import Any

from tests.kata.machine import add_bridge, add_port, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    attempt,
    katas_result,
    kind_of,
)
from vmplug.address import NODE_NAME_MAX, PciPath, PciSlot, ScsiAddress, qemu_id
from vmplug.drivers.block import choose_place
from vmplug.drivers.place import PciPlace
from vmplug.hypervisor.qemu.running import Qemu


def _pci_slot(make: Callable[[Any], PciSlot]) -> Adapter:
    def adapter(case: Case) -> Answer:
        slot = attempt(lambda: str(make(case.input["value"])))
        return Answer(slot, katas_result(case.expected))

    return adapter


def _pci_path(case: Case) -> Answer:
    path = attempt(lambda: PciPath.parse(case.input["value"]))
    ours: object = path
    if isinstance(path, PciPath):
        ours = {"string": str(path), "array": [slot.slot for slot in path.slots]}
    katas = {"string": case.expected["string"], "array": case.expected["array"]}
    case.expected.skip("a path of ours always has slots", "is_nil")
    return Answer(ours, kind_of(case.expected["error"]) or katas)


def _scsi_address(case: Case) -> Answer:
    address = attempt(lambda: ScsiAddress.from_index(case.input["index"]))
    ours: object = address
    if isinstance(address, ScsiAddress):
        ours = {"scsi_id": address.scsi_id, "lun": address.lun, "address": str(address)}
    katas = {key: case.expected[key] for key in ("scsi_id", "lun", "address")}
    assert case.expected["error"] == case.expected["address_error"]
    return Answer(ours, kind_of(case.expected["error"]) or katas)


def _name_in_qemu(case: Case) -> Answer:
    """Kata's prefix tells the part of a device; a drive is the device itself."""
    assert case.input["max_len"] in {14, NODE_NAME_MAX}
    part = "" if case.input["type"] == "drive" else case.input["type"]
    name = attempt(lambda: qemu_id(case.input["id"], part))
    return Answer(name, case.expected["result"])


def _bridge_path(case: Case) -> Answer:
    monitor = memory_monitor(ports=0, scsi=False)
    parent, parent_slot = case.input["parent"] or None, case.input["parent_addr"]
    if parent:
        add_port(monitor, parent, parent_slot << 3)
    add_bridge(monitor, case.input["bridge_addr"], name="bridge", parent=parent)
    (bridge,) = (port for port in Qemu(monitor).offer().ports if port.bus == "bridge")
    path = attempt(lambda: str(bridge.path.child(PciSlot.parse(case.input["slot"]))))
    return Answer(path, katas_result(case.expected, "path"))


def _full_bridge(case: Case) -> Answer:
    """How far the slots of a bridge go after those that are taken."""
    case.input.skip("places are not given by name", "id")
    monitor = memory_monitor(ports=0, scsi=False)
    add_bridge(monitor, 2)
    offer = Qemu(monitor).offer()
    taken: list[str] = []

    def take() -> int:
        _, place = choose_place(offer, None, taken)
        assert isinstance(place, PciPlace)
        taken.append(str(place))
        return place.slot.slot

    for _ in range(case.setup["devices"]):
        take()
    ours = {"addr": attempt(take), "next": attempt(take)}
    refused = katas_result(case.expected, "addr")
    return Answer(ours, {"addr": refused, "next": refused})


ADAPTERS: dict[str, Adapter] = {
    "types.PciSlotFromInt": _pci_slot(PciSlot),
    "types.PciSlotFromString": _pci_slot(PciSlot.parse),
    "types.PciPathFromString": _pci_path,
    "types.Bridge.AddDevice": _full_bridge,
    "qemu.bridgePciPath": _bridge_path,
    "utils.GetSCSIIdLun / utils.GetSCSIAddress": _scsi_address,
    "utils.MakeNameID": _name_in_qemu,
}
