"""Groups, nodes of single devices, mediated devices: what a request turns out to be."""

from typing import Any

from msgspec.structs import replace

from tests.kata.machine import Machine, memory_monitor
from tests.kata.vector import (
    Adapter,
    Answer,
    Case,
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
