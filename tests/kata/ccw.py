"""The channel subsystem of s390 machines: its numbers, its bridge of Kata's, a disk on it."""

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from tests.kata.host import add_device, request
from tests.kata.machine import Machine, add_bridge, memory_monitor
from tests.kata.terms import commands
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Facts,
    attempt,
    katas_result,
    kinds_of,
)
from tests.support.tree import HostTree
from vmplug.address import CcwDevNo
from vmplug.drivers.free_places import ccw_places
from vmplug.hypervisor.fake.monitor import FakeMonitor
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.journal.records import Attachment

_CSS_BRIDGE = "virtual-css-bridge"
_CSS_BUS = f"/machine/{_CSS_BRIDGE}/virtual-css"
_DISK = {"ContainerPath": "/dev/null", "DevType": "b", "Major": 8, "Minor": 0}


class _S390(FakeMonitor):
    """The same small QEMU, with a channel subsystem where others have PCI.

    Source: `qom-list`, `qom-get` and `device_add` on QEMU 7.2, machine s390-ccw-virtio.
    """

    def _qom_list(self, path: str) -> list[dict[str, str]]:
        if path == _CSS_BUS:
            return [{"name": link, "type": "link<device>"} for link, _ in self._occupants(path)]
        entries = super()._qom_list(path)
        if path == "/machine":
            entries.append({"name": _CSS_BRIDGE, "type": f"child<{_CSS_BRIDGE}>"})
        return entries

    def _qom_get(self, path: str, property: str) -> Any:  # noqa: A002  QMP's word
        return super()._qom_get(path, "devno" if property == "dev_id" else property)

    def _device_add(self, driver: str, id: str, **rest: Any) -> dict[str, Any]:  # noqa: A002
        return super()._device_add(driver, id, bus="virtual-css", **rest)

    def _bus_path(self, driver: str, bus: str) -> str:
        assert driver.endswith("-ccw")
        return f"/machine/{_CSS_BRIDGE}/{bus}"

    def _check_place(self, driver: str, other: str, properties: Mapping[str, Any]) -> None:
        assert self.devices[other].properties["devno"] != properties["devno"], driver


def _number(case: Case) -> Answer:
    said = f"0.{case.input['ssid']}.{case.input['devno']}"
    return Answer(attempt(lambda: str(CcwDevNo.parse(said))), katas_result(case.expected))


def _bridge(case: Case) -> Answer:
    """What a bus of this type takes, and what its tenth place is called."""
    case.expected.skip("what sits on PCI has no number of the kind", "ccw_guest_error")
    case.expected.skip("what sits on PCI has no number of the kind", "ccw_hotplug_error")
    kind = case.input["type"]
    if kind == "ccw":
        offer = replace(Qemu(memory_monitor(ports=0)).offer(), ccw_used=frozenset())
        tenth = CcwDevNo(case.input["addr"], 0x000A)
        names, capacity = (str(tenth), tenth.qemu), sum(1 for _ in ccw_places(offer))
        has_parent = False
    else:
        offer = _behind_bridge(case.input["addr"], f"{kind}-pci-bridge".removeprefix("pci-"))
        (port,) = offer.ports
        names, capacity = ("", ""), len(port.free)
        has_parent = len(port.path.slots) > 1
        assert list(ccw_places(offer)) == []
    ours = {
        "ccw_guest_addr_of_000a": names[0],
        "ccw_hotplug_addr_of_000a": names[1],
        "has_parent": has_parent,
        "max_capacity": capacity,
    }
    return Answer(ours, {key: case.expected[key] for key in ours})


def _behind_bridge(slot: int, driver: str) -> Any:
    monitor = memory_monitor(ports=0, scsi=False)
    add_bridge(monitor, slot)
    monitor.devices["pci-bridge-0"].driver = driver
    return Qemu(monitor).offer()


def hot_plug(case: Case) -> Answer:
    """A disk of qemu.hotplugBlockDevice, plugged and taken out again."""
    drive = case.input["drive"]
    assert case.input["ops"] == ["add", "remove"]
    assert (drive["File"], drive["Index"], drive["ReadOnly"]) == ("/dev/null", 0, False)
    drive.skip("ours is drawn", "ID")
    drive.skip("it is neither", "Pmem", "Swap")
    machine = _s390(case)
    options = _options(case.setup)
    hold = machine.try_attach(request(_DISK, driver_options=options))
    assert isinstance(hold, Attachment)
    assert hold.guest_address
    error = machine.try_detach(hold)
    ours = {
        "errors": [None, error],
        "DevNo": str(hold.guest_address.ccw_devno),
        "places": len(machine.records()),
        "qmp": commands(machine.changes),
    }
    katas = {
        "errors": kinds_of(case.expected["errors"]),
        "DevNo": case.expected["DevNo"],
        "places": sum(len(bridge["slots"]) for bridge in case.expected["bridges_after"]),
        "qmp": commands(case.expected["qmp"]),
    }
    assert case.expected["PCIPath"] == case.expected["NvdimmID"] == ""
    return Answer(ours, katas)


def _s390(case: Case) -> Machine:
    tree = HostTree(case.path)
    add_device(tree, _DISK)
    machine = Machine(case, tree)
    machine.monitor = _S390(root_ports=0, scsi=False)
    machine.restart()
    return machine


def _options(setup: Facts) -> dict[str, str]:
    setup.skip("QEMU's own number of queues does", "vcpus")
    assert setup["bridges"] == "1 bridge(s)"
    assert not any(setup[key] for key in ("cache_direct", "cache_set", "iothreads"))
    assert not any(setup[key] for key in ("indep_iothreads", "qmp_replies"))
    return {
        "block-driver": setup["block_device_driver"],
        "aio": setup["aio"],
        "cache": "writeback",
    }


ADAPTERS: dict[str, Adapter] = {
    "types.CcwDeviceFrom": _number,
    "types.NewBridge": _bridge,
}
