"""The devices that resources select, each as a whole: what a VM can get alone."""

import re
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256

import msgspec

from vmplug.address import Bdf
from vmplug.errors import NoSuchDevice
from vmplug.host.block.device import BlockDevice
from vmplug.host.block.sysfs import read_block_device
from vmplug.host.check.thing import identify, name_member
from vmplug.host.kind import DeviceType, FoundBy, Identity
from vmplug.host.paths import find_paths, find_stable_names
from vmplug.host.pci.function import PciFunction, read_functions, read_serial
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.uses import BlockDevices, read_block_paths
from vmplug.host.pci.vfio import find_vfio_device, is_vfio_driver, read_cdev, read_cdev_nodes
from vmplug.host.root import HostRoot
from vmplug.kubernetes.config import Config, Resource
from vmplug.policy.rules import PolicySubject

_BY_ID = "/dev/disk/by-id/"
_CONTAINER_NODE = "/dev/vfio/vfio"
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9._-]")
_ID_LENGTH_MAX = 56
"""Kubernetes takes 63; the name of an annotation has as much, and a prefix."""
_DIGEST_LENGTH = 8

FormerDrivers = Mapping[Bdf, str | None]
"""The drivers that functions had before vmplug bound them."""


class Node(msgspec.Struct, frozen=True):
    """A device node, and its path in a container."""

    host_path: str
    container_path: str


class Unit(msgspec.Struct, frozen=True, kw_only=True):
    """One device of a resource, by its ID there.

    `numa_node` is None where its functions have none, or several. `not_selected` are members of
    the group that the resource does not select. `name` is that of a disk in /dev/disk/by-id.
    """

    resource: Resource
    id: str
    device: VfioGroup | BlockDevice
    nodes: tuple[Node, ...]
    numa_node: int | None = None
    not_selected: tuple[str, ...] = ()
    name: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Its resource and its ID."""
        return self.resource.name, self.id

    @property
    def members(self) -> tuple[str, ...]:
        """The addresses of its functions; none for a disk."""
        return self.device.members if isinstance(self.device, VfioGroup) else ()

    @property
    def title(self) -> str:
        """Its functions, or its node."""
        return " ".join(self.members) or self.device.host_path

    @property
    def parts(self) -> frozenset[Identity]:
        """What no other unit may have: its functions, and disks with their partitions."""
        if isinstance(self.device, BlockDevice):
            return frozenset({self.device.identity})
        disks = (*(disk.devnum for disk in self.device.disks), *self.device.partitions)
        functions = map(Identity.of_vfio, self.device.members)
        return frozenset({*functions, *map(Identity.of_block, disks)})

    def is_bound(self, root: HostRoot) -> bool:
        """Whether VFIO has all of it; a disk needs no binding."""
        if isinstance(self.device, BlockDevice):
            return True
        return all(is_vfio_driver(function, root) for function in self.device.functions)

    def identify(self, root: HostRoot) -> str:
        """This very device in this boot; empty where that is unknown."""
        return identify(self.device, root) or ""

    def describe(self, root: HostRoot) -> str:
        """What of that holds after a boot too."""
        if self.name is not None:
            return self.name
        paths = self.device.member_paths if isinstance(self.device, VfioGroup) else {}
        return " ".join(name_member(path, root) for path in paths.values())

    def read_serial(self, root: HostRoot) -> str | None:
        """The serial numbers of all functions, or the name of the disk, which has it.

        None where one has none that can be read.
        """
        if self.name is not None:
            return self.name
        functions = self.device.functions if isinstance(self.device, VfioGroup) else ()
        serials = [read_serial(function.bdf, root) for function in functions]
        return None if None in serials else " ".join(filter(None, serials)) or None


def find_units(config: Config, root: HostRoot, former: FormerDrivers) -> list[Unit]:
    """Every device that a resource selects, in the order of the configuration and of the host.

    A device that two resources select is there for each; see `find_clashes`. Raises
    AttributeReadError.
    """
    of_functions = [each for each in config.resources if not each.is_of_disks]
    of_disks = [each for each in config.resources if each.is_of_disks]
    found = [*_find_groups(of_functions, root, former)] if of_functions else []
    found += _find_disks(of_disks, root) if of_disks else []
    places = {each.name: place for place, each in enumerate(config.resources)}
    return sorted(found, key=lambda unit: (places[unit.resource.name], _in_order(unit.id)))


def renew(unit: Unit, root: HostRoot) -> Unit | None:
    """The unit as it is now; None if it has gone, or has another ID. Raises AttributeReadError."""
    if isinstance(unit.device, BlockDevice):
        number, node = unit.device.devnum, unit.device.device_node
        device = read_block_device(number, node, FoundBy.SYSFS, root)
        return msgspec.structs.replace(unit, device=device) if device.size_bytes else None
    try:
        group = find_vfio_device(unit.members[0], root)
    except NoSuchDevice:
        return None
    now = _of_group(unit.resource, group, unit.not_selected, root)
    return now if now and now.id == unit.id else None


def find_clashes(units: Iterable[Unit]) -> dict[tuple[str, str], str]:
    """Why units cannot be offered beside others, by their keys: a part of them is selected twice.

    Also for two whose ID is the same.
    """
    owners = dict[object, Unit]()
    clashes = dict[tuple[str, str], str]()
    for unit in units:
        for part in (*unit.parts, unit.id):
            other = owners.setdefault(part, unit)
            if other is not unit:
                names = " and ".join(dict.fromkeys((other.resource.name, unit.resource.name)))
                what = " and ".join(dict.fromkeys((other.title, unit.title)))
                clashes[unit.key] = clashes[other.key] = f"{names} select {what} twice"
    return clashes


def _in_order(id_: str) -> tuple[str, int, str]:
    """By the number at the end."""
    word = id_.rstrip("0123456789")
    return word, int(id_[len(word) :] or 0), id_


def _find_groups(
    resources: Iterable[Resource], root: HostRoot, former: FormerDrivers
) -> Iterator[Unit]:
    """A group for each resource that selects one of its functions."""
    members = dict[int, list[PciFunction]]()
    for function in read_functions(root):
        if function.iommu_group is not None and not function.is_bridge:
            members.setdefault(function.iommu_group, []).append(function)
    blocks = BlockDevices(root)
    for functions in members.values():
        for resource in resources:
            others = [f for f in functions if not _selects(resource, f, former)]
            if len(others) < len(functions):
                group = find_vfio_device(str(functions[0].bdf), root, blocks=blocks)
                names = tuple(str(function.bdf) for function in others)
                if unit := _of_group(resource, group, names, root):
                    yield unit


def _selects(resource: Resource, function: PciFunction, former: FormerDrivers) -> bool:
    driver = former.get(function.bdf, function.driver)
    if resource.drivers is not None and driver not in resource.drivers:
        return False
    if resource.numa is not None and function.numa_node not in resource.numa:
        return False
    subject = PolicySubject(name=str(function.bdf), kind=DeviceType.VFIO, function=function)
    return not resource.rule.objections(subject)


def _of_group(
    resource: Resource, group: VfioGroup, not_selected: tuple[str, ...], root: HostRoot
) -> Unit | None:
    """The unit that a group is; None for one without a number, which VFIO cannot hand over."""
    if group.number is None or not group.functions:
        return None
    nodes = (
        (name, node)
        for name, path in group.member_paths.items()
        if (node := read_cdev(path, root))
    )
    group = group._replace(cdev_nodes=tuple(nodes))  # who opens them has the device too
    cdevs = () if resource.managed or len(group.functions) > 1 else read_cdev_nodes(group, root)
    paths = [cdevs[0][1]] if cdevs else [_CONTAINER_NODE, group.group_node]
    numa_nodes = {function.numa_node for function in group.functions}
    return Unit(
        resource=resource,
        id=cdevs[0][1].rpartition("/")[2] if cdevs else str(group.number),
        device=group,
        nodes=tuple(Node(path, path) for path in paths),
        numa_node=numa_nodes.pop() if len(numa_nodes) == 1 else None,
        not_selected=not_selected,
    )


def _find_disks(resources: Iterable[Resource], root: HostRoot) -> Iterator[Unit]:
    """Whole block devices that have a name which stays the same."""
    paths = read_block_paths(root)
    numbers = {
        number: f"/dev/{name.replace('!', '/')}"
        for name, path in paths.items()
        if path.split("/")[-2] not in paths and (number := root.read_devnum(f"{path}/dev"))
    }
    names = dict[object, list[str]]()
    for name, number in find_stable_names(numbers, root)[0].items():
        names.setdefault(number, []).append(name)
    for number, node in numbers.items():
        if number not in names:
            continue
        device = read_block_device(number, node, FoundBy.SYSFS, root)
        subject = PolicySubject(
            name=node,
            kind=DeviceType.BLOCK,
            number=("b", number),
            paths=find_paths(device, root),
        )
        numa_node = _numa_node_of(device, root)
        for resource in resources:
            if resource.numa is not None and numa_node not in resource.numa:
                continue
            if not resource.rule.objections(subject):
                yield _of_disk(resource, device, sorted(names[number]), numa_node)


def _of_disk(
    resource: Resource, device: BlockDevice, names: list[str], numa_node: int | None
) -> Unit:
    """By the first of its names that the resource selects, or else the first."""
    patterns = resource.rule.paths or ()
    meant = [name for name in names if any(p.matches(_BY_ID + name) for p in patterns)]
    name = (meant or names)[0]
    return Unit(
        resource=resource,
        id=make_id(name),
        device=device,
        nodes=(Node(device.device_node, _BY_ID + name),),
        numa_node=numa_node,
        name=name,
    )


def make_id(name: str) -> str:
    """An ID of at most 56 letters, digits, `.`, `_` and `-` for a name; others get others."""
    text = _NOT_IN_ID.sub("_", name).strip("._-")
    if text == name and len(text) <= _ID_LENGTH_MAX:
        return text
    digest = sha256(name.encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{text[: _ID_LENGTH_MAX - _DIGEST_LENGTH - 1].rstrip('._-') or 'disk'}-{digest}"


def _numa_node_of(device: BlockDevice, root: HostRoot) -> int | None:
    """That of the function that the disk comes from."""
    path = device.sysfs_path or ""
    while path.count("/") > 2:
        path = path.rpartition("/")[0]
        number = root.read_int(f"{path}/numa_node")
        if number is not None:
            return number if number >= 0 else None
    return None
