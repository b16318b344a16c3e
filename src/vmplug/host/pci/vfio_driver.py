"""Choose and load the VFIO driver for a PCI function.

A variant driver serves some devices better than vfio-pci, for live migration or for memory of
their own. Modules list these devices as aliases in the form of a modalias.
Source: Documentation/driver-api/vfio-pci-device-specific-driver-acceptance.rst; modules.alias in
depmod(8); MODULE_DEVICE_TABLE of `vfio_pci:` in scripts/mod/file2alias.c.
"""

import fnmatch
from collections.abc import Iterator

from vmplug.errors import BindError
from vmplug.host.pci.bind import PCI_DRIVERS, PLAIN_DRIVER
from vmplug.host.pci.function import PciFunction
from vmplug.host.program import run_program
from vmplug.host.root import HostRoot

_VFIO_ENDINGS = ("_vfio_pci", "-vfio-pci")
_ALIAS = "alias vfio_pci:"
_LOAD_TIMEOUT_S = 30.0


def choose_driver(function: PciFunction, root: HostRoot) -> str:
    """The module of the most specific VFIO driver for a function."""
    fitting = [
        (pattern.count("*"), module)
        for pattern, module in _read_aliases(root)
        if _fits(function, pattern)
    ]
    module = min(fitting, default=(0, PLAIN_DRIVER))[1]
    return PLAIN_DRIVER if is_same_driver(module, PLAIN_DRIVER) else module


def check_driver(name: str, function: PciFunction, root: HostRoot) -> None:
    """Raise BindError unless the driver is a VFIO driver that supports the function.

    A driver named in `driver_override` gets any function, and may crash the kernel with one that
    it does not support. Source: pci_match_device, Linux drivers/pci/pci-driver.c; measured on
    Linux 6.1, e1000e with an NVMe drive.
    """
    if is_same_driver(name, PLAIN_DRIVER):
        return
    patterns = [p for p, module in _read_aliases(root) if is_same_driver(module, name)]
    if not (patterns or name.endswith(_VFIO_ENDINGS)):
        why = f"{name} is not a known VFIO driver"
    elif patterns and not any(_fits(function, pattern) for pattern in patterns):
        why = f"{name} is for other devices than {function.bdf}"
    else:
        return
    best = choose_driver(function, root)
    raise BindError(
        str(function.bdf), "choose", why, hint=f"without --driver vmplug chooses {best}"
    )


def _fits(function: PciFunction, pattern: str) -> bool:
    return fnmatch.fnmatchcase((function.modalias or "").removeprefix("pci:"), pattern)


def _read_aliases(root: HostRoot) -> Iterator[tuple[str, str]]:
    """The VFIO aliases of the running kernel's modules, with the names of the modules."""
    release = (root.read_text("/proc/sys/kernel/osrelease") or "").strip()
    for line in (root.read_text(f"/lib/modules/{release}/modules.alias") or "").split("\n"):
        if line.startswith(_ALIAS):
            pattern, _, module = line.removeprefix(_ALIAS).partition(" ")
            if module:
                yield pattern, module.strip()


def find_driver(name: str, root: HostRoot) -> str | None:
    """A driver as the kernel spells it, `-` or `_`; None when it is not loaded."""
    return next(
        (known for known in root.list_dir(PCI_DRIVERS) if is_same_driver(known, name)), None
    )


def is_same_driver(name: str, other: str) -> bool:
    """Whether two names mean one driver: a module has `_` where the driver may have `-`."""
    return name.replace("-", "_") == other.replace("-", "_")


def load_driver(name: str, root: HostRoot, *, device: str) -> str:
    """The driver as the kernel spells it, loaded if it was not. BindError names `device`."""
    if found := find_driver(name, root):
        return found
    directory = [] if root.is_live else ["--dirname", root.path]
    done = run_program(["modprobe", *directory, "--", name], timeout_s=_LOAD_TIMEOUT_S)
    if found := find_driver(name, root):
        return found
    why = "the kernel has no PCI driver of this name" if done.status == 0 else done.complaint
    other = f", or choose another driver with --driver {PLAIN_DRIVER}"
    raise BindError(
        device,
        "modprobe",
        f"the driver {name} cannot be loaded: {why}",
        hint="install the kernel modules"
        + (", or a kernel with CONFIG_VFIO_PCI" if is_same_driver(name, PLAIN_DRIVER) else other),
    )
