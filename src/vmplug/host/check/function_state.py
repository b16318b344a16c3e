"""Is a PCI function itself fit to go? What sysfs shows that the kernel, QEMU or the guest refuse.

Reading the configuration space wakes a function that sleeps, as lspci(8) does; the kernel lets it
sleep again.
"""

from collections.abc import Iterator

from vmplug.host.finding import Code, Finding, Severity
from vmplug.host.pci.function import PciFunction
from vmplug.host.root import HostRoot

_HEADER_BYTES, _HEADER_TYPE, _KIND_OF_HEADER = 64, 0x0E, 0x7F
"""Source: include/uapi/linux/pci_regs.h."""

_PARAMETERS = "/sys/module/vfio_pci/parameters"
_QUICK_ASSIST = {0x0435, 0x0443, 0x19E2, 0x19E3, 0x37C8, 0x37C9}
_ACCELERATORS = {0x0B25, 0x0CFE}
_INTEL = 0x8086
"""Devices that can be made to harm the host. Linux 5.9 and later refuse the first ones, 6.9 and
its contemporaries the others too. Source: vfio_pci_dev_in_denylist, Linux drivers/vfio/pci."""


def check_function(function: PciFunction, root: HostRoot, *, has_vfio: bool) -> Iterator[Finding]:
    """Every reason in the function itself; `has_vfio`: VFIO has taken it already."""
    if lost := _why_lost(function, root):
        yield Finding(
            Code.NO_RESPONSE,
            f"{function.bdf} {lost}",
            f"echo 1 > {function.sysfs_path}/remove; echo 1 > /sys/bus/pci/rescan; if it does not "
            "come back, power the host off and check the card",
        )
        return
    yield from _bars_without_address(function)
    yield from _without_type(function, root)
    if not has_vfio:
        yield from _refused_by_vfio(function, root)


def _why_lost(function: PciFunction, root: HostRoot) -> str | None:
    """The words for a function that does not answer; None for one that does.

    A virtual function has no ids in its own header, but the rest of it.
    """
    header = root.read_at(f"{function.sysfs_path}/config", 0, _HEADER_BYTES)
    if header == b"\xff" * _HEADER_BYTES:
        return "does not answer (its configuration space is all FF): it has fallen off the bus"
    power = _word(function, "power_state", root)
    runtime = _word(function, "power/runtime_status", root)
    if runtime == "error":
        return "cannot be woken: its power management has failed (power/runtime_status is error)"
    if power == "error" or (power == "D3cold" and runtime == "active"):
        return f"has no power (power_state is {power})"
    return None


def _word(function: PciFunction, file: str, root: HostRoot) -> str | None:
    text = root.read_attribute(f"{function.sysfs_path}/{file}")
    return None if text is None else text.decode(errors="replace").strip()


def _bars_without_address(function: PciFunction) -> Iterator[Finding]:
    """The guest does not see such a BAR, and no message says so; drivers do without ports."""
    lost = [bar for bar in function.bars or () if not bar.is_assigned]
    if not lost:
        return
    words = ", ".join(
        f"{bar.number} ({_size(bar.size_bytes)})" if bar.size_bytes else str(bar.number)
        for bar in lost
    )
    yield Finding(
        Code.BAR_UNASSIGNED,
        f"the host has given no address to BAR {words} of {function.bdf}: the guest will not see "
        "it",
        "allow large BARs in the firmware (Above 4G Decoding), or boot the host with pci=realloc",
        Severity.ERROR if any(bar.is_memory for bar in lost) else Severity.WARNING,
    )


def _size(size_bytes: int) -> str:
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size_bytes >> shift:
            return f"{size_bytes >> shift} {unit}"
    return f"{size_bytes} bytes"


def _without_type(function: PciFunction, root: HostRoot) -> Iterator[Finding]:
    """A virtual function that NVIDIA's driver itself gives to VFIO, as what its type says.

    Source: NVIDIA's "Virtual GPU Software User Guide", the vendor-specific VFIO framework.
    """
    base = f"{function.sysfs_path}/nvidia"
    if function.physfn and root.read_int(f"{base}/current_vgpu_type") == 0:
        yield Finding(
            Code.VFIO_REFUSES,
            f"{function.bdf} has no type of virtual GPU yet, and without one a VM cannot use it",
            f"cat {base}/creatable_vgpu_types; echo TYPE > {base}/current_vgpu_type",
        )


def _refused_by_vfio(function: PciFunction, root: HostRoot) -> Iterator[Finding]:
    """What vfio-pci does not take: bind would fail after the function has left its driver."""
    header = root.read_at(f"{function.sysfs_path}/config", 0, _HEADER_BYTES)
    if len(header) > _HEADER_TYPE and header[_HEADER_TYPE] & _KIND_OF_HEADER:
        yield Finding(
            Code.VFIO_REFUSES,
            f"{function.bdf} is a bridge by its configuration space (header type "
            f"{header[_HEADER_TYPE] & _KIND_OF_HEADER}), which vfio-pci does not take",
            "hand over a function behind it, or another device",
        )
    is_listed = function.device_id in _QUICK_ASSIST | _ACCELERATORS
    if function.vendor_id == _INTEL and is_listed and not _takes_listed(root):
        yield Finding(
            Code.VFIO_REFUSES,
            f"{function.bdf} is an Intel accelerator that a VM can use to harm the host: vfio-pci "
            "does not take it",
            "for a VM that you trust: modprobe -r vfio-pci; modprobe vfio-pci disable_denylist=1",
            Severity.ERROR if function.device_id in _QUICK_ASSIST else Severity.WARNING,
        )


def _takes_listed(root: HostRoot) -> bool:
    """Whether the denylist is off, or the kernel is older than it."""
    flag = root.read_attribute(f"{_PARAMETERS}/disable_denylist")
    if flag is None:
        return bool(root.list_dir(_PARAMETERS))
    return flag.strip() == b"Y"
