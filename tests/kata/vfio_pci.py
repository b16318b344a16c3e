"""PCI functions of the host: their addresses, and what they say of themselves."""

from typing import Any

from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Deviation,
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
    ours = any(bar.is_large for bar in function.bars)
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


def _no_address(text: str) -> str:
    return f"ValueError(message={text!r} is not DOMAIN:BUS:SLOT.FUNCTION, such as 0000:3b:00.1)"


_WHOLE = "an address is never without its domain: the same one exists in each"
_ABSENT = "what the host does not have is not told of as if it had"
_SEED = "large BAR (tree of seed commit ee941e5c)"
_LAST = "large BAR (last 1.x)"

DEVIATIONS: dict[str, Deviation] = {
    "GetBDF 0000:02:10.0": Deviation(12, _WHOLE, "0000:02:10.0"),
    "GetBDF ": Deviation(12, _WHOLE, _no_address("")),
    "GetBDF a:b:c:d": Deviation(12, _WHOLE, _no_address("a:b:c:d")),
    "ignore pci class 060400": Deviation(
        None,
        "a class is a hexadecimal number, with 0x before it or not",
        ours=True,
    ),
    "ignore pci class 0x1ffffffff": Deviation(
        13,
        "a class that makes no sense is unknown, and its group is handed over all the same",
        ours=False,
    ),
    "pci properties 0000:ff:00.0": Deviation(
        None, _ABSENT, "NoSuchDevice(wanted=0000:ff:00.0, found=nothing)"
    ),
    "pci properties ": Deviation(None, _ABSENT, "SpecError(where=vfio:device)"),
    "pcie by config size 0": Deviation(
        None, "where the host does not say it, it is not known", None
    ),
    "seed pcie: slots directory missing": Deviation(
        None, "a function says it itself, in a slot that the host knows or in none", ours=True
    ),
    "seed pcie by slot 04:00.0": Deviation(12, _WHOLE, "SpecError(where=vfio:device)"),
    "seed pcie by slot 0000:06:00.0": Deviation(
        None, "where the host does not say it, it is not known", None
    ),
    **{
        f"{version}: 16 GiB bar, two columns": Deviation(
            None,
            "the kernel writes three columns: a line that makes no sense is told, not believed",
            ours=False,
        )
        for version in (_SEED, _LAST)
    },
    **{
        f"{_SEED}: {what}": Deviation(
            26, "a file of any content is read to its end or told of", ours=False
        )
        for what in ("start above end", "unused bars and trailing newline")
    },
    **{
        f"{version}: whole 64-bit range wraps to size 0": Deviation(
            26, "a size is a number of any length, and never wraps", ours=True
        )
        for version in (_SEED, _LAST)
    },
}
