"""IOMMU groups: devices that the hardware can only hand over together.

Source: Documentation/ABI/testing/sysfs-kernel-iommu_groups, Documentation/driver-api/vfio.rst.
"""

import errno

from vmplug.devnum import is_decimal
from vmplug.errors import AttributeReadError
from vmplug.host.root import HostRoot

IOMMU_NODE = "/dev/iommu"
"""iommufd: without it, a device's own node is useless. Source: Documentation/userspace-api."""

NOIOMMU = "noiommu-"
"""Before the number in the name of a node without an IOMMU. Source: vfio_group_alloc."""


def read_group(number: int, root: HostRoot) -> list[str]:
    """The names of the devices in a group: BDFs, mdev UUIDs; empty when there is no such group."""
    return root.list_dir(f"{root.iommu_groups}/{number}/devices")


def is_noiommu(number: int, root: HostRoot) -> bool:
    """Whether VFIO itself made the group, for a function without an IOMMU.

    The groups of mediated devices have the same name, and their parent's driver protects the host.
    Source: vfio_noiommu_group_alloc, Linux drivers/vfio/group.c; measured on Linux 6.1.
    """
    name = root.read_attribute(f"{root.iommu_groups}/{number}/name")
    return (name or b"").strip() == b"vfio-noiommu"


def group_node(number: int | None, *, is_noiommu: bool) -> str:
    """The node of a group while VFIO has it."""
    return f"/dev/vfio/{NOIOMMU if is_noiommu else ''}{number}"


def read_groups(root: HostRoot) -> list[int]:
    """The numbers of all groups."""
    return sorted(int(name) for name in root.list_dir(root.iommu_groups) if is_decimal(name))


def read_membership(root: HostRoot) -> dict[str, int]:
    """The group of every device that is in one, by the device's name."""
    return {name: number for number in read_groups(root) for name in read_group(number, root)}


def find_group(device: str, root: HostRoot) -> int | None:
    """The group of a device below /sys (its directory); None when it is in none.

    A copy of a host may have a directory where the kernel has a link; then the groups are
    searched. Raises AttributeReadError.
    """
    try:
        target = root.read_link(f"{device}/iommu_group")
    except AttributeReadError as error:
        if error.errno != errno.EINVAL:
            raise
        return read_membership(root).get(device.rpartition("/")[2])
    number = target.rpartition("/")[2] if target else ""
    return int(number) if is_decimal(number) else None


def has_iommu(root: HostRoot) -> bool:
    """Whether the kernel uses an IOMMU at all."""
    return bool(root.list_dir("/sys/class/iommu")) or not all(
        is_noiommu(number, root) for number in read_groups(root)
    )


def remaps_interrupts(root: HostRoot) -> bool | None:
    """Whether the IOMMU checks interrupts too, so that a guest cannot forge the host's.

    None where it is unknown: only x86 kernels show it, by the names of their interrupt controllers
    (`IR-IO-APIC`). Source: arch/x86/kernel/apic/io_apic.c.
    """
    text = root.read_text("/proc/interrupts") or ""
    if "IO-APIC" not in text:
        return None
    return "IR-" in text


def overrides_acs(root: HostRoot) -> bool:
    """Whether groups are smaller than the hardware makes them, as some distributions' kernels can.

    Source: the patch "pci: Enable overrides for missing ACS capabilities", which Linux never took.
    """
    words = (root.read_text("/proc/cmdline") or "").split()
    return any(word.startswith("pcie_acs_override=") for word in words)


def allows_unsafe_interrupts(module: str, root: HostRoot) -> bool:
    """Whether the operator lets a module of VFIO work without it.

    Groups are those of `vfio_iommu_type1`, devices by their own nodes of `iommufd`.
    Source: drivers/vfio/vfio_iommu_type1.c; drivers/iommu/iommufd/device.c.
    """
    return (root.read_attribute(unsafe_interrupts(module)) or b"").strip() == b"Y"


def unsafe_interrupts(module: str) -> str:
    """The file that says it, and is there while the module is loaded."""
    return f"/sys/module/{module}/parameters/allow_unsafe_interrupts"
