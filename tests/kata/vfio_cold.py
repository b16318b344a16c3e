"""Cold plug of functions, mediated devices, adapters and channel devices: their options."""

from typing import Any

from tests.kata.cold import ColdMachine
from tests.kata.command_lines import answer, written, written_at
from tests.kata.terms import Terms, command_line
from tests.kata.vector import Adapter, Answer, Case, Deviation, Facts, Refusal, attempt
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

_SHORT = "SpecError(where=vfio:device)"
_WHOLE = "an address is never without its domain: the same one exists in each"


def _line(**device: str) -> list[list[Any]]:
    return [["-device", {"driver": "vfio-pci", **device}]]


_BY_GROUP = Deviation(
    None,
    "a QEMU that is still to be started is not known to have iommufd, and the group serves too",
    _line(host="0000:41:00.0"),
)
_MEDIATED = (
    "cmdline: vfio-pci: SysfsDev is ignored when host is emitted; a mediated device gets its "
    "parent's address (bug)"
)

DEVIATIONS: dict[str, Deviation] = {
    "cmdline: vfio-pci minimal": Deviation(12, _WHOLE, _SHORT),
    "cmdline: vfio-pci vendor/device override": Deviation(12, _WHOLE, _SHORT),
    "cmdline: vfio-pci iommufd cdev": _BY_GROUP,
    _MEDIATED: Deviation(
        39,
        "a mediated device goes by its own directory, never by its parent's address",
        _line(
            sysfsdev="/sys/devices/pci0000:00/0000:00:02.0/f79944e4-5a3d-11e8-99ce-479cbab002e4",
            romfile="",
        ),
    ),
    "cmdline: vfio-ccw: sysfsdev never emitted, host and devno empty (bug)": Deviation(
        39,
        "a channel device goes by its own directory, and has a number in the guest",
        [
            [
                "-device",
                {
                    "driver": "vfio-ccw",
                    "sysfsdev": f"{_CSS}/0.0.1234/{UUID}",
                    "devno": "fe.0.0001",
                },
            ]
        ],
    ),
    'cold plug vfio type 1 bdf="0000:41:00.0" cdev="/dev/vfio/devices/vfio3"': _BY_GROUP,
    **{
        f'cold plug vfio type 0 bdf="02:10.1" cdev=""{which}': Deviation(12, _WHOLE, _SHORT)
        for which in ("", " (2)")
    },
}
