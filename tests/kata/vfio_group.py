"""Groups, nodes of single devices, mediated devices: what a request turns out to be."""

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from tests.kata.machine import Machine, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
    Deviation,
    Facts,
    Refusal,
    attempt,
    error_of,
    katas_result,
    kind_of,
)
from tests.kata.vfio_tree import (
    AP_MATRIX,
    TYPES,
    UUID,
    add_cdev,
    at,
    build,
    find,
    hexadecimal,
    link,
    name_cdev,
    named,
    node_request,
    skip_places,
)
from tests.support.pci_tree import PciTree
from tests.support.tree import HostTree
from vmplug.address import new_id
from vmplug.devnum import DevNum
from vmplug.drivers.plug import VFIODevice, VFIODevices
from vmplug.drivers.ports import NewPlug
from vmplug.drivers.vfio import VfioDriver
from vmplug.host.device import CharDevice, HostDevice
from vmplug.host.pci.group import VfioGroup
from vmplug.host.resolve import resolve
from vmplug.hypervisor.qemu.running import Qemu
from vmplug.oci.info import DeviceInfo, DevType

_FUNCTION = "0000:01:00.0"


def _index(device: HostDevice) -> str:
    """The number in the name of a device's own node; empty when it has none."""
    if not isinstance(device, VfioGroup) or not device.cdev_nodes:
        return ""
    ((_, node),) = device.cdev_nodes
    return node.removeprefix("/dev/vfio/devices/vfio")


def _cdev_tree(case: Case) -> PciTree:
    return PciTree(case.path).pci_function(_FUNCTION, group=12, driver="vfio-pci")


def _by_number(case: Case) -> Answer:
    """A node of a function's device, asked for by its number as a container does."""
    tree = _cdev_tree(case)
    request = add_cdev(tree, _FUNCTION, case.input["DevfsDev"])
    return Answer(_index(resolve(request, tree.root)), case.expected["result"])


def _by_path(case: Case) -> Answer:
    path = case.input["path"]
    tree = _cdev_tree(case)
    if path.startswith("/dev/vfio/devices/"):
        add_cdev(tree, _FUNCTION, path)
    device = find(tree, path)
    ours: object = device
    if isinstance(device, VfioGroup):
        ours = _index(device) or f"group {device.number}"
    return Answer(ours, katas_result(case.expected))


def _parent(case: Case) -> Answer:
    """What Kata takes for the address of a mediated device."""
    above, _, name = case.input["sysfsdev"].rpartition("/")
    tree = PciTree(case.path)
    tree.file(f"{above}/{name}/uevent")
    link(tree, f"/sys/bus/mdev/devices/{name}", f"{above}/{name}")
    device = find(tree, name)
    ours: object = device
    if isinstance(device, VfioGroup):
        assert device.mediated
        parent = device.mediated.parent
        ours = {"mediated_bdf": parent, "stripped_bdf": parent}
    return Answer(ours, dict(case.expected))


def handed_over(group: VfioGroup) -> VFIODevices:
    """What of the group would be given to a VM that has places for everything."""
    offer = replace(Qemu(memory_monitor(ports=2)).offer(), ap=True, iommufd=True)
    place = VfioDriver().choose_place(group, offer, ())
    new = NewPlug(id=new_id(), device=group, read_only=False)
    return VfioDriver().plan(new, place, offer)


def _details(case: Case) -> Answer:
    skip_places(case.setup)
    case.setup.skip("said in the request, too", "iommu_devices_path")
    name, directory = case.input["name"], case.input.get("iommu_devices_path")
    tree = build(case)
    if case.mended:
        tree.file(f"/sys/bus/pci/devices/{name}/class", "0x020000\n")
    group = find(tree, f"/dev/vfio/{directory.split('/')[-2]}" if directory else name)
    ours: dict[str, Any] = {"bdf": "", "error": group, "sysfsdev": "", "type": None}
    if isinstance(group, VfioGroup):
        (device,) = handed_over(group).devices
        ours |= {**_device_facts(group, device), "error": None}
    katas = {
        "bdf": case.expected["bdf"],
        "error": kind_of(case.expected["error"]),
        "sysfsdev": at(case.expected["sysfsdev"]) if case.expected["sysfsdev"] else "",
        "type": TYPES.get(case.expected["type"]),
    }
    return Answer(ours, katas)


def _device_facts(group: VfioGroup, device: VFIODevice) -> dict[str, Any]:
    return {
        "bdf": str(device.bdf or ""),
        "sysfsdev": device.sysfs_path or group.functions[0].sysfs_path,
        "type": device.type,
    }


def _queues(case: Case) -> Answer:
    assert at(case.input["sysfsdev"]) == f"{AP_MATRIX}/{UUID}"
    tree = build(case)
    if not case.setup:
        tree.file(f"{AP_MATRIX}/{UUID}/uevent")
        link(tree, f"/sys/bus/mdev/devices/{UUID}", f"{AP_MATRIX}/{UUID}")
    group = find(tree, UUID)
    ours: object = group
    if isinstance(group, VfioGroup):
        assert group.mediated
        ours = list(group.mediated.ap_queues)
    return Answer(ours, katas_result(case.expected))


def _list(case: Case) -> Answer:
    """All of a group, as it would be given to a VM."""
    skip_places(case.setup)
    case.input.skip("names and ports are a matter of plugging", "ID", "Port")
    group = find(build(case), case.input["HostPath"])
    ours: dict[str, Any] = {"devices": None, "error": group}
    if isinstance(group, VfioGroup):
        plug = handed_over(group)
        devices = [_listed(group, plug, device) for device in plug.devices]
        ours = {"devices": devices or None, "error": None}
    listed = case.expected["devices"]
    katas = {
        "devices": [_katas_listed(device) for device in listed] if listed else None,
        "error": kind_of(case.expected["error"]),
    }
    return Answer(ours, katas)


def _listed(group: VfioGroup, plug: VFIODevices, device: VFIODevice) -> dict[str, Any]:
    """A device in the fields of Kata's VFIODev; what a mediated device does not say is empty."""
    function = next((f for f in group.functions if f.bdf == device.bdf), None)
    node = function.numa_node if function else None
    return {
        "BDF": str(device.bdf or ""),
        "SysfsDev": device.sysfs_path or (function.sysfs_path if function else ""),
        "Type": device.type,
        "Class": hexadecimal(function.class_code if function else None, 6),
        "VendorID": hexadecimal(function.vendor_id if function else None, 4),
        "DeviceID": hexadecimal(function.device_id if function else None, 4),
        "IsPCIe": bool(function and function.pcie),
        "NUMANode": -1 if node is None else node,
        "APDevices": list(plug.ap_queues) or None,
        "DevfsDev": device.cdev_node or "",
        "HostPath": plug.node,
    }


def _katas_listed(device: dict[str, Any]) -> dict[str, Any]:
    fields = {key: device[key] for key in device if key not in {"ID", "Bus", "Port"}}
    return {**fields, "SysfsDev": at(device["SysfsDev"]), "Type": TYPES[device["Type"]]}


def _number_of_node(case: Case) -> Answer:
    """A node that only /dev has, which is used if its number is the one that was asked for."""
    said = case.setup["node"]
    number = DevNum(major=said["major"], minor=said["minor"])
    node = case.input["path"].removeprefix("$ROOT")
    tree = HostTree(case.path).node(node, said["type"], str(number))
    request = DeviceInfo(container_path=node, dev_type=DevType(said["type"]), devnum=number)
    device = resolve(request, tree.root)
    assert isinstance(device, CharDevice)
    assert device.devnum
    ours = {"major": device.devnum.major, "minor": device.devnum.minor, "error": None}
    case.expected.skip("the vector's own judgement", "correct")
    return Answer(ours, {key: case.expected[key] for key in ours})


def _behind_number(case: Case) -> Answer:
    """What is behind the number of a device's node."""
    skip_places(case.setup)
    major, minor = case.input["major"], case.input["minor"]
    tree, node = build(case), "/dev/vfio/devices/vfio0"
    if case.setup:
        node = name_cdev(tree, f"{major}:{minor}")
    elif major == 1:
        tree.char_device(f"{major}:{minor}", "null")
    device = attempt(lambda: resolve(node_request(node, major, minor), tree.root))
    result = case.expected.get("result")
    return Answer(_names(device), kind_of(case.expected["error"]) or result)


def _names(device: HostDevice | Refusal) -> object:
    if isinstance(device, VfioGroup):
        return ", ".join(str(given.bdf or given.name) for given in handed_over(device).devices)
    return f"{device.kind} {device.host_path}" if isinstance(device, CharDevice) else device


def _behind_node(case: Case) -> Answer:
    """What is behind a device's node, asked for by its name."""
    skip_places(case.setup)
    said: Facts = case.input.get("DeviceInfo", case.input)
    if said is not case.input:
        said.skip("ours is drawn", "ID")
    node = said["HostPath"].removeprefix("$ROOT")
    tree = build(case)
    for made in case.setup.get("fs", {}).get("nodes", ()):
        name_cdev(tree, f"{made['major']}:{made['minor']}")
    device = find(tree, node)
    ours: dict[str, Any] = {"error": error_of(device)}
    if isinstance(device, VfioGroup) and device.members:
        (given,) = handed_over(device).devices
        ours |= {"BDF": str(given.bdf or ""), "Type": given.type, "name": given.name}
    elif isinstance(device, VfioGroup):
        ours["error"] = error_of(Machine(case, tree).try_attach(named(node)))
    katas = {"error": kind_of(case.expected["error"])}
    if katas["error"] is None:
        case.expected.skip("ours is drawn", "ID")
        katas |= {"BDF": case.expected["BDF"], "Type": TYPES[case.expected["Type"]]}
    return Answer(ours, katas)


ADAPTERS: dict[str, Adapter] = {
    "config.VFIODev.IOMMUFDID": _by_number,
    "drivers.GetAPVFIODevices": _queues,
    "drivers.GetAllVFIODevicesFromIOMMUGroup": _list,
    "drivers.GetBDFFromVFIODev": _behind_number,
    "drivers.GetDeviceFromVFIODev": _behind_node,
    "drivers.GetMajorMinorFromDevPath": _number_of_node,
    "drivers.GetVFIODetails": _details,
    "drivers.extractIndex": _by_path,
    "drivers.getMediatedBDF then drivers.GetBDF": _parent,
}


def _device(**facts: object) -> dict[str, Any]:
    nothing = dict.fromkeys(("BDF", "Class", "VendorID", "DeviceID", "DevfsDev"), "")
    return {**nothing, "IsPCIe": False, "NUMANode": -1, "APDevices": None, **facts}


def _listing(device: dict[str, Any]) -> dict[str, Any]:
    return {"devices": [device], "error": None}


_MEDIATED = "f79944e4-5a3d-11e8-99ce-479cbab002e4"
_MEDIATED_PATH = f"/sys/devices/pci0000:00/0000:00:02.0/{_MEDIATED}"
_REFUSED = "SpecError(where=vfio:device)"
_NO_NODE = "a node of another name is none of VFIO's"
_OWN = "a mediated device goes by its UUID and its own directory, never by its parent's address"
_NOT_ITS_PARENT = "a mediated device is not its parent"
_ABSENT = "only what the host has can be handed over"


def _absent(name: str) -> Deviation:
    error = f"NoSuchDevice(wanted={name}, found=nothing)"
    return Deviation(None, _ABSENT, {"bdf": "", "error": error, "sysfsdev": "", "type": None})


def _names_of(why: str, names: Sequence[tuple[str, str]]) -> dict[str, Deviation]:
    return {f"cdev BDF: {vector}": Deviation(9, why, name) for vector, name in names}


DEVIATIONS: dict[str, Deviation] = {
    "iommufd id /dev/vfio/devices/foo": Deviation(None, _NO_NODE, ""),
    "iommufd id /dev/vfio/devicesX/vfio7": Deviation(8, _NO_NODE, ""),
    "iommufd id /dev/vfio/devices/vfiovfio3": Deviation(None, _NO_NODE, ""),
    "cdev index /dev/vfio/12": Deviation(
        None, "the node of a group and that of a device may be named alike", "group 12"
    ),
    "cdev index vfio": Deviation(None, "a node is named by its whole path", _REFUSED),
    f"mediated BDF {_MEDIATED_PATH}": Deviation(
        12,
        "an address keeps its domain",
        {"mediated_bdf": "0000:00:02.0", "stripped_bdf": "0000:00:02.0"},
    ),
    "mediated BDF /a/b/c": Deviation(None, "a mediated device is named by a UUID", _REFUSED),
    "vfio details 0000:02:10.0": _absent("0000:02:10.0"),
    "vfio details 10000:e1:00.0": _absent("10000:e1:00.0"),
    "vfio details: mediated device behind a symlink": Deviation(
        12,
        _OWN,
        {"bdf": "", "error": None, "sysfsdev": _MEDIATED_PATH, "type": "vfio-mdev"},
    ),
    "ap matrix: no final newline loses the last character (quirk)": Deviation(
        11, "a line is a queue whether the last one ends or not", ["05.001f"]
    ),
    "ap matrix: just a newline": Deviation(11, "an empty matrix has no queues", []),
    "ap matrix: missing": Deviation(
        None, "an adapter that has gone is refused by QEMU, which opens it", []
    ),
    "iommu group: noiommu group name is used verbatim": Deviation(
        23,
        "a group without an IOMMU protects nobody from the VM, and is no group to hand over",
        {"devices": None, "error": _REFUSED},
    ),
    "iommu group: unparsable class aborts the whole group": Deviation(
        13,
        "a class that makes no sense is unknown, and its group is handed over all the same",
        _listing(
            _device(
                BDF="0000:01:00.0",
                SysfsDev="/sys/bus/pci/devices/0000:01:00.0",
                Type="vfio-pci",
                VendorID="0x0001",
                DeviceID="0x0002",
                IsPCIe=True,
                HostPath="/dev/vfio/7",
            )
        ),
    ),
    "iommu group: mediated device: type 2, parent BDF without domain": Deviation(
        12,
        _OWN,
        _listing(_device(SysfsDev=_MEDIATED_PATH, Type="vfio-mdev", HostPath="/dev/vfio/9")),
    ),
    "iommu group: AP mediated device: type 3, NUMA -1, no BDF": Deviation(
        None,
        "every device keeps the node that it was asked for by",
        _listing(
            _device(
                SysfsDev=f"{AP_MATRIX}/{UUID}",
                Type="vfio-ap",
                APDevices=["05.001f"],
                HostPath="/dev/vfio/42",
            )
        ),
    ),
    "st_rdev decode 237:256": Deviation(
        10,
        "a number has 12 bits of major and 20 of minor",
        {"major": 237, "minor": 256, "error": None},
    ),
    "cdev BDF: not a PCI device (/dev/null)": Deviation(
        None, "what is none of VFIO's is what it is, and only counted", "generic /dev/null"
    ),
    **_names_of(
        _NOT_ITS_PARENT,
        [
            (
                "mediated device resolves to its parent (bug: the parent gets passed through)",
                _MEDIATED,
            ),
            ("AP matrix device has none", UUID),
        ],
    ),
    **_names_of(
        "a domain has four digits and more",
        [
            (
                "five-digit domain (VMD) loses its first digit (bug: another device)",
                "10000:e1:00.0",
            )
        ],
    ),
    "cdev device missing": Deviation(
        None,
        "a node behind which the kernel has no device is a finding, which `check` tells too",
        {"error": "InUse(host_path=/dev/vfio/devices/vfio999, codes=no-such-device)"},
    ),
    "cdev device: mediated device comes back as type normal of its parent (bug)": Deviation(
        9, _NOT_ITS_PARENT, {"error": None, "BDF": "", "Type": "vfio-mdev", "name": _MEDIATED}
    ),
}

MENDED: dict[str, Deviation | None] = {
    "vfio details 0000:02:10.0": None,
    "vfio details 10000:e1:00.0": None,
}
"""On a host that has the function."""
