"""Cold plug of functions, mediated devices, adapters and channel devices: their options."""

from tests.kata.cold import ColdMachine
from tests.kata.command_lines import answer, written, written_at
from tests.kata.terms import Terms, command_line
from tests.kata.vector import Adapter, Answer, Case, Facts, Refusal, attempt
from tests.kata.vfio_tree import AP_MATRIX, UUID, add_cdev, add_mediated, named
from tests.support.pci_tree import PciTree
from vmplug.address import Bdf
from vmplug.drivers.place import ApPlace
from vmplug.host.pci.mdev import VFIODeviceType
from vmplug.hypervisor.qemu.start.machine import Machine
from vmplug.oci.requests import VfioInfo

_CSS = "/sys/devices/css0"
_IDS = {"VendorID": "x-pci-vendor-id", "DeviceID": "x-pci-device-id"}


def _for_qemu(case: Case) -> Answer:
    machine = Machine(case.setup["machine"])
    ours, katas = answer(case, _written(case, machine, case.input.get("Transport", "pci")))
    return Answer(ours, _in_numbers(katas))


def _of_kata(case: Case) -> Answer:
    """Kata says the type, of which only the address and the node count."""
    assert case.input["Type"] in {0, 1}
    ours = _written(case, Machine(case.setup["machine"]), "pci")
    return Answer(ours, _in_numbers(command_line(case.expected["argv"])))


def _in_numbers(katas: Terms | str) -> Terms | str:
    """Ids of PCI as JSON has them."""
    for _, facts in () if isinstance(katas, str) else katas:
        for key in _IDS.values():
            if key in facts:
                facts[key] = str(int(facts[key], 16))
    return katas


def _written(case: Case, machine: Machine, transport: str) -> Terms | Refusal:
    """What the device puts on the command line, which is on the host that it is said to be on."""
    said = case.input
    said.skip("ours are drawn and found", "ID", "Bus")
    tree = PciTree(case.path)
    cold = ColdMachine(case, tree.root, machine)
    match transport:
        case "ap":
            assert said["SysfsDev"] == f"{AP_MATRIX}/{UUID}"
            add_mediated(tree, VFIODeviceType.AP, AP_MATRIX, queues=["05.001f"])
            return written_at(cold, named(UUID), ApPlace())
        case "ccw":
            parent = said["SysfsDev"].split("/")[-2]
            add_mediated(tree, VFIODeviceType.CCW, f"{_CSS}/{parent}")
            return written(cold, named(UUID))
        case _:
            info = attempt(lambda: _function(tree, said))
            return info if isinstance(info, Refusal) else written(cold, info)


def _function(tree: PciTree, said: Facts) -> VfioInfo:
    """A function of the host, by the node of its own if there is one; or a part of it."""
    bdf, node, sysfs_path = (said.get(key, "") for key in ("BDF", "DevfsDev", "SysfsDev"))
    if sysfs_path and not sysfs_path.endswith(bdf):
        parent, _, uuid = sysfs_path.rpartition("/")
        add_mediated(tree, VFIODeviceType.MEDIATED, parent, uuid=uuid)
        return named(uuid)
    options = {option: said[key] for key, option in _IDS.items() if said.get(key)}
    options["rom"] = "off" if said.get("ROMFile") else "on"
    info = named(node or bdf, **options)
    tree.pci_function(str(Bdf.parse(bdf)), group=12, driver="vfio-pci")
    if node:
        add_cdev(tree, bdf, node)
    return info


ADAPTERS: dict[str, Adapter] = {
    "govmm qemu.VFIODevice.QemuParams": _for_qemu,
    "qemuArchBase.appendVFIODevice": _of_kata,
}
