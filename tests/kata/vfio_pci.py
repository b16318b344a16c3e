"""PCI functions of the host: their addresses, and what they say of themselves."""

from typing import Any

from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Refusal,
    attempt,
    katas_result,
    kind_of,
)
from tests.kata.vfio_tree import build, find, hexadecimal, skip_places
from tests.support.pci_tree import CONFIG_CUT, CONFIG_PCI, CONFIG_PCIE, PciTree, config_space
from vmplug.address import Bdf
from vmplug.host.pci.function import PciFunction
from vmplug.host.pci.group import VfioGroup

_FUNCTION = "0000:01:00.0"


def _address(case: Case) -> Answer:
    """What is left of an address; Kata's next step reads sysfs by it."""
    ours = attempt(lambda: str(Bdf.parse(case.input["value"])))
    return Answer(ours, case.expected["result"])


def _class(case: Case) -> Answer:
    """Whether a function of a group stays with the host, by its class."""
    tree = PciTree(case.path)
    tree.file(f"/sys/bus/pci/devices/{_FUNCTION}/class", f"{case.input['class']}\n")
    tree.iommu_group(7, _FUNCTION)
    group = find(tree, "/dev/vfio/7")
    assert isinstance(group, VfioGroup)
    assert len(group.bridges) + len(group.functions) == 1
    return Answer(bool(group.bridges), katas_result(case.expected))


def function_of(found: object) -> PciFunction | Refusal:
    """The only function that was found, or why there is none."""
    if isinstance(found, Refusal):
        return found
    assert isinstance(found, VfioGroup)
    (function,) = found.functions
    return function


def _facts(case: Case) -> Answer:
    skip_places(case.setup)
    function = function_of(find(build(case), case.input["bdf"]))
    ours: object = function
    if isinstance(function, PciFunction):
        ours = {
            "class": hexadecimal(function.class_code, 6),
            "vendor": hexadecimal(function.vendor_id, 4),
            "device": hexadecimal(function.device_id, 4),
            "numa": -1 if function.numa_node is None else function.numa_node,
            "is_pcie": function.pcie,
        }
    return Answer(ours, dict(case.expected))


def _is_pcie(case: Case) -> Answer:
    function = function_of(find(build(case), case.input["bdf"]))
    assert isinstance(function, PciFunction)
    return Answer(function.pcie, case.expected["result"])


_CONFIG_OF_SPEED = {"PCIe": CONFIG_PCIE, "PCI": CONFIG_PCI, "file)": CONFIG_CUT}


def _is_pcie_by_slot(case: Case) -> Answer:
    """The functions that Kata knows by their slots' speeds, with the configuration that fits.

    Of a slot without a speed, the host says nothing here either.
    """
    tree = PciTree(case.path)
    slots: dict[str, Any] = {key: case.setup[key] for key in case.setup}
    for address, speed in slots.values():
        length = _CONFIG_OF_SPEED[speed.rpartition(" ")[2]]
        is_pcie = length == CONFIG_PCIE
        config = config_space(0x8086, 0x10D3, length, is_pcie=is_pcie)
        for number in (0, 1):
            tree.pci_function(f"{address}.{number}", config=config)
    if not slots:
        tree.pci_function(case.input["bdf"])
    function = function_of(find(tree, case.input["bdf"]))
    ours = function if isinstance(function, Refusal) else function.pcie
    return Answer(ours, case.expected["result"])


def _has_large_bar(case: Case) -> Answer:
    assert case.input["path"] == "$ROOT/resource"
    tree = PciTree(case.path)
    tree.pci_function(_FUNCTION, resource=case.setup["resource_file"])
    function = function_of(find(tree, _FUNCTION))
    assert isinstance(function, PciFunction)
    ours = any(bar.is_large for bar in function.bars or ())
    if "panic" in case.expected:
        assert case.expected["panic"]
        return Answer(ours, "panic")
    assert kind_of(case.expected["error"]) is None
    return Answer(ours, case.expected["result"])


ADAPTERS: dict[str, Adapter] = {
    "drivers.GetBDF": _address,
    "drivers.IsPCIeDevice": _is_pcie,
    "drivers.IsPCIeDevice / GetPCIDeviceProperty / GetPCIDeviceNUMANode": _facts,
    "drivers.checkIgnorePCIClass": _class,
    "drivers.isPCIeDevice (seed)": _is_pcie_by_slot,
    "manager.isLargeBarSpace": _has_large_bar,
}
