"""An IOMMU group: the unit in which VFIO hands devices over."""

from typing import TYPE_CHECKING, NamedTuple

from vmplug.devnum import DevNum
from vmplug.host.block.device import DiskPart
from vmplug.host.kind import DeviceType, FoundBy, Identity
from vmplug.host.pci.iommu import group_node

if TYPE_CHECKING:
    from vmplug.host.pci.function import PciFunction
    from vmplug.host.pci.mdev import MediatedDevice


class VfioGroup(NamedTuple):
    """An IOMMU group, which is handed over as a whole.

    `functions` are its PCI functions, `mediated` is its mediated device, `bridges` stay with the
    host. `unknown_members` are of kinds that vmplug does not support. `named` is the function or
    UUID that the request named, `device_node` the node; each is None when the request named the
    other. `number` is None for a device in no group: its host has no IOMMU. `cdev_nodes` are nodes
    of the members themselves, by name, when the request named one and iommufd can use them.
    `disks` are the host's disks behind the functions, `partitions` the numbers of theirs; after a
    check has looked for them, also of everything else that shows bytes of these disks.
    `children` are the mediated devices that are parts of the functions. `is_noiommu`: VFIO made
    the group for a function without an IOMMU.
    """

    number: int | None
    device_node: str | None
    functions: tuple["PciFunction", ...]
    bridges: tuple["PciFunction", ...] = ()
    mediated: "MediatedDevice | None" = None
    unknown_members: tuple[str, ...] = ()
    named: str | None = None
    found_by: FoundBy = FoundBy.SYSFS
    cdev_nodes: tuple[tuple[str, str], ...] = ()
    disks: tuple[DiskPart, ...] = ()
    partitions: tuple[DevNum, ...] = ()
    children: tuple["MediatedDevice", ...] = ()
    is_noiommu: bool = False

    @property
    def kind(self) -> DeviceType:
        """VFIO."""
        return DeviceType.VFIO

    @property
    def members(self) -> tuple[str, ...]:
        """The BDFs of the functions, or the UUID of the mediated device."""
        return (
            (self.mediated.uuid,) if self.mediated else tuple(str(f.bdf) for f in self.functions)
        )

    @property
    def member_paths(self) -> dict[str, str]:
        """The directories of the members in sysfs, by BDF or UUID."""
        paths = {str(function.bdf): function.sysfs_path for function in self.functions}
        if self.mediated:
            paths[self.mediated.uuid] = self.mediated.sysfs_path
        return paths

    @property
    def host_path(self) -> str:
        """The node that was named, or the one that the group has while VFIO holds it."""
        return self.device_node or (self.named or "" if self.number is None else self.group_node)

    @property
    def group_node(self) -> str:
        """The node that the group has while VFIO holds it, if the kernel makes such nodes."""
        return group_node(self.number, is_noiommu=self.is_noiommu)

    @property
    def identity(self) -> Identity:
        """The first member: group numbers change when devices come and go."""
        return Identity.of_vfio(self.members[0] if self.members else self.number)

    @property
    def related_identities(self) -> tuple[Identity, ...]:
        """The other members, what they are parts of and have as parts, disks and partitions.

        A virtual function is a part of the physical one, a mediated device of its parent.
        """
        others = self.members[1:]
        above = {str(f.physfn) for f in self.functions if f.physfn}
        above |= {self.mediated.parent} if self.mediated else set()
        children = [child.uuid for child in self.children]
        functions = map(Identity.of_vfio, (*others, *sorted(above - set(self.members)), *children))
        numbers = (*(disk.devnum for disk in self.disks), *self.partitions)
        return (*functions, *map(Identity.of_block, numbers))
