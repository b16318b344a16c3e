"""VMs of VFIO vectors: with Kata's ports, with an adapter bus, with a way to the host's IOMMU."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tests.kata.machine import Machine, add_behind, memory_monitor
from tests.kata.vector import Case
from tests.support.tree import HostTree
from vmplug.address import PERIPHERAL
from vmplug.hypervisor.fake.monitor import FakeMonitor

BRIDGE_SLOT, PORT_SLOT = 2, 3
"""Where Kata's first bridge is, and its first port in what QEMU answers to it."""

_MODELS = {
    "pci-bridge": "pci-bridge",
    "rp": "pcie-root-port",
    "swrp": "pcie-root-port",
    "swup": "x3130-upstream",
    "swdp": "xio3130-downstream",
}
"""By Kata's names for them."""


class ApMonitor(FakeMonitor):
    """The same small QEMU, with an adapter bus where others have PCI.

    Source: QEMU hw/s390x/ap-bridge.c, hw/vfio/ap.c.
    """

    def _qom_list(self, path: str) -> list[dict[str, str]]:
        entries = super()._qom_list(path)
        if path == "/machine":
            entries.append({"name": "ap-bridge", "type": "child<ap-bridge>"})
        return entries

    def _device_add(self, driver: str, id: str, **rest: Any) -> dict[str, Any]:  # noqa: A002
        return super()._device_add(driver, id, bus="ap-bus", **rest)

    def _bus_path(self, driver: str, bus: str) -> str:
        assert driver == "vfio-ap"
        return f"/machine/ap-bridge/{bus}"


class IommufdMonitor(FakeMonitor):
    """The same small QEMU, as if it were 8.2 and knew iommufd."""

    def _qom_list_types(self, implements: str) -> list[dict[str, str]]:
        return [{"name": implements}]


def machine_on(case: Case, tree: HostTree, monitor: FakeMonitor) -> Machine:
    """A VM that answers as `monitor` does."""
    machine = Machine(case, tree)
    machine.monitor = monitor
    machine.restart()
    return machine


def ap_monitor() -> FakeMonitor:
    """A VM with an adapter bus and nothing else."""
    return ApMonitor(root_ports=0, scsi=False)


def ports_monitor() -> FakeMonitor:
    """A VM with one bridge and one port, where Kata has them."""
    monitor = memory_monitor(ports=0, scsi=False)
    add_behind(monitor, None, "pci-bridge-0", "pci-bridge", BRIDGE_SLOT << 3)
    add_behind(monitor, None, "rp0", "pcie-root-port", PORT_SLOT << 3)
    return monitor


def qom_monitor(qom: Mapping[str, str]) -> FakeMonitor:
    """A VM with the ports, switches and bridges of which QEMU answers so."""
    monitor = memory_monitor(ports=0, scsi=False)
    paths = {key.rpartition("|")[0] for key in qom if key.startswith(PERIPHERAL)}
    for path in sorted(paths):
        name = path.removeprefix(f"{PERIPHERAL}/")
        bus = json.loads(qom[f"{path}|parent_bus"])
        parent = bus.rpartition("/")[2] if bus.startswith(PERIPHERAL) else None
        add_behind(monitor, parent, name, _model(name), int(qom[f"{path}|addr"]))
    return monitor


def _model(name: str) -> str:
    return _MODELS[re.sub(r"-?\d+\Z", "", name)]


def argv_monitor(devices: Iterable[Mapping[str, str]]) -> FakeMonitor:
    """A VM with the ports, switches and bridges of a command line; QEMU finds slots for some."""
    monitor = memory_monitor(ports=0, scsi=False)
    next_slot = 1
    for device in devices:
        bus = device["bus"]
        parent = None if bus in {"pcie.0", "pci.0"} else bus
        if "addr" in device:
            slot = int(device["addr"], 16)
        elif device["driver"] == "xio3130-downstream":
            slot = int(device["slot"])
        else:
            slot, next_slot = (0, next_slot) if parent else (next_slot, next_slot + 1)
        add_behind(monitor, parent, device["id"], device["driver"], slot << 3)
    return monitor
