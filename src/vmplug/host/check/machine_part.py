"""Is a function a part of the machine itself, such as the bridge to its firmware?

A chipset has such functions in one slot with network and disk controllers, and then in one IOMMU
group with them: a VM would get the host's flash memory, sensors and power management.
"""

from collections.abc import Iterator

from vmplug.host.finding import Code, Finding, UsedBy
from vmplug.host.pci.function import PciFunction
from vmplug.host.pci.group import VfioGroup
from vmplug.host.root import HostRoot

_ANYWHERE = {
    0x0601: "ISA bridge: firmware, clock, embedded controller",
    0x0602: "EISA bridge",
    0x0800: "interrupt controller",
    0x0802: "timer",
    0x0803: "clock",
    0x0806: "IOMMU",
    0x0C07: "IPMI: management controller",
}
"""Classes by their first 16 bits, wherever such a function is."""

_OF_CHIPSET = {
    0x0500: "memory of the chipset",
    0x0580: "memory or power management controller",
    0x0680: "power management",
    0x0780: "management engine",
    0x0880: "system peripheral",
    0x0C05: "SMBus: sensors, memory modules",
    0x0C80: "serial bus: flash memory of the firmware, sensors",
    0x1101: "performance counters",
    0x1180: "thermal sensors, serial buses",
}
"""Classes that other devices have too: a graphics card's USB-C controller is 0c80. They are the
machine's when a maker of chipsets made them, and they are on a bus without a bridge above it."""

_CHIPSET_MAKERS = {0x8086, 0x1022, 0x1002, 0x1D94, 0x1D17}
"""Intel, AMD, ATI, Hygon, Zhaoxin."""

_BY_MAKER = {
    (0x1022, 0x1080): "AMD's security processor",
    (0x1D94, 0x1080): "Hygon's security processor",
    (0x103C, 0x0880): "HP's management controller (iLO)",
}
_CXL_MEMORY, _CXL_DEVICES = 0x0502, "/sys/bus/cxl/devices"

_FOR_GUESTS = {"ioatdma", "idxd"}
"""Drivers of Intel's copy engines, which are system peripherals, and are of use to a guest."""


def check_machine_parts(group: VfioGroup, root: HostRoot) -> Iterator[Finding]:
    """One finding that names every such member of the group."""
    parts = [
        f"{function.bdf} ({what})"
        for function in group.functions
        if (what := _machine_part(function, root))
    ]
    if parts:
        what = group.host_path if group.number is None else f"group {group.number}"
        yield Finding(
            Code.MACHINE_PART,
            f"{what} has parts of this machine itself, which would go to the VM "
            f"with it: {', '.join(parts)}",
            "leave the whole group to the host, and hand over a device in a group of its own: "
            "vmplug host lists them",
            used_by=UsedBy(
                on=group.host_path,
                who="this machine itself",
                where=", ".join(parts),
                how="the classes of the functions",
            ),
        )


def _machine_part(function: PciFunction, root: HostRoot) -> str | None:
    """What the function is to the machine; None for an ordinary device."""
    if function.class_code is None or function.vendor_id is None:
        return None
    kind = function.class_code >> 8
    if kind == _CXL_MEMORY and (region := _find_region(function, root)):
        return f"memory of the host, CXL {region}"
    if what := _ANYWHERE.get(kind) or _BY_MAKER.get((function.vendor_id, kind)):
        return what
    is_chipset = function.vendor_id in _CHIPSET_MAKERS and _is_on_root_bus(function, root)
    if not is_chipset or function.driver in _FOR_GUESTS:
        return None
    return _OF_CHIPSET.get(kind)


def _find_region(function: PciFunction, root: HostRoot) -> str | None:
    """The region that the host has made of a card's memory: RAM, /dev/dax0.0 or /dev/pmem0.

    Nothing of it is below the function. The card's memX has an endpoint, whose decoders say it.
    Source: Documentation/ABI/testing/sysfs-bus-cxl, `uport` and `region`.
    """
    own = {name for name in root.list_dir(function.sysfs_path) if name.startswith("mem")}
    for endpoint in root.list_dir(_CXL_DEVICES) if own else ():
        base = f"{_CXL_DEVICES}/{endpoint}"
        if (root.read_link(f"{base}/uport") or "").rpartition("/")[2] not in own:
            continue
        for decoder in root.list_dir(base):
            data = root.read_attribute(f"{base}/{decoder}/region") or b""
            if region := data.decode(errors="replace").strip():
                return region
    return None


def _is_on_root_bus(function: PciFunction, root: HostRoot) -> bool:
    """Whether its directory is in that of a host bridge: /sys/devices/pci0000:00/0000:00:1f.0."""
    above = root.real_path(function.sysfs_path).rpartition("/")[0]
    return above.rpartition("/")[2].startswith("pci")
