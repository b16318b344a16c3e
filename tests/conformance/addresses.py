"""Addresses: PCI slots, paths and bridges, SCSI addresses, names in QEMU."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.machine import memory_monitor
from tests.conformance.vector import Adapter, Answer, Case, Deviation, attempt, kind_of, katas_result
from vmplug.address import NODE_NAME_MAX, PciPath, PciSlot, ScsiAddress, qemu_id
from vmplug.drivers.base import Offer, PciPlace
from vmplug.drivers.block import choose_place
from vmplug.hypervisor.qemu import Qemu
from vmplug.hypervisor.topology import PERIPHERAL


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


def _bridge_offer(*, addr: int, parent: tuple[str, int] | None = None) -> Offer:
    """What a VM offers that has one PCI bridge, in slot `addr` of the root bus or of a port."""
    monitor = memory_monitor(ports=1, scsi=False)
    port = monitor.devices.pop("rp0")
    bus = port.bus
    if parent:
        name, slot = parent
        monitor.devices[name] = replace(port, properties={"addr": slot << 3})
        bus = f"{PERIPHERAL}/{name}/{name}"
    monitor.devices["bridge"] = replace(
        port, driver="pci-bridge", bus=bus, properties={"addr": addr << 3}
    )
    return Qemu(monitor).offer()


def _bridge_path(case: Case) -> Answer:
    name = case.input["parent"]
    parent = (name, case.input["parent_addr"]) if name else None
    case.input.skip("meaningless without a parent", "parent_addr")
    offer = _bridge_offer(addr=case.input["bridge_addr"], parent=parent)
    (bridge,) = (port for port in offer.ports if port.bus == "bridge")
    path = attempt(lambda: str(bridge.path.child(PciSlot.parse(case.input["slot"]))))
    return Answer(path, katas_result(case.expected, "path"))


def _full_bridge(case: Case) -> Answer:
    case.input.skip("places are not given by name", "id")
    offer = _bridge_offer(addr=2)
    taken = [str(place) for place in _bridge_places(offer)][: case.setup["devices"]]
    assert len(taken) == case.setup["devices"]

    def take() -> int:
        _, place = choose_place(offer, None, taken)
        assert isinstance(place, PciPlace)
        taken.append(str(place))
        return place.slot.slot

    katas = kind_of(case.expected["error"])
    return Answer(
        {"next": attempt(take), "after": attempt(take)},
        {"next": katas, "after": katas} if case.expected["addr"] == 0 else None,
    )


def _bridge_places(offer: Offer) -> list[PciPlace]:
    return [
        PciPlace(bus=port.bus, slot=slot, path=port.path.child(slot))
        for port in offer.ports
        for slot in port.free
    ]


ADAPTERS: dict[str, Adapter] = {
    "types.PciSlotFromInt": _pci_slot(PciSlot),
    "types.PciSlotFromString": _pci_slot(PciSlot.parse),
    "types.PciPathFromString": _pci_path,
    "types.Bridge.AddDevice": _full_bridge,
    "qemu.bridgePciPath": _bridge_path,
    "utils.GetSCSIIdLun / utils.GetSCSIAddress": _scsi_address,
    "utils.MakeNameID": _name_in_qemu,
}

DEVIATIONS: dict[str, Deviation] = {}
