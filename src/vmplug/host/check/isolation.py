"""Does the hardware keep a VM that has the group out of the host's memory and interrupts?"""

from collections.abc import Iterator

from vmplug.address import Bdf, find_bdf
from vmplug.host.block.usage import HostUsage
from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.pci.function import PciFunction
from vmplug.host.pci.group import VfioGroup
from vmplug.host.pci.iommu import (
    IOMMU_NODE,
    allows_unsafe_interrupts,
    has_iommu,
    overrides_acs,
    remaps_interrupts,
    unsafe_interrupts,
)
from vmplug.host.pci.vfio import has_node
from vmplug.host.root import HostRoot

_ENABLE = (
    "enable it: VT-d, AMD-Vi or SMMU in the firmware, and on x86 intel_iommu=on or amd_iommu=on "
    "on the kernel's command line"
)
_IF_VM = ", or give this host one if it is a VM itself"


def check_isolation(group: VfioGroup, usage: HostUsage, root: HostRoot) -> Iterator[Finding]:
    """Every reason why the VM could reach the host through the group."""
    if group.number is None:
        yield _no_group(group, root)
    elif group.is_noiommu:
        yield Finding(
            Code.NO_IOMMU,
            f"{group.members[0]} is with VFIO in no-IOMMU mode ({group.host_path}): the VM could "
            "write to all of the host's memory, and QEMU does not take such a group",
            f"vmplug needs an IOMMU: {_ENABLE}{_IF_VM}",
        )
    elif not group.mediated:
        if usage.once(remaps_interrupts) is False:
            yield _no_remapping(group, root)
        if usage.once(overrides_acs):
            yield _split_by_hand(group)
        yield from _reserved_memory(group, root)


def _no_group(group: VfioGroup, root: HostRoot) -> Finding:
    name = group.members[0]
    controller = _vmd_controller(group.functions[0], root) if group.functions else None
    if controller:
        return Finding(
            Code.NO_IOMMU,
            f"{name} is behind Intel's volume management device {controller} (VMD), and has no "
            "IOMMU group of its own there",
            "turn VMD off for its slot in the firmware, or hand over the controller with every "
            f"drive behind it: vfio:{controller}",
        )
    if has_iommu(root):
        return Finding(
            Code.NO_IOMMU,
            f"{name} is in no IOMMU group, although the host uses its IOMMU",
            "the firmware or an option of the kernel leaves it out, as intel_iommu=igfx_off does "
            "(dmesg: DMAR, AMD-Vi); hand over another device",
        )
    why = "the host has no IOMMU, or does not use it"
    return Finding(Code.NO_IOMMU, f"{name} is in no IOMMU group: {why}", _ENABLE + _IF_VM)


def _vmd_controller(function: PciFunction, root: HostRoot) -> Bdf | None:
    """The controller that made the function's domain; None for a domain of the machine's own.

    The directory of such a domain is below the controller's:
    /sys/devices/pci0000:64/0000:64:00.5/pci10000:00/10000:00:02.0/10000:01:00.0.
    Source: vmd_enable_domain, Linux drivers/pci/controller/vmd.c.
    """
    above, found, _ = root.real_path(function.sysfs_path).rpartition("/pci")
    controller = find_bdf(above.rpartition("/")[2]) if found else None
    if controller is None:
        return None
    driver = root.read_link(f"{root.pci_devices}/{controller}/driver")
    return controller if driver and driver.rpartition("/")[2] == "vmd" else None


def _no_remapping(group: VfioGroup, root: HostRoot) -> Finding:
    module = "iommufd" if group.cdev_nodes and has_node(IOMMU_NODE, root) else "vfio_iommu_type1"
    is_allowed = allows_unsafe_interrupts(module, root)
    return Finding(
        Code.NO_INTERRUPT_REMAPPING,
        f"the IOMMU does not remap interrupts: through {group.members[0]} the VM could "
        "inject interrupts into the host",
        "enable interrupt remapping in the firmware; for a VM that you trust, "
        + (
            f"allow_unsafe_interrupts=Y of {module} is set already"
            if is_allowed
            else f"modprobe {module}; echo Y > {unsafe_interrupts(module)}"
        ),
        Severity.WARNING if is_allowed else Severity.ERROR,
    )


def _split_by_hand(group: VfioGroup) -> Finding:
    return Finding(
        Code.ACS_OVERRIDE,
        f"the kernel only believes that devices are apart (pcie_acs_override): group "
        f"{group.number} may be a part of a larger one, so the VM could reach other devices, and "
        "they its memory",
        "boot without pcie_acs_override, and hand over whole groups; or give the devices of one "
        "slot or switch to VMs that trust each other",
        Severity.WARNING,
    )


def _reserved_memory(group: VfioGroup, root: HostRoot) -> Iterator[Finding]:
    """Memory that the firmware goes on using through the device: the kernel keeps it mapped.

    Regions of graphics and USB are `direct-relaxable`, and do no harm.
    Source: Documentation/ABI/testing/sysfs-kernel-iommu_groups; Linux drivers/iommu/iommu.c.
    """
    text = root.read_attribute(f"{root.iommu_groups}/{group.number}/reserved_regions") or b""
    regions = [line.split() for line in text.decode(errors="replace").splitlines()]
    direct = [f"{words[0]}-{words[1]}" for words in regions if words[2:3] == ["direct"]]
    if direct:
        yield Finding(
            Code.RESERVED_MEMORY,
            f"the firmware keeps host memory for group {group.number} ({', '.join(direct[:3])}): "
            "the kernel refuses to give the group away",
            "turn off what uses it in the firmware (RMRR; on HP servers 'shared memory "
            "features'), or put the device into another slot",
        )
