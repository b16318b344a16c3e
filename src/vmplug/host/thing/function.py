"""The trees of PCI functions, IOMMU groups and mediated devices."""

import stat
from collections.abc import Iterator

from msgspec.structs import replace

from vmplug.address import Bdf, find_bdf
from vmplug.host.block.usage import HostUsage
from vmplug.host.check.thing import identify, identify_member, name_member
from vmplug.host.check.unknown import gather_unknown
from vmplug.host.check.vfio_group import check_networks
from vmplug.host.pci.function import PciFunction, find_function, read_virtfns
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.mdev import MediatedDevice, read_children, read_mdev_types
from vmplug.host.pci.nodes import read_node_paths, read_nodes
from vmplug.host.pci.pci_ids import PciNames
from vmplug.host.pci.uses import (
    BlockDevices,
    NetworkUses,
    read_network_interfaces,
    read_network_uses,
)
from vmplug.host.pci.vfio import is_vfio_driver
from vmplug.host.root import HostRoot
from vmplug.host.thing.disk import DiskReader
from vmplug.host.thing.thing import Relation, Thing, ThingKind
from vmplug.host.thing.uses import place_uses


class FunctionReader:
    """Reads the things of functions; a disk with several controllers is in the tree once."""

    def __init__(self, usage: HostUsage, root: HostRoot) -> None:
        self._usage = usage
        self._disks = DiskReader(usage, root)
        self._root = root
        self._names = PciNames(root)

    def group(self, group: VfioGroup) -> Thing:
        """The member that was named, with the rest of its group; else the group itself."""
        root = self._root
        named = next((f for f in group.functions if str(f.bdf) == group.named), None)
        if group.mediated:
            own, relation = self._mediated(group.mediated, None), Relation.SAME_GROUP
        elif named:
            own, relation = self._function(named, None), Relation.SAME_GROUP
        else:
            own, relation = self._whole(group), Relation.MEMBER
        others = [self._function(f, relation) for f in group.functions if f is not named]
        others += [self._bare(bridge, Relation.BRIDGE) for bridge in group.bridges]
        others += [
            Thing(kind=ThingKind.OTHER_DEVICE, name=name, relation=relation)
            for name in group.unknown_members
        ]
        nodes = [node for _, node in group.cdev_nodes]
        nodes += [group.group_node] if group.number is not None else []
        there = [
            Thing(kind=ThingKind.CHARACTER_DEVICE, name=node, relation=Relation.NODE)
            for node in nodes
            if root.stat_or_none(node)
        ]
        return replace(own, made_of=(*own.made_of, *there, *others))

    def _whole(self, group: VfioGroup) -> Thing:
        unknown = " ".join(["vfio", *(f"{name}:-" for name in group.members)])
        identity = identify(group, self._root) if self._root.is_live else unknown
        name = group.host_path if group.number is None else str(group.number)
        return Thing(kind=ThingKind.IOMMU_GROUP, name=name, identity=identity)

    def _function(self, function: PciFunction, relation: Relation | None) -> Thing:
        """A function with everything that its driver made of it."""
        parts = [
            *self._disks_of(function),
            *self._nodes(function),
            *self._interfaces(function.bdf),
            *self._mediated_of(str(function.bdf)),
            *self._virtual(function.bdf),
        ]
        physfn = find_function(function.physfn, self._root) if function.physfn else None
        if physfn:
            parts.append(self._bare(physfn, Relation.PHYSICAL_FUNCTION))
        return replace(self._bare(function, relation), made_of=tuple(parts))

    def _bare(self, function: PciFunction, relation: Relation | None) -> Thing:
        """A function by itself."""
        device = self._names.find_device(function.vendor_id, function.device_id)
        title = (self._names.find_vendor(function.vendor_id), device)
        return Thing(
            kind=ThingKind.BRIDGE if function.is_bridge else ThingKind.FUNCTION,
            name=str(function.bdf),
            identity=self._identity(function.sysfs_path),
            relation=relation,
            title=" ".join(filter(None, title)) or self._names.find_class(function.class_code),
            driver=function.driver,
        )

    def _identity(self, path: str) -> str:
        """In a copy of a host the inode is the copy's."""
        if self._root.is_live:
            return f"vfio {identify_member(path, self._root)}"
        return f"vfio {name_member(path, self._root)}:-"

    def _disks_of(self, function: PciFunction) -> Iterator[Thing]:
        root = self._root
        for number in self._usage.once(BlockDevices).of(function.bdf):
            is_part = root.stat_or_none(f"{root.sys_dev}/block/{number}/partition")
            if not is_part and (disk := self._disks.of_function(number)):
                yield disk

    def _nodes(self, function: PciFunction) -> Iterator[Thing]:
        for node in read_nodes(function.bdf, self._usage.once(read_node_paths), self._root):
            if node.kind == stat.S_IFCHR and not node.path.startswith("/dev/vfio/"):
                yield Thing(
                    kind=ThingKind.CHARACTER_DEVICE,
                    name=node.path,
                    identity=f"char {node.number}" if node.number else None,
                    relation=Relation.NODE,
                )

    def _interfaces(self, bdf: Bdf) -> Iterator[Thing]:
        for interface in read_network_interfaces(bdf, self._root, self._network):
            is_unknown = interface.has_address is None or interface.has_default_route is None
            yield Thing(
                kind=ThingKind.INTERFACE,
                name=interface.name,
                relation=Relation.INTERFACE,
                unknown=("its addresses and routes",) if is_unknown else (),
            )

    def _network(self) -> NetworkUses:
        return self._usage.once(read_network_uses)

    def _virtual(self, bdf: Bdf) -> Iterator[Thing]:
        """The virtual functions, with the uses of their interfaces; each has more of its own."""
        for address in read_virtfns(bdf, self._root):
            if function := find_function(address, self._root):
                thing = self._bare(function, Relation.VIRTUAL_FUNCTION)
                parts = [*self._interfaces(address), *self._mediated_of(str(address))]
                thing = replace(thing, made_of=tuple(parts))
                if not is_vfio_driver(function, self._root):
                    found = check_networks(function, self._usage, self._root)
                    thing = place_uses(thing, gather_unknown(found, str(address), self._root))
                yield thing

    def _mediated(self, device: MediatedDevice, relation: Relation | None) -> Thing:
        queues = " ".join(device.ap_queues)
        return Thing(
            kind=ThingKind.MEDIATED_DEVICE,
            name=device.uuid,
            identity=self._identity(device.sysfs_path),
            relation=relation,
            title=f"{device.type}, queues {queues}" if queues else str(device.type),
            made_of=() if relation else (self._parent(device.parent),),
        )

    def _parent(self, name: str) -> Thing:
        """A parent of mediated devices: a function, or another device such as `matrix`."""
        bdf = find_bdf(name)
        function = find_function(bdf, self._root) if bdf else None
        if function:
            return self._bare(function, Relation.PARENT)
        return Thing(kind=ThingKind.OTHER_DEVICE, name=name, relation=Relation.PARENT)

    def _mediated_of(self, parent: str) -> Iterator[Thing]:
        for device in read_children({parent}, self._root):
            yield self._mediated(device, Relation.MEDIATED_DEVICE)

    def parent_or_type(self, name: str) -> Thing | None:
        """A parent of mediated devices, such as `matrix`, or a type of them; None for neither."""
        types = read_mdev_types(self._root)
        if any(kind.parent == name for kind in types):
            devices = tuple(self._mediated_of(name))
            return Thing(kind=ThingKind.OTHER_DEVICE, name=name, made_of=devices)
        offered = [kind for kind in types if kind.name == name]
        if not offered:
            return None
        return Thing(
            kind=ThingKind.MEDIATED_TYPE,
            name=name,
            title=offered[0].title,
            made_of=tuple(self._parent(kind.parent) for kind in offered),
        )
