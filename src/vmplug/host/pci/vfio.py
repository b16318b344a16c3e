"""VFIO: the group, the functions or the mediated device that a node, address or UUID names.

Source: Documentation/driver-api/vfio.rst, vfio-mediated-device.rst, s390/vfio-ap.rst.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from vmplug.address import Bdf
from vmplug.devnum import DevNum
from vmplug.errors import AttributeReadError, NoSuchDevice, SpecError
from vmplug.host.block.device import DiskPart
from vmplug.host.file_id import file_replaced
from vmplug.host.kind import FoundBy
from vmplug.host.pci.function import PciFunction, find_function, read_virtfns
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.iommu import IOMMU_NODE, find_group, group_node, is_noiommu, read_group
from vmplug.host.pci.mdev import MDEV_DEVICES, UUID, read_children, read_mediated
from vmplug.host.pci.uses import BlockDevices
from vmplug.host.root import HostRoot, node_number

GROUP_NODE = re.compile(r"/dev/vfio/([0-9]{1,9})\Z", re.ASCII)
CDEV_NODE = re.compile(r"/dev/vfio/devices/vfio([0-9]{1,9})\Z", re.ASCII)

_VFIO_DRIVERS = frozenset({"vfio-pci", "vfio_mdev", "vfio_ap_mdev", "vfio_ccw_mdev"})
_SEE = "vmplug host lists the devices"


def find_vfio_group(
    node: str,
    root: HostRoot,
    *,
    devnum: DevNum | None,
    found_by: FoundBy,
    blocks: BlockDevices | None = None,
) -> VfioGroup:
    """The group behind a node such as /dev/vfio/26 or /dev/vfio/devices/vfio0.

    A node without a device in the kernel gives a group without members. `blocks` are for several
    groups of one request.
    """
    blocks = blocks or BlockDevices(root)
    if match := GROUP_NODE.match(node):
        return _read_group(int(match[1]), node, root, found_by, blocks)
    name = node.rpartition("/")[2]
    # The link leads to .../<device>/vfio-dev/vfio0, the device's own directory being two up.
    link = f"{root.sys_dev}/char/{devnum}" if devnum else f"/sys/class/vfio-dev/{name}"
    real = root.real_path(link)
    device, found, cdev = real.rpartition("/vfio-dev/")
    if (
        real == link or not found or cdev != name
    ):  # as for a group that has gone: `check` reports it
        return VfioGroup(number=None, device_node=node, functions=(), found_by=found_by)
    name = device.rpartition("/")[2]
    group = find_vfio_device(name, root, node=node, found_by=found_by, blocks=blocks)
    return group._replace(cdev_nodes=read_cdev_nodes(group, root))


def check_exists(group: VfioGroup) -> None:
    """NoSuchDevice for a node without a device in the kernel."""
    if not (group.members or group.bridges or group.unknown_members):
        raise NoSuchDevice(
            group.host_path,
            f"{group.host_path} is a VFIO node, but the kernel has no device behind it",
            found="nothing",
            hint=_SEE,
        )


def read_cdev_nodes(group: VfioGroup, root: HostRoot) -> tuple[tuple[str, str], ...]:
    """The members' own nodes, if each of them has one and there is an iommufd for them."""
    if not has_node(IOMMU_NODE, root):
        return ()
    paths = group.member_paths
    nodes = tuple((name, node) for name, path in paths.items() if (node := read_cdev(path, root)))
    return nodes if len(nodes) == len(paths) else ()


def has_node(node: str, root: HostRoot) -> bool:
    """Whether QEMU can get a node; no node is opened on a host that is not the running one."""
    return not root.is_live or root.stat_or_none(node) is not None


def find_vfio_device(
    name: str,
    root: HostRoot,
    *,
    node: str | None = None,
    found_by: FoundBy = FoundBy.SYSFS,
    blocks: BlockDevices | None = None,
) -> VfioGroup:
    """The group of a PCI function by its BDF, or of a mediated device by its UUID.

    Raises NoSuchDevice when the host has no such device; a device without a group gives a group
    with `number` None. `blocks` are for several groups of one request.
    """
    blocks = blocks or BlockDevices(root)
    try:
        bdf = Bdf.parse(name)
    except ValueError:
        return _find_mediated(name, root, node, found_by)
    function = find_function(bdf, root)
    if function is None:
        raise NoSuchDevice(
            name, f"no PCI function {name} on this host", found="nothing", hint=_SEE
        )
    number = find_group(function.sysfs_path, root)
    if number is None:
        alone = VfioGroup(
            number=None, device_node=node, functions=(function,), named=name, found_by=found_by
        )
        return with_parts(alone, root, blocks)
    return _read_group(number, node, root, found_by, blocks, named=function)


def find_named_group(text: str, root: HostRoot) -> VfioGroup:
    """The group that a function's address, a mediated device's UUID or a node of VFIO names.

    Raises SpecError for any other text, and NoSuchDevice.
    """
    if GROUP_NODE.match(text) or CDEV_NODE.match(text):
        return find_vfio_group(text, root, devnum=None, found_by=FoundBy.FILE)
    if UUID.match(text):
        return find_vfio_device(text, root)
    try:
        bdf = Bdf.parse_written(text)
    except ValueError:
        raise SpecError(
            repr(text),
            "not the address of a PCI function or a node of VFIO",
            hint="write 0000:3b:00.0, 3b:00.0 or /dev/vfio/26",
        ) from None
    return find_vfio_device(str(bdf), root)


def _find_mediated(name: str, root: HostRoot, node: str | None, found_by: FoundBy) -> VfioGroup:
    path = f"{MDEV_DEVICES}/{name}"
    if not UUID.match(name) or root.stat(path) is None:
        raise NoSuchDevice(
            name, f"no mediated device {name} on this host", found="nothing", hint=_SEE
        )
    mediated = read_mediated(path, root)
    return VfioGroup(
        number=find_group(mediated.sysfs_path, root),
        device_node=node,
        functions=(),
        mediated=mediated,
        named=name,
        found_by=found_by,
    )


def _read_group(
    number: int,
    node: str | None,
    root: HostRoot,
    found_by: FoundBy,
    blocks: BlockDevices,
    named: PciFunction | None = None,
) -> VfioGroup:
    """`named` is the member that the request names."""
    functions: list[PciFunction] = []
    unknown_members: list[str] = []
    mediated = None
    for name in read_group(number, root):
        try:
            bdf = Bdf.parse(name)
        except ValueError:
            path = f"{root.iommu_groups}/{number}/devices/{name}"
            if UUID.match(name):
                mediated = read_mediated(path, root)
            else:
                unknown_members.append(name)
            continue
        is_named = named is not None and named.bdf == bdf
        if function := named if is_named else find_function(bdf, root):
            functions.append(function)
    functions.sort(key=lambda function: function.bdf)
    endpoints = tuple(f for f in functions if not f.is_bridge)
    group = VfioGroup(
        number=number,
        device_node=node,
        functions=endpoints,
        bridges=tuple(f for f in functions if f.is_bridge),
        mediated=mediated,
        unknown_members=tuple(unknown_members),
        named=str(named.bdf) if named else None,
        found_by=found_by,
        is_noiommu=mediated is None and is_noiommu(number, root),
    )
    return with_parts(group, root, blocks)


def with_parts(group: VfioGroup, root: HostRoot, blocks: BlockDevices) -> VfioGroup:
    """The group with the disks, partitions and mediated devices that the host's drivers provide.

    A disk with several controllers in the group is in it once.
    """
    disks, partitions = dict[DevNum, DiskPart](), dict[DevNum, None]()
    for function in group.functions:
        for devnum in blocks.of(function.bdf):
            directory = f"{root.sys_dev}/block/{devnum}"
            if root.stat(f"{directory}/partition"):
                partitions[devnum] = None
            else:
                name = root.real_path(directory).rpartition("/")[2]
                disks[devnum] = DiskPart(devnum, f"/dev/{name.replace('!', '/')}")
    children = read_children({str(function.bdf) for function in group.functions}, root)
    return group._replace(
        disks=tuple(disks.values()), partitions=tuple(partitions), children=tuple(children)
    )


def read_cdev(device: str, root: HostRoot) -> str | None:
    """The node of a VFIO device by itself, for a directory below /sys; Linux 6.1 and later.

    None where the kernel has none, or the node is not in /dev: it needs CONFIG_VFIO_DEVICE_CDEV.
    """
    name = next(iter(root.list_dir(f"{device}/vfio-dev")), None)
    node = f"/dev/vfio/devices/{name}"
    return node if name and root.stat_or_none(node) else None


def list_vfio_nodes(device: str, root: HostRoot) -> list[str]:
    """The nodes by which VFIO gives a device away: that of its group, and its own if it has one.

    This reads only links: readers of the device's files wait while the kernel unbinds it.
    """
    number = find_group(device, root)
    if number is None:
        return []
    # The group of a mediated device has that name too, and an ordinary node.
    is_unsafe = not UUID.match(device.rpartition("/")[2]) and is_noiommu(number, root)
    cdev = read_cdev(device, root)
    return [group_node(number, is_noiommu=is_unsafe), *([cdev] if cdev else [])]


@contextmanager
def open_nodes(nodes: Mapping[str, str], root: HostRoot) -> Iterator[dict[str, int]]:
    """Descriptors on nodes of VFIO, for reading and writing, by the names given; closed after.

    The name of a device's own node is the device's: its BDF or UUID. Raises AttributeReadError,
    and NoSuchDevice when a node belongs to another device: numbers are reused.
    """
    with ExitStack() as opened:
        files = {}
        for name, node in nodes.items():
            files[name] = root.open_node(node)
            opened.callback(os.close, files[name])
            if CDEV_NODE.match(node):
                _check_is_of(name, node, files[name], root)
        yield files


def _check_is_of(name: str, node: str, descriptor: int, root: HostRoot) -> None:
    """NoSuchDevice unless the opened file is the node that the kernel made for the device."""
    status = root.stat_descriptor(descriptor)
    link = f"{root.sys_dev}/char/{node_number(status)}" if status and status.st_rdev else ""
    if link and f"/{name}/vfio-dev/" not in root.real_path(link):
        raise file_replaced(node, root)


def is_vfio_driver(function: PciFunction, root: HostRoot) -> bool:
    """Whether a function is bound to VFIO: to vfio-pci or a variant driver.

    Linux 6.1 and later have a directory `vfio-dev`; before, the driver's name decides.
    """
    if function.driver is None:
        return False
    if function.driver in _VFIO_DRIVERS or function.driver.endswith(("_vfio_pci", "-vfio-pci")):
        return True
    try:
        return bool(root.list_dir(f"{function.sysfs_path}/vfio-dev"))
    except AttributeReadError:
        return False


_ENABLE_SRIOV = "/sys/module/vfio_pci/parameters/enable_sriov"


def find_vfio_owner(function: PciFunction, root: HostRoot) -> PciFunction | None:
    """The physical function of a virtual one, if VFIO has it; else None.

    The kernel opens the virtual function then only with the physical one's VF token.
    """
    owner = find_function(function.physfn, root) if function.physfn else None
    return owner if owner and is_vfio_driver(owner, root) else None


def can_have_virtfns(bdf: Bdf, root: HostRoot) -> bool:
    """Whether a function has virtual functions, or can get some while vfio-pci has it.

    The kernel has VF tokens since there is the parameter `enable_sriov`, which is off by default.
    Source: vfio_pci_sriov_configure, Linux drivers/vfio/pci/vfio_pci.c.
    """
    if root.read_int(f"{root.pci_devices}/{bdf}/sriov_totalvfs") is None:
        return False
    enabled = (root.read_attribute(_ENABLE_SRIOV) or b"").strip() == b"Y"
    return enabled or bool(read_virtfns(bdf, root))
